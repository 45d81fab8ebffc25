"""The loss of a language model: the mean cross entropy of a softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.autodiff.tape import primitive
from npmamba.backend import array_module, twin
from npmamba.shapes import Arguments, compute_dtype


def cross_entropy(logits: Any, labels: Any, *, ignore_index: int = -100) -> Any:
    """Return the mean surprise, in nats, at the labels under the softmax of the logits.

    Over all rows l whose label is not `ignore_index`::

        loss = mean(log(sum_v exp(l_v)) - l_label)

    Parameters
    ----------
    logits : array (..., vocab)
        Scores of each class: float16, bfloat16, float32 or float64.
    labels : integer array (...)
        The class that came, from 0 to vocab - 1, or `ignore_index`.
    ignore_index : int
        Label of rows that do not count.

    Returns
    -------
    array ()
        float32, or float64 for float64 `logits`; NaN if no row counts, for there is nothing to take the mean of.

    Raises
    ------
    ValueError
        If shapes disagree or a label is out of range (NumPy arrays; see below).
    TypeError
        If an argument is no array, `labels` holds no integers, or NumPy and CuPy arrays are mixed.

    Notes
    -----
    Labels on a GPU are not read by the host, which would have to wait for it at every step: there a label out of range
    makes the loss NaN, and the gradient of its row. The same call with ``cupy.asnumpy`` of both names its place.

    Safe for logits of any size; ``-inf`` forbids a class, NaN in a row that counts gives NaN. Sums are taken in
    float64. Differentiable in `logits`; the derivation stands in ``cross_entropy.md`` beside this file.

    Examples
    --------
    >>> import numpy as np
    >>> cross_entropy(np.zeros((2, 8)), np.array([3, -100])) / np.log(2)     # one of eight: three bits
    np.float64(3.0)
    """
    return _cross_entropy(logits, labels=labels, ignore_index=ignore_index)


def cross_entropy_backward(dout: Any, logits: Any, labels: Any, *, ignore_index: int = -100) -> Any:
    """Return the gradient of `cross_entropy`: ``(softmax - onehot(label)) dout / count``.

    Parameters
    ----------
    dout : array () or float
        Gradient of the loss; an array has the dtype of the loss.
    logits, labels, ignore_index
        As for `cross_entropy`.

    Returns
    -------
    dlogits : array (..., vocab)
        C-ordered, of the dtype of `logits`; 0 where the label is ignored.

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> cross_entropy_backward(1.0, np.zeros((2, 4)), np.array([3, -100]))
    array([[ 0.25,  0.25,  0.25, -0.75],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    """
    op = "cross_entropy_backward"
    _check(op, logits, labels, ignore_index)
    dout = _check_dout(op, dout, logits)
    _, saved = twin("cross_entropy", logits).forward(logits, labels, ignore_index=int(ignore_index), save=True)
    return twin("cross_entropy", logits).backward(dout, saved)[0]


@primitive
def _cross_entropy(logits: Any, *, labels: Any, ignore_index: int, save: bool = False) -> Any:
    _check("cross_entropy", logits, labels, ignore_index)
    return twin("cross_entropy", logits).forward(logits, labels, ignore_index=int(ignore_index), save=save)


@_cross_entropy.vjp
def _cross_entropy_vjp(dout: Any, saved: Any) -> Any:
    return twin("cross_entropy", saved.logits).backward(dout, saved)


def _check_dout(op: str, dout: Any, logits: Any) -> Any:
    """Return `dout` as an array of shape (); numbers are taken as they are."""
    dtype = compute_dtype(logits.dtype)
    most = float(np.finfo(dtype).max)
    if isinstance(dout, int | float | np.floating) and not isinstance(dout, bool):
        number = Arguments(op).number("dout", dout, lambda x: not abs(x) > most, f"one of {dtype}")
        return array_module(op, logits=logits).asarray(number, dtype)
    if dout is None:
        raise TypeError(f"{op}: dout must be a NumPy or CuPy array, got None")
    array_module(op, logits=logits, dout=dout)
    if dout.shape != ():
        raise ValueError(f"{op}: dout must be a number or an array of shape (), got shape {dout.shape}")
    Arguments(op).dtype("dout", dout, dtype, like=f"logits is {logits.dtype.name}")
    return dout


def _check(op: str, logits: Any, labels: Any, ignore_index: Any) -> None:
    for name, x in {"logits": logits, "labels": labels}.items():
        if x is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
    array_module(op, logits=logits, labels=labels)
    _check_shapes(op, logits, labels)
    check = Arguments(op)
    check.dtype("logits", logits)
    check.integers("labels", labels)
    check.integer("ignore_index", ignore_index)
    _check_range(op, labels, logits.shape[-1], int(ignore_index))


def _check_shapes(op: str, logits: Any, labels: Any) -> None:
    if logits.ndim == 0:
        raise ValueError(f"{op}: logits has 0 axes; logits must be (..., vocab), got shape ()")
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits has vocab=0; vocab must be at least 1")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels has shape {labels.shape}, but logits has shape {logits.shape}; "
            "labels must be (...) where logits is (..., vocab)"
        )


def _check_range(op: str, labels: Any, vocab: int, ignore_index: int) -> None:
    """Raise ValueError with the position of the first label that names no class; the host never waits for a GPU's."""
    if not isinstance(labels, np.ndarray):
        return
    wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        at = f"[{', '.join(str(int(k)) for k in place)}]" if place else ""
        raise ValueError(
            f"{op}: labels{at} is {int(labels[place])}, but logits has vocab={vocab}; "
            f"labels must be from 0 to {vocab - 1}, or ignore_index={ignore_index}"
        )


__all__ = ["cross_entropy", "cross_entropy_backward"]
