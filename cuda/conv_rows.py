"""The causal convolution where channels lie side by side: a thread walks through time with a few neighbouring channels.

A thread owns `row_lanes` channels and a stretch of steps. It keeps the last ``width - 1`` inputs in registers, so a
stretch reads its inputs once, and the ``width - 1`` before it once more. While it computes a group of `STEPS` steps the
next group is on its way to other registers. A block is `columns` threads along the channels by ``THREADS / columns``
stretches; the weights of its channels come through shared memory.

Packed sequences come as a list of steps (`npmamba.cuda.schedule.walk`): where a step lies in time, and whether its
sequence begins there. Steps that are padding stand at the end of the list, behind the `total` others.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.conv_parts import (
    DINITIAL,
    DLAST,
    PLACE,
    SILU,
    STEPS,
    THREADS,
    WIDTHS,
    WORD,
    activation_of,
    make_add_stretches,
    make_fetch,
    make_load_history,
    make_place,
    make_row_access,
    make_weights,
    row_lanes,
    row_words,
    shared_weights,
)  # fmt: skip
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import fma, select

uint32, int64 = np.uint32, np.int64


def _forward(real, data, width, packed, resident):
    lanes, lag, number = row_lanes(data), width - 1, real.type
    weights_size, window_size, group_size = (width + 1) * lanes, (lag + STEPS) * lanes, STEPS * lanes
    cells_size, ahead_size = shared_weights(width, lanes), STEPS * row_words(data)
    _, store_row = make_row_access(lanes)
    place, (bring, take) = make_place(lanes), make_weights(real, width, lanes)
    load_history, (find, fetch, arrive) = make_load_history(real, width, lanes, packed), make_fetch(data, packed)
    silu, _ = activation_of(data)

    def group(s, s1, total, options, entries_at, y_at, y_step, weights, window, q):
        """Compute and store y of a group; return the pointer to the row of y after it."""
        for i in range(STEPS):
            t = uint32(s + uint32(i))
            if packed and t < s1 and is_fresh(load(entries_at, t)):
                for j in range(lag * lanes):
                    window[i * lanes + j] = number(0)
            for j in range(lanes):
                at = i * lanes + j
                q[at] = weights[width * lanes + j]
                for k in range(width):
                    q[at] = fma(weights[k * lanes + j], window[at + k * lanes], q[at])
        if options & uint32(SILU):
            for j in range(group_size):
                q[j] = silu(q[j])
        for i in range(STEPS):
            t = uint32(s + uint32(i))
            if packed and t >= total:
                for j in range(lanes):
                    q[i * lanes + j] = number(0)
            if t < s1:
                to = shift(y_at, position(load(entries_at, t)) * y_step) if packed else y_at
                store_row(to, uint32(0), q, i)
            if not packed:
                y_at = shift(y_at, y_step)
        return y_at

    def conv_rows_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, entries: Long, totals: Long, y: Data, last: Wide,
        x_batch: Stride, x_step: Stride, y_batch: Stride, y_step: Stride, dim: Size, seqlen: Size, stretch: Size,
        stretches: Size, lines: Size, columns: Size, column_blocks: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: a thread is some channels and a stretch of steps, a loop over `STEPS` at a time.
        Owns: y of its steps and channels; `last` of its channels if the last step is in its stretch.
        Saved: nothing.
        """
        cells, places = cuda.shared.array(cells_size, real, 16), cuda.local.array(STEPS, PLACE)
        weights, window = cuda.local.array(weights_size, real), cuda.local.array(window_size, real)
        q, ahead = cuda.local.array(group_size, real), cuda.local.array(ahead_size, WORD)
        first, d, line = place(dim, columns, column_blocks)
        here = d < dim and line < lines
        d, line = select(here, d, uint32(0)), select(here, line, uint32(0))
        b = line // stretches
        s0 = uint32(uint32(line - b * stretches) * stretch)
        s1 = select(here, min(uint32(s0 + stretch), seqlen), s0)
        total = uint32(load(totals, b)) if packed else seqlen
        end = min(s1, total)
        entries_at = shift(entries, int64(b) * int64(seqlen))
        x_at, y_at = shift(x, int64(b) * x_batch + int64(d)), shift(y, int64(b) * y_batch + int64(d))
        state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
        initial_at = shift(initial, state)
        x_to, y_to = x_at, y_at
        if not packed:
            x_to, y_to = shift(x_at, int64(s0) * x_step), shift(y_at, int64(s0) * y_step)
        find(entries_at, s0, end, places)
        x_to = fetch(x_to, x_step, s0, end, places, ahead)
        find(entries_at, uint32(s0 + uint32(STEPS)), end, places)
        for j in range(window_size):
            window[j] = number(0)
        if here:
            load_history(x_at, x_step, entries_at, initial_at, options, s0, window)
        bring(weight, bias, options, first, dim, columns, cells)
        cuda.syncthreads()
        if here:
            take(cells, columns, weights)
        s = s0
        while s < s1:
            arrive(x, ahead, window, lag)
            following = uint32(s + uint32(STEPS))
            x_to = fetch(x_to, x_step, following, end, places, ahead)
            find(entries_at, uint32(following + uint32(STEPS)), end, places)
            y_to = group(s, s1, total, options, entries_at, y_to, y_step, weights, window, q)
            for j in range(lag * lanes):
                window[j] = window[STEPS * lanes + j]
            s = following
        if here and total <= s1 and (total > s0 or s0 == uint32(0)):
            load_history(x_at, x_step, entries_at, initial_at, options, total, window)
            for k in range(lag):
                for j in range(lanes):
                    store(shift(last, state), uint32(j * lag + k), window[k * lanes + j])

    return conv_rows_forward


