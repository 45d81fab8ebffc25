"""Oracles for the selective scan and the convolution that SciPy computes; public in `npmamba.testing.oracles`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from npmamba.testing.sequences import ConvSequence, ScanSequence, conv_by, refuse_nonfinite, scan_by

Array = Any
Result = tuple[Array, Array]


def _refuse_euler(oracle: str, arguments: dict[str, Any]) -> None:
    if arguments.get("discretization", "euler") != "zoh":
        raise ValueError(f'{oracle}: discretization must be "zoh", which is what it solves')


def matrix_exponential(arguments: dict[str, Any]) -> Result:
    """Compute a scan with discretization="zoh" by the matrix exponential of each step's linear system.

    A step solves h' = diag(A) h + B u over a time Delta with u held; the exponential of Delta times the matrix
    ``[[diag(A), B], [0, 0]]`` is ``[[decay, inflow], [0, 1]]`` (C. F. Van Loan, "Computing integrals involving the
    matrix exponential", 1978). Slow.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``, all finite, discretization "zoh".

    Returns
    -------
    y : (batch, dim, seqlen) float64
    last_state : (batch, dim, dstate) float64

    Raises
    ------
    ValueError
        If the rule is another one, or a value is not finite.

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> y, _ = matrix_exponential(dict(u=one, delta=one, A=-one[0], B=one, C=one, discretization="zoh"))
    >>> bool(abs(y.item() - (1 - np.exp(-1))) < 1e-15)
    True
    """
    from scipy.linalg import expm

    _refuse_euler("matrix_exponential", arguments)
    refuse_nonfinite("matrix_exponential", arguments)

    def solve(s: ScanSequence) -> Result:
        h, Ch, steps = s.initial_state.copy(), np.zeros_like(s.u), s.step_sizes()
        dim, dstate = s.A.shape
        for d, t in np.ndindex(s.u.shape):
            system = np.zeros((dstate + 1, dstate + 1))
            system[:-1, :-1], system[:-1, -1] = np.diag(s.A[d]), s.B[d, :, t]
            step = expm(steps[d, t] * system)
            h[d] = step[:-1, :-1] @ h[d] + step[:-1, -1] * s.u[d, t]
            Ch[d, t] = s.C[d, :, t] @ h[d]
        return s.output(Ch), h

    return scan_by(solve, arguments)


def differential_equation(arguments: dict[str, Any], *, rtol: float = 1e-11) -> Result:
    """Compute a scan with discretization="zoh" as the solution of a differential equation, to about ten digits.

    h' = diag(A) h + B u is integrated numerically over each step, with u, B held: nothing knows an exponential here.
    Very slow, and hopeless where Delta A is large.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``, all finite, discretization "zoh", no negative step size.
    rtol : float
        Relative tolerance of the integration of one step.

    Returns
    -------
    y, last_state : as those of `matrix_exponential`

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> y, _ = differential_equation(dict(u=one, delta=one, A=-one[0], B=one, C=one, discretization="zoh"))
    >>> bool(abs(y.item() - (1 - np.exp(-1))) < 1e-10)
    True
    """
    from scipy.integrate import solve_ivp

    _refuse_euler("differential_equation", arguments)
    refuse_nonfinite("differential_equation", arguments)

    def solve(s: ScanSequence) -> Result:
        h, Ch, steps = s.initial_state.copy(), np.zeros_like(s.u), s.step_sizes()
        for d, t in np.ndindex(s.u.shape):
            slope = functools.partial(_slope, A=s.A[d], inflow=s.B[d, :, t] * s.u[d, t])
            size = np.abs(h[d]) + steps[d, t] * np.abs(s.B[d, :, t] * s.u[d, t])
            if steps[d, t] > 0 and size.any():
                done = solve_ivp(slope, (0, steps[d, t]), h[d], "DOP853", rtol=rtol, atol=1e-14 * size.max())
                h[d] = done.y[:, -1]
            Ch[d, t] = s.C[d, :, t] @ h[d]
        return s.output(Ch), h

    return scan_by(solve, arguments)


def _slope(time: float, h: Array, *, A: Array, inflow: Array) -> Array:
    return A * h + inflow


def _constants(oracle: str, s: ScanSequence) -> tuple[Array, Array, Array]:
    """Return step size (dim,), B and C (dim, dstate) of a sequence in which they do not change."""
    for name, x in (("delta", s.delta), ("B", s.B), ("C", s.C)):
        if (x != x[..., :1]).any():
            raise ValueError(f"{oracle}: {name} must not change over time; `constant` makes such arguments")
    return s.step_sizes()[:, 0], s.B[..., 0], s.C[..., 0]


def _discrete(step: float, A: Array, B: Array, zoh: bool) -> tuple[Array, Array]:
    """Return decay and inflow (dstate,) of one channel."""
    from scipy.signal import cont2discrete

    if not zoh:
        return np.exp(step * A), step * B
    matrices = np.diag(A), B[:, None], np.ones((1, len(A))), np.zeros((1, 1))
    decay, inflow, *_ = cont2discrete(matrices, step, method="zoh")
    return np.diag(decay), inflow[:, 0]


def linear_filter(arguments: dict[str, Any]) -> Result:
    """Compute a scan whose delta, B and C are constant by ``scipy.signal.lfilter``, one filter for each state.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``, all finite; `constant` holds those that must not change.

    Returns
    -------
    y, last_state : as those of `matrix_exponential`

    Raises
    ------
    ValueError
        If delta, B or C changes within a sequence.

    Examples
    --------
    >>> one = np.ones((1, 1, 3))
    >>> linear_filter(dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    (array([[[1., 2., 3.]]]), array([[[3.]]]))
    """
    from scipy.signal import lfilter

    refuse_nonfinite("linear_filter", arguments)

    def solve(s: ScanSequence) -> Result:
        steps, B, C = _constants("linear_filter", s)
        h, Ch = np.zeros_like(s.initial_state), np.zeros_like(s.u)
        for d, n in np.ndindex(s.A.shape):
            decay, inflow = _discrete(steps[d], s.A[d, [n]], B[d, [n]], s.zoh)
            states, _ = lfilter(inflow, [1, -decay[0]], s.u[d], zi=decay * s.initial_state[d, n])
            Ch[d] += C[d, n] * states
            h[d, n] = states[-1]
        return s.output(Ch), h

    return scan_by(solve, arguments)


def simulation(arguments: dict[str, Any]) -> Result:
    """Compute a scan whose delta, B and C are constant by ``scipy.signal.dlsim``, one system for each channel.

    dlsim reads the state before a step's input enters, the scan after: with decay and inflow of `dlsim` the scan's
    output is C (decay h + inflow u) = (C decay) h + (C inflow) u.

    Parameters, results and errors are those of `linear_filter`.

    >>> one = np.ones((1, 1, 3))
    >>> simulation(dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    (array([[[1., 2., 3.]]]), array([[[3.]]]))
    """
    from scipy.signal import dlsim

    refuse_nonfinite("simulation", arguments)

    def solve(s: ScanSequence) -> Result:
        steps, B, C = _constants("simulation", s)
        h, Ch = np.zeros_like(s.initial_state), np.zeros_like(s.u)
        for d in range(len(s.u)):
            decay, inflow = _discrete(steps[d], s.A[d], B[d], s.zoh)
            system = np.diag(decay), inflow[:, None], (C[d] * decay)[None], np.atleast_2d(C[d] @ inflow), 1.0
            _, Ch_d, before = dlsim(system, s.u[d][:, None], x0=s.initial_state[d])
            Ch[d], h[d] = Ch_d[:, 0], decay * before[-1] + inflow * s.u[d, -1]
        return s.output(Ch), h

    return scan_by(solve, arguments)


def convolution_filter(arguments: dict[str, Any]) -> Result:
    """Compute a causal convolution by ``scipy.signal.lfilter``, one filter for each channel.

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
    >>> convolution_filter(dict(x=np.array([[[1.0, 2.0, 3.0]]]), weight=np.array([[10.0, 1.0]])))
    (array([[[ 1., 12., 23.]]]), array([[[3.]]]))
    """
    from scipy.signal import lfilter
    from scipy.special import expit

    refuse_nonfinite("convolution_filter", arguments)

    def solve(s: ConvSequence) -> Array:
        taps = s.weight.shape[1] - 1
        filtered = [lfilter(weight[::-1], [1], x)[taps:] for weight, x in zip(s.weight, s.x, strict=True)]
        q = np.array(filtered) + s.bias[:, None]
        return q * expit(q) if s.silu else q

    return conv_by(solve, arguments)
