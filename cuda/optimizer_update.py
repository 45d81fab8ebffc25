"""CUDA twin of `npmamba.cpu.optimizer_update`: a whole list of arrays in one launch, and a norm nobody waits for.

What follows from sizes and dtypes (which block has which chunk, where each result begins) is made once and remembered.
A call then reads the arrays' addresses, one table for all, and sends it to the device: gradients lie elsewhere at every
step. New parameters and means are slices of one allocation each, or the old ones' memory.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import address, empty, library
from npmamba.cuda.optimizer_kernels import ADAMW, CHUNK, NORM, PLACE, SQUARES
from npmamba.shapes import compute_dtype

UNIT = 64
"""Slices begin at multiples of so many numbers: of 128 bytes, a line of the cache, or more."""


# --- what is made once for a list of sizes and dtypes ---


class _Group(NamedTuple):
    """The arrays of one dtype: which these are, the table of places, and where results begin among `total` numbers."""

    dtype: Any
    members: list[int]
    places: Any
    starts: np.ndarray
    total: int


@functools.lru_cache(maxsize=64)
def _groups(
    xp: Any, device: int, dtypes: tuple[Any, ...], sizes: tuple[int, ...], decays: tuple[bool, ...]
) -> list[_Group]:
    """Return the groups of arrays of these dtypes and sizes; their tables of places lie on the device."""
    found: dict[Any, list[int]] = {}
    for i, dtype in enumerate(dtypes):
        found.setdefault(dtype.newbyteorder("="), []).append(i)
    return [
        _Group(dtype, members, *_places(xp, [sizes[i] for i in members], [decays[i] for i in members]))
        for dtype, members in found.items()
    ]


def _places(xp: Any, sizes: list[int], decays: list[bool]) -> tuple[Any, np.ndarray, int]:
    """Divide arrays into chunks: a line for each, and where each array's result begins."""
    lines, starts, total = [np.empty((0, PLACE), np.int64)], [], 0
    for at, (size, decayed) in enumerate(zip(sizes, decays, strict=True)):
        first = np.arange(0, size, CHUNK, dtype=np.int64)
        columns = np.full_like(first, at), first, np.minimum(size - first, CHUNK), np.full_like(first, int(decayed))
        lines.append(np.stack(columns, axis=1))
        starts.append(total)
        total += -(-size // UNIT) * UNIT
    return xp.asarray(np.concatenate(lines)), np.array(starts, np.int64), total


def _groups_of(arrays: Sequence[Any], dtypes: Sequence[Any], decays: Sequence[bool]) -> list[_Group]:
    device = 0 if isinstance(arrays[0], np.ndarray) else arrays[0].data.device_id
    return _groups(library(arrays[0]), device, tuple(dtypes), tuple([x.size for x in arrays]), tuple(decays))


# --- what is made at every call ---


def _chosen(column: Sequence[Any], members: list[int]) -> Sequence[Any]:
    return column if len(members) == len(column) else [column[i] for i in members]


def _ready(column: Sequence[Any], members: list[int], dtype: Any, addresses: np.ndarray) -> list[Any]:
    """Return the members of a column in `dtype`, C-ordered and aligned: themselves if they are so. Fill `addresses`.

    A call costs what this does for each array, so it asks for as little as it can.
    """
    arrays = _chosen(column, members)
    if {x.dtype for x in arrays} != {dtype}:
        arrays = [x.astype(dtype, copy=False) for x in arrays]
    arrays = list(map(library(arrays[0]).ascontiguousarray, arrays))
    addresses[:] = _addresses(arrays)
    if (addresses & 15).any():
        arrays = [x.copy() if at & 15 else x for x, at in zip(arrays, addresses.tolist(), strict=True)]
        addresses[:] = _addresses(arrays)
    return arrays


def _addresses(arrays: list[Any]) -> list[int]:
    if isinstance(arrays[0], np.ndarray):
        return [x.ctypes.data for x in arrays]
    return [x.data.ptr for x in arrays]


def _slices(flat: Any, starts: list[int], shapes: list[tuple[int, ...]]) -> list[Any]:
    """Return arrays of these shapes that begin so many numbers into `flat`; thrice as quick as indexing it."""
    size, dtype, array = flat.itemsize, flat.dtype, library(flat).ndarray
    if isinstance(flat, np.ndarray):
        return [array(shape, dtype, flat, start * size) for start, shape in zip(starts, shapes, strict=True)]
    memory = flat.data
    return [array(shape, dtype, memory + start * size) for start, shape in zip(starts, shapes, strict=True)]


# --- the twin's functions ---


def adamw_update(
    params: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    decays: Sequence[bool],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Any = 1.0,
    donate: bool = False,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the new params, m and v of a list of arrays: slices of one allocation for each dtype.

    One launch for each dtype; nobody waits, and a `grad_scale` in the device's memory is read there. With `donate` the
    results take the arguments' memory, where they are C-ordered arrays of the dtype that is computed in.
    """
    # A gradient of another dtype than its parameter's is not rounded to it: both are widened.
    dtypes, others = [p.dtype for p in params], [g.dtype for g in grads]
    kinds = dtypes
    if dtypes != others:
        pairs = zip(dtypes, others, strict=True)
        kinds = [p if p == g else compute_dtype(p) for p, g in pairs]
    decay, rate = 1 - lr * weight_decay, lr / (1 - beta1**step)
    numbers = (beta1, beta2, 1 - beta1, 1 - beta2, decay, 1.0, rate, math.sqrt(1 - beta2**step), eps)
    new: Any = tuple([None] * len(params) for _ in range(3))
    groups = _groups_of(params, kinds, decays)
    for group in groups:
        results = _update(group, (params, grads, m, v), grad_scale, numbers, donate)
        if len(groups) == 1:
            new = results
            break
        for column, arrays in zip(new, results, strict=True):
            for i, x in zip(group.members, arrays, strict=True):
                column[i] = x
    if kinds is not dtypes:
        new[0][:] = [x.astype(p.newbyteorder("="), copy=False) for x, p in zip(new[0], dtypes, strict=True)]
    return new


def _update(
    group: _Group, columns: tuple[Sequence[Any], ...], grad_scale: Any, numbers: tuple[float, ...], donate: bool
) -> tuple[list[Any], ...]:
    """Return the new params, m and v of the arrays of one dtype."""
    dtype, members, places, starts, total = group
    wide, params = compute_dtype(dtype), columns[0]
    kinds = (dtype, dtype, wide, wide)
    table = np.empty((7, len(members)), np.int64)
    ready = [_ready(column, members, kind, row) for column, kind, row in zip(columns, kinds, table, strict=False)]
    if donate:
        results = tuple([_given(columns[k], members, ready[k]) for k in (0, 2, 3)])
        table[4:] = table[[0, 2, 3]]
    else:
        shapes = [params[i].shape for i in members]
        flats = [empty(params[0], (total,), kind) for kind in (dtype, wide, wide)]
        results = tuple([_slices(flat, starts.tolist(), shapes) for flat in flats])
        for row, flat in zip(table[4:], flats, strict=True):
            row[:] = starts * flat.itemsize + address(flat)
    like, clipped = ready[0][0], type(grad_scale) is type(params[0])
    factor, scale = (grad_scale.astype(np.float64, copy=False), 1.0) if clipped else (None, float(grad_scale))
    tables = places, library(like).asarray(table), len(members)
    arguments = (*tables, like, ready[2][0], factor, int(clipped), scale, *numbers)
    ADAMW.launch((len(places),), dtype, arguments)
    return results


def _given(column: Sequence[Any], members: list[int], ready: list[Any]) -> list[Any]:
    """Return the arrays that are ready in the shapes in which they were given: NumPy makes (1,) of ()."""
    given = _chosen(column, members)
    if all(map(operator.is_, given, ready)):
        return ready
    return [x if x is old else x.reshape(old.shape) for x, old in zip(ready, given, strict=True)]


def global_norm(arrays: Sequence[Any], max_norm: float = math.inf) -> tuple[Any, Any]:
    """Return the norm of all entries of all arrays, and the factor that brings it down to `max_norm`.

    Both are float64 arrays () in the device's memory, for which nobody has waited.
    """
    if not arrays:
        return 0.0, 1.0
    groups = _groups_of(arrays, [x.dtype for x in arrays], (False,) * len(arrays))
    parts, done = empty(arrays[0], (sum(len(group.places) for group in groups),), np.float64), 0
    for dtype, members, places, _, _ in groups:
        addresses = np.empty(len(members), np.int64)
        ready = _ready(arrays, members, dtype, addresses)
        SQUARES.launch((len(places),), dtype, (places, library(parts).asarray(addresses), ready[0], parts[done:]))
        done += len(places)
    found = empty(arrays[0], (2,), np.float64)
    NORM.launch((1,), found.dtype, (parts, done, max_norm, found))
    return found[:1].reshape(()), found[1:].reshape(())
