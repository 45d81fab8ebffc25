"""Whole-array primitives: what a model needs besides its own operations, for NumPy and CuPy arrays.

Importing this module gives `Traced` its operators. Each primitive stands above its vjp; where options would
make the call awkward, a plain function wraps it. Broadcasting is undone here, in `_unbroadcast`: the tape
knows nothing of it.
"""

from __future__ import annotations

import builtins
import hashlib
import math
import operator
import struct
from typing import Any, NamedTuple

import numpy as np

from npmamba.autodiff.tape import Traced, primitive
from npmamba.backend import array_module, twin
from npmamba.shapes import HALF, Arguments, dtype_name, shown


class _Kind(NamedTuple):
    """What the gradient of an operand must look like; the operand itself need not be kept for that."""

    shape: tuple[int, ...]
    dtype: Any


def _kind(x: Any) -> _Kind | None:
    return _Kind(x.shape, x.dtype) if hasattr(x, "dtype") else None  # a Python number has no gradient


def _unbroadcast(gradient: Any, kind: _Kind) -> Any:
    """Sum `gradient` over the axes along which an operand was repeated, and give it the operand's dtype."""
    if gradient.shape != kind.shape:
        extra = gradient.ndim - len(kind.shape)
        repeated = [extra + i for i, n in enumerate(kind.shape) if n == 1 and gradient.shape[extra + i] != 1]
        gradient = _total(gradient, (*range(extra), *repeated), keepdims=True).reshape(kind.shape)
    return gradient.astype(kind.dtype, copy=False)


def _total(x: Any, axis: Any, keepdims: bool = False) -> Any:
    """Sum in at least single precision, and round once."""
    if dtype_name(x.dtype) in HALF:
        return x.sum(axis=axis, keepdims=keepdims, dtype=np.float32).astype(x.dtype)
    return x.sum(axis=axis, keepdims=keepdims)


def _product(x: Any, y: Any) -> Any:
    """Return ``x @ y``; NumPy has no half-precision product worth using, so it gets single precision.

    CuPy's sums of half-precision and float32 products are float32 (no TF32, unless the environment has CUPY_TF32=1).
    """
    if isinstance(x, np.ndarray) and x.dtype == y.dtype:
        name = dtype_name(x.dtype)
        if name in HALF:
            return (x.astype(np.float32) @ y.astype(np.float32)).astype(x.dtype)
        if x.ndim == y.ndim == 2 and name in ("float32", "float64") and x.dtype.isnative and y.dtype.isnative:
            return twin("matmul", x).matmul(x, y)
    return x @ y


def _require(op: str, **arrays: Any) -> None:
    for name, x in arrays.items():
        if x is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got None")
    array_module(op, **arrays)


