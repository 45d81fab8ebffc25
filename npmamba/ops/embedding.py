"""Token embedding: rows of a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.autodiff.tape import primitive
from npmamba.backend import array_module, twin
from npmamba.shapes import Arguments

MAX_VOCAB_SIZE = 2**31 - 1


def embedding(weight: Any, input_ids: Any) -> Any:
    """Look up ``weight[input_ids]``.

    Parameters
    ----------
    weight : array (vocab_size, d_model)
        One row per token: float16, bfloat16, float32 or float64.
    input_ids : integer array (...)
        Numbers of rows, from 0 to vocab_size - 1.

    Returns
    -------
    array (..., d_model)
        A fresh C-ordered array of the dtype of `weight`.

    Raises
    ------
    ValueError
        If `weight` has not two axes, or an id is out of range (NumPy arrays; see below); negative ones are.
    TypeError
        If an argument is no array, `input_ids` holds no integers, or NumPy and CuPy arrays are mixed.

    Notes
    -----
    Ids on a GPU are not read by the host, which would have to wait for it at every step: there an id out of range
    gives a row of NaN, and its token adds to no gradient. The same call with ``cupy.asnumpy`` of both names its place.

    Differentiable in `weight`; the derivation stands in ``embedding.md`` beside this file.

    Examples
    --------
    >>> import numpy as np
    >>> embedding(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0, 1]))
    array([[3., 4.],
           [1., 2.],
           [3., 4.]])
    """
    return _embedding(weight, input_ids=input_ids)


def embedding_backward(dout: Any, input_ids: Any, vocab_size: int) -> Any:
    """Return the gradient of the table: each row sums what its tokens received.

    Parameters
    ----------
    dout : array (..., d_model)
        Gradient of the result of `embedding`.
    input_ids : integer array (...)
        As for `embedding`.
    vocab_size : int
        Number of rows of the table.

    Returns
    -------
    dweight : array (vocab_size, d_model)
        Of the dtype of `dout`; 0 in rows that no token looked up.

    Raises
    ------
    ValueError, TypeError
        As `embedding`.

    Examples
    --------
    >>> import numpy as np
    >>> embedding_backward(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([1, 0, 1]), 3)
    array([[3., 4.],
           [6., 8.],
           [0., 0.]])
    """
    _check_gradient("embedding_backward", dout, input_ids, vocab_size)
    kernels = twin("embedding", dout)
    return kernels.backward(dout, kernels.Saved(input_ids, int(vocab_size)))[0]


@primitive
def _embedding(weight: Any, *, input_ids: Any, save: bool = False) -> Any:
    op = "embedding"
    _check_arrays(op, weight=weight, input_ids=input_ids)
    check = Arguments(op)
    check.shape("weight", weight, "vocab_size d_model")
    check.at_least("vocab_size", 1)
    _check_values(op, "weight", weight, input_ids, weight.shape[0])
    out, saved = twin(op, weight).forward(weight, input_ids, save=save)
    # Rows of a memory map, or of another subclass, come as one.
    return (np.asarray(out) if isinstance(out, np.ndarray) else out), saved


@_embedding.vjp
def _embedding_vjp(dout: Any, saved: Any) -> Any:
    return twin("embedding", dout).backward(dout, saved)


def _check_arrays(op: str, **arrays: Any) -> None:
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
    array_module(op, **arrays)


def _check_gradient(op: str, dout: Any, input_ids: Any, vocab_size: Any) -> None:
    _check_arrays(op, dout=dout, input_ids=input_ids)
    Arguments(op).integer("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE)
    if dout.ndim == 0 or dout.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"{op}: dout has shape {dout.shape}, but input_ids has shape {input_ids.shape}; "
            "dout must be (..., d_model) where input_ids is (...)"
        )
    _check_values(op, "dout", dout, input_ids, int(vocab_size))


def _check_values(op: str, name: str, x: Any, input_ids: Any, vocab_size: int) -> None:
    """Check dtypes, and that every id is one of a row; the first that is not is named with its position.

    The host reads no ids of a GPU, for which it would have to wait.
    """
    check = Arguments(op)
    check.dtype(name, x)
    check.integers("input_ids", input_ids)
    if not isinstance(input_ids, np.ndarray):
        return
    wrong = (input_ids < 0) | (input_ids >= vocab_size)
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        at = f"[{', '.join(str(int(k)) for k in place)}]" if place else ""
        raise ValueError(
            f"{op}: input_ids{at} is {int(input_ids[place])}, but vocab_size={vocab_size}; "
            f"ids must be from 0 to {vocab_size - 1}"
        )


__all__ = ["embedding", "embedding_backward"]
