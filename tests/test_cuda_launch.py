"""How CUDA kernels are declared and launched. CuPy is stood in for; only the tests marked gpu need a device."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npmamba import doctor
from npmamba.cuda import launch, machine, requirements
from npmamba.cuda.device import Data, Long, Real, Size, Stride, cuda, load, shift, store
from npmamba.cuda.launch import Kernel, interpreted_by

ROOT = Path(__file__).resolve().parent.parent
uint32 = np.uint32


def _axpy(real, times=1):
    def axpy(x: Data, y: Data, flags: Long, far: Stride, n: Size, alpha: Real):
        i = uint32(cuda.blockIdx.x) * uint32(64) + uint32(cuda.threadIdx.x)
        if i < n:
            p = shift(y, far)
            for _ in range(times):
                store(p, i, alpha * load(x, i) + load(p, i))

    return axpy


@pytest.fixture(autouse=True)
def kernels_of_this_file_stay_here(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", [])


class Pointed:
    """What the launcher sees of a CuPy array."""

    def __init__(self, device: int = 0) -> None:
        self.data = types.SimpleNamespace(device_id=device, ptr=4096)


class FakeCupy:
    """CuPy as the launcher uses it; `launched` lists the arguments of its launches, `loaded` the machine code."""

    def __init__(self) -> None:
        self.device, self.launched, self.loaded, self.attributes = 0, [], [], []
        self.failure: Exception | None = None
        self.fixed = 0
        """Bytes of shared memory that a kernel itself declares."""
        runtime = types.SimpleNamespace(
            getDevice=lambda: self.device,
            getDeviceCount=lambda: 2,
            getDeviceProperties=lambda device: {
                "name": b"NVIDIA Made Up", "major": 9, "minor": 0, "totalGlobalMem": 2**36
            },
        )  # fmt: skip
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            function=types.SimpleNamespace(Module=lambda: types.SimpleNamespace(load=self.load, get_function=self.get)),
            Device=lambda number: types.SimpleNamespace(compute_capability="90"),
            driver=types.SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1,
                funcGetAttribute=lambda attribute, function: {1: self.fixed}[attribute],
                funcSetAttribute=lambda *a: self.attributes.append(a),
            ),
        )

    def load(self, code: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.loaded.append(code)

    def get(self, entry: str) -> Any:
        launched = self.launched

        class Function:
            ptr = 77

            def __call__(self, *arguments: Any) -> None:
                launched.append((entry, *arguments))

        return Function()


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(requirements, "RUNTIME", ())
    monkeypatch.setattr(machine, "machine_code", lambda found, cc: (f"{found.name} sm_{cc[0]}{cc[1]}", b"code"))
    machine.architecture.cache_clear()
    yield fake
    machine.architecture.cache_clear()


ARGUMENTS = (Pointed(), Pointed(), None, -5, 4_000_000_000, 0.5)


# --- what is launched ---


def test_a_launch_passes_arguments_as_the_kernel_declares_them(cupy):
    kernel = Kernel(_axpy, threads=lambda times: 64 * times)
    kernel.launch((3, 2), np.dtype("float32"), ARGUMENTS, times=2)
    ((entry, grid, threads, passed, shared),) = cupy.launched
    assert entry == "test_cuda_launch.axpy-float32-times=2 sm_90"
    assert (grid, threads, shared) == ((3, 2), (128,), 0)
    assert passed[:2] == ARGUMENTS[:2]
    assert passed[2] == 0
    assert passed[2].dtype == np.uint64, "an absent array is a null pointer"
    assert passed[3:5] == (-5, 4_000_000_000), "CuPy passes a Python int as 64 bits"
    assert all(type(x) is int for x in passed[3:5])
    assert passed[5] == np.float32(0.5)
    assert passed[5].dtype == np.float32


def test_numbers_of_numpy_become_what_is_passed_as_64_bits(cupy):
    arguments = (*ARGUMENTS[:3], np.int32(-5), np.uint8(7), np.float64(0.5))
    Kernel(_axpy, threads=64).launch((1,), np.float64, arguments, times=1)
    passed = cupy.launched[0][3]
    assert [type(x) for x in passed[3:]] == [np.int64, int, np.float64]
    Kernel(_axpy, threads=64).launch((1,), np.float64, (*ARGUMENTS[:3], True, True, 1), times=1)
    passed = cupy.launched[1][3]
    assert [type(x) for x in passed[3:]] == [np.int64, int, np.float64], "a bool of CuPy's is one byte"


def test_an_empty_grid_launches_nothing(cupy):
    for grid in [(0,), (5, 0), (1, 1, 0)]:
        Kernel(_axpy, threads=64).launch(grid, np.float32, (), times=1)
    assert not cupy.loaded


def test_a_kernel_is_loaded_once_for_each_dtype_constant_and_device(cupy):
    kernel = Kernel(lambda real, a, b: _axpy(real), threads=64)
    for _ in range(2):
        for cupy.device, dtype in itertools.product((0, 1), (np.dtype("float32"), np.dtype("float16"))):
            arguments = (Pointed(cupy.device), Pointed(cupy.device), *ARGUMENTS[2:])
            kernel.launch((1,), dtype, arguments, a=1, b=2)
            kernel.launch((1,), dtype, arguments, a=2, b=1)
            kernel.launch((1,), dtype, arguments, b=2, a=1)
    names = [entry for entry, *_ in cupy.launched]
    assert names[:3] == [names[0], names[1], names[0]], "constants go by name, not by place"
    assert len(set(names)) == 4
    assert len(cupy.launched) == 24
    assert len(cupy.loaded) == 12


def test_dynamic_shared_memory_beyond_48_kib_is_asked_for_as_it_grows(cupy):
    kernel = Kernel(_axpy, threads=64)
    for shared in (0, 48 * 1024, 100_000, 50_000, 100_000, 200_000):
        kernel.launch((1,), np.float32, ARGUMENTS, shared=shared, times=1)
    assert cupy.attributes == [(77, 8, 100_000), (77, 8, 200_000)]
    assert [call[-1] for call in cupy.launched] == [0, 48 * 1024, 100_000, 50_000, 100_000, 200_000]


def test_what_a_kernel_declares_counts_towards_the_48_kib(cupy):
    cupy.fixed = 1024
    kernel = Kernel(_axpy, threads=64)
    for shared in (0, 47 * 1024, 47 * 1024 + 1, 48 * 1024):
        kernel.launch((1,), np.float32, ARGUMENTS, shared=shared, times=1)
    assert cupy.attributes == [(77, 8, 47 * 1024 + 1), (77, 8, 48 * 1024)]


def test_a_launch_costs_the_host_a_few_microseconds(cupy):
    """Beside CuPy's own. The processor's time is taken, and the best of many, so that a busy machine does not fail."""
    kernel, dtype = Kernel(_axpy, threads=64), np.dtype("float32")
    arguments = (*[Pointed()] * 3, 7, 8, 0.5)
    best = 1.0
    for _ in range(20):
        cupy.launched.clear()
        began = time.process_time()
        for _ in range(200):
            kernel.launch((3, 1), dtype, arguments, times=2)
        best = min(best, (time.process_time() - began) / 200)
    assert best < 15e-6


# --- what is refused before anything is launched ---


@pytest.mark.parametrize(
    ("grid", "axis", "limit"),
    [
        ((2**31,), "x", "2,147,483,647"),
        ((1, 65_536), "y", "65,535"),
        ((1, 65_535, 70_000), "z", "65,535"),
        ((-1,), "x", "2,147,483,647"),
        ((5, -1), "y", "65,535"),
    ],
)
def test_a_grid_beyond_the_limits_is_refused(cupy, grid, axis, limit):
    message = f"^test_cuda_launch.axpy: a CUDA grid has at most {limit} blocks along {axis}, got "
    with pytest.raises(ValueError, match=message):
        Kernel(_axpy, threads=64).launch(grid, np.float32, ARGUMENTS, times=1)
    with interpreted_by(lambda *a: None), pytest.raises(ValueError, match=message):
        Kernel(_axpy, threads=64).launch(grid, np.float32, ARGUMENTS, times=1)
    assert not cupy.launched


def test_the_largest_grids_are_launched(cupy):
    Kernel(_axpy, threads=64).launch((2**31 - 1, 65_535, 65_535), np.float32, ARGUMENTS, times=1)
    assert len(cupy.launched) == 1


@pytest.mark.parametrize("size", [2**32, -1, np.int64(-1), np.uint64(2**63)])
def test_a_size_that_does_not_fit_is_refused(cupy, size):
    message = "^test_cuda_launch.axpy-float32-times=1: n must be from 0 to 4,294,967,295, got "
    with pytest.raises(OverflowError, match=message):
        Kernel(_axpy, threads=64).launch((1,), np.float32, (*ARGUMENTS[:4], size, 0.5), times=1)
    assert not cupy.launched


def test_a_stride_is_a_whole_number(cupy):
    with pytest.raises(TypeError, match="float"):
        Kernel(_axpy, threads=64).launch((1,), np.float32, (*ARGUMENTS[:3], 1.5, 1, 0.5), times=1)


def test_arrays_of_another_device_are_refused(cupy):
    message = (
        "^test_cuda_launch.axpy-float32-times=1: y lies on device 1, but the current device is 0; put the call under "
        r"`with cupy.cuda.Device\(1\):`$"
    )
    with pytest.raises(ValueError, match=message):
        Kernel(_axpy, threads=64).launch((1,), np.float32, (Pointed(), Pointed(1), *ARGUMENTS[2:]), times=1)


def test_arrays_of_numpy_are_refused(cupy):
    message = "^test_cuda_launch.axpy-float32-times=1: x must be a CuPy array, got ndarray$"
    with pytest.raises(TypeError, match=message):
        Kernel(_axpy, threads=64).launch((1,), np.float32, (np.zeros(3), *ARGUMENTS[1:]), times=1)


def test_arguments_are_counted(cupy):
    with pytest.raises(TypeError, match=r"^test_cuda_launch.axpy-float32-times=1 takes 6 arguments, got 5$"):
        Kernel(_axpy, threads=64).launch((1,), np.float32, ARGUMENTS[:5], times=1)


# --- what is shipped ---


def test_every_combination_of_constants_is_shipped():
    kernel = Kernel(_axpy, threads=64, shipped={"times": (1, 2)}, dtypes=("float32", "bfloat16"))
    assert [found.name.rpartition("axpy-")[2] for found in kernel.specializations()] == [
        "float32-times=1", "float32-times=2", "bfloat16-times=1", "bfloat16-times=2",
    ]  # fmt: skip

    def build(real, data, a, b):
        return _axpy(real)

    groups = [{"a": 1, "b": (1, 2)}, {"a": (3, 4), "b": 5}]
    found = Kernel(build, threads=64, shipped=groups, dtypes=("int64",))
    assert found.constants == ("a", "b")
    assert [c["a"] * 10 + c["b"] for c in found.shipped["int64"]] == [11, 12, 35, 45]
    assert len(Kernel(_axpy, threads=64, shipped={}).specializations()) == 4
    assert Kernel(_axpy, threads=64).specializations() == []


def test_what_is_shipped_may_differ_from_dtype_to_dtype():
    kernel = Kernel(_axpy, threads=64, shipped=lambda dtype: {"times": (1, dtype.itemsize)}, dtypes=("int16", "int64"))
    assert kernel.shipped == {"int16": [{"times": 1}, {"times": 2}], "int64": [{"times": 1}, {"times": 8}]}
    assert [found.dtype.itemsize for found in kernel.specializations()] == [2, 2, 8, 8]
    with pytest.raises(ValueError, match="is not among the kernels that are shipped"):
        kernel.specialize("int16", times=8)


def test_what_is_shipped_may_be_examples(cupy):
    kernel = Kernel(_axpy, threads=64, shipped={"times": 1}, dtypes=("float32",), others=True)
    assert len(kernel.specializations()) == 1
    for dtype, times in (("float32", 2), ("float64", 1)):
        kernel.launch((1,), np.dtype(dtype), ARGUMENTS, times=times)
    assert len(cupy.launched) == 2


@pytest.mark.parametrize(("dtype", "times"), [("float32", 3), ("float64", 1)])
def test_what_is_not_shipped_is_refused(cupy, dtype, times):
    kernel = Kernel(_axpy, threads=64, shipped={"times": (1, 2)}, dtypes=("float32",))
    message = f"^test_cuda_launch.axpy-{dtype}-times={times} is not among the kernels that are shipped"
    with pytest.raises(ValueError, match=message):
        kernel.launch((1,), dtype, ARGUMENTS, times=times)
    with interpreted_by(lambda *a: None), pytest.raises(ValueError, match=message):
        kernel.launch((1,), dtype, ARGUMENTS, times=times)


def test_threads_and_blocks_may_depend_on_the_constants():
    kernel = Kernel(_axpy, threads=lambda times: 32 * times, blocks=lambda times: 8 // times)
    found = [kernel.specialize("float16", times=n) for n in (1, 2, 4)]
    assert [(one.threads, one.blocks) for one in found] == [(32, 8), (64, 4), (128, 2)]


def test_every_declared_kernel_is_the_packages_own():
    names = [kernel.build.__module__ for kernel in launch.declared()]
    assert all(name.startswith("npmamba.cuda.") for name in names)


# --- the interpreter in a device's place ---


def test_an_interpreter_takes_every_launch_until_it_is_left(cupy):
    seen: list[Any] = []
    kernel = Kernel(_axpy, threads=64)
    with interpreted_by(lambda *given: seen.append(given)):
        with contextlib.suppress(KeyError), interpreted_by(lambda *given: None):
            kernel.launch((1,), np.float32, (1, 2), shared=9, times=1)
            raise KeyError
        kernel.launch((2,), np.float32, (1, 2), shared=9, times=1)
        kernel.launch((0,), np.float32, (1, 2), times=1)
    kernel.launch((1,), np.float32, ARGUMENTS, times=1)
    ((specialization, *given),) = seen
    assert specialization.name == "test_cuda_launch.axpy-float32-times=1"
    assert given == [(2,), (1, 2), 9]
    assert len(cupy.launched) == 1


# --- pieces that are missing ---

Versions = dict[str, str]
WHOLE: Versions = {"cupy-cuda13x": "14.2.0", "numba-cuda": "0.30.4"}


@pytest.fixture
def installed(monkeypatch):
    """Set what is installed: versions of packages, the driver's CUDA release, libraries that are not there."""

    def install(versions: Versions, release: Any = (13, 0), lacking: Any = (), toolkit: Any = (13, 0)) -> FakeCupy:
        def load_library(name: str) -> Any:
            if name in lacking:
                raise RuntimeError(f"Failure finding {name}")
            return types.SimpleNamespace(abs_path=f"/somewhere/lib{name}.so")

        cupy = FakeCupy()
        modules = {
            "cupy": cupy,
            "numpy": np,
            "numba.cuda": None,
            "cuda.pathfinder": types.SimpleNamespace(load_nvidia_dynamic_lib=load_library),
            "cuda.bindings.nvjitlink": types.SimpleNamespace(version=lambda: toolkit),
            "cuda.bindings.nvrtc": types.SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, [90, 80, 120])),
        }
        monkeypatch.setattr(requirements, "version", versions.get)
        monkeypatch.setattr(requirements, "release", lambda: release)
        monkeypatch.setattr(requirements.importlib, "import_module", modules.__getitem__)
        monkeypatch.setattr(np, "__version__", "2.4.6")
        monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    return install


