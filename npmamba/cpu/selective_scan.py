"""CPU twin of `npmamba.ops.selective_scan`: Numba loops, forward and backward.

A task is one batch row and one block of channels. The forward pass walks time step by step: the states of the block
stay in the first-level cache, and the loops are: step, channel vector, state. The backward pass walks it in tiles of
`TILE` steps that stay in that cache; inside a tile the loops are: channel vector, state, time, so that one state of one
vector of channels lives in a register while it runs through the tile. One kernel serves every dstate, and the order of
every sum is fixed by the tile and block sizes alone.

Time-varying arguments arrive as (batch, seqlen, dim) with unit channel stride. Which step comes when, and where a new
sequence begins, is told by `Schedule`: reversed time, packed sequences and padding cost the loops nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cpu.layout import in_memory_order_of, in_order_of, native, rows, rows_like, transposed
from npmamba.cpu.runtime import Flag, Int, Kernel, Read, ReadInt, Write, WriteDouble, empty, launch, scratch
from npmamba.cpu.scan_row import (
    A_VALUE,
    B_FACTOR,
    C_FACTOR,
    CACHED,
    RATE,
    ROW_SLOTS,
    coefficient_slots,
    largest_rates,
    load_states,
    make_walk,
    store_states,
)
from npmamba.cpu.scan_tile import (
    SLOTS,
    TILE,
    kernel_name,
    load_cotangents,
    load_inputs,
    load_maps,
    make_state_pass_back,
    prefetch_rows,
    segments,
    store_input_gradients,
    store_map_gradients,
)
from npmamba.cpu.schedule import Schedule, channel_blocks, schedule
from npmamba.cpu.simd import LANES, any_lane, load, store, width
from npmamba.scalar import cast, exp2_product, exp2_product_small, magnitude
from npmamba.shapes import compute_dtype

BLOCK_VECTORS = 16
"""Vectors of channels per task."""


def _make_forward(zoh: bool, constant: bool) -> Kernel:
    walk, slots = make_walk(zoh, constant), coefficient_slots(zoh, constant)

    def _forward(
        start: Int,
        stop: Int,
        u: Read[3],
        raw_delta: Read[3],
        A: Read[2],
        A2: Read[2],
        B: Read[4],
        C: Read[4],
        B_factor: Read[2],
        C_factor: Read[2],
        D: Read[1],
        z: Read[3],
        bias: Read[1],
        initial: Read[3],
        blocks: ReadInt[2],
        order: ReadInt[2],
        fresh: ReadInt[2],
        steps_of: ReadInt[1],
        out: Write[3],
        last: Write[3],
        checkpoints: Write[4],
        softplus_on: Flag,
    ):
        """Equation: h_t = exp(delta_t A) h_{t-1} + f_t B_t u_t, y_t = sum_n C_t h_t + D u_t, out = y silu(z).
        Threads: a task is (batch row, block of channels); loops over rows of the block's vectors, time, channel
        vectors, states.
        Owns: out, last and checkpoints of its channels; nothing is summed across tasks.
        Saved: the state before each tile.
        """
        w, dstate = width(u), A.shape[0]
        most = max(1, min(BLOCK_VECTORS, CACHED // dstate))
        kind = most * dstate * w
        h, coefficients = scratch((kind,), u), scratch((slots * kind,), u)
        maps, maps2 = scratch((2 * (dstate + w),), u), scratch((2 * (dstate + w),), u)
        row, largest = scratch((ROW_SLOTS * most * w,), u), scratch((most * w,), u)
        for task in range(start, stop):
            b, block = task // blocks.shape[0], task % blocks.shape[0]
            d0, d1, group = blocks[block, 0], blocks[block, 1], blocks[block, 2]
            line = b % order.shape[0]
            steps = steps_of[line]
            for d in range(d0, d1, most * w):
                vectors = min(most, (d1 - d + w - 1) // w)
                load_states(A2, RATE, slots, d, d1, vectors, coefficients)
                largest_rates(coefficients, slots, dstate, vectors, largest)
                if zoh:
                    load_states(A, A_VALUE, slots, d, d1, vectors, coefficients)
                if constant:
                    load_states(B_factor, B_FACTOR, slots, d, d1, vectors, coefficients)
                    load_states(C_factor, C_FACTOR, slots, d, d1, vectors, coefficients)
                load_states(initial[b], 0, 1, d, d1, vectors, h)
                for t0 in range(0, steps, TILE):
                    if checkpoints.shape[0]:
                        store_states(h, checkpoints[b, t0 // TILE], d, d1, vectors)
                    walk(
                        u, raw_delta, bias, D, z, out, B, C, b, group, order[line], fresh[line], t0,
                        min(t0 + TILE, steps), steps, d, d1, vectors, dstate, h, coefficients, maps, maps2, largest,
                        row, softplus_on,
                    )  # fmt: skip
                store_states(h, last[b], d, d1, vectors)

    return Kernel(_forward, kernel_name("forward", zoh, constant))


def _make_backward(zoh: bool, constant: bool) -> Kernel:
    state_pass_back = make_state_pass_back(zoh, constant, exp2_product)
    state_pass_back_small = make_state_pass_back(zoh, constant, exp2_product_small)

    def _backward(
        start: Int,
        stop: Int,
        dout: Read[3],
        u: Read[3],
        raw_delta: Read[3],
        A: Read[2],
        A2: Read[2],
        B: Read[4],
        C: Read[4],
        B_factor: Read[2],
        C_factor: Read[2],
        D: Read[1],
        z: Read[3],
        bias: Read[1],
        dlast: Read[3],
        checkpoints: Read[4],
        blocks: ReadInt[2],
        order: ReadInt[2],
        fresh: ReadInt[2],
        steps_of: ReadInt[1],
        du: Write[3],
        ddelta: Write[3],
        dz: Write[3],
        dinitial: Write[3],
        dB_parts: Write[4],
        dC_parts: Write[4],
        dA_parts: WriteDouble[4],
        dchannel_parts: WriteDouble[3],
        softplus_on: Flag,
    ):
        """Equation: g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, and the gradients that follow from it.
        Threads: a task is (batch row, block of channels); tiles of time are walked backwards.
        Owns: du, ddelta, dz, dinitial of its channels; its own part of dB, dC (summed over blocks by the caller)
        and of dA, dD, dbias (summed over the batch by the caller).
        Saved: the state before each tile; decays and states inside a tile are computed again.
        """
        w, dstate = width(u), A.shape[0]
        tile_B, tile_C = scratch((dstate * TILE,), u), scratch((dstate * TILE,), u)
        tile = scratch((SLOTS * (TILE + 1) * w,), u)
        dB, dC = scratch((dstate * TILE * w,), u), scratch((dstate * TILE * w,), u)
        carry = scratch((BLOCK_VECTORS, dstate, w), u)
        long = np.empty((BLOCK_VECTORS, 3 * dstate + 2, w), np.float64)
        bounds = np.empty(TILE + 1, np.int64)
        gated = z.shape[0] > 0
        share = (TILE + dstate - 1) // max(dstate, 1)
        for task in range(start, stop):
            b, block = task // blocks.shape[0], task % blocks.shape[0]
            d0, d1, group = blocks[block, 0], blocks[block, 1], blocks[block, 2]
            row = b % order.shape[0]
            vectors = (d1 - d0 + w - 1) // w
            long[:] = 0.0
            for v in range(vectors):
                for n in range(dstate):
                    store(carry, (v, n, 0), load(dlast, (b, n, d0 + v * w), d1 - d0 - v * w))
            tiles = (steps_of[row] + TILE - 1) // TILE
            for k in range(tiles):
                t0 = (tiles - 1 - k) * TILE
                steps = min(TILE, steps_of[row] - t0)
                runs = segments(fresh, row, t0, steps, bounds)
                load_maps(B, C, order, b, group, row, t0, steps, tile_B, tile_C)
                dB[:] = 0.0
                dC[:] = 0.0
                for v in range(vectors):
                    d, count, sums = d0 + v * w, d1 - d0 - v * w, long[v]
                    reach = load_inputs(u, raw_delta, bias, D, order, b, d, row, t0, steps, softplus_on, count, tile)
                    load_cotangents(dout, z, b, d, order, row, t0, steps, count, tile)
                    for n in range(dstate):
                        a, a2 = load(A, (n, d), count), load(A2, (n, d), count)
                        bf, cf = load(B_factor, (n, d), count), load(C_factor, (n, d), count)
                        p0, p1 = max(t0 - TILE, 0) + n * share, min(max(t0 - TILE, 0) + (n + 1) * share, t0)
                        prefetch_rows(u, b, d, order, row, p0, p1)
                        prefetch_rows(raw_delta, b, d, order, row, p0, p1)
                        prefetch_rows(dout, b, d, order, row, p0, p1)
                        prefetch_rows(du, b, d, order, row, p0, p1)
                        prefetch_rows(ddelta, b, d, order, row, p0, p1)
                        if gated:
                            prefetch_rows(z, b, d, order, row, p0, p1)
                            prefetch_rows(dz, b, d, order, row, p0, p1)
                        zero = cast(0, a)
                        g = load(carry, (v, n, 0))
                        for r in range(runs):
                            run = runs - 1 - r
                            lo, hi = bounds[run], bounds[run + 1]
                            first = fresh[row, t0 + lo] != 0
                            h = zero if first else load(checkpoints, (b, t0 // TILE, n, d), count)
                            if any_lane(magnitude(a2) * reach > cast(126, a2)):
                                g = state_pass_back(
                                    h, g, a, a2, bf, cf, tile, tile_B, tile_C, dB, dC, sums, n, lo, hi, gated
                                )
                            else:
                                g = state_pass_back_small(
                                    h, g, a, a2, bf, cf, tile, tile_B, tile_C, dB, dC, sums, n, lo, hi, gated
                                )
                            if first:
                                g = zero
                        store(carry, (v, n, 0), g)
                    store_input_gradients(
                        raw_delta, z, dout, bias, D, b, d, order, row, t0, steps, softplus_on, zoh, count,
                        tile, du, ddelta, dz, sums,
                    )  # fmt: skip
                store_map_gradients(dB, dC, order, row, t0, steps, b, block, dB_parts, dC_parts)
            for v in range(vectors):
                d, count = d0 + v * w, d1 - d0 - v * w
                for n in range(dstate):
                    store(dinitial, (b, n, d), load(carry, (v, n, 0)), count)
                for lane in range(min(w, count)):
                    for n in range(dstate):
                        for q in range(3):
                            dA_parts[q, b, n, d + lane] = long[v, 3 * n + q, lane]
                    for q in range(2):
                        dchannel_parts[q, b, d + lane] = long[v, 3 * dstate + q, lane]

    return Kernel(_backward, kernel_name("backward", zoh, constant))


_RULES = [(zoh, constant) for zoh in (False, True) for constant in (False, True)]
_FORWARD = {rule: _make_forward(*rule) for rule in _RULES}
_BACKWARD = {rule: _make_backward(*rule) for rule in _RULES}
"""A kernel for each discretization, with and without maps B or C that are constant in time."""


# --- from the caller's arrays to the kernels' and back ---


class Prepared(NamedTuple):
    """The arguments as the kernels want them: time-varying ones (batch, seqlen, dim), maps (dstate, dim)."""

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    A2: np.ndarray
    B: np.ndarray
    C: np.ndarray
    B_factor: np.ndarray
    C_factor: np.ndarray
    D: np.ndarray
    z: np.ndarray
    delta_bias: np.ndarray


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, and the state before each tile."""

    arguments: tuple[Any, ...]
    prepared: Prepared
    softplus: bool
    rule: tuple[bool, bool]
    schedule: Schedule
    blocks: np.ndarray
    checkpoints: np.ndarray


