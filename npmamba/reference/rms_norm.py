"""Root-mean-square normalization in float64.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.reference.functions import as_float64


class RmsNormGradients(NamedTuple):
    """Gradients by argument; None where the argument was None."""

    x: Any
    weight: Any
    residual: Any


def forward(x: Any, weight: Any, *, eps: float = 1e-5, residual: Any = None) -> Any:
    """Compute y = s / sqrt(mean(s^2) + eps) * weight over the last axis, with s = x or s = x + residual.

    Parameters
    ----------
    x, residual : (..., d_model) real or complex
    weight : (d_model,)
    eps : float

    Returns
    -------
    y : (..., d_model) float64, or complex128 if any argument is complex
    s : (..., d_model)
        Only with `residual`: the sum, which the next residual connection takes on.

    Examples
    --------
    >>> forward(np.array([3.0, 4.0]), np.ones(2), eps=0.0) * np.sqrt(12.5)
    array([3., 4.])
    """
    x, weight, residual = as_float64(x), as_float64(weight), as_float64(residual)
    s = x if residual is None else x + residual
    y = s / np.sqrt((s * s).mean(-1, keepdims=True) + eps) * weight
    return y if residual is None else (y, s)


def backward(
    dout: Any, x: Any, weight: Any, *, eps: float = 1e-5, residual: Any = None, dresidual: Any = None
) -> RmsNormGradients:
    """Compute the gradients of sum(dout * y) + sum(dresidual * s), derived by hand.

    With r = 1 / sqrt(mean(s^2) + eps), s_hat = s r and q = dout weight::

        ds = r (q - s_hat mean(q s_hat)) + dresidual        dweight = sum dout s_hat

    Parameters are those of `forward`; `dresidual` (None: zero) is the gradient of the second output; real
    only.

    Returns
    -------
    RmsNormGradients
        float64 gradients of the arguments' shapes; None where the argument was None.

    Examples
    --------
    >>> backward(np.ones(2), np.array([3.0, 3.0]), np.ones(2), eps=0.0).x
    array([0., 0.])
    """
    dout, x, weight, residual = as_float64(dout), as_float64(x), as_float64(weight), as_float64(residual)
    s = x if residual is None else x + residual
    r = 1 / np.sqrt((s * s).mean(-1, keepdims=True) + eps)
    s_hat, q = s * r, dout * weight
    ds = r * (q - s_hat * (q * s_hat).mean(-1, keepdims=True))
    if dresidual is not None:
        ds = ds + as_float64(dresidual)
    dweight = (dout * s_hat).reshape(-1, weight.size).sum(0)
    return RmsNormGradients(ds, dweight, None if residual is None else ds.copy())