def _rows(x: Any) -> Any:
    """Return ``(..., n)`` as ``(rows, n)``: a view if rows are evenly spaced, as in a slice of an array."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@primitive
def add(x: Any, y: Any) -> Any:
    """Return ``x + y``, broadcast as NumPy does.

    >>> add(np.array([1.0, 2.0]), 1.0)
    array([2., 3.])
    """
    return x + y, (_kind(x), _kind(y))


@add.vjp
def add_vjp(dout: Any, saved: Any) -> Any:
    return tuple(kind and _unbroadcast(dout, kind) for kind in saved)


@primitive
def sub(x: Any, y: Any) -> Any:
    """Return ``x - y``, broadcast as NumPy does.

    >>> sub(np.array([1.0, 2.0]), 1.0)
    array([0., 1.])
    """
    return x - y, (_kind(x), _kind(y))


@sub.vjp
def sub_vjp(dout: Any, saved: Any) -> Any:
    x, y = saved
    return x and _unbroadcast(dout, x), y and _unbroadcast(-dout, y)


@primitive
def mul(x: Any, y: Any) -> Any:
    """Return ``x * y`` entry by entry, broadcast as NumPy does.

    >>> mul(np.array([1.0, 2.0]), 3.0)
    array([3., 6.])
    """
    kinds = _kind(x), _kind(y)
    return x * y, (*kinds, x if kinds[1] else None, y)  # x is only needed for dy


@mul.vjp
def mul_vjp(dout: Any, saved: Any) -> Any:
    x_kind, y_kind, x, y = saved
    return x_kind and _unbroadcast(dout * y, x_kind), y_kind and _unbroadcast(dout * x, y_kind)


@primitive
def div(x: Any, y: Any) -> Any:
    """Return ``x / y`` entry by entry, broadcast as NumPy does.

    >>> div(np.array([1.0, 2.0]), 2.0)
    array([0.5, 1. ])
    """
    out, kinds = x / y, (_kind(x), _kind(y))
    return out, (*kinds, out if kinds[1] else None, y)


@div.vjp
def div_vjp(dout: Any, saved: Any) -> Any:
    x_kind, y_kind, out, y = saved
    dx = dout / y
    return x_kind and _unbroadcast(dx, x_kind), y_kind and _unbroadcast(-dx * out, y_kind)


@primitive
def neg(x: Any) -> Any:
    """Return ``-x``.

    >>> neg(np.array([1.0]))
    array([-1.])
    """
    return -x, None


@neg.vjp
def neg_vjp(dout: Any, saved: None) -> Any:
    return (-dout,)


@primitive
def exp(x: Any) -> Any:
    """Return ``e**x`` entry by entry.

    >>> exp(np.array([0.0]))
    array([1.])
    """
    out = np.exp(x)
    return out, out


@exp.vjp
def exp_vjp(dout: Any, out: Any) -> Any:
    return (dout * out,)


@primitive
def _astype(x: Any, *, dtype: Any) -> Any:
    return x.astype(dtype), x.dtype


@_astype.vjp
def _astype_vjp(dout: Any, dtype: Any) -> Any:
    return (dout.astype(dtype),)


def astype(x: Any, dtype: Any) -> Any:
    """Return `x` in another floating dtype: `x` itself if it has that one.

    >>> astype(np.array([1.0]), np.float32)
    array([1.], dtype=float32)
    """
    return x if x.dtype == dtype else _astype(x, dtype=dtype)


@primitive
def matmul(x: Any, y: Any) -> Any:
    """Return ``x @ y``: x ``(..., m, k)`` or ``(k,)``, y ``(..., k, n)`` or ``(k,)``.

    >>> matmul(np.array([[1.0, 2.0]]), np.array([3.0, 4.0]))
    array([11.])
    """
    _require("matmul", x=x, y=y)
    if x.ndim > 2 and y.ndim == 2:  # one product over all rows instead of one per leading index
        return _product(_rows(x), y).reshape(*x.shape[:-1], y.shape[-1]), (x, y)
    return _product(x, y), (x, y)


@matmul.vjp
def matmul_vjp(dout: Any, saved: Any) -> Any:
    x, y = saved
    x2, y2 = x[None] if x.ndim == 1 else x, y[:, None] if y.ndim == 1 else y
    dout = dout[..., None] if y.ndim == 1 else dout
    dout = dout[..., None, :] if x.ndim == 1 else dout
    if y2.ndim == 2:
        x2, dout = _rows(x2), _rows(dout)
    dx, dy = _product(dout, y2.swapaxes(-1, -2)), _product(x2.swapaxes(-1, -2), dout)
    return (
        _unbroadcast(dx, _Kind(x2.shape, x.dtype)).reshape(x.shape),
        _unbroadcast(dy, _Kind(y2.shape, y.dtype)).reshape(y.shape),
    )


@primitive
def _linear(x: Any, weight: Any, bias: Any) -> Any:
    _require("linear", x=x, weight=weight)
    array_module("linear", x=x, bias=bias)
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"linear: x must be (..., in), weight (out, in), got {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must be (out,) = ({len(weight)},), got shape {bias.shape}")
    out = _product(_rows(x), weight.T)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], len(weight)), (x, weight, bias is not None)


@_linear.vjp
def _linear_vjp(dout: Any, saved: Any) -> Any:
    x, weight, has_bias = saved
    dout2 = _rows(dout)
    dx = _product(dout2, weight).reshape(x.shape)
    dweight = _product(dout2.T, _rows(x))
    return dx, dweight, _total(dout2, 0) if has_bias else None


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return ``x @ weight.T + bias``, a layer of a network.

    Parameters
    ----------
    x : array (..., in)
        A slice of a wider array's last axis is read in place.
    weight : array (out, in)
    bias : array (out,), optional

    Returns
    -------
    array (..., out)

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> linear(np.array([1.0, 2.0]), np.array([[3.0, 4.0]]), np.array([0.5]))
    array([11.5])
    """
    return _linear(x, weight, bias)