def _channels(x: np.ndarray | None, dim: int, dtype: Any) -> np.ndarray:
    return np.zeros(dim, dtype) if x is None else np.ascontiguousarray(native(x, dtype))


def _map(M: np.ndarray, groups: int, shape: tuple[int, int], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Split B or C into a part per step (batch, groups, seqlen, dstate) and a factor per channel (dstate, dim)."""
    batch, seqlen = shape
    M = native(M, dtype)
    if M.ndim == 2:
        ones = np.broadcast_to(dtype.type(1), (batch, groups, seqlen, M.shape[1]))
        return ones, np.ascontiguousarray(M.T)
    steps = (M if M.ndim == 4 else M[:, None]).swapaxes(2, 3)
    steps = steps if steps.shape[1] == groups else np.broadcast_to(steps, (batch, groups, *steps.shape[2:]))
    return steps, np.empty((0, 0), dtype)


def _decay_rates(A: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return A and A log2(e) as (dstate, dim), without minus infinity: its product with delta = 0 must be 0."""
    lowest, log2e = np.finfo(dtype).min, dtype.type(np.log2(np.e))
    A = np.array(native(A, dtype).T, order="C")  # a copy in any case: the backward pass wants both of one A
    with np.errstate(over="ignore"):
        if A.min(initial=0) > lowest / 2:  # as ever: no NaN, and nothing beyond the range
            return A, A * log2e
        A = np.where(np.isnan(A), dtype.type(np.nan), A)  # exp2 keeps this NaN, not every other
        return np.maximum(A, lowest), np.maximum(A * log2e, lowest)


def _states(state: np.ndarray | None, shape: tuple[int, int, int], dtype: Any) -> np.ndarray:
    """Return a (batch, dim, dstate) state as (batch, dstate, dim), zeros for None."""
    batch, dim, dstate = shape
    if state is None:
        return np.broadcast_to(np.zeros(dim, dtype), (batch, dstate, dim))
    return transposed(native(state, dtype))


def _prepare(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, dtype: Any) -> Prepared:
    batch, dim, seqlen = u.shape
    groups = max(M.shape[1] if M.ndim == 4 else 1 for M in (B, C))
    (B, B_factor), (C, C_factor) = (_map(M, groups, (batch, seqlen), dtype) for M in (B, C))
    ones = np.ones((A.shape[1], dim), dtype)
    return Prepared(
        rows(u, dtype),
        rows(delta, dtype),
        *_decay_rates(A, dtype),
        B,
        C,
        B_factor if B_factor.size else ones,
        C_factor if C_factor.size else ones,
        _channels(D, dim, dtype),
        np.zeros((0, 0, 0), dtype) if z is None else rows(z, dtype),
        _channels(delta_bias, dim, dtype),
    )


def _fresh_output(u: np.ndarray, dtype: Any, walk: Schedule) -> np.ndarray:
    """Allocate a result like `u`; zeros where padding is skipped, for the kernel does not write there."""
    out = rows_like(u, dtype)
    if (walk.steps < u.shape[2]).any():
        out[...] = 0
    return out


def forward(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None,
    z: np.ndarray | None,
    delta_bias: np.ndarray | None,
    initial_state: np.ndarray | None,
    *,
    delta_softplus: bool,
    discretization: str,
    seq_idx: np.ndarray | None,
    reverse: bool,
    precise: bool,
    save: bool,
) -> tuple[np.ndarray, np.ndarray, Saved | None]:
    """Return y, the last state, and what `backward` needs (None unless `save`). Arguments have been checked."""
    dtype = np.dtype(np.float64) if precise else compute_dtype(u.dtype)
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    prepared = _prepare(u, delta, A, B, C, D, z, delta_bias, dtype)
    rule = (discretization == "zoh", B.ndim == 2 or C.ndim == 2)
    walk = schedule(seqlen, seq_idx, reverse)
    blocks = channel_blocks(dim, prepared.B.shape[1], LANES[dtype] * BLOCK_VECTORS)
    out = _fresh_output(u, dtype, walk)
    last = empty((batch, dstate, dim), dtype)
    checkpoints = empty((batch, -(-seqlen // TILE), dstate, dim) if save else (0, 0, 0, 0), dtype)
    state = _states(initial_state, (batch, dim, dstate), dtype)
    tasks = batch * len(blocks)
    arguments = (*prepared, state, blocks, *walk, out, last, checkpoints, bool(delta_softplus))
    launch(_FORWARD[rule], dtype, tasks, *arguments, work=u.size * dstate)
    y = in_order_of(out, u)
    last = in_memory_order_of(last, u).astype(compute_dtype(u.dtype), copy=False)
    if not save:
        return y, last, None
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return y, last, Saved(given, prepared, bool(delta_softplus), rule, walk, blocks, checkpoints)


def backward(dout: np.ndarray | None, dlast_state: np.ndarray | None, saved: Saved) -> tuple[np.ndarray | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None where one was not given."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = saved.arguments
    (batch, dim, seqlen), dstate, dtype = u.shape, A.shape[1], saved.checkpoints.dtype
    groups, blocks = saved.prepared.B.shape[1], saved.blocks
    du, ddelta = _fresh_output(u, dtype, saved.schedule), _fresh_output(u, dtype, saved.schedule)
    dz = np.zeros((0, 0, 0), dtype) if z is None else _fresh_output(u, dtype, saved.schedule)
    dinitial = empty((batch, dstate, dim), dtype)
    parts = [np.zeros((len(blocks), batch, seqlen, dstate), dtype) for _ in "BC"]
    long = empty((3, batch, dstate, dim), np.float64)
    channels = empty((2, batch, dim), np.float64)
    dlast = _states(dlast_state, (batch, dim, dstate), dtype)
    cotangent = np.zeros((batch, seqlen, dim), dtype) if dout is None else rows(dout, dtype)
    arguments = (cotangent, *saved.prepared, dlast, saved.checkpoints, blocks, *saved.schedule)
    results = (du, ddelta, dz, dinitial, *parts, long, channels)
    kernel, tasks = _BACKWARD[saved.rule], batch * len(blocks)
    launch(kernel, dtype, tasks, *arguments, *results, saved.softplus, work=u.size * dstate)
    dA, dB_factor, dC_factor = long.sum(axis=1).swapaxes(1, 2)
    dD, dbias = channels.sum(axis=1)
    return (
        in_order_of(du, u),
        in_order_of(ddelta, delta),
        np.ascontiguousarray(dA, A.dtype.newbyteorder("=")),
        _map_gradient(parts[0], dB_factor, B, groups),
        _map_gradient(parts[1], dC_factor, C, groups),
        None if D is None else dD.astype(D.dtype.newbyteorder("=")),
        None if z is None else in_order_of(dz, z),
        None if delta_bias is None else dbias.astype(delta_bias.dtype.newbyteorder("=")),
        None
        if initial_state is None
        else transposed(dinitial).astype(initial_state.dtype.newbyteorder("="), copy=False),
    )


def _map_gradient(parts: np.ndarray, factor: np.ndarray, M: np.ndarray, groups: int) -> np.ndarray:
    """Sum the blocks' parts (blocks, batch, seqlen, dstate) of dB or dC to the shape of `M`."""
    dtype = M.dtype.newbyteorder("=")
    if M.ndim == 2:
        return np.ascontiguousarray(factor, dtype)
    grouped = _add_up(parts.reshape(groups, -1 if parts.size else 0, *parts.shape[1:]).swapaxes(0, 1))
    dM = grouped.transpose(1, 0, 3, 2) if M.ndim == 4 and M.shape[1] == groups else _add_up(grouped).swapaxes(1, 2)
    return dM.astype(dtype, copy=False)


def _add_up(parts: np.ndarray) -> np.ndarray:
    """Sum over the first axis, one after the other: the order of `numpy.sum` depends on the lengths of the others."""
    total = np.zeros(parts.shape[1:], parts.dtype)
    for part in parts:
        total += part
    return total
