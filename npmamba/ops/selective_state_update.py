"""One step of the selective scan, with the state changed in place: what generation does for every new token."""

from __future__ import annotations

from typing import Any

from npmamba.autodiff.tape import Traced
from npmamba.backend import array_module, twin
from npmamba.ops.selective_scan import DISCRETIZATIONS, MAX_DSTATE
from npmamba.shapes import Arguments, compute_dtype, dtype_name


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    *,
    discretization: str = "euler",
) -> Any:
    r"""Run one step of the selective scan and change `state` in place.

    For every batch row, channel d and state n::

        dt  = softplus(dt + dt_bias)              softplus and bias where asked for
        h   = exp(dt A) h + f B x                 f = dt ("euler") or (exp(dt A) - 1) / A ("zoh")
        y   = sum_n C h + D x
        out = y silu(z)                           where z is given

    Parameters
    ----------
    state : array (batch, dim, dstate)
        The state h; changed in place, so it must share no memory with the other arguments. float32, or float64 for
        float64 `x`, in any memory order. Fastest when the channels lie side by side, which
        ``numpy.zeros((batch, dstate, dim), ...).swapaxes(1, 2)`` makes.
    x : array (batch, dim)
        Input of this step: float16, bfloat16, float32 or float64.
    dt : array (batch, dim)
        Step size, before bias and softplus; dtype of `x`.
    A : array (dim, dstate)
        Rates of the states, usually negative; dtype of `state`.
    B, C : array (dim, dstate), (batch, dstate) or (batch, groups, dstate)
        Input and output maps; dtype of `x`. Two axes are read as (batch, dstate) where batch equals dim. `groups`
        divides `dim`; channel d belongs to group ``d // (dim / groups)``; B and C have equally many.
    D : array (dim,), optional
        Weight of the direct path from input to output; dtype of `state`.
    z : array (batch, dim), optional
        Gate; dtype of `x`.
    dt_bias : array (dim,), optional
        Added to `dt`; dtype of `state`.
    dt_softplus : bool
        Whether the step is the softplus of `dt` plus bias.
    discretization : {"euler", "zoh"}
        As for `selective_scan`.

    Returns
    -------
    y : array (batch, dim)
        Dtype of `x`; on a CPU the same bits as `selective_scan` gives for this step, on a GPU equal to rounding.

    Raises
    ------
    ValueError
        If shapes disagree, `state` is read-only, or an option is unknown.
    TypeError
        If an argument is no array (a traced value is none: use `selective_scan`), has another dtype than said above,
        or NumPy and CuPy arrays are mixed.

    Notes
    -----
    Equations 2a, 2b and 4 of Gu & Dao, "Mamba", arXiv 2312.00752. Not differentiable, for it forgets the old state.

    Examples
    --------
    >>> import numpy as np
    >>> state = np.array([[[8.0]]])                                # one channel, one state, halved at every step
    >>> one = np.ones((1, 1))
    >>> selective_state_update(state, one, one, -np.log(2) * one, B=one, C=one).round(12)
    array([[5.]])
    >>> state.round(12)
    array([[[5.]]])
    """
    arrays = (state, x, dt, A, B, C, D, z, dt_bias)
    options = {"dt_softplus": dt_softplus, "discretization": discretization}
    _check("selective_state_update", *arrays, **options)
    return twin("selective_state_update", x).forward(*arrays, **options)


def _check(
    op: str,
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
    dt_softplus: Any,
    discretization: Any,
) -> None:
    required = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C}
    optional = {name: a for name, a in (("D", D), ("z", z), ("dt_bias", dt_bias)) if a is not None}
    for name, a in {**required, **optional}.items():
        if a is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
        if type(a) is Traced:
            raise TypeError(f"{op}: {name} is traced, but a step in place has no gradient; use selective_scan")
    array_module(op, **required, **optional)
    check = Arguments(op)
    _check_shapes(check, {**required, **optional})
    _check_dtypes(check, {**required, **optional})
    check.writable("state", state)
    check.flag("dt_softplus", dt_softplus)
    check.choice("discretization", discretization, DISCRETIZATIONS)


_LAYOUTS = {"x": "batch dim", "dt": "batch dim", "A": "dim dstate", "D": "dim", "z": "batch dim", "dt_bias": "dim"}


def _check_shapes(check: Arguments, arrays: dict[str, Any]) -> None:
    for name, layout in {**_LAYOUTS, "state": "batch dim dstate"}.items():
        if name in arrays:
            check.shape(name, arrays[name], layout)
    check.at_least("dstate", 1)
    check.at_most("dstate", MAX_DSTATE)
    for name in ("B", "C"):
        M, maps = arrays[name], ["batch dstate", "dim dstate", "batch groups dstate"]
        if M.ndim == 2 and M.shape[0] == check["dim"] != check["batch"]:
            maps.remove("batch dstate")
        check.shape(name, M, *maps)
        if M.ndim == 3 and (M.shape[1] < 1 or check["dim"] % M.shape[1]):
            raise ValueError(
                f"{check.op}: {name} has groups={M.shape[1]}, but x has dim={check['dim']}; groups must divide dim"
            )


def _check_dtypes(check: Arguments, arrays: dict[str, Any]) -> None:
    dtype = check.dtype("x", arrays["x"])
    for name, a in arrays.items():
        own = dtype if name in ("x", "dt", "B", "C", "z") else compute_dtype(dtype)
        check.dtype(name, a, own, like=f"x is {dtype_name(dtype)}")


__all__ = ["selective_state_update"]
