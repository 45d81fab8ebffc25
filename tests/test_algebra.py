"""Whole-array primitives: each vjp against finite differences, the laws of layout, and the errors."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from arrays import same_bits
from hypothesis import given
from hypothesis import strategies as st

from npmamba.autodiff import algebra, check_vjp, pullback, value_and_grad

seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)) for shape in shapes]


@st.composite
def broadcastable(draw):
    """Two shapes that broadcast: axes of the whole are dropped from the left or shrunk to 1."""
    whole = draw(shapes)
    pair = []
    for _ in range(2):
        kept = whole[draw(st.integers(0, len(whole))) :]
        pair.append(tuple(n if draw(st.booleans()) else 1 for n in kept))
    return pair


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@given(pair=broadcastable(), seed=seeds)
def test_elementwise_vjps_undo_broadcasting(name, pair, seed):
    x, y = draw(seed, *pair)
    check_vjp(getattr(algebra, name), x, np.sign(y) * (1 + np.abs(y)))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: 2.0 + x * 3.0 - 1.0,
        lambda x: 2.0 - x / 4.0,
        lambda x: 2.0 * x + np.float64(3.0) * x,
        lambda x: 1.0 / (x * x + 2.0),
        lambda x: -x,
        lambda x: algebra.exp(x * 0.5),
    ],
)
@given(shape=shapes, seed=seeds)
def test_vjps_with_numbers(f, shape, seed):
    check_vjp(f, *draw(seed, shape))


@pytest.mark.parametrize(
    ("x_axes", "y_axes"),
    [("k", "k"), ("k", "kn"), ("mk", "k"), ("mk", "kn"), ("bmk", "kn"), ("bmk", "k"), ("k", "bkn"),
     ("mk", "bkn"), ("bmk", "bkn"), ("1mk", "bkn"), ("bmk", "1kn"), ("abmk", "bkn")],
)  # fmt: skip
@given(size=st.fixed_dictionaries({axis: st.integers(1, 4) for axis in "abmkn"}), seed=seeds)
def test_matmul_vjp(x_axes, y_axes, size, seed):
    size["1"] = 1
    check_vjp(algebra.matmul, *draw(seed, [size[a] for a in x_axes], [size[a] for a in y_axes]))


@pytest.mark.parametrize("bias", [False, True])
@given(lead=shapes, sizes=st.tuples(*[st.integers(1, 5)] * 2), seed=seeds)
def test_linear_is_its_equation_and_its_vjp_is_right(bias, lead, sizes, seed):
    x, weight, b = draw(seed, (*lead, sizes[0]), sizes[::-1], sizes[1:])
    args = (x, weight, b) if bias else (x, weight)
    expected = np.einsum("...i,oi->...o", x, weight) + (b if bias else 0)
    np.testing.assert_allclose(algebra.linear(*args), expected, rtol=1e-12, atol=1e-12)
    check_vjp(algebra.linear, *args)


@given(shape=shapes, seed=seeds, data=st.data())
def test_layout_vjps(shape, seed, data):
    (x,) = draw(seed, shape)
    check_vjp(lambda x: x.reshape(-1), x)
    check_vjp(lambda x: x.T, x)
    order = data.draw(st.permutations(range(x.ndim)))
    order = [axis - x.ndim * data.draw(st.booleans()) for axis in order]
    check_vjp(lambda x: x.transpose(order), x)
    np.testing.assert_array_equal(algebra.transpose(x, *order), x.transpose(order))
    if x.ndim:
        a, b = data.draw(st.tuples(*[st.integers(-x.ndim, x.ndim - 1)] * 2))
        check_vjp(lambda x: x.swapaxes(a, b), x)
        np.testing.assert_array_equal(algebra.swapaxes(x, a, b), x.swapaxes(a, b))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", ["sum", "mean"])
@given(shape=shapes, seed=seeds, data=st.data())
def test_reductions_are_those_of_numpy_and_their_vjps_are_right(name, keepdims, shape, seed, data):
    (x,) = draw(seed, shape)
    axes = [None, *range(-x.ndim, x.ndim), *itertools.combinations(range(x.ndim), 2)]
    axis = data.draw(st.sampled_from(axes))
    f = getattr(algebra, name)
    expected = getattr(np, name)(x, axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(f(x, axis, keepdims), expected, rtol=1e-12, atol=1e-12)
    assert f(x, axis, keepdims).shape == expected.shape
    check_vjp(lambda x: f(x, axis=axis, keepdims=keepdims), x)


@given(before=shapes, after=shapes, sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4), seed=seeds)
def test_split_cuts_and_its_vjp_joins(before, after, sizes, seed):
    axis = len(before)
    x, dout = draw(seed, *[(*before, sum(sizes), *after)] * 2)
    pieces, pull = pullback(lambda x: algebra.split(x, sizes, axis), x)
    assert [piece.shape[axis] for piece in pieces] == sizes
    assert all(piece.base is x or piece.size == 0 for piece in pieces)
    douts = algebra.split(dout, sizes, axis)
    np.testing.assert_array_equal(pull(douts)[0], dout)


@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=seeds, data=st.data())
def test_split_fills_missing_gradients_with_zeros(sizes, seed, data):
    x, dout = draw(seed, *[(2, sum(sizes))] * 2)
    missing = data.draw(st.integers(0, len(sizes) - 1))
    douts = list(algebra.split(dout, sizes))
    douts[missing] = None
    (dx,) = pullback(lambda x: algebra.split(x, sizes), x)[1](tuple(douts))
    expected = algebra.split(dout.copy(), sizes)
    expected[missing][...] = 0
    np.testing.assert_array_equal(dx, expected[0].base)


def test_the_gradient_of_split_has_the_memory_order_of_its_input():
    x = np.zeros((2, 5, 6)).swapaxes(1, 2)  # (batch, dim, seqlen) with channels contiguous
    (dx,) = pullback(lambda x: algebra.split(x, (2, 4), axis=1), x)[1]((x[:, :2], x[:, 2:]))
    assert dx.strides == x.strides


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1, None), (slice(None), 1), (..., None, slice(None, None, -2)), (1, 2, np.int64(0)), ()],
)
@given(seed=seeds)
def test_getitem_vjp(index, seed):
    (x,) = draw(seed, (2, 3, 4))
    np.testing.assert_array_equal(algebra.getitem(x, index), x[index])
    check_vjp(lambda x: x[index], x)


@given(shape=shapes, seed=seeds, rate=st.floats(0.0, 0.9), key=st.tuples(*[st.integers(0, 2**70)] * 2))
def test_dropout_is_a_pure_function_of_key_and_shape(shape, seed, rate, key):
    x, other = draw(seed, shape, shape)
    out = algebra.dropout(x, rate=rate, key=key)
    np.testing.assert_array_equal(out, algebra.dropout(x, rate=rate, key=key))
    kept = out != 0
    np.testing.assert_array_equal(kept, algebra.dropout(other, rate=rate, key=key) != 0)
    np.testing.assert_allclose(out[kept], x[kept] / (1 - rate), rtol=1e-12)
    check_vjp(lambda x: algebra.dropout(x, rate=rate, key=key) * 1.0, x)


def test_dropout_keeps_the_mean_and_drops_its_share():
    out = algebra.dropout(np.ones(100_000), rate=0.3, key=(1, 2))
    assert abs(np.mean(out == 0) - 0.3) < 0.01
    assert abs(out.mean() - 1) < 0.02


def test_dropout_keys_are_told_apart():
    x = np.ones(64)
    keys = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (2**32,), (2**32, 0), (-1,), (10, 1), (1, 1, 0)]
    masks = {algebra.dropout(x, rate=0.5, key=key).tobytes() for key in keys}
    assert len(masks) == len(keys)
    same = [algebra.dropout(x, rate=0.5, key=(k,)) for k in (3, np.int64(3))]
    assert np.array_equal(*same)


def test_dropped_nans_are_gone():
    x = np.full(64, np.nan)
    assert 0 < np.isnan(algebra.dropout(x, rate=0.5, key=(0,))).sum() < 64


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtype_in_is_dtype_out(dtype):
    x, weight, bias = (np.full(shape, 0.25, dtype) for shape in [(2, 3, 4), (5, 4), (5,)])

    def f(x, weight, bias):
        y = algebra.linear(x, weight, bias)
        y = algebra.dropout(y, rate=0.5, key=(0,)) - algebra.mean(y) * y
        return algebra.matmul(algebra.exp(-y), weight)[0].T.sum(axis=0)

    out, pull = pullback(f, x, weight, bias)
    assert out.dtype == dtype
    for gradient, argument in zip(pull(np.ones_like(out)), (x, weight, bias), strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == argument.shape


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_types_are_summed_in_single_precision(dtype):
    ones = np.ones((1, 1000), dtype)
    assert algebra.sum(ones) == dtype(1000)
    assert algebra.linear(ones, ones)[0, 0] == dtype(1000)
    _, pull = pullback(lambda x, bias: x + bias, ones.T, np.ones(1, dtype))
    assert pull(ones.T)[1][0] == dtype(1000)


def test_a_product_of_two_dtypes_is_numpys():
    half, single = np.full((2, 3), 0.1, np.float16), np.full((3, 2), 0.1, np.float32)
    for x, y in ((half, single), (half.T, single.T.astype(np.float64))):
        assert same_bits(algebra.matmul(x, y), x @ y)


def test_mixed_precision_gradients_return_to_their_argument():
    x, y = np.ones(3, np.float32), np.ones((2, 3))
    out, pull = pullback(lambda x, y: x * y, x, y)
    assert [g.dtype for g in pull(np.ones_like(out))] == [np.float32, np.float64]


def test_python_numbers_do_not_widen():
    _, gradient = value_and_grad(lambda x: (1.0 / (2.0 - x) * 3.0 + 1.0).sum())(np.zeros(2, np.float32))
    assert gradient.dtype == np.float32


@pytest.mark.parametrize("op", ["matmul", "linear"])
def test_products_copy_no_sliced_operand(op, monkeypatch):
    """A slice of a wider array's last axis reaches BLAS as it is and in one product, forward and backward."""
    wide, weight = np.ones((2, 3, 8)), np.ones((4, 5))
    x, w = wide[..., 2:6], weight.T if op == "linear" else weight
    seen = []
    monkeypatch.setattr(algebra, "_product", lambda x, y: seen.append((x, y)) or x @ y)
    out, pull = pullback(getattr(algebra, op), x, w)
    wide_dout = np.ones((2, 3, 9))
    dout = wide_dout[..., 1:6]
    pull(dout)
    used = [operand for pair in seen for operand in pair]
    assert [operand.ndim for operand in used] == [2] * 6
    owners = (wide, weight, wide_dout)
    assert all(any(np.shares_memory(operand, owner) for owner in owners) for operand in used)


