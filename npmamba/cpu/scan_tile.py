"""The inner loops of the CPU selective scan, backward: one vector of channels walks through one tile of time.

A tile is `TILE` steps of everything the loops need, staged in scratch memory that stays in the first-level cache.
`make_state_pass_back` builds the loops over time for one state; all else here fills or empties tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cpu.runtime import inner, tight
from npmamba.cpu.scan_row import larger
from npmamba.cpu.simd import accumulate, apart, load, pick, prefetch, store, total, width
from npmamba.scalar import (
    cast,
    decay_factor,
    decay_of,
    decayed,
    fma,
    magnitude,
    phi,
    phi_derivative,
    readout,
    select,
    sigmoid,
    silu,
    silu_derivative,
    softplus,
    state_step,
)

TILE = 64
"""Steps per tile; the backward pass recomputes the states of one tile from the state saved before it."""

DELTA, INPUTS, Y, U, DY, DINPUT, DSTEP, FACTOR, STATE, SLOTS = range(10)
"""Slots of a tile: delta, delta u, y, u, dy, sum_n g B, d(delta) (of euler without u sum_n g B), factors, states."""


def kernel_name(stem: str, zoh: bool, constant: bool) -> str:
    """Return what tells the kernels of the four rules apart, such as ``forward-zoh-constant``."""
    return f"{stem}-{'zoh' if zoh else 'euler'}{'-constant' if constant else ''}"


@tight
def get(tile, slot, i):
    """Read the vector of step `i` from a slot. Slots lie in one flat array: one address serves them all."""
    return load(tile, ((slot * (TILE + 1) + i) * width(tile),))


@tight
def put(tile, slot, i, value):
    store(tile, ((slot * (TILE + 1) + i) * width(tile),), value)


@inner
def load_maps(B, C, order, b, group, row, t0, steps, tile_B, tile_C):
    """Copy a tile of B and C into scratch, state by state in the order of the scan."""
    for i in range(steps):
        t = order[row, t0 + i]
        for n in range(B.shape[3]):
            tile_B[n * TILE + i] = B[b, group, t, n]
            tile_C[n * TILE + i] = C[b, group, t, n]


@inner
def load_inputs(u, raw_delta, bias, D, order, b, d, row, t0, steps, softplus_on, count, tile):
    """Fill a tile's delta = softplus(raw + bias), inputs = delta u, and y = D u; return the largest |delta|."""
    skip = load(D, (d,), count)
    shift = load(bias, (d,), count)
    reach = cast(0, skip)
    for i in range(steps):
        t = order[row, t0 + i]
        x = load(u, (b, t, d), count)
        step = load(raw_delta, (b, t, d), count) + shift
        if softplus_on:
            step = softplus(step)
        step = select(step == step, step, cast(np.nan, step))  # the one NaN that exp2_product_small keeps
        reach = larger(reach, magnitude(step))
        put(tile, DELTA, i, step)
        put(tile, INPUTS, i, step * x)
        put(tile, Y, i, skip * x)
        put(tile, U, i, x)
    return reach


@tight
def prefetch_rows(x, b, d, order, row, first, last):
    """Ask for a vector of steps `first` to `last`: a few at a time, between the passes before, they come unnoticed."""
    for i in range(first, last):
        prefetch(x, (b, order[row, i], d))


@inner
def segments(fresh, row, t0, steps, bounds):
    """Write the borders of the runs inside a tile to `bounds` and return how many there are."""
    count = 0
    for i in range(steps):
        if i == 0 or fresh[row, t0 + i]:
            bounds[count] = i
            count += 1
    bounds[count] = steps
    return count


