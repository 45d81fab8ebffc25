"""CUDA twin of `npmamba.ops.rms_norm`: from the caller's arrays to the kernels' and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import empty, library, zeros
from npmamba.cuda.rms_norm_backward import BACKWARD, BLOCKS, COLUMN_SUMS, COLUMNS
from npmamba.cuda.rms_norm_forward import FORWARD, THREADS, WARPS, numbers_of
from npmamba.cuda.rows import inner_rows, lines, team_of, wide
from npmamba.shapes import compute_dtype


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, the sum that was normalized, and 1 / rms of each row."""

    x: Any
    weight: Any
    residual: Any
    s: Any
    rstd: Any


def _division(n: int, rows: int, real: np.dtype) -> tuple[int, int]:
    """Return the power of a row's team, and how many blocks hold all rows."""
    power = team_of(n, THREADS, numbers_of(real))
    return power, -(-rows // (WARPS >> power))


def forward(x: Any, weight: Any, residual: Any, *, eps: float, save: bool) -> Any:
    """Return (y, None or the sum x + residual, what `backward` needs or None). Arguments have been checked."""
    n, rows, fused, real = x.shape[-1], math.prod(x.shape[:-1]), residual is not None, compute_dtype(x.dtype)
    y, rstd = empty(x, x.shape, x.dtype), empty(x, (rows,), real)
    sums = empty(x, x.shape, x.dtype) if fused else None
    weight = library(weight).ascontiguousarray(weight)
    a = lines(x)
    b = lines(residual) if fused else a
    power, blocks = _division(n, rows, real)
    numbers = (float(eps), 1 / n, n, rows, inner_rows(a, b), power, int(fused))
    arguments = (*a, *b, weight, y, sums, rstd, *numbers)
    FORWARD.launch((blocks,), x.dtype, arguments, wide=wide(a.array, b.array, weight))
    return y, sums, Saved(x, weight, residual, sums if fused else x, rstd) if save else None


def backward(dout: Any, dresidual: Any, saved: Saved) -> tuple[Any, ...]:
    """Return the gradients of x, weight and residual; the last is the first, or None without a residual."""
    x, weight, residual, s, rstd = saved
    n, rows, fused, real = x.shape[-1], rstd.size, dresidual is not None, rstd.dtype
    dx = empty(x, x.shape, x.dtype)
    a, b = lines(zeros(x, x.shape, x.dtype) if dout is None else dout), lines(s)
    c = lines(dresidual) if fused else b
    power, blocks = _division(n, rows, real)
    whole = n <= THREADS * numbers_of(real)  # else a block adds up its part where it stands
    parts = (empty if whole else zeros)(x, (min(blocks, BLOCKS), n), real)
    numbers = (1 / n, n, rows, inner_rows(a, b, c), power, int(fused))
    arguments = (*a, *b, *c, weight, rstd, dx, parts, *numbers)
    aligned = wide(a.array, b.array, c.array, weight)
    BACKWARD.launch(parts.shape[:1], x.dtype, arguments, wide=aligned, whole=whole)
    return dx, _column_sums(parts), None if residual is None else dx


def _column_sums(parts: Any) -> Any:
    count, n = parts.shape
    if count == 0:
        return zeros(parts, (n,), parts.dtype)
    sums = empty(parts, (n,), parts.dtype)
    COLUMN_SUMS.launch((-(-n // COLUMNS),), parts.dtype, (parts, sums, n, count))
    return sums
