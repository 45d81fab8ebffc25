"""The CUDA kernels of `npmamba.cuda.optimizer_update`: a whole list of arrays in one launch.

The arrays lie anywhere in the device's memory. A table holds their addresses, a second one tells each block its array
and its `CHUNK` of it. The factor that clips a gradient is a number in the device's memory.
"""

from __future__ import annotations

import math

import numpy as np

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
from npmamba.scalar import adamw_step, cast, divide, running_mean, select, sqrt

uint32, int64, float64 = np.uint32, np.int64, np.float64
DOUBLE, INFINITY = np.dtype(np.float64), math.inf
THREADS = 256
CHUNK = 16 * THREADS
"""Numbers of a block."""
SUMMERS, AHEAD = 1024, 8
"""Threads that add the blocks' sums, and how many of those a thread reads at once."""
PLACE = 4
"""Numbers in a line of the table of places: array, first number, count, whether it decays."""


def _place(places):
    """Return this block's array, first number, count, and whether it decays."""
    line = shift(places, int64(cuda.blockIdx.x) * int64(PLACE))
    count, decays = uint32(load(line, uint32(2))), load(line, uint32(3)) != int64(0)
    return load(line, uint32(0)), load(line, uint32(1)), count, decays


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
        places: Long, addresses: Long, arrays: Stride, like: Data, wide: Wide, factor: Double, clipped: Size,
        grad_scale: Real, beta1: Real, beta2: Real, rest1: Real, rest2: Real,
        decay: Real, one: Real, rate: Real, root: Real, eps: Real,
    ):  # fmt: skip
        """Equation: m = b1 m + (1 - b1) c g, v = b2 v + (1 - b2) (c g)^2, p = decay p - rate m / (sqrt(v) / root + eps)
        with c = grad_scale, times the factor where the gradient is clipped.
        Threads: a block is a chunk of one array, a thread four neighbouring numbers of each round.
        Owns: its chunk of the new parameter and means, which may be the old ones' memory.
        Saved: nothing.
        """
        tid = uint32(cuda.threadIdx.x)
        at, first, count, decays = _place(places)
        p = _chunk(like, addresses, at, first, count)
        g = _chunk(like, addresses, at + arrays, first, count)
        m = _chunk(wide, addresses, at + int64(2) * arrays, first, count)
        v = _chunk(wide, addresses, at + int64(3) * arrays, first, count)
        to_p = _chunk(like, addresses, at + int64(4) * arrays, first, count)
        to_m = _chunk(wide, addresses, at + int64(5) * arrays, first, count)
        to_v = _chunk(wide, addresses, at + int64(6) * arrays, first, count)
        c, d = grad_scale, decay if decays else one
        if clipped:
            c *= cast(load(factor, uint32(0)), c)
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
        at, first, count, _ = _place(places)
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
        mine, i = cast(0, max_norm), tid
        while i < count:
            for k in range(AHEAD):
                j = uint32(i + uint32(k * SUMMERS))
                x = load(parts, select(j < count, j, uint32(0)))
                mine += select(j < count, x, cast(0, max_norm))
            i = uint32(i + uint32(AHEAD * SUMMERS))
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
