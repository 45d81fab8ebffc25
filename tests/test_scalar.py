"""The formulas: compiled, as vectors and as scalars, against mpmath; their derivatives; their values at the edges.

A unit here is the spacing of the numbers near 1, relative to the value: 2.2e-16, or 1.2e-7 in float32.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

from npmamba import scalar
from npmamba.cpu.runtime import Int, Read, Write, kernel
from npmamba.cpu.simd import load, store, width
from npmamba.scalar import (
    cast,
    decay_factor,
    decay_of,
    decayed,
    exp,
    exp2,
    exp2_product,
    exp2_product_small,
    exp2m1,
    expm1,
    log1p,
    phi,
    phi_derivative,
    sigmoid,
    silu,
    silu_derivative,
    softplus,
    sqrt,
    state_step,
)

NAMES = "exp2 exp expm1 log1p sqrt sigmoid softplus silu silu_derivative phi phi_derivative exp2_product".split()
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
EITHER = pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "scalars"])
INF, NAN = np.inf, np.nan
HALF = 0.5  # the second factor of every exp2_product here but in its own test


@kernel
def evaluate(start: Int, stop: Int, x: Read[2], vectors: Write[3], scalars: Write[3]):
    """Compute every formula for the numbers of each row of `x`, by vectors and one by one."""
    for i in range(start, stop):
        for j in range(0, x.shape[1], width(x)):
            v = load(x, (i, j))
            store(vectors, (0, i, j), exp2(v))
            store(vectors, (1, i, j), exp(v))
            store(vectors, (2, i, j), expm1(v))
            store(vectors, (3, i, j), log1p(v))
            store(vectors, (4, i, j), sqrt(v))
            store(vectors, (5, i, j), sigmoid(v))
            store(vectors, (6, i, j), softplus(v))
            store(vectors, (7, i, j), silu(v))
            store(vectors, (8, i, j), silu_derivative(v))
            store(vectors, (9, i, j), phi(v))
            store(vectors, (10, i, j), phi_derivative(v))
            store(vectors, (11, i, j), exp2_product(v, cast(HALF, v)))
        for j in range(x.shape[1]):
            one = x[i, j]
            scalars[0, i, j] = exp2(one)
            scalars[1, i, j] = exp(one)
            scalars[2, i, j] = expm1(one)
            scalars[3, i, j] = log1p(one)
            scalars[4, i, j] = sqrt(one)
            scalars[5, i, j] = sigmoid(one)
            scalars[6, i, j] = softplus(one)
            scalars[7, i, j] = silu(one)
            scalars[8, i, j] = silu_derivative(one)
            scalars[9, i, j] = phi(one)
            scalars[10, i, j] = phi_derivative(one)
            scalars[11, i, j] = exp2_product(one, cast(HALF, one))


def compiled(name: str, x: Any, dtype: Any, vectors: bool = True) -> np.ndarray:
    x = np.asarray(x, dtype)
    rows = np.zeros((-(-x.size // 64), 64), dtype)
    rows.reshape(-1)[: x.size] = x
    out = np.full((2, len(NAMES), *rows.shape), 7, dtype)
    evaluate[dtype](0, len(rows), rows, *out)
    return out[0 if vectors else 1, NAMES.index(name)].reshape(-1)[: x.size]


EXACT = {
    "exp2": lambda x: mpmath.power(2, x),
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log1p": mpmath.log1p,
    "sqrt": mpmath.sqrt,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "silu_derivative": lambda x: (1 + mpmath.exp(-x) + x * mpmath.exp(-x)) / (1 + mpmath.exp(-x)) ** 2,
    "phi": lambda x: mpmath.expm1(x) / x if x else mpmath.mpf(1),
    "exp2_product": lambda x: mpmath.power(2, x / 2),
    "phi_derivative": lambda x: (mpmath.exp(x) * (x - 1) + 1) / x**2 if x else mpmath.mpf("0.5"),
}
UNITS = {"sqrt": 0.51, "softplus": 2.0, "sigmoid": 2.0, "silu": 3.0, "silu_derivative": 3.0, "phi_derivative": 3.0}
SILU_DERIVATIVE_IS_ZERO = -1.2784645427610738


def points(name: str, dtype: Any) -> np.ndarray:
    """Return numbers from -80 to 80, dense near 0 and near 1 in size, where the formulas change."""
    tiny = np.logspace(-30, 0, 121)
    edges = np.array([1, np.nextafter(dtype(1), dtype(0)), np.log(2) / 2, 0.5, 0.35], np.float64)
    x = np.concatenate([np.linspace(-80, 80, 641), np.linspace(-3, 3, 241), tiny, edges, [0.0]])
    x = np.concatenate([x, -x])
    if name == "silu_derivative":
        x = x[abs(x - SILU_DERIVATIVE_IS_ZERO) > 0.2]
    x = x[(x >= 0) & (x <= 1)] if name == "log1p" else abs(x) if name == "sqrt" else x
    return np.unique(x.astype(dtype))


def stand_in(name: str, x: Any) -> Any:
    function = getattr(scalar, name)
    return function(x, scalar.cast(HALF, x)) if name == "exp2_product" else function(x)


def exact(name: str, x: np.ndarray) -> np.ndarray:
    with mpmath.workdps(120):
        return np.array([float(EXACT[name](mpmath.mpf(float(v)))) for v in x])


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_formula_is_right_to_a_few_units(name, dtype):
    x = points(name, dtype)
    wanted = exact(name, x)
    for vectors in (True, False):
        error = np.abs(compiled(name, x, dtype, vectors) - wanted)
        size = np.maximum(np.abs(wanted), np.finfo(dtype).tiny)
        units = UNITS.get(name, 1.5)
        if name == "silu_derivative":
            units = units + np.maximum(x, 0) / 2  # 1 - sigmoid(x) is exact to half a unit of 1
        assert (error <= units * np.finfo(dtype).eps * size).all(), x[np.argmax(error / size)]


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_without_the_compiler_computes_the_same(name, dtype):
    """NumPy's own exp and its kin are right to a few units too."""
    x = points(name, dtype)
    plain, fast = stand_in(name, x), compiled(name, x, dtype).astype(np.float64)
    assert plain.dtype == dtype
    assert stand_in(name, x[3]).dtype == dtype
    size = np.maximum(np.abs(fast), np.finfo(dtype).tiny)
    units = 6 + (np.maximum(x, 0) if name == "silu_derivative" else 0)
    assert (np.abs(plain - fast) <= units * np.finfo(dtype).eps * size).all()


