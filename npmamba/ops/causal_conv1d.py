"""The causal depthwise convolution: every channel is filtered by a few weights of its own, looking back only."""

from __future__ import annotations

from typing import Any, NamedTuple

from npmamba.autodiff.tape import Traced, primitive
from npmamba.backend import array_module, forward, twin
from npmamba.shapes import Arguments, compute_dtype, dtype_name

ACTIVATIONS = (None, "silu")


class CausalConv1dGradients(NamedTuple):
    """Gradients of `causal_conv1d`, each of its argument's shape and dtype; None where the argument was None."""

    x: Any
    weight: Any
    bias: Any
    initial_state: Any


def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    initial_state: Any = None,
    return_last_state: bool = False,
    seq_idx: Any = None,
    reverse: bool = False,
) -> Any:
    r"""Convolve every channel with its own weights over the present and the ``width - 1`` steps before it.

    For every batch row and channel d::

        y_t = activation(bias_d + sum_k weight_dk x_(t - (width - 1) + k))        k = 0 ... width - 1

    so the last weight meets the present and the first one the farthest past.

    Parameters
    ----------
    x : array (batch, dim, seqlen)
        Input: float16, bfloat16, float32 or float64, in any memory order. Fastest when the channels lie side by side.
    weight : array (dim, width)
        Weights of each channel, width 1 or more; float32, or float64 for float64 `x`.
    bias : array (dim,), optional
        Added before the activation; dtype of `weight`.
    activation : {None, "silu"}
        Applied to the result; ``silu(q) = q / (1 + exp(-q))``.
    initial_state : array (batch, dim, width - 1), optional
        The inputs before the first step, the oldest first, zeros if None; dtype of `weight`.
    return_last_state : bool
        Whether the last ``width - 1`` inputs are returned too: the initial state of what follows.
    seq_idx : integer array (batch, seqlen), optional
        Number of the sequence each step belongs to, for several sequences packed into one row: no step looks back
        across a change of it. Steps with a negative number are padding and treated as absent (their output is 0).
        `initial_state` enters the first sequence only, the last state is that of the last one.
    reverse : bool
        Look forward instead of back; equal to flipping time in `x`, `seq_idx` and the result.

    Returns
    -------
    y : array (batch, dim, seqlen)
        Dtype and memory order of `x`.
    last_state : array (batch, dim, width - 1)
        Only with `return_last_state`; float32, or float64 for float64 `x`.

    Raises
    ------
    ValueError
        If shapes disagree or an option is unknown.
    TypeError
        If an argument is no array, has another dtype than said above, or NumPy and CuPy arrays are mixed.

    Notes
    -----
    The convolution before the scan in figure 3 of Gu & Dao, "Mamba", arXiv 2312.00752; published models have width 4
    and silu. Differentiable in every array argument but `seq_idx`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0, 2.0, 3.0]]])
    >>> causal_conv1d(x, np.array([[10.0, 1.0]]))          # ten times the step before, plus the present one
    array([[[ 1., 12., 23.]]])
    """
    Arguments("causal_conv1d").flag("return_last_state", return_last_state)
    y, last_state = _causal_conv1d(
        x, weight, bias, initial_state, activation=activation, seq_idx=seq_idx, reverse=reverse
    )
    return (y, last_state) if return_last_state else y


def causal_conv1d_backward(
    dout: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    initial_state: Any = None,
    dlast_state: Any = None,
    seq_idx: Any = None,
    reverse: bool = False,
) -> CausalConv1dGradients:
    """Return the gradients of `causal_conv1d` for given gradients of its results.

    With q the argument of the activation::

        dq_t = dout_t activation'(q_t)        dx_t      = sum_k weight_k dq_(t + (width - 1) - k)
        dbias = sum_t dq_t                    dweight_k = sum_t dq_t x_(t - (width - 1) + k)

    Parameters
    ----------
    dout : array (batch, dim, seqlen)
        Gradient of the output y; dtype of `x`.
    x, weight, bias, activation, initial_state, seq_idx, reverse
        As for `causal_conv1d`.
    dlast_state : array (batch, dim, width - 1), optional
        Gradient of the last state; zeros if None.

    Returns
    -------
    CausalConv1dGradients
        Named tuple with fields x, weight, bias, initial_state.

    Raises
    ------
    ValueError, TypeError
        As `causal_conv1d`.

    Notes
    -----
    ``causal_conv1d.md`` beside this file derives every line.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0, 2.0, 3.0]]])
    >>> gradients = causal_conv1d_backward(np.ones((1, 1, 3)), x, np.array([[10.0, 1.0]]))
    >>> gradients.x
    array([[[11., 11.,  1.]]])
    >>> gradients.weight
    array([[3., 6.]])
    """
    arrays = (x, weight, bias, initial_state)
    static = {"activation": activation, "seq_idx": seq_idx, "reverse": reverse}
    if dout is None:
        raise TypeError("causal_conv1d_backward: dout must be a NumPy or CuPy array, got None")
    _check("causal_conv1d_backward", *arrays, dout=dout, dlast_state=dlast_state, **static)
    _, _, saved = twin("causal_conv1d", x).forward(*arrays, **static, save=True)
    return CausalConv1dGradients(*twin("causal_conv1d", x).backward(dout, dlast_state, saved))


