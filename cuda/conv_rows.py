"""The causal convolution where channels lie side by side: a thread walks through time with 16 bytes of channels.

A thread owns the channels of one 16-byte access and a stretch of steps. It keeps the last ``width - 1`` inputs in
registers, so a stretch reads its inputs once, and the ``width - 1`` before it once more. The next `DEPTH` steps are on
their way into shared memory, where every thread has places of its own: nobody waits for another. A block is `columns`
threads along the channels by ``THREADS / columns`` stretches.

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
    activation_of,
    lanes_of,
    make_add_stretches,
    make_fetch,
    make_load_history,
    make_load_weights,
    make_place,
    make_row_access,
)  # fmt: skip
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, commit_async, cuda, load, shift, store, wait_async
from npmamba.cuda.launch import Kernel
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import fma

uint32, int64 = np.uint32, np.int64


def _forward(real, data, width, packed):
    lanes, lag, number, depth = lanes_of(data), width - 1, real.type, 3
    weights_size, window_size = (width + 1) * lanes, (lag + STEPS) * lanes
    ring_size, ahead = depth * STEPS * THREADS * lanes, depth - 1
    load_row, store_row = make_row_access(lanes)
    place, load_weights = make_place(lanes), make_load_weights(real, width, lanes)
    load_history, (find, fetch) = make_load_history(real, width, lanes, packed), make_fetch(lanes, packed)
    silu, _ = activation_of(data)

    def step(i, s, s1, total, options, entries_at, ring, place, y_at, y_step, weights, window, q):
        t = uint32(s + i)
        if t < s1:
            entry = load(entries_at, t) if packed else int64(t)
            if packed and is_fresh(entry):
                for j in range(lag * lanes):
                    window[i * lanes + j] = number(0)
            load_row(ring, uint32(place + i * uint32(THREADS * lanes)), window, lag + i)
            for j in range(lanes):
                q[j] = weights[width * lanes + j]
                for k in range(width):
                    q[j] = fma(weights[k * lanes + j], window[(i + k) * lanes + j], q[j])
            if options & uint32(SILU):
                for j in range(lanes):
                    q[j] = silu(q[j])
            if packed and t >= total:
                for j in range(lanes):
                    q[j] = number(0)
            store_row(shift(y_at, position(entry) * y_step), uint32(0), q, 0)

    def conv_rows_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, entries: Long, totals: Long, y: Data, last: Wide,
        x_batch: Stride, x_step: Stride, y_batch: Stride, y_step: Stride, dim: Size, seqlen: Size, stretch: Size,
        stretches: Size, lines: Size, columns: Size, column_blocks: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: a thread is 16 bytes of channels and a stretch of steps, a loop over `STEPS` at a time.
        Owns: y of its steps and channels; `last` of its channels if the last step is in its stretch.
        Saved: nothing.
        """
        ring = cuda.shared.array(ring_size, data, 16)
        weights = cuda.local.array(weights_size, real)
        window = cuda.local.array(window_size, real)
        q, places = cuda.local.array(lanes, real), cuda.local.array(STEPS, PLACE)
        d, line = place(dim, columns, column_blocks)
        if d >= dim or line >= lines:
            return
        b = line // stretches
        s0 = uint32(uint32(line - b * stretches) * stretch)
        s1 = min(uint32(s0 + stretch), seqlen)
        total = uint32(load(totals, b)) if packed else seqlen
        entries_at = shift(entries, int64(b) * int64(seqlen))
        x_at, y_at = shift(x, int64(b) * x_batch + int64(d)), shift(y, int64(b) * y_batch + int64(d))
        state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
        initial_at = shift(initial, state)
        end = min(s1, total)
        for n in range(ahead):
            first = uint32(s0 + uint32(n * STEPS))
            find(entries_at, first, end, places)
            fetch(ring, uint32(n), first, end, places, x_at, x_step)
            commit_async()
        load_weights(weight, bias, options, d, weights)
        for j in range(window_size):
            window[j] = number(0)
        load_history(x_at, x_step, entries_at, initial_at, options, s0, window)
        s, slot = s0, uint32(0)
        while s < s1:
            free = uint32(ahead) if slot == uint32(0) else uint32(slot - uint32(1))
            first = uint32(s + uint32(ahead * STEPS))
            find(entries_at, first, end, places)
            fetch(ring, free, first, end, places, x_at, x_step)
            commit_async()
            wait_async(ahead)
            at = uint32((slot * uint32(STEPS * THREADS) + uint32(cuda.threadIdx.x)) * uint32(lanes))
            step(uint32(0), s, s1, total, options, entries_at, ring, at, y_at, y_step, weights, window, q)
            step(uint32(1), s, s1, total, options, entries_at, ring, at, y_at, y_step, weights, window, q)
            step(uint32(2), s, s1, total, options, entries_at, ring, at, y_at, y_step, weights, window, q)
            step(uint32(3), s, s1, total, options, entries_at, ring, at, y_at, y_step, weights, window, q)
            for j in range(lag * lanes):
                window[j] = window[STEPS * lanes + j]
            s = uint32(s + uint32(STEPS))
            slot = uint32(0) if slot == uint32(ahead) else uint32(slot + uint32(1))
        if total <= s1 and (total > s0 or s0 == uint32(0)):
            load_history(x_at, x_step, entries_at, initial_at, options, total, window)
            for k in range(lag):
                for j in range(lanes):
                    store(shift(last, state), uint32(j * lag + k), window[k * lanes + j])

    return conv_rows_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={"width": WIDTHS, "packed": (False, True)})


