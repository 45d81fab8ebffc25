"""The selective scan in float64: the equations of Mamba, one time step after the other.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), equations 2 and
4 and algorithm 2. Indices: b batch, d channel, n state, t time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npmamba.reference.functions import (
    advanced,
    as_float64,
    decayed,
    discretize,
    flip_time,
    phi_derivative,
    runs,
    sigmoid,
    silu,
    silu_derivative,
    softplus,
)


class SelectiveScanGradients(NamedTuple):
    """Gradients by argument; None where the argument was None."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any


def _step_size(delta: Any, delta_bias: Any, delta_softplus: bool) -> tuple[Any, Any]:
    """Return Delta and its derivative by delta, both (batch, dim, seqlen)."""
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    return (softplus(raw), sigmoid(raw)) if delta_softplus else (raw, np.ones_like(raw))


def _at(B: Any, t: int, batch: int, dim: int) -> Any:
    """Return B (or C) of time `t` as every channel sees it: (batch, dim, dstate)."""
    if B.ndim == 2:
        return np.broadcast_to(B, (batch, *B.shape))
    groups = (B if B.ndim == 4 else B[:, None])[..., t]
    return np.repeat(groups, dim // groups.shape[1], axis=1)


def _add_at(dB: Any, t: int, rows: Any, contribution: Any) -> None:
    """Add what every channel contributes (rows, dim, dstate) to the gradient of B (or C) at time `t`."""
    if dB.ndim == 2:
        dB += contribution.sum(0)
    elif dB.ndim == 3:
        dB[rows, :, t] += contribution.sum(1)
    else:
        n, dim, dstate = contribution.shape
        groups = dB.shape[1]
        dB[rows, :, :, t] += contribution.reshape(n, groups, dim // groups, dstate).sum(2)


def _steps(u: Any, Delta: Any, A: Any, B: Any, h: Any, discretization: str, seq_idx: Any) -> Iterator[Any]:
    """Advance `h` in place, step by step; yield (t, starts, rows, exponent, decay, weight, state before, state after).

    `rows` are the batch rows that have a step at time t; only they appear in the last five. `starts` are
    those whose state was set to zero first.
    """
    batch, dim, seqlen = u.shape
    valid, start = runs(seq_idx, batch, seqlen)
    for t in range(seqlen):
        rows = valid[:, t]
        h[start[:, t]] = 0
        x, a, f = discretize(Delta[rows, :, t, None], A, discretization)
        before = h[rows]
        inflow = f * _at(B, t, batch, dim)[rows] * u[rows, :, t, None]
        h[rows] = advanced(x, a, before, inflow)
        yield t, start[:, t], rows, x, a, f, before, h[rows]


@np.errstate(over="ignore", invalid="ignore")
def forward(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False, *, initial_state: Any = None, discretization: str = "euler",
    seq_idx: Any = None, reverse: bool = False,
) -> tuple[Any, Any]:
    """Compute the selective scan.

    With Delta = softplus(delta + delta_bias) (or without softplus or bias)::

        a_t = exp(Delta_t A)                f_t = Delta_t (euler) or expm1(Delta_t A) / A (zoh)
        h_t = a_t h_{t-1} + f_t B_t u_t     y_t = (sum_n C_t h_t + D u_t) silu(z_t)

    Parameters
    ----------
    u, delta, z : (batch, dim, seqlen) real or complex
    A : (dim, dstate)
    B, C : (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen)
        Constant, varying with time, or varying and shared by dim / groups neighbouring channels.
    D, delta_bias : (dim,)
    initial_state : (batch, dim, dstate)
    discretization : {"euler", "zoh"}
    seq_idx : (batch, seqlen) integers
        The state is zeroed where it changes; steps with a negative value are as if absent, with y = 0.
    reverse : bool
        Run from the last time to the first.

    Returns
    -------
    y : (batch, dim, seqlen) float64, or complex128 if any argument is complex
    last_state : (batch, dim, dstate) of the same dtype

    Examples
    --------
    Without decay the scan is a cumulative sum:

    >>> one = np.ones((1, 1, 3))
    >>> y, last_state = forward(np.array([[[1, 2, 3]]]), delta=one, A=np.zeros((1, 1)), B=one, C=one)
    >>> y, last_state
    (array([[[1., 3., 6.]]]), array([[[6.]]]))
    """
    if reverse:
        y, last_state = forward(
            flip_time(u), flip_time(delta), A, flip_time(B, keep_ndim=2), flip_time(C, keep_ndim=2), D,
            flip_time(z), delta_bias, delta_softplus, initial_state=initial_state,
            discretization=discretization, seq_idx=flip_time(seq_idx),
        )
        return flip_time(y), last_state
    arrays = [as_float64(x) for x in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
    dtype = np.result_type(*(x for x in arrays if x is not None))
    u, delta, A, B, C, D, z, delta_bias, h = arrays
    batch, dim, _ = u.shape
    Delta, _ = _step_size(delta, delta_bias, delta_softplus)
    h = np.zeros((batch, *A.shape), dtype) if h is None else h.astype(dtype)
    y = np.zeros(u.shape, dtype)
    for t, _, rows, *_, after in _steps(u, Delta, A, B, h, discretization, seq_idx):
        y_t = (_at(C, t, batch, dim)[rows] * after).sum(-1)
        if D is not None:
            y_t = y_t + D * u[rows, :, t]
        y[rows, :, t] = y_t if z is None else y_t * silu(z[rows, :, t])
    return y, h


@np.errstate(over="ignore", invalid="ignore")
def backward(
    dout: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
    delta_bias: Any = None, delta_softplus: bool = False, *, initial_state: Any = None,
    dlast_state: Any = None, discretization: str = "euler", seq_idx: Any = None, reverse: bool = False,
) -> SelectiveScanGradients:
    """Compute the gradients of sum(dout * y) + sum(dlast_state * last_state), derived by hand.

    With g_t the gradient of the state h_t and dy = dout silu(z)::

        g_t = C_t dy_t + a_{t+1} g_{t+1}          dC_t = dy_t h_t        dB_t = g_t f_t u_t
        du_t = D dy_t + sum_n g_t f_t B_t         dz = dout y silu'(z)   dD = sum dy u
        da_t = g_t h_{t-1}                        df_t = g_t B_t u_t
        dDelta_t = sum_n da_t a_t A + df_t (euler) or + df_t a_t (zoh)
        dA = sum_{b,t} da_t a_t Delta_t, and for zoh + df_t Delta_t^2 phi'(Delta_t A)
        ddelta = dDelta sigmoid(delta + delta_bias)

    Parameters are those of `forward`, and `dout` like u, `dlast_state` like initial_state (None: zero); real
    only.

    Where A is infinite, neither a nor the f of zoh depends on Delta, and those terms are 0.

    Returns
    -------
    SelectiveScanGradients
        float64 gradients of the arguments' shapes; None where the argument was None.

    Examples
    --------
    >>> one = np.ones((1, 1, 3))
    >>> backward(one, one, delta=one, A=np.zeros((1, 1)), B=one, C=one).u
    array([[[3., 2., 1.]]])
    """
    if reverse:
        grads = backward(
            flip_time(dout), flip_time(u), flip_time(delta), A, flip_time(B, keep_ndim=2),
            flip_time(C, keep_ndim=2), D, flip_time(z), delta_bias, delta_softplus,
            initial_state=initial_state, dlast_state=dlast_state, discretization=discretization,
            seq_idx=flip_time(seq_idx),
        )
        timed = ("u", "delta", "B", "C", "z")
        return grads._replace(**{name: flip_time(getattr(grads, name), keep_ndim=2) for name in timed})
    arrays = [as_float64(x) for x in (dout, u, delta, A, B, C, D, z, delta_bias, initial_state, dlast_state)]
    dout, u, delta, A, B, C, D, z, delta_bias, h0, g = arrays
    batch, dim, _ = u.shape
    Delta, dDelta_ddelta = _step_size(delta, delta_bias, delta_softplus)
    h = np.zeros((batch, *A.shape)) if h0 is None else h0
    g = np.zeros((batch, *A.shape)) if g is None else g
    du, dDelta, dz = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    dA, dB, dC, dD = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), np.zeros(dim)
    finite = ~np.isinf(A)
    steps = list(_steps(u, Delta, A, B, h, discretization, seq_idx))
    for t, starts, rows, x, a, f, before, after in reversed(steps):
        u_t, Delta_t, dy = u[rows, :, t], Delta[rows, :, t, None], dout[rows, :, t]
        B_t, C_t = _at(B, t, batch, dim)[rows], _at(C, t, batch, dim)[rows]
        if z is not None:
            y = (C_t * after).sum(-1) + (0 if D is None else D * u_t)
            dz[rows, :, t] = dy * y * silu_derivative(z[rows, :, t])
            dy = dy * silu(z[rows, :, t])
        g_t = g[rows] + C_t * dy[..., None]
        _add_at(dC, t, rows, dy[..., None] * after)
        _add_at(dB, t, rows, g_t * f * u_t[..., None])
        du[rows, :, t] = (g_t * f * B_t).sum(-1) + (0 if D is None else D * dy)
        dD += (dy * u_t).sum(0)
        g_before, df = decayed(x, a, g_t), g_t * B_t * u_t[..., None]
        p = g_before * before
        dA += (p * Delta_t).sum(0)
        dDelta_t = p * np.where(finite, A, 0)
        if discretization == "zoh":
            dA += (df * Delta_t**2 * phi_derivative(x)).sum(0)
            dDelta_t = dDelta_t + df * np.where(finite, a, 0)
        else:
            dDelta_t = dDelta_t + df
        dDelta[rows, :, t] = dDelta_t.sum(-1)
        g[rows] = g_before
        g[starts] = 0
    ddelta = np.where(runs(seq_idx, batch, u.shape[2])[0][:, None], dDelta * dDelta_ddelta, 0)
    return SelectiveScanGradients(
        du, ddelta, dA, dB, dC, None if D is None else dD, None if z is None else dz,
        None if delta_bias is None else ddelta.sum((0, 2)), None if h0 is None else g,
    )


def exact_zoh(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, initial_state: Any = None
) -> tuple[Any, Any]:
    """Compute the scan with discretization="zoh" by the matrix exponential, with no formula of this package.

    Every channel and step is a linear system h' = diag(A) h + B u, y = C h + D u, held over a time delta and
    discretized by ``scipy.signal.cont2discrete``. Very slow. Shapes are those of `forward`; `delta` is the
    step size itself, and positive.

    Returns
    -------
    y : (batch, dim, seqlen) float64
    last_state : (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> y, last_state = exact_zoh(one, delta=one, A=-np.ones((1, 1)), B=one, C=one)
    >>> bool(abs(y.item() - (1 - np.exp(-1))) < 1e-15)
    True
    """
    from scipy.signal import cont2discrete  # here: it takes a second to load, and nothing else needs it

    u, delta, A, B, C, D = (as_float64(x) for x in (u, delta, A, B, C, D))
    batch, dim, seqlen = u.shape
    h = np.zeros((batch, *A.shape)) if initial_state is None else as_float64(initial_state)
    y = np.zeros_like(u)
    for b, d, t in np.ndindex(batch, dim, seqlen):
        B_t, C_t = _at(B, t, batch, dim)[b, d], _at(C, t, batch, dim)[b, d]
        system = np.diag(A[d]), B_t[:, None], C_t[None], np.atleast_2d(0 if D is None else D[d])
        Ad, Bd, Cd, Dd, _ = cont2discrete(system, delta[b, d, t], method="zoh")
        h[b, d] = Ad @ h[b, d] + Bd[:, 0] * u[b, d, t]
        y[b, d, t] = Cd[0] @ h[b, d] + Dd[0, 0] * u[b, d, t]
    return y, h
