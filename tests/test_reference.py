"""The references: forward against SciPy and the definitions, every gradient against the complex step.

The complex step f'(x) = Im f(x + ih) / h has no difference and so no cancellation: h = 1e-30 gives
derivatives to rounding, and a hand-derived gradient has to agree to 1e-12 of its largest element.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
from cases import (
    CONV_OPTIONS,
    SCAN_OPTIONS,
    conv_case,
    conv_specs,
    cotangents,
    scan_case,
    scan_specs,
    seeds,
    seq_idx_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.reference import (
    causal_conv1d,
    cross_entropy,
    embedding,
    functions,
    rms_norm,
    selective_scan,
    selective_state_update,
)

TOLERANCE = 1e-12
H = 1e-30
SCAN_ON = {
    "B": 2, "C": 2, "D": True, "z": True, "delta_bias": True, "delta_softplus": True, "initial_state": True,
    "seq_idx": "padded", "reverse": True,
}
CONV_ON = {"bias": True, "activation": "silu", "initial_state": True, "seq_idx": "padded", "reverse": True}


def each_alone(on: dict[str, Any]) -> list[Any]:
    """List the option sets: all off, each alone, all on."""
    alone = [pytest.param({k: v}, id=k) for k, v in on.items()]
    return [pytest.param({}, id="off"), *alone, pytest.param(on, id="on")]


def error(value: Any, expected: Any) -> float:
    """Return max|value - expected| / max|expected|; 0 where both are empty or all zero."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    worst = np.max(np.abs(value - expected), initial=0.0)
    return float(worst and worst / np.max(np.abs(expected), initial=0.0))


def objective(forward: Any, weights: Any, case: dict[str, Any]) -> complex:
    """Return the sum of every output of `forward` times its weights."""
    outputs = forward(**case)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(complex((w * y).sum()) for w, y in zip(weights, outputs, strict=True))


def derivative(forward: Any, weights: Any, case: dict[str, Any], name: str, direction: Any) -> float:
    """Return the derivative of the objective along `direction` of argument `name`, by the complex step."""
    return objective(forward, weights, {**case, name: case[name] + 1j * H * direction}).imag / H


def elementwise_error(forward: Any, weights: Any, case: dict[str, Any], grads: dict[str, Any]) -> float:
    """Return the largest error of `grads`, each element compared with the complex step in it."""
    errors = []
    for name, grad in grads.items():
        expected = np.zeros_like(grad)
        for index in np.ndindex(grad.shape):
            direction = np.zeros_like(grad)
            direction[index] = 1
            expected[index] = derivative(forward, weights, case, name, direction)
        errors.append(error(grad, expected))
    return max(errors)


def directional_error(
    forward: Any, weights: Any, case: dict[str, Any], grads: dict[str, Any], seed: int
) -> float:
    """Return the largest error of `grads` along one direction of random signs per argument.

    The sum of n terms of random sign is about as large as the Euclidean norm, by which the error is divided.
    """
    rng = np.random.default_rng((seed, 2))
    errors = [0.0]
    for name, grad in grads.items():
        direction = rng.choice([-1.0, 1.0], grad.shape)
        difference = derivative(forward, weights, case, name, direction) - (grad * direction).sum()
        assert difference == 0 or np.linalg.norm(grad) > 0
        errors.append(abs(difference) / np.linalg.norm(grad) if difference else 0.0)
    return max(errors)


def scan_gradients(case: dict[str, Any], weights: Any) -> dict[str, Any]:
    """Return the gradients of the arguments that are there, checking that they have their shapes."""
    grads = selective_scan.backward(weights[0], **case, dlast_state=weights[1])._asdict()
    return present(grads, case)


