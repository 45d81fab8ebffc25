"""CPU twin of `npmamba.ops.selective_state_update`: one step of the selective scan, in place.

A task is one batch row and one block of channels; the loops are: channel vector, state. The formulas and their order
are those of `npmamba.cpu.selective_scan`, and so are the bits. State and A may lie in memory in any way: with channels
side by side they are read as vectors, else number by number.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from npmamba.cpu.layout import native
from npmamba.cpu.runtime import Flag, Int, Kernel, Read, ReadInt, Real, Write, empty, inner, launch, scratch
from npmamba.cpu.scan_tile import kernel_name
from npmamba.cpu.schedule import channel_blocks
from npmamba.cpu.simd import LANES, load, store, width
from npmamba.scalar import cast, decay_factor, exp2_product, phi, readout, select, silu, softplus, state_step
from npmamba.shapes import compute_dtype

BLOCK_VECTORS = 8
"""Vectors of channels per task."""
LOG2_E = float(np.log2(np.e))


@inner
def _gather(a, d, count, tile):
    """Copy ``a[:, d : d + count]`` to `tile`, whatever the strides of `a` (dstate, dim)."""
    if a.strides[1] == a.itemsize:
        for n in range(a.shape[0]):
            store(tile, (n, 0), load(a, (n, d), count))
    else:
        if count < tile.shape[1]:
            tile[:] = 0.0
        for lane in range(min(count, tile.shape[1])):
            for n in range(a.shape[0]):
                tile[n, lane] = a[n, d + lane]


@inner
def _scatter(tile, d, count, a):
    """Copy `tile` back to ``a[:, d : d + count]``."""
    if a.strides[1] == a.itemsize:
        for n in range(a.shape[0]):
            store(a, (n, d), load(tile, (n, 0)), count)
    else:
        for lane in range(min(count, tile.shape[1])):
            for n in range(a.shape[0]):
                a[n, d + lane] = tile[n, lane]


def _make_step(zoh: bool, constant: bool) -> Kernel:
    def _step(
        start: Int,
        stop: Int,
        state: Write[3],
        x: Read[2],
        raw_dt: Read[2],
        A: Read[2],
        B: Read[3],
        C: Read[3],
        B_factor: Read[2],
        C_factor: Read[2],
        D: Read[1],
        z: Read[2],
        bias: Read[1],
        blocks: ReadInt[2],
        out: Write[2],
        lowest: Real,
        softplus_on: Flag,
    ):
        """Equation: h = exp(dt A) h + f B x, y = sum_n C h + D x, out = y silu(z).
        Threads: a task is (batch row, block of channels); loops over channel vectors and states.
        Owns: state and out of its channels; nothing is summed across tasks.
        """
        w, dstate = width(x), A.shape[0]
        h, rates = scratch((dstate, w), x), scratch((dstate, w), x)
        factors = scratch((2, dstate, w), x)
        for task in range(start, stop):
            b, block = task // blocks.shape[0], task % blocks.shape[0]
            d0, d1, group = blocks[block, 0], blocks[block, 1], blocks[block, 2]
            for d in range(d0, d1, w):
                count = d1 - d
                _gather(state[b], d, count, h)
                _gather(A, d, count, rates)
                if constant:
                    _gather(B_factor, d, count, factors[0])
                    _gather(C_factor, d, count, factors[1])
                u = load(x, (b, d), count)
                step = load(raw_dt, (b, d), count) + load(bias, (d,), count)
                if softplus_on:
                    step = softplus(step)
                source, y = step * u, load(D, (d,), count) * u
                for n in range(dstate):
                    a = load(rates, (n, 0))
                    a2 = a * cast(LOG2_E, a)
                    a2 = select(a2 < cast(lowest, a), cast(lowest, a), a2)  # minus infinity times a step of 0 is 0
                    inflow, gain = source * cast(B[b, group, n], a), cast(C[b, group, n], a)
                    if zoh:
                        inflow = inflow * phi(step * select(a < cast(lowest, a), cast(lowest, a), a))
                    if constant:
                        inflow, gain = inflow * load(factors, (0, n, 0)), gain * load(factors, (1, n, 0))
                    factor = decay_factor(exp2_product(step, a2), step * a2)
                    new = state_step(factor, step * a2, load(h, (n, 0)), inflow)
                    store(h, (n, 0), new)
                    y = readout(gain, new, y)
                if z.shape[0]:
                    y = y * silu(load(z, (b, d), count))
                store(out, (b, d), y, count)
                _scatter(h, d, count, state[b])

    return Kernel(_step, kernel_name("step", zoh, constant))


_STEP = {(zoh, constant): _make_step(zoh, constant) for zoh in (False, True) for constant in (False, True)}
_LOWEST = {dtype: float(np.finfo(dtype).min) for dtype in LANES}
_blocks = functools.lru_cache(maxsize=64)(channel_blocks)


def _row(x: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return `x` with unit stride along its last axis: itself where memory allows; zeros of `shape` for None."""
    if x is None:
        return np.zeros(shape, dtype)
    x = native(x, dtype)
    return x if x.shape[-1] == 1 or x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


def _map(M: np.ndarray, batch: int, groups: int, dtype: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Split B or C into a part per batch row (batch, groups, dstate) and, if it is constant, one per channel."""
    M = native(M, dtype)
    if M.ndim == 2 and M.shape[0] != batch:
        return np.ones((batch, groups, M.shape[1]), dtype), M.T
    M = M if M.ndim == 3 else M[:, None]
    return (M if M.shape[1] == groups else np.broadcast_to(M, (batch, groups, M.shape[2]))), None


def forward(
    state: np.ndarray,
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None,
    z: np.ndarray | None,
    dt_bias: np.ndarray | None,
    *,
    dt_softplus: bool,
    discretization: str,
) -> np.ndarray:
    """Return y of one step and change `state` in place. Arguments have been checked."""
    dtype, (batch, dim) = compute_dtype(x.dtype), x.shape
    groups = max(M.shape[1] if M.ndim == 3 else 1 for M in (B, C))
    (B, B_factor), (C, C_factor) = _map(B, batch, groups, dtype), _map(C, batch, groups, dtype)
    constant = B_factor is not None or C_factor is not None
    one = np.ones((A.shape[1], dim) if constant else (0, 0), dtype)
    factors = [one if f is None else f for f in (B_factor, C_factor)]
    h = native(state, dtype)
    blocks = _blocks(dim, groups, LANES[dtype] * BLOCK_VECTORS)
    out = empty((batch, dim), dtype)
    arguments = (h.swapaxes(1, 2), _row(x, (), dtype), _row(dt, (), dtype), native(A, dtype).T, B, C, *factors)
    optional = (_row(D, (dim,), dtype), _row(z, (0, 0), dtype), _row(dt_bias, (dim,), dtype))
    flags = _LOWEST[dtype], bool(dt_softplus)
    rule = _STEP[discretization == "zoh", constant]
    launch(rule, dtype, batch * len(blocks), *arguments, *optional, blocks, out, *flags, work=state.size)
    if h is not state:
        state[...] = h
    return out.astype(x.dtype.newbyteorder("="), copy=False)
