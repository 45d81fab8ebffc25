"""The root-mean-square norm: against its reference, and the laws it obeys."""

from __future__ import annotations

import doctest
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, run_without_compiler, same_bits
from cases import seeds
from hypothesis import given
from hypothesis import strategies as st

import npmamba.ops
from npmamba.autodiff.check import check_vjp
from npmamba.autodiff.tape import pullback
from npmamba.cpu import runtime
from npmamba.cpu.lines import lines
from npmamba.ops.rms_norm import rms_norm, rms_norm_backward
from npmamba.reference import rms_norm as reference

SHAPES = ((1,), (7,), (3, 16), (65, 33), (2, 3, 100), (2, 2, 3, 31), (0, 5), (130, 257))
ARGUMENTS = "dout x weight residual dresidual".split()


def case(shape, seed, dtype=np.float64):
    """Return dout, x, weight, residual and dresidual; the weight is of the dtype that is computed in."""
    rng = np.random.default_rng(seed)
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    rows = [rng.standard_normal(shape).astype(dtype) for _ in range(4)]
    return rows[0], rows[1], rng.standard_normal(shape[-1]).astype(wide), rows[2], rows[3]


def both(dout, x, weight, residual, dresidual, eps=1e-5):
    """Return everything: y and the sum, and the gradients."""
    outputs = rms_norm(x, weight, eps=eps, residual=residual)
    return *outputs, *rms_norm_backward(dout, x, weight, eps=eps, residual=residual, dresidual=dresidual)


def both_by_reference(dout, x, weight, residual, dresidual, eps=1e-5):
    outputs = reference.forward(x, weight, eps=eps, residual=residual)
    return *outputs, *reference.backward(dout, x, weight, eps=eps, residual=residual, dresidual=dresidual)


# Against the reference


@given(st.sampled_from(SHAPES), st.sampled_from([0.0, 1e-5, 0.3]), seeds)
def test_float64_is_the_reference(shape, eps, seed):
    dout, x, weight, residual, dresidual = case(shape, seed)
    y, expected = rms_norm(x, weight, eps=eps), reference.forward(x, weight, eps=eps)
    assert error(y, expected) <= 1e-12
    found = rms_norm_backward(dout, x, weight, eps=eps)
    wanted = reference.backward(dout, x, weight, eps=eps)
    cancelling = dout * weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    assert max(error(found.x, wanted.x, cancelling), error(found.weight, wanted.weight)) <= 1e-10
    assert found.residual is None


@given(st.sampled_from(SHAPES), seeds)
def test_float64_with_a_residual_is_the_reference(shape, seed):
    arguments = case(shape, seed)
    for k, (found, wanted) in enumerate(zip(both(*arguments), both_by_reference(*arguments), strict=True)):
        assert error(found, wanted) <= (1e-12 if k < 2 else 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [(np.float32, (1e-6, 3e-6)), (np.float16, (1e-3, 1e-3)), (ml_dtypes.bfloat16, (8e-3, 8e-3))],
    ids=["float32", "float16", "bfloat16"],
)
@given(st.sampled_from(SHAPES), seeds)
def test_shorter_types_are_computed_in_float32_and_rounded_once(dtype, tolerances, shape, seed):
    arguments = case(shape, seed, dtype)
    types = [dtype, dtype, dtype, np.float32, dtype]
    for k, (found, wanted) in enumerate(zip(both(*arguments), both_by_reference(*arguments), strict=True)):
        assert found.dtype == types[k]
        assert error(found, wanted) <= (3e-6 if types[k] == np.float32 and k == 3 else tolerances[k > 1])


def test_the_primitive_passes_the_check_of_its_gradient():
    _, x, weight, residual, _ = case((3, 2, 17), 5)
    check_vjp(rms_norm, x, weight)
    check_vjp(lambda x, weight, residual: rms_norm(x, weight, residual=residual), x, weight, residual)


def test_an_output_that_nobody_used_has_gradient_zero():
    dout, x, weight, residual, dresidual = case((3, 17), 6)
    f = lambda x, w, r: rms_norm(x, w, residual=r)  # noqa: E731
    found = pullback(f, x, weight, residual)[1]((None, dresidual))
    assert same_bits(found, (dresidual, np.zeros(17), dresidual))
    found = pullback(f, x, weight, residual)[1]((dout, None))
    assert same_bits(found, tuple(rms_norm_backward(dout, x, weight, residual=residual)))


# Laws


