"""Oracles of more digits than float64 has; public in `npmamba.testing.oracles`."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.testing import doubled
from npmamba.testing.doubled import Doubled
from npmamba.testing.sequences import ConvSequence, ScanSequence, conv_by, refuse_nonfinite, scan_by

_STRETCH = 1 << 13
Array = Any
Result = tuple[Array, Array]


def multiprecision(arguments: dict[str, Any], *, digits: int = 50) -> Result:
    """Compute a scan with mpmath, one number after the other: for tiny cases, and right by any standard.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``, all finite.
    digits : int
        Decimal digits; results are rounded to float64 once, in the end.

    Returns
    -------
    y, last_state : (batch, dim, seqlen) and (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> multiprecision(dict(u=one, delta=1e-30 * one, A=-one[0], B=one, C=one, discretization="zoh"))
    (array([[[1.e-30]]]), array([[[1.e-30]]]))
    """
    mp = _mpmath()
    refuse_nonfinite("multiprecision", arguments)

    def solve(s: ScanSequence) -> Result:
        with mp.workdps(digits):
            return _solve_with(mp, s)

    return scan_by(solve, arguments)


def _mpmath() -> Any:
    try:
        import mpmath  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError(
            "npmamba.testing.oracles.multiprecision needs the package mpmath, which the extra `fuzz` brings: "
            'pip install "npmamba[fuzz]"'
        ) from None
    return mpmath


def _solve_with(mp: Any, s: ScanSequence) -> Result:
    """Solve a sequence in numbers of mpmath; elementary functions are written as a textbook has them."""
    exact = np.frompyfunc(mp.mpf, 1, 1)
    u, A, B, C, D, h = (exact(x.astype(object)) for x in (s.u, s.A, s.B, s.C, s.D, s.initial_state))
    raw = exact(s.delta.astype(object)) + exact(s.delta_bias.astype(object))[:, None]
    y = np.zeros(s.u.shape)
    for d, t in np.ndindex(s.u.shape):
        Delta = mp.log1p(mp.exp(raw[d, t])) if s.softplus else raw[d, t]
        for n in range(A.shape[1]):
            rate = A[d, n]
            weight = mp.expm1(Delta * rate) / rate if s.zoh and rate != 0 else Delta
            h[d, n] = mp.exp(Delta * rate) * h[d, n] + weight * B[d, n, t] * u[d, t]
        out = mp.fdot(C[d, :, t], h[d]) + D[d] * u[d, t]
        y[d, t] = float(out if s.z is None else out * _silu(mp, mp.mpf(s.z[d, t])))
    return y, h.astype(np.float64)


def _silu(mp: Any, z: Any) -> Any:
    return z / (1 + mp.exp(-z))


def double_double(arguments: dict[str, Any]) -> Result:
    """Compute a scan in double-double arithmetic: right to the last bit of float64, over a million steps in seconds.

    All times at once (see `npmamba.testing.doubled`), so it does not even share the order of steps with a kernel.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``, all finite, numbers between 1e-150 and 1e150 in size.

    Returns
    -------
    y, last_state : (batch, dim, seqlen) and (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1, 2**16))
    >>> y, _ = double_double(dict(u=one, delta=one, A=-1e-3 * one[0, :, :1], B=one, C=one))
    >>> bool(abs(y[0, 0, -1] / (np.expm1(-65.536) / np.expm1(-1e-3)) - 1) < 1e-15)
    True
    """
    refuse_nonfinite("double_double", arguments)
    with np.errstate(under="ignore"):
        return scan_by(_solve_doubled, arguments, whole_rows=True)


def _solve_doubled(s: ScanSequence) -> Result:
    """Solve a row in stretches of time that stay in the processor's caches."""
    h, y = Doubled(s.initial_state), np.zeros_like(s.u)
    length = min(_STRETCH, max(64, _STRETCH // len(s.u)))
    for start in range(0, s.u.shape[1], length):
        now = np.s_[..., start : start + length]
        z = None if s.z is None else s.z[now]
        part = s._replace(u=s.u[now], delta=s.delta[now], B=s.B[now], C=s.C[now], z=z, fresh=s.fresh[now])
        y[now], h = _solve_stretch(part, h)
    return y, h.hi


def _solve_stretch(s: ScanSequence, state: Doubled) -> tuple[Array, Doubled]:
    u, raw = Doubled(s.u), Doubled(s.delta) + Doubled(s.delta_bias[:, None])
    steps = doubled.softplus(raw) if s.softplus else raw
    y, last = Doubled(s.D[:, None]) * u, Doubled(np.zeros(s.A.shape))
    many = max(1, _STRETCH // s.u.size)
    for first in range(0, s.A.shape[1], many):
        n = np.s_[:, first : first + many]
        h = _states(s, n, steps[:, None], u[:, None], state[n])
        last[n], Ch = h[..., -1], Doubled(s.C[n]) * h
        for k in range(h.hi.shape[1]):
            y = y + Ch[:, k]
    return (y if s.z is None else y * doubled.silu(Doubled(s.z))).hi, last


def _states(s: ScanSequence, n: Any, steps: Doubled, u: Doubled, before: Doubled) -> Doubled:
    """Return some of the states after every step: (dim, states, seqlen)."""
    A = Doubled(s.A[n][:, :, None])
    x = steps * A
    decay, growth = doubled.exp_and_expm1(x)
    decay, weight = decay.where(~s.fresh, Doubled(0.0)), steps
    if s.zoh:
        weight = steps.where(np.abs(x.hi) < 1e-40, growth / A.where(A.hi != 0, Doubled(1.0)))
    inflow = Doubled(s.B[n]) * u * weight
    inflow[..., 0] = inflow[..., 0] + decay[..., 0] * before
    return doubled.recurrence(decay, inflow)


def convolution_double_double(arguments: dict[str, Any]) -> Result:
    """Compute a causal convolution in double-double arithmetic.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``causal_conv1d``, all finite.

    Returns
    -------
    y : (batch, dim, seqlen) float64
    last_state : (batch, dim, width - 1) float64

    Examples
    --------
    >>> convolution_double_double(dict(x=np.array([[[1e20, 1.0, -1e20]]]), weight=np.array([[1.0, 1.0, 1.0]])))[0]
    array([[[1.e+20, 1.e+20, 1.e+00]]])
    """
    refuse_nonfinite("convolution_double_double", arguments)

    def solve(s: ConvSequence) -> Array:
        x, (_, width) = Doubled(s.x), s.weight.shape
        seqlen = s.x.shape[1] - width + 1
        q = Doubled(np.repeat(s.bias[:, None], seqlen, axis=1))
        for k in range(width):
            q = q + Doubled(s.weight[:, k, None]) * x[:, k : k + seqlen]
        return (doubled.silu(q) if s.silu else q).hi

    with np.errstate(under="ignore"):
        return conv_by(solve, arguments)
