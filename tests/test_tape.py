"""The tape: its laws, what it frees, and what it says when something is wrong."""

from __future__ import annotations

import doctest
import gc
import inspect
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.autodiff import Traced, primitive, pullback, tape, value_and_grad, value_of
from npmamba.autodiff.algebra import exp, matmul, mul, split
from npmamba.autodiff.algebra import sum as total

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**32 - 1)


@primitive
def polar(r, angle, *, save):
    """Point of the plane with radius `r` and `angle`."""
    return (r * np.cos(angle), r * np.sin(angle)), (r, angle) if save else None


@polar.vjp
def polar_vjp(dout, saved):
    r, angle = saved
    dx, dy = (np.zeros_like(r) if d is None else d for d in dout)
    return (
        dx * np.cos(angle) + dy * np.sin(angle),
        r * (dy * np.cos(angle) - dx * np.sin(angle)),
    )


def model(p, q):
    x, y = polar(p, q)
    return {"first": x * y + p, "second": [exp(x * 0.1), y]}


def draw(n, seed, count):
    return np.random.default_rng(seed).standard_normal((count, n))


@given(n=sizes, seed=seeds)
def test_pull_is_linear(n, seed):
    p, q, a, b, c, d, e, f = draw(n, seed, 8)
    one, two = {"first": a, "second": [b, c]}, {"first": d, "second": [e, f]}
    both = {"first": 2 * a + 3 * d, "second": [2 * b + 3 * e, 2 * c + 3 * f]}
    gradients = [pullback(model, p, q)[1](dout) for dout in (one, two, both)]
    for g, h, gh in zip(*gradients, strict=True):
        np.testing.assert_allclose(gh, 2 * g + 3 * h, rtol=1e-12, atol=1e-12)


@given(n=sizes, seed=seeds)
def test_the_derivative_of_a_composition_is_the_product_of_derivatives(n, seed):
    p, dout = draw(n, seed, 2)
    _, whole = pullback(lambda x: exp(total(x * x) * 0.1) * x, p)
    inner, pull_inner = pullback(lambda x: {"x": x, "norm": total(x * x)}, p)
    _, pull_outer = pullback(lambda z: exp(z["norm"] * 0.1) * z["x"], inner)
    np.testing.assert_allclose(whole(dout)[0], pull_inner(pull_outer(dout)[0])[0], rtol=1e-12, atol=1e-12)


@given(n=sizes, seed=seeds)
def test_a_value_used_twice_gets_the_sum(n, seed):
    x, dout = draw(n, seed, 2)
    _, pull = pullback(lambda x: x * x + x, x)
    np.testing.assert_allclose(pull(dout)[0], dout * (2 * x + 1), rtol=1e-12)


def test_an_output_given_back_twice_gets_the_sum():
    x = np.ones(2)
    _, pull = pullback(lambda x: (x, x), x)
    assert pull((x, 2 * x))[0].tolist() == [3.0, 3.0]


@given(n=sizes, seed=seeds)
def test_an_unused_argument_has_zeros_of_its_own_shape_and_dtype(n, seed):
    x, dout = draw(n, seed, 2)
    unused = {"a": np.full((n, 2), np.nan, np.float32), "b": None}
    _, pull = pullback(lambda x, unused: x * 2.0, x, unused)
    gradient = pull(dout)[1]
    assert gradient["a"].dtype == np.float32
    assert gradient["a"].shape == (n, 2)
    assert not gradient["a"].any()
    assert gradient["b"] is None


def test_an_output_nobody_pulls_costs_no_vjp():
    @primitive
    def untouched(x):
        return x, None

    @untouched.vjp
    def untouched_vjp(dout, saved):
        raise AssertionError("this vjp has no gradient to carry")

    _, pull = pullback(lambda x: (x * 2.0, untouched(x)), np.ones(2))
    assert pull((np.ones(2), None))[0].tolist() == [2.0, 2.0]


def test_constants_have_no_gradient_and_leave_no_trace():
    x, constant = np.ones(2), np.full(2, 3.0)
    out, pull = pullback(lambda x: {"traced": constant * x, "constant": constant * constant}, x)
    assert out["constant"].tolist() == [9.0, 9.0]
    assert pull({"traced": x, "constant": x})[0].tolist() == [3.0, 3.0]


def test_without_a_traced_argument_a_primitive_just_computes():
    x, y = polar(np.ones(1), np.zeros(1))
    assert (x.tolist(), y.tolist()) == ([1.0], [0.0])


def test_save_is_true_exactly_when_something_is_recorded():
    asked = []

    @primitive
    def spy(x, *, save):
        asked.append(save)
        return x, None

    spy.vjp(lambda dout, saved: (dout,))
    spy(np.ones(1))
    pullback(lambda x: (spy(x), spy(value_of(x))), np.ones(1))
    assert asked == [False, True, False]


