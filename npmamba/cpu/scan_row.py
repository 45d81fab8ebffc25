"""The inner loops of the CPU selective scan, forward: a row of channels takes one step of time.

The states of the row and their rates stay in the first-level cache. A step is up to three loops over the row's vectors
of channels: `load_delta_row` takes the softplus of delta, `advance_row` steps the states on and sums y,
`store_gated_row` gates it. Inside them a loop runs over the states.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cpu.runtime import inner, tight
from npmamba.cpu.simd import AVX512, anchored, any_lane, apart, load, pick, prefetch_near, store, width
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

DELTA, Y, ROW_SLOTS = range(3)
"""Slots of a vector of a row: softplus of delta, y before the gate."""

RATE, A_VALUE, B_FACTOR, C_FACTOR = range(4)
"""Slots of a state's coefficients: A log2(e) always, the others where the rule needs them."""

CACHED = 256
"""States of a vector that the first-level cache holds, with their rates, beside everything else."""


def coefficient_slots(zoh: bool, constant: bool) -> int:
    """Return how many coefficients a state has; they lie side by side, so that one address serves them all."""
    return 4 if zoh or constant else 1


@tight
def place(slot, v, w):
    """Index of a slot of vector `v` in a row."""
    return ((v * ROW_SLOTS + slot) * w,)


@tight
def larger(x, y):
    """The larger of two numbers, `x` if `y` is NaN"""
    return select(y > x, y, x)


@inner
def load_states(source, slot, slots, d, d1, vectors, kept):
    """Copy numbers (dstate, dim) of a row's channels, such as states or rates, to one of `slots` slots in `kept`."""
    w, dstate = width(kept), source.shape[0]
    for v in range(vectors):
        for n in range(dstate):
            value = load(source, (n, d + v * w), d1 - d - v * w)
            store(kept, (((v * dstate + n) * slots + slot) * w,), value)


@inner
def store_states(h, target, d, d1, vectors):
    """Copy the states of a row's channels to (dstate, dim)."""
    w, dstate = width(h), target.shape[0]
    for v in range(vectors):
        for n in range(dstate):
            store(target, (n, d + v * w), load(h, ((v * dstate + n) * w,)), d1 - d - v * w)


@inner
def largest_rates(coefficients, slots, dstate, vectors, largest):
    """Find the largest |rate| of each channel of a row."""
    w = width(coefficients)
    for v in range(vectors):
        most = cast(0, load(coefficients, (0,)))
        for n in range(dstate):
            rate = load(coefficients, (((v * dstate + n) * slots + RATE) * w,))
            most = larger(most, magnitude(rate))
        store(largest, (v * w,), most)


@tight
def load_step_maps(B, C, b, group, t, maps):
    """Copy B and C of one step into scratch: B of all states in its first half, C in its second."""
    w, dstate, half = width(maps), B.shape[3], maps.shape[0] // 2
    if B.strides[3] == B.itemsize and C.strides[3] == C.itemsize:
        for n in range(0, dstate, w):
            store(maps, (n,), load(B, (b, group, t, n), dstate - n))
            store(maps, (half + n,), load(C, (b, group, t, n), dstate - n))
    else:
        for n in range(dstate):
            maps[n] = B[b, group, t, n]
            maps[half + n] = C[b, group, t, n]


@tight
def load_some(a, index, count):
    """Read a vector as `load` does; only the last one of a row has fewer lanes and needs the mask."""
    return load(a, index) if count >= width(a) else load(a, index, count)


@tight
def load_delta_row(raw_delta, bias, b, t, d, d1, vectors, softplus_on, largest, row):
    """Fill a row with delta = softplus(raw + bias); tell whether any exponent exceeds 126.

    With AVX-512, which takes any exponent, the answer is always no.
    """
    w, large = width(row), False
    for v in range(vectors):
        first = d + v * w
        step = load(raw_delta, (b, t, first), d1 - first) + load(bias, (first,), d1 - first)
        if softplus_on:
            step = softplus(step)
        if not AVX512:
            step = select(step == step, step, cast(np.nan, step))  # the one NaN that exp2_product_small keeps
            large = large or any_lane(magnitude(step) * load(largest, (v * w,)) > cast(126, step))
        store(row, place(DELTA, v, w), step)
    return large