@primitive
def _reshape(x: Any, *, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape), x.shape


@_reshape.vjp
def _reshape_vjp(dout: Any, shape: tuple[int, ...]) -> Any:
    return (dout.reshape(shape),)


def reshape(x: Any, *shape: Any) -> Any:
    """Return the entries of `x` in another shape, given as integers or as one tuple.

    >>> reshape(np.arange(4.0), 2, -1)
    array([[0., 1.],
           [2., 3.]])
    """
    return _reshape(x, shape=shape[0] if len(shape) == 1 else shape)


@primitive
def _transpose(x: Any, *, axes: tuple[int, ...]) -> Any:
    return x.transpose(axes), tuple(sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim))


@_transpose.vjp
def _transpose_vjp(dout: Any, inverse: tuple[int, ...]) -> Any:
    return (dout.transpose(inverse),)


def transpose(x: Any, *axes: Any) -> Any:
    """Return a view of `x` with its axes in the order `axes`, or reversed if none are given.

    >>> transpose(np.zeros((2, 3, 4)), 0, 2, 1).shape
    (2, 4, 3)
    """
    order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
    return _transpose(x, axes=tuple(order or range(x.ndim)[::-1]))


def swapaxes(x: Any, a: int, b: int) -> Any:
    """Return a view of `x` with axes `a` and `b` exchanged.

    >>> swapaxes(np.zeros((2, 3, 4)), 1, -1).shape
    (2, 4, 3)
    """
    axes = list(range(x.ndim))
    axes[a], axes[b] = axes[b], axes[a]
    return _transpose(x, axes=tuple(axes))


@primitive
def _split(x: Any, *, sizes: tuple[int, ...], axis: int) -> Any:
    _require("split", x=x)
    Arguments("split").integer("axis", axis, -x.ndim, x.ndim - 1)
    if builtins.sum(sizes) != x.shape[axis] or min(sizes, default=0) < 0:
        raise ValueError(f"split: sizes {sizes} must add up to {x.shape[axis]}, the length of axis {axis}")
    stops = np.cumsum(sizes).tolist()
    before = (slice(None),) * (axis % x.ndim)
    places = [(*before, slice(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)]
    return tuple([x[place] for place in places]), (x, places)


@_split.vjp
def _split_vjp(dout: Any, saved: Any) -> Any:
    x, places = saved  # x, whose memory its pieces share, is kept for its shape and memory order
    dx = np.empty_like(x)
    for place, piece in zip(places, dout, strict=True):
        dx[place] = 0 if piece is None else piece
    return (dx,)


def split(x: Any, sizes: Any, axis: int = -1) -> tuple[Any, ...]:
    """Cut `x` along `axis` into views of the lengths `sizes`; the gradient is put together in one pass.

    Raises
    ------
    ValueError
        If the sizes do not add up to the length of the axis, or there is no such axis.
    TypeError
        If `x` is no array, `sizes` no sequence of integers or `axis` no integer.

    Examples
    --------
    >>> split(np.arange(3.0), (1, 2))
    (array([0.]), array([1., 2.]))
    """
    try:
        lengths = tuple([operator.index(size) for size in sizes])
    except TypeError:
        raise TypeError(f"split: sizes must be a sequence of integers, got {shown(sizes)}") from None
    return _split(x, sizes=lengths, axis=axis)


@primitive
def _getitem(x: Any, *, index: Any) -> Any:
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, bool) or not (i is None or i is ... or isinstance(i, slice | int | np.integer)):
            raise TypeError(
                f"getitem: index must consist of integers, slices, ... and None, got {type(i).__name__}; "
                "embedding(weight, input_ids) gathers rows"
            )
    return x[index], (x, index)


