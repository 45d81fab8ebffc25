"""The mathematics of Mamba for one number at a time: each formula once, its derivative right beneath.

Every kernel calls these functions; a kernel itself holds only loops and memory. The formulas are written in ``+ - * /``
and a handful of primitives (`cast`, `fma`, `select`, `exp2`, `exp`, `expm1`, `log1p`), which each target supplies: the
plain Python functions below serve NumPy and runs without the compiler, `npmamba.cpu.simd` overloads them for Numba's
scalars and for its vectors of channels.

Notation: ``x`` is the product ``delta * A``; ``decay = exp(x)`` and ``inflow`` are the two numbers of one step,
``h_t = decay h_{t-1} + inflow``. In float64, the yardstick, a slow decay is held less 1, and rounding it costs nothing:
that is its ``factor``. Equation numbers refer to Gu & Dao, arXiv 2312.00752.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

formula = register_jitable(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorator of a formula: plain Python when called from Python, compiled into the kernels that call it."""


# --- primitives: each target supplies its own; these are the stand-ins for plain Python and NumPy ---


def cast(c: Any, x: Any) -> Any:
    """Return the number `c` in the type and width of `x`: a bare ``0.5`` would turn float32 into float64."""
    return np.full(np.shape(x), c, np.asarray(x).dtype)[()]


def fma(x: Any, y: Any, z: Any) -> Any:
    """Return ``x y + z``; targets round once, this stand-in rounds float32 through float64."""
    if np.asarray(x).dtype == np.float32:
        return (np.float64(1) * x * y + z).astype(np.float32)
    return x * y + z


def select(condition: Any, x: Any, y: Any) -> Any:
    """Return `x` where `condition` holds, else `y`; both are computed."""
    return np.where(condition, x, y)[()]


def exp2(x: Any) -> Any:
    """Return ``2^x``. NaN gives NaN, ``x >= 128`` infinity and ``x < -126`` zero or the right value (float32)."""
    return np.exp2(x)


def exp2_product(x: Any, y: Any) -> Any:
    """Return ``2^(x y)`` as `exp2` does; some targets round the product, others do not."""
    return np.exp2(x * y)


def exp2_product_small(x: Any, y: Any) -> Any:
    """Return the same, bit for bit, where ``|x y| <= 126`` or it is NaN, and anything elsewhere: it checks nothing."""
    return np.exp2(x * y)


def exp2m1(x: Any) -> Any:
    """Return ``2^x - 1`` to a few units in the last place for float64 where ``|x| <= 1/2``, and anything elsewhere."""
    return np.expm1(x * np.log(2))


def exp(x: Any) -> Any:
    """Return ``e^x`` to a few units in the last place."""
    return np.exp(x)


def expm1(x: Any) -> Any:
    """Return ``e^x - 1`` to a few units in the last place, also where it is small."""
    return np.expm1(x)


def log1p(x: Any) -> Any:
    """Return ``log(1 + x)`` for ``0 <= x <= 1`` to a few units in the last place, also where it is small."""
    return np.log1p(x)


def sqrt(x: Any) -> Any:
    """Return the square root of `x`, rounded once."""
    return np.sqrt(x)


def divide(x: Any, y: Any) -> Any:
    """Return ``x / y`` to two units in the last place, for divisors between 1e-37 and 1e37 in magnitude."""
    return x / y


def magnitude(x: Any) -> Any:
    """Return ``|x|``."""
    return np.abs(x)


def is_double(x: Any) -> bool:
    """Tell whether `x` is float64: where targets compile, a constant, and what is not meant for the type vanishes."""
    return bool(np.asarray(x).dtype == np.float64)


PRIMITIVES = (
    cast, fma, select, exp2, exp2_product, exp2_product_small, exp2m1, exp, expm1, log1p, sqrt, divide, magnitude,
    is_double,
)  # fmt: skip