def refused(ask: Any) -> requirements.CudaUnavailableError:
    """Return the error, whose message must be one sentence."""
    with pytest.raises(requirements.CudaUnavailableError) as caught:
        ask()
    error = caught.value
    assert str(error) == f"CUDA kernels cannot run: {error.problem}; to mend it: {error.remedy}"
    assert "\n" not in str(error)
    return error


def test_nothing_is_missing_where_everything_is_there(installed):
    cupy = installed(WHOLE)
    assert requirements.require_device() is cupy
    requirements.require_compiler()
    assert requirements.device() == "NVIDIA Made Up, 64 GiB, sm_90, the first of 2"


@pytest.mark.parametrize(
    ("versions", "release", "problem", "remedy", "missing"),
    [
        (WHOLE, None, "there is no NVIDIA driver (libcuda) on this machine", "https://www.nvidia.com/drivers", True),
        (WHOLE, (11, 8), "the NVIDIA driver supports CUDA 11.8, and CUDA 12 is the oldest", "newer driver", False),
        ({}, (13, 0), "CuPy is not installed", "pip install 'npmamba[cuda13]'", True),
        ({}, (12, 4), "CuPy is not installed", "pip install 'npmamba[cuda12]'", True),
        (
            WHOLE, (12, 4), "cupy-cuda13x needs a driver for CUDA 13, and this one supports CUDA 12.4",
            "pip uninstall -y cupy-cuda13x && pip install 'npmamba[cuda12]'", False,
        ),
    ],
)  # fmt: skip
def test_a_missing_piece_of_the_device_is_named(installed, versions, release, problem, remedy, missing):
    installed(versions, release)
    error = refused(requirements.require_device)
    assert error.problem.startswith(problem)
    assert error.remedy.endswith(remedy) or remedy in error.remedy
    assert error.missing == missing