def causal_conv1d_update(
    state: Any, x: Any, weight: Any, bias: Any = None, *, activation: str | None = None
) -> Any:
    """Convolve one step and move `state` on by it: what generation does for every new token.

    Parameters
    ----------
    state : array (batch, dim, width - 1)
        The inputs before this step, the oldest first; changed in place, so it must share no memory with the other
        arguments. float32, or float64 for float64 `x`, in any memory order; fastest when the channels lie side by side.
    x : array (batch, dim)
        Input of this step: float16, bfloat16, float32 or float64.
    weight, bias, activation
        As for `causal_conv1d`.

    Returns
    -------
    y : array (batch, dim)
        Dtype of `x`; the same bits as `causal_conv1d` gives for this step.

    Raises
    ------
    ValueError
        If shapes disagree, `state` is read-only, or the activation is unknown.
    TypeError
        If an argument is no array (a traced value is none: use `causal_conv1d`) or has another dtype than said above.

    Examples
    --------
    >>> import numpy as np
    >>> state = np.array([[[1.0, 2.0]]])
    >>> causal_conv1d_update(state, np.array([[3.0]]), np.array([[100.0, 10.0, 1.0]]))
    array([[123.]])
    >>> state
    array([[[2., 3.]]])
    """
    op, arrays = "causal_conv1d_update", {"state": state, "x": x, "weight": weight}
    for name, a in {**arrays, "bias": bias}.items():
        if type(a) is Traced:
            raise TypeError(f"{op}: {name} is traced, but a step in place has no gradient; use causal_conv1d")
    _require(op, arrays)
    array_module(op, **arrays, bias=bias)
    check = Arguments(op)
    check.shape("x", x, "batch dim")
    _check_parameters(check, x, weight, bias, activation)
    check.shape("state", state, "batch dim width-1")
    check.dtype("state", state, compute_dtype(x.dtype), like=f"x is {dtype_name(x.dtype)}")
    check.writable("state", state)
    return twin("causal_conv1d", x).update(state, x, weight, bias, activation=activation)


@primitive
def _causal_conv1d(
    x: Any, weight: Any, bias: Any, initial_state: Any, *, save: bool = False, **static: Any
) -> Any:
    y, last, saved = forward("causal_conv1d", _check, (x, weight, bias, initial_state), static, save=save)
    return (y, last), saved


@_causal_conv1d.vjp
def _causal_conv1d_vjp(dout: Any, saved: Any) -> Any:
    return twin("causal_conv1d", saved.arguments[0]).backward(*dout, saved)


def _require(op: str, arrays: dict[str, Any]) -> None:
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")


def _check(
    op: str,
    x: Any,
    weight: Any,
    bias: Any,
    initial_state: Any,
    *,
    activation: Any,
    seq_idx: Any,
    reverse: Any,
    dout: Any = None,
    dlast_state: Any = None,
) -> None:
    states = {"initial_state": initial_state, "dlast_state": dlast_state}
    _require(op, {"x": x, "weight": weight})
    array_module(op, x=x, weight=weight, bias=bias, **states, dout=dout, seq_idx=seq_idx)
    check = Arguments(op)
    check.shape("x", x, "batch dim seqlen")
    _check_parameters(check, x, weight, bias, activation)
    if dout is not None:
        check.shape("dout", dout, "batch dim seqlen")
        check.dtype("dout", dout, check.dtype("x", x), like=f"x is {dtype_name(x.dtype)}")
    for name, state in states.items():
        if state is not None:
            check.shape(name, state, "batch dim width-1")
            check.dtype(name, state, compute_dtype(x.dtype), like=f"x is {dtype_name(x.dtype)}")
    if seq_idx is not None:
        check.shape("seq_idx", seq_idx, "batch seqlen")
        check.integers("seq_idx", seq_idx)
    check.flag("reverse", reverse)


def _check_parameters(check: Arguments, x: Any, weight: Any, bias: Any, activation: Any) -> None:
    """Check `weight` and `bias` against `x`, whose shape has been checked, and bind the length of the state."""
    dtype = check.dtype("x", x)
    check.shape("weight", weight, "dim width")
    check.at_least("width", 1)
    check.bind("width-1", weight.shape[1] - 1, "weight")
    check.dtype("weight", weight, compute_dtype(dtype), like=f"x is {dtype_name(dtype)}")
    if bias is not None:
        check.shape("bias", bias, "dim")
        check.dtype("bias", bias, compute_dtype(dtype), like=f"x is {dtype_name(dtype)}")
    check.choice("activation", activation, ACTIVATIONS)


__all__ = ["CausalConv1dGradients", "causal_conv1d", "causal_conv1d_backward", "causal_conv1d_update"]
