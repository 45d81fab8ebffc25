"""CPU twin of `npmamba.ops.embedding`: rows are gathered by NumPy, gradients summed by a Numba loop.

The backward pass sorts the tokens by their number, stably, so that the tokens of one row of the table stand together,
in the order of the text; each row then has one owner and one order of summation, whatever the number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.lines import lines
from npmamba.cpu.runtime import Int, Read, ReadInt, Write, inner, kernel, launch, scratch
from npmamba.cpu.simd import load, store, width
from npmamba.shapes import compute_dtype

BLOCK_VECTORS = 16
"""Vectors of channels per task."""
TOKENS = 64
"""Tokens whose gradients are summed in the dtype of the row; these sums are added in float64."""


@inner
def _add_into(target, row, d0, d1, source, k, offset):
    """target[row, d0:d1] += source[k], where `source` begins at channel `offset`."""
    for d in range(d0, d1, width(target)):
        x = load(target, (row, d), d1 - d) + load(source, (k, d - offset), d1 - d)
        store(target, (row, d), x, d1 - d)


@kernel
def _backward(
    start: Int,
    stop: Int,
    dout: Read[2],
    tokens: ReadInt[1],
    ids: ReadInt[1],
    bounds: ReadInt[1],
    dweight: Write[2],
):
    """Equation: dweight[id] = sum of dout over the tokens with that id.
    Threads: a task is one id that occurs and one block of channels.
    Owns: these cells of dweight, which are zero before.
    Saved: nothing; `tokens` are sorted by id, those of ids[k] stand from bounds[k] on.
    """
    w, dim = width(dout), dout.shape[1]
    block = BLOCK_VECTORS * w
    blocks = (dim + block - 1) // block
    sums, long = scratch((1, block), dout), np.empty(block, np.float64)
    for task in range(start, stop):
        k, d0 = task // blocks, task % blocks * block
        d1 = min(d0 + block, dim)
        first, end = bounds[k], bounds[k + 1]
        if end - first <= TOKENS:
            for t in range(first, end):
                _add_into(dweight, ids[k], d0, d1, dout, tokens[t], 0)
        else:
            long[:] = 0
            for t0 in range(first, end, TOKENS):
                sums[:] = 0
                for t in range(t0, min(t0 + TOKENS, end)):
                    _add_into(sums, 0, 0, d1 - d0, dout, tokens[t], -d0)
                long += sums[0]
            for d in range(d0, d1):
                dweight[ids[k], d] = long[d - d0]


class Saved(NamedTuple):
    """What the backward pass needs."""

    input_ids: np.ndarray
    vocab_size: int


def forward(weight: np.ndarray, input_ids: np.ndarray, *, save: bool) -> tuple[Any, Saved | None]:
    """Return the rows of `weight` and what `backward` needs (None unless `save`). Arguments have been checked."""
    out = weight.take(input_ids, axis=0).astype(weight.dtype.newbyteorder("="), copy=False)
    return out, Saved(input_ids, weight.shape[0]) if save else None


def backward(dout: np.ndarray, saved: Saved) -> tuple[np.ndarray]:
    """Return the gradient of the table, in the dtype of `dout`."""
    dtype, d_model = compute_dtype(dout.dtype), dout.shape[-1]
    tokens, ids, bounds = _sort(saved.input_ids)
    rows = lines(dout, dtype).reshape(tokens.size, d_model)
    dweight = np.zeros((saved.vocab_size, d_model), dtype)
    tasks = ids.size * math.ceil(d_model / (BLOCK_VECTORS * width(dweight)))
    launch(_backward, dtype, tasks, rows, tokens, ids, bounds, dweight, work=dout.size)
    return (dweight.astype(dout.dtype.newbyteorder("="), copy=False),)


def _sort(input_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens sorted by id, the ids that occur, and where each of these begins (and the end)."""
    flat = input_ids.astype(np.int64).reshape(-1)
    tokens = np.argsort(flat, kind="stable")
    ids, first = np.unique(flat[tokens], return_index=True)
    return tokens, ids, np.append(first, flat.size)
