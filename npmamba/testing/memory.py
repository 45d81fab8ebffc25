"""Memory as a kernel sees it: pointers and arrays over NumPy buffers, every access checked."""

from __future__ import annotations

import math
import sys
from operator import index
from typing import Any

import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it)
import numpy as np
from numpy.lib.stride_tricks import as_strided

from npmamba.testing.findings import (
    KernelError,
    MisalignedAccessError,
    OutOfRangeError,
    UninitializedReadError,
)

_HERE = __name__.rpartition(".")[0]


def where() -> str:
    """Return the kernel's line that is running, as ``file.py:12``."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        (_HERE, "npmamba.cuda.device")
    ):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


class Memory:
    """A run of elements: `low` and `high` bound their numbers, counted from the address 0 in elements."""

    def __init__(self, name: str, flat: np.ndarray, low: int, valid: Any = None) -> None:
        self.name, self.flat, self.low, self.high, self.valid = name, flat, low, low + len(flat), valid
        self.dtype = flat.dtype
        self.wide = np.float32 if flat.dtype.itemsize == 2 else flat.dtype.type

    @classmethod
    def of(cls, name: str, x: np.ndarray) -> tuple[Memory, int]:
        """Return the memory that the view `x` lies in, and the number of its first element."""
        size = x.itemsize
        if any(s % size for s in x.strides) or x.ctypes.data % size:
            raise KernelError(
                f"{name}: its strides {x.strides} or its address are no multiples of {size} bytes"
            )
        first = x.ctypes.data // size
        if x.size == 0:
            return cls(name, x.reshape(-1), first), first
        steps = [(n - 1) * (s // size) for n, s in zip(x.shape, x.strides, strict=True)]
        below, span = -sum(s for s in steps if s < 0), 1 + sum(abs(s) for s in steps)
        lowest = x[tuple(slice(-1, None) if s < 0 else slice(0, 1) for s in steps)]
        flat = as_strided(lowest, (span,), (size,))
        valid = None
        if span != x.size:
            mask = np.zeros(span, np.uint8)
            view = as_strided(mask[below:], x.shape, tuple(s // size for s in x.strides))
            view[...] = 1
            valid = mask.tobytes()
        return cls(name, flat, first - below, valid), first

    def read(self, k: int) -> Any:
        if not self.low <= k < self.high or (self.valid is not None and not self.valid[k - self.low]):
            self.outside(k)
        return self.flat[k - self.low]

    def write(self, k: int, value: Any) -> None:
        if not self.low <= k < self.high or (self.valid is not None and not self.valid[k - self.low]):
            self.outside(k)
        self.flat[k - self.low] = value

    def outside(self, k: int) -> None:
        if self.low <= k < self.high:
            raise OutOfRangeError(
                f"{where()}: {self.name} has no element at offset {k - self.low}: it lies between its rows"
            )
        raise OutOfRangeError(
            f"{where()}: {self.name}[{k - self.low}] is outside: it has {self.high - self.low} elements"
        )


class Pointer:
    """A pointer into an argument: ``p[i]``, ``p[i] = v``, ``p.shifted(n)``."""

    __slots__ = ("dtype", "memory", "offset")

    def __init__(self, memory: Memory, offset: int) -> None:
        self.memory, self.offset, self.dtype = memory, offset, memory.dtype

    def __getitem__(self, i: Any) -> Any:
        return self.memory.read(self.offset + index(i))

    def __setitem__(self, i: Any, value: Any) -> None:
        self.memory.write(self.offset + index(i), value)

    def shifted(self, n: Any) -> Pointer:
        return Pointer(self.memory, self.offset + index(n))

    def place(self, i: Any) -> int:
        return self.offset + index(i)


class Null:
    """Stands for an argument that is None: it may be passed on and shifted, never followed."""

    def __init__(self, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, np.dtype(dtype)

    def shifted(self, n: Any) -> Null:
        return self

    def place(self, i: Any) -> int:
        raise OutOfRangeError(f"{where()}: {self.name} is None, but the kernel follows it")

    def __getitem__(self, i: Any) -> Any:
        return self.place(i)

    def __setitem__(self, i: Any, value: Any) -> None:
        self.place(i)


class Array:
    """An array of a kernel: shared, or an argument of a Numba kernel; negative indices are mistakes, not wrapped."""

    __slots__ = ("dtype", "memory", "offset", "shape", "strides")

    def __init__(self, memory: Memory, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.memory, self.offset, self.shape, self.strides = memory, offset, shape, strides
        self.dtype = memory.dtype

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def place(self, i: Any) -> int:
        if len(self.shape) == 1 and not isinstance(i, tuple):
            i = index(i)
            if not 0 <= i < self.shape[0]:
                self._outside((i,))
            return self.offset + i * self.strides[0]
        part = self._part(i)
        assert not part.shape
        return part.offset

    def _part(self, i: Any) -> Array:
        i = i if isinstance(i, tuple) else (i,)
        offset, shape, strides = self.offset, [], []
        for axis, n in enumerate(self.shape):
            q = i[axis] if axis < len(i) else slice(None)
            if isinstance(q, slice):
                start, stop, step = q.indices(n)
                offset += start * self.strides[axis]
                shape.append(len(range(start, stop, step)))
                strides.append(step * self.strides[axis])
            else:
                q = index(q)
                if not 0 <= q < n:
                    self._outside(i)
                offset += q * self.strides[axis]
        return Array(self.memory, offset, tuple(shape), tuple(strides))

    def _outside(self, i: Any) -> None:
        told = ", ".join(str(q) for q in i)
        raise OutOfRangeError(f"{where()}: {self.memory.name}[{told}] is outside: its shape is {self.shape}")

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, (tuple, slice)) or len(self.shape) > 1:
            part = self._part(i)
            return part if part.shape else self.memory.read(part.offset)
        return self.memory.read(self.place(i))

    def __setitem__(self, i: Any, value: Any) -> None:
        self.memory.write(self.place(i), value)


class Local:
    """An array of one thread."""

    __slots__ = ("dtype", "shape", "values")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.values: list[Any] = [None] * math.prod(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def _number(self, i: Any) -> int:
        k = 0
        indices = [index(q) for q in i] if isinstance(i, tuple) else [index(i)]
        for q, n in zip(indices, self.shape, strict=True):
            if not 0 <= q < n:
                raise OutOfRangeError(f"{where()}: local array[{i}] is outside: its shape is {self.shape}")
            k = k * n + q
        return k

    def __getitem__(self, i: Any) -> Any:
        value = self.values[self._number(i)]
        if value is None:
            raise UninitializedReadError(f"{where()}: local array[{i}] is read, but was never written")
        return value

    def __setitem__(self, i: Any, value: Any) -> None:
        kind = self.dtype.type
        self.values[self._number(i)] = value if type(value) is kind else kind(value)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a C-ordered array, in elements."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


# --- the words of npmamba.cuda.device that reach memory ---


def load(p: Any, i: Any) -> Any:
    x = p[i]
    return np.float32(x) if p.dtype.itemsize == 2 else x


def store(p: Any, i: Any, value: Any) -> None:
    p[i] = value


def _check_aligned(p: Any, i: Any, unit: int) -> None:
    if not isinstance(p, Local) and p.place(i) * p.dtype.itemsize % unit:
        raise MisalignedAccessError(f"{where()}: {p.memory.name} at index {i} is not aligned to {unit} bytes")


def vector_load(count: int) -> Any:
    def load_vector(p: Any, i: Any) -> Any:
        _check_aligned(p, i, min(16, count * p.dtype.itemsize))
        return tuple([load(p, index(i) + k) for k in range(count)])

    return load_vector


def vector_store(count: int) -> Any:
    def store_vector(p: Any, i: Any, values: Any) -> None:
        _check_aligned(p, i, min(16, count * p.dtype.itemsize))
        if len(values) != count:
            raise KernelError(f"{where()}: store{count} is given {len(values)} numbers")
        for k in range(count):
            p[index(i) + k] = values[k]

    return store_vector


def copy_async(shared: Any, i: Any, p: Any, j: Any, valid: Any) -> None:
    count = 16 // shared.dtype.itemsize
    _check_aligned(shared, i, 16)
    if valid:
        _check_aligned(p, j, 16)
    for k in range(count):
        shared[index(i) + k] = p[index(j) + k] if valid else 0
