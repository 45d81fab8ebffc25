"""Token embedding: rows of a table, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import as_float64


def forward(weight: Any, input_ids: Any) -> Any:
    """Look up weight[input_ids].

    Parameters
    ----------
    weight : (vocab, d_model) real or complex
    input_ids : (...) integers

    Returns
    -------
    (..., d_model) float64, or complex128 if `weight` is complex

    Examples
    --------
    >>> forward(np.array([[1, 2], [3, 4]]), np.array([1, 0, 1]))
    array([[3., 4.],
           [1., 2.],
           [3., 4.]])
    """
    return as_float64(weight)[np.asarray(input_ids)]


def backward(dout: Any, input_ids: Any, vocab_size: int) -> Any:
    """Compute the gradient of sum(dout * weight[input_ids]): each row sums what its tokens received.

    Parameters
    ----------
    dout : (..., d_model) real
    input_ids : (...) integers
    vocab_size : int

    Returns
    -------
    dweight : (vocab_size, d_model) float64

    Examples
    --------
    >>> backward(np.array([[1, 2], [3, 4], [5, 6]]), np.array([1, 0, 1]), 3)
    array([[3., 4.],
           [6., 8.],
           [0., 0.]])
    """
    dout = as_float64(dout)
    dweight = np.zeros((vocab_size, dout.shape[-1]))
    for index in np.ndindex(*np.shape(input_ids)):
        dweight[np.asarray(input_ids)[index]] += dout[index]
    return dweight
