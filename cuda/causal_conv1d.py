"""CUDA twin of `npmamba.ops.causal_conv1d`: forward, backward and one step.

Three families of kernels share the work, chosen by where the numbers lie:

``conv_rows``   channels side by side, 16 bytes of them aligned, width 2 to 4: what a model does; also packed sequences
``conv_lines``  time side by side (C order), 16 bytes of it aligned, width 2 to 4, no packing
``conv_any``    everything else, in any memory, for any width

None copies an array of the size of `x`; ``conv_any`` makes one, the gradient before the activation, going backwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from npmamba.cuda import conv_any, conv_lines, conv_rows
from npmamba.cuda.arrays import address, empty, library, strides, zeros
from npmamba.cuda.conv_parts import BIAS, DINITIAL, DLAST, INITIAL, PACKED, REVERSE, SILU, THREADS, WIDTHS
from npmamba.cuda.conv_shares import any_share, line_share, line_share_backward, row_share, stretches, stretches_ahead
from npmamba.cuda.conv_sum import COLUMNS, SUM
from npmamba.cuda.conv_update import UPDATE
from npmamba.cuda.layout import native, side_by_side
from npmamba.cuda.replay import replayed
from npmamba.cuda.schedule import walk
from npmamba.shapes import compute_dtype


class Saved(NamedTuple):
    """What the backward pass needs: the arguments as they came and as kernels want them, the list of packed steps."""

    arguments: tuple[Any, ...]
    prepared: tuple[Any, ...]
    walk: tuple[Any, Any]
    reverse: bool
    silu_on: bool


def _like(x: Any) -> Any:
    """Allocate a result in the shape and memory order of `x`: C unless the channels lie side by side."""
    batch, dim, seqlen = x.shape
    if abs(x.strides[1]) > abs(x.strides[2]) or x.flags.c_contiguous:
        return empty(x, x.shape, x.dtype)
    return empty(x, (batch, seqlen, dim), x.dtype).swapaxes(1, 2)


def _parameter(x: Any, dtype: Any) -> Any:
    return None if x is None else library(x).ascontiguousarray(native(x, dtype))


def _side_by_side_parameter(x: Any, dtype: Any) -> Any:
    """Return a parameter that `npmamba.cuda.conv_rows` can read by 16 bytes at a time: a copy if it lies elsewhere."""
    x = _parameter(x, dtype)
    return x if x is None or not address(x) % 16 else x.copy()


def _options(silu_on: bool, packed: bool, bias: Any, initial: Any, dinitial: Any = None, dlast: Any = None) -> int:
    present = ((BIAS, bias), (INITIAL, initial), (DINITIAL, dinitial), (DLAST, dlast))
    return SILU * silu_on + PACKED * packed + sum(bit for bit, x in present if x is not None)


def _family(width: int, packed: bool, *arrays: Any) -> Any:
    """Return the module whose kernels serve arrays of this memory."""
    if width in WIDTHS and all(side_by_side(x, 1) and abs(strides(x)[2]) < 2**31 for x in arrays):
        return conv_rows  # it knows distances between rows of 32 bits
    fits = width in WIDTHS and not packed and all(side_by_side(x, 2) for x in arrays)
    return conv_lines if fits and arrays[0].nbytes < 2**36 else conv_any  # it numbers accesses of 16 bytes by 32 bits


def _in_walk_order(reverse: bool, packed: bool, *arrays: Any) -> tuple[Any, ...]:
    """Return views whose steps are in the order of the scan; the list of packed steps has that order in itself."""
    return tuple(x[..., ::-1] for x in arrays) if reverse and not packed else arrays


@replayed
def forward(
    x: Any,
    weight: Any,
    bias: Any,
    initial_state: Any,
    *,
    activation: str | None,
    seq_idx: Any,
    reverse: bool,
    save: bool,
) -> tuple[Any, Any, Saved | None]:
    """Return y, the last state, and what `backward` needs (None unless `save`). Arguments have been checked."""
    arguments, real = (x, weight, bias, initial_state), compute_dtype(x.dtype)
    x = native(x, x.dtype.newbyteorder("="))
    y, last = _like(x), empty(x, (*x.shape[:2], weight.shape[1] - 1), real)
    packed, silu_on = seq_idx is not None, activation == "silu"
    family = _family(weight.shape[1], packed, x, y)
    as_read = _side_by_side_parameter if family is conv_rows else _parameter
    prepared = (x, as_read(weight, real), as_read(bias, real), _parameter(initial_state, real))
    steps = walk(seq_idx, reverse) if packed else (None, None)
    saved = Saved(arguments, prepared, steps, reverse, silu_on) if save else None
    if not x.size:
        return y, _unchanged(prepared[3], x, weight.shape[1] - 1), saved
    options = _options(silu_on, packed, prepared[2], prepared[3])
    _launch_forward(family, x, y, last, prepared[1:], steps, reverse, options)
    return y, last, saved


def _unchanged(state: Any, x: Any, lag: int) -> Any:
    """Return the state after no step at all, a fresh array."""
    return zeros(x, (*x.shape[:2], lag), compute_dtype(x.dtype)) if state is None else state.copy()


def _launch_forward(
    family: Any, x: Any, y: Any, last: Any, parameters: Any, steps: Any, reverse: bool, options: int
) -> None:
    packed, width = steps[0] is not None, parameters[0].shape[1]
    if family is conv_lines:
        grid, sizes = line_share(x)
        along = strides(x)[:2] + strides(y)[:2]
        arguments = (x, *parameters, y, last, *along, *sizes, options | REVERSE * reverse)
        return conv_lines.FORWARD.launch(grid, x.dtype, arguments, width=width)
    x, y = _in_walk_order(reverse, packed, x, y)
    arrays = (x, *parameters, *steps, y, last)
    if family is conv_rows:
        constants = conv_rows.forward_constants(x.dtype, width, packed)
        grid, sizes = row_share(x, stretches_ahead(x, constants["resident"]))
        along = strides(x)[::2] + strides(y)[::2]
        return conv_rows.FORWARD.launch(grid, x.dtype, (*arrays, *along, *sizes, options), **constants)
    grid, along_time = any_share(x, x.shape[2] + width - 1)
    sizes = (*x.shape[1:], width - 1, along_time, options)
    conv_any.FORWARD.launch(grid, x.dtype, (*arrays, *strides(x), *strides(y), *sizes))


@replayed
def backward(dout: Any, dlast_state: Any, saved: Saved) -> tuple[Any, ...]:
    """Return the gradients of x, weight, bias and initial_state, None where one was not given."""
    x, weight, bias, initial = saved.prepared
    real, (dim, width), packed = weight.dtype, weight.shape, saved.walk[0] is not None
    dout = zeros(x, x.shape, x.dtype) if dout is None else native(dout, x.dtype)
    dlast = _parameter(dlast_state, real)
    dx, dweight, dbias = _like(x), empty(x, weight.shape, real), None if bias is None else empty(x, bias.shape, real)
    if not x.size:
        dweight[...] = 0
        if bias is not None:
            dbias[...] = 0
        return dx, dweight, dbias, None if initial is None else _unchanged(dlast, x, width - 1)
    dinitial = None if initial is None else empty(x, initial.shape, real)
    options = _options(saved.silu_on, packed, bias, initial, dinitial, dlast)
    launch = _BACKWARD[_family(width, packed, dout, x, dx)]
    parts = launch(saved, dout, x, dx, dlast, dinitial, options)
    columns = -(-dim * (width + 1) // COLUMNS)
    SUM.launch((columns,), real, (parts, dweight, dbias, len(parts), dim, width, int(bias is not None)))
    return dx, dweight, dbias, dinitial


def _backward_rows(saved: Saved, dout: Any, x: Any, dx: Any, dlast: Any, dinitial: Any, options: int) -> Any:
    """Run the kernel and return the parts of dweight and dbias, (parts, width + 1, dim)."""
    _, weight, bias, initial = saved.prepared
    packed, (dim, width) = saved.walk[0] is not None, weight.shape
    cut = stretches(x)
    parts = empty(x, (cut.parts, width + 1, dim), weight.dtype)
    dout, x, dx = _in_walk_order(saved.reverse, packed, dout, x, dx)
    grid, sizes = row_share(x, cut)
    arrays = (dout, x, weight, bias, initial, dlast, *saved.walk, dx, dinitial, parts)
    along = strides(dout)[::2] + strides(x)[::2] + strides(dx)[::2]
    constants = conv_rows.backward_constants(x.dtype, width, packed)
    conv_rows.BACKWARD.launch(grid, x.dtype, (*arrays, *along, *sizes, options), **constants)
    return parts


def _backward_lines(saved: Saved, dout: Any, x: Any, dx: Any, dlast: Any, dinitial: Any, options: int) -> Any:
    """Run the kernel and return the parts of dweight and dbias, (parts, width + 1, dim)."""
    _, weight, bias, initial = saved.prepared
    (dim, width), (grid, sizes) = weight.shape, line_share_backward(x, weight.shape[1])
    parts = empty(x, (len(x) * sizes[-1], width + 1, dim), weight.dtype)
    arrays = (dout, x, weight, bias, initial, dlast, dx, dinitial, parts)
    along = strides(dout)[:2] + strides(x)[:2] + strides(dx)[:2]
    options |= REVERSE * saved.reverse
    conv_lines.BACKWARD.launch(grid, x.dtype, (*arrays, *along, *sizes, options), width=width)
    return parts


def _backward_any(saved: Saved, dout: Any, x: Any, dx: Any, dlast: Any, dinitial: Any, options: int) -> Any:
    """Run the kernels and return the parts of dweight and dbias, (parts, width + 1, dim)."""
    _, weight, bias, initial = saved.prepared
    (batch, dim, seqlen), lag, cut = x.shape, weight.shape[1] - 1, stretches(x)
    dout, x, dx = _in_walk_order(saved.reverse, saved.walk[0] is not None, dout, x, dx)
    grid, along_time = any_share(x, seqlen)
    dq = empty(x, (batch, dim, seqlen) if along_time else (batch, seqlen, dim), weight.dtype)
    dq = dq if along_time else dq.swapaxes(1, 2)
    parts, sizes = empty(x, (cut.parts, lag + 2, dim), weight.dtype), (lag, along_time, options)
    arrays = (dout, x, weight, bias, initial, *saved.walk, dq, *strides(dout), *strides(x), *strides(dq))
    conv_any.COTANGENT.launch(grid, x.dtype, (*arrays, dim, seqlen, *sizes))
    arrays = (dq, weight, dlast, *saved.walk, dx, dinitial, *strides(dq), *strides(dx))
    conv_any.INPUTS.launch(any_share(x, seqlen + lag)[0], x.dtype, (*arrays, dim, seqlen, *sizes))
    arrays = (dq, x, initial, *saved.walk, parts, *strides(dq), *strides(x))
    grid = (cut.parts * -(-dim * (lag + 2) // conv_any.THREADS),)
    conv_any.WEIGHTS.launch(grid, x.dtype, (*arrays, dim, seqlen, *cut, *sizes))
    return parts


_BACKWARD = {conv_rows: _backward_rows, conv_lines: _backward_lines, conv_any: _backward_any}


@replayed
def update(state: Any, x: Any, weight: Any, bias: Any, *, activation: str | None) -> Any:
    """Return y of one step and shift `state` in place. Arguments have been checked."""
    real, (batch, dim) = compute_dtype(x.dtype), x.shape
    taps, y = native(state, real), empty(x, x.shape, x.dtype.newbyteorder("="))
    x = native(x, y.dtype)
    arrays = (taps, x, _parameter(weight, real), _parameter(bias, real), y)
    options = _options(activation == "silu", False, bias, None)
    blocks = -(-dim // THREADS)
    sizes = (dim, weight.shape[1] - 1, blocks, options)
    UPDATE.launch((batch * blocks,), x.dtype, (*arrays, *strides(taps), *strides(x), *sizes))
    if taps is not state:
        state[...] = taps
    return y
