"""CUDA twin of `npmamba.ops.rms_norm`: from the caller's arrays to the kernels' and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from npmamba.cuda.arrays import empty, library, zeros
from npmamba.cuda.rms_norm_backward import BACKWARD, BLOCKS, COLUMN_SUMS, COLUMNS
from npmamba.cuda.rms_norm_backward import numbers_of as numbers_of_backward
from npmamba.cuda.rms_norm_forward import FORWARD, THREADS, numbers_of
from npmamba.cuda.rows import inner_rows, lines, team_of, wide
from npmamba.shapes import compute_dtype

CELLS = 96 * 1024
"""Bytes of shared memory in which a block of the backward pass adds up the weight's gradient, at most."""


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, the sum that was normalized, and 1 / rms of each row."""

    x: Any
    weight: Any
    residual: Any
    s: Any
    rstd: Any


def forward(x: Any, weight: Any, residual: Any, *, eps: float, save: bool) -> Any:
    """Return (y, None or the sum x + residual, what `backward` needs or None). Arguments have been checked."""
    n, rows, fused, real = x.shape[-1], math.prod(x.shape[:-1]), residual is not None, compute_dtype(x.dtype)
    y, rstd = empty(x, x.shape, x.dtype), empty(x, (rows,), real)
    sums = empty(x, x.shape, x.dtype) if fused else None
    weight = library(weight).ascontiguousarray(weight)
    a = lines(x)
    b = lines(residual) if fused else a
    p = team_of(n, THREADS, numbers_of(x.dtype))
    numbers = (float(eps), 1 / n, n, rows, inner_rows(a, b), p)
    arguments = (*a, *b, weight, y, sums, rstd, *numbers)
    blocks, aligned = -(-rows // (THREADS >> p)), wide(a.array, b.array, weight)
    FORWARD.launch((blocks,), x.dtype, arguments, wide=aligned, fused=fused)
    return y, sums, Saved(x, weight, residual, sums if fused else x, rstd) if save else None


def backward(dout: Any, dresidual: Any, saved: Saved) -> tuple[Any, ...]:
    """Return the gradients of x, weight and residual; the last is the first, or None without a residual."""
    x, weight, residual, s, rstd = saved
    n, rows, fused, real = x.shape[-1], rstd.size, dresidual is not None, rstd.dtype
    dx = empty(x, x.shape, x.dtype)
    a, b = lines(zeros(x, x.shape, x.dtype) if dout is None else dout), lines(s)
    c = lines(dresidual) if fused else b
    most = numbers_of_backward(real)
    whole, p = n <= THREADS * most, team_of(n, THREADS, most)
    cells = -(-n // (most << p)) * most * THREADS * real.itemsize
    kept = cells <= CELLS  # else a block adds up its part where it stands
    blocks = min(-(-rows // (THREADS >> p)), BLOCKS)
    parts = (empty if kept else zeros)(x, (blocks, n), real)
    numbers = (1 / n, n, rows, inner_rows(a, b, c), p, int(fused), int(kept))
    arguments = (*a, *b, *c, weight, rstd, dx, parts, *numbers)
    aligned = wide(a.array, b.array, c.array, weight)
    BACKWARD.launch((blocks,), x.dtype, arguments, shared=cells * kept, wide=aligned, whole=whole)
    return dx, _column_sums(parts), None if residual is None else dx


def _column_sums(parts: Any) -> Any:
    count, n = parts.shape
    if count == 0:
        return zeros(parts, (n,), parts.dtype)
    sums = empty(parts, (n,), parts.dtype)
    COLUMN_SUMS.launch((-(-n // COLUMNS),), parts.dtype, (parts, sums, n, count))
    return sums
