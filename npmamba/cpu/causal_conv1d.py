"""CPU twin of `npmamba.ops.causal_conv1d`: Numba loops, forward, backward and one step.

A task is one batch row and one block of channels. Time is walked in tiles of `TILE` steps; the inputs of a tile, and
the ``width - 1`` before it, are staged in the first-level cache, so memory is read once and written once.

Arrays over time arrive as (batch, seqlen, dim) with unit channel stride. Which step comes when is told by `Schedule`.
How far a step looks back is told by its first tap: tap k of step s is the input of step ``s - (width - 1) + k``, and
taps that would reach into another sequence are left out of every loop. Before the
first step lies the initial state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.runtime import (
    Flag,
    Int,
    Read,
    ReadInt,
    Write,
    WriteDouble,
    empty,
    in_order_of,
    inner,
    kernel,
    launch,
    native,
    rows,
    rows_like,
    scratch,
)
from npmamba.cpu.schedule import Schedule, channel_blocks, schedule
from npmamba.cpu.simd import LANES, load, store, width
from npmamba.scalar import cast, fma, silu, silu_derivative
from npmamba.shapes import compute_dtype

TILE = 64
"""Steps per tile."""
BLOCK_VECTORS = 8
"""Vectors of channels per task."""


# --- what the passes share ---


@inner
def _stage(x, initial, order, b, d, row, t0, steps, count, window):
    """Copy the inputs of steps ``t0 - lag .. t0 + steps - 1`` to `window`, where ``lag = width - 1``."""
    lag = initial.shape[1]
    for i in range(lag + steps):
        s = t0 - lag + i
        if s < 0:
            store(window, (i, 0), load(initial, (b, lag + s, d), count))
        else:
            store(window, (i, 0), load(x, (b, order[row, s], d), count))


@inner
def _weighted_sum(weights, window, i, first_tap):
    """bias + sum_k weight_k x_(s - lag + k) for step i of the tile; the bias is the last row of `weights`."""
    taps = weights.shape[0] - 1
    q = load(weights, (taps, 0))
    for k in range(first_tap, taps):
        q = fma(load(weights, (k, 0)), load(window, (i + k, 0)), q)
    return q


@inner
def _load_weights(weight, bias, d, count, weights):
    for k in range(weight.shape[0]):
        store(weights, (k, 0), load(weight, (k, d), count))
    store(weights, (weight.shape[0], 0), load(bias, (d,), count))


# --- forward ---


@kernel
def _forward(
    start: Int,
    stop: Int,
    x: Read[3],
    weight: Read[2],
    bias: Read[1],
    initial: Read[3],
    blocks: ReadInt[2],
    order: ReadInt[2],
    first_tap: ReadInt[2],
    steps_of: ReadInt[1],
    out: Write[3],
    last: Write[3],
    silu_on: Flag,
):
    """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), out = silu(q) or q, lag = width - 1.
    Threads: a task is (batch row, block of channels); loops over tiles of time, channel vectors, time, taps.
    Owns: out and last of its channels; nothing is summed across tasks.
    Saved: nothing.
    """
    w, lag = width(x), initial.shape[1]
    window, weights = scratch((lag + TILE, w), x), scratch((lag + 2, w), x)
    for task in range(start, stop):
        b, block = task // blocks.shape[0], task % blocks.shape[0]
        d0, d1 = blocks[block, 0], blocks[block, 1]
        row = b % order.shape[0]
        total = steps_of[row]
        for t0 in range(0, max(total, 1), TILE):
            steps = min(TILE, total - t0)
            for d in range(d0, d1, w):
                count = d1 - d
                _load_weights(weight, bias, d, count, weights)
                _stage(x, initial, order, b, d, row, t0, steps, count, window)
                for i in range(steps):
                    q = _weighted_sum(weights, window, i, first_tap[row, t0 + i])
                    if silu_on:
                        q = silu(q)
                    store(out, (b, order[row, t0 + i], d), q, count)
                if t0 + steps == total:
                    for k in range(lag):
                        tap = load(window, (steps + k, 0))
                        store(last, (b, k, d), tap if k >= first_tap[row, total] else cast(0, tap), count)


# --- backward ---


@kernel
def _backward(
    start: Int,
    stop: Int,
    dout: Read[3],
    x: Read[3],
    weight: Read[2],
    bias: Read[1],
    initial: Read[3],
    dlast: Read[3],
    blocks: ReadInt[2],
    order: ReadInt[2],
    first_tap: ReadInt[2],
    steps_of: ReadInt[1],
    dx: Write[3],
    dinitial: Write[3],
    dweights: WriteDouble[3],
    silu_on: Flag,
):
    """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
    Threads: a task is (batch row, block of channels); tiles of time are walked backwards.
    Owns: dx and dinitial of its channels; its own part of dweight and dbias (summed over the batch by the caller).
    Saved: nothing; q is computed again.
    """
    w, lag = width(x), initial.shape[1]
    window, dwindow = scratch((lag + TILE, w), x), scratch((lag + TILE, w), x)
    weights, sums = scratch((lag + 2, w), x), scratch((lag + 2, w), x)
    carry = scratch((BLOCK_VECTORS, lag, w), x)
    long = np.empty((BLOCK_VECTORS, lag + 2, w), np.float64)
    for task in range(start, stop):
        b, block = task // blocks.shape[0], task % blocks.shape[0]
        d0, d1 = blocks[block, 0], blocks[block, 1]
        row = b % order.shape[0]
        long[:] = 0.0
        carry[:] = 0.0
        for v in range((d1 - d0 + w - 1) // w):
            for k in range(first_tap[row, steps_of[row]], lag):
                store(carry, (v, k, 0), load(dlast, (b, k, d0 + v * w), d1 - d0 - v * w))
        tiles = (steps_of[row] + TILE - 1) // TILE
        for tile in range(tiles):
            t0 = (tiles - 1 - tile) * TILE
            steps = min(TILE, steps_of[row] - t0)
            for v in range((d1 - d0 + w - 1) // w):
                d = d0 + v * w
                count = d1 - d
                _load_weights(weight, bias, d, count, weights)
                _stage(x, initial, order, b, d, row, t0, steps, count, window)
                dwindow[:steps] = 0.0
                dwindow[steps : steps + lag] = carry[v]
                sums[:] = 0.0
                for j in range(steps):
                    i = steps - 1 - j
                    t, first = order[row, t0 + i], first_tap[row, t0 + i]
                    dq = load(dout, (b, t, d), count)
                    if silu_on:
                        dq = dq * silu_derivative(_weighted_sum(weights, window, i, first))
                    _spread(dq, weights, window, i, first, dwindow, sums)
                    store(dx, (b, t, d), load(dwindow, (i + lag, 0)), count)
                carry[v] = dwindow[:lag]
                for k in range(lag + 2):
                    for lane in range(w):
                        long[v, k, lane] += sums[k, lane]
        for v in range((d1 - d0 + w - 1) // w):
            d, count = d0 + v * w, d1 - d0 - v * w
            for k in range(lag):
                store(dinitial, (b, k, d), load(carry, (v, k, 0)), count)
            for k in range(lag + 2):
                for lane in range(min(w, count)):
                    dweights[b, k, d + lane] = long[v, k, lane]


@inner
def _spread(dq, weights, window, i, first_tap, dwindow, sums):
    """Add what step i of the tile gives to the gradients of its taps, of the weights and of the bias."""
    taps = weights.shape[0] - 1
    for k in range(first_tap, taps):
        store(dwindow, (i + k, 0), fma(load(weights, (k, 0)), dq, load(dwindow, (i + k, 0))))
        store(sums, (k, 0), fma(dq, load(window, (i + k, 0)), load(sums, (k, 0))))
    store(sums, (taps, 0), load(sums, (taps, 0)) + dq)


# --- one step ---


@kernel
def _update(
    start: Int,
    stop: Int,
    state: Write[3],
    x: Read[2],
    weight: Read[2],
    bias: Read[1],
    out: Write[2],
    silu_on: Flag,
):
    """Equation: as `_forward` for one step; the state is shifted by one.
    Threads: a task is a batch row; loops over channel vectors and taps.
    Owns: state and out of its row.
    """
    w, lag = width(x), state.shape[1]
    for b in range(start, stop):
        for d in range(0, x.shape[1], w):
            count = x.shape[1] - d
            newest = load(x, (b, d), count)
            q = load(bias, (d,), count)
            for k in range(lag):
                tap = load(state, (b, k, d), count)
                q = fma(load(weight, (k, d), count), tap, q)
                store(state, (b, k, d), newest if k == lag - 1 else load(state, (b, k + 1, d), count), count)
            q = fma(load(weight, (lag, d), count), newest, q)
            if silu_on:
                q = silu(q)
            store(out, (b, d), q, count)


# --- from the caller's arrays to the kernels' and back ---


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, as they came and as the kernels want them."""

    arguments: tuple[Any, ...]
    prepared: tuple[np.ndarray, ...]
    walk: tuple[np.ndarray, ...]
    silu_on: bool


