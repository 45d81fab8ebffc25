"""The tolerances of `npmamba.testing`: right results are within them, slightly wrong ones are not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npmamba
from npmamba.reference import causal_conv1d, selective_scan
from npmamba.reference.functions import silu, softplus
from npmamba.testing.cases import ConvCase, ScanCase, ScanOptions
from npmamba.testing.comparison import Difference, compare, difference, outputs
from npmamba.testing.oracles import double_double, exact_conv, exact_scan, exact_update
from npmamba.testing.rounding import Rounded, gate, step
from npmamba.testing.strategies import conv_cases, scan_cases, update_cases
from npmamba.testing.tolerance import (
    Tolerance,
    conv_gradient_tolerance,
    conv_scale,
    conv_tolerance,
    gradient_scale,
    gradient_tolerance,
    scan_scale,
    scan_tolerance,
    update_tolerance,
)

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
EXACT = np.dtype(np.float64)
every_dtype = st.sampled_from(DTYPES)
small = scan_cases(max_size=2000)


def right(differences: Any) -> None:
    for one in differences:
        assert one.units <= 1, str(one)


def gradient_differences(found: Any, expected: Any, allowed: Any) -> list[Difference]:
    rows = zip(found._fields, found, expected, allowed, strict=True)
    for name, x, y, tolerance in rows:
        assert (x is None) == (y is None) == (tolerance is None), name
    return [difference(f"d{n}", x, y, t) for n, x, y, t in zip(found._fields, found, expected, allowed, strict=True)
            if x is not None]  # fmt: skip


def worst(found: Any, arguments: dict[str, Any]) -> float:
    return max(d.units for d in compare(found, exact_scan(arguments), scan_tolerance(arguments)))


# Right results are within


@given(small, every_dtype)
@settings(max_examples=60)
def test_a_right_scan_is_within_its_tolerance_at_every_place(case, dtype):
    arguments = case.arguments(dtype)
    right(compare(outputs(npmamba.selective_scan, arguments), exact_scan(arguments), scan_tolerance(arguments)))


@given(small, every_dtype)
@settings(max_examples=60)
def test_right_gradients_are_within_their_tolerances(case, dtype):
    arguments, (dout, dlast_state) = case.arguments(dtype), case.cotangents(dtype)
    found = npmamba.selective_scan_backward(dout, **arguments, dlast_state=dlast_state)
    expected = selective_scan.backward(np.asarray(dout, np.float64), **arguments, dlast_state=dlast_state)
    right(gradient_differences(found, expected, gradient_tolerance(dout, arguments, dlast_state)))


@given(conv_cases(max_size=5000), every_dtype)
@settings(max_examples=60)
def test_a_right_convolution_and_its_gradients_are_within_their_tolerances(case, dtype):
    arguments, (dout, dlast_state) = case.arguments(dtype), case.cotangents(dtype)
    right(compare(outputs(npmamba.causal_conv1d, arguments), exact_conv(arguments), conv_tolerance(arguments)))
    found = npmamba.causal_conv1d_backward(dout, **arguments, dlast_state=dlast_state)
    expected = causal_conv1d.backward(np.asarray(dout, np.float64), **arguments, dlast_state=dlast_state)
    right(gradient_differences(found, expected, conv_gradient_tolerance(dout, arguments, dlast_state)))


@given(update_cases(), every_dtype)
@settings(max_examples=60)
def test_a_right_step_is_within_its_tolerance_and_the_state_is_compared_too(case, dtype):
    arguments = case.arguments(dtype)
    found = outputs(npmamba.selective_state_update, arguments)
    assert len(found) == 2
    right(compare(found, exact_update(arguments), update_tolerance(arguments)))


@given(small)
def test_the_float64_reference_is_within_the_tolerance_of_float64(case):
    arguments = case.arguments()
    right(compare(selective_scan.forward(**arguments), exact_scan(arguments), scan_tolerance(arguments)))


@pytest.mark.parametrize(("batch", "dim", "seqlen"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_scans_have_empty_tolerances(batch, dim, seqlen):
    options = ScanOptions(D=True, z=True, delta_bias=True, initial_state=True, seq_idx="runs", reverse=True)
    case = ScanCase(batch, dim, seqlen, 2, options)
    arguments, (dout, dlast_state) = case.arguments(np.float32), case.cotangents(np.float32)
    right(compare(outputs(npmamba.selective_scan, arguments), exact_scan(arguments), scan_tolerance(arguments)))
    found = npmamba.selective_scan_backward(dout, **arguments, dlast_state=dlast_state)
    expected = selective_scan.backward(dout, **arguments, dlast_state=dlast_state)
    right(gradient_differences(found, expected, gradient_tolerance(dout, arguments, dlast_state)))


# Slightly wrong ones are not


def scan(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *, delta_bias: Any, zoh: bool,
    expm1: Any = np.expm1, plus: Any = softplus, state: Any = np.float32,
) -> Any:  # fmt: skip
    """A plain scan in the dtype of its arguments, with parts to exchange."""
    Delta = plus(delta + delta_bias[:, None])
    h, y = np.zeros((*u.shape[:2], A.shape[1]), state), np.zeros_like(u)
    for t in range(u.shape[2]):
        x = Delta[:, :, t, None] * A
        weight = expm1(x) / A if zoh else Delta[:, :, t, None]
        h = (np.exp(x) * h + weight * B[:, None, :, t] * u[:, :, t, None]).astype(state)
        y[:, :, t] = (h * C[:, None, :, t]).sum(-1) + D * u[:, :, t]
    return y * silu(z), h


def scan_of(case: ScanCase, **parts: Any) -> tuple[Any, dict[str, Any]]:
    arguments = case.arguments(np.float32)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    zoh = case.options.discretization == "zoh"
    return scan(**{name: arguments[name] for name in names}, zoh=zoh, **parts), arguments


def full(magnitude: str, rule: str = "zoh") -> ScanCase:
    options = ScanOptions(D=True, z=True, delta_bias=True, delta_softplus=True, discretization=rule)
    return ScanCase(2, 4, 65, 3, options, magnitude=magnitude, seed=1)


@pytest.mark.parametrize("magnitude", ["tame", "slow", "fast", "growing", "wide"])
@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_a_plain_scan_in_numpy_is_right(magnitude, rule):
    assert worst(*scan_of(full(magnitude, rule))) <= 1


@pytest.mark.parametrize(
    ("magnitude", "parts"),
    [
        ("slow", {"expm1": lambda x: np.exp(x) - 1}),
        ("slow", {"plus": lambda x: np.log(1 + np.exp(x))}),
        ("tame", {"state": np.float16}),
        ("slow", {"state": np.float16}),
        ("tame", {"plus": lambda x: softplus(x) * np.float32(1 + 1e-4)}),
    ],
)
def test_a_loss_of_precision_is_not_within_the_tolerance(magnitude, parts):
    assert worst(*scan_of(full(magnitude), **parts)) > 1


ordinary = scan_cases(max_size=500, lengths=(1, 2, 9), magnitudes=["tame", "flat", "growing", "fast"])


@given(ordinary, st.data())
def test_one_number_off_by_a_thousandth_is_not_within_the_tolerance_of_float32(case, data):
    arguments = case.arguments(np.float32)
    expected, allowed = exact_scan(arguments), scan_tolerance(arguments)
    scale = scan_scale(arguments)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in expected[0].shape)
    y = expected[0].copy()
    y[place] += 1e-3 * scale[0][place]
    assert difference("y", y, expected[0], allowed[0]).units > 1 or scale[0][place] < 1e-20


@given(small)
def test_tolerances_are_about_as_small_as_rounding_allows(case):
    """No place may be off by more than a few hundred roundings for each step that is remembered."""
    arguments = case.arguments()
    eps, scale, allowed = np.finfo(np.float64).eps, scan_scale(arguments), scan_tolerance(arguments)
    if case.magnitude in ("tame", "slow", "flat", "growing", "tiny", "huge"):
        for size, tolerance in zip(scale, allowed, strict=True):
            assert (tolerance.absolute <= eps * size * (100 + 50 * case.seqlen + 10 * case.dstate) + 1e-290).all()


# Scales


@given(small)
def test_the_scale_is_the_same_scan_of_absolute_values(case):
    arguments = case.arguments()
    names = ("u", "B", "C", "D", "initial_state")
    positive = {**arguments, **{n: np.abs(arguments[n]) for n in names if arguments[n] is not None}}
    y, last_state = double_double({**positive, "z": None})
    gates = 1 if arguments["z"] is None else np.abs(silu(np.asarray(arguments["z"], np.float64)))
    found = scan_scale(arguments)
    np.testing.assert_allclose(found[0], y * gates, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(found[1], last_state, rtol=1e-9, atol=1e-300)


@given(scan_cases(max_size=2000, z=False, magnitudes=["tame", "slow", "flat"]))
def test_the_scale_of_a_gradient_is_the_gradient_where_nothing_cancels(case):
    arguments, (dout, dlast_state) = case.arguments(), (np.abs(np.asarray(x)) for x in case.cotangents())
    names = ("u", "B", "C", "D", "initial_state")
    positive = {**arguments, **{n: np.abs(arguments[n]) for n in names if arguments[n] is not None}}
    scale = gradient_scale(dout, arguments, dlast_state)
    exact = selective_scan.backward(dout, **positive, dlast_state=dlast_state)
    for name in ("u", "A", "B", "C", "D", "initial_state"):
        x, y = getattr(scale, name), getattr(exact, name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x, np.abs(y), rtol=1e-9, atol=1e-300, err_msg=name)
    assert (scale.delta >= np.abs(exact.delta) * (1 - 1e-9)).all()  # its two terms have opposite signs


def test_the_scale_of_a_convolution_is_that_of_absolute_values():
    arguments = ConvCase(2, 3, 9, 4, seed=1).arguments()
    expected, _ = causal_conv1d.forward(np.abs(arguments["x"]), np.abs(arguments["weight"]))
    np.testing.assert_allclose(conv_scale(arguments), expected)


# The arithmetic of rounding errors


@given(st.integers(0, 2**32 - 1))
def test_products_and_sums_in_float32_are_within_their_errors(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 50)).astype(np.float32)
    eps = np.finfo(np.float32).eps
    a, b = Rounded.exact(x), Rounded.exact(y)
    for found, exact, bound in [
        (x * y + x, x.astype(float) * y + x, a * b + a),
        ((x * y).sum(), (x.astype(float) * y).sum(), (a * b).sum(0)),
        (x * (y + x) * y, x.astype(float) * (y.astype(float) + x) * y, a * (b + a) * b),
    ]:
        assert (np.abs(found - exact) <= eps * bound.error).all()
        assert (np.abs(exact) <= bound.size * (1 + 1e-9)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["euler", "zoh"]))
def test_factors_of_a_step_from_a_delta_off_by_half_an_eps_are_within_their_errors(seed, rule):
    rng = np.random.default_rng(seed)
    delta, A = rng.uniform(-30, 5, (1, 1, 40)), -np.exp(rng.uniform(-10, 6, (1, 8)))
    bias, eps = rng.uniform(-5, 5, 1), 1e-9
    here = step(delta, bias, True, A, rule, 0.0)
    moved = step(delta + eps / 2 * (delta + bias), bias, True, A * (1 + eps / 2), rule, 0.0)
    for name in ("Delta", "slope", "decay", "weight", "dweight_dA"):
        x, y = getattr(here, name), getattr(moved, name)
        assert (np.abs(x.size - y.size) <= eps * x.error + 1e-300).all(), name


def test_the_gate_keeps_its_error_bounded_where_it_is_flat():
    with np.errstate(over="ignore"):
        silu_z, slope = gate(np.array([-800.0, -np.inf, 30.0]))
    assert np.isfinite(silu_z.error).all()
    assert np.isfinite(slope.error).all()
    assert silu_z.error[2] < 10 * 30


# Comparing


ALLOWED = Tolerance(np.full(3, 1e-12), EXACT)


@pytest.mark.parametrize(
    ("found", "expected", "units"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, np.nan], [1, 2, 3], np.inf),
        ([1, 2, np.inf], [1, 2, 3], np.inf),
        ([1, 2, 3], [1, 2, np.nan], np.inf),
        ([1, 2, 3], [1, 2, np.inf], np.inf),
        ([1, 2, -np.inf], [1, 2, np.inf], np.inf),
        ([1, np.inf, np.nan], [1, np.inf, np.nan], 0),
        ([1, 2, np.nan], [1, 2, np.inf], 0),
        ([1, 2, np.inf], [1, 2, np.nan], np.inf),
        ([1, 2], [1, 2, 3], np.inf),
    ],
)
def test_nan_and_infinities_must_be_where_they_are_expected(found, expected, units):
    result = difference("y", np.array(found, float), np.array(expected, float), ALLOWED)
    assert result.units == units
    assert ("WRONG" in str(result)) == (units > 1)


def test_what_leaves_the_range_of_a_short_float_may_be_infinite():
    half = Tolerance(np.zeros(2), np.dtype(np.float16))
    assert difference("y", np.array([np.inf, 1]), np.array([70000.0, 1.0]), half).units == 0
    assert difference("y", np.array([np.inf, 1]), np.array([60000.0, 1.0]), half).units == np.inf
    assert difference("y", np.array([-np.inf, 1]), np.array([70000.0, 1.0]), half).units == np.inf
    assert difference("y", np.array([2.0, 1]), np.array([2.001, 1.0]), half).units < 1


def test_a_difference_names_the_worst_place():
    found = np.array([[1.0, 2.0], [3.0, 4.0 + 3e-12]])
    result = difference("dA", found, np.array([[1.0, 2.0], [3.0, 4.0]]), Tolerance(np.full((2, 2), 1e-12), EXACT))
    assert result.place == (1, 1)
    assert 2.9 < result.units < 3.1
    assert str(result).startswith("dA: WRONG, 3 tolerances off; dA[1, 1] is 4.000000000003, expected 4.0 within 1e-12")


def test_results_are_asked_for_with_the_options_that_are_on():
    asked = {}

    def fn(u, delta, A, B, C, **rest):
        asked.update(rest)
        return u, A

    arguments = ScanCase(1, 1, 2, 1, ScanOptions(z=True)).arguments()
    y, A = outputs(fn, arguments)
    assert list(asked) == ["z"]
    assert y is arguments["u"]
    assert A is arguments["A"]
    assert outputs(lambda return_last_state=False, **rest: return_last_state, arguments) == (True,)


def test_an_update_without_a_result_but_its_state_writes_to_a_copy():
    state = np.zeros((1, 1, 1))

    def fn(state):
        state += 1
        return "y"

    y, after = outputs(fn, {"state": state})
    assert (y, after.item(), state.item()) == ("y", 1, 0)