@pytest.mark.parametrize("package", ["cupy-cuda12x", "cupy"])
def test_an_older_cupy_serves_a_newer_driver(installed, package):
    installed({package: "14.2.0"}, (13, 0))
    requirements.require_device()


def test_no_device_is_named(installed):
    cupy = installed(WHOLE)

    def none():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy.cuda.runtime.getDeviceCount = none
    error = refused(requirements.require_device)
    assert error.problem == "CuPy can use no CUDA device (cudaErrorNoDevice: no CUDA-capable device is detected)"
    assert "CUDA_VISIBLE_DEVICES" in error.remedy


def test_a_device_that_is_too_old_is_named(installed):
    cupy = installed(WHOLE)
    cupy.cuda.runtime.getDeviceProperties = lambda n: {"name": b"T4", "major": 7, "minor": 5, "totalGlobalMem": 0}
    assert refused(requirements.require_device).problem == "T4 has compute capability 7.5"


@pytest.mark.parametrize(
    ("versions", "lacking", "toolkit", "problem"),
    [
        ({}, (), (13, 0), "numba-cuda is not installed"),
        ({"numba-cuda": "0.31.0"}, (), (13, 0), "the kernels are written for numba-cuda 0.30, and 0.31.0 is installed"),
        (WHOLE, ("nvvm",), (13, 0), "NVIDIA's NVVM library is not installed"),
        (WHOLE, ("nvrtc",), (13, 0), "NVIDIA's NVRTC library is not installed"),
        (WHOLE, ("nvJitLink",), (13, 0), "NVIDIA's nvJitLink library is not installed"),
        (
            {**WHOLE, "nvidia-nvvm": "13.5.37"},
            (),
            (13, 0),
            "nvJitLink 13.0 does not read the PTX of NVVM 13.5.37",
        ),
        (WHOLE, (), (14, 1), "nvJitLink is of CUDA 14.1, and the driver supports CUDA 13.0"),
    ],
)
def test_a_missing_piece_of_the_compiler_is_named(installed, versions, lacking, toolkit, problem):
    installed(versions, lacking=lacking, toolkit=toolkit)
    error = refused(requirements.require_compiler)
    assert error.problem == problem
    assert error.remedy.removesuffix(" --upgrade --upgrade-strategy eager") == "pip install 'npmamba[cuda13]'"