def _backward(real, data, width, packed):
    lanes, lag, number, depth = lanes_of(data), width - 1, real.type, 2
    weights_size, window_size = (width + 1) * lanes, (lag + STEPS) * lanes
    ring_size, sums_size, ahead = depth * STEPS * THREADS * lanes, THREADS * lanes, depth - 1
    load_row, store_row = make_row_access(lanes)
    place, load_weights = make_place(lanes), make_load_weights(real, width, lanes)
    load_history, (find, fetch) = make_load_history(real, width, lanes, packed), make_fetch(lanes, packed)
    add_stretches, (_, silu_derivative) = make_add_stretches(width, lanes), activation_of(data)

    def step(i, s, same, limits, options, pointers, dx_step, ring_x, ring_dout, place, arrays):
        s0, s1, total, end = limits
        entries_at, dx_at, dlast_at = pointers
        weights, window, dq, pending, sums = arrays
        t = uint32(s + i)
        for j in range(lanes):
            pending[(i + lag) * lanes + j] = number(0)
        if t < end:
            if packed and is_fresh(load(entries_at, t)):
                same = uint32(0)
                for j in range(lag * lanes):
                    window[i * lanes + j] = number(0)
            load_row(ring_x, uint32(place + i * uint32(THREADS * lanes)), window, lag + i)
            load_row(ring_dout, uint32(place + i * uint32(THREADS * lanes)), dq, 0)
            if options & uint32(SILU):
                for j in range(lanes):
                    q = weights[width * lanes + j]
                    for k in range(width):
                        q = fma(weights[k * lanes + j], window[(i + k) * lanes + j], q)
                    dq[j] *= silu_derivative(q)
            for k in range(width):
                if not packed or uint32(k) + same >= uint32(lag):
                    for j in range(lanes):
                        at = (i + k) * lanes + j
                        pending[at] = fma(weights[k * lanes + j], dq[j], pending[at])
            if t < s1:
                for j in range(lanes):
                    for k in range(width):
                        sums[k * lanes + j] = fma(dq[j], window[(i + k) * lanes + j], sums[k * lanes + j])
                    sums[width * lanes + j] += dq[j]
            same = min(uint32(same + uint32(1)), uint32(lag))
        elif options & uint32(DLAST) and t >= total and t < uint32(total + uint32(lag)):
            k = uint32(t - total)
            if not packed or k + same >= uint32(lag):
                for j in range(lanes):
                    pending[i * lanes + j] += load(dlast_at, uint32(uint32(j * lag) + k))
        if t >= uint32(s0 + uint32(lag)):
            u = uint32(t - uint32(lag))
            if u < s1:
                at = position(load(entries_at, u)) if packed else int64(u)
                store_row(shift(dx_at, at * dx_step), uint32(0), pending, i)
        return same

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
        ring_x, ring_dout = cuda.shared.array(ring_size, data, 16), cuda.shared.array(ring_size, data, 16)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        window, pending = cuda.local.array(window_size, real), cuda.local.array(window_size, real)
        shared, dq = cuda.shared.array(sums_size, real, 16), cuda.local.array(lanes, real)
        places = cuda.local.array(STEPS, PLACE)
        d, line = place(dim, columns, column_blocks)
        for j in range(weights_size):
            sums[j] = number(0)
        if d < dim and line < lines:
            b = line // stretches
            s0 = uint32(uint32(line - b * stretches) * stretch)
            s1 = min(uint32(s0 + stretch), seqlen)
            total = uint32(load(totals, b)) if packed else seqlen
            end = min(uint32(s1 + uint32(lag)), total)
            limits = (s0, s1, total, end)
            entries_at = shift(entries, int64(b) * int64(seqlen))
            x_at, dx_at = shift(x, int64(b) * x_batch + int64(d)), shift(dx, int64(b) * dx_batch + int64(d))
            dout_at = shift(dout, int64(b) * dout_batch + int64(d))
            state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
            pointers = (entries_at, dx_at, shift(dlast, state))
            find(entries_at, s0, end, places)
            fetch(ring_x, uint32(0), s0, end, places, x_at, x_step)
            fetch(ring_dout, uint32(0), s0, end, places, dout_at, dout_step)
            commit_async()
            load_weights(weight, bias, options, d, weights)
            for j in range(window_size):
                window[j] = number(0)
                pending[j] = number(0)
            same = load_history(x_at, x_step, entries_at, shift(initial, state), options, s0, window)
            s, slot = s0, uint32(0)
            while s < uint32(s1 + uint32(lag)):
                free, first = uint32(uint32(1) - slot), uint32(s + uint32(STEPS))
                find(entries_at, first, end, places)
                fetch(ring_x, free, first, end, places, x_at, x_step)
                fetch(ring_dout, free, first, end, places, dout_at, dout_step)
                commit_async()
                wait_async(ahead)
                at = uint32((slot * uint32(STEPS * THREADS) + uint32(cuda.threadIdx.x)) * uint32(lanes))
                arrays = (weights, window, dq, pending, sums)
                same = step(uint32(0), s, same, limits, options, pointers, dx_step, ring_x, ring_dout, at, arrays)
                same = step(uint32(1), s, same, limits, options, pointers, dx_step, ring_x, ring_dout, at, arrays)
                same = step(uint32(2), s, same, limits, options, pointers, dx_step, ring_x, ring_dout, at, arrays)
                same = step(uint32(3), s, same, limits, options, pointers, dx_step, ring_x, ring_dout, at, arrays)
                if options & uint32(DINITIAL) and s == uint32(0):  # the first `lag` pending ones lie before step 0
                    for k in range(lag):
                        for j in range(lanes):
                            store(shift(dinitial, state), uint32(j * lag + k), pending[k * lanes + j])
                for j in range(lag * lanes):
                    window[j] = window[STEPS * lanes + j]
                    pending[j] = pending[STEPS * lanes + j]
                s = uint32(s + uint32(STEPS))
                slot = uint32(uint32(1) - slot)
        add_stretches(sums, shared, parts, d, line, dim, lines, columns)

    return conv_rows_backward


BACKWARD = Kernel(_backward, threads=THREADS, shipped={"width": WIDTHS, "packed": (False, True)})
