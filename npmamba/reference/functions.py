"""Elementary functions of the references, in float64 and complex128.

Every function takes real or complex arrays. A complex argument with a tiny imaginary part is how the tests
differentiate (the complex step, f'(x) = Im f(x + ih) / h with h = 1e-30), so nothing here takes an absolute
value or a maximum of a complex number: branches are chosen by the real part, and both parts keep their
relative accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_SERIES_TERMS = 20  # 1 / 21! < 2e-20: the series below are exact to rounding for |x| < 1


def as_float64(x: Any) -> Any:
    """Return a fresh float64 (complex128 if `x` is complex) copy of `x`; None stays None.

    >>> as_float64(np.float32(0.5)).dtype
    dtype('float64')
    """
    if x is None:
        return None
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _join(real: Any, imag: Any) -> Any:
    out = np.empty(np.shape(real), np.complex128)  # real + 1j * imag would turn an infinite part into NaN
    out.real, out.imag = real, imag
    return out


def expm1(x: Any) -> Any:
    """Compute exp(x) - 1 without cancellation, for real and complex `x`.

    >>> bool(abs(expm1(1e-20 + 0j) - 1e-20) < 1e-35)
    True
    """
    x = np.asarray(x)
    if not np.iscomplexobj(x):
        return np.expm1(x)
    half = np.sin(x.imag / 2)
    return _join(np.expm1(x.real) * np.cos(x.imag) - 2 * half * half, np.exp(x.real) * np.sin(x.imag))


def log1p(x: Any) -> Any:
    """Compute log(1 + x) without cancellation, for real `x` and complex `x` of a real part above -1.

    >>> bool(abs(log1p(1e-20 + 0j) - 1e-20) < 1e-35)
    True
    """
    x = np.asarray(x)
    if not np.iscomplexobj(x):
        return np.log1p(x)
    slope = x.imag / (1 + x.real)
    return _join(np.log1p(x.real) + np.log1p(slope * slope) / 2, np.arctan(slope))


def softplus(x: Any) -> Any:
    """Compute log(1 + exp(x)), with full relative accuracy from -745 (where it leaves float64) to infinity.

    >>> softplus(np.array([-100.0, 0.0, 800.0]))
    array([3.72007598e-44, 6.93147181e-01, 8.00000000e+02])
    """
    x = np.asarray(x)
    positive = x.real > 0
    return np.where(positive, x, 0) + log1p(np.exp(np.where(positive, -x, x)))


def sigmoid(x: Any) -> Any:
    """Compute 1 / (1 + exp(-x)), the derivative of softplus, without overflow.

    >>> sigmoid(np.array([-800.0, 0.0, 800.0]))
    array([0. , 0.5, 1. ])
    """
    x = np.asarray(x)
    positive = x.real > 0
    e = np.exp(np.where(positive, -x, x))
    return np.where(positive, 1, e) / (1 + e)


def silu(x: Any) -> Any:
    """Compute x * sigmoid(x); 0 at -inf.

    >>> silu(np.array([-np.inf, 0.0, 800.0]))
    array([ -0.,   0., 800.])
    """
    x = np.asarray(x)
    return np.where(x.real == -np.inf, -0.0, x) * sigmoid(x)


def silu_derivative(x: Any) -> Any:
    """Compute silu'(x) = s * (1 + x * (1 - s)) with s = sigmoid(x); 0 at -inf, 1 at inf.

    >>> silu_derivative(np.array([-np.inf, 0.0, 800.0]))
    array([0. , 0.5, 1. ])
    """
    x = np.asarray(x)
    return sigmoid(x) * (1 + np.where(np.isinf(x.real), 0, x) * sigmoid(-x))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    value = np.zeros_like(x)
    for c in reversed(coefficients):
        value = value * x + c
    return value


_PHI = [1 / math.factorial(k + 1) for k in range(_SERIES_TERMS)]
_PHI_DERIVATIVE = [(k + 1) / math.factorial(k + 2) for k in range(_SERIES_TERMS)]


def phi(x: Any) -> Any:
    """Compute expm1(x) / x, continued by 1 at 0; 0 at -inf.

    For |x| < 1 it is the sum of x^k / (k + 1)!: the quotient is accurate there too, but its derivative by the
    complex step is not.

    >>> phi(np.array([-np.inf, -1e-20, 0.0, 1.0]))
    array([0.        , 1.        , 1.        , 1.71828183])
    """
    x = np.asarray(x)
    small = np.abs(x.real) < 1
    far = np.where(small, 2, np.where(x.real == np.inf, 2, x))
    value = np.where(small, _polynomial(np.where(small, x, 0), _PHI), expm1(far) / far)
    return np.where(x.real == np.inf, np.inf, value)


def phi_derivative(x: Any) -> Any:
    """Compute phi'(x) = (exp(x) - phi(x)) / x, continued by 1/2 at 0; 0 at -inf.

    For |x| < 1 it is the sum of (k + 1) x^k / (k + 2)!. Elsewhere the equal exp(x) (1 - 1/x) / x + 1/x^2 is
    used, which has no difference of infinities.

    >>> phi_derivative(np.array([-np.inf, -1e-20, 0.0, 1.0]))
    array([0. , 0.5, 0.5, 1. ])
    """
    x = np.asarray(x)
    small = np.abs(x.real) < 1
    far = np.where(small, 2, np.where(x.real == np.inf, 2, x))
    direct = np.exp(far) * (1 - 1 / far) / far + 1 / far / far
    value = np.where(small, _polynomial(np.where(small, x, 0), _PHI_DERIVATIVE), direct)
    return np.where(x.real == np.inf, np.inf, value)


def exponent(delta: Any, A: Any) -> Any:
    """Compute delta * A, with 0 * (+-inf) = 0: a step of length zero changes nothing, however fast the decay.

    >>> exponent(np.array([0.0, 0.5]), -np.inf)
    array([  0., -inf])
    """
    delta, A = np.asarray(delta), np.asarray(A)
    infinite = np.isinf(A.real)
    with np.errstate(invalid="ignore"):
        limit = np.where(delta.real == 0, 0, delta.real * A.real)
    return np.where(infinite, limit, delta * np.where(infinite, 0, A))


def discretize(delta: Any, A: Any, discretization: str) -> tuple[Any, Any, Any]:
    """Return x = delta A, the decay a = exp(x) and the inflow weight f of one step h <- a h + f B u.

    "euler" has f = delta, the rule of the published models; "zoh" has f = delta phi(delta A), which is
    expm1(delta A) / A, the exact solution of h' = A h + B u for an input that is constant over the step.

    >>> [float(q) for q in discretize(0.5, -np.inf, "zoh")]
    [-inf, 0.0, 0.0]
    """
    x = exponent(delta, A)
    if discretization == "euler":
        return x, np.exp(x), np.broadcast_to(delta, x.shape)
    if discretization == "zoh":
        return x, np.exp(x), delta * phi(x)
    raise ValueError(f"discretization must be 'euler' or 'zoh', got {discretization!r}")


def decayed(x: Any, a: Any, g: Any) -> Any:
    """Compute a g with a = exp(x), for a small x as g + expm1(x) g.

    >>> float(decayed(-1e-20, 1.0, 1e20) - 1e20), float(decayed(-np.inf, 0.0, 1.0))
    (0.0, 0.0)
    """
    return advanced(x, a, g, 0)


def advanced(x: Any, a: Any, h: Any, inflow: Any) -> Any:
    """Compute one step of a state, a h + inflow with a = exp(x), for a small x as h + (expm1(x) h + inflow).

    Rounding a to a multiple of 1e-16 would add up over a million steps.

    >>> float(advanced(-1e-17, 1.0, 1.0, 1e-17)), float(advanced(-0.1, 0.905, np.inf, 0.0))
    (1.0, inf)
    """
    x, h = np.asarray(x), np.asarray(h)
    slow = np.abs(x.real) < 0.35
    moved = np.where(slow, expm1(np.where(slow, x, 0)), a) * h + inflow
    return np.where(slow, h + np.where(np.isfinite(h), moved, inflow), moved)


def runs(seq_idx: Any, batch: int, seqlen: int) -> tuple[Any, Any]:
    """Read `seq_idx` (batch, seqlen): which steps count, and which of them start a run with a zero state.

    A negative index is padding: the step does not count. A run starts where the index differs from that of
    the last step that counts; the first run of a row starts from the initial state and so is not marked.

    Returns
    -------
    valid, start : (batch, seqlen) bool

    Examples
    --------
    >>> valid, start = runs([[-1, 4, 4, -1, 4, 2]], 1, 6)
    >>> valid.astype(int), start.astype(int)
    (array([[0, 1, 1, 0, 1, 1]]), array([[0, 0, 0, 0, 0, 1]]))
    """
    valid, start = np.ones((batch, seqlen), bool), np.zeros((batch, seqlen), bool)
    for b, row in enumerate([] if seq_idx is None else np.asarray(seq_idx).tolist()):
        previous = None
        for t, index in enumerate(row):
            valid[b, t] = index >= 0
            if index >= 0:
                start[b, t] = previous is not None and index != previous
                previous = index
    return valid, start


def flip_time(x: Any, *, keep_ndim: int = 0) -> Any:
    """Return `x` with its last axis reversed; None and arrays of `keep_ndim` axes come back as they are.

    >>> flip_time([[1, 2, 3]])
    array([[3, 2, 1]])
    """
    return x if x is None or np.ndim(x) == keep_ndim else np.asarray(x)[..., ::-1]
