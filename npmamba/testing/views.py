"""Memory as a kernel addresses it: pointers, arrays, and the words of `npmamba.cuda.device` that reach them."""

from __future__ import annotations

import ctypes
import dis
import functools
import math
import sys
import types
from operator import index
from typing import Any, NoReturn

import numpy as np
from greenlet import getcurrent

from npmamba.testing.findings import (
    KernelError,
    MisalignedAccessError,
    OutOfRangeError,
    UninitializedReadError,
    line_of,
    party,
)
from npmamba.testing.shadow import Copy, Memory


class Pointer:
    """A pointer into an argument: ``p[i]``, ``p[i] = v``, ``p.shifted(n)``."""

    __slots__ = ("dtype", "memory", "offset")

    def __init__(self, memory: Memory, offset: int) -> None:
        self.memory, self.offset, self.dtype = memory, offset, memory.dtype

    def __getitem__(self, i: Any) -> Any:
        return self.memory.read(self.offset + index(i))

    def __setitem__(self, i: Any, value: Any) -> None:
        self.memory.write(self.offset + index(i), value)

    def place(self, i: Any) -> int:
        return self.offset + index(i)

    def shifted(self, n: Any) -> Pointer:
        return Pointer(self.memory, self.offset + index(n))

    def followed(self, address: Any, count: Any) -> Pointer:
        """Return a pointer to memory that is no argument; it shares the shadow of the arguments of its size."""
        size, name = self.dtype.itemsize, f"the array at {int(address):#x}"
        if int(address) % size:
            raise KernelError(f"{name} is not aligned to its numbers of {size} bytes: {party(getcurrent())}")
        held: Any = (ctypes.c_uint8 * (int(count) * size)).from_address(int(address))
        flat = np.frombuffer(held, np.uint8).view(self.dtype)
        memory = Memory(name, flat, int(address) // size, self.memory.cells, fresh=False)
        return Pointer(memory, memory.low)


class Null:
    """Stands for an argument that is None: it may be passed on and shifted, never followed."""

    def __init__(self, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, np.dtype(dtype)

    def place(self, i: Any) -> NoReturn:
        here = party(getcurrent())
        raise OutOfRangeError(f"{self.name} is None, but is followed: {here}", self.name, index(i), (here,))

    def __getitem__(self, i: Any) -> Any:
        self.place(i)

    def __setitem__(self, i: Any, value: Any) -> None:
        self.place(i)

    def shifted(self, n: Any) -> Null:
        return self


class Array:
    """An array of a kernel: shared, or an argument of a Numba kernel. A negative index is a mistake."""

    __slots__ = ("dtype", "line", "memory", "offset", "shape", "strides")

    def __init__(self, memory: Memory, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.memory, self.offset, self.shape, self.strides = memory, offset, shape, strides
        self.dtype = memory.dtype
        self.line = shape[0] if strides == (1,) else 0  # its length, if it is one row

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def place(self, i: Any) -> int:
        if self.line and type(i) is not tuple:
            k = index(i)
            if not 0 <= k < self.line:
                self._outside((k,))
            return self.offset + k
        part = self._part(i if isinstance(i, tuple) else (i,))
        if part.shape:
            raise KernelError(f"{self.memory.name}: index {i} names {part.shape} elements, not one")
        return part.offset

    def __getitem__(self, i: Any) -> Any:
        if self.line and type(i) is not tuple and type(i) is not slice:
            k = index(i)
            if not 0 <= k < self.line:
                self._outside((k,))
            return self.memory.read(self.offset + k)
        part = self._part(i if isinstance(i, tuple) else (i,))
        return part if part.shape else self.memory.read(part.offset)

    def __setitem__(self, i: Any, value: Any) -> None:
        self.memory.write(self.place(i), value)

    def shifted(self, n: Any) -> Pointer:
        return Pointer(self.memory, self.offset + index(n))

    def _part(self, i: tuple[Any, ...]) -> Array:
        offset, shape, strides = self.offset, [], []
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            q = i[axis] if axis < len(i) else slice(None)
            if isinstance(q, slice):
                inside = range(n)[q]
                offset += inside.start * stride
                shape.append(len(inside))
                strides.append(inside.step * stride)
            else:
                if not 0 <= index(q) < n:
                    self._outside(i)
                offset += index(q) * stride
        return Array(self.memory, offset, tuple(shape), tuple(strides))

    def _outside(self, i: tuple[Any, ...]) -> NoReturn:
        here, told = party(getcurrent()), ", ".join(str(q) for q in i)
        name = self.memory.name
        raise OutOfRangeError(f"{name}[{told}] is outside its shape {self.shape}: {here}", name, i, (here,))


class Local:
    """An array of one thread, its own memory."""

    __slots__ = ("dtype", "shape", "site", "values")
    first = 0

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, site: tuple[types.CodeType, int]) -> None:
        self.shape, self.dtype, self.site = shape, dtype, site
        self.values: list[Any] = [None] * math.prod(shape)

    memory = property(lambda self: self)

    @property
    def name(self) -> str:
        return f"local array {variable(*self.site)}"

    def __len__(self) -> int:
        return self.shape[0]

    def place(self, i: Any) -> int:
        k, indices = 0, i if type(i) is tuple else (i,)
        for q, n in zip(indices, self.shape, strict=True):
            if not 0 <= index(q) < n:
                self._fail(OutOfRangeError, i, f"is outside its shape {self.shape}")
            k = k * n + index(q)
        return k

    def read(self, k: int) -> Any:
        if not 0 <= k < len(self.values):
            self._fail(OutOfRangeError, k, f"is outside its {len(self.values)} elements")
        value = self.values[k]
        if value is None:
            self._fail(UninitializedReadError, k, "is read, but nobody wrote it")
        return value

    def write(self, k: int, value: Any) -> None:
        if not 0 <= k < len(self.values):
            self._fail(OutOfRangeError, k, f"is outside its {len(self.values)} elements")
        kind = self.dtype.type
        self.values[k] = value if type(value) is kind else kind(value)

    def __getitem__(self, i: Any) -> Any:
        return self.read(self.place(i))

    def __setitem__(self, i: Any, value: Any) -> None:
        self.write(self.place(i), value)

    def _fail(self, kind: type[KernelError], i: Any, why: str) -> NoReturn:
        here = party(getcurrent())
        raise kind(f"{self.name}[{i}] {why}: {here}", self.name, i, (here,))


@functools.cache
def variable(code: types.CodeType, instruction: int) -> str:
    """Return the name that the result of a call is assigned to, or the line of the call."""
    for step in dis.get_instructions(code):
        if step.offset > instruction and step.opname.startswith("STORE_"):
            return str(step.argval if isinstance(step.argval, str) else step.argval[0])
        if step.offset > instruction and step.opname not in ("CACHE", "CALL", "PRECALL"):
            break
    return f"of line {line_of(code, instruction)}"


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a C-ordered array, in elements."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


# --- the words of npmamba.cuda.device that reach memory: each is called by the kernel and calls `read` and `write` ---


def load(p: Any, i: Any) -> Any:
    k = p.place(i)
    x = p.memory.read(k)
    return np.float32(x) if p.dtype.itemsize == 2 else x


def store(p: Any, i: Any, value: Any) -> None:
    k = p.place(i)
    p.memory.write(k, value)


def _aligned_place(p: Any, i: Any, count: int) -> int:
    unit = min(16, count * p.dtype.itemsize)
    k: int = p.place(i)
    if k * p.dtype.itemsize % unit:
        here, name = party(getcurrent()), p.memory.name
        message = f"{name}[{k - p.memory.first}] is not aligned to {unit} bytes: {here}"
        raise MisalignedAccessError(message, name, k - p.memory.first, (here,))
    return k


def vector_load(count: int) -> Any:
    def load_vector(p: Any, i: Any) -> Any:
        first, numbers = _aligned_place(p, i, count), []
        for k in range(first, first + count):
            x = p.memory.read(k)
            numbers.append(np.float32(x) if p.dtype.itemsize == 2 else x)
        return tuple(numbers)

    return load_vector


def vector_store(count: int) -> Any:
    def store_vector(p: Any, i: Any, values: Any) -> None:
        first = _aligned_place(p, i, count)
        if len(values) != count:
            raise KernelError(f"store{count} is given {len(values)} numbers: {party(getcurrent())}")
        for k in range(count):
            p.memory.write(first + k, values[k])

    return store_vector


def copy_async(shared: Any, i: Any, p: Any, j: Any, valid: Any) -> None:
    count = 16 // shared.dtype.itemsize
    if shared.dtype.itemsize != p.dtype.itemsize:
        raise KernelError(f"copy_async from {p.dtype} to {shared.dtype}: {party(getcurrent())}")
    to, values = _aligned_place(shared, i, count), [shared.dtype.type(0)] * count
    shared.memory.within(to, count)
    if valid:
        source = _aligned_place(p, j, count)
        for k in range(count):
            values[k] = p.memory.read(source + k)
    thread: Any = getcurrent()
    copy = Copy(thread, shared.memory, to, values, sys._getframe(1))
    copy.start()
    thread.copies.append(copy)


def commit_async() -> None:
    thread: Any = getcurrent()
    thread.groups.append(thread.copies)
    thread.copies = []


def wait_async(pending: int) -> None:
    thread: Any = getcurrent()
    while len(thread.groups) > pending:
        for copy in thread.groups.pop(0):
            copy.land()