def test_a_device_that_the_compiler_does_not_know_is_named(installed):
    installed(WHOLE)
    assert requirements.architectures() == [(8, 0), (9, 0), (12, 0)]
    requirements.require_compiler((12, 0))
    error = refused(lambda: requirements.require_compiler((13, 0)))
    assert error.problem == "this compiler does not know sm_130, the architecture of the device"
    assert error.remedy == "pip install 'npmamba[cuda13]' --upgrade --upgrade-strategy eager"


def test_a_numpy_that_is_too_new_for_numba_cuda_is_named(installed, monkeypatch):
    installed(WHOLE)
    for version in ("2.4.99", "1.26.4"):
        monkeypatch.setattr(np, "__version__", version)
        requirements.require_compiler()
    for version in ("2.5.0", "2.10.0rc1", "3.0.0"):
        monkeypatch.setattr(np, "__version__", version)
        error = refused(requirements.require_compiler)
        assert error.problem == f"numba-cuda 0.30 needs a NumPy older than 2.5, and {version} is installed"
        assert error.remedy == "pip install 'numpy<2.5'"


def test_numbas_simulator_is_named(installed, monkeypatch):
    installed(WHOLE)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert refused(requirements.require_compiler).remedy == "unset it"


def test_a_package_that_cannot_be_imported_is_named(installed, monkeypatch):
    installed(WHOLE)

    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(requirements.importlib, "import_module", broken)
    assert refused(requirements.device).problem.startswith("cupy cannot be imported (libcudart.so.13")