def test_no_primitive_writes_into_its_arguments():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((2, 4)), rng.standard_normal((4, 4)), rng.standard_normal(4)
    for array in (x, weight, bias):
        array.flags.writeable = False

    def f(x, weight, bias):
        y = algebra.linear(x, weight, bias) / (x * x + 2.0) - algebra.exp(x @ weight)
        a, b = algebra.split(algebra.dropout(y, rate=0.5, key=(1,)).T.reshape(2, 4), (1, 3))
        return a.sum() + algebra.mean(-b[0])

    value_and_grad(lambda p: f(*p))((x, weight, bias))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: algebra.linear(x, np.ones((4, 2))), ValueError,
         r"linear: x must be \(\.\.\., in\), weight \(out, in\), got \(2, 3\) and \(4, 2\)"),
        (lambda x: algebra.linear(x, np.ones((4, 3)), np.ones(3)), ValueError,
         r"linear: bias must be \(out,\) = \(4,\), got shape \(3,\)"),
        (lambda x: algebra.linear(x, [[1.0]]), TypeError, "weight must be a NumPy or CuPy array, got list"),
        (lambda x: algebra.matmul(x, 2.0), TypeError, "matmul: y must be a NumPy or CuPy array, got float"),
        (lambda x: algebra.split(x, (1, 1)), ValueError,
         r"split: sizes \(1, 1\) must add up to 3, the length of axis -1"),
        (lambda x: algebra.split(None, (1, 2)), TypeError, "split: x must be a NumPy or CuPy array, got None"),
        (lambda x: algebra.split(x, (1, 2), axis=x.ndim), ValueError, "split: axis must be"),
        (lambda x: algebra.split(x, (4, -1)), ValueError, r"split: sizes \(4, -1\) must"),
        (lambda x: algebra.getitem(x, [0, 1]), TypeError,
         "getitem: index must consist of integers, slices, ... and None, got list"),
        (lambda x: algebra.getitem(x, True), TypeError, "got bool"),
        (lambda x: algebra.dropout([1.0], rate=0.5, key=(1,)), TypeError, "dropout: x must be a NumPy or CuPy array"),
        (lambda x: algebra.dropout(x.astype(int), rate=0.5, key=(1,)), TypeError, "dropout: x must be float16"),
        (lambda x: algebra.dropout(x, rate=1.0, key=()), ValueError, r"rate must be in \[0, 1\), got 1\.0"),
    ],
)  # fmt: skip
def test_errors_say_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((2, 3)))
