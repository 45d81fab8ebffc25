"""The numbers of a test case: tame as in a published model, or at one of the borders where kernels go wrong.

Everything is drawn in float64 from one generator, in a fixed order, and rounded to the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from npmamba.shapes import compute_dtype
from npmamba.testing.options import ConvOptions, ScanOptions, UpdateOptions

DELTA_MIN, DELTA_MAX = 1e-3, 0.1
Array = Any
Rates = Callable[[np.random.Generator, tuple[int, int], int], Array]


def ladder(rng: np.random.Generator, shape: tuple[int, int], seqlen: int) -> Array:
    """Draw A as published models start with: -1, -2, ... -dstate, with a jitter per channel.

    >>> A = ladder(np.random.default_rng(0), (1, 3), 5)
    >>> (A / A[0, 0]).round(9)
    array([[1., 2., 3.]])
    """
    return -np.arange(1.0, shape[1] + 1) * rng.uniform(0.5, 1.5, (shape[0], 1))


def _log_uniform(low: float, high: float) -> Rates:
    return lambda rng, shape, seqlen: -np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _half_flat(rng: np.random.Generator, shape: tuple[int, int], seqlen: int) -> Array:
    return ladder(rng, shape, seqlen) * (rng.random(shape) < 0.5)


def _growing(rng: np.random.Generator, shape: tuple[int, int], seqlen: int) -> Array:
    """Rates of either sign; at the longest steps the state grows by e**3 over the whole sequence."""
    return rng.uniform(-1, 1, shape) * 3 / (DELTA_MAX * max(seqlen, 1))


@dataclass(frozen=True)
class Magnitude:
    """What size the numbers of a case have.

    Attributes
    ----------
    step : (float, float)
        Range of the step size after bias and softplus, log-uniform.
    saturated : bool
        Whether `step` is overruled: softplus is fed with either sign and up to where its exponential overflows.
    rates : callable
        Draws A.
    decades : float
        Inputs and maps are multiplied by powers of ten drawn from ``[-decades, decades]``.
    power : float
        u (or x) and the initial state are multiplied by this power of the largest number of their dtype.
    """

    step: tuple[float, float] = (DELTA_MIN, DELTA_MAX)
    saturated: bool = False
    rates: Rates = ladder
    decades: float = 0.0
    power: float = 0.0


MAGNITUDES: dict[str, Magnitude] = {
    "tame": Magnitude(),
    "slow": Magnitude(step=(1e-7, 1e-5)),
    "flat": Magnitude(rates=_half_flat),
    "fast": Magnitude(rates=_log_uniform(1, 1e5)),
    "growing": Magnitude(rates=_growing),
    "saturated": Magnitude(saturated=True, rates=_log_uniform(1e-3, 10)),
    "wide": Magnitude(step=(1e-6, 10), rates=_log_uniform(1e-6, 1e3), decades=3),
    "tiny": Magnitude(power=-0.5),
    "huge": Magnitude(power=0.5),
}
"""Magnitudes by name, the tame one first."""

CONV_MAGNITUDES = ("tame", "wide", "tiny", "huge")
"""Those that a convolution, which has neither steps nor rates, can have."""


def parameter_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of parameters and states that go with arrays of `dtype`.

    >>> parameter_dtype(np.float16), parameter_dtype(np.float64)
    (dtype('float32'), dtype('float64'))
    """
    return compute_dtype(dtype)


def finfo(dtype: Any) -> Any:
    """Return ``numpy.finfo`` of a float dtype, bfloat16 among them.

    >>> float(finfo(ml_dtypes.bfloat16).eps)
    0.0078125
    """
    return ml_dtypes.finfo(np.dtype(dtype).newbyteorder("="))


