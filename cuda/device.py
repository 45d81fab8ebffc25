"""The words of a CUDA kernel: what it may say beyond plain Python, with what each word means for one number.

A kernel in this folder is a plain Python function. It runs in two ways: `npmamba.cuda.compile` puts Numba's CUDA
intrinsics in the place of these functions and compiles it, `npmamba.testing.interpret` runs it as it stands, one
greenlet per thread. So every function here is the definition of its intrinsic, and a test holds one against the other.

Memory is reached by `load` and `store`, which read and write float16 and bfloat16 as float32, and by pointers that
`shift` moves: 64-bit arithmetic once per tile, 32-bit offsets inside, for arrays of any size. An offset made of uint32
numbers stays one; what a loop carries on must be cast again, for Numba makes 64 bits of a sum of two uint32.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class _Cuda:
    """Stands where kernels say ``cuda.threadIdx.x`` or ``cuda.syncthreads()``; compiler and interpreter replace it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools such as doctest ask of every object
            raise AttributeError(name)
        raise RuntimeError(f"cuda.{name} means something only inside a kernel that is compiled or interpreted")


cuda = _Cuda()


# --- what a kernel's annotations say of its arguments ---


class Argument:
    """An annotation: how one argument of a kernel is passed."""

    def __init__(self, name: str, pointer: bool) -> None:
        self.name, self.pointer = name, pointer

    def __repr__(self) -> str:
        return self.name


Data = Argument("Data", pointer=True)
"""Pointer to numbers of the kernel's own dtype: float16, bfloat16, float32 or float64."""
Wide = Argument("Wide", pointer=True)
"""Pointer to numbers of the dtype the kernel computes in: float64 for float64, else float32."""
Double = Argument("Double", pointer=True)
"""Pointer to float64."""
Long = Argument("Long", pointer=True)
"""Pointer to int64."""
Flags = Argument("Flags", pointer=True)
"""Pointer to uint8."""
Size = Argument("Size", pointer=False)
"""A whole number from 0 to 2^32 - 1, as uint32."""
Stride = Argument("Stride", pointer=False)
"""A signed 64-bit whole number, such as the distance between two rows of a large array."""
Real = Argument("Real", pointer=False)
"""A number of the dtype the kernel computes in."""


def arguments_of(kernel: Any) -> dict[str, str]:
    """Return the arguments of a kernel and the names of their annotations, such as ``{"x": "Data"}``."""
    code = kernel.__code__
    return {name: str(kernel.__annotations__[name]) for name in code.co_varnames[: code.co_argcount]}


def wide_dtype(dtype: Any) -> np.dtype:
    """Return the dtype a kernel for `dtype` computes in: float64 for float64, else float32."""
    return np.dtype(np.float64) if np.dtype(dtype) == np.float64 else np.dtype(np.float32)


# --- memory ---


def _wide(x: Any) -> Any:
    return x if np.asarray(x).dtype.itemsize > 2 else np.float32(x)


def load(p: Any, i: Any) -> Any:
    """Return ``p[i]``; float16 and bfloat16 become float32. `i` is unsigned or not negative."""
    return _wide(p[i])


def store(p: Any, i: Any, value: Any) -> None:
    """Write ``p[i]``, rounded to nearest even where the memory is narrower than the number."""
    p[i] = value


def shift(p: Any, n: Any) -> Any:
    """Return the pointer `n` elements further, or into a shared array; `n` may be negative.

    A constant offset from a pointer costs nothing, a sum of numbers does: shift once, then load at constants.
    """
    return p.shifted(n)


def follow(p: Any, address: Any, count: Any) -> Any:
    """Return a pointer like `p` to `count` numbers at `address`, an int64 that the host has read off an array.

    So one launch reads a list of arrays. What compiles to nothing here is `count`, to which the interpreter holds it.
    """
    return p.followed(address, count)


def load2(p: Any, i: Any) -> Any:
    """Return two neighbouring numbers by one access; ``p + i`` must be aligned to both together."""
    return load(p, i), load(p, i + 1)


def load4(p: Any, i: Any) -> Any:
    """Return four neighbouring numbers by accesses of up to 16 bytes, to which ``p + i`` must be aligned."""
    return tuple(load(p, i + k) for k in range(4))


def load8(p: Any, i: Any) -> Any:
    """Return eight neighbouring numbers by accesses of up to 16 bytes, to which ``p + i`` must be aligned."""
    return tuple(load(p, i + k) for k in range(8))


def fetch2(p: Any, i: Any, valid: Any) -> Any:
    """Start the load of 8 bytes at ``p[i]``, to which it is aligned: two words of 32 bits, zeros unless `valid`.

    Words may wait for their use in half the registers that their numbers would take. With `valid` false nothing is
    read.
    """
    return _words(p, i, valid, 2)


def fetch4(p: Any, i: Any, valid: Any) -> Any:
    """Start the load of 16 bytes at ``p[i]`` likewise."""
    return _words(p, i, valid, 4)


def _words(p: Any, i: Any, valid: Any, count: int) -> Any:
    if not valid:
        return (np.uint32(0),) * count
    numbers = 4 * count // np.dtype(p.dtype).itemsize
    read = {1: lambda p, i: (load(p, i),), 2: load2, 4: load4, 8: load8}[numbers]
    return tuple(np.array(read(p, i), p.dtype).view(np.uint32))


def unpacked(p: Any, words: Any) -> Any:
    """Return the numbers that words fetched from `p` hold."""
    return tuple(_wide(x) for x in np.array(words, np.uint32).view(p.dtype))


def store2(p: Any, i: Any, values: Any) -> None:
    """Write two neighbouring numbers by one access."""
    _store_all(p, i, values)


def store4(p: Any, i: Any, values: Any) -> None:
    """Write four neighbouring numbers by accesses of up to 16 bytes, to which ``p + i`` must be aligned."""
    _store_all(p, i, values)


def store8(p: Any, i: Any, values: Any) -> None:
    """Write eight neighbouring numbers by accesses of up to 16 bytes, to which ``p + i`` must be aligned."""
    _store_all(p, i, values)


def _store_all(p: Any, i: Any, values: Any) -> None:
    for k, value in enumerate(values):
        p[i + k] = value


def copy_async(shared: Any, i: Any, p: Any, j: Any, valid: Any) -> None:
    """Start the copy of 16 bytes from global ``p[j]`` to shared ``shared[i]``, or of zeros unless `valid`.

    The two have elements of one size, and both places are aligned to 16 bytes. The copy is there after `wait_async` and
    a barrier. With `valid` false nothing is read.
    """
    count = 16 // np.dtype(shared.dtype).itemsize
    for k in range(count):
        shared[i + k] = p[j + k] if valid else 0


def commit_async() -> None:
    """Close a group of `copy_async` copies."""


def wait_async(pending: int) -> None:
    """Wait until all but the `pending` youngest groups of this thread's copies are there. `pending` is a constant."""


# --- numbers: primitives of npmamba.scalar have their place there; these exist on CUDA devices only ---


def double(x: Any) -> Any:
    """Return float32 or float64 as float64; ``np.float64(x)`` of a float32 does not pass NVIDIA's assembler."""
    return np.float64(x)


def rcp(x: Any) -> Any:
    """Return 1 / x to about one unit in the last place (float32), exactly rounded for float64."""
    return np.asarray(x).dtype.type(1) / x
