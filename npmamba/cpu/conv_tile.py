"""The loops of the causal convolution over one tile of time and one vector of channels.

In all of them ``lag = width - 1``; `window` holds the inputs of the tile, each `lag` rows below its step, so that tap k
of step i lies in row ``i + k``; `weights` holds one row per tap, and the bias in the last row. The first tap of a step
is 0 unless its sequence is younger than the window: taps that would reach into another sequence are left out of every
sum. A place is ``(batch row, row of the schedule, first channel, channels left)``, a span ``(first step, steps)``.

Three passes stand here twice: for any width, and for width 4, that of all published models, with the taps in registers.
Both add in the same order and give the same bits.
"""

from __future__ import annotations

from npmamba.cpu.runtime import inner
from npmamba.cpu.simd import load, store
from npmamba.scalar import cast, fma, silu, silu_derivative


@inner
def stage(x, weight, bias, initial, order, place, span, weights, window):
    """Copy the weights, and the inputs of a span and of `lag` steps before; before step 0 lies the initial state."""
    (b, row, d, count), (t0, steps) = place, span
    taps = weight.shape[0]
    for k in range(taps):
        store(weights, (k, 0), load(weight, (k, d), count))
    store(weights, (taps, 0), load(bias, (d,), count))
    for i in range(taps - 1 + steps):
        s = t0 - (taps - 1) + i
        if s < 0:
            store(window, (i, 0), load(initial, (b, taps - 1 + s, d), count))
        else:
            store(window, (i, 0), load(x, (b, order[row, s], d), count))


@inner
def is_plain(first_tap, row, t0, t1):
    """Tell whether all steps from `t0` to ``t1 - 1`` have all their taps."""
    for s in range(t0, t1):
        if first_tap[row, s] != 0:
            return False
    return True


@inner
def weighted_sum(weights, window, i, first):
    """q = bias + sum_k weight_k x_(i - lag + k)"""
    taps = weights.shape[0] - 1
    q = load(weights, (taps, 0))
    for k in range(first, taps):
        q = fma(load(weights, (k, 0)), load(window, (i + k, 0)), q)
    return q


# --- forward ---


@inner
def convolve(window, weights, first_tap, order, place, span, silu_on, out):
    """out = silu(q) or q"""
    (b, row, d, count), (t0, steps) = place, span
    for i in range(steps):
        q = weighted_sum(weights, window, i, first_tap[row, t0 + i])
        if silu_on:
            q = silu(q)
        store(out, (b, order[row, t0 + i], d), q, count)


@inner
def convolve_4(x, window, weights, order, place, span, silu_on, out):
    """`convolve` for width 4; of `window`, only the three inputs before the span are read."""
    (b, row, d, count), (t0, steps) = place, span
    w0, w1, w2, w3 = load(weights, (0, 0)), load(weights, (1, 0)), load(weights, (2, 0)), load(weights, (3, 0))
    bias = load(weights, (4, 0))
    x0, x1, x2 = load(window, (0, 0)), load(window, (1, 0)), load(window, (2, 0))
    for i in range(steps):
        t = order[row, t0 + i]
        x3 = load(x, (b, t, d), count)
        q = fma(w3, x3, fma(w2, x2, fma(w1, x1, fma(w0, x0, bias))))
        if silu_on:
            q = silu(q)
        store(out, (b, t, d), q, count)
        x0, x1, x2 = x1, x2, x3


# --- backward ---


@inner
def load_cotangents(dout, window, weights, first_tap, order, place, span, silu_on, dq):
    """dq = dout silu'(q), or dout"""
    (b, row, d, count), (t0, steps) = place, span
    for i in range(steps):
        cotangent = load(dout, (b, order[row, t0 + i], d), count)
        if silu_on:
            cotangent = cotangent * silu_derivative(weighted_sum(weights, window, i, first_tap[row, t0 + i]))
        store(dq, (i, 0), cotangent)


