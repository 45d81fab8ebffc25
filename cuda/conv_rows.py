"""The causal convolution where channels lie side by side: a thread walks through time with a few neighbouring channels.

A thread owns `row_lanes` channels and a stretch of steps. It keeps the last ``width - 1`` inputs in registers, so a
stretch reads its inputs once, and the ``width - 1`` before it once more. While it computes a group of `STEPS` steps the
next one or two are on their way to other registers, as words of 32 bits; so are its weights while it waits for the
first. A block is ``1 << column_bits`` threads along the channels, and as many stretches as it has threads for.

Packed sequences come as a list of steps (`npmamba.cuda.schedule.walk`): where a step lies in time, and whether its
sequence begins there. Steps that are padding stand at the end of the list, behind the `total` others.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.conv_parts import (
    DINITIAL,
    DLAST,
    PLACE,
    RESIDENT,
    RESIDENT_BACKWARD,
    RESIDENT_PACKED,
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
    make_take,
    row_lanes,
    row_words,
    short,
)  # fmt: skip
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import fma, select

uint32, int64 = np.uint32, np.int64
GROUPS = {2: 2, 4: 1, 8: 1}
"""Forward, by the bytes of a number: groups of `STEPS` that a loop goes through, and as many are on their way.

Of two by turns each stays in its own registers, where the next of one is moved to those of the last.
"""


def _forward(real, data, width, packed, resident, groups):
    lanes, lag, number = row_lanes(data), width - 1, real.type
    weights_size, window_size = (width + 1) * lanes, (lag + groups * STEPS) * lanes
    group_size, words_size = STEPS * lanes, groups * STEPS * row_words(data)
    _, store_row = make_row_access(lanes)
    place, take = make_place(lanes), make_take(real, width, lanes)
    load_history, (find, fetch, arrive) = make_load_history(real, width, lanes, packed), make_fetch(data, packed)
    silu, _ = activation_of(data)

    def outputs(g, s, total, s1, options, entries_at, weights, window, q):
        """Compute y of the group whose inputs begin in row ``g STEPS`` of the window."""
        first = g * STEPS
        for i in range(STEPS):
            t = uint32(s + uint32(i))
            if packed and t < s1 and is_fresh(load(entries_at, t)):
                for j in range(lag * lanes):
                    window[(first + i) * lanes + j] = number(0)
            for j in range(lanes):
                at = i * lanes + j
                q[at] = weights[width * lanes + j]
                for k in range(width):
                    q[at] = fma(weights[k * lanes + j], window[(first + i + k) * lanes + j], q[at])
        if options & uint32(SILU):
            for j in range(group_size):
                q[j] = silu(q[j])
        for i in range(STEPS):
            if packed and uint32(s + uint32(i)) >= total:
                for j in range(lanes):
                    q[i * lanes + j] = number(0)

    def give(s, s1, entries_at, y_at, y_step, q):
        """Store y of a group; return the pointer to the row of y after it. Mostly all of it is in the stretch."""
        if not packed and uint32(s + uint32(STEPS)) <= s1:
            for i in range(STEPS):
                store_row(shift(y_at, int64(i) * y_step), uint32(0), q, i)
        else:
            for i in range(STEPS):
                t = uint32(s + uint32(i))
                if t < s1:
                    n = position(load(entries_at, t)) if packed else int64(i)
                    store_row(shift(y_at, n * y_step), uint32(0), q, i)
        return y_at if packed else shift(y_at, int64(STEPS) * y_step)

    def conv_rows_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, entries: Long, totals: Long, y: Data, last: Wide,
        x_batch: Stride, x_step: Stride, y_batch: Stride, y_step: Stride, dim: Size, seqlen: Size, stretch: Size,
        stretches: Size, lines: Size, column_bits: Size, column_blocks: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: a thread is some channels and a stretch of steps, a loop over `groups` times `STEPS` at a time.
        Owns: y of its steps and channels; `last` of its channels if the last step is in its stretch.
        Saved: nothing.
        """
        x_step, y_step = short(x_step), short(y_step)
        places, weights = cuda.local.array(STEPS, PLACE), cuda.local.array(weights_size, real)
        window, q = cuda.local.array(window_size, real), cuda.local.array(group_size, real)
        words = cuda.local.array(words_size, WORD)
        d, line = place(column_bits, column_blocks)
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
        s = s0
        for g in range(groups):
            find(entries_at, s, end, places)
            x_to = fetch(x_to, x_step, s, end, places, words, g)
            s = uint32(s + uint32(STEPS))
        find(entries_at, s, end, places)
        take(weight, bias, options, d, weights)
        for j in range(window_size):
            window[j] = number(0)
        if here:
            load_history(x_at, x_step, entries_at, initial_at, options, s0, window)
        s = s0
        while s < s1:
            for g in range(groups):
                arrive(x, words, g, window, lag + g * STEPS)
                following = uint32(s + uint32(groups * STEPS))
                x_to = fetch(x_to, x_step, following, end, places, words, g)
                find(entries_at, uint32(following + uint32(STEPS)), end, places)
                outputs(g, s, total, s1, options, entries_at, weights, window, q)
                y_to = give(s, s1, entries_at, y_to, y_step, q)
                s = uint32(s + uint32(STEPS))
            for j in range(lag * lanes):
                window[j] = window[groups * STEPS * lanes + j]
        if here and total <= s1 and (total > s0 or s0 == uint32(0)):
            load_history(x_at, x_step, entries_at, initial_at, options, total, window)
            for k in range(lag):
                for j in range(lanes):
                    store(shift(last, state), uint32(j * lag + k), window[k * lanes + j])

    return conv_rows_forward