@tight
def store_gated_row(out, z, b, t, d, d1, vectors, row):
    """Gate a row's y and write it."""
    w = width(row)
    for v in range(vectors):
        first = d + v * w
        value = load(row, place(Y, v, w)) * silu(load(z, (b, t, first), d1 - first))
        store(out, (b, t, first), value, d1 - first)


def make_walk(zoh: bool, constant: bool) -> Any:
    """Build the walk of a row of channels through steps `start` to `stop` of its order.

    With `constant`, B and C have a factor per channel beside the one per step. What the next steps need is on its way
    from memory while these are computed: a few lines are asked for with each vector, so that nothing has to wait.

    Where nothing but the recurrence is to be done (no softplus, no gate, no vector that is cut short), two steps are
    taken at once: what is asked and loaded for a vector serves both, and states and rates are read once. The sums are
    the same, to the bit. Addresses go from function to function without a name of their own, for Numba counts
    references to an array that has one.
    """
    slots = coefficient_slots(zoh, constant)

    @tight
    def terms(step, x, coefficients, B, C, n):
        """Rate, inflow and gain of a state"""
        w, i = width(coefficients), n * slots * width(coefficients)
        inflow, gain = x * cast(pick(B, n), x), cast(pick(C, n), x)
        if zoh:
            inflow = inflow * phi(step * load(coefficients, (i + A_VALUE * w,)))
        if constant:
            inflow = inflow * load(coefficients, (i + B_FACTOR * w,))
            gain = gain * load(coefficients, (i + C_FACTOR * w,))
        return load(coefficients, (i + RATE * w,)), inflow, gain

    @tight
    def after(power, step, rate, before, inflow):
        """The state after a step"""
        return state_step(decay_factor(power(step, rate), step * rate), step * rate, before, inflow)

    @tight
    def advance(states, power, y, step, x, h, coefficients, B, C):
        """Take some states a step on and add what they read out to y."""
        for n in range(states):
            rate, inflow, gain = terms(step, x, coefficients, B, C, n)
            state = after(power, step, rate, load(h, (n * width(h),)), inflow)
            store(h, (n * width(h),), state)
            y = readout(gain, state, y)
        return y

    @tight
    def advance_twice(states, y, y2, step, step2, x, x2, h, coefficients, B, C, B2, C2):
        """Take some states two steps on."""
        for n in range(states):
            rate, inflow, gain = terms(step, x, coefficients, B, C, n)
            _, inflow2, gain2 = terms(step2, x2, coefficients, B2, C2, n)
            state = after(exp2_product_small, step, rate, load(h, (n * width(h),)), inflow)
            y = readout(gain, state, y)
            state = after(exp2_product_small, step2, rate, state, inflow2)
            store(h, (n * width(h),), state)
            y2 = readout(gain2, state, y2)
        return y, y2

    @tight
    def advance_all(power, y, step, x, v, dstate, h, coefficients, maps):
        first, half, w = v * dstate, maps.shape[0] // 2, width(h)
        for n in range(0, dstate - 3, 4):  # four at a time: fewer turns of the loop
            i = (first + n) * w
            y = advance(
                4, power, y, step, x, anchored(h, i), anchored(coefficients, slots * i), anchored(maps, n),
                anchored(maps, half + n),
            )  # fmt: skip
        for n in range(dstate // 4 * 4, dstate):
            i = (first + n) * w
            y = advance(
                1, power, y, step, x, anchored(h, i), anchored(coefficients, slots * i), anchored(maps, n),
                anchored(maps, half + n),
            )  # fmt: skip
        return y

    @tight
    def advance_all_twice(y, y2, step, step2, x, x2, v, dstate, h, coefficients, maps, maps2):
        first, half, w = v * dstate, maps.shape[0] // 2, width(h)
        for n in range(0, dstate - 1, 2):
            i = (first + n) * w
            y, y2 = advance_twice(
                2, y, y2, step, step2, x, x2, anchored(h, i), anchored(coefficients, slots * i),
                anchored(maps, n), anchored(maps, half + n), anchored(maps2, n), anchored(maps2, half + n),
            )  # fmt: skip
        for n in range(dstate // 2 * 2, dstate):
            i = (first + n) * w
            y, y2 = advance_twice(
                1, y, y2, step, step2, x, x2, anchored(h, i), anchored(coefficients, slots * i),
                anchored(maps, n), anchored(maps, half + n), anchored(maps2, n), anchored(maps2, half + n),
            )  # fmt: skip
        return y, y2

    @tight
    def advance_row(
        u, raw_delta, bias, D, z, out, b, t, coming, d, d1, vectors, dstate, h, coefficients, maps, row, staged, large
    ):  # fmt: skip
        w = width(row)
        for v in range(vectors):
            first = d + v * w
            count = d1 - first
            prefetch_near(u, (b, coming, first))
            prefetch_near(raw_delta, (b, coming, first))
            prefetch_near(out, (b, coming, first))
            if z.shape[0]:
                prefetch_near(z, (b, coming, first))
            if staged:
                step = load(row, place(DELTA, v, w))
            else:
                step = load(raw_delta, (b, t, first), count) + load(bias, (first,), count)
            x, skip = load_some(u, (b, t, first), count), load_some(D, (first,), count)
            if large:
                y = advance_all(exp2_product, skip * x, step, x * step, v, dstate, h, coefficients, maps)
            else:
                y = advance_all(exp2_product_small, skip * x, step, x * step, v, dstate, h, coefficients, maps)
            if z.shape[0]:
                store(row, place(Y, v, w), y)
            else:
                store(out, (b, t, first), y, count)

    @tight
    def advance_two_rows(
        u, raw_delta, bias, D, out, b, t, t2, coming, coming2, d, vectors, dstate, h, coefficients, maps, maps2
    ):  # fmt: skip
        w = width(h)
        for v in range(vectors):
            first = d + v * w
            prefetch_near(u, (b, coming, first))
            prefetch_near(u, (b, coming2, first))
            prefetch_near(raw_delta, (b, coming, first))
            prefetch_near(raw_delta, (b, coming2, first))
            prefetch_near(out, (b, coming, first))
            prefetch_near(out, (b, coming2, first))
            shift, skip = load(bias, (first,)), load(D, (first,))
            x, x2 = load(u, (b, t, first)), load(u, (b, t2, first))
            step, step2 = load(raw_delta, (b, t, first)) + shift, load(raw_delta, (b, t2, first)) + shift
            y, y2 = advance_all_twice(
                skip * x, skip * x2, step, step2, x * step, x2 * step2, v, dstate, h, coefficients, maps, maps2
            )
            store(out, (b, t, first), y)
            store(out, (b, t2, first), y2)

    @inner
    def walk(
        u, raw_delta, bias, D, z, out, B, C, b, group, order, fresh, start, stop, end, d, d1, vectors, dstate, h,
        coefficients, maps, maps2, largest, row, softplus_on,
    ):  # fmt: skip
        apart()
        staged, large = softplus_on or not AVX512, False
        plain = not staged and not z.shape[0] and d1 - d >= vectors * width(h)
        i = start
        while i < stop:
            t = order[i]
            if fresh[i]:
                h[:] = 0
            load_step_maps(B, C, b, group, t, maps)
            if plain and i + 1 < stop and not fresh[i + 1]:
                t2, coming, coming2 = order[i + 1], order[min(i + 2, end - 1)], order[min(i + 3, end - 1)]
                load_step_maps(B, C, b, group, t2, maps2)
                advance_two_rows(
                    u, raw_delta, bias, D, out, b, t, t2, coming, coming2, d, vectors, dstate, h, coefficients, maps,
                    maps2,
                )  # fmt: skip
                i += 2
                continue
            coming = order[min(i + 1, end - 1)]
            if staged:
                large = load_delta_row(raw_delta, bias, b, t, d, d1, vectors, softplus_on, largest, row)
            advance_row(
                u, raw_delta, bias, D, z, out, b, t, coming, d, d1, vectors, dstate, h, coefficients, maps, row,
                staged, large,
            )  # fmt: skip
            if z.shape[0]:
                store_gated_row(out, z, b, t, d, d1, vectors, row)
            i += 1

    return walk
