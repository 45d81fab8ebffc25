"""The oracles of `npmamba.testing`: each against the others, and the exact ones against exact arithmetic."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.reference import causal_conv1d, selective_scan
from npmamba.testing import doubled, oracles
from npmamba.testing.cases import ConvCase, ScanCase, ScanOptions, UpdateCase, UpdateOptions
from npmamba.testing.doubled import Doubled
from npmamba.testing.sequences import conv_by, scan_by
from npmamba.testing.strategies import conv_cases, scan_cases, update_cases

SMALL = {"dims": (1, 2, 4), "lengths": (1, 2, 3, 7, 9), "dstates": (1, 2, 3), "batches": (1, 2)}
GENTLE = ["tame", "slow", "flat", "growing"]
ON = ScanOptions(2, "constant", True, True, True, True, True, "padded", "zoh", True)
small = scan_cases(**SMALL)
zoh = scan_cases(**SMALL, discretization="zoh")


def error(found: Any, expected: Any) -> float:
    """Return the largest error of y and last_state, relative to the largest number of each."""
    errors = [0.0]
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        worst = np.abs(x - y).max(initial=0.0)
        errors.append(worst and worst / np.abs(y).max())
    return max(errors)


def digits(found: Doubled, exact: Any) -> np.ndarray:
    """Return the relative errors of double-double numbers, given the exact ones of mpmath."""
    pairs = zip(found.hi.ravel(), found.lo.ravel(), exact, strict=True)
    return np.array([float(abs((mpmath.mpf(hi) + mpmath.mpf(lo)) / x - 1)) for hi, lo, x in pairs])


# The exact ones


@given(scan_cases(**SMALL, magnitudes=["flat"]), st.integers(1, 2**20))
@settings(max_examples=10)
def test_multiprecision_is_rational_arithmetic_where_there_is_no_exponential(case, scale):
    """With A = 0 the euler rule has none, and a scan of rational numbers is rational: every bit is known."""
    case = ScanCase(case.batch, case.dim, case.seqlen, case.dstate, seed=case.seed)
    arguments = {**case.arguments(), "A": np.zeros((case.dim, case.dstate))}
    arguments["u"] = arguments["u"] * scale
    y, last_state = oracles.multiprecision(arguments)
    exact = [np.frompyfunc(Fraction, 1, 1)(arguments[name]) for name in ("u", "delta", "B", "C")]
    u, delta, B, C = exact
    h = np.cumsum(delta[:, :, None] * B[:, None] * u[:, :, None], axis=-1)
    np.testing.assert_array_equal(y, (C[:, None] * h).sum(2).astype(np.float64))
    np.testing.assert_array_equal(last_state, h[..., -1].astype(np.float64))


@given(small)
@settings(max_examples=10)
def test_more_digits_change_no_bit_of_a_multiprecision_result(case):
    arguments = case.arguments()
    for fifty, hundred in zip(
        oracles.multiprecision(arguments), oracles.multiprecision(arguments, digits=100), strict=True
    ):
        np.testing.assert_array_equal(fifty, hundred)


@given(small)
def test_double_double_is_multiprecision_to_the_last_bit(case):
    arguments = case.arguments()
    for found, exact in zip(oracles.double_double(arguments), oracles.multiprecision(arguments), strict=True):
        scale = np.abs(exact).max(initial=0)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-28 * scale + 1e-300)


X = [-500, -30.5, -1, -0.3466, -0.1, -1e-8, -1e-20, 1e-300, 1e-20, 1e-3, 0.3, 1, 2.5, 88.8, 700]


def test_double_double_functions_have_thirty_digits():
    x = Doubled(X)
    with mpmath.workdps(60):
        exact = [mpmath.mpf(v) for v in X]
        assert digits(doubled.exp(x), map(mpmath.exp, exact)).max() < 1e-28  # 700 times that of x
        assert digits(doubled.expm1(x), map(mpmath.expm1, exact)).max() < 1e-28
        assert digits(doubled.softplus(x), [mpmath.log1p(mpmath.exp(v)) for v in exact]).max() < 1e-28
        assert digits(doubled.silu(x), [v / (1 + mpmath.exp(-v)) for v in exact]).max() < 1e-28
        third = Doubled(1.0) / Doubled(np.array([3.0, -7.0]))
        assert digits(third, [1 / mpmath.mpf(3), -1 / mpmath.mpf(7)]).max() < 1e-31
        product = third * third + third
        assert digits(product, [mpmath.mpf(4) / 9, mpmath.mpf(-6) / 49]).max() < 1e-30


def test_double_double_functions_have_their_limits():
    x = Doubled(np.array([-np.inf, -1e5, 0.0]))
    np.testing.assert_array_equal(doubled.exp(x).hi, [0, 0, 1])
    np.testing.assert_array_equal(doubled.expm1(x).hi, [-1, -1, 0])
    np.testing.assert_array_equal(doubled.softplus(Doubled(np.array([-1e5, 1e5]))).hi, [0, 1e5])


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 1001])
def test_a_recurrence_taken_apart_in_pairs_is_the_recurrence(steps):
    rng = np.random.default_rng(steps)
    decay, inflow = rng.uniform(0, 1, steps), rng.standard_normal(steps)
    h, exact = mpmath.mpf(0), []
    with mpmath.workdps(60):
        for a, b in zip(decay, inflow, strict=True):
            h = mpmath.mpf(a) * h + mpmath.mpf(b)
            exact.append(h)
        assert digits(doubled.recurrence(Doubled(decay), Doubled(inflow)), exact).max() < 1e-27


@pytest.mark.parametrize("rule", ["euler", "zoh"])
@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_double_double_keeps_its_digits_over_a_long_sequence(delta, rule):
    """Against the sum of the geometric series, |delta A| = 1e-6 and 1e-4, over many stretches."""
    steps, one = 1 << 16, np.ones((1, 1, 1 << 16))
    arguments = {"u": one, "delta": delta * one, "A": np.full((1, 1), -1e-3), "B": one, "C": one}
    y, last_state = oracles.double_double({**arguments, "discretization": rule})
    with mpmath.workdps(50):
        x = mpmath.mpf(delta) * mpmath.mpf(-1e-3)
        weight = mpmath.mpf(delta) if rule == "euler" else mpmath.expm1(x) / mpmath.mpf(-1e-3)
        for t in (0, 1, 8191, 8192, steps - 1):
            exact = weight * mpmath.expm1(x * (t + 1)) / mpmath.expm1(x)
            assert y[0, 0, t] == float(exact)
    assert last_state.item() == y[0, 0, -1]


# Each against the others


@given(small)
def test_the_reference_agrees_with_multiprecision(case):
    arguments = case.arguments()
    assert error(selective_scan.forward(**arguments), oracles.multiprecision(arguments)) <= 1e-14


@given(zoh)
def test_the_matrix_exponential_agrees_with_multiprecision(case):
    arguments = case.arguments()
    assert error(oracles.matrix_exponential(arguments), oracles.multiprecision(arguments)) <= 1e-12


def test_in_no_time_the_differential_equation_keeps_its_state():
    one = np.ones((1, 2, 3))
    arguments = {"u": one, "delta": 0 * one, "A": -one[0, :, :1], "B": one[:, :1], "C": 2 * one[:, :1]}
    arguments |= {"initial_state": np.array([[[5.0], [7.0]]]), "discretization": "zoh"}
    y, last = oracles.differential_equation(arguments)
    np.testing.assert_array_equal(last, arguments["initial_state"])
    np.testing.assert_array_equal(y, [[[10.0] * 3, [14.0] * 3]])


@given(scan_cases(**SMALL, magnitudes=GENTLE, discretization="zoh"))
@settings(max_examples=10)
def test_the_differential_equation_agrees_with_the_matrix_exponential(case):
    arguments = case.arguments()
    found, expected = oracles.differential_equation(arguments), oracles.matrix_exponential(arguments)
    assert error(found, expected) <= 1e-9


@given(scan_cases(**SMALL, magnitudes=GENTLE, discretization="zoh", z=False, delta_bias=False, delta_softplus=False,
                  seq_idx=None, reverse=False))  # fmt: skip
@settings(max_examples=5)
def test_the_matrix_exponential_agrees_with_the_one_of_the_reference(case):
    arguments = case.arguments()
    names = ("u", "delta", "A", "B", "C", "D", "initial_state")
    expected = selective_scan.exact_zoh(**{name: arguments[name] for name in names})
    assert error(oracles.matrix_exponential(arguments), expected) <= 1e-13


@given(small)
def test_filter_and_simulation_agree_with_multiprecision_for_constant_parameters(case):
    arguments = oracles.constant(case.arguments())
    expected = oracles.multiprecision(arguments)
    assert error(oracles.linear_filter(arguments), expected) <= 1e-12
    assert error(oracles.simulation(arguments), expected) <= 1e-12


@given(scan_cases(dims=(1, 5), lengths=(1, 65, 129), dstates=(1, 16), max_size=10_000))
def test_the_exact_scan_agrees_with_the_reference(case):
    arguments = case.arguments(np.float32)
    assert error(oracles.exact_scan(arguments), selective_scan.forward(**arguments)) <= 1e-11


@given(conv_cases(max_size=2000))
def test_convolutions_agree(case):
    arguments = case.arguments()
    expected = oracles.convolution_double_double(arguments)
    assert error(oracles.convolution_filter(arguments), expected) <= 1e-13
    assert error(causal_conv1d.forward(**arguments), expected) <= 1e-13
    for x, y in zip(oracles.exact_conv(arguments), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_double_double_convolution_is_exact():
    x = np.array([[[2.0**60, 1.0, -(2.0**60)]]])
    y, last_state = oracles.exact_conv({"x": x, "weight": np.ones((1, 3))})
    np.testing.assert_array_equal(y, [[[2.0**60, 2.0**60, 1.0]]])
    np.testing.assert_array_equal(last_state, x[..., 1:])


@given(update_cases(dims=(1, 4), dstates=(1, 3)))
def test_an_exact_update_is_the_exact_scan_of_one_token_and_leaves_the_state_alone(case):
    arguments = case.arguments()
    before = arguments["state"].copy()
    y, state = oracles.exact_update(arguments)
    np.testing.assert_array_equal(arguments["state"], before)
    mp_y, mp_state = oracles.multiprecision(oracles.update_as_scan(arguments))
    assert error((y, state), (mp_y[..., 0], mp_state)) <= 1e-15


@given(scan_cases(batches=(1, 2), dims=(1, 2), lengths=(1, 3), dstates=(1, 2), magnitudes=["tame", "flat"]))
@settings(max_examples=10)
def test_the_gradients_of_the_reference_are_the_complex_step(case):
    arguments, (dout, dlast_state) = case.arguments(), case.cotangents()
    found = selective_scan.backward(np.asarray(dout), **arguments, dlast_state=dlast_state)
    expected = oracles.complex_step(dout, arguments, dlast_state)
    for name, x, y in zip(found._fields, found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max(initial=1e-30), err_msg=name)


# The continuous solution


@pytest.mark.parametrize("seq_idx", [None, "padded"])
def test_the_euler_rule_converges_to_the_exact_one_at_first_order_as_the_step_shrinks(seq_idx):
    options = ScanOptions(B=2, D=True, z=True, initial_state=True, seq_idx=seq_idx, reverse=True)
    arguments = ScanCase(2, 2, 7, 3, options, seed=1).arguments()
    arguments["delta"] = 3 * arguments["delta"]
    expected, _ = oracles.differential_equation({**arguments, "discretization": "zoh"})
    off = []
    for parts in (16, 32, 64):
        y, _ = oracles.double_double(oracles.refined(arguments, parts))
        times = np.s_[..., ::parts] if arguments["reverse"] else np.s_[..., parts - 1 :: parts]
        off.append(np.abs(y[times] - expected).max())
    ratios = np.array(off[:-1]) / off[1:]
    assert (ratios > 1.8).all()
    assert (ratios < 2.2).all()


def test_both_rules_sample_a_smooth_input_at_first_order():
    """h' = -2 h + sin(3 t), y = h at t = 1: the step holds its input, so the exact rule errs too, and as much."""
    exact = (2 * np.sin(3) - 3 * np.cos(3) + 3 * np.exp(-2)) / 13
    for rule in ("euler", "zoh"):
        off = []
        for steps in (200, 400):
            one = np.ones((1, 1, steps))
            u = np.sin(3 * np.arange(1, steps + 1) / steps) * one
            arguments = {"u": u, "delta": one / steps, "A": np.full((1, 1), -2.0), "B": one, "C": one}
            y, _ = oracles.linear_filter({**arguments, "discretization": rule})
            off.append(abs(y[0, 0, -1] - exact))
        assert 1.9 < off[0] / off[1] < 2.1


