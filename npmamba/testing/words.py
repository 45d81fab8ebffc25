"""What stands for `cuda` and for intrinsics while a kernel is interpreted."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from greenlet import getcurrent

from npmamba import scalar
from npmamba.cuda import device
from npmamba.testing import arithmetic, views
from npmamba.testing.findings import KernelError, party

FULL = 0xFFFFFFFF
_getframe = sys._getframe


def _dtype(x: Any) -> np.dtype:
    """Return the NumPy dtype for a NumPy or Numba type."""
    return np.dtype(x) if isinstance(x, (np.dtype, type)) else np.dtype(str(x))


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in x) if isinstance(x, (tuple, list)) else (int(x),)


class _Shared:
    @staticmethod
    def array(shape: Any, dtype: Any, alignment: int | None = None) -> views.Array:
        thread: Any = getcurrent()
        return thread.block.shared_array(_getframe(1), _shape(shape), _dtype(dtype), alignment)


class _Local:
    @staticmethod
    def array(shape: Any, dtype: Any, alignment: int | None = None) -> views.Local:
        frame = _getframe(1)
        return views.Local(_shape(shape), _dtype(dtype), (frame.f_code, frame.f_lasti))


class _Atomic:
    def __getattr__(self, name: str) -> Any:
        try:
            change = _ATOMICS[name]
        except KeyError:
            raise KernelError(f"the kernel interpreter has no stand-in for cuda.atomic.{name}") from None

        def word(array: Any, i: Any, *values: Any) -> Any:
            return array.memory.exchange(array.place(i), lambda old: change(old, *values))

        return word


_ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "sub": lambda old, x: old - x,
    "max": max,
    "min": min,
    "exch": lambda old, x: x,
    "cas": lambda old, expected, x: x if old == expected else old,
}


def _wait(kind: str, mask: Any, value: Any = None, source: int = 0) -> Any:
    """Stop the running thread, which a word of `Cuda` was called by, until the others have come."""
    thread: Any = getcurrent()
    here = _getframe(2)
    frame, calls = here.f_back, []
    while frame is not None:  # the first frame of a greenlet has none behind it
        calls.append(frame.f_lasti)
        frame = frame.f_back
    thread.value, thread.source = value, source
    thread.request = (kind, mask, here.f_code, here.f_lasti, calls)
    thread.parent.switch()
    return thread.result


def _running() -> Any:
    return getcurrent()


class Cuda:
    """The names that a kernel finds under ``cuda``."""

    warpsize = 32
    libdevice = arithmetic.LIBDEVICE
    shared, local, atomic = _Shared(), _Local(), _Atomic()
    threadIdx = property(lambda self: _running().index)
    blockIdx = property(lambda self: _running().block.index)
    blockDim = property(lambda self: _running().block.launch.threads)
    gridDim = property(lambda self: _running().block.launch.grid)
    laneid = property(lambda self: _running().lane)
    fma, selp = staticmethod(arithmetic.fma), staticmethod(arithmetic.select)

    def __getattr__(self, name: str) -> Any:
        raise KernelError(f"the kernel interpreter has no stand-in for cuda.{name}: {party(_running())}")

    def grid(self, ndim: int) -> Any:
        n, block, t = self.blockDim, self.blockIdx, self.threadIdx
        numbers_ = tuple(block[k] * n[k] + t[k] for k in range(ndim))
        return numbers_ if ndim > 1 else numbers_[0]

    def gridsize(self, ndim: int) -> Any:
        sizes = tuple(self.gridDim[k] * self.blockDim[k] for k in range(ndim))
        return sizes if ndim > 1 else sizes[0]

    def syncthreads(self) -> None:
        _wait("barrier", None)

    def syncthreads_count(self, predicate: Any) -> int:
        return sum(_wait("barrier", None, bool(predicate)))

    def syncthreads_and(self, predicate: Any) -> bool:
        return all(_wait("barrier", None, bool(predicate)))

    def syncthreads_or(self, predicate: Any) -> bool:
        return any(_wait("barrier", None, bool(predicate)))

    def syncwarp(self, mask: Any = FULL) -> None:
        _wait("syncwarp", int(mask) & FULL)

    def shfl_sync(self, mask: Any, value: Any, source: Any) -> Any:
        return _wait("shuffle", int(mask) & FULL, value, int(source) & 31)

    def shfl_xor_sync(self, mask: Any, value: Any, n: Any) -> Any:
        return _wait("shuffle", int(mask) & FULL, value, _running().lane ^ int(n))

    def shfl_up_sync(self, mask: Any, value: Any, n: Any) -> Any:
        lane = _running().lane
        return _wait("shuffle", int(mask) & FULL, value, lane - int(n) if lane >= n else lane)

    def shfl_down_sync(self, mask: Any, value: Any, n: Any) -> Any:
        lane = _running().lane
        return _wait("shuffle", int(mask) & FULL, value, lane + int(n) if lane + n < 32 else lane)

    def ballot_sync(self, mask: Any, predicate: Any) -> Any:
        said = _wait("vote", int(mask) & FULL, bool(predicate))
        return np.uint32(sum(1 << lane for lane, yes in said.items() if yes))

    def any_sync(self, mask: Any, predicate: Any) -> bool:
        return any(_wait("vote", int(mask) & FULL, bool(predicate)).values())

    def all_sync(self, mask: Any, predicate: Any) -> bool:
        return all(_wait("vote", int(mask) & FULL, bool(predicate)).values())

    def popc(self, x: Any) -> int:
        return int(x).bit_count()

    def ffs(self, x: Any) -> int:
        return (int(x) & -int(x)).bit_length()

    def clz(self, x: Any) -> int:
        return 32 - (int(x) & FULL).bit_length()

    def threadfence(self) -> None:
        """Do nothing: what orders blocks here is that they exchange a number in one step."""

    threadfence_block = threadfence


CUDA = Cuda()


class Late:
    """A word whose meaning depends on who asks, under a name of the kernel's own: found when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, part: str) -> Any:
        return getattr(getattr(CUDA, self._name), part)

    def __call__(self, *arguments: Any) -> Any:
        return getattr(CUDA, self._name)(*arguments)


def word(name: str) -> Any:
    """Return what stands for ``cuda.name`` where a kernel has it under a name of its own; the name may have dots."""
    if name == "laneid":  # a number, which must be asked for each time
        raise KernelError("the kernel interpreter finds laneid under no other name: write cuda.laneid")
    known = getattr(Cuda, name, None)
    late = known is None or isinstance(known, property)
    return Late(name) if late and "." not in name else functools.reduce(getattr, name.split("."), CUDA)


STAND_INS: dict[Any, Any] = {
    device.load: views.load,
    device.store: views.store,
    device.load2: views.vector_load(2),
    device.load4: views.vector_load(4),
    device.load8: views.vector_load(8),
    device.store2: views.vector_store(2),
    device.store4: views.vector_store(4),
    device.store8: views.vector_store(8),
    device.copy_async: views.copy_async,
    device.commit_async: views.commit_async,
    device.wait_async: views.wait_async,
    device.rcp: arithmetic.reciprocal,
    scalar.exp2_product: arithmetic.exp2_product,
    scalar.exp2_product_small: arithmetic.exp2_product,
    scalar.magnitude: abs,
    **{
        getattr(scalar, name): getattr(arithmetic, name)
        for name in ("cast", "fma", "select", "divide", "exp2", "exp", "expm1", "log1p", "sqrt")
    },
}
"""What a function is replaced by while kernels are interpreted; put a stand-in for an intrinsic of your own here."""
