"""CUDA twin of `npmamba.ops.cross_entropy`: from the caller's arrays to the kernels' and back.

Nothing waits for the device: the number of rows that count is found and used there. Nor is the range of the labels
looked at beforehand: one that names no class makes the loss NaN, and the gradient of its row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda import cross_entropy_short as short
from npmamba.cuda.arrays import empty, library
from npmamba.cuda.cross_entropy_backward import BACKWARD, SPAN
from npmamba.cuda.cross_entropy_forward import FORWARD, MEAN
from npmamba.cuda.rows import inner_rows, lines, wide
from npmamba.shapes import compute_dtype

SHORT, MOST = short.LONGEST, short.MOST
"""Up to so many rows up to this length belong to a few threads each, longer ones to a block."""


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, largest logit and sum of exponentials of each row, and the count."""

    logits: Any
    labels: Any
    ignore_index: int
    tops: Any
    sums: Any
    count: Any


def forward(logits: Any, labels: Any, *, ignore_index: int, save: bool) -> tuple[Any, Saved | None]:
    """Return the mean loss and what `backward` needs (None unless `save`). All but the range of labels is checked."""
    vocab, dtype = logits.shape[-1], compute_dtype(logits.dtype)
    targets = library(labels).ascontiguousarray(labels.astype(np.int64, copy=False)).reshape(-1)
    rows = targets.size
    share, blocks, constants = 0, rows, short.forward_constants(vocab, logits.dtype)
    is_short = vocab <= SHORT and rows <= MOST
    if is_short:
        share, blocks = short.forward_share(rows, constants["p"])
    tops, sums = empty(logits, (rows,), dtype), empty(logits, (rows,), dtype)
    losses, counts = empty(logits, (blocks,), dtype), empty(logits, (blocks,), np.int64)
    mean, count = empty(logits, (), dtype), empty(logits, (), np.int64)
    x = lines(logits)
    arrays, aligned = (*x, targets, ignore_index, losses, counts, sums, tops), int(wide(x.array))
    if is_short:
        short.FORWARD.launch(
            (blocks,), logits.dtype, (*arrays, vocab, rows, inner_rows(x), aligned, share), **constants
        )
    else:
        FORWARD.launch((blocks,), logits.dtype, (*arrays, vocab, inner_rows(x), aligned))
    MEAN.launch((1,), dtype, (losses, counts, mean, count, blocks))
    return mean, Saved(logits, targets, ignore_index, tops, sums, count) if save else None


def backward(dout: Any, saved: Saved) -> tuple[Any]:
    """Return the gradient of the logits, C-ordered."""
    logits, labels, ignore_index, tops, sums, count = saved
    vocab, rows = logits.shape[-1], labels.size
    dlogits = empty(logits, logits.shape, logits.dtype)
    x = lines(logits)
    arrays, aligned = (*x, labels, ignore_index, tops, sums, dout, count, dlogits), int(wide(x.array))
    if vocab <= SHORT:
        p, blocks = short.backward_share(vocab, rows, logits.dtype)
        short.BACKWARD.launch((blocks,), logits.dtype, (*arrays, vocab, rows, inner_rows(x), aligned, p))
    else:
        BACKWARD.launch((rows, -(-vocab // SPAN)), logits.dtype, (*arrays, vocab, inner_rows(x), aligned))
    return (dlogits,)