def present(grads: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    for name, grad in grads.items():
        assert (grad is None) == (case[name] is None)
        assert grad is None or grad.shape == case[name].shape
        assert grad is None or grad.dtype == np.float64
    return {name: grad for name, grad in grads.items() if grad is not None}


# Elementary functions


def test_softplus_and_sigmoid_keep_their_relative_accuracy_from_minus_700_to_800():
    x = np.concatenate([np.linspace(-700, 800, 3001), np.linspace(-2, 2, 401)])
    np.testing.assert_allclose(functions.softplus(x), np.logaddexp(0, x), rtol=1e-15)
    np.testing.assert_allclose(functions.sigmoid(x), scipy.special.expit(x), rtol=1e-15)
    limits = functions.softplus(np.array([-np.inf, np.inf, np.nan]))
    np.testing.assert_array_equal(limits, [0, np.inf, np.nan])


def test_phi_and_its_derivative_match_their_series_and_keep_relative_accuracy():
    mpmath = pytest.importorskip("mpmath")
    x = [-700, -30, 30, 700, 1, -1, np.nextafter(1, 0), 1e-8, -1e-8, 1e-20, *np.linspace(-3, 3, 240)]
    with mpmath.workdps(60):
        exact = [(mpmath.expm1(v) / v, (mpmath.exp(v) - mpmath.expm1(v) / v) / v) for v in map(mpmath.mpf, x)]
    np.testing.assert_allclose(functions.phi(x), [float(p) for p, _ in exact], rtol=1e-15)
    np.testing.assert_allclose(functions.phi_derivative(x), [float(p) for _, p in exact], rtol=3e-15)
    assert (functions.phi(0.0), functions.phi_derivative(0.0)) == (1, 0.5)


@pytest.mark.parametrize("function", [functions.expm1, functions.log1p])
def test_functions_of_numbers_far_from_the_real_axis_are_numpys(function):
    """The complex step only goes 1e-30 away from it, where products of imaginary parts vanish."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.9, 2, 200) + 1j * rng.uniform(-2, 2, 200)
    np.testing.assert_allclose(function(x), getattr(np, function.__name__)(x), rtol=1e-13)


@pytest.mark.parametrize("h", [H, 1e-200])
@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (functions.softplus, functions.sigmoid),
        (functions.sigmoid, lambda x: functions.sigmoid(x) * functions.sigmoid(-x)),
        (functions.silu, functions.silu_derivative),
        (functions.phi, functions.phi_derivative),
        (functions.expm1, np.exp),
        (functions.log1p, lambda x: 1 / (1 + x)),
    ],
)
def test_the_complex_step_of_a_function_is_its_derivative(function, slope, h):
    tiny = np.logspace(-12, 0, 61)
    x = np.concatenate([np.linspace(-40, 40, 801), tiny, -tiny, [1e-300, 700.0]])
    x = x[x > -1] if function is functions.log1p else x
    np.testing.assert_allclose(function(x + 1j * h).imag / h, slope(x), rtol=2e-14, atol=1e-300)
    np.testing.assert_allclose(function(x + 1j * h).real, function(x), rtol=1e-15, atol=h * h)


def test_functions_have_their_limits_at_infinity_and_pass_nan_on():
    x = np.array([-np.inf, np.inf, np.nan])
    with np.errstate(all="ignore"):
        for function, limits in [
            (functions.sigmoid, [0, 1]),
            (functions.silu, [0, np.inf]),
            (functions.silu_derivative, [0, 1]),
            (functions.phi, [0, np.inf]),
            (functions.phi_derivative, [0, np.inf]),
            (functions.expm1, [-1, np.inf]),
        ]:
            np.testing.assert_array_equal(function(x), [*limits, np.nan])


# The selective scan


@given(scan_specs(dims=(1, 4), lengths=(0, 1, 2, 5), dstates=(1, 3)))
@settings(max_examples=30)
def test_the_scan_is_the_recurrence_written_with_python_loops(spec):
    case = spec.arguments()
    y, last_state = selective_scan.forward(**case)
    y_loops, last_loops = scan_by_loops(**case)
    assert error(y, y_loops) <= 1e-13
    assert error(last_state, last_loops) <= 1e-13


def channel_coefficients(B, b, d, dim, t):
    """Return the B or C that channel `d` of row `b` sees at time `t`."""
    if B.ndim < 4:
        return B[d] if B.ndim == 2 else B[b, :, t]
    return B[b, d // (dim // B.shape[1]), :, t]


def scan_by_loops(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, discretization, seq_idx, reverse
):
    """Compute the scan of one number after the other, without any helper of the reference."""
    y, last_state = np.zeros_like(u), np.zeros((u.shape[0], *A.shape))
    for b, d in np.ndindex(*u.shape[:2]):
        h = np.zeros(A.shape[1]) if initial_state is None else initial_state[b, d].copy()
        run = None
        for t in range(u.shape[2])[:: -1 if reverse else 1]:
            if seq_idx is not None and seq_idx[b, t] < 0:
                continue
            if seq_idx is not None:
                h = h if run is None or run == seq_idx[b, t] else 0 * h
                run = seq_idx[b, t]
            step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
            step = np.log1p(np.exp(step)) if delta_softplus else step
            B_t, C_t = (channel_coefficients(q, b, d, u.shape[1], t) for q in (B, C))
            weight = step if discretization == "euler" else np.expm1(step * A[d]) / A[d]
            h = np.exp(step * A[d]) * h + weight * B_t * u[b, d, t]
            y[b, d, t] = C_t @ h + (0 if D is None else D[d] * u[b, d, t])
            y[b, d, t] *= 1 if z is None else z[b, d, t] / (1 + np.exp(-z[b, d, t]))
        last_state[b, d] = h
    return y, last_state


@pytest.mark.parametrize(("B", "C"), [("variable", "variable"), ("constant", 2), (4, "constant")])
def test_zoh_is_the_matrix_exponential(B, C):
    rng = np.random.default_rng(0)
    case = scan_case(rng, 2, 4, 9, 5, B=B, C=C, D=True, initial_state=True, discretization="zoh")
    exact = {name: case[name] for name in ("u", "delta", "A", "B", "C", "D", "initial_state")}
    y, last_state = selective_scan.forward(**case)
    y_exact, last_exact = selective_scan.exact_zoh(**exact)
    assert max(error(y, y_exact), error(last_state, last_exact)) <= TOLERANCE


def test_a_state_that_drains_at_once_gives_no_gradient():
    """By the exact rule nothing of it is seen; what delta, u, B and C are given is from the other state alone."""
    rng = np.random.default_rng(0)
    u, delta, dout = rng.standard_normal((3, 1, 2, 5))
    B, C = rng.standard_normal((2, 1, 2, 5))
    A = np.array([[-0.5, -np.inf], [-2.0, -np.inf]])
    both = selective_scan.backward(dout, u, abs(delta), A, B, C, discretization="zoh")
    one = selective_scan.backward(dout, u, abs(delta), A[:, :1], B[:, :1], C[:, :1], discretization="zoh")
    for name in ("u", "delta"):
        np.testing.assert_allclose(getattr(both, name), getattr(one, name), rtol=1e-14, atol=1e-15)
    for name in "BC":
        gradient = getattr(both, name)
        np.testing.assert_allclose(gradient[:, :1], getattr(one, name), rtol=1e-14, atol=1e-15)
        assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_a_scan_of_constant_parameters_is_a_linear_filter(discretization):
    rng = np.random.default_rng(1)
    case = scan_case(rng, 2, 3, 257, 4, B="constant", C="constant", discretization=discretization)
    case["delta"] = np.broadcast_to(np.array([0.001, 0.02, 0.1])[:, None], case["u"].shape)
    y, _ = selective_scan.forward(**case)
    for b, d in np.ndindex(2, 3):
        a = np.exp(0.001 * [1, 20, 100][d] * case["A"][d])
        weight = case["delta"][0, d, 0] if discretization == "euler" else (a - 1) / case["A"][d]
        filters = zip(case["C"][d] * weight * case["B"][d], a, strict=True)
        expected = sum(scipy.signal.lfilter([gain], [1, -pole], case["u"][b, d]) for gain, pole in filters)
        assert error(y[b, d], expected) <= TOLERANCE


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("options", each_alone(SCAN_ON) + each_alone({"B": "constant", "C": "constant"}))
def test_every_element_of_every_scan_gradient_is_its_complex_step(options, discretization):
    case = scan_case(np.random.default_rng(2), 2, 4, 3, 2, discretization=discretization, **options)
    weights = cotangents(2, case["u"], (2, 4, 2))
    grads = scan_gradients(case, weights)
    assert elementwise_error(selective_scan.forward, weights, case, grads) <= TOLERANCE


@given(scan_specs(max_elements=60_000))
@settings(max_examples=200)
def test_scan_gradients_are_the_complex_step_for_any_sizes_and_options(spec):
    case = spec.arguments()
    weights = cotangents(spec.seed, case["u"], spec.state_shape)
    grads = scan_gradients(case, weights)
    assert directional_error(selective_scan.forward, weights, case, grads, spec.seed) <= TOLERANCE


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(("dim", "seqlen", "dstate"), [(100, 65, 64), (48, 257, 16), (5, 257, 64)])
def test_scan_gradients_of_large_sizes_are_the_complex_step(dim, seqlen, dstate, discretization):
    options = {**SCAN_ON, "B": "variable", "C": "variable"}
    options["discretization"] = discretization
    case = scan_case(np.random.default_rng(3), 1, dim, seqlen, dstate, **options)
    weights = cotangents(3, case["u"], (1, dim, dstate))
    grads = scan_gradients(case, weights)
    assert directional_error(selective_scan.forward, weights, case, grads, 3) <= TOLERANCE


@given(scan_specs(dims=(1, 4), lengths=(1, 2, 7), dstates=(1, 3)), seeds)
@settings(max_examples=30)
def test_growing_and_tiny_exponents_keep_the_gradients(spec, seed):
    """A of either sign and over 12 orders of magnitude: series, branch point and direct formulas of phi."""
    case, rng = spec.arguments(), np.random.default_rng(seed)
    case["A"] = rng.choice([-1.0, 1.0], case["A"].shape) * 10.0 ** rng.uniform(-10, 2, case["A"].shape)
    weights = cotangents(spec.seed, case["u"], spec.state_shape)
    grads = scan_gradients(case, weights)
    assert directional_error(selective_scan.forward, weights, case, grads, spec.seed) <= TOLERANCE


def varying(case: dict[str, Any]) -> list[str]:
    """Return the names of the arrays that vary with time, seq_idx aside."""
    return [k for k in ("u", "delta", "z", "B", "C") if np.ndim(case[k]) > 2]


def during(case: dict[str, Any], times: slice) -> dict[str, Any]:
    """Return the arguments of a part of a scan without seq_idx."""
    return {**case, **{name: case[name][..., times] for name in varying(case)}, "seq_idx": None}


@given(scan_specs(dims=(1, 4), lengths=(2, 3, 7), dstates=(1, 3)), st.integers(1, 6))
@settings(max_examples=30)
def test_a_scan_is_the_scan_of_its_parts(spec, cut):
    """With seq_idx None; the state carries over, and its gradient back."""
    case = {**spec.arguments(), "seq_idx": None, "reverse": False}
    dout, dlast = cotangents(spec.seed, case["u"], spec.state_shape)
    whole = selective_scan.forward(**case), selective_scan.backward(dout, **case, dlast_state=dlast)
    first, second = during(case, np.s_[:cut]), during(case, np.s_[cut:])
    y1, carried = selective_scan.forward(**first)
    second["initial_state"] = carried
    y2, last_state = selective_scan.forward(**second)
    np.testing.assert_array_equal(np.concatenate([y1, y2], axis=-1), whole[0][0])
    np.testing.assert_array_equal(last_state, whole[0][1])
    back2 = selective_scan.backward(dout[..., cut:], **second, dlast_state=dlast)
    back1 = selective_scan.backward(dout[..., :cut], **first, dlast_state=back2.initial_state)
    np.testing.assert_array_equal(np.concatenate([back1.u, back2.u], axis=-1), whole[1].u)
    assert error(back1.A + back2.A, whole[1].A) <= 1e-13


@given(scan_specs(dims=(1, 4), lengths=(1, 2, 7), dstates=(1, 3)))
@settings(max_examples=30)
def test_padding_is_as_if_absent_whatever_stands_there(spec):
    case = spec.arguments()
    seq_idx = seq_idx_case(np.random.default_rng(spec.seed), spec.batch, spec.seqlen, "padded")
    case, hidden = {**case, "seq_idx": seq_idx}, seq_idx < 0
    weights = cotangents(spec.seed, case["u"], spec.state_shape)
    y, last_state = selective_scan.forward(**case)
    grads = scan_gradients(case, weights)
    for name in varying(case):
        case[name] = np.moveaxis(case[name].copy(), -1, 1)
        case[name][hidden] = np.nan
        case[name] = np.moveaxis(case[name], 1, -1)
        np.testing.assert_array_equal(np.moveaxis(grads[name], -1, 1)[hidden], 0)
    np.testing.assert_array_equal(selective_scan.forward(**case)[0], y)
    np.testing.assert_array_equal(selective_scan.forward(**case)[1], last_state)
    np.testing.assert_array_equal(np.moveaxis(y, -1, 1)[hidden], 0)
    for name, grad in scan_gradients(case, weights).items():
        np.testing.assert_array_equal(grad, grads[name])


@given(scan_specs(dims=(1, 4), lengths=(7,), dstates=(1, 3)))
@settings(max_examples=20)
def test_runs_are_sequences_of_their_own(spec):
    case = {**spec.arguments(), "reverse": False, "seq_idx": np.tile([5, 5, 5, -1, 2, 2, 2], (spec.batch, 1))}
    y, last_state = selective_scan.forward(**case)
    for part, state in ((np.s_[:3], case["initial_state"]), (np.s_[4:], None)):
        alone = {**during(case, part), "initial_state": state}
        y_alone, last_alone = selective_scan.forward(**alone)
        np.testing.assert_array_equal(y[..., part], y_alone)
    np.testing.assert_array_equal(last_state, last_alone)


@given(scan_specs(dims=(1, 4), lengths=(1, 2, 7), dstates=(1, 3)))
@settings(max_examples=20)
def test_reverse_is_a_flip_before_and_after(spec):
    case = {**spec.arguments(), "reverse": True}
    flipped = {**during(case, np.s_[::-1]), "reverse": False}
    flipped["seq_idx"] = None if case["seq_idx"] is None else case["seq_idx"][:, ::-1]
    y, last_state = selective_scan.forward(**case)
    y_flipped, last_flipped = selective_scan.forward(**flipped)
    np.testing.assert_array_equal(y, y_flipped[..., ::-1])
    np.testing.assert_array_equal(last_state, last_flipped)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(("delta", "A"), [(0.0, -np.inf), (0.0, np.inf), (0.0, -2.0), (0.5, -np.inf)])
def test_a_step_of_no_length_keeps_the_state_and_an_infinite_decay_forgets_it(delta, A, discretization):
    case = scan_case(np.random.default_rng(4), 1, 1, 1, 1, initial_state=True, discretization=discretization)
    case |= {"A": np.array([[A]]), "delta": np.full((1, 1, 1), delta)}
    decay = 1 if delta == 0 else 0
    inflow = delta * case["B"] * case["u"] if discretization == "euler" else 0
    _, last_state = selective_scan.forward(**case)
    np.testing.assert_array_equal(last_state, decay * case["initial_state"] + inflow)
    grads = selective_scan.backward(np.ones((1, 1, 1)), **case)
    assert all(np.isfinite(g).all() for g in grads if g is not None)
    np.testing.assert_array_equal(grads.initial_state, decay * case["C"])


@given(scan_specs(dims=(1, 4), lengths=(2, 7), dstates=(1, 3)))
@settings(max_examples=20)
def test_nan_flows_to_later_times_of_its_channel_only(spec):
    case = {**spec.arguments(), "seq_idx": None, "reverse": False}
    clean, _ = selective_scan.forward(**case)
    case["u"][0, 0, 1] = np.nan
    y, _ = selective_scan.forward(**case)
    assert np.isnan(y[0, 0, 1:]).all()
    y[0, 0, 1:] = clean[0, 0, 1:]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("options", [{}, SCAN_ON])
@pytest.mark.parametrize(("batch", "dim", "seqlen"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_an_empty_scan_returns_a_fresh_copy_of_the_initial_state(batch, dim, seqlen, options):
    case = scan_case(np.random.default_rng(5), batch, dim, seqlen, 3, **options)
    y, last_state = selective_scan.forward(**case)
    assert y.shape == (batch, dim, seqlen)
    start = case["initial_state"]
    np.testing.assert_array_equal(last_state, np.zeros((batch, dim, 3)) if start is None else start)
    assert start is None or not np.shares_memory(last_state, start)
    dlast = np.ones_like(last_state)
    grads = scan_gradients(case, (np.zeros_like(y), dlast))
    np.testing.assert_array_equal(grads.get("initial_state", dlast), dlast)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_references_compute_in_float64_and_leave_their_arguments_alone(dtype):
    case = scan_case(np.random.default_rng(6), 2, 4, 5, 3, dtype=dtype, **SCAN_ON)
    before = {name: np.copy(x) for name, x in case.items() if isinstance(x, np.ndarray)}
    for x in before:
        case[x].flags.writeable = False
    y, last_state = selective_scan.forward(**case)
    assert y.dtype == last_state.dtype == np.float64
    selective_scan.backward(y, **case, dlast_state=last_state)
    for name, x in before.items():
        np.testing.assert_array_equal(case[name], x)


def test_an_unknown_option_is_refused():
    case = scan_case(np.random.default_rng(7), 1, 1, 1, 1)
    with pytest.raises(ValueError, match="discretization must be 'euler' or 'zoh', got 'tustin'"):
        selective_scan.forward(**{**case, "discretization": "tustin"})
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'relu'"):
        causal_conv1d.forward(np.zeros((1, 1, 1)), np.zeros((1, 1)), activation="relu")
    with pytest.raises(TypeError, match="unknown options"):
        scan_case(np.random.default_rng(7), 1, 1, 1, 1, gate=True)


# One step


def step_case(rng: np.random.Generator, batch: int, dim: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """Draw a scan of one token, and the same as arguments of the state update."""
    scan = scan_case(rng, batch, dim, 1, 3, initial_state=True, **options)
    one_token = {k: v[..., 0] if k in varying(scan) else v for k, v in scan.items()}
    names = {"u": "x", "initial_state": "state"}
    step = {names.get(k, k.replace("delta", "dt")): v for k, v in one_token.items()}
    return scan, {k: v for k, v in step.items() if k not in ("seq_idx", "reverse")}


STEP_ON = {k: v for k, v in SCAN_ON.items() if k not in ("initial_state", "seq_idx", "reverse")}


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("options", [*each_alone(STEP_ON), {"B": "constant", "C": "constant"}])
def test_a_state_update_is_a_scan_of_one_token_with_its_gradients(options, discretization):
    scan, step = step_case(np.random.default_rng(8), 3, 4, {**options, "discretization": discretization})
    y, new_state = selective_state_update.forward(**step)
    y_scan, last_state = selective_scan.forward(**scan)
    assert max(error(y, y_scan[..., 0]), error(new_state, last_state)) <= 1e-15
    weights = cotangents(8, step["x"], (3, 4, 3))
    grads = selective_state_update.backward(weights[0], **step, dnew_state=weights[1])
    grads = present(grads._asdict(), step)
    assert elementwise_error(selective_state_update.forward, weights, step, grads) <= TOLERANCE


def test_a_square_B_of_a_state_update_varies_with_the_batch():
    _, step = step_case(np.random.default_rng(9), 4, 4, {})
    y, _ = selective_state_update.forward(**step)
    for b in range(4):
        row = {k: v[b : b + 1] if k in ("state", "x", "dt", "B", "C") else v for k, v in step.items()}
        np.testing.assert_array_equal(selective_state_update.forward(**row)[0], y[b : b + 1])


# The causal convolution


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 7, 65])
def test_a_causal_convolution_is_a_linear_filter_and_its_state_the_last_inputs(width, seqlen):
    rng = np.random.default_rng(10)
    case = conv_case(rng, 2, 3, seqlen, width, bias=True, initial_state=True)
    x, weight, bias, state = (case[name] for name in ("x", "weight", "bias", "initial_state"))
    y, last_state = causal_conv1d.forward(**case)
    from_zeros, _ = causal_conv1d.forward(**{**case, "initial_state": None})
    full = np.concatenate([state, x], axis=-1)
    for b, d in np.ndindex(2, 3):
        assert error(y[b, d], np.convolve(full[b, d], weight[d, ::-1], "valid") + bias[d]) <= 1e-14
        assert error(from_zeros[b, d], scipy.signal.lfilter(weight[d, ::-1], [1], x[b, d]) + bias[d]) <= 1e-14
    np.testing.assert_array_equal(last_state, full[..., seqlen:])


@given(conv_specs(dims=(1, 5), lengths=(0, 1, 2, 7)))
@settings(max_examples=50)
def test_a_convolution_of_runs_is_that_of_sequences_of_their_own(spec):
    """Also with padding, any width, and reversed."""
    case = {**spec.arguments(), "activation": None, "bias": None}
    y, last_state = causal_conv1d.forward(**case)
    x, seq_idx = case["x"], case["seq_idx"]
    seq_idx = np.zeros((spec.batch, spec.seqlen), int) if seq_idx is None else seq_idx
    order = np.arange(spec.seqlen)[:: -1 if case["reverse"] else 1]
    for b in range(spec.batch):
        kept = [t for t in order if seq_idx[b, t] >= 0]
        changes = [i for i in range(1, len(kept)) if seq_idx[b, kept[i]] != seq_idx[b, kept[i - 1]]]
        taps = np.zeros(spec.state_shape[1:]) if case["initial_state"] is None else case["initial_state"][b]
        expected = np.zeros_like(x[b])
        for times in np.split(np.array(kept, int), changes):
            before = taps if times[:1].tolist() == kept[:1] else 0 * taps
            full = np.concatenate([before, x[b][:, times]], axis=-1)
            for d, t in np.ndindex(spec.dim, len(times)):
                expected[d, times[t]] = case["weight"][d] @ full[d, t : t + spec.width]
        assert error(y[b], expected) <= 1e-14
        np.testing.assert_array_equal(last_state[b], full[:, full.shape[1] - (spec.width - 1) :])


def conv_gradients(case: dict[str, Any], weights: Any) -> dict[str, Any]:
    return present(causal_conv1d.backward(weights[0], **case, dlast_state=weights[1])._asdict(), case)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("options", each_alone(CONV_ON))
def test_every_element_of_every_convolution_gradient_is_its_complex_step(options, width):
    case = conv_case(np.random.default_rng(11), 2, 3, 5, width, **options)
    weights = cotangents(11, case["x"], (2, 3, width - 1))
    grads = conv_gradients(case, weights)
    assert elementwise_error(causal_conv1d.forward, weights, case, grads) <= TOLERANCE


@given(conv_specs())
@settings(max_examples=100)
def test_convolution_gradients_are_the_complex_step_for_any_sizes_and_options(spec):
    case = spec.arguments()
    weights = cotangents(spec.seed, case["x"], spec.state_shape)
    grads = conv_gradients(case, weights)
    assert directional_error(causal_conv1d.forward, weights, case, grads, spec.seed) <= TOLERANCE


@pytest.mark.parametrize("initial_state", [False, True])
def test_an_empty_convolution_returns_a_fresh_copy_of_the_initial_state(initial_state):
    case = conv_case(np.random.default_rng(12), 2, 3, 0, 4, initial_state=initial_state)
    y, last_state = causal_conv1d.forward(**case)
    assert y.shape == (2, 3, 0)
    np.testing.assert_array_equal(last_state, case["initial_state"] if initial_state else np.zeros((2, 3, 3)))
    assert not initial_state or not np.shares_memory(last_state, case["initial_state"])


# Normalization, loss, embedding


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 5), (0, 4)])
def test_rms_norm_divides_by_the_root_mean_square_and_its_gradients_are_the_complex_step(shape, residual):
    rng = np.random.default_rng(13)
    x, other, dout, dother = rng.standard_normal((4, *shape))
    case = {"x": x, "weight": rng.standard_normal(shape[-1]), "eps": 0.1}
    case["residual"] = other if residual else None
    out = rms_norm.forward(**case)
    y, s = out if residual else (out, x)
    np.testing.assert_array_equal(s, x + other if residual else x)
    for index in np.ndindex(*shape[:-1]):
        rms = np.sqrt(sum(v * v for v in s[index]) / shape[-1] + 0.1)
        assert error(y[index], [v / rms * w for v, w in zip(s[index], case["weight"], strict=True)]) <= 1e-15
    weights = (dout, dother) if residual else (dout,)
    grads = rms_norm.backward(dout, **case, dresidual=dother if residual else None)
    grads = present(grads._asdict(), case)
    assert elementwise_error(rms_norm.forward, weights, case, grads) <= TOLERANCE
    assert not residual or not np.shares_memory(grads["x"], grads["residual"])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("shift", [0.0, 800.0, -800.0])
def test_cross_entropy_is_scipys_logsumexp_and_its_gradient_is_the_complex_step(shape, shift):
    rng = np.random.default_rng(14)
    logits, labels = 3 * rng.standard_normal((*shape, 7)) + shift, rng.integers(0, 7, shape)
    if shape:
        labels.ravel()[1] = -1
    kept = labels != -1
    case = {"logits": logits, "labels": labels, "ignore_index": -1}
    chosen = np.take_along_axis(logits[kept], labels[kept][:, None], axis=-1)[:, 0]
    expected = (scipy.special.logsumexp(logits[kept], axis=-1) - chosen).mean()
    assert error(cross_entropy.forward(**case), expected) <= 1e-14 * max(1, abs(shift))
    grads = {"logits": cross_entropy.backward(2.5, **case)}
    assert elementwise_error(cross_entropy.forward, (2.5,), case, grads) <= TOLERANCE
    np.testing.assert_array_equal(grads["logits"][~kept], 0)


def test_cross_entropy_without_any_label_has_no_mean_and_no_gradient():
    logits, labels = np.ones((3, 4)), np.full(3, -100)
    assert np.isnan(cross_entropy.forward(logits, labels))
    np.testing.assert_array_equal(cross_entropy.backward(1.0, logits, labels), np.zeros((3, 4)))


@pytest.mark.parametrize("shape", [(), (9,), (2, 5), (0,)])
def test_embedding_picks_rows_and_its_gradient_is_the_complex_step(shape):
    rng = np.random.default_rng(15)
    weight, input_ids = rng.standard_normal((6, 3)), rng.integers(0, 5, shape)
    dout = rng.standard_normal((*shape, 3))
    out = embedding.forward(weight, input_ids)
    assert all(np.array_equal(out[i], weight[input_ids[i]]) for i in np.ndindex(*shape))
    grads = {"weight": embedding.backward(dout, input_ids, 6)}
    case = {"weight": weight, "input_ids": input_ids}
    assert elementwise_error(embedding.forward, (dout,), case, grads) <= TOLERANCE


def test_importing_the_references_loads_no_kernel_and_no_scipy_signal():
    names = "causal_conv1d cross_entropy embedding rms_norm selective_scan selective_state_update".split()
    imports = ", ".join(f"npmamba.reference.{name}" for name in names)
    banned = ("numba", "scipy.signal", "npmamba.scalar", "npmamba.cpu")
    code = f"import sys, {imports}; print([m for m in {banned} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_the_option_sets_name_every_option():
    assert set(SCAN_ON) | {"discretization"} == set(SCAN_OPTIONS)
    assert set(CONV_ON) == set(CONV_OPTIONS)