def _per_channel(x: np.ndarray | None, dim: int, dtype: Any) -> np.ndarray:
    """Return a (dim,) or (dim, width) parameter with its channels side by side, zeros for None."""
    return np.zeros(dim, dtype) if x is None else np.ascontiguousarray(native(x, dtype).T)


def _state(state: np.ndarray | None, shape: tuple[int, int, int], dtype: Any) -> np.ndarray:
    """Return a (batch, dim, width - 1) state as (batch, width - 1, dim), zeros for None."""
    batch, dim, lag = shape
    return np.zeros((batch, lag, dim), dtype) if state is None else rows(state, dtype)


def _first_taps(walk: Schedule, lag: int) -> np.ndarray:
    """Return the first tap of each step that lies in the step's own sequence; the last column is for the last state."""
    if not walk.fresh.any():
        return np.broadcast_to(np.int64(0), (walk.fresh.shape[0], walk.fresh.shape[1] + 1))
    step = np.arange(walk.fresh.shape[1] + 1)
    begins = np.where(np.pad(walk.fresh, ((0, 0), (0, 1))) != 0, step, -lag)
    return np.maximum(np.maximum.accumulate(begins, axis=1) + lag - step, 0)


def _fresh_output(x: np.ndarray, dtype: Any, steps: np.ndarray) -> np.ndarray:
    """Allocate a result like `x`; zeros where padding is skipped, for the kernel does not write there."""
    out = rows_like(x, dtype)
    if (steps < x.shape[2]).any():
        out[...] = 0
    return out


def forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    initial_state: np.ndarray | None,
    *,
    activation: str | None,
    seq_idx: np.ndarray | None,
    reverse: bool,
    save: bool,
) -> tuple[np.ndarray, np.ndarray, Saved | None]:
    """Return y, the last state, and what `backward` needs (None unless `save`). Arguments have been checked."""
    dtype = compute_dtype(x.dtype)
    (batch, dim, seqlen), lag = x.shape, weight.shape[1] - 1
    state = _state(initial_state, (batch, dim, lag), dtype)
    prepared = (rows(x, dtype), _per_channel(weight, dim, dtype), _per_channel(bias, dim, dtype), state)
    order = schedule(seqlen, seq_idx, reverse)
    blocks = channel_blocks(dim, 1, LANES[dtype] * BLOCK_VECTORS)
    walk = (blocks, order.order, _first_taps(order, lag), order.steps)
    out, last = _fresh_output(x, dtype, order.steps), empty((batch, lag, dim), dtype)
    silu_on = activation == "silu"
    launch(_forward, dtype, batch * len(blocks), *prepared, *walk, out, last, silu_on, work=x.size)
    y, last = in_order_of(out, x), np.ascontiguousarray(last.swapaxes(1, 2))
    return y, last, Saved((x, weight, bias, initial_state), prepared, walk, silu_on) if save else None


def backward(dout: np.ndarray | None, dlast_state: np.ndarray | None, saved: Saved) -> tuple[np.ndarray | None, ...]:
    """Return the gradients of x, weight, bias and initial_state, None where one was not given."""
    x, weight, bias, initial_state = saved.arguments
    (batch, dim, seqlen), taps, dtype = x.shape, weight.shape[1], saved.prepared[0].dtype
    cotangent = np.zeros((batch, seqlen, dim), dtype) if dout is None else rows(dout, dtype)
    dlast = _state(dlast_state, (batch, dim, taps - 1), dtype)
    dx, dinitial = _fresh_output(x, dtype, saved.walk[-1]), empty((batch, taps - 1, dim), dtype)
    dweights = empty((batch, taps + 1, dim), np.float64)
    arguments = (cotangent, *saved.prepared, dlast, *saved.walk, dx, dinitial, dweights, saved.silu_on)
    launch(_backward, dtype, batch * len(saved.walk[0]), *arguments, work=x.size)
    dweights = dweights.sum(axis=0)
    return (
        in_order_of(dx, x),
        np.ascontiguousarray(dweights[:taps].T, weight.dtype.newbyteorder("=")),
        None if bias is None else dweights[taps].astype(bias.dtype.newbyteorder("=")),
        None if initial_state is None else np.ascontiguousarray(dinitial.swapaxes(1, 2)),
    )


def update(
    state: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, *, activation: str | None
) -> np.ndarray:
    """Return y of one step and shift `state` in place. Arguments have been checked."""
    dtype, (batch, dim) = compute_dtype(x.dtype), x.shape
    taps = rows(state, dtype)
    out = empty((batch, dim), dtype)
    arguments = (np.ascontiguousarray(x, dtype), _per_channel(weight, dim, dtype), _per_channel(bias, dim, dtype))
    launch(_update, dtype, batch, taps, *arguments, out, activation == "silu", work=x.size)
    if not np.may_share_memory(taps, state):
        state[...] = taps.swapaxes(1, 2)
    return out.astype(x.dtype.newbyteorder("="), copy=False)
