"""The inner loops of the CPU selective scan, forward: a row of channels takes one step of time.

The states of the row and their rates stay in the first-level cache. A step is three loops over the row's vectors of
channels: `load_row` makes what all states share, `advance_row` steps them on, `store_row` gates and writes y.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cpu.runtime import inner, tight
from npmamba.cpu.simd import AVX512, any_lane, apart, load, pick, prefetch_near, store, width
from npmamba.scalar import (
    cast,
    decay_factor,
    exp2_product,
    exp2_product_small,
    magnitude,
    phi,
    readout,
    select,
    silu,
    softplus,
    state_step,
)

DELTA, INPUT, Y, ROW_SLOTS = range(4)
"""Slots of a vector of a row: delta, delta u, y."""

RATE, A_VALUE, B_FACTOR, C_FACTOR = range(4)
"""Coefficients of a state: A log2(e) always, the others where the rule needs them."""

CACHED = 256
"""States of a vector that the first-level cache holds, with their rates, beside everything else."""


@tight
def place(slot, v, w):
    """Index of a slot of vector `v` in a row."""
    return ((v * ROW_SLOTS + slot) * w,)


@tight
def larger(x, y):
    """The larger of two numbers, `x` if `y` is NaN"""
    return select(y > x, y, x)


@inner
def load_states(source, first, d, d1, vectors, kept):
    """Copy numbers (dstate, dim) of a row's channels, such as states or rates, to `kept` from index `first` on."""
    w, dstate = width(kept), source.shape[0]
    for v in range(vectors):
        for n in range(dstate):
            value = load(source, (n, d + v * w), d1 - d - v * w)
            store(kept, (first + (v * dstate + n) * w,), value)


@inner
def store_states(kept, target, d, d1, vectors):
    """Copy the states of a row's channels to (dstate, dim)."""
    w, dstate = width(kept), target.shape[0]
    for v in range(vectors):
        for n in range(dstate):
            store(target, (n, d + v * w), load(kept, ((v * dstate + n) * w,)), d1 - d - v * w)


@inner
def largest_rates(coefficients, dstate, vectors, largest):
    """Find the largest |rate| of each channel of a row."""
    w = width(coefficients)
    for v in range(vectors):
        most = cast(0, load(coefficients, (0,)))
        for n in range(dstate):
            most = larger(most, magnitude(load(coefficients, ((v * dstate + n) * w,))))
        store(largest, (v * w,), most)


@tight
def load_row(u, raw_delta, bias, D, b, t, d, d1, vectors, softplus_on, largest, row):
    """Fill a row with delta = softplus(raw + bias), delta u, and D u; tell whether any exponent exceeds 126.

    With AVX-512, which takes any exponent, the answer is always no.
    """
    w, large = width(u), False
    for v in range(vectors):
        first = d + v * w
        count = d1 - first
        x = load(u, (b, t, first), count)
        step = load(raw_delta, (b, t, first), count) + load(bias, (first,), count)
        if softplus_on:
            step = softplus(step)
        if not AVX512:
            step = select(step == step, step, cast(np.nan, step))  # the one NaN that exp2_product_small keeps
            large = large or any_lane(magnitude(step) * load(largest, (v * w,)) > cast(126, step))
        store(row, place(DELTA, v, w), step)
        store(row, place(INPUT, v, w), step * x)
        store(row, place(Y, v, w), load(D, (first,), count) * x)
    return large


@tight
def store_row(out, z, b, t, d, d1, vectors, row):
    """Gate a row's y and write it."""
    w = width(row)
    for v in range(vectors):
        first = d + v * w
        value = load(row, place(Y, v, w))
        if z.shape[0]:
            value = value * silu(load(z, (b, t, first), d1 - first))
        store(out, (b, t, first), value, d1 - first)


def make_walk(zoh: bool, constant: bool) -> Any:
    """Build the walk of a row of channels through steps `start` to `stop` of its order.

    With `constant`, B and C have a factor per channel beside the one per step. What the next step needs is on its way
    from memory while this one is computed: a few lines are asked for with each vector, so that nothing has to wait.
    """

    @tight
    def advance(power, y, step, x, i, n, kind, h, coefficients, B, C, b, group, t):
        inflow = x * cast(pick(B, (b, group, t, n)), x)
        gain = cast(pick(C, (b, group, t, n)), x)
        if zoh:
            inflow = inflow * phi(step * load(coefficients, (A_VALUE * kind + i,)))
        if constant:
            inflow = inflow * load(coefficients, (B_FACTOR * kind + i,))
            gain = gain * load(coefficients, (C_FACTOR * kind + i,))
        rate = load(coefficients, (i,))
        x = step * rate
        after = state_step(decay_factor(power(step, rate), x), x, load(h, (i,)), inflow)
        store(h, (i,), after)
        return readout(gain, after, y)

    @tight
    def advance_all(power, y, step, x, v, dstate, kind, h, coefficients, B, C, b, group, t):
        w = width(h)
        i = v * dstate * w
        for n in range(0, dstate - 3, 4):  # four at a time: fewer turns of the loop
            y = advance(power, y, step, x, i, n, kind, h, coefficients, B, C, b, group, t)
            y = advance(power, y, step, x, i + w, n + 1, kind, h, coefficients, B, C, b, group, t)
            y = advance(power, y, step, x, i + 2 * w, n + 2, kind, h, coefficients, B, C, b, group, t)
            y = advance(power, y, step, x, i + 3 * w, n + 3, kind, h, coefficients, B, C, b, group, t)
            i += 4 * w
        for n in range(dstate // 4 * 4, dstate):
            y = advance(power, y, step, x, i, n, kind, h, coefficients, B, C, b, group, t)
            i += w
        return y

    @tight
    def advance_row(
        u, raw_delta, z, out, B, C, b, group, t, coming, d, vectors, dstate, kind, h, coefficients, row, large
    ):  # fmt: skip
        w = width(row)
        for v in range(vectors):
            first = d + v * w
            prefetch_near(u, (b, coming, first))
            prefetch_near(raw_delta, (b, coming, first))
            prefetch_near(out, (b, coming, first))
            if z.shape[0]:
                prefetch_near(z, (b, coming, first))
            step, x, y = load(row, place(DELTA, v, w)), load(row, place(INPUT, v, w)), load(row, place(Y, v, w))
            if large:
                y = advance_all(exp2_product, y, step, x, v, dstate, kind, h, coefficients, B, C, b, group, t)
            else:
                y = advance_all(exp2_product_small, y, step, x, v, dstate, kind, h, coefficients, B, C, b, group, t)
            store(row, place(Y, v, w), y)

    @inner
    def walk(
        u, raw_delta, bias, D, z, out, B, C, b, group, order, fresh, start, stop, end, d, d1, vectors, dstate, kind, h,
        coefficients, largest, row, softplus_on,
    ):  # fmt: skip
        apart()
        for i in range(start, stop):
            t, coming = order[i], order[min(i + 1, end - 1)]
            if fresh[i]:
                h[:] = 0
            large = load_row(u, raw_delta, bias, D, b, t, d, d1, vectors, softplus_on, largest, row)
            advance_row(
                u, raw_delta, z, out, B, C, b, group, t, coming, d, vectors, dstate, kind, h, coefficients, row, large
            )  # fmt: skip
            store_row(out, z, b, t, d, d1, vectors, row)

    return walk
