"""Root-mean-square normalization, with the residual sum that comes before it fused in."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from npmamba.autodiff.tape import primitive
from npmamba.backend import array_module, twin
from npmamba.shapes import Arguments, compute_dtype


class RmsNormGradients(NamedTuple):
    """Gradients of `rms_norm`, each of its argument's shape and dtype; None where the argument was None."""

    x: Any
    weight: Any
    residual: Any


def rms_norm(x: Any, weight: Any, *, eps: float = 1e-5, residual: Any = None) -> Any:
    """Divide every row by its root mean square and multiply it by a weight per channel.

    With s = x, or s = x + residual where a residual is given::

        y = s / sqrt(mean(s^2) + eps) * weight        mean over the last axis

    Parameters
    ----------
    x : array (..., d_model)
        Rows to normalize: float16, bfloat16, float32 or float64.
    weight : array (d_model,)
        Factor of each channel; float32, or float64 for float64 `x`.
    eps : float
        Added to the mean square: 0 or more.
    residual : array (..., d_model), optional
        Added to `x` before the norm; shape and dtype of `x`.

    Returns
    -------
    y : array (..., d_model)
        C-ordered, of the dtype of `x`.
    s : array (..., d_model)
        Only with `residual`: the sum ``x + residual``, which the next residual connection takes on.

    Raises
    ------
    ValueError
        If shapes disagree or `eps` is negative.
    TypeError
        If an argument is no array, has another dtype than said above, or NumPy and CuPy arrays are mixed.

    Notes
    -----
    Equation 4 of Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467. For the half types
    the sum is rounded where it is returned, not where it is normalized. Differentiable in `x`, `weight` and
    `residual`; the derivation stands in ``rms_norm.md`` beside this file.

    Examples
    --------
    >>> import numpy as np
    >>> rms_norm(np.array([1.0, 7.0]), np.array([1.0, 10.0]), eps=0.0)
    array([ 0.2, 14. ])
    """
    return _rms_norm(x, weight, residual, eps=eps)


def rms_norm_backward(
    dout: Any, x: Any, weight: Any, *, eps: float = 1e-5, residual: Any = None, dresidual: Any = None
) -> RmsNormGradients:
    """Return the gradients of `rms_norm` for given gradients of its results.

    Parameters
    ----------
    dout : array (..., d_model)
        Gradient of y; shape and dtype of `x`.
    x, weight, eps, residual
        As for `rms_norm`.
    dresidual : array (..., d_model), optional
        Gradient of the second result, the sum ``x + residual``; zeros if None. Only with `residual`.

    Returns
    -------
    RmsNormGradients
        Named tuple with fields x, weight, residual. The sum has one gradient: x and residual are the same array.

    Raises
    ------
    ValueError, TypeError
        As `rms_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> gradients = rms_norm_backward(np.array([1.0, 0.0]), np.array([1.0, 7.0]), np.ones(2), eps=0.0)
    >>> gradients.x.round(3), gradients.weight
    (array([ 0.196, -0.028]), array([0.2, 0. ]))
    """
    _check("rms_norm_backward", x, weight, residual, eps, dout=dout, dresidual=dresidual)
    if dresidual is not None and residual is None:
        raise ValueError("rms_norm_backward: dresidual is given without residual, so there is no such result")
    *_, saved = twin("rms_norm", x).forward(x, weight, residual, eps=eps, save=True)
    return RmsNormGradients(*twin("rms_norm", x).backward(dout, dresidual, saved))


@primitive
def _rms_norm(x: Any, weight: Any, residual: Any, *, eps: float, save: bool = False) -> Any:
    _check("rms_norm", x, weight, residual, eps)
    y, s, saved = twin("rms_norm", x).forward(x, weight, residual, eps=eps, save=save)
    return (y if residual is None else (y, s)), saved


@_rms_norm.vjp
def _rms_norm_vjp(dout: Any, saved: Any) -> Any:
    dout, dresidual = dout if isinstance(dout, tuple) else (dout, None)
    return twin("rms_norm", saved.x).backward(dout, dresidual, saved)


def _check(op: str, x: Any, weight: Any, residual: Any, eps: Any, **gradients: Any) -> None:
    required = {"dout": gradients["dout"]} if gradients else {}
    for name, array in {**required, "x": x, "weight": weight}.items():
        if array is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
    likes = {"residual": residual, **gradients}
    array_module(op, x=x, weight=weight, **likes)
    _check_shapes(op, x, weight, likes)
    check = Arguments(op)
    dtype = check.dtype("x", x)
    check.dtype("weight", weight, compute_dtype(dtype), like=f"x is {dtype.name}")
    for name, array in likes.items():
        if array is not None:
            check.dtype(name, array, dtype, like=f"x is {dtype.name}")
    check.number("eps", eps, lambda x: 0 <= x < math.inf, "0 or more and finite")


def _check_shapes(op: str, x: Any, weight: Any, likes: dict[str, Any]) -> None:
    if x.ndim == 0:
        raise ValueError(f"{op}: x has 0 axes; x must be (..., d_model), got shape ()")
    d_model = x.shape[-1]
    if d_model == 0:
        raise ValueError(f"{op}: x has d_model=0; d_model must be at least 1")
    if weight.shape != (d_model,):
        came = f"d_model={weight.shape[0]}" if weight.ndim == 1 else f"{weight.ndim} axes"
        expected = f"weight must be (d_model,), got shape {weight.shape}"
        raise ValueError(f"{op}: weight has {came}, but x has d_model={d_model}; {expected}")
    for name, array in likes.items():
        if array is not None and array.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {array.shape}, but x has shape {x.shape}; they must be equal")


__all__ = ["RmsNormGradients", "rms_norm", "rms_norm_backward"]
