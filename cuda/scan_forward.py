"""The forward kernels of the CUDA selective scan.

`FORWARD` walks through time once. Where the channels are too few to fill the device, time is cut into segments that run
side by side: with `ends` it finds what each adds to the state, `scan_carry.CARRY` hands the states on from segment to
segment, and `FORWARD` starts every segment from its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.device import (
    Data,
    Flags,
    Size,
    Stride,
    Wide,
    commit_async,
    cuda,
    load,
    load2,
    load4,
    shift,
    store,
    store2,
    store4,
    wait_async,
)
from npmamba.cuda.launch import Kernel
from npmamba.cuda.scan_tile import (
    BIAS,
    ENTERING,
    LOAD_STATES,
    SKIP,
    SOFTPLUS,
    THREADS,
    USUAL,
    Shape,
    division,
    is_present,
    is_within,
    make_copy,
    make_decay_rate,
    make_lane_sum,
    make_place,
    make_scatter_sum,
    resident_of,
    tile_of,
    unrolled,
)
from npmamba.cuda.schedule import ABSENT, FRESH, NORMAL
from npmamba.scalar import cast, decay_factor, decayed, exp2, fma, phi, readout, select, silu, softplus, state_step

uint32, int32, int64 = np.uint32, np.int32, np.int64

def _scan(
    real, data, shape, gated=False, interval=0, ends=False, adjoint=False, zoh=False, packed=False, by_channel=False,
    wide=True, wide_maps=True, constant_B=False, constant_C=False, resident=1,
):  # fmt: skip
    shape = Shape(*shape)
    dstate, states, lanes, steps = shape
    padded, owners, channels = shape.padded, shape.owners, shape.channels
    turns = steps // owners
    tile = tile_of(shape, data.itemsize, by_channel)
    gated, varying_C = gated and (adjoint or not ends), not (ends or constant_C)
    half = data.itemsize == 2
    lag = 2 if half else 1
    maps = steps * padded
    both = 2 * maps if varying_C else maps
    step_pitch, channel_pitch, size = tile.step, tile.channel, tile.size
    turn = owners * step_pitch
    stage = size * (3 if gated else 2)
    pair_pitch = 2 * steps + 4
    rows_size, raw_size, widened_size, pairs_size = 2 * stage, 2 * both, 2 * both if half else 4, channels * pair_pitch
    begin_rows, copy_rows = make_copy(tile.rows, tile.length, tile.pitch, data.itemsize, wide)
    is_there = is_present if packed else is_within
    begin_maps, copy_maps = make_copy(steps, padded, padded, data.itemsize, wide_maps, is_there)
    place, scatter_sum, lane_sum = make_place(lanes), make_scatter_sum(lanes, owners), make_lane_sum(lanes, owners)
    load_states, decay_rate, lowest = LOAD_STATES[states], make_decay_rate(real), float(np.finfo(real).min)
    first_map, end_map = maps if constant_B else 0, both if varying_C else maps
    fills = -(-(end_map - first_map) // (4 * THREADS))

    def widen(raw, widened, at, thread):
        """Turn a tile's B and C into float32, which every channel needs."""
        for r in range(fills):
            i = uint32((thread + uint32(r * THREADS)) * uint32(4) + uint32(first_map))
            if i < uint32(end_map):
                store4(widened, at + i, load4(raw, at + i))

    def remaining(length, tile):
        """Steps from the start of a tile on; none of a tile before the first."""
        left = int32(length) - int32(tile) * int32(steps)
        return uint32(left) if tile >= int32(0) and left > int32(0) else uint32(0)

    def advance(registers, context, step, dt, inflow):
        """One step: what it adds to the state, and what the state adds to y."""
        h, a, rate, factor_B, factor_C, numbers, cut = registers
        _, maps_at, _, _, _, saved_at, saved_step, marks, rest, _, _, here, _, _ = context
        if interval > 0 and step % interval == 0:
            if here and uint32(step) < rest:
                for n in range(states):
                    store(saved_at, int64(step // interval) * saved_step + int64(n), h[n])
        zero = cast(0, dt)
        begins = packed and load_mark(marks, uint32(step), rest) == FRESH
        if packed:
            cut[0] |= uint32(begins)
        Bs, Cs = load_maps(maps_at, step * padded)
        total = zero
        for n in range(states):
            flow = inflow * (factor_B[n] if constant_B else Bs[n])
            before = h[n]
            if packed and not adjoint:
                before = select(begins, zero, before)
            if zoh and not adjoint:
                flow = flow * phi(dt * a[n])
            x = dt * rate[n]
            factor = decay_factor(exp2(x), x)
            after = decayed(factor, x, before + flow) if adjoint else state_step(factor, x, before, flow)
            if packed and adjoint:
                after = select(begins, zero, after)
            h[n] = after
            if not ends:
                total = readout(factor_C[n] if constant_C else Cs[n], after, total)
        numbers[step & (owners - 1)] = total

    def one_step(registers, context, step):
        dt, inflow = load2(context[0], 2 * step)
        advance(registers, context, step, dt, inflow)

    def two_steps(registers, context, k):
        """Two steps, whose pairs take one access."""
        dt, inflow, next_dt, next_inflow = load4(context[0], 4 * k)
        advance(registers, context, 2 * k, dt, inflow)
        advance(registers, context, 2 * k + 1, next_dt, next_inflow)

    at_once = min(2, owners)
    advance_turn = unrolled(two_steps if at_once == 2 else one_step, owners // at_once)

    def one_turn(registers, context, g):
        """The steps of a turn; then each lane sums up, gates and stores y of the one that is its own."""
        advance_turn(registers, context, g * (owners // at_once))
        _, _, row_at, y_at, y_step, _, _, marks, rest, own, thread, _, stores, skip = context
        if not ends:
            out = fma(skip, load(row_at, g * turn), scatter_sum(registers[5], thread))
            if gated:
                out = out * silu(load(row_at, g * turn + 2 * size))
            step = uint32(own + uint32(g * owners))
            if packed:
                out = select(load_mark(marks, step, rest) == ABSENT, cast(0, out), out)
            if stores and step < rest:
                store(y_at, int64(g * owners) * y_step, out)

    # turns that the compiler may interleave: more hide latency, and need registers that more warps could use
    together = min(turns, 8)
    some_turns = unrolled(one_turn, together)
    saves = steps // interval if interval else 0

    def scan(
        u: Data, delta: Data, A: Wide, B: Data, C: Data, D: Wide, z: Data, bias: Wide, entering: Wide, marks: Flags,
        y: Data, last: Wide, checkpoints: Wide, sums: Wide,
        u_batch: Stride, u_step: Stride, u_dim: Stride, delta_batch: Stride, delta_step: Stride, delta_dim: Stride,
        z_batch: Stride, z_step: Stride, z_dim: Stride, y_batch: Stride, y_step: Stride, y_dim: Stride,
        B_batch: Stride, B_group: Stride, B_step: Stride, C_batch: Stride, C_group: Stride, C_step: Stride,
        marks_step: Stride, dim: Size, seqlen: Size, segment: Size, segments: Size, lead: Size, blocks: Size,
        groups: Size, flags: Size,
    ):  # fmt: skip
        """Equation: h_t = exp(delta_t A) h_{t-1} + f_t B_t u_t, y_t = sum_n C_t h_t + D u_t, out = y silu(z);
        for `adjoint`, with dout as u, C as B and time reversed, g_{t-1} = exp(delta_t A) (g_t + C_t dy_t).
        Threads: a block is (batch row, segment of time, THREADS / lanes channels of one group); see `scan_tile`.
        Owns: y and checkpoints of its channels and steps, last of its channels if its segment is the last one; for
        `ends` the state after the segment, from zero, and the sum of delta, of its channels.
        Saved: the state before every `interval` steps, if that is not 0.
        """
        rows = cuda.shared.array(rows_size, data, 16)
        raw = cuda.shared.array(raw_size, data, 16)
        widened = cuda.shared.array(widened_size, real, 16)
        pairs = cuda.shared.array(pairs_size, real, 16)
        h = cuda.local.array(states, real)
        a = cuda.local.array(states, real)
        rate = cuda.local.array(states, real)
        factor_B = cuda.local.array(states, real)
        factor_C = cuda.local.array(states, real)
        numbers = cuda.local.array(owners, real)
        cut = cuda.local.array(1, np.dtype(np.uint32))

        thread = uint32(cuda.threadIdx.x)
        lane, channel = place(thread)
        own, n0 = uint32(lane % uint32(owners)), uint32(lane * uint32(states))
        # blocks of channels lie side by side in the grid: they share B and C in the second-level cache
        cell = uint32(cuda.blockIdx.x)
        block, s, b = uint32(cell % blocks), uint32(cell // blocks % segments), int64(cell // blocks // segments)
        if ends and uint32(s + uint32(1)) == segments:
            return  # nothing comes after the last segment
        per_group = uint32(blocks // groups)
        group = uint32(block // per_group)
        group_dim = uint32(dim // groups)
        d0 = uint32(group * group_dim + block % per_group * uint32(channels))
        left = uint32(uint32(group + uint32(1)) * group_dim - d0)
        d, here = uint32(d0 + channel), channel < left
        # the first segment is `lead` steps short: walked backwards, time is cut at the same places as forwards
        t0 = uint32(s * segment - lead) if s > uint32(0) else uint32(0)
        length = uint32(min(uint32(uint32(s + uint32(1)) * segment - lead), seqlen) - t0)

        zero = cast(0, load(A, 0))
        state_at = ((b * int64(segments) + int64(s)) * int64(dim) + int64(d)) * int64(padded) + int64(n0)
        for n in range(states):
            h[n], a[n], factor_B[n], factor_C[n] = zero, zero, zero, zero
            if here and uint32(n0 + uint32(n)) < uint32(dstate):
                at = int64(d) * int64(dstate) + int64(n0) + int64(n)
                a[n] = load(A, at)
                if flags & uint32(ENTERING):
                    h[n] = load(entering, state_at + int64(n))
                if constant_B:
                    factor_B[n] = load(B, at)
                if constant_C:
                    factor_C[n] = load(C, at)
            rate[n] = decay_rate(a[n])
            a[n] = select(a[n] < cast(lowest, zero), cast(lowest, zero), a[n])
        skip, shift_by, elapsed = zero, zero, zero
        cut[0] = uint32(0)
        if here and flags & uint32(SKIP):
            skip = load(D, int64(d))
        if here and flags & uint32(BIAS):
            shift_by = load(bias, int64(d))
        softplus_on = flags & uint32(SOFTPLUS)

        u_row, u_place = (u_dim, u_step) if by_channel else (u_step, u_dim)
        delta_row, delta_place = (delta_dim, delta_step) if by_channel else (delta_step, delta_dim)
        z_row, z_place = (z_dim, z_step) if by_channel else (z_step, z_dim)
        start = int64(t0)
        first = start - int64((lag - 1) * steps)
        u_at = begin_rows(shift(u, b * u_batch + first * u_step + int64(d0) * u_dim), u_row, u_place, thread)
        delta_at = shift(delta, b * delta_batch + first * delta_step + int64(d0) * delta_dim)
        delta_at = begin_rows(delta_at, delta_row, delta_place, thread)
        z_at = begin_rows(shift(z, b * z_batch + first * z_step + int64(d0) * z_dim), z_row, z_place, thread)
        B_at, C_at = B, C
        if not constant_B:
            B_at = shift(B, b * B_batch + int64(group) * B_group + start * B_step)
            B_at = begin_maps(B_at, B_step, int64(1), thread)
        if varying_C:
            C_at = shift(C, b * C_batch + int64(group) * C_group + start * C_step)
            C_at = begin_maps(C_at, C_step, int64(1), thread)
        y_at = shift(y, b * y_batch + (start + int64(own)) * y_step + int64(d) * y_dim)
        mark_at = shift(marks, b * int64(seqlen) + start * marks_step) if packed else marks
        coming_marks = mark_at
        saved_at, saved_step = checkpoints, int64(dim) * int64(padded)
        if interval > 0:
            row = b * int64((seqlen + uint32(interval - 1)) // uint32(interval)) + int64(t0 // uint32(interval))
            saved_at = shift(checkpoints, (row * int64(dim) + int64(d)) * int64(padded) + int64(n0))
        channel_pairs = shift(pairs, channel * uint32(pair_pitch))
        own_pairs = shift(channel_pairs, own * uint32(2))
        own_at = own * uint32(step_pitch) + channel * uint32(channel_pitch)
        stores = here and lane < uint32(owners)

        k = int32(0)
        end = int32((length + uint32(steps - 1)) // uint32(steps)) + int32(lag)
        while k < end:
            # what the last round of the loop asked for is there, and what it read may be overwritten
            wait_async(0)
            cuda.syncthreads()
            odd = uint32(k & int32(1))
            even = uint32(uint32(1) - odd)
            coming = remaining(length, k - int32(lag - 1))
            rows_left, places_left = (left, coming) if by_channel else (coming, left)
            at = odd * uint32(stage)
            copy_rows(rows, at, u_at, u_row, u_place, rows_left, places_left, thread, zero)
            copy_rows(rows, at + uint32(size), delta_at, delta_row, delta_place, rows_left, places_left, thread, zero)
            if gated:
                copy_rows(rows, at + uint32(2 * size), z_at, z_row, z_place, rows_left, places_left, thread, zero)
                z_at = shift(z_at, int64(steps) * z_step)
            u_at, delta_at = shift(u_at, int64(steps) * u_step), shift(delta_at, int64(steps) * delta_step)
            coming = remaining(length, k)
            wanted = (coming, coming_marks, marks_step) if packed else coming
            at = odd * uint32(both)
            if not constant_B:
                copy_maps(raw, at, B_at, B_step, int64(1), wanted, uint32(dstate), thread, zero)
                B_at = shift(B_at, int64(steps) * B_step)
            if varying_C:
                copy_maps(raw, at + uint32(maps), C_at, C_step, int64(1), wanted, uint32(dstate), thread, zero)
                C_at = shift(C_at, int64(steps) * C_step)
            if packed:
                coming_marks = shift(coming_marks, int64(steps) * marks_step)
            commit_async()
            if half and k > int32(0):
                widen(raw, widened, even * uint32(both), thread)
            rest = remaining(length, k - int32(lag))
            k = int32(k + int32(1))
            if rest == uint32(0):
                continue

            row_at = shift(rows, even * uint32(stage) + own_at)
            for g in range(turns):
                dt = load(row_at, g * turn + size) + shift_by
                if softplus_on:
                    dt = softplus(dt)
                there = uint32(own + uint32(g * owners)) < rest
                if packed:
                    there = there and load_mark((mark_at, marks_step), uint32(own + uint32(g * owners)), rest) != ABSENT
                dt = select(there, dt, zero)
                inflow = dt * load(row_at, g * turn)
                if adjoint:  # u is dout here
                    inflow = load(row_at, g * turn)
                    if gated:
                        inflow = inflow * silu(load(row_at, g * turn + 2 * size))
                if lane < uint32(owners):
                    store2(own_pairs, 2 * g * owners, (dt, select(there, inflow, zero)))
                elapsed += dt
            cuda.syncwarp()

            maps_at = shift(widened, odd * uint32(both) + n0) if half else shift(raw, even * uint32(both) + n0)
            registers = (h, a, rate, factor_B, factor_C, numbers, cut)
            context = (
                channel_pairs, maps_at, row_at, y_at, y_step, saved_at, saved_step, (mark_at, marks_step), rest, own,
                thread, here, stores, skip,
            )  # fmt: skip
            for g in range(0, turns, together):
                some_turns(registers, context, g)
            y_at, saved_at = shift(y_at, int64(steps) * y_step), shift(saved_at, int64(saves) * saved_step)
            if packed:
                mark_at = shift(mark_at, int64(steps) * marks_step)
        if ends:
            for n in range(states):
                if here:
                    store(last, state_at + int64(n), h[n])
            # a sequence that began inside cuts the states of before off: no decay is infinite
            elapsed = select(cut[0] != uint32(0), cast(np.inf, zero), lane_sum(elapsed))
            if here and lane == uint32(0):
                store(sums, (b * int64(segments) + int64(s)) * int64(dim) + int64(d), elapsed)
        elif here and uint32(s + uint32(1)) == segments:
            for n in range(states):
                if uint32(n0 + uint32(n)) < uint32(dstate):
                    store(last, (b * int64(dim) + int64(d)) * int64(dstate) + int64(n0) + int64(n), h[n])

    def load_mark(marks, step, rest):
        return load(marks[0], int64(step) * marks[1]) if step < rest else NORMAL

    def load_maps(maps_at, i):
        if constant_B and not varying_C:
            return (0,), (0,)
        if constant_B:
            return (0,), load_states(maps_at, i + maps)
        if not varying_C:
            return load_states(maps_at, i), (0,)
        return load_states(maps_at, i), load_states(maps_at, i + maps)

    return scan


def forward_resident(dtype: np.dtype, shape: Shape) -> int:
    """Return how many blocks of FORWARD are to share a multiprocessor: four leave a thread 128 registers."""
    return 1 if dtype == np.float64 or shape.lanes > 4 else 4


def _shipped(dtype: np.dtype) -> list[dict[str, Any]]:
    """Return what a layer runs, with gradients, without, and in segments; for float32 also one of each other kind."""

    def kernel(dstate: int = 16, **changes: Any) -> dict[str, Any]:
        shape = division(dstate, dtype.itemsize)
        return {"shape": (tuple(shape),), "resident": forward_resident(dtype, shape), **USUAL, **changes}

    def saving(dstate: int = 16, **changes: Any) -> dict[str, Any]:
        return kernel(dstate, interval=division(dstate, dtype.itemsize, backward=True).steps, **changes)

    ends = [kernel(ends=True, gated=False), kernel(ends=True, adjoint=True)]
    usual = [saving(), kernel(interval=0), *ends]
    others = [
        saving(gated=False),
        saving(by_channel=True),
        saving(zoh=True, packed=True),
        saving(constant_B=True, constant_C=True),
        saving(64),
        saving(256),
    ]
    return usual + (others if dtype == np.float32 else [])


FORWARD = Kernel(_scan, THREADS, blocks=resident_of, shipped=_shipped, others=True)
