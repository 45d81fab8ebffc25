"""CPU twin of `npmamba.ops.cross_entropy`: Numba loops, forward and backward.

A task is a row of logits. Forward, the row is read for its largest logit and again, from the cache, for the sum of
exponentials; both are kept, so that the gradient is written in one pass over the logits. Sums run over `CHUNK` logits
in the row's dtype and in float64 beyond.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.lines import lines
from npmamba.cpu.runtime import Int, Read, ReadInt, Real, Write, WriteDouble, empty, inner, kernel, launch, scratch
from npmamba.cpu.simd import load, store, total, width
from npmamba.scalar import cast, select, softmax_term
from npmamba.shapes import compute_dtype

CHUNK = 2048
"""Exponentials that are summed before the sum is added to float64; a multiple of every vector's width."""


@inner
def _load_end(logits, ones, o, i, j):
    """Read the last vector of a row; beyond the end come -inf, which change neither maximum nor sum."""
    count = logits.shape[2] - j
    x = load(logits, (o, i, j), count)
    return select(load(ones, (0,), count) > cast(0, x), x, cast(-np.inf, x))


@inner
def _largest(logits, ones, o, i, lanes):
    """The largest number of a row; NaN is passed over, for it comes back in the sum."""
    w = width(logits)
    whole = logits.shape[2] // w * w
    even = _load_end(logits, ones, o, i, whole)
    odd = even
    for j in range(0, whole - w, 2 * w):
        x = load(logits, (o, i, j))
        even = select(x > even, x, even)
        x = load(logits, (o, i, j + w))
        odd = select(x > odd, x, odd)
    if whole % (2 * w):
        x = load(logits, (o, i, whole - w))
        odd = select(x > odd, x, odd)
    store(lanes, (0,), select(odd > even, odd, even))
    top = lanes[0]
    for lane in range(1, w):
        top = max(top, lanes[lane])
    return top


@inner
def _sum_of_exponentials(logits, ones, o, i, top):
    """sum e^(l - top) over a row"""
    w = width(logits)
    whole = logits.shape[2] // w * w
    one = load(ones, (0,))
    top = cast(top, one)
    even = softmax_term(_load_end(logits, ones, o, i, whole), top, one)
    result = np.float64(total(even))
    for first in range(0, whole, CHUNK):
        even = cast(0, one)
        for j in range(first, min(first + CHUNK, whole), w):
            even = even + softmax_term(load(logits, (o, i, j)), top, one)
        result += np.float64(total(even))
    return result


@kernel
def _forward(
    start: Int,
    stop: Int,
    logits: Read[3],
    labels: ReadInt[1],
    ignore_index: Int,
    losses: WriteDouble[1],
    sums: WriteDouble[1],
    tops: Write[1],
):
    """Equation: loss = log(sum e^(l - top)) + top - l[label], with top = max l.
    Threads: a task is a row.
    Owns: its loss, its sum and its largest logit; 0, 1 and 0 where the label is ignored.
    Saved: sum and largest logit of each row.
    """
    w = width(logits)
    ones, lanes = scratch((w,), logits), scratch((w,), logits)
    ones[:] = 1
    for row in range(start, stop):
        label = labels[row]
        losses[row], sums[row], tops[row] = 0, 1, 0
        if label != ignore_index:
            o, i = row // logits.shape[1], row % logits.shape[1]
            tops[row] = _largest(logits, ones, o, i, lanes)
            sums[row] = _sum_of_exponentials(logits, ones, o, i, tops[row])
            losses[row] = np.log(sums[row]) + (np.float64(tops[row]) - np.float64(logits[o, i, label]))


@kernel
def _backward(
    start: Int,
    stop: Int,
    logits: Read[3],
    labels: ReadInt[1],
    ignore_index: Int,
    tops: Read[1],
    factors: Read[1],
    dlogits: Write[3],
    scale: Real,
):
    """Equation: dl = (softmax(l) - onehot(label)) scale, with softmax(l) scale = e^(l - top) factor.
    Threads: a task is a row.
    Owns: its row of dlogits; zeros where the label is ignored.
    Saved: the largest logit of each row, and the sum inside its factor = scale / sum.
    """
    w, vocab = width(logits), logits.shape[2]
    for row in range(start, stop):
        o, i, label = row // logits.shape[1], row % logits.shape[1], labels[row]
        if label == ignore_index:
            dlogits[o, i] = 0
        else:
            for j in range(0, vocab, w):
                x = load(logits, (o, i, j), vocab - j)
                p = softmax_term(x, cast(tops[row], x), cast(factors[row], x))
                store(dlogits, (o, i, j), p, vocab - j)
            dlogits[o, i, label] -= scale


# --- from the caller's arrays to the kernels' and back ---


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, and largest logit and sum of exponentials of each row."""

    logits: np.ndarray
    labels: np.ndarray
    ignore_index: int
    tops: np.ndarray
    sums: np.ndarray
    count: int


def forward(logits: np.ndarray, labels: np.ndarray, *, ignore_index: int, save: bool) -> tuple[Any, Saved | None]:
    """Return the mean loss, and what `backward` needs (None unless `save`). Arguments have been checked."""
    dtype = compute_dtype(logits.dtype)
    targets = labels.astype(np.int64).reshape(-1)
    losses, sums = empty(targets.shape, np.float64), empty(targets.shape, np.float64)
    tops = empty(targets.shape, dtype)
    arguments = (lines(logits, dtype), targets, ignore_index)
    launch(_forward, dtype, targets.size, *arguments, losses, sums, tops, work=logits.size)
    count = int(np.count_nonzero(targets != ignore_index))
    mean = losses.sum() / count if count else np.nan
    saved = Saved(logits, targets, ignore_index, tops, sums, count) if save else None
    return np.asarray(mean, dtype), saved


def backward(dout: np.ndarray, saved: Saved) -> tuple[np.ndarray]:
    """Return the gradient of the logits, C-ordered."""
    logits, labels, ignore_index, tops, sums, count = saved
    dtype = tops.dtype
    scale = float(dout) / max(count, 1)
    rows = lines(logits, dtype)
    dlogits = empty(rows.shape, dtype)
    factors = (scale / sums).astype(dtype)
    arguments = (rows, labels, ignore_index, tops, factors)
    launch(_backward, dtype, labels.size, *arguments, dlogits, scale, work=logits.size)
    return (dlogits.reshape(logits.shape).astype(logits.dtype.newbyteorder("="), copy=False),)
