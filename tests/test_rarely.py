"""What happens rarely: other systems and processors, files of other machines, libraries that are not there."""

from __future__ import annotations

import os
import pathlib
import types

import numpy as np
import pytest
from numba import config

import npmamba
from npmamba import MambaConfig, cache, charts, doctor, files, scalar, shapes
from npmamba.autodiff import check_vjp, primitive
from npmamba.autodiff.tape import _total
from npmamba.cpu import matmul, runtime, scan_row, simd
from npmamba.cuda import conv_shares, requirements
from npmamba.reference import selective_scan as reference
from npmamba.testing.shadow import unwritten

# --- processors ---


def test_a_platform_whose_features_llvm_cannot_tell_has_no_avx512(monkeypatch):
    def unknown():
        raise RuntimeError("host features are unknown")

    monkeypatch.setattr(simd.llvm, "get_host_cpu_features", unknown)
    assert simd._host_has_avx512() is False


def test_instructions_of_the_processor_are_not_to_be_had_in_python():
    for call in (simd._LIBM["exp"], simd._fraction, lambda x: simd._times_power(x, x)):
        with pytest.raises(NotImplementedError, match="only compiled code"):
            call(np.ones(4))


@pytest.mark.skipif(not config.DISABLE_JIT, reason="compiled kernels are made for one processor")
@pytest.mark.parametrize("size", [1.0, 400.0], ids=["small exponents", "large exponents"])
def test_without_avx512_large_exponents_are_looked_for(size, monkeypatch):
    from npmamba import selective_scan

    monkeypatch.setattr(scan_row, "AVX512", False)
    rng = np.random.default_rng(0)
    u, delta = rng.standard_normal((2, 1, 40, 6), np.float32).transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)
    A = -rng.uniform(0.5, 1, (40, 3)).astype(np.float32)
    B, C = rng.standard_normal((2, 1, 3, 6), np.float32)
    delta = np.float32(size) * np.abs(delta)
    expected = reference.forward(u, delta, A, B, C)[0]
    assert np.abs(selective_scan(u, delta, A, B, C) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.skipif(not config.DISABLE_JIT, reason="compiled formulas are tested with tests/test_scalar.py")
def test_polynomials_of_compiled_code_are_their_functions_in_plain_python(monkeypatch):
    """So an equation can be followed, and plotted, without a compiler."""
    monkeypatch.setattr(simd, "_fraction", lambda x: x - np.floor(x))
    monkeypatch.setattr(simd, "_times_power", lambda x, y: np.ldexp(x, np.floor(y).astype(np.int32)))
    x = np.concatenate([np.linspace(-80, 80, 1001), np.geomspace(1e-6, 1, 50)]).astype(np.float32)
    exact = {"exp2": np.exp2, "exp": np.exp, "expm1": np.expm1, "log1p": np.log1p}
    for name, polynomial in simd._FLOAT32.items():
        inside = np.minimum(np.abs(x), 1) if name == "log1p" else x  # of e^-|x| alone
        with np.errstate(all="ignore"):
            found = polynomial(inside)
        np.testing.assert_allclose(found, exact[name](inside.astype(np.float64)), rtol=3e-6, err_msg=name)
    y = np.full_like(x, 0.75)
    for product in (simd._exp2_product_float32, simd._exp2_product_small_float32, simd._exp2_product_avx512):
        np.testing.assert_allclose(product(x, y), np.exp2(x.astype(np.float64) * 0.75), rtol=3e-6)


# --- files and folders ---


def test_processes_are_told_dead_where_that_can_be_known(monkeypatch):
    assert files._is_dead("1x") is False
    assert files._is_dead(str(os.getpid())) is True
    assert files._is_dead(str(10**30)) is True
    monkeypatch.setattr(os, "kill", lambda pid, signal: None)
    assert files._is_dead("1") is False

    def forbidden(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert files._is_dead("1") is False
    monkeypatch.setattr(os, "name", "nt")
    assert files._is_dead("1") is False


def test_a_folder_is_not_synced_where_that_cannot_be_done(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    files._sync_folder("no such folder")


def test_caches_lie_where_the_system_keeps_such_files(monkeypatch):
    for name in ("NPMAMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    home = pathlib.Path.home()
    monkeypatch.setattr(cache.sys, "platform", "linux")
    assert cache.root() == home / ".cache" / "npmamba"
    monkeypatch.setattr(cache.sys, "platform", "win32")
    assert cache.root() == home / "AppData" / "Local" / "npmamba"
    monkeypatch.setenv("LOCALAPPDATA", "local")
    assert cache.root() == pathlib.Path("local", "npmamba")
    monkeypatch.setenv("NPMAMBA_CACHE_DIR", "mine")
    assert cache.root() == pathlib.Path("mine")


def test_a_folder_is_private_where_permissions_are_not_told_by_bits(monkeypatch):
    monkeypatch.setattr(cache, "os", types.SimpleNamespace(name="nt"))
    assert cache.is_private(pathlib.Path("no such folder"))


def test_what_was_sealed_is_opened_and_what_was_damaged_is_not():
    held = cache.sealed(b"content")
    assert cache.opened(held) == b"content"
    with pytest.raises(ValueError, match="digest"):
        cache.opened(held[:-1])


# --- what this machine has ---


def test_the_doctor_says_how_many_threads_only_where_the_matrix_library_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert doctor._openblas_threads() is None
    assert "threads" not in doctor.blas()
    libraries = tmp_path / "numpy.libs"
    libraries.mkdir()
    (libraries / "libopenblas.so").touch()
    monkeypatch.setattr("ctypes.CDLL", lambda path: types.SimpleNamespace())
    assert doctor._openblas_threads() is None
    monkeypatch.setattr("ctypes.CDLL", lambda path: types.SimpleNamespace(openblas_get_num_threads=lambda: 3))
    assert doctor._openblas_threads() == 3


def test_the_doctor_names_a_processor_that_says_nothing_of_itself(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: "flags : none\n")
    monkeypatch.setattr(doctor.platform, "processor", lambda: "")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "riscv128")
    assert doctor.processor().startswith("riscv128, ")


def test_the_doctor_tests_a_device_that_is_there(monkeypatch):
    good = lambda name: (name, doctor.GOOD, "there")  # noqa: E731
    monkeypatch.setattr(doctor, "_cuda", lambda: [good("device")])
    monkeypatch.setattr(doctor, "_piece", lambda name, probe: good(name))
    monkeypatch.setattr(doctor, "scan_error", lambda library: 1e-9 if library == "cupy" else 1.0)
    assert [state for _, state, *_ in doctor._cuda_self_test()] == [doctor.GOOD]
    monkeypatch.setattr(doctor, "_piece", lambda name, probe: (name, doctor.BAD, "old", "renew it"))
    assert doctor._cuda_self_test() == [("the same on CUDA", doctor.BAD, "old", "renew it")]


@pytest.mark.parametrize(("number", "found", "extra"), [(13020, (13, 2), "cuda13"), (12040, (12, 4), "cuda12")])
def test_the_driver_is_asked_for_its_release(number, found, extra, monkeypatch):
    def version(place):
        place._obj.value = number

    monkeypatch.setattr("ctypes.CDLL", lambda name: types.SimpleNamespace(cuDriverGetVersion=version))
    assert requirements.release() == found
    assert requirements.extra() == extra


def test_a_compiler_that_lists_no_architectures_is_none(monkeypatch):
    broken = types.SimpleNamespace(nvrtcGetSupportedArchs=lambda: (7, []))
    monkeypatch.setattr(requirements, "_import", lambda name: broken)
    with pytest.raises(requirements.CudaUnavailableError, match="lists no architectures"):
        requirements.architectures()


def test_a_checkout_whose_links_are_text_finds_its_two_folders(tmp_path):
    """Some archives and file systems have no links."""
    (tmp_path / "npmamba").mkdir()
    (tmp_path / "npmamba" / "autodiff").write_text("../autodiff")
    (tmp_path / "autodiff").mkdir()
    (tmp_path / "autodiff" / "tape.py").touch()
    source = pathlib.Path(npmamba.__file__)
    scope = {"__file__": str(tmp_path / "npmamba" / "__init__.py"), "__path__": [], "__name__": "npmamba"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), scope)
    assert scope["__path__"] == [str(tmp_path)]


# --- names and orders ---


def test_a_configuration_is_text_of_a_dictionary_with_names(monkeypatch):
    with pytest.raises(TypeError, match="text must be a string, got int"):
        MambaConfig.from_json(3)
    with pytest.raises(TypeError, match="keys must be strings, got 1"):
        MambaConfig.from_dict({1: 2})
    with pytest.raises(TypeError, match="npmamba"):
        MambaConfig.from_dict({"model_type": "mamba", "hidden_size": 8, "npmamba": 3})


def test_an_axis_of_one_number_has_one_tick():
    assert charts.ticks(2.0, 2.0) == [2.0]


def test_memory_of_an_unknown_size_of_number_is_zero():
    assert unwritten((2,), np.complex128).tolist() == [0, 0]


def test_a_gradient_check_names_arguments_that_have_no_names():
    @primitive
    def twice(x):
        return 2 * x, None

    @twice.vjp
    def twice_vjp(dout, saved):
        return (dout,)

    with pytest.raises(AssertionError, match=r"the gradient of args\[1\] is wrong"):
        check_vjp(lambda *xs: xs[0] + twice(xs[1]), np.ones(2), np.ones(2))


class Foreign:
    """An array of another library."""

    def __init__(self, x):
        self.x, self.ndim, self.strides, self.flags = x, x.ndim, x.strides, types.SimpleNamespace(c_contiguous=False)

    def transpose(self, axes):
        return Foreign(self.x.transpose(axes))

    def __add__(self, other):
        return Foreign(np.ascontiguousarray(self.x + other.x))  # as CuPy does


def test_gradients_are_summed_in_their_own_order_of_memory():
    x = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    total = _total(Foreign(x), Foreign(x))
    assert (total.x == 2 * x).all()
    assert total.x.strides == x.strides


def test_calls_are_remembered_up_to_a_limit(monkeypatch):
    known = shapes.Known()
    call = known.call("op", (3,), ())
    known.add(call)
    assert known.call("op", (3,), ()) not in known
    assert known.call("op", (np.ones(2),), ([],)) not in known
    monkeypatch.setattr(shapes.Known, "LIMIT", 2)
    for n in (1, 2, 3):
        known.add(known.call("op", (np.ones(n),), ()))
    assert [known.call("op", (np.ones(n),), ()) in known for n in (1, 2, 3)] == [False, True, True]


def test_formulas_of_constants_are_their_functions():
    x = np.linspace(-0.5, 0.5, 101)
    np.testing.assert_allclose(scalar.exp2m1_series(x), np.expm1(x * np.log(2)), rtol=1e-15, atol=1e-18)
    np.testing.assert_allclose(scalar.log1p_polynomial(np.abs(x)), np.log1p(np.abs(x)), rtol=1e-7)


def test_long_sequences_are_walked_in_longer_stretches():
    def steps(batch, seqlen):
        return conv_shares.stretches(np.broadcast_to(np.float32(0), (batch, 4096, seqlen))).steps

    assert steps(1, 64) == conv_shares.SHORTEST
    assert steps(1024, 2**16) == conv_shares.LONGEST


@pytest.mark.parametrize(("m", "n"), [(600, 40), (40, 600)], ids=["rows are shared", "columns are shared"])
def test_a_matrix_product_is_shared_where_the_library_has_one_thread(m, n, monkeypatch):
    shares = []
    monkeypatch.setattr(matmul, "blas_is_serial", lambda: True)
    monkeypatch.setattr(runtime, "num_threads", lambda: 2)
    monkeypatch.setattr(
        runtime, "share", lambda work, tasks, pieces: (shares.append(tasks), work(0, 7), work(7, tasks))
    )
    x, y = np.random.default_rng(0).standard_normal((2, 600, 600))
    x, y = x[:m], y[:, :n]
    np.testing.assert_allclose(matmul.matmul(x, y), x @ y, rtol=1e-12, atol=1e-12)
    assert shares == [600]
