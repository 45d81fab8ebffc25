"""From the callers' memory, (batch, dim, seqlen) in any order, to the kernels' (batch, seqlen, dim), unit stride last.

Channel-contiguous arrays, and slices of them, pass as views. Everything else is copied once, by tiles that fit the
first-level cache: NumPy's own transposing copy is several times slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cpu.runtime import Int, Read, Write, empty, kernel, launch, scratch
from npmamba.cpu.simd import load, pick, store, width

SIDE = 64
"""Side of the square that is turned around in scratch memory."""


@kernel
def _transpose(start: Int, stop: Int, x: Read[3], out: Write[3]):
    """Equation: out[b, j, i] = x[b, i, j].
    Threads: a task is (batch row, SIDE rows of the result); loops over squares, which are read and written along
    their memory: strides that are powers of two would throw each other's lines out of the cache.
    Owns: its rows of the result.
    Saved: nothing.
    """
    w = width(out)
    stripes = (out.shape[1] + SIDE - 1) // SIDE
    square, line = scratch((SIDE * SIDE,), out), scratch((SIDE,), out)
    for task in range(start, stop):
        b, j0 = task // stripes, task % stripes * SIDE
        m = min(SIDE, out.shape[1] - j0)
        for i0 in range(0, out.shape[2], SIDE):
            k = min(SIDE, out.shape[2] - i0)
            for i in range(k):
                for j in range(0, m, w):
                    store(square, (i * SIDE + j,), load(x, (b, i0 + i, j0 + j), m - j))
            for j in range(m):
                for i in range(k):
                    line[i] = pick(square, i * SIDE + j)
                for i in range(0, k, w):
                    store(out, (b, j0 + j, i0 + i), load(line, (i,)), k - i)


def transposed(x: np.ndarray) -> np.ndarray:
    """Return a float32 or float64 array (batch, m, n) as a new C-contiguous one (batch, n, m)."""
    batch, m, n = x.shape
    if n > 1 and x.strides[2] != x.itemsize:
        x = np.ascontiguousarray(x)
    out = empty((batch, n, m), x.dtype)
    launch(_transpose, x.dtype, batch * -(-n // SIDE), x, out, work=x.size)
    return out


def native(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return `x` in native byte order, aligned, and in `dtype`: itself where it is so already."""
    x = x.astype(dtype, copy=False)
    return x if x.flags.aligned else x.copy()


def rows(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return `x` (batch, dim, seqlen) as (batch, seqlen, dim) with unit channel stride: a view where memory allows."""
    x = native(x, dtype)
    return x.swapaxes(1, 2) if x.shape[1] == 1 or x.strides[1] == x.itemsize else transposed(x)


def rows_like(u: np.ndarray, dtype: Any) -> np.ndarray:
    """Allocate a contiguous (batch, seqlen, dim) array for a result of the shape of `u` (batch, dim, seqlen)."""
    return empty((u.shape[0], u.shape[2], u.shape[1]), dtype)


def in_memory_order_of(result: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return a (batch, n, dim) result as (batch, dim, n): a view if channels of `u` lie side by side, or a copy."""
    channels_apart = abs(u.strides[1]) > abs(u.strides[2]) or u.flags.c_contiguous
    return transposed(result) if channels_apart else result.swapaxes(1, 2)


def in_order_of(result: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return a (batch, seqlen, dim) result as (batch, dim, seqlen), in the dtype and memory order of `u`.

    The order is C unless `u`'s channels lie side by side, as with NumPy's ``order="K"``.
    """
    result = in_memory_order_of(result, u)
    if result.dtype == u.dtype:
        return result
    with np.errstate(over="ignore"):  # what lies beyond float16's range is infinite there
        return result.astype(u.dtype.newbyteorder("="), copy=False)
