"""CPU twin of `npmamba.ops.causal_conv1d`: Numba loops, forward, backward and one step.

A task is one batch row, one chunk of time and one block of channels. It walks its steps in tiles of `TILE`, whose loops
stand in `npmamba.cpu.conv_tile`; a tile reads the ``width - 1`` inputs before it once more, so chunks know nothing of
each other and the bits of a result do not depend on where time is cut.

Arrays over time arrive as (batch, seqlen, dim) with unit channel stride. Which step comes when is told by `Schedule`;
how far a step may look back in its own sequence is told by its first tap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.conv_tile import (
    add_weight_gradients,
    convolve,
    convolve_4,
    input_gradient,
    is_plain,
    load_cotangents,
    load_cotangents_4,
    stage,
    store_input_gradients,
    store_input_gradients_4,
)
from npmamba.cpu.layout import in_order_of, native, rows, rows_like
from npmamba.cpu.runtime import Flag, Int, Read, ReadInt, Write, empty, inner, kernel, launch, scratch
from npmamba.cpu.schedule import Schedule, channel_blocks, schedule
from npmamba.cpu.simd import LANES, load, store, width
from npmamba.scalar import cast, fma, silu
from npmamba.shapes import compute_dtype

TILE = 16
"""Steps per tile: few, so that the rows of memory that a tile reads and writes come nearly one after the other."""
CHUNK = 128
"""Steps per task, a multiple of `TILE`; their shares of dweight and dbias are added in the kernel's dtype."""
BLOCK_VECTORS = 64
"""Vectors of channels per task."""


