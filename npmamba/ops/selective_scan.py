"""The selective scan: Mamba's state space model with parameters that change from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.autodiff.tape import primitive
from npmamba.backend import array_module, forward, twin
from npmamba.shapes import Arguments, Known, compute_dtype

_KNOWN = Known()
DISCRETIZATIONS = ("euler", "zoh")
MAX_DSTATE = 256
_MAPS = ("dim dstate", "batch dstate seqlen", "batch groups dstate seqlen")


class SelectiveScanGradients(NamedTuple):
    """Gradients of `selective_scan`, each of its argument's shape and dtype; None where the argument was None."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    initial_state: Any = None,
    return_last_state: bool = False,
    discretization: str = "euler",
    seq_idx: Any = None,
    reverse: bool = False,
    precise: bool = False,
) -> Any:
    r"""Run a state space model whose step, input map and output map vary in time over a batch of sequences.

    For every batch row, channel d and state n::

        delta_t = softplus(delta_t + delta_bias)             softplus and bias where asked for
        h_t     = exp(delta_t A) h_{t-1} + f_t B_t u_t       f = delta ("euler") or (exp(delta A) - 1) / A ("zoh")
        y_t     = sum_n C_t h_t + D u_t
        out_t   = y_t silu(z_t)                              where z is given

    Parameters
    ----------
    u : array (batch, dim, seqlen)
        Input: float16, bfloat16, float32 or float64, in any memory order. Fastest when the channels lie side by side.
    delta : array (batch, dim, seqlen)
        Step sizes, before bias and softplus; dtype of `u`.
    A : array (dim, dstate)
        Rates of the states, usually negative; float32, or float64 for float64 `u`.
    B, C : array (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen)
        Input and output maps; dtype of `u`. `groups` divides `dim`; channel d belongs to group ``d // (dim / groups)``.
    D : array (dim,), optional
        Weight of the direct path from input to output; dtype of `A`.
    z : array (batch, dim, seqlen), optional
        Gate; dtype of `u`.
    delta_bias : array (dim,), optional
        Added to `delta`; dtype of `A`.
    delta_softplus : bool
        Whether the step is the softplus of `delta` plus bias.
    initial_state : array (batch, dim, dstate), optional
        State before the first step, zeros if None; dtype of `A`.
    return_last_state : bool
        Whether the state after the last step is returned too.
    discretization : {"euler", "zoh"}
        Input rule. Published checkpoints use ``"euler"``; ``"zoh"`` is the exact zero-order hold of equation 4.
    seq_idx : integer array (batch, seqlen), optional
        Number of the sequence each step belongs to, for several sequences packed into one row: the state is emptied
        where it changes. Steps with a negative number are padding and treated as absent (their output is 0).
        `initial_state` enters the first sequence only, the last state is that of the last one.
    reverse : bool
        Scan from the last step to the first; equal to flipping time in all arguments and in the result.
    precise : bool
        Carry the state in float64. Without it, float32 loses 6e-3 of the largest value over 2**20 steps where
        ``|delta A|`` is near 1e-6; float64 itself loses 6e-14.

    Returns
    -------
    y : array (batch, dim, seqlen)
        Dtype and memory order of `u`.
    last_state : array (batch, dim, dstate)
        Only with `return_last_state`; float32, or float64 for float64 `u`. Of NumPy arrays its channels lie
        side by side if those of `u` do.

    Raises
    ------
    ValueError
        If shapes disagree or an option is unknown.
    TypeError
        If an argument is no array, has another dtype than said above, or NumPy and CuPy arrays are mixed.

    Notes
    -----
    Equations 2a, 2b and 4 of Gu & Dao, "Mamba", arXiv 2312.00752. A step of 0 leaves the state as it is, also for
    ``A = -inf``. Differentiable in every array argument but `seq_idx`.

    Examples
    --------
    >>> import numpy as np
    >>> u = np.array([[[1.0, 0.0, 0.0]]])                      # one channel, an impulse
    >>> delta, A = np.ones((1, 1, 3)), np.array([[-np.log(2)]])  # one state, halved at every step
    >>> B = C = np.ones((1, 1))
    >>> selective_scan(u, delta, A, B, C).round(12)
    array([[[1.  , 0.5 , 0.25]]])
    """
    if type(return_last_state) is not bool:
        Arguments("selective_scan").flag("return_last_state", return_last_state)  # type: ignore[unreachable]
    y, last_state = _selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        delta_softplus=delta_softplus,
        discretization=discretization,
        seq_idx=seq_idx,
        reverse=reverse,
        precise=precise,
    )
    return (y, last_state) if return_last_state else y