def test_gradients_that_share_memory_are_not_summed_in_place():
    dout = np.ones(2)
    _, pull = pullback(lambda x, y: (x + y) + (x + y), np.zeros(2), np.zeros(2))
    dx, dy = pull(dout)
    assert (dx.tolist(), dy.tolist(), dout.tolist()) == ([2, 2], [2, 2], [1, 1])


def test_saved_arrays_die_while_the_tape_is_read():
    """Neither the end of pull nor the garbage collector is needed: each entry goes when it has been used."""
    alive, counts = [], []

    @primitive
    def keeps(x):
        saved = x.copy()
        alive.append(weakref.ref(saved))
        return x, saved

    @keeps.vjp
    def keeps_vjp(dout, saved):
        counts.append(sum(ref() is not None for ref in alive))
        return (dout,)

    def chain(x):
        for _ in range(4):
            x = keeps(x)
        return x

    gc.disable()
    try:
        _, pull = pullback(chain, np.ones(3))
        assert sum(ref() is not None for ref in alive) == 4
        pull(np.ones(3))
        assert counts == [4, 3, 2, 1]
        assert not any(ref() for ref in alive)
    finally:
        gc.enable()


def test_gradients_between_entries_die_while_the_tape_is_read():
    alive, counts = [], []

    @primitive
    def passes(x):
        return x, None

    @passes.vjp
    def passes_vjp(dout, saved):
        gradient = dout + 1
        alive.append(weakref.ref(gradient))
        counts.append(sum(ref() is not None for ref in alive))
        return (gradient,)

    def chain(x):
        for _ in range(5):
            x = passes(x)
        return x

    pullback(chain, np.ones(3))[1](np.ones(3))
    assert max(counts) == 2


def test_zero_dimensional_results_stay_arrays():
    loss, gradient = value_and_grad(lambda x: total(x) * total(x) + 1.0)(np.ones(2))
    assert isinstance(loss, np.ndarray)
    assert isinstance(gradient, np.ndarray)
    assert isinstance(total(np.ones(2)), np.ndarray)
    _, gradient = value_and_grad(lambda x: x * x + x)(np.array(3.0))
    assert isinstance(gradient, np.ndarray)
    assert gradient == 7.0


def test_value_and_grad_passes_other_arguments_and_returns_aux():
    def loss(params, scale, *, shift):
        out = params["w"] * scale
        return total(out) + shift, {"out": value_of(out), "note": "kept"}

    (value, aux), gradient = value_and_grad(loss, has_aux=True)({"w": np.ones(2)}, 3.0, shift=1.0)
    assert value == 7.0
    assert aux["out"].tolist() == [3.0, 3.0]
    assert aux["note"] == "kept"
    assert gradient["w"].tolist() == [3.0, 3.0]
    assert value_and_grad(loss).__name__ == "loss"


def test_a_loss_that_ignores_the_parameters_has_zero_gradient():
    value, gradient = value_and_grad(lambda p: np.array(2.0))({"w": np.ones(2)})
    assert value == 2.0
    assert gradient["w"].tolist() == [0.0, 0.0]


def test_a_primitive_keeps_name_documentation_and_signature():
    assert polar.__name__ == "polar"
    assert polar.__doc__.startswith("Point of the plane")
    assert list(inspect.signature(polar).parameters) == ["r", "angle", "save"]


def test_arrays_leave_operators_to_traced_values():
    x = np.array([1.0, 2.0])
    out, pull = pullback(lambda t: x * t + x @ t, x)
    assert out.tolist() == [6.0, 9.0]
    assert pull(np.ones(2))[0].tolist() == [3.0, 6.0]


def test_traced_values_show_what_they_hold():
    shown = []
    pullback(lambda x: shown.append((repr(x), x.shape, x.dtype, x.ndim)) or x, np.ones((2, 3), np.float32))
    assert shown == [("Traced(shape=(2, 3), dtype=float32)", (2, 3), np.float32, 2)]


def broken(rule):
    @primitive
    def shifted(x, shift):
        return x + shift, None

    if rule is not None:
        shifted.vjp(rule)
    return pullback(shifted, np.ones(3), np.ones(3))[1](np.ones(3))


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (None, NotImplementedError, r"shifted: has no vjp; define one with @shifted\.vjp"),
        (lambda dout, saved: (dout,), ValueError, "its vjp must return a tuple of 2, got a tuple of 1"),
        (lambda dout, saved: dout, ValueError, r"shifted: its vjp must return a tuple of 2, got ndarray"),
        (
            lambda dout, saved: (dout, dout[:2]),
            ValueError,
            r"shifted: the gradient of shift must be \(3,\), got \(2,\)",
        ),
        (
            lambda dout, saved: (dout.astype(np.float32), dout),
            TypeError,
            r"shifted: the gradient of x must be float64, got float32",
        ),
        (lambda dout, saved: (dout, 1.0), TypeError, "the gradient of shift must be float64, got float"),
    ],
)
def test_a_wrong_vjp_is_named(rule, error, message):
    with pytest.raises(error, match=message):
        broken(rule)


