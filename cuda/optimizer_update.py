"""CUDA twin of `npmamba.cpu.optimizer_update`: a whole list of arrays in one launch, and a norm nobody waits for.

The arrays lie anywhere in the device's memory. The host writes their addresses into a table; a second table, made once
for a list of sizes, tells each block its array and its `CHUNK` of it. New parameters and means are slices of one
allocation each. The clipping factor is a number in the device's memory that the update reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import address, empty, library
from npmamba.cuda.device import (
    Data,
    Double,
    Long,
    Real,
    Size,
    Stride,
    Wide,
    cuda,
    double,
    follow,
    load,
    load4,
    shift,
    store,
    store4,
)
from npmamba.cuda.launch import Kernel
from npmamba.scalar import adamw_step, cast, divide, running_mean, sqrt
from npmamba.shapes import compute_dtype

uint32, int64, float64 = np.uint32, np.int64, np.float64
DOUBLE, INFINITY = np.dtype(np.float64), math.inf
THREADS = 256
CHUNK = 16 * THREADS
"""Numbers of a block."""
SUMMERS = 1024
"""Threads that add the blocks' sums."""
UNIT = 64
"""Slices begin at multiples of so many numbers: of 128 bytes, a line of the cache, or more."""
PLACE = 5
"""Numbers in a line of the table of places: array, first number, where the result begins, count, whether it decays."""


# --- kernels ---


def _place(places):
    """Return this block's array, first number, count, first number of the result, and whether it decays."""
    line = shift(places, int64(cuda.blockIdx.x) * int64(PLACE))
    count, decays = uint32(load(line, uint32(3))), load(line, uint32(4)) != int64(0)
    return load(line, uint32(0)), load(line, uint32(1)), count, load(line, uint32(2)), decays


def _chunk(like, addresses, at, first, count):
    """Return a pointer like `like` to the block's chunk of the array whose address stands at `at`."""
    return shift(follow(like, load(shift(addresses, at), uint32(0)), first + int64(count)), first)


def _update_one(p, g, m, v, factor, beta1, beta2, rest1, rest2, decay, rate, root, eps):
    """Return the new parameter and means of one number."""
    g = g * factor
    m, v = running_mean(m, g, beta1, rest1), running_mean(v, g * g, beta2, rest2)
    return adamw_step(p, m, v, decay, rate, root, eps), m, v


def _adamw(real):
    def optimizer_update_adamw(
        places: Long,
        addresses: Long,
        arrays: Stride,
        new_param: Data,
        new_m: Wide,
        new_v: Wide,
        grad_scale: Wide,
        beta1: Real,
        beta2: Real,
        rest1: Real,
        rest2: Real,
        decay: Real,
        one: Real,
        rate: Real,
        root: Real,
        eps: Real,
    ):
        """Equation: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p = decay p - rate m / (sqrt(v) / root + eps).
        Threads: a block is a chunk of one array, a thread four neighbouring numbers of each round.
        Owns: its chunk of the new parameter and means.
        Saved: nothing.
        """
        tid = uint32(cuda.threadIdx.x)
        at, first, count, result, decays = _place(places)
        p = _chunk(new_param, addresses, at, first, count)
        g = _chunk(new_param, addresses, at + arrays, first, count)
        at += arrays + arrays
        m = _chunk(new_m, addresses, at, first, count)
        v = _chunk(new_v, addresses, at + arrays, first, count)
        to_p, to_m, to_v = shift(new_param, result), shift(new_m, result), shift(new_v, result)
        c, d = load(grad_scale, uint32(0)), decay if decays else one
        i = uint32(4) * tid
        while uint32(i + uint32(4)) <= count:
            p0, p1, p2, p3 = load4(p, i)
            g0, g1, g2, g3 = load4(g, i)
            m0, m1, m2, m3 = load4(m, i)
            v0, v1, v2, v3 = load4(v, i)
            p0, m0, v0 = _update_one(p0, g0, m0, v0, c, beta1, beta2, rest1, rest2, d, rate, root, eps)
            p1, m1, v1 = _update_one(p1, g1, m1, v1, c, beta1, beta2, rest1, rest2, d, rate, root, eps)
            p2, m2, v2 = _update_one(p2, g2, m2, v2, c, beta1, beta2, rest1, rest2, d, rate, root, eps)
            p3, m3, v3 = _update_one(p3, g3, m3, v3, c, beta1, beta2, rest1, rest2, d, rate, root, eps)
            store4(to_p, i, (p0, p1, p2, p3))
            store4(to_m, i, (m0, m1, m2, m3))
            store4(to_v, i, (v0, v1, v2, v3))
            i = uint32(i + uint32(4 * THREADS))
        i = uint32(count - count % uint32(4) + tid)
        if i < count:
            p0, g0, m0, v0 = load(p, i), load(g, i), load(m, i), load(v, i)
            p0, m0, v0 = _update_one(p0, g0, m0, v0, c, beta1, beta2, rest1, rest2, d, rate, root, eps)
            store(to_p, i, p0)
            store(to_m, i, m0)
            store(to_v, i, v0)

    return optimizer_update_adamw