@_getitem.vjp
def _getitem_vjp(dout: Any, saved: Any) -> Any:
    x, index = saved
    dx = np.zeros_like(x)
    dx[index] = dout
    return (dx,)


def getitem(x: Any, index: Any) -> Any:
    """Return ``x[index]`` for a basic index; `split` is cheaper where all of `x` is used in pieces.

    >>> getitem(np.arange(4.0), slice(1, 3))
    array([1., 2.])
    """
    return _getitem(x, index=index)


@primitive
def _sum(x: Any, *, axis: Any, keepdims: bool) -> Any:
    kept = _total(x, axis, keepdims=True)
    return kept if keepdims else kept.squeeze(axis), (x.shape, kept.shape)


@_sum.vjp
def _sum_vjp(dout: Any, saved: Any) -> Any:
    shape, kept = saved
    dx = np.empty_like(dout, shape=shape, order="C")
    dx[...] = dout.reshape(kept)
    return (dx,)


def sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the sum of `x` over `axis` (an integer, a tuple of them, or None for all), a 0-d array at least.

    >>> sum(np.array([[1.0, 2.0], [3.0, 4.0]]), axis=0)
    array([4., 6.])
    """
    return _sum(x, axis=axis, keepdims=keepdims)


def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Return the mean of `x` over `axis`.

    >>> mean(np.array([1.0, 2.0, 6.0]))
    array(3.)
    """
    total = sum(x, axis, keepdims)
    return mul(total, total.dtype.type(math.prod(total.shape) / math.prod(x.shape)))


@primitive
def _dropout(x: Any, *, rate: float, key: tuple[int, ...]) -> Any:
    # A hash spreads any integers over the 128 bits that the generator takes.
    digest = hashlib.blake2b(repr(tuple(operator.index(k) for k in key)).encode(), digest_size=16).digest()
    drawn = {"rate": rate, "key": struct.unpack("<4I", digest)}
    _require("dropout", x=x)
    Arguments("dropout").dtype("x", x)
    return twin("dropout", x).forward(x, **drawn), drawn


@_dropout.vjp
def _dropout_vjp(dout: Any, drawn: Any) -> Any:
    return (twin("dropout", dout).backward(dout, **drawn),)


def dropout(x: Any, *, rate: float, key: tuple[int, ...]) -> Any:
    """Set entries of `x` to zero with probability `rate` and divide the others by ``1 - rate``.

    Nothing is stored for the gradient: the counter-based generator Philox draws the same numbers again.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64.
    rate : float
        In [0, 1); 0 returns `x` itself.
    key : tuple of int
        For example (seed, step, layer). Which entries fall depends on the key and the place of an entry in C order
        alone, and is the same for NumPy and CuPy arrays.

    Raises
    ------
    ValueError
        If `rate` is outside [0, 1).
    TypeError
        If `x` has another dtype, `rate` is no number or `key` no tuple of integers.

    Examples
    --------
    >>> dropout(np.ones(5), rate=0.5, key=(0, 1))
    array([0., 2., 0., 2., 0.])
    """
    rate = Arguments("dropout").number("rate", rate, lambda r: 0 <= r < 1, "in [0, 1)")
    if not isinstance(key, tuple) or not all(isinstance(k, int | np.integer) for k in key):
        raise TypeError(f"dropout: key must be a tuple of integers, got {shown(key)}")
    return _dropout(x, rate=rate, key=key) if rate else x


def _attach_operators() -> None:
    for name, f in {"add": add, "sub": sub, "mul": mul, "truediv": div, "matmul": matmul}.items():
        setattr(Traced, f"__{name}__", lambda x, y, f=f: f(x, y))
        setattr(Traced, f"__r{name}__", lambda x, y, f=f: f(y, x))
    for method in (reshape, transpose, swapaxes, sum, mean):
        setattr(Traced, method.__name__, method)
    reverse_axes = property(lambda x: transpose(x))
    for name, value in {"__neg__": lambda x: neg(x), "__getitem__": getitem, "T": reverse_axes}.items():
        setattr(Traced, name, value)


_attach_operators()
