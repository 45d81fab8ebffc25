"""A stand-in for the package CuPy, for tests of what host code does with a GPU: arrays in host memory, no kernels."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

DEVICE = 0


class Pointer:
    """Like ``cupy.cuda.MemoryPointer``."""

    def __init__(self, memory: np.ndarray, offset: int = 0, device_id: int = DEVICE) -> None:
        self.memory, self.offset, self.device_id = memory, offset, device_id
        self.ptr = memory.ctypes.data + offset

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.device_id)


class Array:
    """Like ``cupy.ndarray``, with what the CUDA twins use of it."""

    def __init__(
        self, shape: Any, dtype: Any = np.float64, memptr: Pointer | None = None, strides: Any = None,
        view: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        if view is None:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memptr = memptr or cuda.alloc(size)
            view = np.ndarray(shape, dtype, memptr.memory, memptr.offset, strides)
        self.view, self._memory = view, memptr

    shape = property(lambda self: self.view.shape)
    strides = property(lambda self: self.view.strides)
    dtype = property(lambda self: self.view.dtype)
    ndim = property(lambda self: self.view.ndim)
    size = property(lambda self: self.view.size)
    itemsize = property(lambda self: self.view.itemsize)
    nbytes = property(lambda self: self.view.nbytes)
    flags = property(lambda self: self.view.flags)

    @property
    def data(self) -> Pointer:
        first = self.view.ctypes.data - self._memory.memory.ctypes.data
        pointer = Pointer(self._memory.memory, first, self._memory.device_id)
        pointer.ptr *= bool(self.size)  # there is no memory without numbers
        return pointer

    def __len__(self) -> int:
        return len(self.view)

    def copy(self) -> Array:
        return array(self.view)

    def get(self) -> np.ndarray:
        return self.view.copy()

    def _with(self, view: np.ndarray) -> Array:
        if np.shares_memory(view, self._memory.memory, max_work=1) or view.size == 0:
            return Array(view.shape, view=view, memptr=self._memory)
        return array(view)

    def __getitem__(self, index: Any) -> Array:
        return self._with(self.view[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.view[index] = value.view if isinstance(value, Array) else value

    def swapaxes(self, *axes: int) -> Array:
        return self._with(self.view.swapaxes(*axes))

    def reshape(self, *shape: Any) -> Array:
        return self._with(self.view.reshape(*shape))

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        return self if not copy and dtype == self.dtype else array(self.view.astype(dtype))


def array(x: Any) -> Array:
    """Return a copy of a NumPy array with the same strides where they are those of a dense array."""
    copy = np.array(x, order="K")
    out = Array(x.shape, copy.dtype, cuda.alloc(copy.nbytes), copy.strides)
    out.view[...] = copy
    return out


def empty(shape: Any, dtype: Any) -> Array:
    return Array(shape, dtype)


def zeros(shape: Any, dtype: Any) -> Array:
    out = Array(shape, dtype)
    out.view[...] = 0
    return out


def ascontiguousarray(x: Array) -> Array:
    return x if x.flags.c_contiguous else array(np.ascontiguousarray(x.view))


class _Cuda:
    """Like ``cupy.cuda``; `allocated` lists the memory that was asked for, `current` is the current device."""

    def __init__(self) -> None:
        self.allocated: list[Pointer] = []
        self.current = DEVICE
        self.runtime = types.SimpleNamespace(getDevice=lambda: self.current)

    def alloc(self, size: int) -> Pointer:
        memory = np.frombuffer(bytearray(size + 16), np.uint8)
        pointer = Pointer(memory, -memory.ctypes.data % 16, self.current)
        self.allocated.append(pointer)
        return pointer


cuda = _Cuda()
ndarray = Array
for thing in (Array, Pointer):
    thing.__module__ = "cupy"