def make_state_pass_back(zoh: bool, constant: bool, power: Any) -> Any:
    """Build the two inner loops of the backward pass for one state of one vector of channels, steps `lo` to `hi`.

    First the decays and states of the run are computed again, then time is walked back:
    g_t = C_t dy_t + a_{t+1} g_{t+1}, and each gradient takes its share of g_t (see `selective_scan.md`).
    """

    @inner
    def state_pass_back(h, g, a, a2, b, c, tile, B, C, dB, dC, sums, n, lo, hi, gated):
        apart()
        w = width(tile)
        put(tile, STATE, lo, h)
        for i in range(lo, hi):
            step = get(tile, DELTA, i)
            inflow = get(tile, INPUTS, i) * cast(pick(B, n * TILE + i), step)
            if zoh:
                inflow = inflow * phi(step * a)
            if constant:
                inflow = inflow * b
            factor = decay_factor(power(step, a2), step * a2)
            h = state_step(factor, step * a2, h, inflow)
            put(tile, FACTOR, i, factor)
            put(tile, STATE, i + 1, h)
            if gated:
                gain = cast(pick(C, n * TILE + i), step)
                if constant:
                    gain = gain * c
                put(tile, Y, i, readout(gain, h, get(tile, Y, i)))
        dA, dB_factor, dC_factor = cast(0, a), cast(0, a), cast(0, a)
        for j in range(hi - lo):
            i = hi - 1 - j
            place = ((n * TILE + i) * w,)
            step, cotangent = get(tile, DELTA, i), get(tile, DY, i)
            Bn, Cn = cast(pick(B, n * TILE + i), step), cast(pick(C, n * TILE + i), step)
            dgain = cotangent * get(tile, STATE, i + 1)
            source = get(tile, INPUTS, i)
            gain = Cn
            if constant:
                dC_factor = fma(dgain, Cn, dC_factor)
                dgain = dgain * c
                gain = Cn * c
            store(dC, place, load(dC, place) + dgain)
            g = fma(cotangent, gain, g)
            factor = get(tile, FACTOR, i)
            before = decayed(factor, step * a2, g)
            Bg = g * Bn
            if constant:
                Bg = Bg * b
            dstep = get(tile, DSTEP, i)
            if zoh:
                x = step * a
                response = phi(x)
                Bgu = Bg * get(tile, U, i)
                dx = Bgu * step * phi_derivative(x)
                dA = fma(dx, step, dA)
                dstep = fma(Bgu, decay_of(factor, step * a2), dstep)  # phi + x phi' = e^x: its two terms would cancel
                Bg = Bg * response
                source = source * response
            if constant:
                dB_factor = fma(g * source, Bn, dB_factor)
                source = source * b
            store(dB, place, fma(g, source, load(dB, place)))
            put(tile, DINPUT, i, get(tile, DINPUT, i) + Bg)
            p = before * get(tile, STATE, i)
            dA = fma(p, step, dA)
            put(tile, DSTEP, i, fma(p, a, dstep))
            g = before
        accumulate(sums, (3 * n, 0), dA)
        if constant:
            accumulate(sums, (3 * n + 1, 0), dB_factor)
            accumulate(sums, (3 * n + 2, 0), dC_factor)
        return g

    return state_pass_back


@inner
def load_cotangents(dout, z, b, d, order, row, t0, steps, count, tile):
    """Fill a tile's dy = dout silu(z), the gradient before the gate."""
    for i in range(steps):
        t = order[row, t0 + i]
        cotangent = load(dout, (b, t, d), count)
        if z.shape[0]:
            cotangent = cotangent * silu(load(z, (b, t, d), count))
        put(tile, DY, i, cotangent)
        put(tile, DINPUT, i, cast(0, cotangent))
        put(tile, DSTEP, i, cast(0, cotangent))


@inner
def store_input_gradients(
    raw_delta, z, dout, bias, D, b, d, order, row, t0, steps, softplus_on, zoh, count, tile, du, ddelta, dz, sums
):
    """Turn a tile's sums over the states into du, ddelta, dz, and its share of dD and dbias."""
    skip, shift = load(D, (d,), count), load(bias, (d,), count)
    dD, dbias = cast(0, skip), cast(0, skip)
    for i in range(steps):
        t = order[row, t0 + i]
        x, cotangent, share = get(tile, U, i), get(tile, DY, i), get(tile, DINPUT, i)
        store(du, (b, t, d), fma(get(tile, DELTA, i), share, skip * cotangent), count)
        gradient = get(tile, DSTEP, i)
        if not zoh:
            gradient = fma(x, share, gradient)
        if softplus_on:
            gradient = gradient * sigmoid(load(raw_delta, (b, t, d), count) + shift)
        store(ddelta, (b, t, d), gradient, count)
        if z.shape[0]:
            gate = load(z, (b, t, d), count)
            store(dz, (b, t, d), load(dout, (b, t, d), count) * get(tile, Y, i) * silu_derivative(gate), count)
        dD = fma(cotangent, x, dD)
        dbias = dbias + gradient
    accumulate(sums, (sums.shape[0] - 2, 0), dD)
    accumulate(sums, (sums.shape[0] - 1, 0), dbias)


@inner
def store_map_gradients(dB, dC, order, row, t0, steps, b, block, dB_parts, dC_parts):
    """Sum a tile's dB and dC over the channels of the block."""
    for i in range(steps):
        t = order[row, t0 + i]
        for n in range(dB_parts.shape[3]):
            place = ((n * TILE + i) * width(dB),)
            dB_parts[block, b, t, n] = total(load(dB, place))
            dC_parts[block, b, t, n] = total(load(dC, place))