def _blocks(width, packed, resident):
    return resident


def forward_constants(dtype, width, packed):
    """Return the constants of the forward kernel; `resident` blocks are to fit on a multiprocessor."""
    return {"width": width, "packed": packed, "resident": 4 if packed or dtype.itemsize == 8 else 5}


def backward_constants(dtype, width, packed):
    """Return those of the backward kernel."""
    return {"width": width, "packed": packed, "resident": 3 if dtype.itemsize == 2 else 2}


def _shipped(constants):
    return lambda dtype: [constants(dtype, width, packed) for width in WIDTHS for packed in (False, True)]


FORWARD = Kernel(_forward, threads=THREADS, blocks=_blocks, shipped=_shipped(forward_constants))


def _backward(real, data, width, packed, resident):
    lanes, lag, number = row_lanes(data), width - 1, real.type
    weights_size, window_size, group_size = (width + 1) * lanes, (lag + STEPS) * lanes, STEPS * lanes
    cells_size, ahead_size, sums_size = shared_weights(width, lanes), STEPS * row_words(data), THREADS * lanes
    place, (bring, take), (_, store_row) = make_place(lanes), make_weights(real, width, lanes), make_row_access(lanes)
    load_history, (find, fetch, arrive) = make_load_history(real, width, lanes, packed), make_fetch(data, packed)
    add_stretches, (_, silu_derivative) = make_add_stretches(width, lanes), activation_of(data)

    def spread(i, same, weights, dq, pending):
        """Add what dq of a step gives to the dx of its own sequence's last `lag` steps and to its own."""
        if not packed or same >= uint32(lag):
            for k in range(width):
                for j in range(lanes):
                    at = (i + k) * lanes + j
                    pending[at] = fma(weights[k * lanes + j], dq[i * lanes + j], pending[at])
        else:
            for k in range(width):
                if uint32(uint32(k) + same) >= uint32(lag):
                    for j in range(lanes):
                        at = (i + k) * lanes + j
                        pending[at] = fma(weights[k * lanes + j], dq[i * lanes + j], pending[at])

    def cotangents(i, options, weights, window, dq):
        """Turn dout of a step into dq; without a branch, so that instructions of neighbouring steps can mix."""
        for j in range(lanes):
            at = i * lanes + j
            q = weights[width * lanes + j]
            for k in range(width):
                q = fma(weights[k * lanes + j], window[at + k * lanes], q)
            dq[at] *= select((options & uint32(SILU)) != uint32(0), silu_derivative(q), number(1))

    def add_up(i, window, dq, sums):
        for j in range(lanes):
            at = i * lanes + j
            for k in range(width):
                sums[k * lanes + j] = fma(dq[at], window[at + k * lanes], sums[k * lanes + j])
            sums[width * lanes + j] += dq[at]

    def make_step(own):
        """Build the work on the i-th step of a group; one that is not `own` counts in the next stretch's sums."""

        def step(i, s, same, limits, pointers, to, dx_step, options, arrays):
            s0, s1, total, end, late = limits
            entries_at, dx_at, dlast_at = pointers
            weights, window, dq, pending, sums = arrays
            t = uint32(s + i)
            for j in range(lanes):
                pending[(i + lag) * lanes + j] = number(0)
            if packed and t < end and is_fresh(load(entries_at, t)):
                same = uint32(0)
                for j in range(lag * lanes):
                    window[i * lanes + j] = number(0)
            if not packed or t < end:
                cotangents(i, options, weights, window, dq)
                spread(i, same, weights, dq, pending)
                if own:
                    add_up(i, window, dq, sums)
                same = min(uint32(same + uint32(1)), uint32(lag))
            if late:
                k = uint32(t - total)
                if k < uint32(lag) and (not packed or uint32(k + same) >= uint32(lag)):
                    for j in range(lanes):
                        pending[i * lanes + j] += load(dlast_at, uint32(uint32(j * lag) + k))
            u = uint32(t - uint32(lag))
            if t >= uint32(s0 + uint32(lag)) and u < s1:
                if packed:
                    to = shift(dx_at, position(load(entries_at, u)) * dx_step)
                store_row(to, uint32(0), pending, i)
            return same, shift(to, dx_step)

        return step

    step, foreign_step = make_step(True), make_step(False)

    def conv_rows_backward(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, dlast: Wide, entries: Long, totals: Long,
        dx: Data, dinitial: Wide, parts: Wide,
        dout_batch: Stride, dout_step: Stride, x_batch: Stride, x_step: Stride, dx_batch: Stride, dx_step: Stride,
        dim: Size, seqlen: Size, stretch: Size, stretches: Size, lines: Size, columns: Size, column_blocks: Size,
        options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
        Threads: as `conv_rows_forward`; step s adds its share to the dx of `lag` steps before it and to its own, and
        the oldest of these is complete. So a stretch goes on for `lag` steps into the next one.
        Owns: dx of its steps and channels, dinitial of its channels if it is the first stretch; the sums of dweight and
        dbias over its steps are added to those of `GROUP` neighbouring stretches, from the first to the last.
        Saved: nothing; q is computed again.
        """
        cells, shared = cuda.shared.array(cells_size, real, 16), cuda.shared.array(sums_size, real, 16)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        window, pending = cuda.local.array(window_size, real), cuda.local.array(window_size, real)
        ahead_x, ahead_dout = cuda.local.array(ahead_size, WORD), cuda.local.array(ahead_size, WORD)
        dq, places = cuda.local.array(group_size, real), cuda.local.array(STEPS, PLACE)
        first, d, line = place(dim, columns, column_blocks)
        here = d < dim and line < lines
        d, line = select(here, d, uint32(0)), select(here, line, uint32(0))
        b = line // stretches
        s0 = uint32(uint32(line - b * stretches) * stretch)
        s1 = select(here, min(uint32(s0 + stretch), seqlen), s0)
        total = uint32(load(totals, b)) if packed else seqlen
        end = select(here, min(uint32(s1 + uint32(lag)), total), uint32(0))
        entries_at = shift(entries, int64(b) * int64(seqlen))
        x_at, dx_at = shift(x, int64(b) * x_batch + int64(d)), shift(dx, int64(b) * dx_batch + int64(d))
        dout_at = shift(dout, int64(b) * dout_batch + int64(d))
        state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
        x_to, dout_to, dx_to = x_at, dout_at, dx_at
        if not packed:
            x_to, dout_to = shift(x_at, int64(s0) * x_step), shift(dout_at, int64(s0) * dout_step)
            dx_to = shift(dx_at, (int64(s0) - int64(lag)) * dx_step)
        find(entries_at, s0, end, places)
        x_to = fetch(x_to, x_step, s0, end, places, ahead_x)
        dout_to = fetch(dout_to, dout_step, s0, end, places, ahead_dout)
        find(entries_at, uint32(s0 + uint32(STEPS)), end, places)
        for j in range(window_size):
            window[j] = number(0)
            pending[j] = number(0)
        for j in range(weights_size):
            sums[j] = number(0)
        same = uint32(0)
        if here:
            same = load_history(x_at, x_step, entries_at, shift(initial, state), options, s0, window)
        bring(weight, bias, options, first, dim, columns, cells)
        cuda.syncthreads()
        if here:
            take(cells, columns, weights)
        pointers, arrays = (entries_at, dx_at, shift(dlast, state)), (weights, window, dq, pending, sums)
        s = s0
        while s < s1:
            arrive(x, ahead_x, window, lag)
            arrive(dout, ahead_dout, dq, 0)
            following = uint32(s + uint32(STEPS))
            x_to = fetch(x_to, x_step, following, end, places, ahead_x)
            dout_to = fetch(dout_to, dout_step, following, end, places, ahead_dout)
            find(entries_at, uint32(following + uint32(STEPS)), end, places)
            limits = (s0, s1, total, end, (options & uint32(DLAST)) != uint32(0) and following > total)
            same, dx_to = step(uint32(0), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            same, dx_to = step(uint32(1), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            same, dx_to = step(uint32(2), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            same, dx_to = step(uint32(3), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            if options & uint32(DINITIAL) and s == uint32(0):  # the first `lag` pending ones lie before step 0
                for k in range(lag):
                    for j in range(lanes):
                        store(shift(dinitial, state), uint32(j * lag + k), pending[k * lanes + j])
            for j in range(lag * lanes):
                window[j] = window[STEPS * lanes + j]
                pending[j] = pending[STEPS * lanes + j]
            s = following
        if here:
            arrive(x, ahead_x, window, lag)
            arrive(dout, ahead_dout, dq, 0)
            limits = (s0, s1, total, end, (options & uint32(DLAST)) != uint32(0))
            same, dx_to = foreign_step(uint32(0), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            if lag > 1:
                same, dx_to = foreign_step(uint32(1), s, same, limits, pointers, dx_to, dx_step, options, arrays)
            if lag > 2:
                same, dx_to = foreign_step(uint32(2), s, same, limits, pointers, dx_to, dx_step, options, arrays)
        add_stretches(sums, dq, shared, parts, d, line, dim, columns, here)

    return conv_rows_backward


BACKWARD = Kernel(_backward, threads=THREADS, blocks=_blocks, shipped=_shipped(backward_constants))
