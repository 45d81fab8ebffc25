"""One step of the selective scan in float64: what generation does for every new token."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.reference import selective_scan
from npmamba.reference.functions import advanced, as_float64, discretize, silu, softplus


class SelectiveStateUpdateGradients(NamedTuple):
    """Gradients by argument; None where the argument was None."""

    state: Any
    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    dt_bias: Any


def _is_constant(B: Any, batch: int) -> bool:
    return np.ndim(B) == 2 and np.shape(B)[0] != batch


def _per_channel(B: Any, batch: int, dim: int) -> Any:
    """Return B (or C) as every channel sees it: (dim, dstate) or (batch, dim, dstate)."""
    if _is_constant(B, batch):
        return B
    groups = B if B.ndim == 3 else B[:, None]
    return np.repeat(groups, dim // groups.shape[1], axis=1)


@np.errstate(over="ignore", invalid="ignore")
def forward(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False, *, discretization: str = "euler",
) -> tuple[Any, Any]:
    """Compute one step of the selective scan; `state` is not changed, the new one is returned.

    With Delta = softplus(dt + dt_bias), a = exp(Delta A), f = Delta (euler) or expm1(Delta A) / A (zoh)::

        new_state = a state + f B x
        y = (sum_n C new_state + D x) silu(z)

    Parameters
    ----------
    state : (batch, dim, dstate) real or complex
    x, dt, z : (batch, dim)
    A : (dim, dstate)
    B, C : (batch, dstate), (batch, groups, dstate) or (dim, dstate)
        Two axes are read as (batch, dstate) if the first has the batch's length, so also where batch == dim.
    D, dt_bias : (dim,)
    discretization : {"euler", "zoh"}

    Returns
    -------
    y : (batch, dim) float64, or complex128 if any argument is complex
    new_state : (batch, dim, dstate) of the same dtype

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> forward(np.full((1, 1, 1), 6.0), 4 * one, one, A=0 * one, B=one, C=one)
    (array([[10.]]), array([[[10.]]]))
    """
    state, x, dt, A, B, C, D, z, dt_bias = (as_float64(q) for q in (state, x, dt, A, B, C, D, z, dt_bias))
    raw = dt if dt_bias is None else dt + dt_bias
    Delta = softplus(raw) if dt_softplus else raw
    exponent, a, f = discretize(Delta[..., None], A, discretization)
    inflow = f * _per_channel(B, *x.shape) * x[..., None]
    new_state = advanced(exponent, a, state, inflow)
    y = (_per_channel(C, *x.shape) * new_state).sum(-1)
    if D is not None:
        y = y + D * x
    return (y if z is None else y * silu(z)), new_state


def backward(
    dout: Any, state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
    dt_bias: Any = None, dt_softplus: bool = False, *, dnew_state: Any = None, discretization: str = "euler",
) -> SelectiveStateUpdateGradients:
    """Compute the gradients of sum(dout * y) + sum(dnew_state * new_state).

    A step is a scan of one token, and so are its gradients (see ``selective_scan.backward``). Parameters are
    those of `forward`, `dout` is (batch, dim) and `dnew_state` (batch, dim, dstate) or None; real only.

    Returns
    -------
    SelectiveStateUpdateGradients
        float64 gradients of the arguments' shapes; None where the argument was None.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> backward(one, np.full((1, 1, 1), 6.0), 4 * one, one, A=0 * one, B=one, C=one).dt
    array([[4.]])
    """
    batch = np.shape(x)[0]
    dout, x, dt, z = (None if q is None else np.asarray(q)[..., None] for q in (dout, x, dt, z))
    B_t, C_t = (q if _is_constant(q, batch) else np.asarray(q)[..., None] for q in (B, C))
    g = selective_scan.backward(
        dout, x, dt, A, B_t, C_t, D, z, dt_bias, dt_softplus,
        initial_state=state, dlast_state=dnew_state, discretization=discretization,
    )
    dB, dC = g.B.reshape(np.shape(B)), g.C.reshape(np.shape(C))
    dz = None if g.z is None else g.z[..., 0]
    return SelectiveStateUpdateGradients(
        g.initial_state, g.u[..., 0], g.delta[..., 0], g.A, dB, dC, g.D, dz, g.delta_bias
    )
