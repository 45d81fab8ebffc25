"""The arrays choose the backend; CuPy is stood in for by a module of our own, so no GPU is needed."""

from __future__ import annotations

import re
import sys
import types

import numpy as np
import pytest

from npmamba import backend
from npmamba.cpu.runtime import empty


class FakeCupyArray:
    """What a CuPy array is to the dispatch: an instance of ``cupy.ndarray`` on one of several GPUs."""

    def __init__(self, device=0):
        self.data = types.SimpleNamespace(device_id=device)

    def get(self):
        return np.full(2, self.data.device_id)


@pytest.fixture
def cupy(monkeypatch):
    """Stand in for CuPy, with GPU 0 as the current one."""
    module = types.ModuleType("cupy")
    module.ndarray = FakeCupyArray
    module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDevice=lambda: 0))
    module.asarray = lambda x: x if isinstance(x, FakeCupyArray) else FakeCupyArray()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def no_cupy(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)


@pytest.fixture
def twins(monkeypatch):
    """Two operations: `both` with a twin on either side, `host` with none in npmamba.cuda."""
    backend._load.cache_clear()
    modules = {name: types.ModuleType(name) for name in ("cpu.both", "cuda.both", "cpu.host")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"npmamba.{name}", module)
    yield modules
    backend._load.cache_clear()


def test_numpy_arrays_are_arrays_with_and_without_cupy(no_cupy):
    assert backend.is_array(np.zeros(2))
    assert backend.is_array(np.zeros(()))


def test_lists_scalars_and_masked_arrays_are_no_arrays(cupy):
    for x in ([1.0], 1.0, np.float32(1), None, np.ma.zeros(2)):
        assert not backend.is_array(x)


def test_a_cupy_array_is_one_only_while_cupy_is_loaded(no_cupy):
    assert not backend.is_array(FakeCupyArray())


def test_the_library_is_that_of_the_arrays(cupy):
    assert backend.array_module("scan", u=np.zeros(1), z=None) is np
    assert backend.array_module("scan", u=FakeCupyArray(), z=FakeCupyArray(), D=None) is cupy
    assert backend.array_module("scan") is np


@pytest.mark.parametrize("host_first", [True, False])
def test_mixing_libraries_names_both_arguments(cupy, host_first):
    host, device = ("u", np.zeros(1)), ("B", FakeCupyArray())
    first, second = (host, device) if host_first else (device, host)
    library = {"u": "numpy", "B": "cupy"}
    message = (
        f"scan: {first[0]} is a {library[first[0]]} array, but {second[0]} is a {library[second[0]]} array; "
        "move them to one device first"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        backend.array_module("scan", **dict([first, second]))


@pytest.mark.parametrize("current_first", [True, False])
def test_arrays_on_two_gpus_are_both_named(cupy, current_first):
    arrays = {"u": FakeCupyArray(0), "A": FakeCupyArray(0), "D": None, "B": FakeCupyArray(3)}
    names = list(arrays) if current_first else list(arrays)[::-1]
    message = "^scan: B is on GPU 3, but (u|A) is on GPU 0; move them to one GPU first$"
    with pytest.raises(ValueError, match=message):
        backend.array_module("scan", **{name: arrays[name] for name in names})


def test_arrays_on_another_gpu_than_the_current_one_are_named(cupy):
    message = "scan: u is on GPU 3, but the current GPU is 0; call it inside `with cupy.cuda.Device(3):`"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        backend.array_module("scan", u=FakeCupyArray(3), B=FakeCupyArray(3))


def test_arrays_move_to_the_host_and_beside_others(cupy):
    host, device = np.zeros(2), FakeCupyArray()
    assert backend.on_host(host) is host
    assert backend.on_host(None) is None
    np.testing.assert_array_equal(backend.on_host(device), [0, 0])
    assert backend.beside("scan", host, host) is host
    assert isinstance(backend.beside("scan", host, device), np.ndarray)
    assert isinstance(backend.beside("scan", device, host), FakeCupyArray)
    assert backend.beside("scan", device, device) is device


NO_ARRAYS = [([0.0], "list"), (1.0, "float"), (np.ma.zeros(1), "MaskedArray")]


@pytest.mark.parametrize(("value", "kind"), NO_ARRAYS)
def test_what_is_no_array_is_named(value, kind):
    with pytest.raises(TypeError, match=f"^scan: z must be a NumPy or CuPy array, got {kind}$"):
        backend.array_module("scan", u=np.zeros(1), z=value)


def test_the_twin_is_that_of_the_array(cupy, twins):
    assert backend.twin("both", np.zeros(1)) is twins["cpu.both"]
    assert backend.twin("both", FakeCupyArray()) is twins["cuda.both"]


def test_a_missing_cuda_twin_is_said_to_be_missing(cupy, twins):
    assert backend.twin("host", np.zeros(1)) is twins["cpu.host"]
    with pytest.raises(TypeError, match=r"^host: this release has no CUDA kernels for it; .*cupy\.asnumpy"):
        backend.twin("host", FakeCupyArray())


def test_a_twin_that_fails_for_another_reason_says_its_own(cupy, twins, monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'numba_cuda'", name="numba_cuda")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numba_cuda"):
        backend.twin("host", FakeCupyArray())


def test_an_output_nobody_wrote_shows():
    """Every test runs with this in place of plain ``numpy.empty``, under whatever name a module holds it."""
    for dtype in (np.float16, np.float32, np.float64):
        assert np.isnan(empty((2, 3), dtype)).all()
    assert (empty((2,), np.int32) == np.iinfo(np.int32).min).all()
    assert empty((0, 3), np.float32).shape == (0, 3)
