"""Double-double arithmetic: numbers of 32 digits as sums of two float64, on whole arrays at once.

A product and a sum of two float64 are each exactly a float64 and its rounding error (error-free transformations:
T. J. Dekker, "A floating-point technique for extending the available precision", 1971; D. E. Knuth, "The Art of
Computer Programming", volume 2, 4.2.2). Everything else is built of these two, as in the QD library of Hida, Li and
Bailey. Numbers may be between 1e-250 and 1e290 in size; smaller ones lose digits, and nothing else happens to them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_SPLITTER = 2.0**27 + 1
_LN2 = (0.6931471805599453, 2.3190468138462996e-17)
_HALVINGS, _TERMS, _DOUBLED_TERMS = 8, 10, 6


def _two_sum(x: Any, y: Any) -> tuple[Any, Any]:
    s = x + y
    v = s - x
    return s, (x - (s - v)) + (y - v)


def _quick_two_sum(x: Any, y: Any) -> tuple[Any, Any]:
    """The same where ``|x| >= |y|``."""
    s = x + y
    return s, y - (s - x)


def _two_product(x: Any, y: Any) -> tuple[Any, Any]:
    p = x * y
    t, v = _SPLITTER * x, _SPLITTER * y
    x1, y1 = t - (t - x), v - (v - y)
    x2, y2 = x - x1, y - y1
    return p, ((x1 * y1 - p) + x1 * y2 + x2 * y1) + x2 * y2


class Doubled:
    """An array of numbers ``hi + lo``, with + - * / and indexing.

    Parameters
    ----------
    hi, lo : float64 arrays or numbers
        `lo` is at most half a unit in the last place of `hi`.

    Examples
    --------
    >>> third = Doubled(1.0) / Doubled(3.0)
    >>> float(third.hi), float(third.lo)
    (0.3333333333333333, 1.850371707708594e-17)
    >>> rest = third * Doubled(3.0) - Doubled(1.0)
    >>> bool(abs(rest.hi) < 1e-31)
    True
    """

    __slots__ = ("hi", "lo")

    def __init__(self, hi: Any, lo: Any = None) -> None:
        self.hi = np.asarray(hi, np.float64)
        self.lo = np.zeros_like(self.hi) if lo is None else lo

    def __getitem__(self, index: Any) -> Doubled:
        return Doubled(self.hi[index], self.lo[index])

    def __setitem__(self, index: Any, x: Doubled) -> None:
        self.hi[index], self.lo[index] = x.hi, x.lo

    def __neg__(self) -> Doubled:
        return Doubled(-self.hi, -self.lo)

    def __add__(self, other: Doubled) -> Doubled:
        s, e = _two_sum(self.hi, other.hi)
        t, f = _two_sum(self.lo, other.lo)
        s, e = _quick_two_sum(s, e + t)
        return Doubled(*_quick_two_sum(s, e + f))

    def __sub__(self, other: Doubled) -> Doubled:
        return self + -other

    def __mul__(self, other: Doubled) -> Doubled:
        p, e = _two_product(self.hi, other.hi)
        return Doubled(*_quick_two_sum(p, e + (self.hi * other.lo + self.lo * other.hi)))

    def __truediv__(self, other: Doubled) -> Doubled:
        first = self.hi / other.hi
        rest = self - other * Doubled(first)
        second = rest.hi / other.hi
        rest = rest - other * Doubled(second)
        return Doubled(*_quick_two_sum(first, second)) + Doubled(rest.hi / other.hi)

    def scaled(self, power: Any) -> Doubled:
        """Return the numbers times 2**power, which is exact."""
        return Doubled(np.ldexp(self.hi, power), np.ldexp(self.lo, power))

    def where(self, condition: Any, other: Doubled) -> Doubled:
        """Return these numbers where the condition holds, the other ones elsewhere."""
        return Doubled(np.where(condition, self.hi, other.hi), np.where(condition, self.lo, other.lo))


_ONE, _TWO = Doubled(1.0), Doubled(2.0)
_INVERSE_FACTORIALS = [_ONE / Doubled(math.factorial(n)) for n in range(_DOUBLED_TERMS, 0, -1)]


def _reduced_expm1(x: Doubled) -> tuple[Doubled, Any]:
    """Return expm1(x - k ln 2), with the integer k for which the rest is at most half of ln 2."""
    k = np.rint(x.hi / _LN2[0])
    rest = (x - Doubled(k) * Doubled(*_LN2)).scaled(-_HALVINGS)
    tail = np.zeros_like(rest.hi)
    for n in range(_TERMS, _DOUBLED_TERMS, -1):  # too small for their rounding to matter
        tail = tail * rest.hi + 1 / math.factorial(n)
    series = Doubled(tail)
    for inverse in _INVERSE_FACTORIALS:
        series = series * rest + inverse
    series = series * rest
    for _ in range(_HALVINGS):  # expm1(2x) = expm1(x) (expm1(x) + 2): no digit is lost, however small x is
        series = series * (series + _TWO)
    return series, k.astype(np.int64)


def exp_and_expm1(x: Doubled) -> tuple[Doubled, Doubled]:
    """Compute exp(x), 0 below -800 where float64 ends, and exp(x) - 1 with the relative accuracy of the format.

    >>> e, e1 = exp_and_expm1(Doubled([1.0, 1e-20, -np.inf]))
    >>> e.hi, e1.hi
    (array([2.71828183, 1.        , 0.        ]), array([ 1.71828183e+00,  1.00000000e-20, -1.00000000e+00]))
    """
    series, k = _reduced_expm1(x.where(x.hi > -800.0, Doubled(-800.0)))
    scaled = (series + _ONE).scaled(k)
    return scaled, series.where(k == 0, scaled - _ONE)


def expm1(x: Doubled) -> Doubled:
    """Compute exp(x) - 1.

    >>> float(expm1(Doubled(1e-20)).hi)
    1e-20
    """
    return exp_and_expm1(x)[1]


def exp(x: Doubled) -> Doubled:
    """Compute the exponential.

    >>> float(exp(Doubled(1.0)).hi) == math.e
    True
    """
    return exp_and_expm1(x)[0]


def log1p(x: Doubled) -> Doubled:
    """Compute log(1 + x) for x >= 0: one step of Newton's method from float64.

    >>> float(log1p(Doubled(1e-20)).hi)
    1e-20
    """
    start = Doubled(np.log1p(x.hi))
    return start - (expm1(start) - x) / (x + _ONE)


def softplus(x: Doubled) -> Doubled:
    """Compute log(1 + exp(x)).

    >>> float(softplus(Doubled(-40.0)).hi) == math.exp(-40) - math.exp(-80) / 2
    True
    """
    zero = Doubled(np.zeros_like(x.hi))
    return x.where(x.hi > 0, zero) + log1p(exp((-x).where(x.hi > 0, x)))


def silu(x: Doubled) -> Doubled:
    """Compute x / (1 + exp(-x)).

    >>> float(silu(Doubled(0.0)).hi), float(silu(Doubled(800.0)).hi)
    (0.0, 800.0)
    """
    e = exp((-x).where(x.hi > 0, x))
    return x * _ONE.where(x.hi > 0, e) / (e + _ONE)


def recurrence(decay: Doubled, inflow: Doubled) -> Doubled:
    """Compute h[t] = decay[t] h[t-1] + inflow[t] along the last axis, from zero, all times at once.

    Two neighbouring steps are one step of half as long a sequence; its states are every other state of this one. So a
    million steps take twenty levels of array operations, and no more than twenty roundings follow one another.

    >>> one = Doubled(np.ones(5))
    >>> recurrence(one, one).hi
    array([1., 2., 3., 4., 5.])
    """
    steps = decay.hi.shape[-1]
    if steps <= 1:
        return inflow
    first, second = np.s_[..., 0 : steps - 1 : 2], np.s_[..., 1::2]
    pairs = recurrence(decay[first] * decay[second], decay[second] * inflow[first] + inflow[second])
    h = Doubled(inflow.hi.copy(), inflow.lo.copy())
    h[second] = pairs
    later, before = np.s_[..., 2::2], np.s_[..., 0 : (steps - 1) // 2]
    h[later] = decay[later] * pairs[before] + inflow[later]
    return h
