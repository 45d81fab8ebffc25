"""The same numbers in other memory: layouts that an array function has to accept, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def _of_a_wide_row(x: Array) -> Array:
    """Channels side by side, rows far apart: what a projection's output gives for u, z, B and C."""
    if x.ndim < 2:
        return x.copy()
    wide = np.full((*x.shape[:-2], x.shape[-1], 3 * x.shape[-2] + 1), 7, x.dtype)
    view = wide[..., 1 : 1 + x.shape[-2]].swapaxes(-1, -2)
    view[...] = x
    return view


def _channels(x: Array) -> Array:
    return x.copy() if x.ndim < 2 else x.swapaxes(-1, -2).copy(order="C").swapaxes(-1, -2)


def _strided(x: Array) -> Array:
    wide = np.full([2 * n + 1 for n in x.shape], 7, x.dtype)
    view = wide[tuple(np.s_[1::2] for _ in x.shape)]
    view[...] = x
    return view


def _negative(x: Array) -> Array:
    flip = tuple(np.s_[::-1] for _ in x.shape)
    return x[flip].copy(order="C")[flip]


def _readonly(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def _swapped(x: Array) -> Array:
    return x.copy() if x.dtype.kind == "V" else x.astype(x.dtype.newbyteorder("S"))  # bfloat16 has no other order


def _unaligned(x: Array) -> Array:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": lambda x: x.copy(order="C"),
    "F": lambda x: x.copy(order="F"),
    "channels": _channels,
    "slice": _of_a_wide_row,
    "strided": _strided,
    "negative": _negative,
    "readonly": _readonly,
    "swapped": _swapped,
    "unaligned": _unaligned,
}
"""Layouts by name, the plain one first. "channels" has the last two axes in the other order, "slice" rows apart too."""


def laid_out(x: Any, layout: str) -> Any:
    """Return a copy of `x` in the memory of a layout; what is no array comes back as it is.

    Parameters
    ----------
    x : numpy.ndarray or anything else
    layout : str
        A name in `LAYOUTS`.

    Returns
    -------
    numpy.ndarray of the same shape, values and dtype (but for the byte order)

    Examples
    --------
    >>> x = np.arange(6.0).reshape(2, 3)
    >>> [laid_out(x, name).strides for name in ("C", "channels", "negative")]
    [(24, 8), (8, 16), (-24, -8)]
    """
    return LAYOUTS[layout](x) if isinstance(x, np.ndarray) else x


def copied(x: np.ndarray) -> np.ndarray:
    """Return a copy that lies in memory as `x` does, which ``x.copy()`` does not.

    >>> x = laid_out(np.arange(3.0), "negative")
    >>> y = copied(x)
    >>> y, y.strides, np.shares_memory(x, y)
    (array([0., 1., 2.]), (-8,), False)
    """
    owner: Any = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner.size == 0:
        return x.copy()
    bytes_ = owner.copy(order="K").ravel(order="K").view(np.uint8)
    offset = x.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    y = np.ndarray(x.shape, x.dtype, bytes_, offset, x.strides)
    y.flags.writeable = x.flags.writeable
    return y
