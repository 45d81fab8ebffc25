"""The causal convolution for every width and every memory: a thread owns one number and goes through its taps.

Neighbouring threads are neighbours along time or along the channels, whichever lie closer in memory. Each kernel reads
what it needs again from the caches; the backward pass keeps dq, the gradient before the activation, for the kernels
after it. The sums have the order of `npmamba.cuda.conv_rows`, and so have the results the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.conv_parts import BIAS, DINITIAL, DLAST, GROUP, INITIAL, PACKED, SILU, activation_of
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import fma

uint32, int64 = np.uint32, np.int64
THREADS = 128


def place(dim, count, along_time):
    """Return a thread's batch row, channel and number below `count`, and whether they are inside."""
    length = count if along_time else dim
    tiles = uint32((length + uint32(THREADS - 1)) // uint32(THREADS))
    block = uint32(cuda.blockIdx.x)
    row = uint32(block // tiles)
    near = uint32(uint32(block - row * tiles) * uint32(THREADS) + uint32(cuda.threadIdx.x))
    other = dim if along_time else count
    b = uint32(row // other)
    far = uint32(row - b * other)
    return b, far if along_time else near, near if along_time else far, near < length


def first_tap(entries_at, options, lag, s, j):
    """Return the first tap of step `s` that lies in its own sequence, which begins `j` or more steps back."""
    first = uint32(0)
    while options & uint32(PACKED) and first == uint32(0) and j < lag and j <= s:
        if is_fresh(load(entries_at, uint32(s - j))):
            first = uint32(lag - j)
        j = uint32(j + uint32(1))
    return first


def time_of(entries_at, options, s):
    """Return where in time step `s` lies."""
    return position(load(entries_at, s)) if options & uint32(PACKED) else int64(s)


def input_before(x_at, x_step, entries_at, initial_at, options, lag, n, zero):
    """Return the input of step ``n - lag``; before step 0 lies the initial state."""
    if n >= lag:
        return load(shift(x_at, time_of(entries_at, options, uint32(n - lag)) * x_step), uint32(0))
    return load(initial_at, n) if options & uint32(INITIAL) else zero


def make_argument(real: Any) -> Any:
    number = real.type

    def argument(x_at, x_step, weight_at, bias, entries_at, initial_at, options, lag, d, s):
        """q = bias + sum_k weight_k x_(s - lag + k)"""
        q = load(bias, d) if options & uint32(BIAS) else number(0)
        k = first_tap(entries_at, options, lag, s, uint32(0))
        while k <= lag:
            tap = input_before(x_at, x_step, entries_at, initial_at, options, lag, uint32(s + k), number(0))
            q = fma(load(weight_at, k), tap, q)
            k = uint32(k + uint32(1))
        return q

    return argument


def _forward(real, data):
    number, argument, (silu, _) = real.type, make_argument(real), activation_of(data)

    def conv_any_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, entries: Long, totals: Long, y: Data, last: Wide,
        x_batch: Stride, x_dim: Stride, x_step: Stride, y_batch: Stride, y_dim: Stride, y_step: Stride,
        dim: Size, seqlen: Size, lag: Size, along_time: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: one for every number of y, and behind them one for every number of `last`.
        Owns: that number.
        Saved: nothing.
        """
        b, d, s, here = place(dim, uint32(seqlen + lag), along_time)
        if here:
            x_at = shift(x, int64(b) * x_batch + int64(d) * x_dim)
            entries_at = shift(entries, int64(b) * int64(seqlen))
            state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
            initial_at = shift(initial, state)
            total = uint32(load(totals, b)) if options & uint32(PACKED) else seqlen
            if s < seqlen:
                q = number(0)
                if s < total:
                    weight_at = shift(weight, int64(d) * int64(lag + uint32(1)))
                    q = argument(x_at, x_step, weight_at, bias, entries_at, initial_at, options, lag, d, s)
                    if options & uint32(SILU):
                        q = silu(q)
                at = time_of(entries_at, options, s)
                store(shift(y, int64(b) * y_batch + int64(d) * y_dim + at * y_step), uint32(0), q)
            else:
                k, tap = uint32(s - seqlen), number(0)
                if k >= first_tap(entries_at, options, lag, total, uint32(1)):
                    n = uint32(total + k)
                    tap = input_before(x_at, x_step, entries_at, initial_at, options, lag, n, number(0))
                store(shift(last, state), k, tap)

    return conv_any_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={})


def _cotangent(real, data):
    argument, (_, silu_derivative) = make_argument(real), activation_of(data)

    def conv_any_cotangent(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, entries: Long, totals: Long, dq: Wide,
        dout_batch: Stride, dout_dim: Stride, dout_step: Stride, x_batch: Stride, x_dim: Stride, x_step: Stride,
        dq_batch: Stride, dq_dim: Stride, dq_step: Stride,
        dim: Size, seqlen: Size, lag: Size, along_time: Size, options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q) or dout.
        Threads: one for every step of every channel.
        Owns: dq of that step, at its place in the list of steps.
        Saved: nothing; q is computed again.
        """
        b, d, s, here = place(dim, seqlen, along_time)
        total = uint32(load(totals, b)) if options & uint32(PACKED) and here else seqlen
        if here and s < total:
            entries_at = shift(entries, int64(b) * int64(seqlen))
            at = time_of(entries_at, options, s)
            g = load(shift(dout, int64(b) * dout_batch + int64(d) * dout_dim + at * dout_step), uint32(0))
            if options & uint32(SILU):
                x_at = shift(x, int64(b) * x_batch + int64(d) * x_dim)
                initial_at = shift(initial, (int64(b) * int64(dim) + int64(d)) * int64(lag))
                weight_at = shift(weight, int64(d) * int64(lag + uint32(1)))
                q = argument(x_at, x_step, weight_at, bias, entries_at, initial_at, options, lag, d, s)
                g *= silu_derivative(q)
            store(shift(dq, int64(b) * dq_batch + int64(d) * dq_dim + int64(s) * dq_step), uint32(0), g)

    return conv_any_cotangent


COTANGENT = Kernel(_cotangent, threads=THREADS, shipped={})


def _inputs(real):
    number = real.type

    def conv_any_inputs(
        dq: Wide, weight: Wide, dlast: Wide, entries: Long, totals: Long, dx: Data, dinitial: Wide,
        dq_batch: Stride, dq_dim: Stride, dq_step: Stride, dx_batch: Stride, dx_dim: Stride, dx_step: Stride,
        dim: Size, seqlen: Size, lag: Size, along_time: Size, options: Size,
    ):  # fmt: skip
        """Equation: dx_s = sum_k weight_k dq_(s + lag - k), from k = lag down; and dlast, if it is in the last state.
        Threads: one for every number of dinitial, which is dx before step 0, and behind them one for every one of dx.
        Owns: that number.
        Saved: nothing.
        """
        b, d, n, here = place(dim, uint32(seqlen + lag), along_time)
        if here:
            total = uint32(load(totals, b)) if options & uint32(PACKED) else seqlen
            entries_at = shift(entries, int64(b) * int64(seqlen))
            dq_at = shift(dq, int64(b) * dq_batch + int64(d) * dq_dim)
            weight_at = shift(weight, int64(d) * int64(lag + uint32(1)))
            state = (int64(b) * int64(dim) + int64(d)) * int64(lag)
            g, j, same = number(0), uint32(0), n < uint32(total + lag)
            while same and j <= lag and n + j < uint32(total + lag):  # step s + j, for n is s + lag
                if n + j >= lag:
                    later = uint32(n + j - lag)
                    if options & uint32(PACKED) and j > uint32(0) and is_fresh(load(entries_at, later)):
                        same = False
                    else:
                        dq_later = load(shift(dq_at, int64(later) * dq_step), uint32(0))
                        g = fma(load(weight_at, uint32(lag - j)), dq_later, g)
                j = uint32(j + uint32(1))
            if options & uint32(DLAST) and same and n >= total:
                g += load(shift(dlast, state), uint32(n - total))
            if n >= lag:
                at = time_of(entries_at, options, uint32(n - lag))
                store(shift(dx, int64(b) * dx_batch + int64(d) * dx_dim + at * dx_step), uint32(0), g)
            elif options & uint32(DINITIAL):
                store(shift(dinitial, state), n, g)

    return conv_any_inputs


INPUTS = Kernel(_inputs, threads=THREADS, shipped={})


def _weights(real):
    number = real.type

    def conv_any_weights(
        dq: Wide, x: Data, initial: Wide, entries: Long, totals: Long, parts: Wide,
        dq_batch: Stride, dq_dim: Stride, dq_step: Stride, x_batch: Stride, x_dim: Stride, x_step: Stride,
        dim: Size, seqlen: Size, stretch: Size, stretches: Size, lines: Size,
        lag: Size, along_time: Size, options: Size,
    ):  # fmt: skip
        """Equation: dweight_k = sum_s dq_s x_(s - lag + k), dbias = sum_s dq_s.
        Threads: one for every weight and bias of every channel, and every part of `GROUP` stretches of time.
        Owns: that sum; the stretches are added from the first to the last.
        Saved: nothing.
        """
        taps = uint32(lag + uint32(2))
        tiles = uint32((int64(dim) * int64(taps) + int64(THREADS - 1)) // int64(THREADS))
        block = uint32(cuda.blockIdx.x)
        part = uint32(block // tiles)
        near = uint32(uint32(block - part * tiles) * uint32(THREADS) + uint32(cuda.threadIdx.x))
        d = uint32(near // taps) if along_time else uint32(near % dim)
        k = uint32(near % taps) if along_time else uint32(near // dim)
        if d < dim and k < taps:
            sums = number(0)
            for g in range(GROUP):
                line, mine = uint32(part * uint32(GROUP) + uint32(g)), number(0)
                if line < lines:
                    b = uint32(line // stretches)
                    s = uint32(uint32(line - b * stretches) * stretch)
                    total = uint32(load(totals, b)) if options & uint32(PACKED) else seqlen
                    end = min(uint32(s + stretch), total)
                    entries_at = shift(entries, int64(b) * int64(seqlen))
                    x_at = shift(x, int64(b) * x_batch + int64(d) * x_dim)
                    dq_at = shift(dq, int64(b) * dq_batch + int64(d) * dq_dim)
                    initial_at = shift(initial, (int64(b) * int64(dim) + int64(d)) * int64(lag))
                    first = first_tap(entries_at, options, lag, s, uint32(1)) if s < end else uint32(0)
                    while s < end:
                        if options & uint32(PACKED) and is_fresh(load(entries_at, s)):
                            first = lag
                        dq_s = load(shift(dq_at, int64(s) * dq_step), uint32(0))
                        if k > lag:
                            mine += dq_s
                        elif k >= first:
                            n = uint32(s + k)
                            tap = input_before(x_at, x_step, entries_at, initial_at, options, lag, n, number(0))
                            mine = fma(dq_s, tap, mine)
                        first = uint32(first - uint32(1)) if first > uint32(0) else first
                        s = uint32(s + uint32(1))
                sums = mine if g == 0 else sums + mine
            store(parts, (int64(part) * int64(taps) + int64(k)) * int64(dim) + int64(d), sums)

    return conv_any_weights


WEIGHTS = Kernel(_weights, threads=THREADS, shipped={})
