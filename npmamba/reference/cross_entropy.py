"""The mean cross entropy of a softmax in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import as_float64


def _rows(logits: Any, labels: Any, ignore_index: int) -> tuple[Any, Any, Any]:
    """Return the logits of the labels that count (rows, vocab), those labels, and the mask of them."""
    labels = np.asarray(labels)
    keep = labels != ignore_index
    return as_float64(logits)[keep], labels[keep], keep


def forward(logits: Any, labels: Any, *, ignore_index: int = -100) -> Any:
    """Compute the mean of logsumexp(logits) - logits[label] over the labels other than `ignore_index`.

    Parameters
    ----------
    logits : (..., vocab) real or complex
    labels : (...) integers
    ignore_index : int

    Returns
    -------
    () float64, or complex128 if `logits` is complex
        NaN if every label is ignored: there is nothing to take the mean of.

    Examples
    --------
    >>> float(forward(np.zeros((2, 8)), np.array([3, -100])) / np.log(2))
    3.0
    """
    rows, targets, _ = _rows(logits, labels, ignore_index)
    if not targets.size:
        return np.asarray(np.nan, rows.dtype)
    top = rows.real.max(-1, keepdims=True)
    logsumexp = top[:, 0] + np.log(np.exp(rows - top).sum(-1))
    return np.asarray((logsumexp - rows[np.arange(targets.size), targets]).mean())


def backward(dout: Any, logits: Any, labels: Any, *, ignore_index: int = -100) -> Any:
    """Compute the gradient of dout * forward(logits, labels): (softmax - onehot(label)) * dout / count.

    Parameters
    ----------
    dout : () real
    logits, labels, ignore_index
        As in `forward`; real only.

    Returns
    -------
    dlogits : (..., vocab) float64
        Zero where the label is ignored.

    Examples
    --------
    >>> backward(1.0, np.zeros((2, 4)), np.array([3, -100]))
    array([[ 0.25,  0.25,  0.25, -0.75],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    """
    rows, targets, keep = _rows(logits, labels, ignore_index)
    dlogits = np.zeros(np.shape(logits))
    if targets.size:
        weights = np.exp(rows - rows.max(-1, keepdims=True))
        softmax = weights / weights.sum(-1, keepdims=True)
        softmax[np.arange(targets.size), targets] -= 1
        dlogits[keep] = softmax * (np.float64(dout) / targets.size)
    return dlogits