def test_a_gradient_of_many_arguments_is_named_by_the_last_parameter():
    @primitive
    def gather(*parts):
        return sum(parts), None

    gather.vjp(lambda dout, saved: (dout, dout, dout[:1]))
    with pytest.raises(ValueError, match="gather: the gradient of parts must be"):
        pullback(gather, *np.ones((3, 2)))[1](np.ones(2))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.arange(3), r"pullback: argument 0\.ids must be a floating array, got int64"),
        (np.ones(3, bool), r"argument 0\.ids must be a floating array, got bool"),
        (1.0, r"argument 0\.ids must be a floating array, got float"),
        (np.ones(3, complex), r"argument 0\.ids must be a floating array, got complex128"),
    ],
)
def test_only_floating_arrays_have_gradients(argument, message):
    with pytest.raises(TypeError, match=message):
        value_and_grad(lambda p: p)({"ids": argument})


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda p: p, ValueError, r"must return an array of shape \(\), got \(3,\)"),
        (lambda p: 1.0, ValueError, r"must return an array of shape \(\), got float"),
    ],
)
def test_a_loss_must_be_scalar(f, error, message):
    with pytest.raises(error, match=message):
        value_and_grad(f)(np.ones(3))


def test_pull_works_once():
    _, pull = pullback(lambda x: x * 2.0, np.ones(2))
    pull(np.ones(2))
    with pytest.raises(RuntimeError, match="this tape has been read"):
        pull(np.ones(2))


def test_pull_checks_what_it_is_given():
    with pytest.raises(ValueError, match=r"pull: the gradient of the output must be \(2,\), got \(\)"):
        pullback(lambda x: x * 2.0, np.ones(2))[1](np.ones(()))
    with pytest.raises(ValueError, match="trees differ at the root"):
        pullback(lambda x: (x, x), np.ones(2))[1]((np.ones(2),))


def test_there_are_only_first_derivatives():
    with pytest.raises(TypeError, match="argument 0 is traced already"):
        pullback(lambda x: pullback(lambda y: y * y, x)[0], np.ones(2))
    with pytest.raises(RuntimeError, match="mul: its arguments are traced by two different pullbacks"):
        pullback(lambda x: pullback(lambda y: mul(x, y), np.ones(2))[0], np.ones(2))


def test_a_traced_value_cannot_slip_past_the_tape():
    with pytest.raises(TypeError, match="polar: angle is traced, but keyword arguments have no gradient"):
        pullback(lambda x: polar(x, angle=x), np.ones(2))
    with pytest.raises(TypeError, match="a traced value is not an array"):
        pullback(np.asarray, np.ones(2))
    with pytest.raises(TypeError):
        pullback(np.exp, np.ones(2))


def test_a_traced_value_outlives_its_pullback_harmlessly():
    kept: list[Traced] = []
    _, pull = pullback(lambda x: kept.append(x) or x * 2.0, np.ones(2))
    kept[0] * 3.0  # noqa: B018
    assert pull(np.ones(2))[0].tolist() == [2.0, 2.0]


def test_tuple_outputs_carry_their_gradients_separately():
    x, w = np.arange(6.0).reshape(2, 3), np.ones((2, 2))
    out, pull = pullback(lambda x: matmul(split(x, (1, 2))[1], w), x)
    assert pull(np.ones_like(out))[0].tolist() == [[0, 2, 2], [0, 2, 2]]


def test_the_page_on_the_tape_is_true():
    page = Path(tape.__file__).with_name("tape.md")
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 5
    assert result.failed == 0


def test_a_primitive_keeps_the_name_and_the_text_of_its_function():
    assert polar.__name__ == "polar"
    assert polar.__doc__ == "Point of the plane with radius `r` and `angle`."
    assert list(inspect.signature(polar).parameters) == ["r", "angle", "save"]


def test_a_gradient_may_have_another_byte_order_but_no_other_dtype():
    double = primitive(lambda x: (2 * x, None))
    double.vjp(lambda dout, saved: ((2 * dout).astype(">f8"),))
    assert pullback(double, np.ones(2))[1](np.ones(2))[0].tolist() == [2.0, 2.0]
    double.vjp(lambda dout, saved: ((2 * dout).astype(">f4"),))
    with pytest.raises(TypeError, match="the gradient of x must be float64, got >f4"):
        pullback(double, np.ones(2))[1](np.ones(2))
