"""Is this gradient right? Ask the function itself, by finite differences or by the complex step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from npmamba.autodiff.tape import pullback
from npmamba.autodiff.tree import tree_items, tree_map, tree_map_path


def check_vjp(
    f: Callable[..., Any], *args: Any, rng: Any = None, rtol: float = 1e-7, eps: float = 1e-3
) -> None:
    """Check that the gradients of `f` are the transpose of its derivative J, by ``<v, J w> = <Jᵀ v, w>``.

    For random v and w, ``J w`` is a central difference of fourth order and ``Jᵀ v`` is what `pullback` gives:
    four calls of `f` per array, whatever its size. Each array is checked alone, so a failure can name it.

    Parameters
    ----------
    f : callable
        Returns an array or a tree of arrays.
    *args : array or tree of arrays
        float64. Leaves of other kinds (integer arrays, None, options) are passed on and held fixed.
    rng : int or numpy.random.Generator, optional
        Source of v and w; a fixed one by default.
    rtol : float
        Allowed difference, relative to the sum of the absolute terms of the dot products.
    eps : float
        Step of the difference. Its error is about ``eps**4`` times the fifth derivative.

    Raises
    ------
    AssertionError
        If the two disagree; they stand under each other in the message.
    TypeError
        If a floating array is not float64.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import check_vjp
    >>> check_vjp(lambda x, y: x * y, np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    """
    rng = np.random.default_rng(0 if rng is None else rng)
    inputs = {path: x for path, x in tree_items(args) if hasattr(x, "dtype") and x.dtype.kind not in "biuO"}
    for path, x in inputs.items():
        if x.dtype != np.float64:
            raise TypeError(f"check_vjp: {_label(f, path)} must be float64, got {x.dtype}")

    def call(values: dict[str, Any]) -> Any:
        return f(*tree_map_path(lambda path, x: values.get(path, x), args))

    out, pull = pullback(call, inputs)
    v = tree_map(lambda y: np.asarray(rng.standard_normal(y.shape)), out)
    (gradients,) = pull(v)
    for path, x in inputs.items():
        w = rng.standard_normal(x.shape)
        Jw = _difference(lambda x, path=path: call({**inputs, path: x}), x, w, eps)  # type: ignore[misc]
        numeric, size = _dot(v, Jw)
        analytic, analytic_size = _dot(gradients[path], w)
        assert abs(analytic - numeric) <= rtol * max(size, analytic_size), (
            f"check_vjp: the gradient of {_label(f, path)} is wrong\n"
            f"analytic: {analytic!r}\nnumeric:  {numeric!r}\nallowed:  {rtol * max(size, analytic_size):.3g}"
        )


def _label(f: Callable[..., Any], path: str) -> str:
    """Turn the path of a leaf in the arguments, such as ``0.weight``, into ``params.weight``."""
    number, _, rest = path.partition(".")
    try:
        name = list(inspect.signature(f).parameters)[int(number)]
    except (IndexError, TypeError, ValueError):
        name = f"args[{number}]"
    return f"{name}.{rest}" if rest else name


def _difference(f: Callable[[Any], Any], x: Any, w: Any, eps: float) -> Any:
    """Return ``(8 (f(x + ew) - f(x - ew)) - (f(x + 2ew) - f(x - 2ew))) / 12e``, a tree like ``f(x)``."""
    values = [f(np.asarray(x + t * eps * w)) for t in (1, -1, 2, -2)]
    return tree_map(lambda a, b, c, d: (8 * (a - b) - (c - d)) / (12 * eps), *values)


def _dot(x: Any, y: Any) -> tuple[float, float]:
    """Return the dot product of two trees, and the sum of its absolute terms, by which to judge it."""
    terms = [np.ravel(a * b) for (_, a), (_, b) in zip(tree_items(x), tree_items(y), strict=True)]
    return float(sum(t.sum() for t in terms)), float(sum(np.abs(t).sum() for t in terms))


def complex_step_gradient(
    f: Callable[[Any], Any], x: Any, direction: Any = None, h: float = 1e-30
) -> np.ndarray:
    """Return the derivative of `f` at `x` by the complex step ``Im f(x + i h w) / h``, exact to rounding.

    Nothing is subtracted, so h may be as small as one likes. `f` must be analytic and accept complex arrays:
    no abs, no comparison, no conversion to float. W. Squire and G. Trapp, SIAM Review 40 (1998), 110-112.

    Parameters
    ----------
    f : callable
        From one complex128 array to an array, or to a scalar if `direction` is None.
    x : array
        Real; computed in float64.
    direction : array like `x`, optional
        w. Without it, every entry of `x` is taken in turn.
    h : float
        Step.

    Returns
    -------
    numpy.ndarray
        float64. With `direction` the derivative along it, shaped like ``f(x)``; else the gradient, like `x`.

    Raises
    ------
    ValueError
        If `f` is not scalar and there is no direction.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import complex_step_gradient
    >>> complex_step_gradient(lambda x: (x**3).sum(), np.array([1.0, 2.0]))
    array([ 3., 12.])
    >>> complex_step_gradient(lambda x: x**3, np.array([1.0, 2.0]), direction=np.array([1.0, 10.0]))
    array([  3., 120.])
    """
    x = np.asarray(x, np.float64)
    if direction is not None:
        return np.imag(f(x + 1j * h * np.asarray(direction, np.float64))) / h
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        shifted = x.astype(np.complex128)
        shifted[i] += 1j * h
        out = np.asarray(f(shifted))
        if out.shape != ():
            raise ValueError(f"complex_step_gradient: f must return a scalar, got shape {out.shape}")
        gradient[i] = out.imag / h
    return gradient


def check_complex_step(f: Callable[[Any], Any], x: Any, gradient: Any, *, rtol: float = 1e-12) -> float:
    """Compare `gradient` with that of the scalar function `f` by the complex step.

    Parameters
    ----------
    f : callable
        As in `complex_step_gradient`, to a scalar.
    x, gradient : array
        Of one shape.
    rtol : float
        Largest error allowed.

    Returns
    -------
    float
        The relative error ``max|gradient - reference| / max|reference|``, absolute if the reference is zero.

    Raises
    ------
    AssertionError
        If the error is above `rtol`, is NaN, or the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import check_complex_step
    >>> check_complex_step(lambda x: (x * x).sum(), np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    0.0
    """
    reference, gradient = complex_step_gradient(f, x), np.asarray(gradient)
    assert gradient.shape == reference.shape, (
        f"check_complex_step: the gradient has shape {gradient.shape}, but x has {reference.shape}"
    )
    scale = np.abs(reference).max(initial=0.0) or 1.0
    error = float(np.abs(gradient - reference).max(initial=0.0) / scale)
    assert error <= rtol, (
        f"check_complex_step: error {error:.3g}, allowed {rtol:g}\n"
        f"analytic: {gradient}\ncomplex:  {reference}"
    )
    return error
