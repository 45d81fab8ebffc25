"""CUDA twin of `npmamba.ops.selective_state_update`: one step of the selective scan, in place.

A channel's states are shared by neighbouring lanes of a warp, four to each: 16 bytes of float32. All that a lane needs
is on its way before it computes anything, for a step of one token is mostly waiting. State and A may lie in memory in
any way; where the states of a channel lie side by side, four of them are one access.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import empty, library, strides
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, load4, shift, store, store4
from npmamba.cuda.launch import Kernel
from npmamba.cuda.layout import native, side_by_side
from npmamba.scalar import cast, exp2, fma, phi, readout, select, silu, softplus, state_step
from npmamba.shapes import compute_dtype

uint32, int64 = np.uint32, np.int64
_THREADS = 128
_STATES = 4
"""States of a lane."""
_SOFTPLUS, _ZOH, _SKIP, _GATE, _BIAS, _TOGETHER = 1, 2, 4, 8, 16, 32
"""Bits of `options`; the last: states and rates of a channel lie side by side, aligned to 16 bytes."""
_LOG2E = 1.4426950408889634


def _load_four(p, stride, n, dstate, together, zero):
    """Return four numbers from the n-th on, zeros behind the last one."""
    if together:
        return load4(p, n)
    one = load(shift(p, int64(n) * stride), uint32(0))
    two, three, four = zero, zero, zero
    if n + uint32(1) < dstate:
        two = load(shift(p, int64(n + uint32(1)) * stride), uint32(0))
    if n + uint32(2) < dstate:
        three = load(shift(p, int64(n + uint32(2)) * stride), uint32(0))
    if n + uint32(3) < dstate:
        four = load(shift(p, int64(n + uint32(3)) * stride), uint32(0))
    return one, two, three, four


def _store_four(p, stride, n, dstate, together, values):
    if together:
        store4(p, n, values)
    else:
        store(shift(p, int64(n) * stride), uint32(0), values[0])
        if n + uint32(1) < dstate:
            store(shift(p, int64(n + uint32(1)) * stride), uint32(0), values[1])
        if n + uint32(2) < dstate:
            store(shift(p, int64(n + uint32(2)) * stride), uint32(0), values[2])
        if n + uint32(3) < dstate:
            store(shift(p, int64(n + uint32(3)) * stride), uint32(0), values[3])


def _make_advance(real: Any) -> Any:
    lowest = float(np.finfo(real).min)

    def advance(h, a, B, step, source, options):
        """h = exp(step A) h + f B x, where `source` is step x; minus infinity times a step of 0 is 0"""
        rate = a * cast(_LOG2E, a)
        rate = select(rate < cast(lowest, a), cast(lowest, a), rate)
        inflow = source * B
        if options & uint32(_ZOH):
            inflow *= phi(step * select(a < cast(lowest, a), cast(lowest, a), a))
        return state_step(exp2(step * rate), h, inflow)

    return advance


def _step(real):
    advance, number = _make_advance(real), real.type

    def selective_state_update(
        state: Wide, x: Data, dt: Data, A: Wide, B: Data, C: Data, D: Wide, z: Data, bias: Wide, y: Data,
        state_batch: Stride, state_dim: Stride, state_n: Stride, x_batch: Stride, x_dim: Stride,
        dt_batch: Stride, dt_dim: Stride, A_dim: Stride, A_n: Stride, B_batch: Stride, B_group: Stride, B_n: Stride,
        C_batch: Stride, C_group: Stride, C_n: Stride, z_batch: Stride, z_dim: Stride,
        dim: Size, dstate: Size, lanes: Size, blocks: Size, B_share: Size, C_share: Size, options: Size,
    ):  # fmt: skip
        """Equation: h = exp(dt A) h + f B x, y = sum_n C h + D x, out = y silu(z).
        Threads: `lanes` lanes for a channel of a batch row, `_STATES` states to each, a loop if the channel has more.
        Owns: its states; the lanes' sums over states are added by shuffles and the first lane writes y.
        Saved: nothing; the old state is gone.
        """
        thread, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        b = uint32(block // blocks)
        first = uint32(uint32(block - b * blocks) * uint32(uint32(_THREADS) // lanes))
        d, lane = uint32(first + thread // lanes), uint32(thread % lanes)
        zero, together = number(0), options & uint32(_TOGETHER)
        y_part, u, gate, skip = zero, zero, zero, zero
        if d < dim:
            row, channel = int64(b), int64(d)
            u = load(shift(x, row * x_batch + channel * x_dim), uint32(0))
            step = load(shift(dt, row * dt_batch + channel * dt_dim), uint32(0))
            if options & uint32(_BIAS):
                step += load(bias, d)
            if options & uint32(_SKIP):
                skip = load(D, d)
            if options & uint32(_GATE):
                gate = load(shift(z, row * z_batch + channel * z_dim), uint32(0))
            h_at, a_at = shift(state, row * state_batch + channel * state_dim), shift(A, channel * A_dim)
            B_at = shift(B, row * B_batch + int64(d // B_share) * B_group)
            C_at = shift(C, row * C_batch + int64(d // C_share) * C_group)
            n = uint32(lane * uint32(_STATES))
            while n < dstate:
                h0, h1, h2, h3 = _load_four(h_at, state_n, n, dstate, together, zero)
                a0, a1, a2, a3 = _load_four(a_at, A_n, n, dstate, together, zero)
                B0, B1, B2, B3 = _load_four(B_at, B_n, n, dstate, uint32(0), zero)
                C0, C1, C2, C3 = _load_four(C_at, C_n, n, dstate, uint32(0), zero)
                delta = softplus(step) if options & uint32(_SOFTPLUS) else step
                source = delta * u
                h0, h1 = advance(h0, a0, B0, delta, source, options), advance(h1, a1, B1, delta, source, options)
                h2, h3 = advance(h2, a2, B2, delta, source, options), advance(h3, a3, B3, delta, source, options)
                _store_four(h_at, state_n, n, dstate, together, (h0, h1, h2, h3))
                y_part = readout(C3, h3, readout(C2, h2, readout(C1, h1, readout(C0, h0, y_part))))
                n = uint32(n + uint32(lanes * uint32(_STATES)))
        distance = uint32(1)
        while distance < lanes:
            y_part += cuda.shfl_xor_sync(-1, y_part, distance)
            distance = uint32(distance * uint32(2))
        if d < dim and lane == uint32(0):
            out = fma(skip, u, y_part)
            store(shift(y, int64(b) * int64(dim)), d, out * silu(gate) if options & uint32(_GATE) else out)

    return selective_state_update


_STEP = Kernel(_step, threads=_THREADS, shipped={})


def _map(M: Any, batch: int, dim: int) -> tuple[Any, tuple[int, ...], int]:
    """Return B or C, its strides (batch row, group, state), and how many channels share a group."""
    if M.ndim == 2 and M.shape[0] != batch:
        return M, (0, *strides(M)), 1
    if M.ndim == 2:
        return M, (strides(M)[0], 0, strides(M)[1]), dim
    return M, strides(M), dim // M.shape[1]


def _parameter(p: Any, real: Any) -> Any:
    return None if p is None else library(p).ascontiguousarray(native(p, real))


def forward(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    *,
    dt_softplus: bool,
    discretization: str,
) -> Any:
    """Return y of one step and change `state` in place. Arguments have been checked."""
    (batch, dim), dstate, real = x.shape, A.shape[1], compute_dtype(x.dtype)
    h, A = native(state, real), native(A, real)
    y = empty(x, x.shape, x.dtype.newbyteorder("="))
    x, dt, B, C, z = (None if q is None else native(q, y.dtype) for q in (x, dt, B, C, z))
    (B, B_strides, B_share), (C, C_strides, C_share) = _map(B, batch, dim), _map(C, batch, dim)
    present = ((_SKIP, D is not None), (_GATE, z is not None), (_BIAS, dt_bias is not None), (_SOFTPLUS, dt_softplus))
    options = sum(bit for bit, on in present if on) + _ZOH * (discretization == "zoh")
    options += _TOGETHER * (side_by_side(h, 2) and side_by_side(A, 1) and dstate % _STATES == 0)
    lanes = min(32, 1 << (-(-dstate // _STATES) - 1).bit_length())
    blocks = -(-dim // (_THREADS // lanes))
    arrays = (h, x, dt, A, B, C, _parameter(D, real), z, _parameter(dt_bias, real), y)
    along = (*strides(h), *strides(x), *strides(dt), *strides(A), *B_strides, *C_strides, *_strides_or_zeros(z))
    sizes = (dim, dstate, lanes, blocks, B_share, C_share, options)
    _STEP.launch((batch * blocks,), y.dtype, (*arrays, *along, *sizes))
    if h is not state:
        state[...] = h
    return y


def _strides_or_zeros(z: Any) -> tuple[int, ...]:
    return (0, 0) if z is None else strides(z)