@given(seeds)
def test_without_eps_the_length_of_a_row_does_not_matter(seed):
    """norm(c x) = norm(x) for c > 0: to the bit for powers of two, which round nothing."""
    dout, x, weight, *_ = case((5, 33), seed)
    y = rms_norm(x, weight, eps=0.0)
    assert same_bits(rms_norm(8 * x, weight, eps=0.0), y)
    assert error(rms_norm(np.pi * x, weight, eps=0.0), y) <= 1e-14
    gradients = rms_norm_backward(dout, x, weight, eps=0.0)
    scaled = rms_norm_backward(dout, 8 * x, weight, eps=0.0)
    assert same_bits(scaled.x, gradients.x / 8)
    assert same_bits(scaled.weight, gradients.weight)


@given(seeds)
def test_without_eps_the_gradient_stands_at_right_angles_to_the_row(seed):
    dout, x, weight, *_ = case((5, 33), seed)
    dx = rms_norm_backward(dout, x, weight, eps=0.0).x
    assert np.abs((dx * x).sum(-1)).max() <= 1e-13 * np.abs(dx * x).sum(-1).max()


@given(seeds)
def test_a_row_has_mean_square_one_for_weight_one(seed):
    _, x, *_ = case((5, 33), seed)
    np.testing.assert_allclose((rms_norm(x, np.ones(33), eps=0.0) ** 2).mean(-1), 1, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(st.sampled_from(SHAPES), seeds)
def test_fusing_the_residual_changes_no_bit(dtype, shape, seed):
    dout, x, weight, residual, dresidual = case(shape, seed, dtype)
    y, s, *gradients = both(dout, x, weight, residual, dresidual)
    assert same_bits(s, x + residual)
    assert same_bits(y, rms_norm(x + residual, weight))
    plain = rms_norm_backward(dout, x + residual, weight)
    assert same_bits(tuple(gradients), (plain.x + dresidual, plain.weight, plain.x + dresidual))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seeds)
def test_rows_are_independent_and_have_the_same_bits_alone(dtype, seed):
    dout, x, weight, residual, dresidual = case((2, 40, 33), seed, dtype)
    whole = both(dout, x, weight, residual, dresidual)
    b, t = np.random.default_rng(seed).integers(0, (2, 40))
    alone = both(dout[b, t], x[b, t], weight, residual[b, t], dresidual[b, t])
    for k in (0, 1, 2, 4):
        assert same_bits(alone[k], whole[k][b, t])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    arguments = case((5, 131, 33), 7, dtype)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(both(*arguments))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("shape", [(70, 9), (2, 35, 9), (2, 5, 7, 9)])
def test_any_memory_gives_the_same_bits(name, shape):
    arguments = dict(zip(ARGUMENTS, case(shape, 8, np.float32), strict=True))
    expected = both(**arguments)
    for layout, x in layouts(arguments[name]).items():
        assert same_bits(both(**{**arguments, name: x}), expected), layout


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ((5,), np.s_[:]),
        ((4, 5), np.s_[::2]),
        ((3, 4, 5), np.s_[:, :-1]),
        ((3, 4, 5), np.s_[::2, 1:, 1:4]),
        ((2, 3, 4, 5), np.s_[:]),
        ((2, 3, 4, 1), np.s_[..., :]),
        ((4, 2), np.s_[:, :1]),
        ((4, 2), np.s_[:, ::2]),
    ],
)
def test_rows_are_walked_where_they_stand(shape, place):
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    x = whole[place]
    found = lines(x, np.dtype(np.float32))
    assert np.shares_memory(found, whole)
    assert found.ndim == 3
    np.testing.assert_array_equal(found.reshape(x.shape), x)


def test_numbers_that_are_apart_are_copied_to_be_side_by_side():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for apart in (x[..., ::2], x.swapaxes(1, 2), x[..., ::-1], x[0].T):
        found = lines(apart, np.dtype(np.float32))
        assert found.strides[-1] == 4
        assert not np.shares_memory(found, x)
        np.testing.assert_array_equal(found.reshape(apart.shape), apart)


def test_a_row_that_is_repeated_by_broadcasting_is_read_as_it_is():
    _, x, weight, residual, _ = case((4, 9), 9)
    repeated = np.broadcast_to(x[0], (4, 9))
    assert same_bits(rms_norm(repeated, weight), rms_norm(repeated.copy(), weight))


def test_inputs_are_left_as_they_are_and_results_are_fresh():
    arguments = case((6, 33), 10)
    copies = [x.copy() for x in arguments]
    y, s, *_ = both(*arguments)
    assert all(same_bits(x, copy) for x, copy in zip(arguments, copies, strict=True))
    assert not any(np.shares_memory(out, x) for out in (y, s) for x in arguments)


