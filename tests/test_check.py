"""The gradient checks themselves: they accept what is right, refuse what is wrong, and say where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.autodiff import check_complex_step, check_vjp, complex_step_gradient, primitive

seeds = st.integers(0, 2**32 - 1)


def blend(dx_factor=1.0, dy_factor=1.0):
    """``sin(x) y²``, with a vjp that is wrong by a factor."""

    @primitive
    def f(x, y):
        return np.sin(x) * y**2, (x, y)

    @f.vjp
    def f_vjp(dout, saved):
        x, y = saved
        return dx_factor * dout * np.cos(x) * y**2, dy_factor * dout * np.sin(x) * 2 * y

    return f


@given(n=st.integers(0, 9), seed=seeds)
def test_a_right_vjp_passes(n, seed):
    rng = np.random.default_rng(seed)
    check_vjp(blend(), rng.standard_normal(n), rng.standard_normal(n), rng=rng)


@given(seed=seeds, factor=st.sampled_from([0.0, -1.0, 1 + 1e-5]), wrong=st.sampled_from("xy"))
def test_a_wrong_vjp_fails_and_the_argument_is_named(seed, factor, wrong):
    x, y = np.random.default_rng(seed).uniform(0.5, 1.0, (2, 1))
    f = blend(**{f"d{wrong}_factor": factor})
    with pytest.raises(AssertionError, match=rf"gradient of {wrong} is wrong\nanalytic: .*\nnumeric:  "):
        check_vjp(f, x, y, rng=seed)


def test_the_leaf_of_a_tree_is_named():
    f = blend(dy_factor=2.0)
    with pytest.raises(AssertionError, match=r"gradient of params\.layer\.weight is wrong"):
        check_vjp(lambda x, params: f(x, params["layer.weight"]), np.ones(2), {"layer.weight": np.ones(2)})


def test_trees_pass_and_other_arguments_are_held_fixed():
    def f(params, ids, missing, factor):
        assert ids.tolist() == [0, 1]
        assert (missing, factor) == (None, 3.0)
        return [params["a"] * factor, {"b": params["a"] * params["b"]}]

    check_vjp(f, {"a": np.ones(2), "b": np.full(2, 2.0)}, np.arange(2), None, 3.0)


def test_only_double_precision_is_checked():
    with pytest.raises(TypeError, match="check_vjp: y must be float64, got float32"):
        check_vjp(blend(), np.ones(2), np.ones(2, np.float32))


def test_the_difference_is_of_fourth_order():
    """Exact for polynomials of degree four, whatever the step."""

    @primitive
    def power(x):
        return x**4, x

    power.vjp(lambda dout, x: (4 * dout * x**3,))
    check_vjp(power, np.array([0.7, -1.3]), eps=0.5, rtol=1e-13)


@given(n=st.integers(1, 6), seed=seeds)
def test_the_complex_step_is_exact_to_rounding(n, seed):
    x, w = np.random.default_rng(seed).standard_normal((2, n))

    def f(x):
        return np.exp(np.sin(x)) * x

    derivative = np.exp(np.sin(x)) * (1 + x * np.cos(x))
    np.testing.assert_allclose(complex_step_gradient(f, x, w), derivative * w, rtol=1e-14, atol=1e-15)
    error = check_complex_step(lambda x: f(x).sum(), x, derivative, rtol=1e-14)
    assert error <= 1e-14
    gradient = complex_step_gradient(lambda x: f(x).sum(), x.reshape(1, n))
    assert gradient.shape == (1, n)
    assert gradient.dtype == np.float64


@pytest.mark.parametrize("gradient", [np.array([2.0, 4.0 + 1e-10]), np.array([2.0, np.nan])])
def test_the_complex_step_refuses_a_wrong_gradient(gradient):
    with pytest.raises(AssertionError, match=r"error .*, allowed 1e-12\nanalytic: .*\ncomplex:  \[2\. 4\.\]"):
        check_complex_step(lambda x: (x * x).sum(), np.array([1.0, 2.0]), gradient)


def test_complex_step_errors():
    with pytest.raises(AssertionError, match=r"the gradient has shape \(1,\), but x has \(2,\)"):
        check_complex_step(lambda x: x.sum(), np.ones(2), np.ones(1))
    with pytest.raises(ValueError, match=r"f must return a scalar, got shape \(2,\)"):
        complex_step_gradient(lambda x: x, np.ones(2))
    assert check_complex_step(lambda x: 0 * x.sum(), np.ones(2), np.zeros(2)) == 0.0


def directions(**options):
    """Return what `check_vjp` calls a function with, as bytes: the points that its directions lead to."""
    seen = []

    @primitive
    def f(x):
        seen.append(x.tobytes())
        return 2 * x, None

    f.vjp(lambda dout, saved: (2 * dout,))
    check_vjp(f, np.ones(3), **options)
    return seen


def test_directions_are_the_same_every_time_unless_another_source_is_given():
    assert directions() == directions()
    assert directions(rng=5) == directions(rng=np.random.default_rng(5))
    assert directions(rng=5) != directions()


def test_an_error_as_large_as_allowed_passes_and_lists_of_whole_numbers_are_points():
    assert check_complex_step(lambda x: 3 * x.sum(), [1, 2], [3, 3], rtol=0.0) == 0.0
    assert complex_step_gradient(lambda x: x * x, [1, 2], [1, 1]).tolist() == [2.0, 4.0]