@DTYPES
@EITHER
@pytest.mark.parametrize("name", NAMES)
def test_nan_gives_nan(name, vectors, dtype):
    """Whatever its sign and payload, and nothing else becomes NaN that has a value."""
    bits, places = (np.uint32, 23) if dtype == np.float32 else (np.uint64, 52)
    quiet = int(np.array(NAN, dtype).view(bits))
    sign, payload = 1 << (8 * np.dtype(dtype).itemsize - 1), (1 << (places - 1)) - 1
    patterns = [quiet, quiet | sign, quiet | payload, quiet | sign | payload, quiet | 1, quiet | sign | 5]
    assert np.isnan(compiled(name, np.array(patterns, bits).view(dtype), dtype, vectors)).all()
    assert np.isnan(stand_in(name, dtype(NAN)))


SPECIAL: dict[str, dict[float, float]] = {
    "exp2": {-INF: 0, -2000: 0, -126: 2.0**-126, -0.0: 1, 1: 2, 127: 2.0**127, 2000: INF, INF: INF},
    "exp": {-INF: 0, -2000: 0, -0.0: 1, 2000: INF, INF: INF},
    "expm1": {-INF: -1, -2000: -1, 0: 0, 2000: INF, INF: INF},
    "exp2_product": {-INF: 0, -4000: 0, -252: 2.0**-126, -0.0: 1, 2: 2, 254: 2.0**127, 4000: INF, INF: INF},
    "log1p": {0: 0},
    "sqrt": {0: 0, 4: 2, INF: INF, -1: NAN},
    "sigmoid": {-INF: 0, -2000: 0, -0.0: 0.5, 2000: 1, INF: 1},
    "softplus": {-INF: 0, -2000: 0, 2000: 2000, INF: INF},
    "silu": {-2000: 0, -0.0: 0, 2000: 2000, INF: INF},
    "silu_derivative": {-2000: 0, 0: 0.5, 2000: 1},
    "phi": {-INF: 0, -0.0: 1, 2000: INF},
    "phi_derivative": {-INF: 0, -0.0: 0.5, 1: 1, 2000: INF},
}


@DTYPES
@EITHER
@pytest.mark.parametrize("name", NAMES)
def test_the_values_at_the_edges(name, vectors, dtype):
    x = list(SPECIAL[name])
    np.testing.assert_array_equal(compiled(name, x, dtype, vectors), list(SPECIAL[name].values()))
    with np.errstate(all="ignore"):
        plain = stand_in(name, np.array(x, dtype))
    np.testing.assert_allclose(plain, list(SPECIAL[name].values()), rtol=2e-7)


@EITHER
def test_exp2_in_float32_ends_at_128_and_may_end_at_minus_126(vectors):
    x = np.array([np.nextafter(np.float32(128), np.float32(0)), 128, 129, 1e30, -126, -126.5, -149, -150, -1e30])
    got = compiled("exp2", x, np.float32, vectors)
    assert np.isfinite(got[0])
    assert (got[1:4] == INF).all()
    assert got[4] == 2.0**-126
    right = np.exp2(x[5:])
    assert ((got[5:] == 0) | (np.abs(got[5:] - right) <= 1e-45)).all()


