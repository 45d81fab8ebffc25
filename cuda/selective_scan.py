"""CUDA twin of `npmamba.ops.selective_scan`: which kernels run, on what, in what order.

The kernels stand in `scan_forward` and `scan_backward`, those between and after them in `scan_carry` and `scan_sums`,
how they divide the work in `scan_tile`. Here the caller's arrays become pointers and strides; nothing is copied whose
memory the kernels can walk.

Time is cut into segments where batch rows and channels are too few to fill the device. Where the cuts are depends on
the sizes of a call and on the device alone: the same call gives the same bits, another batch size may round otherwise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import empty, library, multiprocessors, strides, zeros
from npmamba.cuda.launch import wide_dtype
from npmamba.cuda.layout import native, side_by_side
from npmamba.cuda.replay import replayed
from npmamba.cuda.scan_backward import BACKWARD
from npmamba.cuda.scan_carry import CARRY
from npmamba.cuda.scan_forward import FORWARD, forward_resident
from npmamba.cuda.scan_sums import COLUMNS, MAP_THREADS, SUM_MAPS, SUM_PARTS
from npmamba.cuda.scan_tile import BIAS, ENTERING, SKIP, SOFTPLUS, THREADS, Shape, division
from npmamba.cuda.schedule import step_flags


class Saved(NamedTuple):
    """What the backward pass needs: the arguments, and the state before each of its tiles."""

    arguments: tuple[Any, ...]
    work: Work
    checkpoints: Any


class Work(NamedTuple):
    """The arguments as the kernels want them: in memory that they can walk, parameters in the dtype they compute in."""

    u: Any
    delta: Any
    A: Any
    B: Any
    """As C: (dim, dstate) if it is constant, else (batch, groups, seqlen, dstate)."""
    C: Any
    D: Any
    z: Any
    bias: Any
    marks: Any
    """What happens at each step, in the order of the scan: see `schedule.step_flags`."""
    constants: dict[str, bool]
    """Constants of the kernels that follow from which arguments there are."""
    by_channel: bool
    """Whether the rows of u, delta and z in memory are channels; steps if not."""
    groups: int
    """Groups of the maps, 1 if they have none."""
    flags: int
    """Bits that the kernels test: see `scan_tile`."""
    reverse: bool


def _rows(x: Any, reverse: bool) -> tuple[Any, tuple[int, int, int]]:
    """Return an array over (batch, dim, seqlen) in the order of the scan, and its strides of batch, step, channel."""
    x = x[:, :, ::-1] if reverse else x
    batch, channel, step = strides(x)
    return x, (batch, step, channel)


def _is_by_channel(x: Any) -> bool:
    """Tell whether neighbours in memory are steps of a channel."""
    return x.strides[1] != x.itemsize and abs(x.strides[2]) == x.itemsize


def _walkable(x: Any, by_channel: bool) -> Any:
    """Return `x`, or a copy where its neighbours in memory are not those that are asked for.

    Bytes in another order, or between the places of numbers, are copied too.
    """
    xp, x = library(x), native(x, _own_dtype(x))
    if x.strides[2 if by_channel else 1] == x.itemsize:
        return x
    return xp.ascontiguousarray(x) if by_channel else xp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _map(M: Any) -> Any:
    """Return a map as (batch, groups, seqlen, dstate) with neighbouring states, or a constant one as it is."""
    if M.ndim == 2:
        return _plain(M, _own_dtype(M))
    steps = native(M if M.ndim == 4 else M[:, None], _own_dtype(M)).swapaxes(2, 3)
    return steps if steps.strides[3] == steps.itemsize else library(M).ascontiguousarray(steps)


def _plain(x: Any, dtype: Any) -> Any:
    """Return an optional parameter or state contiguous and in `dtype`."""
    return None if x is None else library(x).ascontiguousarray(native(x, dtype))


def _prepare(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, *,
    softplus: bool, zoh: bool, seq_idx: Any, reverse: bool,
) -> Work:  # fmt: skip
    """Return the arguments as the kernels want them; the memory order of u decides for delta and z."""
    wide = wide_dtype(u.dtype)
    by_channel = _is_by_channel(u)
    groups = max(M.shape[1] if M.ndim == 4 else 1 for M in (B, C))
    u, delta, z = (None if x is None else _walkable(x, by_channel) for x in (u, delta, z))
    B, C = _map(B), _map(C)
    marks = None if seq_idx is None else step_flags(seq_idx, reverse)
    constants = {
        "gated": z is not None,
        "zoh": zoh,
        "packed": marks is not None,
        "constant_B": B.ndim == 2,
        "constant_C": C.ndim == 2,
    }
    flags = softplus * SOFTPLUS | (D is not None) * SKIP | (bias is not None) * BIAS
    return Work(
        u, delta, _plain(A, wide), B, C, _plain(D, wide), z, _plain(bias, wide), marks, constants, by_channel, groups,
        flags, reverse,
    )  # fmt: skip


def _blocks(work: Work, shape: Shape) -> int:
    """Return how many blocks of threads hold all channels; none holds channels of two groups."""
    return work.groups * -(-(work.u.shape[1] // work.groups) // shape.channels)


def _layout(work: Work, shape: Shape, reverse: bool, *arrays: Any) -> dict[str, bool]:
    """Return the constants that tell how the kernels may read: rows that are steps or channels, and how wide.

    16 bytes at a time where rows begin at multiples of that, tiles and segments cut them there, and they are read in
    the direction in which they lie; `reverse` is that of the launch, the other one than the scan's where it goes back.
    """
    by_channel, size = work.by_channel, work.u.itemsize
    _, dim, seqlen = work.u.shape
    cut = math.gcd(seqlen, shape.steps) if by_channel else math.gcd(dim // work.groups, shape.channels)
    wide = cut * size % 16 == 0 and not (by_channel and reverse)
    wide = wide and all(side_by_side(x, 2 if by_channel else 1) for x in arrays if x is not None)
    wide_maps = shape.dstate == shape.padded and shape.padded * size % 16 == 0
    wide_maps = wide_maps and all(side_by_side(M, 3) for M in (work.B, work.C) if M.ndim == 4)
    return {"by_channel": by_channel, "wide": wide, "wide_maps": wide_maps}


def _map_strides(M: Any, reverse: bool) -> tuple[Any, tuple[int, int, int]]:
    """Return a map in the order of the scan, and its strides of batch, group and step: 0 where one serves all."""
    if M.ndim == 2:
        return M, (0, 0, 0)
    M = M[:, :, ::-1] if reverse else M
    batch, group, step, _ = strides(M)
    return M, (batch, group if M.shape[1] > 1 else 0, step)


def _marks(work: Work, reverse: bool) -> tuple[Any, int]:
    """Return the flags of the steps, which are in the order of the scan, in the direction asked for."""
    if work.marks is None:
        return None, 0
    return (work.marks[:, ::-1], -1) if reverse != work.reverse else (work.marks, 1)


WARPS_PER_MULTIPROCESSOR = 16
BACKWARD_SHARE = 0.75
"""The backward pass needs more registers, so fewer of its warps fit on a multiprocessor."""
SHORTEST = 8
"""Tiles of the shortest segment: below, handing states on costs more than it brings."""


def _segments(work: Work, shape: Shape, unit: int, share: float = 1.0) -> tuple[int, int]:
    """Return how long the segments of time are and how many: enough of them to fill the device."""
    batch, _, seqlen = work.u.shape
    wanted = int(share * WARPS_PER_MULTIPROCESSOR * multiprocessors(work.u)) * 32 // THREADS
    count = min(wanted // max(1, batch * _blocks(work, shape)), seqlen // (SHORTEST * unit))
    if count <= 1:
        return max(seqlen, 1), 1
    length = math.ceil(seqlen / count / unit) * unit
    return length, -(-seqlen // length)


def _resident(work: Work, shape: Shape, segments: int) -> int:
    """Return how many blocks of the backward pass are to share a multiprocessor: more leave each fewer registers."""
    if work.u.dtype == np.float64 or shape.states > 4:
        return 1
    if work.constants["zoh"] or work.constants["packed"]:
        return 2
    processors = multiprocessors(work.u)
    return 4 if 3 * processors < _grid(work, shape, segments)[0] <= 4 * processors else 3


def _grid(work: Work, shape: Shape, segments: int) -> tuple[int]:
    """Return the blocks of a launch, one each for a batch row, a segment and some channels."""
    return (_blocks(work, shape) * segments * work.u.shape[0],)


def _scan(
    work: Work, shape: Shape, reverse: bool, arrays: tuple[Any, Any, Any], outputs: tuple[Any, ...],
    length: int, segments: int, flags: int, *, B: Any, C: Any, entering: Any, lead: int = 0, **constants: Any,
) -> None:  # fmt: skip
    """Launch FORWARD in the direction asked for.

    Parameters
    ----------
    work, shape, length, segments
        What there is to do, and how it is divided: `segments` of `length` steps, the first one `lead` shorter.
    reverse : bool
        Whether to run from the last step to the first.
    arrays : tuple
        u, delta and z, or what stands in their place.
    outputs : tuple
        y, the state after each segment or the last one, the states that are kept, the sums of delta; or None.
    B, C, entering
        The maps, and the state that enters each segment (None: zero).
    **constants
        Of the kernel, but for those of the memory's layout.
    """
    dtype = work.u.dtype
    layout = _layout(work, shape, reverse, *arrays)
    (u, u_strides), (delta, delta_strides) = (_rows(x, reverse) for x in arrays[:2])
    z, z_strides = (None, (0, 0, 0)) if arrays[2] is None else _rows(arrays[2], reverse)
    y, last, checkpoints, sums = outputs
    y, y_strides = (None, (0, 0, 0)) if y is None else _rows(y, reverse)
    B, B_strides = _map_strides(B, reverse)
    C, C_strides = _map_strides(C, reverse)
    marks, marks_step = _marks(work, reverse)
    batch, dim, seqlen = u.shape
    FORWARD.launch(
        _grid(work, shape, segments), dtype,
        (
            u, delta, work.A, B, C, work.D, z, work.bias, entering, marks, y, last, checkpoints, sums,
            *u_strides, *delta_strides, *z_strides, *y_strides, *B_strides, *C_strides, marks_step,
            dim, seqlen, length, segments, lead, _blocks(work, shape), work.groups,
            flags | (entering is not None) * ENTERING,
        ),
        shape=tuple(shape), resident=forward_resident(dtype, shape), **layout, **constants,
    )  # fmt: skip


def _carry(work: Work, shape: Shape, initial: Any, states: Any, sums: Any, segments: int) -> Any:
    """Return the state that enters every segment, (batch, segments, dim, padded)."""
    batch, dim, _ = work.u.shape
    entering = empty(work.u, states.shape, states.dtype)
    total = batch * dim * shape.padded
    CARRY.launch(
        (-(-total // THREADS),), states.dtype,
        (work.A, initial, states, sums, entering, shape.dstate, dim, segments, total, initial is not None),
        padded=shape.padded,
    )  # fmt: skip
    return entering


def _pad(state: Any, shape: Shape) -> Any:
    """Return a (batch, dim, dstate) state with as many states as the lanes hold."""
    if state is None or shape.padded == shape.dstate:
        return state
    padded = zeros(state, (*state.shape[:2], shape.padded), state.dtype)
    padded[..., : shape.dstate] = state
    return padded


@replayed
def forward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial_state: Any, *,
    delta_softplus: bool, discretization: str, seq_idx: Any, reverse: bool, precise: bool, save: bool,
) -> tuple[Any, Any, Saved | None]:  # fmt: skip
    """Return y, the last state, and what `backward` needs (None unless `save`). Arguments have been checked.

    Parameters
    ----------
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, discretization, seq_idx, reverse, precise
        As for `npmamba.ops.selective_scan`: CuPy arrays, or NumPy's under the kernel interpreter.
    save : bool
        Whether to keep what `backward` needs: the arguments, and the state before each of its tiles.

    Returns
    -------
    y : (batch, dim, seqlen)
        In the memory order of u: steps of a channel, or channels of a step side by side.
    last_state : (batch, dim, dstate)
    saved : Saved or None
    """
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if precise:
        u, delta, A, B, C, D, z, delta_bias, initial_state = (
            None if x is None else x.astype(np.float64) for x in given
        )
    dtype, (batch, dim, seqlen), dstate = u.dtype.newbyteorder("="), u.shape, A.shape[1]
    wide = wide_dtype(dtype)
    work = _prepare(
        u, delta, A, B, C, D, z, delta_bias, softplus=bool(delta_softplus), zoh=discretization == "zoh",
        seq_idx=seq_idx, reverse=reverse,
    )  # fmt: skip
    shape, back = division(dstate, dtype.itemsize), division(dstate, dtype.itemsize, backward=True)
    y = _like(work, dtype)
    last = empty(u, (batch, dim, dstate), wide)
    initial = _plain(initial_state, wide)
    checkpoints = empty(u, (batch, -(-seqlen // back.steps), dim, back.padded) if save else (0, 0, 0, 0), wide)
    if u.size == 0:
        last[...] = 0 if initial is None else initial
    else:
        length, segments = _segments(work, shape, max(shape.steps, back.steps))
        if segments > 1:
            entering = _entering(work, shape, reverse, length, segments, initial)
        else:
            entering = _pad(initial, shape)
        _scan(
            work, shape, reverse, (work.u, work.delta, work.z), (y, last, checkpoints, None), length, segments,
            work.flags, B=work.B, C=work.C, entering=entering, interval=back.steps if save else 0, **work.constants,
        )  # fmt: skip
    if precise:
        y, last = y.astype(given[0].dtype), last.astype(wide_dtype(given[0].dtype))
    return y, last, Saved(given, work, checkpoints) if save else None


def _like(work: Work, dtype: Any) -> Any:
    """Allocate a result over (batch, dim, seqlen) in the memory order of u."""
    batch, dim, seqlen = work.u.shape
    if work.by_channel:
        return empty(work.u, (batch, dim, seqlen), dtype)
    return empty(work.u, (batch, seqlen, dim), dtype).swapaxes(1, 2)


def _entering(work: Work, shape: Shape, reverse: bool, length: int, segments: int, initial: Any) -> Any:
    """Return the state before every segment, from what each adds to a state of zero."""
    batch, dim, _ = work.u.shape
    wide = wide_dtype(work.u.dtype)
    states = empty(work.u, (batch, segments, dim, shape.padded), wide)
    sums = empty(work.u, (batch, segments, dim), wide)
    constants = work.constants | {"gated": False}
    _scan(
        work, shape, reverse, (work.u, work.delta, None), (None, states, None, sums), length, segments, work.flags,
        B=work.B, C=work.C, entering=None, ends=True, **constants,
    )  # fmt: skip
    return _carry(work, shape, initial, states, sums, segments)


def _entering_back(
    work: Work, shape: Shape, reverse: bool, length: int, segments: int, dout: Any, dlast: Any
) -> Any:
    """Return the gradient of the state after every segment, in the order in which time is walked back."""
    batch, dim, seqlen = work.u.shape
    wide = wide_dtype(work.u.dtype)
    states = empty(work.u, (batch, segments, dim, shape.padded), wide)
    sums = empty(work.u, (batch, segments, dim), wide)
    constants = work.constants | {"zoh": False, "constant_B": work.constants["constant_C"]}
    _scan(
        work, shape, not reverse, (dout, work.delta, work.z), (None, states, None, sums), length, segments,
        work.flags, B=work.C, C=work.C, entering=None, lead=segments * length - seqlen, ends=True, adjoint=True,
        **constants,
    )  # fmt: skip
    return _carry(work, shape, dlast, states, sums, segments)


@replayed
def backward(dout: Any, dlast_state: Any, saved: Saved) -> tuple[Any, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, None where one was not given.

    Parameters
    ----------
    dout : (batch, dim, seqlen) or None
        Gradient of y, in any memory order; None is zero.
    dlast_state : (batch, dim, dstate) or None
        Gradient of the last state, likewise.
    saved : Saved
        What `forward` kept.

    Returns
    -------
    tuple
        Arrays of their arguments' shapes and dtypes; du, ddelta and dz in the memory order of u.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = saved.arguments
    work, dtype = saved.work, saved.work.u.dtype
    wide, (batch, dim, seqlen), dstate = wide_dtype(dtype), u.shape, A.shape[1]
    shape, ends = division(dstate, dtype.itemsize, backward=True), division(dstate, dtype.itemsize)
    if dout is None:
        dout = _like(work, dtype)
        dout[...] = 0
    dout = _walkable(dout.astype(dtype, copy=False), work.by_channel)
    dlast = _plain(dlast_state, wide)
    du, ddelta = _like(work, dtype), _like(work, dtype)
    dz = None if z is None else _like(work, dtype)
    dinitial = empty(u, (batch, dim, dstate), wide)
    if u.size == 0:
        return _nothing_flows(saved, du, ddelta, dz, dlast)
    length, segments = _segments(work, shape, max(shape.steps, ends.steps), BACKWARD_SHARE)
    if segments > 1:
        entering = _entering_back(work, ends, work.reverse, length, segments, dout, dlast)
    else:
        entering = _pad(dlast, shape)
    blocks, padded = _blocks(work, shape), shape.padded
    constant_B, constant_C = work.constants["constant_B"], work.constants["constant_C"]
    map_parts = empty(u, (blocks, batch * seqlen, 2, padded) if not (constant_B and constant_C) else (0,), wide)
    A_parts = empty(u, (batch * segments, dim, padded), wide)
    factor_parts = empty(u, (2, batch * segments, dim, padded) if constant_B or constant_C else (0,), wide)
    channel_parts = empty(u, (2, batch * segments, dim), wide)
    layout = _layout(work, shape, work.reverse, work.u, work.delta, work.z, dout)
    in_order = [_rows(x, work.reverse) if x is not None else (None, (0, 0, 0)) for x in (
        work.u, work.delta, work.z, dout, du, ddelta, dz)]  # fmt: skip
    (B_at, B_strides), (C_at, C_strides) = (_map_strides(M, work.reverse) for M in (work.B, work.C))
    marks, marks_step = _marks(work, work.reverse)
    pointers = [x for x, _ in in_order]
    BACKWARD.launch(
        _grid(work, shape, segments), dtype,
        (
            pointers[0], pointers[1], work.A, B_at, C_at, work.D, pointers[2], work.bias, pointers[3], entering, marks,
            saved.checkpoints, pointers[4], pointers[5], pointers[6], dinitial, map_parts, A_parts, factor_parts,
            channel_parts, *(s for _, three in in_order for s in three), *B_strides, *C_strides, marks_step,
            batch, dim, seqlen, length, segments, blocks, work.groups,
            work.flags | (entering is not None) * ENTERING,
        ),
        shape=tuple(shape), resident=_resident(work, shape, segments), **layout, **work.constants,
    )  # fmt: skip
    dA = _sum(A_parts[None], (dim, dstate), wide, padded, dstate)
    factors = [
        _sum(factor_parts[k : k + 1], (dim, dstate), dtype, padded, dstate) if constant else None
        for k, constant in enumerate((constant_B, constant_C))
    ]
    dD, dbias = _sum(channel_parts, (2, dim), wide, dim, dim)
    dB, dC = _map_gradients(work, shape, map_parts, blocks)
    original = _own_dtype(u)
    gradients = (
        du,
        ddelta,
        dA,
        factors[0] if constant_B else dB[:, 0] if B.ndim == 3 else dB,
        factors[1] if constant_C else dC[:, 0] if C.ndim == 3 else dC,
        None if D is None else dD,
        dz,
        None if delta_bias is None else dbias,
        None if initial_state is None else dinitial,
    )
    if original != dtype:  # `precise` computed in float64
        wanted = [_own_dtype(x) for x in saved.arguments if x is not None]
        dtypes = iter(wanted)
        gradients = tuple(None if q is None else q.astype(next(dtypes)) for q in gradients)
    return gradients


def _own_dtype(x: Any) -> Any:
    """Return the native form of an argument's dtype: a gradient's dtype."""
    return x.dtype.newbyteorder("=")


def _nothing_flows(saved: Saved, du: Any, ddelta: Any, dz: Any, dlast: Any) -> tuple[Any, ...]:
    """Return the gradients of a scan over no steps or no channels."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = saved.arguments
    none = [None if x is None else zeros(u, x.shape, _own_dtype(x)) for x in (A, B, C, D, delta_bias, initial_state)]
    if initial_state is not None and dlast is not None:
        none[5][...] = dlast
    dA, dB, dC, dD, dbias, dinitial = none
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


