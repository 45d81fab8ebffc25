"""Dropout on the CPU: which numbers fall is decided by a counter-based generator, so nothing is stored.

The numbers, in C order, are taken in fours; the four random words of the i-th four are Philox's for the counter i. A
number stays where its word is at least ``rate 2^32``: an integer comparison, the same on every device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cpu.layout import native
from npmamba.cpu.runtime import Int, Read, Real, Write, empty, inner, kernel, launch
from npmamba.scalar import cast, philox
from npmamba.shapes import compute_dtype

BLOCK = 16384
"""Numbers per task."""
FOURS = 256
"""Fours whose words are drawn together; four times as many divide BLOCK."""


@inner
def _draw(words, first, k0, k1, k2, k3):
    """words[:, j] = the four words of the counter first + j; a loop that the compiler vectorizes"""
    word = np.uint64(0xFFFFFFFF)
    for j in range(words.shape[1]):
        counter = first + np.uint64(j)
        w0, w1, w2, w3 = philox(counter & word, counter >> np.uint64(32), k2, k3, k0, k1)
        words[0, j], words[1, j], words[2, j], words[3, j] = w0, w1, w2, w3


@kernel
def _dropout(
    start: Int,
    stop: Int,
    x: Read[1],
    y: Write[1],
    scale: Real,
    threshold: Int,
    key0: Int,
    key1: Int,
    key2: Int,
    key3: Int,
):
    """Equation: y_i = x_i scale where word_i >= threshold, else 0.
    Threads: a task is a block of BLOCK numbers.
    Owns: its numbers of y.
    """
    words, least = np.empty((4, FOURS), np.uint32), np.uint32(threshold)
    k0, k1, k2, k3 = np.uint64(key0), np.uint64(key1), np.uint64(key2), np.uint64(key3)
    for block in range(start, stop):
        for first in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[0]), 4 * FOURS):
            _draw(words, np.uint64(first // 4), k0, k1, k2, k3)
            for i in range(first, min(first + 4 * FOURS, x.shape[0])):
                j = i - first
                kept = words[j & 3, j >> 2] >= least
                y[i] = x[i] * cast(scale, x[i]) if kept else cast(0, x[i])


def forward(x: np.ndarray, *, rate: float, key: tuple[int, int, int, int]) -> Any:
    """Return `x` with entries set to zero and the others divided by ``1 - rate``: C-ordered, of its dtype.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64.
    rate : float
        In [0, 1): the share that falls, to 32 bits.
    key : four integers below 2^32
        Two words of the generator's key, and the upper two of its counter.
    """
    dtype = compute_dtype(x.dtype)
    flat = np.ascontiguousarray(native(x, dtype)).reshape(-1)
    y = empty(flat.shape, dtype)
    numbers = (1 / (1 - rate), int(rate * 2**32), *key)
    launch(_dropout, dtype, -(-flat.size // BLOCK), flat, y, *numbers, work=4 * flat.size)
    return y.reshape(x.shape).astype(x.dtype.newbyteorder("="), copy=False)


def backward(dout: np.ndarray, *, rate: float, key: tuple[int, int, int, int]) -> Any:
    """Return the gradient of `x`: dropout is linear and its own transpose."""
    return forward(dout, rate=rate, key=key)