@formula
def log1p_polynomial(x):
    """log(1 + x) = 2 artanh(s) with s = x / (2 + x) <= 1/3: what `log1p` is in float32 on every target of ours"""
    s = divide(x, cast(2, x) + x)
    q = s * s
    p = fma(cast(0.12461131066083908, x), q, cast(0.10634681582450867, x))
    p = fma(p, q, cast(0.1431531310081482, x))
    p = fma(p, q, cast(0.1999920755624771, x))
    p = fma(p, q, cast(0.33333340287208557, x))
    twice = s + s
    return fma(p * q, twice, twice)


@formula
def exp2m1_series(x):
    """sum_k (x ln 2)^k / k!, without its first term: what `exp2m1` is in float64 on every target of ours"""
    p = cast(1.3691488853904128e-12, x)  # ln(2)^13 / 13!, the last term that is above the last place at |x| = 1/2
    p = fma(p, x, cast(2.5678435993488206e-11, x))
    p = fma(p, x, cast(4.4455382718708116e-10, x))
    p = fma(p, x, cast(7.054911620801123e-09, x))
    p = fma(p, x, cast(1.01780860092397e-07, x))
    p = fma(p, x, cast(1.321548679014431e-06, x))
    p = fma(p, x, cast(1.5252733804059841e-05, x))
    p = fma(p, x, cast(1.540353039338161e-04, x))
    p = fma(p, x, cast(1.3333558146428443e-03, x))
    p = fma(p, x, cast(9.618129107628477e-03, x))
    p = fma(p, x, cast(5.550410866482158e-02, x))
    p = fma(p, x, cast(0.24022650695910072, x))
    return fma(p, x, cast(0.6931471805599453, x)) * x


# --- activations ---


@formula
def _exp_minus_abs(x):
    """e^(-|x|), in (0, 1]: the one exponential from which sigmoid and softplus are safe for every x."""
    return exp(-magnitude(x))


@formula
def sigmoid(x):
    """sigma(x) = 1 / (1 + e^(-x))"""
    e = _exp_minus_abs(x)
    return divide(select(x < cast(0, x), e, cast(1, x)), cast(1, x) + e)


@formula
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e^(-|x|)); its derivative is `sigmoid`."""
    return select(x < cast(0, x), cast(0, x), x) + log1p(_exp_minus_abs(x))


@formula
def silu(x):
    """x sigma(x)"""
    return x * sigmoid(x)


@formula
def silu_derivative(x):
    """d/dx x sigma(x) = sigma (1 + x (1 - sigma))"""
    s = sigmoid(x)
    return s * fma(x, cast(1, x) - s, cast(1, x))


# --- one step of the state space ---


@formula
def _is_slow(x):
    """Whether 2^x is held less 1"""
    return magnitude(x) < cast(0.5, x)


@formula
def _is_finite(x):
    return magnitude(x) <= cast(1.7976931348623157e308, x)


@formula
def decay_factor(decay, x):
    """What a state is multiplied with in a step: decay = 2^x, in float64 less 1 where that is slow"""
    if is_double(x):
        return select(_is_slow(x), exp2m1(x), decay)
    return decay


@formula
def state_step(factor, x, h, inflow):
    """h_t = decay h_{t-1} + inflow        (eq. 2a)

    In float64 a slow decay is h + ((decay - 1) h + inflow): over a million steps of x = 1e-6 each, the rounding of
    decay to a multiple of 1e-16 would add up to 1e-11. An infinite h stays what it is.
    """
    if is_double(x):
        moved = fma(factor, h, inflow)
        return select(_is_slow(x), select(_is_finite(h), moved, inflow) + h, moved)
    return fma(factor, h, inflow)


@formula
def decayed(factor, x, g):
    """decay g"""
    if is_double(x):
        return select(_is_slow(x), select(_is_finite(g), fma(factor, g, g), g), factor * g)
    return factor * g


@formula
def decay_of(factor, x):
    """decay itself"""
    if is_double(x):
        return select(_is_slow(x), cast(1, x) + factor, factor)
    return factor


@formula
def readout(C, h, y):
    """y + C h: one state's share of the output        (eq. 2b)"""
    return fma(C, h, y)