def _sum(parts: Any, shape: tuple[int, ...], dtype: Any, padded: int, width: int) -> Any:
    """Sum parts (outer, rows, ...) over the rows, in a fixed order; of `padded` numbers the first `width` are kept."""
    out = empty(parts, shape, dtype)
    outer, rows = parts.shape[:2]
    columns = parts[0, 0].size
    SUM_PARTS.launch((-(-columns // COLUMNS), outer), dtype, (parts, out, rows, columns, padded, width))
    return out


def _map_gradients(work: Work, shape: Shape, parts: Any, blocks: int) -> list[Any]:
    """Return dB and dC, (batch, groups, dstate, seqlen), in the order of the arguments; None for a constant map.

    Where only one of the maps has groups, the sums are made twice: over the channels of a group, and over all.
    """
    counts = [None if M.ndim == 2 else M.shape[1] for M in (work.B, work.C)]
    sums = {groups: _sum_maps(work, shape, parts, blocks, groups) for groups in {*counts} - {None}}
    flip = np.s_[:, :, ::-1] if work.reverse else np.s_[:]
    return [None if n is None else sums[n][which][flip].swapaxes(2, 3) for which, n in enumerate(counts)]


def _sum_maps(work: Work, shape: Shape, parts: Any, blocks: int, groups: int) -> tuple[Any, Any]:
    """Return dB and dC, (batch, groups, seqlen, dstate), from the parts of the blocks."""
    batch, _, seqlen = work.u.shape
    out = [empty(work.u, (batch, groups, seqlen, shape.dstate), work.u.dtype) for _ in "BC"]
    count = 4 if shape.padded % 4 == 0 else 1
    grid = (groups * -(-batch * seqlen * 2 * shape.padded // (MAP_THREADS * count)),)
    numbers = (blocks // groups, groups, batch * seqlen, seqlen, shape.padded, shape.dstate)
    SUM_MAPS.launch(grid, work.u.dtype, (parts, *out, *numbers), quads=count == 4)
    return out[0], out[1]
