"""CPU twin of `npmamba.ops.rms_norm`: Numba loops, forward and backward.

A row is read twice: once for its mean square (or, backward, for one scalar product), and from the first-level cache
for the result. The weight's gradient is summed over blocks of `ROWS` rows, then over blocks in float64, so its bits
depend on no number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.layout import native
from npmamba.cpu.lines import lines
from npmamba.cpu.runtime import Flag, Int, Read, Real, Write, empty, inner, kernel, launch
from npmamba.cpu.simd import load, store, total, width
from npmamba.scalar import cast, fma, normalized, normalized_derivative
from npmamba.shapes import compute_dtype

ROWS = 64
"""Rows per task of the backward pass, whose shares of dweight are summed together."""


# --- forward ---


@inner
def _load_sum(x, residual, fused, place, count):
    """s = x, or x + residual"""
    s = load(x, place, count)
    return s + load(residual, place, count) if fused else s


@inner
def _sum_of_squares(x, residual, fused, o, i):
    """sum s^2 over a row, in two vectors of partial sums: the additions wait for each other half as often."""
    w, dim = width(x), x.shape[2]
    even = cast(0, load(x, (o, i, 0), 0))
    odd = even
    for j in range(0, dim, 2 * w):
        s = _load_sum(x, residual, fused, (o, i, j), dim - j)
        even = fma(s, s, even)
        s = _load_sum(x, residual, fused, (o, i, j + w), dim - j - w)
        odd = fma(s, s, odd)
    return total(even + odd)


@kernel
def _forward(
    start: Int,
    stop: Int,
    x: Read[3],
    residual: Read[3],
    weight: Read[1],
    y: Write[3],
    sums: Write[3],
    rstd: Write[1],
    eps: Real,
    fused: Flag,
):
    """Equation: y = s r weight, with s = x + residual and r = 1 / sqrt(mean(s^2) + eps).
    Threads: a task is a row.
    Owns: its row of y, of the sum s (with a residual) and of r.
    Saved: r of each row.
    """
    w, dim = width(x), x.shape[2]
    for row in range(start, stop):
        o, i = row // x.shape[1], row % x.shape[1]
        mean = np.float64(_sum_of_squares(x, residual, fused, o, i)) / dim
        rstd[row] = 1.0 / np.sqrt(mean + eps)
        for j in range(0, dim, w):
            s = _load_sum(x, residual, fused, (o, i, j), dim - j)
            if fused:
                store(sums, (o, i, j), s, dim - j)
            store(y, (o, i, j), normalized(s, cast(rstd[row], s), load(weight, (j,), dim - j)), dim - j)


# --- backward ---


@inner
def _scalar_product(dy, weight, s, o, i):
    """sum q s over a row, with q = dy weight"""
    w, dim = width(s), s.shape[2]
    even = cast(0, load(s, (o, i, 0), 0))
    odd = even
    for j in range(0, dim, 2 * w):
        q = load(dy, (o, i, j), dim - j) * load(weight, (j,), dim - j)
        even = fma(q, load(s, (o, i, j), dim - j), even)
        q = load(dy, (o, i, j + w), dim - j - w) * load(weight, (j + w,), dim - j - w)
        odd = fma(q, load(s, (o, i, j + w), dim - j - w), odd)
    return total(even + odd)


@kernel
def _backward(
    start: Int,
    stop: Int,
    dy: Read[3],
    dsums: Read[3],
    s: Read[3],
    weight: Read[1],
    rstd: Read[1],
    dx: Write[3],
    dweight_parts: Write[2],
    fused: Flag,
):
    """Equation: ds = r (q - s_hat mean(q s_hat)) + dsum, with s_hat = s r, q = dy weight; dweight = sum dy s_hat.
    Threads: a task is a block of ROWS rows.
    Owns: its rows of dx and its part of dweight (summed over blocks by the caller).
    Saved: s and r.
    """
    w, dim = width(s), s.shape[2]
    for block in range(start, stop):
        dweight_parts[block] = 0
        for row in range(block * ROWS, min((block + 1) * ROWS, rstd.shape[0])):
            o, i = row // s.shape[1], row % s.shape[1]
            mean = np.float64(_scalar_product(dy, weight, s, o, i)) * rstd[row] / dim
            for j in range(0, dim, w):
                count = dim - j
                cotangent = load(dy, (o, i, j), count)
                r = cast(rstd[row], cotangent)
                s_hat = load(s, (o, i, j), count) * r
                q = cotangent * load(weight, (j,), count)
                ds = normalized_derivative(q, s_hat, cast(mean, r), r)
                if fused:
                    ds = ds + load(dsums, (o, i, j), count)
                store(dx, (o, i, j), ds, count)
                part = load(dweight_parts, (block, j), count)
                store(dweight_parts, (block, j), fma(cotangent, s_hat, part), count)


# --- from the caller's arrays to the kernels' and back ---


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, the sum that was normalized, and 1 / rms of each row."""

    x: np.ndarray
    weight: np.ndarray
    residual: np.ndarray | None
    s: np.ndarray
    rstd: np.ndarray


def _weight(weight: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(native(weight, dtype))


def _result(computed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return lines as an array of the shape and dtype of `x`."""
    return computed.reshape(x.shape).astype(x.dtype.newbyteorder("="), copy=False)


def forward(x: np.ndarray, weight: np.ndarray, residual: np.ndarray | None, *, eps: float, save: bool) -> Any:
    """Return (y, None or the sum x + residual, what `backward` needs or None). Arguments have been checked."""
    dtype, fused = compute_dtype(x.dtype), residual is not None
    nothing = np.empty((0, 0, 0), dtype)
    rows = lines(x, dtype)
    y = empty(rows.shape, dtype)
    sums = empty(rows.shape, dtype) if fused else nothing
    rstd = empty((rows.shape[0] * rows.shape[1],), dtype)
    arguments = (rows, nothing if residual is None else lines(residual, dtype), _weight(weight, dtype))
    launch(_forward, dtype, rstd.size, *arguments, y, sums, rstd, float(eps), fused, work=x.size)
    saved = Saved(x, weight, residual, sums if fused else rows, rstd) if save else None
    return _result(y, x), _result(sums, x) if fused else None, saved


def backward(dout: np.ndarray | None, dresidual: np.ndarray | None, saved: Saved) -> tuple[np.ndarray | None, ...]:
    """Return the gradients of x, weight and residual; the last is the first, or None without a residual."""
    x, weight, residual, s, rstd = saved
    dtype, fused = s.dtype, dresidual is not None
    dy = np.zeros(s.shape, dtype) if dout is None else lines(dout, dtype)
    dsums = lines(dresidual, dtype) if dresidual is not None else np.empty((0, 0, 0), dtype)
    dx = empty(s.shape, dtype)
    parts = empty((-(-rstd.size // ROWS), s.shape[2]), dtype)
    arguments = (dy, dsums, s, _weight(weight, dtype), rstd)
    launch(_backward, dtype, len(parts), *arguments, dx, parts, fused, work=x.size)
    dx = _result(dx, x)
    dweight = parts.sum(axis=0, dtype=np.float64).astype(weight.dtype.newbyteorder("="))
    return dx, dweight, None if residual is None else dx
