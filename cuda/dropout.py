"""CUDA twin of `npmamba.cpu.dropout`: the same generator, the same integer comparison, so the same numbers fall."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import aligned, empty, library
from npmamba.cuda.device import Data, Real, Size, Stride, cuda, load, load4, shift, store, store4
from npmamba.cuda.launch import Kernel
from npmamba.scalar import cast, philox, select
from npmamba.shapes import compute_dtype

uint32, int64 = np.uint32, np.int64
THREADS = 256
BLOCK = 4 * THREADS
"""Numbers of a block, four of a thread."""


def _dropout(real, wide):
    def keep(x, word, threshold, scale):
        return select(uint32(word) < threshold, cast(0, x), x * scale)

    def dropout(
        x: Data,
        y: Data,
        count: Stride,
        scale: Real,
        threshold: Size,
        key0: Size,
        key1: Size,
        key2: Size,
        key3: Size,
    ):
        """Equation: y_i = x_i scale where word_i >= threshold, else 0.
        Threads: four neighbouring numbers each, whose words are one call of the generator.
        Owns: its numbers of y.
        Saved: nothing; the gradient draws the words again.
        """
        tid, word32 = uint32(cuda.threadIdx.x), np.uint64(0xFFFFFFFF)
        first = int64(cuda.blockIdx.x) * int64(BLOCK)
        i, left = uint32(4) * tid, count - first
        p, q = shift(x, first), shift(y, first)
        counter = np.uint64(cuda.blockIdx.x) * np.uint64(THREADS) + np.uint64(tid)
        k0, k1, k2, k3 = np.uint64(key0), np.uint64(key1), np.uint64(key2), np.uint64(key3)
        w0, w1, w2, w3 = philox(counter & word32, counter >> np.uint64(32), k2, k3, k0, k1)
        if wide and int64(i) + int64(4) <= left:
            x0, x1, x2, x3 = load4(p, i)
            y0, y1 = keep(x0, w0, threshold, scale), keep(x1, w1, threshold, scale)
            y2, y3 = keep(x2, w2, threshold, scale), keep(x3, w3, threshold, scale)
            store4(q, i, (y0, y1, y2, y3))
        else:
            if int64(i) < left:
                store(q, i, keep(load(p, i), w0, threshold, scale))
            if int64(i) + int64(1) < left:
                store(q, uint32(i + uint32(1)), keep(load(p, uint32(i + uint32(1))), w1, threshold, scale))
            if int64(i) + int64(2) < left:
                store(q, uint32(i + uint32(2)), keep(load(p, uint32(i + uint32(2))), w2, threshold, scale))
            if int64(i) + int64(3) < left:
                store(q, uint32(i + uint32(3)), keep(load(p, uint32(i + uint32(3))), w3, threshold, scale))

    return dropout


DROPOUT = Kernel(_dropout, threads=THREADS, shipped={"wide": (False, True)})


def forward(x: Any, *, rate: float, key: tuple[int, int, int, int]) -> Any:
    """Return `x` with entries set to zero and the others divided by ``1 - rate``: C-ordered, of its dtype."""
    dtype = x.dtype.newbyteorder("=")
    flat = library(x).ascontiguousarray(x.astype(dtype, copy=False)).reshape(-1)
    y = empty(flat, flat.shape, dtype)
    numbers = (flat.size, compute_dtype(dtype).type(1 / (1 - rate)), int(rate * 2**32), *key)
    DROPOUT.launch((-(-flat.size // BLOCK),), dtype, (flat, y, *numbers), wide=aligned(flat))
    return y.reshape(x.shape)


def backward(dout: Any, *, rate: float, key: tuple[int, int, int, int]) -> Any:
    """Return the gradient of `x`: dropout is linear and its own transpose."""
    return forward(dout, rate=rate, key=key)