@inner
def _place(task, blocks, steps_of, seqlen):
    """Return a task's batch row, row of the schedule, first step and end (there may be none), first channel and end."""
    chunks = max((seqlen + CHUNK - 1) // CHUNK, 1)
    block, b = task % blocks.shape[0], task // blocks.shape[0] // chunks
    row, start = b % steps_of.shape[0], task // blocks.shape[0] % chunks * CHUNK
    return b, row, start, min(start + CHUNK, steps_of[row]), blocks[block, 0], blocks[block, 1]


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
    Threads: a task is (batch row, chunk of time, block of channels); loops over tiles, channel vectors, time, taps.
    Owns: out of its steps and channels, and last if it is the first chunk; nothing is summed across tasks.
    Saved: nothing.
    """
    w, lag = width(x), initial.shape[1]
    window, weights = scratch((lag + TILE, w), x), scratch((lag + 2, w), x)
    for task in range(start, stop):
        b, row, s0, s1, d0, d1 = _place(task, blocks, steps_of, x.shape[1])
        for t0 in range(s0, s1, TILE):
            span = (t0, min(TILE, s1 - t0))
            fast = lag == 3 and is_plain(first_tap, row, t0, t0 + span[1])
            for d in range(d0, d1, w):
                place = (b, row, d, d1 - d)
                staged = (t0, 0) if fast else span
                stage(x, weight, bias, initial, order, place, staged, weights, window)
                if fast:
                    convolve_4(x, window, weights, order, place, span, silu_on, out)
                else:
                    convolve(window, weights, first_tap, order, place, span, silu_on, out)
        if s0 == 0:
            total = steps_of[row]
            for d in range(d0, d1, w):
                stage(x, weight, bias, initial, order, (b, row, d, d1 - d), (total, 0), weights, window)
                for k in range(lag):
                    tap = load(window, (k, 0))
                    store(last, (b, k, d), tap if k >= first_tap[row, total] else cast(0, tap), d1 - d)


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
    parts: Write[4],
    silu_on: Flag,
):
    """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
    Threads: as `_forward`; tiles of time are walked backwards, with dq of the `lag` steps after a tile at hand.
    Owns: dx of its steps and channels, dinitial if it is the first chunk, and its own part of dweight and dbias
    (summed over batch rows and chunks by the caller).
    Saved: nothing; q is computed again.
    """
    w, lag = width(x), initial.shape[1]
    window, dq = scratch((lag + TILE + lag, w), x), scratch((TILE + lag, w), x)
    weights, sums = scratch((lag + 2, w), x), scratch((BLOCK_VECTORS, lag + 2, w), x)
    after = scratch((BLOCK_VECTORS, lag, w), x)
    for task in range(start, stop):
        b, row, s0, s1, d0, d1 = _place(task, blocks, steps_of, x.shape[1])
        total, vectors = steps_of[row], (d1 - d0 + w - 1) // w
        sums[:] = 0.0
        span = (s1, min(lag, total - s1))
        for v in range(vectors):
            place = (b, row, d0 + v * w, d1 - d0 - v * w)
            stage(x, weight, bias, initial, order, place, span, weights, window)
            load_cotangents(dout, window, weights, first_tap, order, place, span, silu_on, after[v])
        tiles = (s1 - s0 + TILE - 1) // TILE
        for tile in range(tiles):
            t0 = s0 + (tiles - 1 - tile) * TILE
            span = (t0, min(TILE, s1 - t0))
            fast = lag == 3 and t0 + span[1] + lag <= total and is_plain(first_tap, row, t0, t0 + span[1] + lag)
            for v in range(vectors):
                place = (b, row, d0 + v * w, d1 - d0 - v * w)
                stage(x, weight, bias, initial, order, place, span, weights, window)
                for k in range(lag):
                    store(dq, (span[1] + k, 0), load(after, (v, k, 0)))
                if fast:
                    load_cotangents_4(dout, window, weights, order, place, span, silu_on, dq, sums[v])
                    store_input_gradients_4(dq, weights, order, place, span, dx)
                else:
                    load_cotangents(dout, window, weights, first_tap, order, place, span, silu_on, dq)
                    add_weight_gradients(dq, window, first_tap, place, span, sums[v])
                    store_input_gradients(dq, weights, dlast, first_tap, order, place, span, total, dx)
                for k in range(lag):
                    store(after, (v, k, 0), load(dq, (k, 0)))
        for v in range(vectors):
            place = (b, row, d0 + v * w, d1 - d0 - v * w)
            for k in range(lag + 2):
                store(parts, (b, s0 // CHUNK, k, place[2]), load(sums, (v, k, 0)), place[3])
            if s0 == 0:
                stage(x, weight, bias, initial, order, place, (0, 0), weights, window)
                for k in range(lag):
                    gradient = input_gradient(after[v], weights, dlast, first_tap, place, 0, k - lag, total)
                    store(dinitial, (b, k, place[2]), gradient, place[3])


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
    blocks, chunks = channel_blocks(dim, 1, LANES[dtype] * BLOCK_VECTORS), max(-(-seqlen // CHUNK), 1)
    walk = (blocks, order.order, _first_taps(order, lag), order.steps)
    out, last = _fresh_output(x, dtype, order.steps), empty((batch, lag, dim), dtype)
    silu_on = activation == "silu"
    launch(_forward, dtype, batch * chunks * len(blocks), *prepared, *walk, out, last, silu_on, work=x.size)
    y, last = in_order_of(out, x), np.ascontiguousarray(last.swapaxes(1, 2))
    return y, last, Saved((x, weight, bias, initial_state), prepared, walk, silu_on) if save else None


def backward(dout: np.ndarray | None, dlast_state: np.ndarray | None, saved: Saved) -> tuple[np.ndarray | None, ...]:
    """Return the gradients of x, weight, bias and initial_state, None where one was not given."""
    x, weight, bias, initial_state = saved.arguments
    (batch, dim, seqlen), taps, dtype = x.shape, weight.shape[1], saved.prepared[0].dtype
    cotangent = np.zeros((batch, seqlen, dim), dtype) if dout is None else rows(dout, dtype)
    dlast = _state(dlast_state, (batch, dim, taps - 1), dtype)
    dx, dinitial = _fresh_output(x, dtype, saved.walk[-1]), empty((batch, taps - 1, dim), dtype)
    parts = empty((batch, max(-(-seqlen // CHUNK), 1), taps + 1, dim), dtype)
    arguments = (cotangent, *saved.prepared, dlast, *saved.walk, dx, dinitial, parts, saved.silu_on)
    launch(_backward, dtype, batch * parts.shape[1] * len(saved.walk[0]), *arguments, work=x.size)
    dweights = parts.sum(axis=(0, 1), dtype=np.float64)
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
    channels = _per_channel(weight, dim, dtype), _per_channel(bias, dim, dtype)
    arguments = (np.ascontiguousarray(native(x, dtype)), *channels)
    launch(_update, dtype, batch, taps, *arguments, out, activation == "silu", work=x.size)
    if not np.may_share_memory(taps, state):
        state[...] = taps.swapaxes(1, 2)
    return out.astype(x.dtype.newbyteorder("="), copy=False)