@inner
def add_weight_gradients(dq, window, first_tap, place, span, sums):
    """dweight_k += sum_i dq_i x_(i - lag + k), dbias += sum_i dq_i"""
    row, (t0, steps), taps = place[1], span, sums.shape[0] - 1
    for i in range(steps):
        cotangent = load(dq, (i, 0))
        for k in range(first_tap[row, t0 + i], taps):
            store(sums, (k, 0), fma(cotangent, load(window, (i + k, 0)), load(sums, (k, 0))))
        store(sums, (taps, 0), load(sums, (taps, 0)) + cotangent)


@inner
def input_gradient(dq, weights, dlast, first_tap, place, t0, s, total):
    """dx_s = sum_k weight_k dq_(s + lag - k), and dlast where the last state holds x_s; row 0 of `dq` is step `t0`."""
    (b, row, d, count), taps = place, weights.shape[0] - 1
    dx = cast(0, load(weights, (taps, 0)))
    kept = s - (total - (taps - 1))
    if kept >= first_tap[row, total]:
        dx = load(dlast, (b, kept, d), count)
    for k in range(taps):
        later = s + taps - 1 - k
        if 0 <= later < total and k >= first_tap[row, later]:
            dx = fma(load(weights, (k, 0)), load(dq, (later - t0, 0)), dx)
    return dx


@inner
def store_input_gradients(dq, weights, dlast, first_tap, order, place, span, total, dx):
    """`input_gradient` of all steps of a span"""
    (b, row, d, count), (t0, steps) = place, span
    for s in range(t0, t0 + steps):
        gradient = input_gradient(dq, weights, dlast, first_tap, place, t0, s, total)
        store(dx, (b, order[row, s], d), gradient, count)


@inner
def load_cotangents_4(dout, window, weights, order, place, span, silu_on, dq, sums):
    """`load_cotangents` and `add_weight_gradients` for width 4"""
    (b, row, d, count), (t0, steps) = place, span
    w0, w1, w2, w3 = load(weights, (0, 0)), load(weights, (1, 0)), load(weights, (2, 0)), load(weights, (3, 0))
    s0, s1, s2, s3 = load(sums, (0, 0)), load(sums, (1, 0)), load(sums, (2, 0)), load(sums, (3, 0))
    bias, dbias = load(weights, (4, 0)), load(sums, (4, 0))
    x0, x1, x2 = load(window, (0, 0)), load(window, (1, 0)), load(window, (2, 0))
    for i in range(steps):
        x3 = load(window, (i + 3, 0))
        cotangent = load(dout, (b, order[row, t0 + i], d), count)
        if silu_on:
            cotangent = cotangent * silu_derivative(fma(w3, x3, fma(w2, x2, fma(w1, x1, fma(w0, x0, bias)))))
        store(dq, (i, 0), cotangent)
        s0, s1 = fma(cotangent, x0, s0), fma(cotangent, x1, s1)
        s2, s3 = fma(cotangent, x2, s2), fma(cotangent, x3, s3)
        dbias = dbias + cotangent
        x0, x1, x2 = x1, x2, x3
    store(sums, (0, 0), s0)
    store(sums, (1, 0), s1)
    store(sums, (2, 0), s2)
    store(sums, (3, 0), s3)
    store(sums, (4, 0), dbias)


@inner
def store_input_gradients_4(dq, weights, order, place, span, dx):
    """`store_input_gradients` for width 4, where three more steps follow the span"""
    (b, row, d, count), (t0, steps) = place, span
    w0, w1, w2, w3 = load(weights, (0, 0)), load(weights, (1, 0)), load(weights, (2, 0)), load(weights, (3, 0))
    g3, g2, g1 = load(dq, (0, 0)), load(dq, (1, 0)), load(dq, (2, 0))
    for i in range(steps):
        g0 = load(dq, (i + 3, 0))
        gradient = fma(w3, g3, fma(w2, g2, fma(w1, g1, fma(w0, g0, cast(0, g0)))))
        store(dx, (b, order[row, t0 + i], d), gradient, count)
        g3, g2, g1 = g2, g1, g0
