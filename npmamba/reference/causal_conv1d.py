"""The causal depthwise convolution in float64, one time step after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npmamba.reference.functions import as_float64, flip_time, runs, silu, silu_derivative


class CausalConv1dGradients(NamedTuple):
    """Gradients by argument; None where the argument was None."""

    x: Any
    weight: Any
    bias: Any
    initial_state: Any


def _check(activation: str | None) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")


def _windows(x: Any, taps: Any, seq_idx: Any) -> Iterator[Any]:
    """Shift `x` through `taps` (batch, dim, width - 1), in place; yield (t, starts, rows, window).

    `rows` are the batch rows that have a step at time t, and `window` (rows, dim, width) holds their last
    `width` inputs, the newest last. `starts` are the rows whose taps were set to zero first.
    """
    batch, _, seqlen = x.shape
    valid, start = runs(seq_idx, batch, seqlen)
    for t in range(seqlen):
        rows = valid[:, t]
        taps[start[:, t]] = 0
        window = np.concatenate([taps[rows], x[rows, :, t, None]], axis=-1)
        taps[rows] = window[..., 1:]
        yield t, start[:, t], rows, window


@np.errstate(over="ignore", invalid="ignore")
def forward(
    x: Any, weight: Any, bias: Any = None, *, activation: str | None = None, initial_state: Any = None,
    seq_idx: Any = None, reverse: bool = False,
) -> tuple[Any, Any]:
    """Compute the causal depthwise convolution.

    ::

        y_t = activation(bias + sum_k weight_k x_{t - (width - 1) + k})

    so that weight[:, width - 1] multiplies x_t.

    Parameters
    ----------
    x : (batch, dim, seqlen) real or complex
    weight : (dim, width)
    bias : (dim,)
    activation : {None, "silu"}
    initial_state : (batch, dim, width - 1)
        The inputs before time 0, the oldest first; None: zeros.
    seq_idx : (batch, seqlen) integers
        No tap reaches across a change of it; steps with a negative value are as if absent, with y = 0.
    reverse : bool
        Run from the last time to the first: flip `x` and `seq_idx`, run, flip `y`.

    Returns
    -------
    y : (batch, dim, seqlen) float64, or complex128 if any argument is complex
    last_state : (batch, dim, width - 1) of the same dtype
        The last inputs of the last run, the oldest first: the initial state of what follows.

    Examples
    --------
    >>> forward(np.array([[[1, 2, 3]]]), np.array([[10, 1]]))
    (array([[[ 1., 12., 23.]]]), array([[[3.]]]))
    """
    _check(activation)
    if reverse:
        y, last_state = forward(
            flip_time(x), weight, bias, activation=activation, initial_state=initial_state,
            seq_idx=flip_time(seq_idx),
        )
        return flip_time(y), last_state
    x, weight, bias, taps = arrays = [as_float64(q) for q in (x, weight, bias, initial_state)]
    dtype = np.result_type(*(q for q in arrays if q is not None))
    batch, dim, _ = x.shape
    taps = np.zeros((batch, dim, weight.shape[1] - 1), dtype) if taps is None else taps.astype(dtype)
    y = np.zeros(x.shape, dtype)
    for t, _, rows, window in _windows(x, taps, seq_idx):
        y_t = (weight * window).sum(-1) + (0 if bias is None else bias)
        y[rows, :, t] = silu(y_t) if activation == "silu" else y_t
    return y, taps


@np.errstate(over="ignore", invalid="ignore")
def backward(
    dout: Any, x: Any, weight: Any, bias: Any = None, *, activation: str | None = None,
    initial_state: Any = None, dlast_state: Any = None, seq_idx: Any = None, reverse: bool = False,
) -> CausalConv1dGradients:
    """Compute the gradients of sum(dout * y) + sum(dlast_state * last_state), derived by hand.

    With q the argument of the activation, dq = dout activation'(q), and the gradient of a window of inputs is
    dq weight plus what comes back from the taps it left behind::

        dwindow_t = (0, dtaps_{t+1}) + dq_t weight
        dx_t = last of dwindow_t       dtaps_t = the others
        dweight = sum_{b,t} dq window  dbias = sum_{b,t} dq

    Parameters are those of `forward`, and `dout` like x, `dlast_state` like initial_state (None: zero); real
    only.

    Returns
    -------
    CausalConv1dGradients
        float64 gradients of the arguments' shapes; None where the argument was None.

    Examples
    --------
    >>> backward(np.ones((1, 1, 3)), np.array([[[1, 2, 3]]]), np.array([[10, 1]])).x
    array([[[11., 11.,  1.]]])
    """
    _check(activation)
    if reverse:
        grads = backward(
            flip_time(dout), flip_time(x), weight, bias, activation=activation, initial_state=initial_state,
            dlast_state=dlast_state, seq_idx=flip_time(seq_idx),
        )
        return grads._replace(x=flip_time(grads.x))
    dout, x, weight, bias, dtaps = (as_float64(q) for q in (dout, x, weight, bias, dlast_state))
    state_shape = (*x.shape[:2], weight.shape[1] - 1)
    taps = np.zeros(state_shape) if initial_state is None else as_float64(initial_state)
    dtaps = np.zeros(state_shape) if dtaps is None else dtaps
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros(x.shape[1])
    for t, starts, rows, window in reversed(list(_windows(x, taps, seq_idx))):
        dq = dout[rows, :, t]
        if activation == "silu":
            dq = dq * silu_derivative((weight * window).sum(-1) + (0 if bias is None else bias))
        dwindow = dq[..., None] * weight
        dwindow[..., 1:] += dtaps[rows]
        dx[rows, :, t], dtaps[rows] = dwindow[..., -1], dwindow[..., :-1]
        dweight += (dq[..., None] * window).sum(0)
        dbias += dq.sum(0)
        dtaps[starts] = 0
    return CausalConv1dGradients(
        dx, dweight, None if bias is None else dbias, None if initial_state is None else dtaps
    )
