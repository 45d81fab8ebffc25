"""The backward kernels of the CUDA selective scan.

`BACKWARD` walks back through time tile by tile: from the state kept before a tile it computes the tile's states again,
into registers, then takes the steps in reverse. Sums over channels (dB, dC) are made in a fixed order: over the lanes
of a warp, the warps of a block, and, by the kernels of `scan_sums`, over the blocks.
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
    channel_distances,
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
from npmamba.scalar import (
    cast,
    decay_factor,
    decay_of,
    decayed,
    exp2,
    fma,
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

uint32, int32, int64 = np.uint32, np.int32, np.int64
WARPS = THREADS // 32
LN2 = 0.6931471805599453


def make_channel_sum(lanes: int, count: int) -> Any:
    """Build the sum of `count` numbers over the channels of a warp.

    The numbers are dealt out on the way: each lane ends with ``max(1, count lanes / 32)`` sums at the front of
    `numbers`; which ones, the bits of the thread's number tell.
    """
    return _deal(channel_distances(lanes), count)


def _deal(distances: tuple[int, ...], count: int) -> Any:
    if not distances:
        return _nothing
    distance = distances[0]
    if count == 1:
        rest = _deal(distances[1:], 1)

        def add(numbers, thread):
            numbers[0] += cuda.shfl_xor_sync(-1, numbers[0], distance)
            rest(numbers, thread)

        return add
    half = count // 2
    rest = _deal(distances[1:], half)

    def halve(numbers, thread):
        upper = (thread & uint32(distance)) != uint32(0)
        for i in range(half):
            low, high = numbers[i], numbers[i + half]
            kept = select(upper, high, low)
            numbers[i] = kept + cuda.shfl_xor_sync(-1, select(upper, low, high), distance)
        rest(numbers, thread)

    return halve


def _nothing(numbers, thread):
    pass


def make_first_kept(lanes: int, count: int) -> Any:
    """Build ``first_kept(thread)``: which of the `count` sums of `make_channel_sum` a thread keeps the first of."""
    return _first_kept(channel_distances(lanes), count)


def _first_kept(distances: tuple[int, ...], count: int) -> Any:
    if not distances or count == 1:
        return _first
    distance, half = distances[0], count // 2
    rest = _first_kept(distances[1:], half)

    def first_kept(thread):
        upper = uint32(half) if thread & uint32(distance) else uint32(0)
        return uint32(upper + rest(thread))

    return first_kept


def _first(thread):
    return uint32(0)


def _backward(
    real, data, shape, gated=False, zoh=False, packed=False, by_channel=False, wide=True, wide_maps=True,
    constant_B=False, constant_C=False, resident=1,
):  # fmt: skip
    shape = Shape(*shape)
    dstate, states, lanes, steps = shape
    padded, owners, channels = shape.padded, shape.owners, shape.channels
    turns = steps // owners
    tile = tile_of(shape, data.itemsize, by_channel)
    half = data.itemsize == 2
    lag = 2 if half else 1
    maps = steps * padded
    both = 2 * maps
    step_pitch, channel_pitch, size = tile.step, tile.channel, tile.size
    turn = owners * step_pitch
    stage = size * (4 if gated else 3)
    quad_pitch = 4 * steps + 4
    sums_pitch = 2 * padded
    groups_of_warp = 32 // lanes
    dealt = max(1, 2 * states // groups_of_warp)
    deals = min(groups_of_warp, 2 * states).bit_length() - 1
    copies = sum(channel_distances(lanes)[deals:])  # bits of threads whose sums another thread holds too
    values_size, sums_size, lowest = 2 * states, 4 * owners, float(np.finfo(real).min)
    rows_size, raw_size, widened_size = 2 * stage, 2 * both, 2 * both if half else 4
    quads_size, parts_size = channels * quad_pitch, steps * WARPS * sums_pitch
    history_size = (steps + 1) * states
    begin_rows, copy_rows = make_copy(tile.rows, tile.length, tile.pitch, data.itemsize, wide)
    is_there = is_present if packed else is_within
    begin_maps, copy_maps = make_copy(steps, padded, padded, data.itemsize, wide_maps, is_there)
    place, scatter_sum, lane_sum = make_place(lanes), make_scatter_sum(lanes, owners), make_lane_sum(lanes, owners)
    channel_sum, first_kept = make_channel_sum(lanes, 2 * states), make_first_kept(lanes, 2 * states)
    load_states, decay_rate = LOAD_STATES[states], make_decay_rate(real)
    first_map, end_map = maps if constant_B else 0, maps if constant_C else both
    fills = -(-(end_map - first_map) // (4 * THREADS))
    part_rounds = -(-steps * sums_pitch // THREADS)

    def widen(raw, widened, at, thread):
        """Turn a tile's B and C into float32, which every channel needs."""
        for r in range(fills):
            i = uint32((thread + uint32(r * THREADS)) * uint32(4) + uint32(first_map))
            if i < uint32(end_map):
                store4(widened, at + i, load4(raw, at + i))

    def load_B(maps_at, step, factor):
        if constant_B:
            return factor
        return load_states(maps_at, step * padded)

    def load_C(maps_at, step, factor):
        if constant_C:
            return factor
        return load_states(maps_at, maps + step * padded)

    def advance(registers, context, step):
        """One step forward again: the state after it joins the history."""
        history, rate, a, g, dA, factors, values, sums = registers
        channel_quads, maps_at, parts_at, mark_at, marks_step, rest, thread = context
        dt, inflow = load2(channel_quads, 4 * step)
        Bs = load_B(maps_at, step, factors[0])
        begins = packed and load_mark(mark_at, marks_step, uint32(step), rest) == FRESH
        for n in range(states):
            before = history[step * states + n]
            if packed:
                before = select(begins, cast(0, dt), before)
            flow = inflow * Bs[n]
            if zoh:
                flow = flow * phi(dt * a[n])
            x = dt * rate[n]
            history[(step + 1) * states + n] = state_step(decay_factor(exp2(x), x), x, before, flow)

    def retreat(registers, context, step):
        """One step back: g_t = C_t dy_t + a_{t+1} g_{t+1}, and what every gradient takes from it."""
        history, rate, a, g, dA, factors, values, sums = registers
        channel_quads, maps_at, parts_at, mark_at, marks_step, rest, thread = context
        dt, inflow, dy, _ = load4(channel_quads, 4 * step)
        Bs, Cs = load_B(maps_at, step, factors[0]), load_C(maps_at, step, factors[1])
        zero = cast(0, dt)
        y, dinflow, drate, dfirst = zero, zero, zero, zero
        begins = packed and load_mark(mark_at, marks_step, uint32(step), rest) == FRESH
        for n in range(states):
            h = history[(step + 1) * states + n]
            y = readout(Cs[n], h, y)
            values[states + n] = dy * h
            g_n = fma(dy, Cs[n], g[n])
            exponent = dt * rate[n]
            factor = decay_factor(exp2(exponent), exponent)
            share = g_n * inflow
            if zoh:
                x = dt * a[n]
                Bg = g_n * Bs[n]
                response = phi(x)
                dinflow = fma(Bg, response, dinflow)
                dfirst = fma(Bg, decay_of(factor, exponent), dfirst)  # phi + x phi' = e^x: its two terms would cancel
                dA[n] = fma(Bg * inflow * dt, phi_derivative(x), dA[n])
                share = share * response
            else:
                dinflow = fma(g_n, Bs[n], dinflow)
            values[n] = share
            g_n = decayed(factor, exponent, g_n)
            g[n] = g_n
            before = history[step * states + n]
            if packed:
                before, g[n] = select(begins, zero, before), select(begins, zero, g_n)
            p = g_n * before
            drate = fma(p, rate[n], drate)
            dA[n] = fma(p, dt, dA[n])
        if constant_B:
            for n in range(states):
                factors[2][n] += values[n]
        if constant_C:
            for n in range(states):
                factors[3][n] += values[states + n]
        i = step & (owners - 1)
        sums[i] = y
        sums[owners + i] = dinflow
        sums[2 * owners + i] = drate
        sums[3 * owners + i] = dfirst
        channel_sum(values, thread)
        if thread & uint32(copies) == uint32(0):
            for j in range(dealt):
                column = j if j < states else padded - states + j
                store(parts_at, step * WARPS * sums_pitch + column, values[j])

    def load_mark(mark_at, marks_step, step, rest):
        return load(mark_at, int64(step) * marks_step) if step < rest else NORMAL

    def own_sum(sums, which, thread):
        """The sum over the lanes of a channel, for this lane's own step."""
        numbers = cuda.local.array(owners, real)
        for i in range(owners):
            numbers[i] = sums[which * owners + i]
        return scatter_sum(numbers, thread)

    def remaining(length, tile):
        """Steps from the start of a tile on; none of a tile before the first."""
        left = int32(length) - int32(tile) * int32(steps)
        return uint32(left) if tile >= int32(0) and left > int32(0) else uint32(0)

    advance_all = unrolled(advance, steps)
    retreat_turn = unrolled(retreat, owners, backwards=True)

    def finish(registers, context, g):
        """Finish the step of a turn that is this lane's own."""
        steps_context, own_context = context
        row_at, own_quads, outputs, output_steps, own, stores, skip, totals = own_context
        du_at, ddelta_at, dz_at = outputs
        du_step, ddelta_step, dz_step = output_steps
        sums = registers[7]
        rest, thread = steps_context[5], steps_context[6]
        y, dinflow, drate = own_sum(sums, 0, thread), own_sum(sums, 1, thread), own_sum(sums, 2, thread)
        dt, _, dy, slope = load4(own_quads, 4 * g * owners)
        x = load(row_at, g * turn)
        step = uint32(own + uint32(g * owners))
        if packed:
            absent = load_mark(steps_context[3], steps_context[4], step, rest) == ABSENT
            x = select(absent, cast(0, x), x)
        if zoh:
            ddt = fma(drate, cast(LN2, x), own_sum(sums, 3, thread) * x)
        else:
            ddt = fma(drate, cast(LN2, x), dinflow * x)
        ddelta = ddt * slope
        du, dz = fma(dinflow, dt, dy * skip), cast(0, x)
        if gated:
            cotangent = load(row_at, g * turn + 3 * size)
            dz = cotangent * fma(skip, x, y) * silu_derivative(load(row_at, g * turn + 2 * size))
        if packed:
            zero = cast(0, x)
            du, ddelta, dz = select(absent, zero, du), select(absent, zero, ddelta), select(absent, zero, dz)
        if stores and step < rest:
            store(du_at, int64(g * owners) * du_step, du)
            store(ddelta_at, int64(g * owners) * ddelta_step, ddelta)
            if gated:
                store(dz_at, int64(g * owners) * dz_step, dz)
            totals[0] = fma(dy, x, totals[0])
            totals[1] += ddelta

    def turn_back(registers, context, g):
        """Go back over the steps of turn `g`, then finish the one that is this lane's own."""
        retreat_turn(registers, context[0], g * owners)
        finish(registers, context, g)

    retreat_all = unrolled(turn_back, turns, backwards=True)

    def backward(
        u: Data, delta: Data, A: Wide, B: Data, C: Data, D: Wide, z: Data, bias: Wide, dout: Data, entering: Wide,
        marks: Flags, checkpoints: Wide, du: Data, ddelta: Data, dz: Data, dinitial: Wide, map_parts: Wide,
        A_parts: Wide, factor_parts: Wide, channel_parts: Wide,
        u_batch: Stride, u_step: Stride, u_dim: Stride, delta_batch: Stride, delta_step: Stride, delta_dim: Stride,
        z_batch: Stride, z_step: Stride, z_dim: Stride, dout_batch: Stride, dout_step: Stride, dout_dim: Stride,
        du_batch: Stride, du_step: Stride, du_dim: Stride, ddelta_batch: Stride, ddelta_step: Stride,
        ddelta_dim: Stride, dz_batch: Stride, dz_step: Stride, dz_dim: Stride,
        B_batch: Stride, B_group: Stride, B_step: Stride, C_batch: Stride, C_group: Stride, C_step: Stride,
        marks_step: Stride, batch: Size, dim: Size, seqlen: Size, segment: Size, segments: Size, blocks: Size,
        groups: Size, flags: Size,
    ):  # fmt: skip
        """Equation: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, and the gradients that follow from it.
        Threads: a block is (batch row, segment of time, THREADS / lanes channels of one group); see `scan_tile`.
        Owns: du, ddelta, dz of its channels and steps, dinitial of its channels if its segment is the first one; its
        own parts of dB and dC (block, batch, seqlen, 2 padded), of dA and, of constant maps, dB, dC (batch, segment,
        dim, padded), of dD and dbias (batch, segment, dim).
        Saved: the state before every tile; those inside are computed again.
        """
        rows = cuda.shared.array(rows_size, data, 16)
        raw = cuda.shared.array(raw_size, data, 16)
        widened = cuda.shared.array(widened_size, real, 16)
        quads = cuda.shared.array(quads_size, real, 16)
        parts = cuda.shared.array(parts_size, real, 16)
        history = cuda.local.array(history_size, real)
        kept = cuda.local.array(states, real)
        rate = cuda.local.array(states, real)
        a = cuda.local.array(states, real)
        g = cuda.local.array(states, real)
        dA = cuda.local.array(states, real)
        total_dA = cuda.local.array(states, real)
        lost_dA = cuda.local.array(states, real)
        factor_B = cuda.local.array(states, real)
        factor_C = cuda.local.array(states, real)
        dfactor_B = cuda.local.array(states, real)
        dfactor_C = cuda.local.array(states, real)
        values = cuda.local.array(values_size, real)
        sums = cuda.local.array(sums_size, real)
        totals = cuda.local.array(2, real)

        thread = uint32(cuda.threadIdx.x)
        lane, channel = place(thread)
        own, n0 = uint32(lane % uint32(owners)), uint32(lane * uint32(states))
        cell = uint32(cuda.blockIdx.x)
        block, s, b = uint32(cell % blocks), uint32(cell // blocks % segments), int64(cell // blocks // segments)
        per_group = uint32(blocks // groups)
        group = uint32(block // per_group)
        group_dim = uint32(dim // groups)
        d0 = uint32(group * group_dim + block % per_group * uint32(channels))
        left = uint32(uint32(group + uint32(1)) * group_dim - d0)
        d, here = uint32(d0 + channel), channel < left
        t0 = uint32(s * segment)
        length = min(segment, uint32(seqlen - t0))
        tiles = int32((length + uint32(steps - 1)) // uint32(steps))

        zero = cast(0, load(A, 0))
        state_at = ((b * int64(segments) + int64(s)) * int64(dim) + int64(d)) * int64(padded) + int64(n0)
        # the states that enter a segment from behind are in the order in which time is walked: backwards
        from_behind = int64(segments) - int64(1) - int64(s)
        back_at = ((b * int64(segments) + from_behind) * int64(dim) + int64(d)) * int64(padded) + int64(n0)
        for n in range(states):
            g[n], a[n], factor_B[n], factor_C[n] = zero, zero, zero, zero
            dfactor_B[n], dfactor_C[n], total_dA[n], lost_dA[n] = zero, zero, zero, zero
            if here and uint32(n0 + uint32(n)) < uint32(dstate):
                at = int64(d) * int64(dstate) + int64(n0) + int64(n)
                a[n] = load(A, at)
                if flags & uint32(ENTERING):
                    g[n] = load(entering, back_at + int64(n))
                if constant_B:
                    factor_B[n] = load(B, at)
                if constant_C:
                    factor_C[n] = load(C, at)
            rate[n] = decay_rate(a[n])
            a[n] = select(a[n] < cast(lowest, zero), cast(lowest, zero), a[n])
        skip, shift_by = zero, zero
        if here and flags & uint32(SKIP):
            skip = load(D, int64(d))
        if here and flags & uint32(BIAS):
            shift_by = load(bias, int64(d))
        softplus_on = flags & uint32(SOFTPLUS)
        totals[0], totals[1] = zero, zero

        u_row, u_place = (u_dim, u_step) if by_channel else (u_step, u_dim)
        delta_row, delta_place = (delta_dim, delta_step) if by_channel else (delta_step, delta_dim)
        z_row, z_place = (z_dim, z_step) if by_channel else (z_step, z_dim)
        dout_row, dout_place = (dout_dim, dout_step) if by_channel else (dout_step, dout_dim)
        last = int64(t0) + int64(tiles - int32(1)) * int64(steps)
        first = last + int64((lag - 1) * steps)
        u_at = begin_rows(shift(u, b * u_batch + first * u_step + int64(d0) * u_dim), u_row, u_place, thread)
        delta_at = shift(delta, b * delta_batch + first * delta_step + int64(d0) * delta_dim)
        delta_at = begin_rows(delta_at, delta_row, delta_place, thread)
        z_at = begin_rows(shift(z, b * z_batch + first * z_step + int64(d0) * z_dim), z_row, z_place, thread)
        dout_at = shift(dout, b * dout_batch + first * dout_step + int64(d0) * dout_dim)
        dout_at = begin_rows(dout_at, dout_row, dout_place, thread)
        B_at, C_at = B, C
        if not constant_B:
            B_at = begin_maps(shift(B, b * B_batch + int64(group) * B_group + last * B_step), B_step, int64(1), thread)
        if not constant_C:
            C_at = begin_maps(shift(C, b * C_batch + int64(group) * C_group + last * C_step), C_step, int64(1), thread)
        du_at = shift(du, b * du_batch + (last + int64(own)) * du_step + int64(d) * du_dim)
        ddelta_at = shift(ddelta, b * ddelta_batch + (last + int64(own)) * ddelta_step + int64(d) * ddelta_dim)
        dz_at = shift(dz, b * dz_batch + (last + int64(own)) * dz_step + int64(d) * dz_dim)
        mark_at = shift(marks, b * int64(seqlen) + last * marks_step) if packed else marks
        coming_marks = mark_at
        interval = b * int64((seqlen + uint32(steps - 1)) // uint32(steps)) + last // int64(steps)
        saved_at = shift(checkpoints, (interval * int64(dim) + int64(d)) * int64(padded) + int64(n0))
        map_at = shift(map_parts, ((int64(block) * int64(batch) + b) * int64(seqlen) + last) * int64(sums_pitch))
        channel_quads = shift(quads, channel * uint32(quad_pitch))
        own_quads = shift(channel_quads, own * uint32(4))
        own_at = own * uint32(step_pitch) + channel * uint32(channel_pitch)
        stores = here and lane < uint32(owners)
        # where the sums over channels belong that are the thread's own to keep
        kept_first = first_kept(thread)
        parts_at = shift(parts, thread // uint32(32) * uint32(sums_pitch) + n0 + (
            kept_first if kept_first < uint32(states) else kept_first + uint32(padded - states)))

        for n in range(states):
            kept[n] = zero
            if here:
                kept[n] = load(saved_at, n)
        k = int32(0)
        end = tiles + int32(lag)
        while k < end:
            # what the last round of the loop asked for is there, and what it read may be overwritten
            wait_async(0)
            cuda.syncthreads()
            odd = uint32(k & int32(1))
            even = uint32(uint32(1) - odd)
            asked = int32(lag - 1)
            coming = remaining(length, tiles - int32(1) - k + asked) if k >= asked else uint32(0)
            rows_left, places_left = (left, coming) if by_channel else (coming, left)
            at = odd * uint32(stage)
            copy_rows(rows, at, u_at, u_row, u_place, rows_left, places_left, thread, zero)
            copy_rows(rows, at + uint32(size), delta_at, delta_row, delta_place, rows_left, places_left, thread, zero)
            if gated:
                copy_rows(rows, at + uint32(2 * size), z_at, z_row, z_place, rows_left, places_left, thread, zero)
                z_at = shift(z_at, -int64(steps) * z_step)
            dout_to = at + uint32(stage - size)
            copy_rows(rows, dout_to, dout_at, dout_row, dout_place, rows_left, places_left, thread, zero)
            u_at, delta_at = shift(u_at, -int64(steps) * u_step), shift(delta_at, -int64(steps) * delta_step)
            dout_at = shift(dout_at, -int64(steps) * dout_step)
            coming = remaining(length, tiles - int32(1) - k)
            wanted = (coming, coming_marks, marks_step) if packed else coming
            at = odd * uint32(both)
            if not constant_B:
                copy_maps(raw, at, B_at, B_step, int64(1), wanted, uint32(dstate), thread, zero)
                B_at = shift(B_at, -int64(steps) * B_step)
            if not constant_C:
                copy_maps(raw, at + uint32(maps), C_at, C_step, int64(1), wanted, uint32(dstate), thread, zero)
                C_at = shift(C_at, -int64(steps) * C_step)
            if packed:
                coming_marks = shift(coming_marks, -int64(steps) * marks_step)
            commit_async()
            if half and k > int32(0):
                widen(raw, widened, even * uint32(both), thread)
            rest = remaining(length, tiles - int32(1) - k + int32(lag)) if k >= int32(lag) else uint32(0)
            k = int32(k + int32(1))
            if rest == uint32(0):
                continue
            rest = min(rest, uint32(steps))

            for n in range(states):
                history[n] = kept[n]
                dA[n] = zero
            saved_at = shift(saved_at, -int64(dim) * int64(padded))
            if here and k < end:
                for n in range(states):
                    kept[n] = load(saved_at, n)
            row_at = shift(rows, even * uint32(stage) + own_at)
            for i in range(turns):
                x = load(row_at, i * turn + size) + shift_by
                dt, slope = x, cast(1, x)
                if softplus_on:
                    dt, slope = softplus(x), sigmoid(x)
                dy = load(row_at, i * turn + stage - size)
                if gated:
                    dy = dy * silu(load(row_at, i * turn + 2 * size))
                there = uint32(own + uint32(i * owners)) < rest
                if packed:
                    there = there and load_mark(mark_at, marks_step, uint32(own + uint32(i * owners)), rest) != ABSENT
                inflow = select(there, dt * load(row_at, i * turn), zero)
                dt, dy = select(there, dt, zero), select(there, dy, zero)
                if lane < uint32(owners):
                    store4(own_quads, 4 * i * owners, (dt, inflow, dy, slope))
            cuda.syncwarp()

            maps_at = shift(widened, odd * uint32(both) + n0) if half else shift(raw, even * uint32(both) + n0)
            registers = (history, rate, a, g, dA, (factor_B, factor_C, dfactor_B, dfactor_C), values, sums)
            steps_context = (channel_quads, maps_at, parts_at, mark_at, marks_step, rest, thread)
            own_context = (
                row_at, own_quads, (du_at, ddelta_at, dz_at), (du_step, ddelta_step, dz_step), own, stores, skip,
                totals,
            )  # fmt: skip
            advance_all(registers, steps_context, 0)
            retreat_all(registers, (steps_context, own_context), 0)
            du_at, ddelta_at = shift(du_at, -int64(steps) * du_step), shift(ddelta_at, -int64(steps) * ddelta_step)
            dz_at = shift(dz_at, -int64(steps) * dz_step)
            for n in range(states):
                # Kahan's sum: a tile's share must not drown in that of thousands
                share = dA[n] - lost_dA[n]
                total = total_dA[n] + share
                lost_dA[n] = (total - total_dA[n]) - share
                total_dA[n] = total
            if packed:
                mark_at = shift(mark_at, -int64(steps) * marks_step)
            if not (constant_B and constant_C):
                cuda.syncthreads()
                for r in range(part_rounds):
                    i = uint32(thread + uint32(r * THREADS))
                    if i < min(rest, uint32(steps)) * uint32(sums_pitch):
                        step, column = i // uint32(sums_pitch), i % uint32(sums_pitch)
                        from_ = shift(parts, step * uint32(WARPS * sums_pitch) + column)
                        part = load(from_, 0)
                        for w in range(1, WARPS):
                            part += load(from_, w * sums_pitch)
                        store(map_at, i, part)
                map_at = shift(map_at, -int64(steps * sums_pitch))
        for n in range(states):
            if here:
                store(A_parts, state_at + int64(n), total_dA[n])
                if constant_B:
                    store(factor_parts, state_at + int64(n), dfactor_B[n])
                if constant_C:
                    half_way = int64(batch) * int64(segments) * int64(dim) * int64(padded)
                    store(factor_parts, half_way + state_at + int64(n), dfactor_C[n])
                if s == uint32(0) and uint32(n0 + uint32(n)) < uint32(dstate):
                    store(dinitial, (b * int64(dim) + int64(d)) * int64(dstate) + int64(n0) + int64(n), g[n])
        dD, dbias = lane_sum(totals[0]), lane_sum(totals[1])
        if here and lane == uint32(0):
            at = (b * int64(segments) + int64(s)) * int64(dim) + int64(d)
            store(channel_parts, at, dD)
            store(channel_parts, int64(batch) * int64(segments) * int64(dim) + at, dbias)

    return backward


def _shipped(dtype: np.dtype) -> list[dict[str, Any]]:
    """Return what a layer runs; for float32 also one of each other kind."""

    def kernel(dstate: int = 16, resident: int = 3, **changes: Any) -> dict[str, Any]:
        shape = tuple(division(dstate, dtype.itemsize, backward=True))
        return {"shape": (shape,), "resident": resident, **USUAL, **changes}

    if dtype == np.float64:
        return [kernel(resident=1)]
    if dtype != np.float32:
        return [kernel(resident=4), kernel()]
    return [
        kernel(),
        kernel(resident=4),
        kernel(resident=2, zoh=True, gated=False),
        kernel(resident=2, packed=True),
        kernel(by_channel=True, constant_B=True, constant_C=True),
        kernel(256, resident=1),
    ]


BACKWARD = Kernel(_backward, THREADS, blocks=resident_of, shipped=_shipped, others=True)