def _make_sum_of_block(threads):
    def sum_of_block(mine, shared, tid):
        """Return the sum of all threads' numbers, always added in the same order."""
        shared[tid] = mine
        cuda.syncthreads()
        half = uint32(threads // 2)
        while half > uint32(0):
            if tid < half:
                shared[tid] += shared[uint32(tid + half)]
            cuda.syncthreads()
            half = uint32(half >> uint32(1))
        return shared[uint32(0)]

    return sum_of_block


def _squares(real):
    sum_of_block = _make_sum_of_block(THREADS)

    def squares(x, i):
        x0, x1, x2, x3 = load4(x, i)
        y0, y1, y2, y3 = double(x0), double(x1), double(x2), double(x3)
        return y0 * y0 + y1 * y1 + (y2 * y2 + y3 * y3)

    def optimizer_update_squares(places: Long, addresses: Long, like: Data, parts: Double):
        """Equation: sum x^2, in float64.
        Threads: a block is a chunk of one array, a thread four neighbouring numbers of each round.
        Owns: its part of the sum; `optimizer_update_norm` adds the parts.
        Saved: nothing.
        """
        shared = cuda.shared.array(THREADS, DOUBLE)
        tid = uint32(cuda.threadIdx.x)
        at, first, count, _, _ = _place(places)
        x = _chunk(like, addresses, at, first, count)
        mine = float64(0)
        i = uint32(4) * tid
        if count == uint32(CHUNK):  # as many loads as possible before the first sum
            for _ in range(CHUNK // (4 * THREADS)):
                mine += squares(x, i)
                i = uint32(i + uint32(4 * THREADS))
        while uint32(i + uint32(4)) <= count:
            mine += squares(x, i)
            i = uint32(i + uint32(4 * THREADS))
        i = uint32(count - count % uint32(4) + tid)
        if i < count:
            y0 = double(load(x, i))
            mine += y0 * y0
        total = sum_of_block(mine, shared, tid)
        if tid == uint32(0):
            store(shift(parts, int64(cuda.blockIdx.x)), uint32(0), total)

    return optimizer_update_squares


def _norm(real):
    sum_of_block = _make_sum_of_block(SUMMERS)

    def optimizer_update_norm(parts: Double, count: Size, max_norm: Real, found: Double):
        """Equation: norm = sqrt(sum of parts), factor = max_norm / norm where max_norm < norm < infinity, else 1.
        Threads: one block; a thread adds every `SUMMERS`-th part, and a tree their sums.
        Owns: found, which is (norm, factor).
        Saved: nothing.
        """
        shared = cuda.shared.array(SUMMERS, DOUBLE)
        tid = uint32(cuda.threadIdx.x)
        mine = cast(0, max_norm)
        i = tid
        while i < count:
            mine += load(parts, i)
            i = uint32(i + uint32(SUMMERS))
        norm = sqrt(sum_of_block(mine, shared, tid))
        if tid == uint32(0):
            factor = cast(1, norm)
            if norm > max_norm and norm < cast(INFINITY, norm):
                factor = divide(max_norm, norm)
            store(found, uint32(0), norm)
            store(found, uint32(1), factor)

    return optimizer_update_norm


ADAMW = Kernel(_adamw, threads=THREADS, shipped={})
SQUARES = Kernel(_squares, threads=THREADS, shipped={})
NORM = Kernel(_norm, threads=SUMMERS, shipped={}, dtypes=("float64",))


# --- from lists of arrays to tables ---


class _Places(NamedTuple):
    """Which block has which chunk: the table of places, and where each array's result begins among `total` numbers."""

    table: Any
    starts: list[int]
    total: int


@functools.lru_cache(maxsize=64)
def _make_places(xp: Any, device: int, sizes: tuple[int, ...], decays: tuple[bool, ...]) -> _Places:
    """Divide arrays of these sizes into chunks; the table lies on the device, so it is made there once."""
    lines, starts, total = [np.empty((0, PLACE), np.int64)], [], 0
    for at, (size, decayed) in enumerate(zip(sizes, decays, strict=True)):
        first = np.arange(0, size, CHUNK, dtype=np.int64)
        columns = (np.full_like(first, at), first, first + total, np.minimum(size - first, CHUNK))
        lines.append(np.stack([*columns, np.full_like(first, int(decayed))], axis=1))
        starts.append(total)
        total += -(-size // UNIT) * UNIT
    return _Places(xp.asarray(np.concatenate(lines)), starts, total)


def _places(arrays: Sequence[Any], decays: Sequence[bool]) -> _Places:
    device = 0 if isinstance(arrays[0], np.ndarray) else arrays[0].data.device_id
    return _make_places(library(arrays[0]), device, tuple(x.size for x in arrays), tuple(map(bool, decays)))


def _ready(x: Any, dtype: Any) -> Any:
    """Return `x` in `dtype`, C-ordered and aligned: itself where it is so already."""
    x = library(x).ascontiguousarray(x, dtype)
    return x if address(x) % 16 == 0 else x.copy()


def _addresses(*columns: Sequence[Any]) -> Any:
    """Return the addresses of arrays, a row for each column; they are on their way to the device."""
    table = np.array([[address(x) for x in column] for column in columns], np.int64)
    return library(columns[0][0]).asarray(table)


def _slice(flat: Any, start: int, shape: tuple[int, ...]) -> Any:
    """Return numbers of `flat` as an array; its own class is three times as quick as an index."""
    offset = start * flat.itemsize
    if isinstance(flat, np.ndarray):
        return np.ndarray(shape, flat.dtype, flat, offset)
    return library(flat).ndarray(shape, flat.dtype, flat.data + offset)


def _groups(dtypes: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the positions of each dtype."""
    groups: dict[Any, list[int]] = {}
    for i, dtype in enumerate(dtypes):
        groups.setdefault(dtype.newbyteorder("="), []).append(i)
    return groups


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
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the new params, m and v of a list of arrays: slices of one allocation for each dtype.

    One launch for each dtype; nobody waits, and a `grad_scale` in the device's memory is read there.
    """
    new: tuple[list[Any], list[Any], list[Any]] = tuple([None] * len(params) for _ in range(3))
    means, decay = (beta1, beta2, 1 - beta1, 1 - beta2), (1 - lr * weight_decay, 1.0)
    rates = (lr / (1 - beta1**step), math.sqrt(1 - beta2**step), eps)
    # A gradient of another dtype than its parameter's is not rounded to it: both are widened.
    same = zip(params, grads, strict=True)
    kinds = [p.dtype if p.dtype == g.dtype else compute_dtype(p.dtype) for p, g in same]
    for dtype, members in _groups(kinds).items():
        columns = [[column[i] for i in members] for column in (params, grads, m, v)]
        for i, *results in zip(
            members,
            *_update(dtype, *columns, [decays[i] for i in members], grad_scale, (*means, *decay, *rates)),
            strict=True,
        ):
            for column, x in zip(new, results, strict=True):
                column[i] = x
    for i, p in enumerate(params):
        new[0][i] = new[0][i].astype(p.dtype.newbyteorder("="), copy=False)
    return new


def _update(
    dtype: Any, params: Any, grads: Any, m: Any, v: Any, decays: Any, grad_scale: Any, numbers: tuple[float, ...]
) -> list[list[Any]]:  # fmt: skip
    """Return the new params, m and v of arrays of one dtype."""
    wide, like = compute_dtype(dtype), params[0]
    kinds = (dtype, dtype, wide, wide)
    columns = [
        [_ready(x, kind) for x in column] for column, kind in zip((params, grads, m, v), kinds, strict=True)
    ]
    places, shapes = _places(params, decays), [p.shape for p in params]
    flats = [empty(like, (places.total,), kind) for kind in (dtype, wide, wide)]
    if hasattr(grad_scale, "dtype"):
        scale = grad_scale.astype(wide, copy=False)
    else:
        scale = library(like).full((), grad_scale, wide)
    tables = (places.table, _addresses(*columns), len(params))
    ADAMW.launch((len(places.table),), dtype, (*tables, *flats, scale, *numbers))
    return [
        [_slice(flat, start, shape) for start, shape in zip(places.starts, shapes, strict=True)] for flat in flats
    ]


def global_norm(arrays: Sequence[Any], max_norm: float = math.inf) -> tuple[Any, Any]:
    """Return the norm of all entries of all arrays, and the factor that brings it down to `max_norm`.

    Both are float64 arrays () in the device's memory, for which nobody has waited.
    """
    if not arrays:
        return 0.0, 1.0
    lists = {
        dtype: [_ready(arrays[i], dtype) for i in members]
        for dtype, members in _groups([x.dtype for x in arrays]).items()
    }
    tables = {dtype: _places(members, [False] * len(members)).table for dtype, members in lists.items()}
    parts, done = empty(arrays[0], (sum(map(len, tables.values())),), np.float64), 0
    for dtype, members in lists.items():
        places = tables[dtype]
        SQUARES.launch((len(places),), dtype, (places, _addresses(members), members[0], parts[done:]))
        done += len(places)
    found = empty(arrays[0], (2,), np.float64)
    NORM.launch((1,), found.dtype, (parts, done, max_norm, found))
    return found[:1].reshape(()), found[1:].reshape(())