@formula
def phi(x):
    """phi(x) = (e^x - 1) / x, and 1 at 0: exact zero-order hold turns delta B into delta phi(x) B        (eq. 4)"""
    zero = x == cast(0, x)
    return select(zero, cast(1, x), expm1(x) / select(zero, cast(1, x), x))


@formula
def phi_derivative(x):
    """phi'(x) = (e^x - phi(x)) / x, by its Taylor series sum_k (k + 1) x^k / (k + 2)! where that cancels."""
    near = (x > cast(-1, x)) & (x < cast(1, x))
    far = select(near, cast(1, x), x)
    s = select(near, x, cast(0, x))
    p = cast(17 / 6402373705728000, x)  # 17 / 18!, the term that is below the last place at |x| = 1
    p = fma(p, s, cast(16 / 355687428096000, x))
    p = fma(p, s, cast(15 / 20922789888000, x))
    p = fma(p, s, cast(14 / 1307674368000, x))
    p = fma(p, s, cast(13 / 87178291200, x))
    p = fma(p, s, cast(12 / 6227020800, x))
    p = fma(p, s, cast(11 / 479001600, x))
    p = fma(p, s, cast(10 / 39916800, x))
    p = fma(p, s, cast(9 / 3628800, x))
    p = fma(p, s, cast(8 / 362880, x))
    p = fma(p, s, cast(7 / 40320, x))
    p = fma(p, s, cast(6 / 5040, x))
    p = fma(p, s, cast(5 / 720, x))
    p = fma(p, s, cast(4 / 120, x))
    p = fma(p, s, cast(3 / 24, x))
    p = fma(p, s, cast(2 / 6, x))
    p = fma(p, s, cast(1 / 2, x))
    inverse = cast(1, x) / far
    return select(near, p, fma(exp(far), cast(1, x) - inverse, inverse) * inverse)


# --- normalization and loss, one number of a row ---


@formula
def normalized(s, r, weight):
    """s r weight, where r = 1 / sqrt(mean(s^2) + eps) belongs to the row"""
    return s * r * weight


@formula
def normalized_derivative(q, s_hat, mean, r):
    """ds = r (q - s_hat mean(q s_hat)), with q = dy weight and s_hat = s r"""
    return r * fma(-s_hat, mean, q)


@formula
def softmax_term(logit, top, factor):
    """e^(logit - top) factor: one probability, times what its row is scaled with"""
    return exp2((logit - top) * cast(1.4426950408889634, top)) * factor


# --- one step of the optimizer ---


@formula
def running_mean(mean, x, beta, rest):
    """beta mean + (1 - beta) x, for numbers beta and rest = 1 - beta"""
    return fma(cast(beta, x), mean, cast(rest, x) * x)


@formula
def adamw_step(p, m, v, decay, rate, root, eps):
    """decay p - rate m / (sqrt(v) / root + eps): Loshchilov & Hutter, arXiv 1711.05101, with numbers for
    decay = 1 - lr weight_decay, rate = lr / (1 - beta1^t) and root = sqrt(1 - beta2^t)"""
    scale = divide(sqrt(v), cast(root, v)) + cast(eps, v)
    return fma(cast(decay, p), p, -(cast(rate, p) * divide(m, scale)))


# --- random bits ---


@formula
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10, Salmon et al. 2011: four random words, a function of a counter of four words and a key of two.
    All are below 2^32 and held in uint64, where a product of two has room."""
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (q >> shift) ^ c1 ^ k0, q & word, (p >> shift) ^ c3 ^ k1, p & word
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & word, (k1 + np.uint64(0xBB67AE85)) & word
    return c0, c1, c2, c3