def test_nan_stays_in_its_row():
    dout, x, weight, *_ = case((4, 33), 11)
    x[2, 5] = np.nan
    assert np.isnan(rms_norm(x, weight)).all(-1).tolist() == [False, False, True, False]
    assert np.isnan(rms_norm_backward(dout, x, weight).x).all(-1).tolist() == [False, False, True, False]


def test_without_rows_the_result_is_empty_and_the_weight_has_gradient_zero():
    dout, x, weight, residual, dresidual = case((0, 5), 12)
    y, s, dx, dweight, _ = both(dout, x, weight, residual, dresidual)
    assert y.shape == s.shape == dx.shape == (0, 5)
    assert same_bits(dweight, np.zeros(5))


# Errors


X, W = np.zeros((2, 3)), np.ones(3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: rms_norm([1.0], W), TypeError, "rms_norm: x must be a NumPy or CuPy array, got list"),
        (lambda: rms_norm(None, W), TypeError, "rms_norm: x must be a NumPy or CuPy array, got None"),
        (lambda: rms_norm(np.float64(1), W), TypeError, "rms_norm: x must be a NumPy or CuPy array, got float64"),
        (
            lambda: rms_norm(np.zeros(()), W),
            ValueError,
            "rms_norm: x has 0 axes; x must be (..., d_model), got shape ()",
        ),
        (lambda: rms_norm(X[:, :0], W[:0]), ValueError, "rms_norm: x has d_model=0; d_model must be at least 1"),
        (
            lambda: rms_norm(X, np.ones(4)),
            ValueError,
            "rms_norm: weight has d_model=4, but x has d_model=3; weight must be (d_model,), got shape (4,)",
        ),
        (
            lambda: rms_norm(X, np.ones((1, 3))),
            ValueError,
            "rms_norm: weight has 2 axes, but x has d_model=3; weight must be (d_model,), got shape (1, 3)",
        ),
        (
            lambda: rms_norm(X, W, residual=X[:1]),
            ValueError,
            "rms_norm: residual has shape (1, 3), but x has shape (2, 3); they must be equal",
        ),
        (
            lambda: rms_norm_backward(X[0], X, W),
            ValueError,
            "rms_norm_backward: dout has shape (3,), but x has shape (2, 3); they must be equal",
        ),
        (
            lambda: rms_norm_backward(None, X, W),
            TypeError,
            "rms_norm_backward: dout must be a NumPy or CuPy array, got None",
        ),
        (
            lambda: rms_norm_backward(X, X, W, dresidual=X),
            ValueError,
            "rms_norm_backward: dresidual is given without residual, so there is no such result",
        ),
        (
            lambda: rms_norm(X.astype(int), W),
            TypeError,
            "rms_norm: x must be float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda: rms_norm(X, W.astype(np.float32)),
            TypeError,
            "rms_norm: weight must be float64 because x is float64, got float32",
        ),
        (
            lambda: rms_norm(X.astype(np.float16), W.astype(np.float16)),
            TypeError,
            "rms_norm: weight must be float32 because x is float16, got float16",
        ),
        (
            lambda: rms_norm(X, W, residual=X.astype(np.float32)),
            TypeError,
            "rms_norm: residual must be float64 because x is float64, got float32",
        ),
        (lambda: rms_norm(X, W, eps="1"), TypeError, "rms_norm: eps must be a number, got str"),
        (lambda: rms_norm(X, W, eps=True), TypeError, "rms_norm: eps must be a number, got bool"),
        (lambda: rms_norm(X, W, eps=-1.0), ValueError, "rms_norm: eps must be 0 or more and finite, got -1.0"),
        (lambda: rms_norm(X, W, eps=np.nan), ValueError, "rms_norm: eps must be 0 or more and finite, got nan"),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


# The page, and the kernels without the compiler


def test_the_worked_example_of_the_page_holds():
    page = Path(npmamba.ops.__file__).with_name("rms_norm.md")
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert (failed, attempted > 3) == (0, True)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.ops.rms_norm import rms_norm, rms_norm_backward
from npmamba.reference import rms_norm as reference
x = np.random.default_rng(0).standard_normal((5, 4, 19))
y, s = rms_norm(x[0], x[1, 0], residual=x[2])
found = y, s, *rms_norm_backward(x[3], x[0], x[1, 0], residual=x[2], dresidual=x[4])
expected = *reference.forward(x[0], x[1, 0], residual=x[2]), *reference.backward(
    x[3], x[0], x[1, 0], residual=x[2], dresidual=x[4])
for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
""")
