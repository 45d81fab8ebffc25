"""Arrays as rows, as the CUDA kernels of norm, loss and embedding walk them, and the teams of threads that own rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import aligned, library, strides
from npmamba.cuda.device import cuda, shift
from npmamba.cuda.vectors import width_of
from npmamba.scalar import select

uint32, int64 = np.uint32, np.int64


# --- on the host ---


class Lines(NamedTuple):
    """An array as rows: row ``o * inner + i`` begins ``o * outer_stride + i * inner_stride`` from the first."""

    array: Any
    outer_stride: int
    inner_stride: int


def lines(x: Any) -> Lines:
    """Return `x` (..., n) as rows of n: the same memory, unless the numbers of a row are apart.

    Two leading axes, as of the slice ``logits[:, :-1]`` of (batch, seqlen, vocab), are walked where they stand.
    """
    if x.ndim > 3:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        x = library(x).ascontiguousarray(x)
    x = x[(None,) * (3 - x.ndim)]
    return Lines(x, *strides(x)[:2])


def inner_rows(*every: Lines) -> int:
    """Return how many rows stand on the inner axis of arrays of one shape.

    Where the rows of each array are one even stride apart these are all, so that no kernel needs to divide.
    """
    outer, inner, _ = every[0].array.shape
    even = all(x.outer_stride == inner * x.inner_stride for x in every)
    return max(1, outer * inner if even or outer == 1 else inner)


def wide(*arrays: Any) -> bool:
    """Tell whether the rows of all arrays begin and end at multiples of 16 bytes."""
    return all(x.shape[-1] % width_of(x.dtype) == 0 and aligned(x) for x in arrays)


def team_of(n: int, threads: int, numbers: int) -> int:
    """Return p, for a team of ``1 << p`` threads: the smallest that leaves a thread `numbers` of n, or all threads."""
    return max(1, min(threads, -(-n // numbers)) - 1).bit_length()


# --- in kernels ---


def divided(row, inner):
    """Return where a row stands on the outer axis, and where on the inner one."""
    outer = uint32(0)
    if row >= inner:
        outer = uint32(row // inner)
    return outer, uint32(row - uint32(outer * inner))


def row_offset(at, outer_stride, inner_stride):
    """Return where a row of `Lines` begins, which stands where `divided` says."""
    return int64(at[0]) * outer_stride + int64(at[1]) * inner_stride


def row_pointer(p, at, outer_stride, inner_stride):
    """Return the pointer to it."""
    return shift(p, row_offset(at, outer_stride, inner_stride))


def smaller(x, y):
    """Return the smaller of two numbers."""
    return select(x < y, x, y)


def two_sum(high, low, x):
    """Return high + x, and low with what that addition rounded away (Knuth)."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


def rounded_sum(high, low):
    """Return the sum of what `two_sum` made; beside infinity or NaN there is nothing kept."""
    return select(low == low, high + low, high)


def team_total(warps: int) -> Any:
    """Build ``total(x, shared, turn, tid, p)``: the sum over a team of ``1 << p`` threads, the same bits in all of it.

    A team of several warps meets at a barrier: all threads of the block, `warps` warps, call it together. `shared`
    holds two numbers a warp; calls take its halves by turns, 0 and 1, so that none overwrites what another still reads.
    """

    def total(x, shared, turn, tid, p):
        for power in range(5):
            if uint32(power) < p:
                x += cuda.shfl_xor_sync(-1, x, 1 << power)
        if p > uint32(5):
            warp, half, wide = tid >> uint32(5), uint32(turn * uint32(warps)), uint32(p - uint32(5))
            if tid & uint32(31) == uint32(0):
                shared[uint32(half + warp)] = x
            cuda.syncthreads()
            base = uint32(half + uint32(uint32(warp >> wide) << wide))
            x = shared[base]
            for k in range(1, warps):
                if uint32(k) < uint32(1) << wide:
                    x += shared[uint32(base + uint32(k))]
        return x

    return total
