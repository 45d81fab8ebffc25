"""CUDA twin of `npmamba.ops.selective_state_update`: one step of the selective scan, in place.

A channel's states are shared by neighbouring lanes of a warp, four to sixteen to each; an access is 16 bytes of
float32. All that a lane needs is on its way before it computes anything, for a step of one token is mostly waiting. The
state may lie in memory in any way; where the states of a channel lie side by side, four of them are one access.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import address, empty, library, strides
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, load4, shift, store, store4
from npmamba.cuda.launch import Kernel
from npmamba.cuda.layout import native
from npmamba.scalar import cast, decay_factor, exp2, fma, phi, readout, select, silu, softplus, state_step
from npmamba.shapes import compute_dtype

uint32, int64 = np.uint32, np.int64
_THREADS = 128
_FEW, _MANY = 2**17, 2**21
"""Numbers of state below which four are enough for a lane: then there are more lanes. And from which a lane has sixteen
where channels lie side by side: what a channel needs once is computed once, and a warp reads 32 channels at a time."""
_SUMMED = 8
"""States of a lane that are summed one after another; sixteen are added up as two lanes of eight would be."""
_SOFTPLUS, _ZOH, _SKIP, _GATE, _BIAS = 1, 2, 4, 8, 16
"""Bits of `options`."""
_APART, _STATES, _ALL, _CHANNELS = 0, 1, 2, 3
"""Whose four neighbours are one access: nobody's, those of states and rates, those of B and C as well, or those of all
but the states, as where channels lie side by side: there neighbouring threads read neighbouring numbers."""
_LOG2E = 1.4426950408889634


def _make_access(real: Any, states: int, together: bool, fours: bool = False) -> tuple[Any, Any]:
    """Build the load of a lane's numbers from the n-th on, zeros behind the last one, and their store.

    With `fours` their number is a multiple of four, so that one comparison and one product serve four of them.
    """
    number = real.type

    def load_states(p, stride, n, dstate, values):
        for i in range(states):
            values[i] = number(0)
        for i in range(0, states, 4):
            if together:
                if uint32(n + uint32(i)) < dstate:
                    four = load4(p, uint32(n + uint32(i)))
                    for j in range(4):
                        values[i + j] = four[j]
            elif fours:
                if uint32(n + uint32(i)) < dstate:
                    q = shift(p, int64(uint32(n + uint32(i))) * stride)
                    for j in range(i, i + 4):
                        values[j] = load(q, uint32(0))
                        q = shift(q, stride)
            else:
                for j in range(i, i + 4):
                    if uint32(n + uint32(j)) < dstate:
                        values[j] = load(shift(p, int64(uint32(n + uint32(j))) * stride), uint32(0))

    def store_states(p, stride, n, dstate, values):
        for i in range(0, states, 4):
            if together:
                if uint32(n + uint32(i)) < dstate:
                    store4(p, uint32(n + uint32(i)), (values[i], values[i + 1], values[i + 2], values[i + 3]))
            elif fours:
                if uint32(n + uint32(i)) < dstate:
                    q = shift(p, int64(uint32(n + uint32(i))) * stride)
                    for j in range(i, i + 4):
                        store(q, uint32(0), values[j])
                        q = shift(q, stride)
            else:
                for j in range(i, i + 4):
                    if uint32(n + uint32(j)) < dstate:
                        store(shift(p, int64(uint32(n + uint32(j))) * stride), uint32(0), values[j])

    return load_states, store_states


def _make_advance(real: Any, states: int) -> Any:
    lowest, together = float(np.finfo(real).min), min(states, _SUMMED)

    def advance(h, a, B, C, step, source, options, y, first):
        """h = exp(step A) h + f B x, where `source` is step x; y + C h. Minus infinity times a step of 0 is 0."""
        if options & uint32(_ZOH):
            for i in range(first, first + together):
                B[i] *= phi(step * select(a[i] < cast(lowest, step), cast(lowest, step), a[i]))
        for i in range(first, first + together):
            rate = a[i] * cast(_LOG2E, step)
            rate = select(rate < cast(lowest, step), cast(lowest, step), rate)
            x = step * rate
            h[i] = state_step(decay_factor(exp2(x), x), x, h[i], source * B[i])
            y = readout(C[i], h[i], y)
        return y

    return advance


def _step(real, states, together):
    advance, number = _make_advance(real, states), real.type
    load_states, store_states = _make_access(real, states, together in (_STATES, _ALL), together == _CHANNELS)
    load_rates, _ = _make_access(real, states, together != _APART)
    load_maps, _ = _make_access(real, states, together in (_ALL, _CHANNELS))

    def selective_state_update(
        state: Wide, x: Data, dt: Data, A: Wide, B: Data, C: Data, D: Wide, z: Data, bias: Wide, y: Data,
        state_batch: Stride, state_dim: Stride, state_n: Stride, x_batch: Stride, dt_batch: Stride, z_batch: Stride,
        B_batch: Stride, B_group: Stride, B_n: Stride, C_batch: Stride, C_group: Stride, C_n: Stride,
        dim: Size, dstate: Size, lane_bits: Size, blocks: Size, B_share: Size, C_share: Size, options: Size,
    ):  # fmt: skip
        """Equation: h = exp(dt A) h + f B x, y = sum_n C h + D x, out = y silu(z).
        Threads: 2^lane_bits lanes for a channel of a batch row, `states` states to each, a loop if there are more.
        Owns: its states; the lanes' sums over states are added by shuffles and the first lane writes y.
        Saved: nothing; the old state is gone.
        """
        h, a = cuda.local.array(states, real), cuda.local.array(states, real)
        b, c = cuda.local.array(states, real), cuda.local.array(states, real)
        thread, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        row = uint32(block // blocks)
        lanes = uint32(uint32(1) << lane_bits)
        first = uint32(uint32(block - row * blocks) * (uint32(_THREADS) >> lane_bits))
        d, lane = uint32(first + (thread >> lane_bits)), uint32(thread & (lanes - uint32(1)))
        out, other, u, gate, skip = number(0), number(0), number(0), number(0), number(0)
        if d < dim:
            h_at = shift(state, int64(row) * state_batch + int64(d) * state_dim)
            a_at = shift(A, int64(d) * int64(dstate))
            B_at, C_at = shift(B, int64(row) * B_batch), shift(C, int64(row) * C_batch)
            if B_share < dim:
                B_at = shift(B_at, int64(d // B_share) * B_group)
            if C_share < dim:
                C_at = shift(C_at, int64(d // C_share) * C_group)
            n = uint32(lane * uint32(states))
            while n < dstate:
                # All loads in one block: before the loop, their first use would be there too, and wait for them alone.
                u = load(shift(x, int64(row) * x_batch), d)
                step = load(shift(dt, int64(row) * dt_batch), d)
                more = load(bias, d) if options & uint32(_BIAS) else number(0)
                skip = load(D, d) if options & uint32(_SKIP) else number(0)
                gate = load(shift(z, int64(row) * z_batch), d) if options & uint32(_GATE) else number(0)
                load_states(h_at, state_n, n, dstate, h)
                load_rates(a_at, int64(1), n, dstate, a)
                load_maps(B_at, B_n, n, dstate, b)
                load_maps(C_at, C_n, n, dstate, c)
                delta = step + more if options & uint32(_BIAS) else step
                if options & uint32(_SOFTPLUS):
                    delta = softplus(delta)
                out = advance(h, a, b, c, delta, delta * u, options, out, 0)
                if states > _SUMMED:
                    other = advance(h, a, b, c, delta, delta * u, options, other, _SUMMED)
                store_states(h_at, state_n, n, dstate, h)
                n = uint32(n + uint32(lanes * uint32(states)))
        if states > _SUMMED:
            out += other
        distance = uint32(1)
        while distance < lanes:
            out += cuda.shfl_xor_sync(-1, out, distance)
            distance = uint32(distance * uint32(2))
        if d < dim and lane == uint32(0):
            out = fma(skip, u, out)
            store(shift(y, int64(row) * int64(dim)), d, out * silu(gate) if options & uint32(_GATE) else out)

    return selective_state_update


def _shipped(dtype: np.dtype) -> list[dict[str, Any]]:
    groups = [{"states": (4, 8), "together": (_APART, _STATES, _ALL, _CHANNELS)}]
    return groups if dtype == np.float64 else [*groups, {"states": 16, "together": _CHANNELS}]


def _blocks(states: int, together: int) -> int:
    return 4 if states > _SUMMED else 1


_STEP = Kernel(_step, threads=_THREADS, blocks=_blocks, shipped=_shipped)


def _map(M: Any, batch: int, dim: int) -> tuple[Any, tuple[int, ...], int]:
    """Return B or C, its strides (batch row, group, state), and how many channels share a group."""
    if M.ndim == 2 and M.shape[0] != batch:
        return M, (0, *strides(M)), 1
    if M.ndim == 2:
        return M, (strides(M)[0], 0, strides(M)[1]), dim
    return M, strides(M), dim // M.shape[1]


def _together(M: Any) -> bool:
    """Tell whether four neighbours along the last axis of `M` can be loaded together."""
    unit = min(16, 4 * M.itemsize)
    steps = [s for n, s in zip(M.shape[:-1], M.strides[:-1], strict=True) if n > 1]
    return M.strides[-1] == M.itemsize and not (address(M) % unit or M.shape[-1] % 4 or any(s % unit for s in steps))


def _which_together(h: Any, A: Any, B: Any, C: Any) -> int:
    states, maps = _together(h), _together(B) and _together(C)
    if not _together(A) or not (states or maps):
        return _APART
    return (_ALL if maps else _STATES) if states else _CHANNELS


def _row(x: Any, dtype: Any) -> Any:
    """Return `x` (batch, dim) with its channels side by side: itself where it is so already."""
    x = native(x, dtype)
    return x if x.shape[1] == 1 or x.strides[1] == x.itemsize else library(x).ascontiguousarray(x)


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
    y = empty(x, x.shape, x.dtype.newbyteorder("="))
    h, A, D, bias = native(state, real), *(_parameter(p, real) for p in (A, D, dt_bias))
    x, dt, z = _row(x, y.dtype), _row(dt, y.dtype), None if z is None else _row(z, y.dtype)
    (B, B_strides, B_share), (C, C_strides, C_share) = (_map(native(M, y.dtype), batch, dim) for M in (B, C))
    present = ((_SKIP, D is not None), (_GATE, z is not None), (_BIAS, bias is not None), (_SOFTPLUS, dt_softplus))
    options = sum(bit for bit, on in present if on) + _ZOH * (discretization == "zoh")
    together = _which_together(h, A, B, C)
    states = 4 if h.size < _FEW else 8
    if together == _CHANNELS and h.size >= _MANY and _SUMMED < dstate <= 32 * _SUMMED and real == np.float32:
        states = 16
    lane_bits = min(5, (-(-dstate // states) - 1).bit_length())
    blocks = -(-dim // (_THREADS >> lane_bits))
    along = (*strides(h), *(0 if q is None else strides(q)[0] for q in (x, dt, z)), *B_strides, *C_strides)
    sizes = (dim, dstate, lane_bits, blocks, B_share, C_share, options)
    arrays = (h, x, dt, A, B, C, D, z, bias, y)
    _STEP.launch((batch * blocks,), y.dtype, (*arrays, *along, *sizes), states=states, together=together)
    if h is not state:
        state[...] = h
    return y
