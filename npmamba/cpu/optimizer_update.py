"""AdamW's update and the sum of squares, each in one pass over the numbers.

In NumPy an update is fourteen operations over blocks; here every number is read and written once. The gradient may
be scaled on the way, which makes clipping by the global norm free. Blocks of `BLOCK` numbers are fixed, so the bits of
a result do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from npmamba.cpu.layout import native
from npmamba.cpu.runtime import Int, Read, Real, Write, WriteDouble, empty, kernel, launch, scratch
from npmamba.cpu.simd import load, store, width
from npmamba.scalar import adamw_step, cast, running_mean
from npmamba.shapes import compute_dtype

BLOCK = 16384
"""Numbers per task."""
SUMS = 1024
"""Sums of squares that run side by side in float64; divides BLOCK."""


@kernel
def _adamw(
    start: Int,
    stop: Int,
    param: Read[1],
    grad: Read[1],
    m: Read[1],
    v: Read[1],
    new_param: Write[1],
    new_m: Write[1],
    new_v: Write[1],
    grad_scale: Real,
    beta1: Real,
    beta2: Real,
    rest1: Real,
    rest2: Real,
    decay: Real,
    rate: Real,
    root: Real,
    eps: Real,
):
    """Equation: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p = decay p - rate m / (sqrt(v) / root + eps).
    Threads: a task is a block of BLOCK numbers.
    Owns: its numbers of new_param, new_m and new_v.
    """
    w = width(param)
    for block in range(start, stop):
        end = min((block + 1) * BLOCK, param.shape[0])
        for i in range(block * BLOCK, end, w):
            count = end - i
            g = load(grad, (i,), count)
            g = g * cast(grad_scale, g)
            mean = running_mean(load(m, (i,), count), g, beta1, rest1)
            square = running_mean(load(v, (i,), count), g * g, beta2, rest2)
            store(new_m, (i,), mean, count)
            store(new_v, (i,), square, count)
            p = adamw_step(load(param, (i,), count), mean, square, decay, rate, root, eps)
            store(new_param, (i,), p, count)


@kernel
def _sum_of_squares(start: Int, stop: Int, x: Read[1], parts: WriteDouble[1]):
    """Equation: sum x^2, in float64.
    Threads: a task is a block of BLOCK numbers.
    Owns: its part of the sum; the caller adds the parts.
    """
    w = width(x)
    numbers, sums = scratch((SUMS,), x), np.empty(SUMS, np.float64)
    for block in range(start, stop):
        end = min((block + 1) * BLOCK, x.shape[0])
        sums[:] = 0
        for first in range(block * BLOCK, end, SUMS):
            for j in range(0, SUMS, w):
                store(numbers, (j,), load(x, (first + j,), end - first - j))
            for k in range(SUMS):  # vectorized by the compiler, for these two arrays are its own
                sums[k] += np.float64(numbers[k]) * np.float64(numbers[k])
        parts[block] = sums.sum()


def _flat(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(native(x, dtype)).reshape(-1)


def adamw_update(
    params: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    m: Sequence[np.ndarray],
    v: Sequence[np.ndarray],
    decays: Sequence[bool],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    donate: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Return the new params, m and v of a list of arrays: fresh and C-ordered; without `donate` the
    arguments are left as they are.

    With g = grad_scale grad and t = `step`, which counts this update and so starts at 1::

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Parameters
    ----------
    params, grads : lists of arrays
        Pairs of one shape, float16, bfloat16, float32 or float64.
    m, v : lists of arrays
        Running means, of the dtype that is computed in: float64 for a float64 parameter, otherwise float32.
    decays : list of bool
        Which arrays decay; for the others `weight_decay` counts as 0.
    step, lr, beta1, beta2, eps, weight_decay : numbers
        As in the equations.
    grad_scale : number or array ()
        As in the equations; `global_norm` gives the one that clips.
    donate : bool
        Whether the results may take the memory of params, m and v, which are then lost. They do where an array is
        C-ordered, writeable and of the dtype that is computed in.

    Examples
    --------
    >>> p, g, zeros = np.array([1.0, -1.0]), np.array([3.0, -0.2]), np.zeros(2)
    >>> options = {"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    >>> params, m, v = adamw_update([p], [g], [zeros], [zeros], [True], step=1, **options)
    >>> params[0].round(6)
    array([ 0.5, -0.5])
    """
    means = (float(grad_scale), beta1, beta2, 1 - beta1, 1 - beta2)
    rates = (lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps)
    columns: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = ([], [], [])
    for decayed, *arrays in zip(decays, params, grads, m, v, strict=True):
        decay = 1 - lr * weight_decay if decayed else 1.0
        for column, new in zip(columns, _update(arrays, (*means, decay, *rates), donate), strict=True):
            column.append(new)
    return columns


def _update(arrays: list[np.ndarray], numbers: tuple[float, ...], donate: bool) -> tuple[np.ndarray, ...]:
    """Return the new param, m and v of one param, grad, m and v."""
    param, size = arrays[0], arrays[0].size
    dtype = compute_dtype(param.dtype)
    flat = [_flat(x, dtype) for x in arrays]
    given = [flat[0], *flat[2:]]
    new = [x if donate and x.flags.writeable else empty((size,), dtype) for x in given]
    launch(_adamw, dtype, -(-size // BLOCK), *flat, *new, *map(float, numbers), work=size)
    p, m, v = (x.reshape(param.shape) for x in new)
    return p.astype(param.dtype.newbyteorder("="), copy=False), m, v


def global_norm(arrays: Sequence[np.ndarray], max_norm: float = math.inf) -> tuple[float, float]:
    """Return the Euclidean norm of all entries of all arrays, and the factor that brings it down to `max_norm`.

    Squares are summed in float64 whatever the dtype. The factor is 1 for a norm that is small enough or not finite.

    >>> global_norm([np.array([3.0]), np.array([[4.0]])], max_norm=1.0)
    (5.0, 0.2)
    """
    norm = math.sqrt(math.fsum(_sum_of_squares_of(x) for x in arrays))
    return norm, max_norm / norm if max_norm < norm < math.inf else 1.0


def _sum_of_squares_of(x: np.ndarray) -> float:
    dtype = compute_dtype(x.dtype)
    flat = _flat(x, dtype)
    parts = empty((-(-flat.size // BLOCK),), np.float64)
    launch(_sum_of_squares, dtype, parts.size, flat, parts, work=flat.size)
    return math.fsum(parts)
