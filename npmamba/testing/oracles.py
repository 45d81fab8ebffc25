"""Oracles: what a scan, a convolution or a step should give, by ways that share no formula with the kernels.

Each takes the keyword arguments of the operation as a dict and returns y and the last state in float64.

===========================  ===============================  ==============================================
oracle                       by                               takes
===========================  ===============================  ==============================================
`matrix_exponential`         ``scipy.linalg.expm``            "zoh"
`differential_equation`      ``scipy.integrate.solve_ivp``    "zoh"; to about ten digits
`linear_filter`              ``scipy.signal.lfilter``         constant delta, B and C
`simulation`                 ``scipy.signal.dlsim``           constant delta, B and C
`multiprecision`             mpmath, 50 digits                everything finite; tiny cases
`double_double`              error-free transformations       everything finite; a million steps in seconds
`convolution_filter`         ``scipy.signal.lfilter``         convolutions
`convolution_double_double`  error-free transformations       convolutions
`complex_step`               the reference, complex           gradients of tiny scans
===========================  ===============================  ==============================================

They share only `npmamba.testing.sequences`, which takes packing, padding, groups and reversed time apart. What a
kernel is compared with is `exact_scan`, `exact_conv` or `exact_update`, which choose for any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npmamba.reference import causal_conv1d, selective_scan
from npmamba.reference.selective_scan import SelectiveScanGradients
from npmamba.testing.precise_oracles import convolution_double_double, double_double, multiprecision
from npmamba.testing.scipy_oracles import (
    convolution_filter,
    differential_equation,
    linear_filter,
    matrix_exponential,
    simulation,
)
from npmamba.testing.sequences import complete_conv, complete_scan, is_finite

__all__ = [
    "complex_step",
    "constant",
    "convolution_double_double",
    "convolution_filter",
    "differential_equation",
    "double_double",
    "exact_conv",
    "exact_scan",
    "exact_update",
    "linear_filter",
    "matrix_exponential",
    "multiprecision",
    "refined",
    "simulation",
    "update_as_scan",
]

Array = Any
Result = tuple[Array, Array]


def _exact(oracle: Callable[..., Result], reference: Callable[..., Result], arguments: dict[str, Any]) -> Result:
    """Ask the oracle; where there are infinities or NaN, given or computed, it is the reference that says."""
    if is_finite(arguments):
        with np.errstate(all="ignore"):
            result = oracle(arguments)
        if all(np.isfinite(x).all() for x in result):
            return result
    return reference(**arguments)


def exact_scan(arguments: dict[str, Any]) -> Result:
    """Compute a selective scan as exactly as float64 can hold it.

    By `double_double`; the float64 reference takes its place where infinities or NaN come in or out.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``.

    Returns
    -------
    y : (batch, dim, seqlen) float64
    last_state : (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1, 3))
    >>> exact_scan(dict(u=[1, 2, 3] * one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    (array([[[1., 3., 6.]]]), array([[[6.]]]))
    """
    return _exact(double_double, selective_scan.forward, complete_scan(arguments))


def exact_conv(arguments: dict[str, Any]) -> Result:
    """Compute a causal convolution as exactly as float64 can hold it; the like of `exact_scan`.

    >>> exact_conv(dict(x=np.array([[[1.0, 2.0, 3.0]]]), weight=np.array([[10.0, 1.0]])))
    (array([[[ 1., 12., 23.]]]), array([[[3.]]]))
    """
    return _exact(convolution_double_double, causal_conv1d.forward, complete_conv(arguments))


def exact_update(arguments: dict[str, Any]) -> Result:
    """Compute one step of a scan as exactly as float64 can hold it; the given state is left alone.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_state_update``.

    Returns
    -------
    y : (batch, dim) float64
    new_state : (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> exact_update(dict(state=6 * one[None], x=4 * one, dt=one, A=0 * one, B=one, C=one))
    (array([[10.]]), array([[[10.]]]))
    """
    y, state = exact_scan(update_as_scan(arguments))
    return y[..., 0], state


def update_as_scan(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the scan of one token that ``selective_state_update`` is.

    >>> one = np.ones((1, 1))
    >>> scan = update_as_scan(dict(state=one[None], x=one, dt=one, A=one, B=one, C=one))
    >>> scan["u"].shape, scan["B"].shape, scan["initial_state"].shape
    ((1, 1, 1), (1, 1, 1), (1, 1, 1))
    """
    names = {"state": "initial_state", "x": "u"}
    batch = arguments["x"].shape[0]
    timed = {name for name in ("B", "C") if arguments[name].ndim == 3 or arguments[name].shape[0] == batch}
    timed |= {name for name in ("x", "dt", "z") if arguments.get(name) is not None}
    return {
        names.get(name, name.replace("dt", "delta")): x[..., None] if name in timed else x
        for name, x in arguments.items()
    }


def constant(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with delta, B and C held at their first value: a linear time-invariant system.

    >>> u = np.ones((1, 1, 3))
    >>> constant(dict(u=u, delta=np.cumsum(u, -1), B=u, C=u))["delta"]
    array([[[1., 1., 1.]]])
    """
    held = {}
    for name in ("delta", "B", "C"):
        x = arguments[name]
        held[name] = x if np.ndim(x) == 2 or x.shape[-1] == 0 else np.repeat(x[..., :1], x.shape[-1], axis=-1)
    return {**arguments, **held}


def refined(arguments: dict[str, Any], parts: int) -> dict[str, Any]:
    """Cut every step into equal ones: with `parts` growing, the euler rule then converges to the exact one.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan`` without softplus, bias, D and gate.
    parts : int

    Returns
    -------
    dict
        The arguments of a scan of ``parts * seqlen`` steps; the original times are ``y[..., parts - 1 :: parts]``.

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> refined(dict(u=one, delta=one, A=-one[0], B=one, C=one, seq_idx=None, reverse=False), 4)["delta"]
    array([[[0.25, 0.25, 0.25, 0.25]]])
    """
    if arguments.get("delta_softplus") or arguments.get("delta_bias") is not None:
        raise ValueError("refined: delta must be the step size itself, without softplus and bias")
    names = [name for name in ("u", "delta", "B", "C", "z") if getattr(arguments.get(name), "ndim", 0) > 2]
    names += ["seq_idx"] if arguments.get("seq_idx") is not None else []
    longer = {name: np.repeat(arguments[name], parts, axis=-1) for name in names}
    return {**arguments, **longer, "delta": longer["delta"] / parts}


def complex_step(dout: Array, arguments: dict[str, Any], dlast_state: Array = None) -> SelectiveScanGradients:
    """Differentiate the reference scan numerically, with no difference and so no cancellation.

    f'(x) = Im f(x + ih) / h with h = 1e-30 (W. Squire and G. Trapp, "Using complex variables to estimate derivatives
    of real functions", 1998). One scan for each element of each argument: for tiny cases.

    Parameters
    ----------
    dout : (batch, dim, seqlen)
    arguments : dict
        Keyword arguments of ``selective_scan``.
    dlast_state : (batch, dim, dstate), optional

    Returns
    -------
    SelectiveScanGradients
        Gradients of sum(dout * y) + sum(dlast_state * last_state), float64; None where the argument is None.

    Examples
    --------
    >>> one = np.ones((1, 1, 3))
    >>> complex_step(one, dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one)).u
    array([[[3., 2., 1.]]])
    """
    a, h = complete_scan(arguments), 1e-30
    weights = np.asarray(dout, np.float64), None if dlast_state is None else np.asarray(dlast_state, np.float64)

    def gradient(name: str) -> Array:
        grad = np.zeros(a[name].shape)
        for index in np.ndindex(grad.shape):
            moved = a[name].astype(np.complex128)
            moved[index] += 1j * h
            outputs = selective_scan.forward(**{**a, name: moved})
            grad[index] = sum((w * y).sum().imag for w, y in zip(weights, outputs, strict=True) if w is not None) / h
        return grad

    fields = SelectiveScanGradients._fields
    return SelectiveScanGradients(*(None if a[name] is None else gradient(name) for name in fields))