def selective_scan_backward(
    dout: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    initial_state: Any = None,
    dlast_state: Any = None,
    discretization: str = "euler",
    seq_idx: Any = None,
    reverse: bool = False,
) -> SelectiveScanGradients:
    """Return the gradients of `selective_scan` for given gradients of its results.

    Parameters
    ----------
    dout : array (batch, dim, seqlen)
        Gradient of the output y; dtype of `u`.
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, discretization, seq_idx, reverse
        As for `selective_scan`.
    dlast_state : array (batch, dim, dstate), optional
        Gradient of the last state; zeros if None.

    Returns
    -------
    SelectiveScanGradients
        Named tuple with fields u, delta, A, B, C, D, z, delta_bias, initial_state.

    Raises
    ------
    ValueError, TypeError
        As `selective_scan`.

    Notes
    -----
    The state before every 64th step is computed again here; the tape hands it on instead.
    Every line is derived in ``selective_scan.md`` beside this file.

    Examples
    --------
    >>> import numpy as np
    >>> u = np.array([[[1.0, 0.0, 0.0]]])
    >>> delta, A = np.ones((1, 1, 3)), np.array([[-np.log(2)]])
    >>> B = C = np.ones((1, 1))
    >>> selective_scan_backward(np.ones((1, 1, 3)), u, delta, A, B, C).u.round(12)
    array([[[1.75, 1.5 , 1.  ]]])
    """
    arrays = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    static = {"delta_softplus": delta_softplus, "discretization": discretization, "seq_idx": seq_idx}
    static |= {"reverse": reverse, "precise": False}
    _check("selective_scan_backward", *arrays, dout=dout, dlast_state=dlast_state, **static)
    _, _, saved = twin("selective_scan", u).forward(*arrays, **static, save=True)
    return SelectiveScanGradients(*twin("selective_scan", u).backward(dout, dlast_state, saved))


@primitive
def _selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    initial_state: Any,
    *,
    save: bool = False,
    **static: Any,
) -> Any:
    arrays = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state, saved = forward("selective_scan", _check, arrays, static, save=save)
    return (y, last_state), saved


@_selective_scan.vjp
def _selective_scan_vjp(dout: Any, saved: Any) -> Any:
    return twin("selective_scan", saved.arguments[0]).backward(*dout, saved)


def _check(
    op: str,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    initial_state: Any,
    *,
    delta_softplus: Any,
    discretization: Any,
    seq_idx: Any,
    reverse: Any,
    precise: Any,
    dout: Any = None,
    dlast_state: Any = None,
) -> None:
    arrays = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, dout, dlast_state)
    call = _KNOWN.call(op, arrays, (delta_softplus, discretization, reverse, precise))
    known = call in _KNOWN
    if known and isinstance(u, np.ndarray):
        return
    steps = {"u": u, "delta": delta, "z": z, "dout": dout}
    maps = {"B": B, "C": C}
    channels = {"D": D, "delta_bias": delta_bias}
    states = {"initial_state": initial_state, "dlast_state": dlast_state}
    required = {"u": u, "delta": delta, "A": A, **maps}
    if op.endswith("_backward"):
        required = {"dout": dout, **required}
    for name, x in required.items():
        if x is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
    array_module(op, **steps, A=A, **maps, **channels, **states, seq_idx=seq_idx)
    if known:  # shapes and dtypes; where CuPy's arrays are had to be asked again
        return
    check = Arguments(op)
    _check_shapes(check, {**steps, "A": A}, maps, channels, states, seq_idx)
    _check_dtypes(check, u, {**steps, **maps}, {"A": A, **channels, **states})
    check.flag("delta_softplus", delta_softplus)
    check.flag("reverse", reverse)
    check.flag("precise", precise)
    check.choice("discretization", discretization, DISCRETIZATIONS)
    _KNOWN.add(call)


def _check_shapes(check: Arguments, steps: Any, maps: Any, channels: Any, states: Any, seq_idx: Any) -> None:
    layouts = dict.fromkeys(steps, ("batch dim seqlen",)) | {"A": ("dim dstate",)}
    layouts |= dict.fromkeys(maps, _MAPS) | dict.fromkeys(channels, ("dim",))
    layouts |= dict.fromkeys(states, ("batch dim dstate",)) | {"seq_idx": ("batch seqlen",)}
    for name, x in {**steps, **maps, **channels, **states, "seq_idx": seq_idx}.items():
        if x is not None:
            check.shape(name, x, *layouts[name])
    check.at_least("dstate", 1)
    check.at_most("dstate", MAX_DSTATE)
    for name, x in maps.items():
        if x.ndim == 4 and (x.shape[1] < 1 or check["dim"] % x.shape[1]):
            raise ValueError(
                f"{check.op}: {name} has groups={x.shape[1]}, but u has dim={check['dim']}; groups must divide dim"
            )
    if seq_idx is not None:
        check.integers("seq_idx", seq_idx)


def _check_dtypes(check: Arguments, u: Any, short: Any, long: Any) -> None:
    dtype = check.dtype("u", u)
    wide = compute_dtype(dtype)
    for name, x in short.items():
        if x is not None:
            check.dtype(name, x, dtype, like=f"u is {dtype.name}")
    for name, x in long.items():
        if x is not None:
            check.dtype(name, x, wide, like=f"u is {dtype.name}")


__all__ = ["SelectiveScanGradients", "selective_scan", "selective_scan_backward"]