@pytest.mark.parametrize(
    ("versions", "release", "extra"),
    [
        ({}, (13, 2), "cuda13"),
        ({}, (12, 9), "cuda12"),
        ({"cupy-cuda12x": "14"}, (13, 0), "cuda13"),
        ({"cupy-cuda12x": "14"}, None, "cuda12"),
        ({}, None, "cuda13"),
    ],
)
def test_the_extra_is_the_one_for_the_driver(installed, versions, release, extra):
    installed(versions, release)
    assert requirements.extra() == extra


def test_a_launch_without_cupy_says_what_is_missing(installed, monkeypatch):
    installed({}, None)
    monkeypatch.delitem(sys.modules, "cupy")
    error = refused(lambda: Kernel(_axpy, threads=64).launch((1,), np.float32, ARGUMENTS, times=1))
    assert "no NVIDIA driver" in error.problem


def test_a_launch_without_a_device_says_what_is_missing(installed, monkeypatch):
    cupy = installed(WHOLE, None)

    def none():
        raise RuntimeError("cudaErrorInsufficientDriver")

    cupy.cuda.runtime.getDevice = none
    error = refused(lambda: Kernel(_axpy, threads=64).launch((1,), np.float32, ARGUMENTS, times=1))
    assert "no NVIDIA driver" in error.problem