# What they refuse, and the whole


def test_oracles_say_what_they_cannot_do():
    arguments = ScanCase(1, 1, 3, 2).arguments()
    exact = {**arguments, "discretization": "zoh"}
    for oracle in (oracles.matrix_exponential, oracles.differential_equation):
        with pytest.raises(ValueError, match=f'^{oracle.__name__}: discretization must be "zoh"'):
            oracle(arguments)
    for oracle in (oracles.linear_filter, oracles.simulation):
        with pytest.raises(ValueError, match=f"^{oracle.__name__}: delta must not change over time"):
            oracle(arguments)
    exact["u"][0, 0, 1] = np.nan
    held = oracles.constant(exact)
    for name in ("matrix_exponential", "differential_equation", "linear_filter", "simulation", "double_double",
                 "multiprecision"):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: u must be finite"):
            getattr(oracles, name)(held)
    for name in ("convolution_filter", "convolution_double_double"):
        with pytest.raises(ValueError, match=f"^{name}: x must be finite"):
            getattr(oracles, name)({"x": exact["u"], "weight": np.ones((1, 2))})
    with pytest.raises(ValueError, match="^refined: delta must be the step size itself"):
        oracles.refined({**arguments, "delta_softplus": True}, 2)
    with pytest.raises(TypeError, match=r"unknown arguments \['gate'\]"):
        oracles.exact_scan({**arguments, "gate": None})