def _blocks(*, resident, **_):
    return resident


def forward_constants(dtype, width, packed):
    """Return the constants of the forward kernel; `resident` blocks are to fit on a multiprocessor."""
    groups = 1 if packed else GROUPS[dtype.itemsize]
    resident = (RESIDENT_PACKED if packed else RESIDENT)[dtype.itemsize]
    return {"width": width, "packed": packed, "resident": resident, "groups": groups}


def backward_constants(dtype, width, packed):
    """Return those of the backward kernel."""
    return {"width": width, "packed": packed, "resident": RESIDENT_BACKWARD[dtype.itemsize]}


def _shipped(constants):
    return lambda dtype: [constants(dtype, width, packed) for width in WIDTHS for packed in (False, True)]


FORWARD = Kernel(_forward, threads=THREADS, blocks=_blocks, shipped=_shipped(forward_constants))


def _backward(real, data, width, packed, resident):
    lanes, lag, number = row_lanes(data), width - 1, real.type
    weights_size, window_size = (width + 1) * lanes, (lag + STEPS) * lanes
    group_size, words_size, sums_size = STEPS * lanes, STEPS * row_words(data), THREADS * lanes
    place, take, (_, store_row) = make_place(lanes), make_take(real, width, lanes), make_row_access(lanes)
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

    def cotangents(i, weights, window, dq):
        """Turn dout of a step into dq, where the activation is on."""
        for j in range(lanes):
            q = weights[width * lanes + j]
            for k in range(width):
                q = fma(weights[k * lanes + j], window[(i + k) * lanes + j], q)
            dq[i * lanes + j] *= silu_derivative(q)

    def add_up(i, window, dq, sums):
        for j in range(lanes):
            at = i * lanes + j
            for k in range(width):
                sums[k * lanes + j] = fma(dq[at], window[(i + k) * lanes + j], sums[k * lanes + j])
            sums[width * lanes + j] += dq[at]

    def step(i, own, s, same, end, entries_at, options, arrays):
        """Work on the i-th step of a group; one that is not `own` counts in the next stretch's sums."""
        weights, window, dq, pending, sums = arrays
        t = uint32(s + uint32(i))
        for j in range(lanes):
            pending[(i + lag) * lanes + j] = number(0)
        if packed and t < end and is_fresh(load(entries_at, t)):
            same = uint32(0)
            for j in range(lag * lanes):
                window[i * lanes + j] = number(0)
        if not packed or t < end:
            if packed and options & uint32(SILU):
                cotangents(i, weights, window, dq)
            spread(i, same, weights, dq, pending)
            if own:
                add_up(i, window, dq, sums)
            same = min(uint32(same + uint32(1)), uint32(lag))
        return same

    def steps(count, own, s, same, end, entries_at, options, arrays):
        """Work on the first `count` steps of a group."""
        weights, window, dq, _, _ = arrays
        if not packed and options & uint32(SILU):  # one branch, in which instructions of all steps can mix
            cotangents(0, weights, window, dq)
            if count > 1:
                cotangents(1, weights, window, dq)
            if count > 2:
                cotangents(2, weights, window, dq)
            if count > 3:
                cotangents(3, weights, window, dq)
        same = step(0, own, s, same, end, entries_at, options, arrays)
        if count > 1:
            same = step(1, own, s, same, end, entries_at, options, arrays)
        if count > 2:
            same = step(2, own, s, same, end, entries_at, options, arrays)
        if count > 3:
            same = step(3, own, s, same, end, entries_at, options, arrays)
        return same

    def add_last(s, total, same, dlast_at, pending):
        """Add the gradient of the last state to the dx of the last steps."""
        for i in range(STEPS):
            k = uint32(s + uint32(i) - total)
            if k < uint32(lag) and (not packed or uint32(k + same) >= uint32(lag)):
                for j in range(lanes):
                    pending[i * lanes + j] += load(dlast_at, uint32(uint32(j * lag) + k))

    def give(s, s0, s1, entries_at, to, dx_step, pending):
        """Store the dx that are complete, of steps `lag` before the group's; mostly all are in the stretch."""
        if not packed and s >= uint32(s0 + uint32(lag)) and uint32(s + uint32(STEPS)) <= uint32(s1 + uint32(lag)):
            for i in range(STEPS):
                store_row(shift(to, int64(i) * dx_step), uint32(0), pending, i)
        else:
            for i in range(STEPS):
                t = uint32(s + uint32(i))
                u = uint32(t - uint32(lag))
                if t >= uint32(s0 + uint32(lag)) and u < s1:
                    n = position(load(entries_at, u)) if packed else int64(i)
                    store_row(shift(to, n * dx_step), uint32(0), pending, i)
        return to if packed else shift(to, int64(STEPS) * dx_step)

    def conv_rows_backward(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, dlast: Wide, entries: Long, totals: Long,
        dx: Data, dinitial: Wide, parts: Wide,
        dout_batch: Stride, dout_step: Stride, x_batch: Stride, x_step: Stride, dx_batch: Stride, dx_step: Stride,
        dim: Size, seqlen: Size, stretch: Size, stretches: Size, lines: Size, column_bits: Size, column_blocks: Size,
        options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
        Threads: as `conv_rows_forward`; step s adds its share to the dx of `lag` steps before it and to its own, and
        the oldest of these is complete. So a stretch goes on for `lag` steps into the next one.
        Owns: dx of its steps and channels, dinitial of its channels if it is the first stretch; the sums of dweight and
        dbias over its steps are added to those of `GROUP` neighbouring stretches, from the first to the last.
        Saved: nothing; q is computed again.
        """
        shared = cuda.shared.array(sums_size, real, 16)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        window, pending = cuda.local.array(window_size, real), cuda.local.array(window_size, real)
        words_x, words_dout = cuda.local.array(words_size, WORD), cuda.local.array(words_size, WORD)
        dq, places = cuda.local.array(group_size, real), cuda.local.array(STEPS, PLACE)
        x_step, dout_step, dx_step = short(x_step), short(dout_step), short(dx_step)
        d, line = place(column_bits, column_blocks)
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
        x_to = fetch(x_to, x_step, s0, end, places, words_x, 0)
        dout_to = fetch(dout_to, dout_step, s0, end, places, words_dout, 0)
        find(entries_at, uint32(s0 + uint32(STEPS)), end, places)
        take(weight, bias, options, d, weights)
        for j in range(window_size):
            window[j] = number(0)
            pending[j] = number(0)
        for j in range(weights_size):
            sums[j] = number(0)
        same = uint32(0)
        if here:
            same = load_history(x_at, x_step, entries_at, shift(initial, state), options, s0, window)
        dlast_at, dinitial_at = shift(dlast, state), shift(dinitial, state)
        arrays = weights, window, dq, pending, sums
        s = s0
        while s < s1:
            arrive(x_to, words_x, 0, window, lag)
            arrive(dout_to, words_dout, 0, dq, 0)
            following = uint32(s + uint32(STEPS))
            x_to = fetch(x_to, x_step, following, end, places, words_x, 0)
            dout_to = fetch(dout_to, dout_step, following, end, places, words_dout, 0)
            find(entries_at, uint32(following + uint32(STEPS)), end, places)
            same = steps(STEPS, True, s, same, end, entries_at, options, arrays)
            if (options & uint32(DLAST)) != uint32(0) and following > total:
                add_last(s, total, same, dlast_at, pending)
            dx_to = give(s, s0, s1, entries_at, dx_to, dx_step, pending)
            if options & uint32(DINITIAL) and s == uint32(0):  # the first `lag` pending ones lie before step 0
                for k in range(lag):
                    for j in range(lanes):
                        store(dinitial_at, uint32(j * lag + k), pending[k * lanes + j])
            for j in range(lag * lanes):
                window[j] = window[group_size + j]
                pending[j] = pending[group_size + j]
            s = following
        if here:
            arrive(x, words_x, 0, window, lag)
            arrive(dout, words_dout, 0, dq, 0)
            same = steps(lag, False, s, same, end, entries_at, options, arrays)
            if options & uint32(DLAST):
                add_last(s, total, same, dlast_at, pending)
            give(s, s0, s1, entries_at, dx_to, dx_step, pending)
        add_stretches(sums, dq, shared, parts, d, line, dim, column_bits, here)

    return conv_rows_backward


BACKWARD = Kernel(_backward, threads=THREADS, blocks=_blocks, shipped=_shipped(backward_constants))