class Numbers:
    """Draws the arrays of one case.

    Parameters
    ----------
    rng : numpy.random.Generator
    magnitude : str
        A name in `MAGNITUDES`.
    dtype : dtype
        What the numbers will be rounded to; huge and tiny ones stay in its range.

    Examples
    --------
    >>> Numbers(np.random.default_rng(0), "huge", np.float32).signal((1, 1, 3)).round(-18)
    array([[[ 2.0e+18, -2.0e+18,  1.2e+19]]])
    """

    def __init__(self, rng: np.random.Generator, magnitude: str, dtype: Any) -> None:
        self.rng, self.magnitude = rng, MAGNITUDES[magnitude]
        self._largest = float(finfo(dtype).max)
        self._overflow = 1.4 * float(np.log(float(finfo(parameter_dtype(dtype)).max)))

    def plain(self, shape: Any) -> Array:
        """Draw from the standard normal distribution, spread over the magnitude's decades."""
        x = self.rng.standard_normal(shape)
        decades = min(self.magnitude.decades, np.log10(self._largest) / 4)
        return x * 10 ** self.rng.uniform(-decades, decades, shape) if decades else x

    def signal(self, shape: Any) -> Array:
        """Draw an input or a state."""
        return self.plain(shape) * self._largest**self.magnitude.power

    def rates(self, dim: int, dstate: int, seqlen: int) -> Array:
        """Draw A."""
        return self.magnitude.rates(self.rng, (dim, dstate), seqlen)

    def maps(self, batch: int, dim: int, seqlen: int, dstate: int, kind: str | int) -> Array:
        """Draw a B or C: constant, variable, or of `kind` groups."""
        if kind == "constant":
            return self.plain((dim, dstate))
        groups = () if kind == "variable" else (kind,)
        return self.plain((batch, *groups, dstate, seqlen))

    def steps(self, shape: tuple[int, ...], *, softplus: bool, bias: bool) -> tuple[Array, Array]:
        """Draw delta, and delta_bias or None, of which the step size is made."""
        low, high = np.log(self.magnitude.step)
        target = np.exp(self.rng.uniform(low, high, shape))
        offset = self.rng.uniform(0, self.magnitude.step[0] / 2, shape[1])
        if self.magnitude.saturated:
            raw = np.exp(self.rng.uniform(np.log(0.1), np.log(self._overflow), shape))
            target = raw * self.rng.choice([-1.0, 1.0], shape) if softplus else raw
        elif softplus:
            target = target + np.log(-np.expm1(-target))  # the inverse of softplus
            offset = self.rng.uniform(-7, -2, shape[1])
        return (target - offset[:, None], offset) if bias else (target, None)

    def seq_idx(self, batch: int, seqlen: int, kind: str | None) -> Array:
        """Draw a seq_idx of short runs; "padded" has padding in it, "padding" only that."""
        if kind is None:
            return None
        seq_idx = np.cumsum(self.rng.random((batch, seqlen)) < 0.3, axis=1) % 3
        padding = self.rng.random((batch, seqlen)) < {"runs": 0.0, "padded": 0.3, "padding": 1.0}[kind]
        return np.where(padding, -1 - self.rng.integers(0, 3, (batch, seqlen)), seq_idx).astype(np.int32)


def draw_scan(numbers: Numbers, sizes: tuple[int, ...], o: ScanOptions) -> dict[str, Any]:
    """Draw the arguments of a scan of sizes (batch, dim, seqlen, dstate) in float64.

    >>> numbers = Numbers(np.random.default_rng(0), "tame", np.float64)
    >>> draw_scan(numbers, (1, 4, 5, 3), ScanOptions(B=2))["B"].shape
    (1, 2, 3, 5)
    """
    batch, dim, seqlen, dstate = sizes
    shape = (batch, dim, seqlen)
    delta, delta_bias = numbers.steps(shape, softplus=o.delta_softplus, bias=o.delta_bias)
    return {
        "u": numbers.signal(shape),
        "delta": delta,
        "A": numbers.rates(dim, dstate, seqlen),
        "B": numbers.maps(batch, dim, seqlen, dstate, o.B),
        "C": numbers.maps(batch, dim, seqlen, dstate, o.C),
        "D": numbers.plain(dim) if o.D else None,
        "z": numbers.rng.standard_normal(shape) if o.z else None,
        "delta_bias": delta_bias,
        "initial_state": numbers.signal((batch, dim, dstate)) if o.initial_state else None,
        "delta_softplus": o.delta_softplus,
        "discretization": o.discretization,
        "reverse": o.reverse,
        "seq_idx": numbers.seq_idx(batch, seqlen, o.seq_idx),
    }


def draw_conv(numbers: Numbers, sizes: tuple[int, ...], o: ConvOptions) -> dict[str, Any]:
    """Draw the arguments of a convolution of sizes (batch, dim, seqlen, width) in float64.

    >>> numbers = Numbers(np.random.default_rng(0), "tame", np.float64)
    >>> draw_conv(numbers, (1, 4, 5, 3), ConvOptions())["weight"].shape
    (4, 3)
    """
    batch, dim, seqlen, width = sizes
    return {
        "x": numbers.signal((batch, dim, seqlen)),
        "weight": numbers.plain((dim, width)),
        "bias": numbers.plain(dim) if o.bias else None,
        "initial_state": numbers.signal((batch, dim, width - 1)) if o.initial_state else None,
        "activation": o.activation,
        "reverse": o.reverse,
        "seq_idx": numbers.seq_idx(batch, seqlen, o.seq_idx),
    }


def draw_update(numbers: Numbers, sizes: tuple[int, ...], o: UpdateOptions) -> dict[str, Any]:
    """Draw the arguments of one step of sizes (batch, dim, dstate) in float64: those of a scan of one token.

    >>> numbers = Numbers(np.random.default_rng(0), "tame", np.float64)
    >>> draw_update(numbers, (1, 4, 3), UpdateOptions())["dt"].shape
    (1, 4)
    """
    batch, dim, dstate = sizes
    step = ScanOptions(o.B, o.C, o.D, o.z, o.dt_bias, o.dt_softplus, True, discretization=o.discretization)
    scan = draw_scan(numbers, (batch, dim, 1, dstate), step)
    names = {"initial_state": "state", "u": "x"}
    one = {n: x[..., 0] if n in ("u", "delta", "z", "B", "C") and np.ndim(x) > 2 else x for n, x in scan.items()}
    return {names.get(n, n.replace("delta", "dt")): x for n, x in one.items() if n not in ("seq_idx", "reverse")}