@given(scan_cases(**SMALL, special=True))
def test_the_exact_scan_takes_nan_and_infinities(case):
    arguments = case.arguments()
    found, expected = oracles.exact_scan(arguments), selective_scan.forward(**arguments)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))


def test_what_overflows_is_infinite_and_not_nan():
    one = np.ones((1, 1, 4))
    arguments = {"u": one, "delta": 200 * one, "A": np.full((1, 1), 2.0), "B": one, "C": one}
    y, last_state = oracles.exact_scan(arguments)
    np.testing.assert_array_equal(np.isinf(y), [[[False, False, True, True]]])
    assert np.isinf(last_state).all()


@pytest.mark.parametrize(("batch", "dim", "seqlen"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_an_empty_scan_has_the_initial_state_as_its_last_one(batch, dim, seqlen):
    options = replace(ON, B="variable")
    arguments = ScanCase(batch, dim, seqlen, 2, options).arguments()
    for oracle in (oracles.exact_scan, oracles.multiprecision, oracles.matrix_exponential):
        y, last_state = oracle(arguments)
        assert y.shape == (batch, dim, seqlen)
        np.testing.assert_array_equal(last_state, arguments["initial_state"])
    conv = ConvCase(batch, dim, seqlen, 3).arguments()
    assert oracles.exact_conv(conv)[1].shape == (batch, dim, 2)


@given(small, st.sampled_from(["exact_scan", "multiprecision"]))
@settings(max_examples=10)
def test_oracles_leave_their_arguments_alone(case, name):
    arguments = case.arguments()
    before = {k: x.copy() for k, x in arguments.items() if isinstance(x, np.ndarray)}
    getattr(oracles, name)(arguments)
    for k, x in before.items():
        np.testing.assert_array_equal(arguments[k], x)


def test_packing_padding_and_reversed_time_are_taken_apart_in_one_place():
    """The oracle sees the steps of each sequence in order, and whole rows with a mark where the state is zeroed."""
    seen = []

    def solve(s):
        seen.append((s.u[0].astype(int).tolist(), s.initial_state.item(), s.fresh.tolist()))
        return s.u, s.initial_state + 1

    u = np.arange(6.0)[None, None]
    arguments = {"u": u, "delta": u, "A": np.ones((1, 1)), "B": u, "C": u, "reverse": True}
    arguments |= {"seq_idx": np.array([[1, 1, -1, 2, -5, 2]]), "initial_state": np.full((1, 1, 1), 9.0)}
    y, last_state = scan_by(solve, arguments)
    assert seen == [([5, 3], 9.0, [False, False]), ([1, 0], 0.0, [False, False])]
    np.testing.assert_array_equal(y, [[[0, 1, 0, 3, 0, 5]]])
    assert last_state.item() == 1
    seen.clear()
    scan_by(solve, arguments, whole_rows=True)
    assert seen == [([5, 3, 1, 0], 9.0, [False, False, True, False])]
    windows = []
    conv = {"x": u, "weight": np.ones((1, 2)), "seq_idx": np.array([[0, 0, 0, 1, 1, 1]])}
    conv_by(lambda s: windows.append(s.x.tolist()) or s.x[:, 1:], conv)
    assert windows == [[[0, 0, 1, 2, 0, 3, 4, 5]]]


def test_an_update_with_a_square_B_varies_with_the_batch():
    case = UpdateCase(3, 3, 2, UpdateOptions(B="constant", C="constant"))
    scan = oracles.update_as_scan(case.arguments())
    assert scan["B"].shape == scan["C"].shape == (3, 2, 1)