def rows(group: str = "cuda") -> dict[str, tuple[str, str, str]]:
    """Return what the doctor says: state, detail and remedy by name."""
    found = [one for one in doctor.findings() if one.group == group]
    assert len({one.name for one in found}) == len(found)
    return {one.name: (one.state, one.detail, one.remedy) for one in found}


PIECES = ["driver", "CuPy", "device", "numba-cuda", "NVVM", "NVRTC", "nvJitLink", "kernel cache"]


def test_the_doctor_names_every_piece(installed, monkeypatch):
    installed(WHOLE)
    monkeypatch.setattr(doctor, "scan_error", lambda library="numpy": 1e-7 if library == "numpy" else 1e-3)
    found = rows()
    assert list(found) == PIECES
    assert {state for state, *_ in found.values()} == {doctor.GOOD}
    assert found["nvJitLink"][1] == "13.0 /somewhere/libnvJitLink.so"
    assert found["NVRTC"][1] == "sm_80 to sm_120 /somewhere/libnvrtc.so"
    assert [state for state, *_ in rows("self test").values()] == [doctor.GOOD, doctor.BAD]


@pytest.mark.parametrize(
    ("versions", "release", "lacking", "row", "state"),
    [
        (WHOLE, None, (), "driver", doctor.MISSING),
        (WHOLE, (11, 8), (), "driver", doctor.BAD),
        ({}, (13, 0), (), "CuPy", doctor.MISSING),
        (WHOLE, (12, 4), (), "CuPy", doctor.BAD),
        ({}, (13, 0), (), "numba-cuda", doctor.MISSING),
        ({"numba-cuda": "0.29"}, (13, 0), (), "numba-cuda", doctor.BAD),
        (WHOLE, (13, 0), ("nvvm",), "NVVM", doctor.MISSING),
        (WHOLE, (13, 0), ("nvrtc",), "NVRTC", doctor.MISSING),
        (WHOLE, (13, 0), ("nvJitLink",), "nvJitLink", doctor.MISSING),
        (WHOLE, (12, 4), (), "nvJitLink", doctor.BAD),
    ],
)
def test_the_doctor_says_what_is_wrong_and_how_to_mend_it(
    installed, monkeypatch, versions, release, lacking, row, state
):
    installed(versions, release, lacking)
    monkeypatch.setattr(doctor, "scan_error", lambda library="numpy": 1e-7)
    found = rows()
    assert found[row][0] == state
    assert found[row][2]
    for name, (other, _, remedy) in found.items():
        assert (other == doctor.GOOD) == (remedy == ""), name
    if row in PIECES[3:] and "cupy-cuda13x" in versions and release == (13, 0):
        assert rows("self test")["the same on CUDA"][0] == doctor.MISSING, "the kernels cannot be compiled"


