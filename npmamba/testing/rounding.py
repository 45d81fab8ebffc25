"""Arithmetic of rounding errors: a number is its size and the error it may have, in units of the format's eps.

Written in these numbers, a formula computes how far a right implementation of it can be off. Sizes are sums of
absolute values, so nothing cancels; errors are first order in eps, each operation adding one eps of its result. What
is differentiated by hand is the effect of an argument's error on exp, softplus and the like.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.reference.functions import discretize, phi_derivative, sigmoid, silu, softplus

Array = Any
_FUNCTION = 4.0
"""Units of eps by which a good exp, log or quotient of them may be off."""


class Rounded(NamedTuple):
    """Numbers of at most a size, off by at most `error` times eps.

    Examples
    --------
    >>> x = Rounded.exact(np.array([3.0, -4.0]))
    >>> product = x * x
    >>> product.size, product.error
    (array([ 9., 16.]), array([ 9., 16.]))
    >>> float(product.sum(0).error.round(1))
    95.7
    """

    size: Array
    error: Array

    @classmethod
    def exact(cls, x: Any) -> Rounded:
        """Return what is given, and so has no error."""
        size = np.abs(np.asarray(x, np.float64))
        return cls(size, np.zeros_like(size))

    def __add__(self, other: Any) -> Rounded:
        size = self.size + other.size
        return Rounded(size, self.error + other.error + size)

    def __mul__(self, other: Any) -> Rounded:
        size = self.size * other.size
        return Rounded(size, self.size * other.error + self.error * other.size + size)

    def sum(self, axis: Any) -> Rounded:
        """Add up along axes; the roundings of n sums add up as a random walk of 2 sqrt(n) steps."""
        size, error = self.size.sum(axis), self.error.sum(axis)
        terms = self.size.size / max(np.size(size), 1)
        return Rounded(size, error + 2 * np.sqrt(terms) * size)

    def at(self, index: Any) -> Rounded:
        """Return a part."""
        return Rounded(self.size[index], self.error[index])

    def where(self, condition: Any) -> Rounded:
        """Return zero, without any error, where the condition does not hold."""
        return Rounded(np.where(condition, self.size, 0), np.where(condition, self.error, 0))

    def grouped(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> Rounded:
        """Reshape, and add up along axes."""
        return Rounded(self.size.reshape(shape), self.error.reshape(shape)).sum(axes)


class Step(NamedTuple):
    """What a step size does to the state: the factors of old state, input, and their derivatives; all by time."""

    Delta: Rounded  # (batch, dim, 1, seqlen), as slope = dDelta / ddelta
    slope: Rounded
    A: Rounded  # (dim, dstate, 1)
    decay: Rounded  # (batch, dim, dstate, seqlen), as the others
    weight: Rounded
    dweight_dDelta: Rounded
    dweight_dA: Rounded


def step(delta: Array, delta_bias: Array, softplus_on: bool, A: Array, discretization: str, smallest: float) -> Step:
    """Return decay and inflow weight of every step, as `reference.functions.discretize` computes them.

    Parameters
    ----------
    delta : (batch, dim, seqlen)
    delta_bias : (dim,) or None
    A : (dim, dstate)
    smallest : float
        A decay, or a softplus, may be off by so many units of eps whatever its size: the smaller ones underflow.

    Returns
    -------
    Step

    Examples
    --------
    The relative error of exp(x) is the absolute one of x, so a decay loses digits as it vanishes:

    >>> one = np.ones((1, 1, 1))
    >>> decay = step(one, None, False, np.array([[-1.0, -50.0]]), "euler", 0.0).decay
    >>> (decay.error / decay.size).ravel()
    array([  6., 104.])
    """
    raw, signed = Rounded.exact(delta[:, :, None]), delta[:, :, None]
    if delta_bias is not None:
        raw, signed = raw + Rounded.exact(delta_bias[:, None, None]), signed + delta_bias[:, None, None]
    Delta, slope = _step_size(raw, signed, softplus_on, smallest)
    value, rates = softplus(signed) if softplus_on else signed, A[:, :, None]
    x, a, f = discretize(value, rates, discretization)
    finite = np.isfinite(rates)
    A_size = Rounded.exact(np.where(finite, rates, 0))
    x_error = A_size.size * Delta.error + 2 * np.where(np.isfinite(x), np.abs(x), 0)  # of A to base two, and product
    decay = Rounded(a, a * (x_error + _FUNCTION) + smallest)
    zero = np.zeros_like(x)
    if discretization == "euler":
        weight = Rounded(np.abs(f) + zero, Delta.error + zero)
        return Step(Delta, slope, A_size, decay, weight, Rounded(zero + 1, zero), Rounded(zero, zero))
    lost = _FUNCTION * np.abs(f) + smallest * np.maximum(np.abs(value), 1)
    weight = Rounded(np.abs(f), a * (Delta.error + np.abs(value)) + lost)
    curve = np.abs(value**2 * phi_derivative(x))
    dA_error = a * np.abs(value) * (Delta.error + np.abs(value)) + 4 * _FUNCTION * curve
    return Step(Delta, slope, A_size, decay, weight, decay.where(finite), Rounded(curve, dA_error))


def _step_size(raw: Rounded, signed: Array, softplus_on: bool, smallest: float) -> tuple[Rounded, Rounded]:
    if not softplus_on:
        return Rounded(np.abs(signed), raw.error), Rounded.exact(np.ones_like(signed))
    value, slope = softplus(signed), sigmoid(signed)
    raw_error = raw.error + raw.size
    Delta = Rounded(value, slope * raw_error + _FUNCTION * value + smallest)
    return Delta, Rounded(slope, slope * ((1 - slope) * raw_error + _FUNCTION) + smallest)


def gate(z: Array) -> tuple[Rounded, Rounded]:
    """Return silu(z) and its derivative.

    >>> silu_z, slope = gate(np.array([0.0, -20.0]))
    >>> (silu_z.error / np.maximum(silu_z.size, 1e-300)).round(3)
    array([ 0., 25.])
    """
    s, size = sigmoid(z), np.abs(silu(z))
    finite = np.where(np.isfinite(z), np.abs(z), 0)
    per_eps = _FUNCTION + 1 + (1 - s) * finite
    slope = s * (1 + finite * sigmoid(-z))
    return Rounded(size, size * per_eps), Rounded(slope, slope * (per_eps + _FUNCTION))


def gate_of(value: Array, q: Rounded) -> tuple[Rounded, Rounded]:
    """Return silu and its derivative of numbers that have errors themselves; a size is that of `q`.

    >>> silu, slope = gate_of(np.array([0.0]), Rounded(np.array([3.0]), np.array([10.0])))
    >>> silu.size, silu.error, slope.error
    (array([3.]), array([5.]), array([9.5]))
    """
    silu, slope = gate(value)
    bend = 0.5  # the second derivative of silu is at most a half
    return Rounded(q.size, silu.error + slope.size * q.error), Rounded(slope.size, slope.error + bend * q.error)
