"""Where CUDA twins run in tests: in the kernel interpreter, or on a GPU.

One test function covers both, by the fixture `device_backend` of tests/conftest.py::

    def test_forward_matches_the_reference(device_backend):
        x = np.random.default_rng(0).standard_normal((2, 3, 8))
        y = device_backend.call(twin.forward, x, save=False)

`call` moves NumPy arrays to the device, keeping their strides and alignment, and brings what is returned back. The same
in steps, where two calls share what the first one saved::

        with device_backend.running(seed=0):
            y, saved = twin.forward(device_backend.array(x), save=True)
            dx = twin.backward(device_backend.array(dy), saved)
        dx = device_backend.numpy(dx)

The fixture lives as long as the session, so Hypothesis may use it. Sizes that would take the interpreter long can
depend on ``device_backend.fast``. Both backends fill what `npmamba.cuda.arrays.empty` allocates, so that an output
nobody wrote shows as NaN.

Tests on the GPU carry the mark ``gpu``. Without a device they are left out, unless ``pytest -m gpu`` asks for them:
then the run ends with a sentence that says which piece is missing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from npmamba.cuda import arrays, requirements
from npmamba.cuda.stand_in import StandIn

FILL = {1: 0xA5, 2: 0x7FDA, 4: 0x7FE1DEAD, 8: 0x7FFC1EADDEADBEEF}
"""Bits for memory that nobody wrote: NaN in every floating-point type, an absurd number in the others."""


class Interpreter:
    """NumPy arrays; kernels run in `npmamba.testing.interpret`."""

    name = "interpreter"
    fast = False

    def array(self, x: Any) -> Any:
        """Return a NumPy array as the device has it."""
        return x

    def numpy(self, x: Any) -> Any:
        """Return a device array as NumPy has it."""
        return x

    def running(self, seed: int | None = None, *, check: bool | str = "races") -> Any:
        """Return a context in which the functions of `npmamba.cuda` take arrays of this backend."""
        return pytest.importorskip("npmamba.testing.interpret", exc_type=ImportError).interpreted(seed, check=check)

    def call(self, function: Callable[..., Any], *args: Any, seed: int | None = None, **options: Any) -> Any:
        """Call a function on arrays, also inside tuples, lists and dicts; return NumPy arrays in the same places."""
        with self.running(seed):
            out = function(*_mapped(self.array, args), **_mapped(self.array, options))
            return _mapped(self.numpy, out)


class Gpu(Interpreter):
    """CuPy arrays; kernels are compiled and run on the current device."""

    name = "gpu"
    fast = True

    def array(self, x: Any) -> Any:
        """Return a copy on the device, of the same strides, and as far behind a multiple of 256 bytes."""
        if not isinstance(x, np.ndarray):
            return x
        cupy = sys.modules["cupy"]
        steps = [(n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)] if x.size else []
        if not x.size or any(s % x.itemsize for s in x.strides):
            return cupy.asarray(x)
        below, span = -sum(s for s in steps if s < 0), x.itemsize + sum(abs(s) for s in steps)
        lowest = x[(..., *(slice(-1, None) if s < 0 else slice(0, 1) for s in steps))]
        start = lowest.ctypes.data % 256
        memory = cupy.empty(start + span, np.uint8)
        memory[start:] = cupy.asarray(as_strided(lowest, (span // x.itemsize,), (x.itemsize,)).copy().view(np.uint8))
        return cupy.ndarray(x.shape, x.dtype, memory.data + (start + below), x.strides)

    def numpy(self, x: Any) -> Any:
        """Return a copy in NumPy, of the same order of axes in memory."""
        if not isinstance(x, sys.modules["cupy"].ndarray):
            return x
        axes = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        return x.transpose(axes).get().transpose(np.argsort(axes))

    @contextlib.contextmanager
    def running(self, seed: int | None = None, *, check: bool | str = "races") -> Iterator[None]:
        """Return a context in which unwritten outputs show; it ends when the device has done all its work."""
        before, arrays.empty.__code__ = arrays.empty.__code__, _filled.__code__
        cupy = sys.modules["cupy"]
        alloc = cupy.cuda.alloc
        cupy.cuda.alloc = lambda size: _unwritten(alloc(size), size)
        try:
            yield
            cupy.cuda.get_current_stream().synchronize()
        finally:
            arrays.empty.__code__, cupy.cuda.alloc = before, alloc


def _filled(like: Any, shape: Any, dtype: Any) -> Any:
    """Stand in for `npmamba.cuda.arrays.empty`: its code is put into that function, where `sys` is known."""
    return like.library.empty(shape, dtype) if type(like) is StandIn else sys.modules["backends"].filled(shape, dtype)


def _unwritten(memory: Any, size: int) -> Any:
    """Fill what a replayed twin allocates with bits that are NaN in every float."""
    memory.memset_async(0xFF, size)
    return memory


def filled(shape: Any, dtype: Any) -> Any:
    """Return a CuPy array of `FILL`."""
    cupy, dtype = sys.modules["cupy"], np.dtype(dtype)
    bits = cupy.full(shape, FILL[dtype.itemsize], f"u{dtype.itemsize}")
    return cupy.ndarray(bits.shape, dtype, bits.data)


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """Apply `change` to the leaves of tuples, named tuples, lists and dicts."""
    if isinstance(x, dict):
        return {name: _mapped(change, value) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        items = [_mapped(change, value) for value in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return change(x)


@functools.cache
def missing() -> str | None:
    """Say which piece is missing for tests on a GPU; None if they can run."""
    try:
        requirements.require_device()
        requirements.require_compiler()
    except requirements.CudaUnavailableError as error:
        return str(error)
    return None


@functools.cache
def backend(name: str) -> Interpreter:
    """Return a backend by its name; the test is skipped where it cannot run."""
    if name == "gpu" and missing() is not None:
        pytest.skip(missing())
    return Gpu() if name == "gpu" else Interpreter()