@pytest.mark.parametrize(("status", "wrapped"), [(209, True), (222, True), (2, False), (None, False)])
def test_machine_code_that_the_driver_cannot_read_is_named(cupy, status, wrapped):
    cupy.failure = RuntimeError("CUDA_ERROR_OF_SOME_KIND: some text")
    if status is not None:
        cupy.failure.status = status
    expected = requirements.CudaUnavailableError if wrapped else RuntimeError
    with pytest.raises(expected, match="CUDA_ERROR_OF_SOME_KIND") as caught:
        Kernel(_axpy, threads=64).launch((1,), np.float32, ARGUMENTS, times=1)
    assert type(caught.value) is expected


# --- on a device ---


@pytest.fixture(scope="module")
def device():
    return requirements.require_device()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_arguments_arrive_on_the_device(device, dtype):
    dtype = np.dtype(dtype)
    x, y = device.arange(8).astype(dtype), device.full(1000, 1, dtype)
    Kernel(_axpy, threads=64).launch((1,), dtype, (x, y[992:], None, -900, 8, 0.5), times=2)
    expected = np.ones(1000)
    expected[92:100] += np.arange(8)
    np.testing.assert_array_equal(y.get().astype(np.float64), expected)


@pytest.mark.gpu
def test_a_launch_follows_cupys_current_stream_and_can_be_captured(device):
    x, y = device.ones(8, np.float32), device.zeros(8, np.float32)
    kernel = Kernel(_axpy, threads=64)
    kernel.launch((1,), x.dtype, (x, y, None, 0, 8, 1.0), times=1)
    stream = device.cuda.Stream(non_blocking=True)
    device.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        kernel.launch((1,), x.dtype, (x, y, None, 0, 8, 1.0), times=1)
        graph = stream.end_capture()
        assert (y.get() == 1).all()
        graph.launch()
        graph.launch()
        stream.synchronize()
    assert (y.get() == 3).all()


def _shared(real):
    def reverse(x: Data, y: Data, n: Size):
        held = cuda.shared.array(0, real)
        for k in range(2):
            i = uint32(cuda.threadIdx.x) + uint32(k * 1024)
            for block in range(8):
                store(held, i + uint32(block * 2048), load(x, i + uint32(block * 2048)))
        cuda.syncthreads()
        for k in range(2):
            i = uint32(cuda.threadIdx.x) + uint32(k * 1024)
            for block in range(8):
                store(y, i + uint32(block * 2048), load(held, n - uint32(1) - (i + uint32(block * 2048))))

    return reverse


@pytest.mark.gpu
def test_sixty_four_kib_of_shared_memory_can_be_had(device):
    x = device.arange(2**14, dtype=np.float32)
    y = device.zeros_like(x)
    Kernel(_shared, threads=1024).launch((1,), x.dtype, (x, y, 2**14), shared=2**16)
    assert (y == x[::-1]).all()


@pytest.mark.gpu
def test_a_launch_that_cuda_refuses_raises_at_once(device):
    x = device.zeros(8, np.float32)
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR|cudaError"):
        Kernel(_axpy, threads=64).launch((1,), x.dtype, (x, x, None, 0, 8, 1.0), shared=2**24, times=1)
    Kernel(_axpy, threads=64).launch((1,), x.dtype, (x, x, None, 0, 8, 1.0), times=1)
    assert (x.get() == 0).all(), "and what follows is not disturbed"


@pytest.mark.gpu
@pytest.mark.parametrize("ask", ["y.get()", "float(y.sum())", "cupy.cuda.Device().synchronize()", "y.tolist()"])
def test_an_access_outside_the_arrays_is_never_a_number(ask):
    """It raises at the next call that waits for the device, and at every later one: the process cannot go on."""
    program = f"""
import cupy, numpy as np
from test_cuda_launch import Kernel, _axpy
x, y = cupy.ones(64, np.float32), cupy.ones(64, np.float32)
Kernel(_axpy, threads=64).launch((1,), x.dtype, (x, y, None, 2**44, 64, 1.0), times=1)
for _ in range(2):
    try:
        print("a number:", {ask})
    except RuntimeError as error:
        print("raised", type(error).__name__)
"""
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.count("raised") == 2, done.stdout + done.stderr
    assert "a number" not in done.stdout