@EITHER
@pytest.mark.parametrize("name", ["exp", "expm1", "exp2", "phi", "phi_derivative"])
def test_the_largest_powers_of_float32_are_numbers(name, vectors):
    top = 127.999 if name == "exp2" else 88.722
    x = np.linspace(top - 2, top, 2001).astype(np.float32)
    wanted = exact(name, x)
    np.testing.assert_allclose(compiled(name, x, np.float32, vectors), wanted, rtol=3e-7)


@EITHER
def test_the_series_of_phis_slope_is_long_enough_for_float64(vectors):
    x = np.linspace(-0.9999, 0.9999, 801)
    got = compiled("phi_derivative", x, np.float64, vectors)
    np.testing.assert_allclose(got, exact("phi_derivative", x), rtol=1e-15)


@kernel
def _products(start: Int, stop: Int, x: Read[1], y: Read[1], out: Write[2]):
    for i in range(0, x.shape[0], width(x)):
        v, w = load(x, (i,)), load(y, (i,))
        store(out, (0, i), exp2_product(v, w))
        store(out, (1, i), exp2_product_small(v, w))
    for i in range(x.shape[0]):
        out[2, i] = exp2_product(x[i], y[i])
        out[3, i] = exp2_product_small(x[i], y[i])


@DTYPES
def test_the_power_of_a_product_and_the_small_one_have_the_same_bits(dtype):
    """As long as the product is no larger than 126. Of its error, the product's rounding is a part of its size."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-11, 11, (2, 4096)).astype(dtype)
    out = np.zeros((4, 4096), dtype)
    _products[dtype](0, 1, x, y, out)
    for power, small in (out[:2], out[2:]):
        assert power.tobytes() == small.tobytes()
    with mpmath.workdps(60):
        products = [mpmath.mpf(float(a)) * float(b) for a, b in zip(x[:500], y[:500], strict=True)]
        wanted = [float(mpmath.power(2, product)) for product in products]
    units = 1.5 + np.abs(x[:500] * y[:500])
    for power in (out[0], out[2]):
        assert (np.abs(power[:500] - wanted) <= units * np.finfo(dtype).eps * np.abs(wanted)).all()


@EITHER
@pytest.mark.parametrize("sign", [1, -1])
def test_the_power_of_an_overflowing_product_is_a_limit(vectors, sign):
    x, y = np.full(64, 1e30, np.float32), np.full(64, sign * 1e30, np.float32)
    out = np.zeros((4, 64), np.float32)
    _products[np.float32](0, 1, x, y, out)
    assert (out[0 if vectors else 2] == (INF if sign > 0 else 0)).all()


@EITHER
@pytest.mark.parametrize(("name", "units"), [("exp2", 0.501), ("exp2_product", 0.56)])
def test_a_slow_decay_keeps_its_time_constant(name, units, vectors):
    """2^x near x = 0 errs by little more than its rounding, and on the average by a hundredth of that."""
    x = -np.logspace(-6.5, -2, 2000).astype(np.float32)
    given = x / np.float32(HALF) if name == "exp2_product" else x
    loss = compiled(name, given, np.float32, vectors).astype(np.float64) - 1
    error = (loss - np.expm1(x.astype(np.float64) * np.log(2))) / np.finfo(np.float32).epsneg
    assert (np.abs(error) <= units).all()
    assert abs(error.mean()) < 0.02


DERIVATIVES = [("softplus", sigmoid), ("silu", silu_derivative), ("phi", phi_derivative), ("exp", exp)]


@pytest.mark.parametrize(("name", "derivative"), DERIVATIVES)
def test_a_derivative_is_that_of_the_formula_above_it(name, derivative):
    """By differences of fourth order, of the formula as it stands there in plain Python."""
    x, h = np.linspace(-20, 20, 1602), 1e-3
    f = getattr(scalar, name)
    slope = (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)
    np.testing.assert_allclose(derivative(x), slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_stand_ins_keep_the_dtype_of_their_argument(dtype):
    x = dtype(0.5)
    results = [scalar.cast(0.1, x), scalar.fma(x, x, x), scalar.select(x > 0, x, -x), *(
        primitive(x) for primitive in (exp2, exp, expm1, log1p, sqrt)
    )]  # fmt: skip
    assert {r.dtype for r in results} == {np.dtype(dtype)}
    assert all(np.ndim(r) == 0 for r in results)
    assert scalar.cast(0.1, np.zeros(3, dtype)).shape == (3,)


def test_fma_rounds_float32_once():
    x = np.float32(1 + 2.0**-12)
    assert scalar.fma(x, x, -np.float32(1 + 2.0**-11)) == 2.0**-24


@kernel
def take_steps(start: Int, stop: Int, x: Read[1], h: Read[1], inflow: Read[1], vectors: Write[2], scalars: Write[2]):
    for i in range(start, stop, width(x)):
        v, state = load(x, (i,), stop - i), load(h, (i,), stop - i)
        factor = decay_factor(exp2(v), v)
        store(vectors, (0, i), state_step(factor, v, state, load(inflow, (i,), stop - i)), stop - i)
        store(vectors, (1, i), decayed(factor, v, state), stop - i)
        store(vectors, (2, i), decay_of(factor, v), stop - i)
        store(vectors, (3, i), exp2m1(v), stop - i)
    for i in range(start, stop):
        factor = decay_factor(exp2(x[i]), x[i])
        scalars[0, i] = state_step(factor, x[i], h[i], inflow[i])
        scalars[1, i] = decayed(factor, x[i], h[i])
        scalars[2, i] = decay_of(factor, x[i])
        scalars[3, i] = exp2m1(x[i])


def steps_taken(x, h, inflow, dtype):
    """Return what `take_steps` finds by vectors, one by one, and without the compiler."""
    x, h, inflow = (np.array(q) for q in np.broadcast_arrays(*(np.asarray(q, dtype) for q in (x, h, inflow))))
    vectors, scalars = np.full((2, 4, x.size), 7, dtype)
    take_steps[dtype](0, x.size, x, h, inflow, vectors, scalars)
    with np.errstate(over="ignore", invalid="ignore"):
        factor = decay_factor(exp2(x), x)
        plain = state_step(factor, x, h, inflow), decayed(factor, x, h), decay_of(factor, x), exp2m1(x)
    return vectors, scalars, np.array(plain)


SLOW = np.concatenate([np.logspace(-300, np.log10(0.5), 200), np.linspace(0.01, 0.5, 200)])


@DTYPES
def test_state_step_and_readout_are_the_two_lines_of_the_equation(dtype):
    for found in steps_taken([-1, -0.25, 1, 0], [4, 8, 1, 5], [3, 1, 2, 0], dtype):
        wanted = [[5, 8 * 2**-0.25 + 1, 4, 5], [2, 8 * 2**-0.25, 2, 5], [0.5, 2**-0.25, 2, 1]]
        np.testing.assert_allclose(found[:3], wanted, rtol=4 * np.finfo(dtype).eps)
    assert scalar.readout(2.0, 4.0, 1.0) == 9.0


@DTYPES
def test_vectors_and_scalars_take_the_same_steps(dtype):
    rng = np.random.default_rng(3)
    x = np.concatenate([-np.logspace(-30, 3, 501), np.linspace(-0.6, 0.6, 101), [0.0, -0.0, 0.5, -0.5]])
    h, inflow = rng.normal(size=(2, x.size))
    vectors, scalars, plain = steps_taken(x, h, inflow, dtype)
    np.testing.assert_array_equal(vectors[:3], scalars[:3])
    size = np.abs(h) + np.abs(inflow)
    assert np.abs(vectors - plain)[:3].max(0, where=size > 0.1, initial=0).max() < 20 * np.finfo(dtype).eps * size.max()


def test_a_power_less_one_is_right_to_two_units_in_float64():
    x = np.concatenate([-SLOW, SLOW])
    with mpmath.workdps(50):
        wanted = np.array([float(mpmath.expm1(mpmath.mpf(v) * mpmath.log(2))) for v in x])
    for found in steps_taken(x, 1, 0, np.float64):
        assert np.abs(found[3] / wanted - 1).max() <= 2 * np.finfo(np.float64).eps


@DTYPES
@pytest.mark.parametrize("x", [0.0, -0.0, -1e-6, 0.25, -3.0, 3.0])
def test_a_state_that_is_no_number_stays_what_it_is(x, dtype):
    for found in steps_taken([x] * 3, [INF, -INF, NAN], [1, 1, 1], dtype):
        np.testing.assert_array_equal(found[:2], [[INF, -INF, NAN]] * 2)


@DTYPES
def test_a_step_of_no_length_keeps_every_bit(dtype):
    h = np.random.default_rng(4).normal(size=64).astype(dtype)
    for found in steps_taken(np.zeros(64), h, np.zeros(64), dtype):
        np.testing.assert_array_equal(found[:2], [h, h])
        np.testing.assert_array_equal(found[2], np.ones(64))


def test_every_primitive_has_a_stand_in_and_compiled_forms():
    assert {p.__name__ for p in scalar.PRIMITIVES} >= {"cast", "fma", "select", *NAMES[:5]}
    assert all(getattr(scalar, p.__name__) is p for p in scalar.PRIMITIVES)
    assert {silu, softplus, phi, log1p} <= {getattr(scalar, name) for name in NAMES}
