"""The mean cross entropy: against its reference, and the laws it obeys."""

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
from npmamba.autodiff.tape import value_and_grad
from npmamba.cpu import runtime
from npmamba.ops.cross_entropy import cross_entropy, cross_entropy_backward
from npmamba.reference import cross_entropy as reference

SHAPES = ((1,), (7,), (3, 16), (9, 65), (2, 5, 31), (2, 2, 3, 33), (0, 5), (4, 5001))


def case(shape, seed, dtype=np.float64, ignored=0.3):
    """Return logits, some of them -inf, and labels that these do not forbid; about a third do not count."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    labels = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    forbidden = rng.random(shape) < 0.1
    np.put_along_axis(forbidden, labels[..., None], False, -1)
    logits[forbidden] = -np.inf
    return logits, np.where(rng.random(labels.shape) < ignored, -100, labels)


def both(logits, labels, dout=1.5):
    return cross_entropy(logits, labels), cross_entropy_backward(dout, logits, labels)


# Against the reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("vocab", [1, 7, 16, 17, 33, 48, 65])
def test_the_largest_logit_is_found_wherever_it_stands(vocab, dtype):
    """Relative to any other one its exponential is infinite."""
    logits = np.where(np.eye(vocab, dtype=bool), 2000, -2000).astype(dtype)
    assert cross_entropy(logits, np.arange(vocab)) == 0
    if vocab > 1:
        assert cross_entropy(logits[:-1], np.full(vocab - 1, vocab - 1)) == 4000


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [
        (np.float64, 1e-12, 1e-10),
        (np.float32, 1e-6, 3e-6),
        (np.float16, 1e-6, 1e-3),
        (ml_dtypes.bfloat16, 1e-6, 8e-3),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
@given(st.sampled_from(SHAPES), seeds)
def test_loss_and_gradient_are_the_references(dtype, forward, backward, shape, seed):
    logits, labels = case(shape, seed, dtype)
    loss, dlogits = both(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert dlogits.dtype == dtype
    if (labels != -100).any():
        scale = np.log(shape[-1])  # what a guess among all classes costs: a loss near 0 is a difference
        assert error(loss, reference.forward(logits, labels), scale) <= forward
    assert error(dlogits, reference.backward(1.5, logits, labels), 1.5 / max(labels.size, 1)) <= backward


@pytest.mark.parametrize("vocab", [65, 50280])
def test_the_vocabularies_of_characters_and_of_published_models_are_served(vocab):
    logits, labels = case((3, vocab), 2, np.float32)
    loss, dlogits = both(logits, labels)
    assert error(loss, reference.forward(logits, labels)) <= 1e-6
    assert error(dlogits, reference.backward(1.5, logits, labels)) <= 3e-6


def test_the_primitive_passes_the_check_of_its_gradient():
    logits, labels = case((4, 5, 17), 3)
    logits[np.isinf(logits)] = -2
    check_vjp(lambda x: cross_entropy(x, labels), logits)


def test_the_tape_gives_the_gradient_of_the_public_function():
    logits, labels = case((4, 5, 17), 3, np.float32)
    loss, dlogits = value_and_grad(lambda x: cross_entropy(x, labels))(logits)
    assert same_bits((loss, dlogits), both(logits, labels, 1.0))


# Laws


@given(st.integers(-(2**20), 2**20), seeds)
def test_adding_one_number_to_all_logits_of_a_row_changes_nothing(shift, seed):
    """To the bit, if nothing is rounded: logits are multiples of 1/16 here, shifts whole numbers."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-64, 64, (6, 33)) / 16).astype(np.float64)
    labels = rng.integers(0, 33, 6)
    assert same_bits(both(logits + shift, labels), both(logits, labels))


@given(seeds)
def test_the_gradient_of_a_row_sums_to_zero_and_only_its_label_gains(seed):
    logits, labels = case((5, 33), seed, ignored=0)
    dlogits = cross_entropy_backward(1.0, logits, labels)
    assert np.abs(dlogits.sum(-1)).max() <= 1e-15
    rows = np.arange(5)
    assert (dlogits[rows, labels] < 0).all()
    dlogits[rows, labels] = 0
    assert (dlogits >= 0).all()


@pytest.mark.parametrize("vocab", [2, 65, 4096])
def test_equal_logits_cost_the_logarithm_of_their_number(vocab):
    loss = cross_entropy(np.full((3, vocab), 7.0), np.array([0, 1, vocab - 1]))
    assert abs(loss - np.log(vocab)) <= 1e-15 * np.log(vocab)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seeds)
def test_rows_are_independent_and_the_mean_is_that_of_the_rows_that_count(dtype, seed):
    logits, labels = case((2, 20, 33), seed, dtype, ignored=0)
    loss, dlogits = both(logits, labels, 40.0)
    alone = [cross_entropy(logits[place], np.asarray(labels[place])) for place in np.ndindex(2, 20)]
    assert error(loss, np.mean(alone, dtype=np.float64)) <= (1e-15 if dtype == np.float64 else 1e-7)
    b, t = np.random.default_rng(seed).integers(0, (2, 20))
    assert same_bits(cross_entropy_backward(1.0, logits[b, t], np.asarray(labels[b, t])), dlogits[b, t])


@given(seeds)
def test_ignored_rows_are_as_if_absent(seed):
    logits, labels = case((40, 33), seed)
    logits[labels == -100] = np.nan
    keep = labels != -100
    loss, dlogits = both(logits, labels)
    kept_loss, kept = both(logits[keep], labels[keep])
    assert error(loss, kept_loss) <= 1e-15
    assert same_bits(dlogits[keep], kept)
    assert same_bits(dlogits[~keep], np.zeros_like(dlogits[~keep]))


def test_any_integer_can_be_the_one_to_ignore():
    logits, labels = case((40, 33), 4)
    unsigned = np.where(labels == -100, 255, labels).astype(np.uint8)
    other = cross_entropy(logits, unsigned, ignore_index=255)
    assert same_bits(other, cross_entropy(logits, labels))
    assert same_bits(cross_entropy_backward(1.5, logits, unsigned, ignore_index=255), both(logits, labels)[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    arguments = case((131, 65), 5, dtype)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(both(*arguments))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.mark.parametrize("shape", [(70, 9), (2, 35, 9), (2, 5, 7, 9)])
def test_any_memory_gives_the_same_bits(shape):
    logits, labels = case(shape, 6, np.float32)
    expected = both(logits, labels)
    for name, x in layouts(logits).items():
        assert same_bits(both(x, labels), expected), name
    for name, x in layouts(labels).items():
        assert same_bits(both(logits, x), expected), name
    for kind in (np.int8, np.int16, np.int32):
        assert same_bits(both(logits, labels.astype(kind)), expected)


def test_inputs_are_left_as_they_are():
    logits, labels = case((6, 33), 7)
    copies = logits.copy(), labels.copy()
    both(logits, labels)
    assert same_bits((logits, labels), copies)


# Where numbers end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("where", [0, 16, 32])
def test_nan_in_a_row_that_counts_gives_nan(dtype, where):
    logits, labels = case((3, 33), 8, dtype, ignored=0)
    logits[1, where] = np.nan
    loss, dlogits = both(logits, labels)
    assert np.isnan(loss)
    assert np.isnan(dlogits).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_neither_overflow_nor_lose_the_difference(dtype):
    logits = np.array([[1e30, -1e30, 0], [1000, 999, 1000], [-1e30, -1e30, -1e30]], dtype)
    loss, dlogits = both(logits, np.array([0, 1, 2]))
    assert error(loss, (0 + np.log(2 + np.exp(-1)) + 1 + np.log(3)) / 3) <= 1e-6
    assert error(dlogits, reference.backward(1.5, logits, np.array([0, 1, 2]))) <= 3e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minus_infinity_forbids_a_class(dtype):
    logits = np.array([[-np.inf, 0.0, 0.0]], dtype)
    assert error(cross_entropy(logits, np.array([1])), np.log(2)) <= 1e-7
    assert cross_entropy(logits, np.array([0])) == np.inf
    np.testing.assert_array_equal(cross_entropy_backward(1.0, logits, np.array([1])), [[0, -0.5, 0.5]])


def test_without_a_row_that_counts_there_is_no_mean_and_no_gradient():
    for logits, labels in [(np.zeros((2, 3)), np.array([-100, -100])), (np.zeros((0, 3)), np.zeros(0, int))]:
        loss, dlogits = both(logits, labels)
        assert np.isnan(loss)
        assert same_bits(dlogits, np.zeros(logits.shape))


# Errors


L, T = np.zeros((2, 3, 5)), np.zeros((2, 3), int)
OUT_OF_RANGE = np.array([[0, 1, -100], [-1, 5, 0]])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: cross_entropy([0.0], T),
            TypeError,
            "cross_entropy: logits must be a NumPy or CuPy array, got list",
        ),
        (lambda: cross_entropy(L, None), TypeError, "cross_entropy: labels must be a NumPy or CuPy array, got None"),
        (
            lambda: cross_entropy(np.zeros(()), T),
            ValueError,
            "cross_entropy: logits has 0 axes; logits must be (..., vocab), got shape ()",
        ),
        (
            lambda: cross_entropy(L[..., :0], T),
            ValueError,
            "cross_entropy: logits has vocab=0; vocab must be at least 1",
        ),
        (
            lambda: cross_entropy(L, T[:1]),
            ValueError,
            "cross_entropy: labels has shape (1, 3), but logits has shape (2, 3, 5); "
            "labels must be (...) where logits is (..., vocab)",
        ),
        (
            lambda: cross_entropy(L.astype(int), T),
            TypeError,
            "cross_entropy: logits must be float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda: cross_entropy(L, T.astype(float)),
            TypeError,
            "cross_entropy: labels must be an array of integers, got float64",
        ),
        (
            lambda: cross_entropy(L, T, ignore_index=1.0),
            TypeError,
            "cross_entropy: ignore_index must be an integer, got float",
        ),
        (
            lambda: cross_entropy(L, OUT_OF_RANGE),
            ValueError,
            "cross_entropy: labels[1, 0] is -1, but logits has vocab=5; "
            "labels must be from 0 to 4, or ignore_index=-100",
        ),
        (
            lambda: cross_entropy(L, OUT_OF_RANGE, ignore_index=-1),
            ValueError,
            "cross_entropy: labels[0, 2] is -100, but logits has vocab=5; "
            "labels must be from 0 to 4, or ignore_index=-1",
        ),
        (
            lambda: cross_entropy(L[0, 0], np.array(5)),
            ValueError,
            "cross_entropy: labels is 5, but logits has vocab=5; labels must be from 0 to 4, or ignore_index=-100",
        ),
        (
            lambda: cross_entropy_backward(1.0, L, T + 5),
            ValueError,
            "cross_entropy_backward: labels[0, 0] is 5, but logits has vocab=5; "
            "labels must be from 0 to 4, or ignore_index=-100",
        ),
        (
            lambda: cross_entropy_backward(np.ones(2), L, T),
            ValueError,
            "cross_entropy_backward: dout must be a number or an array of shape (), got shape (2,)",
        ),
        (
            lambda: cross_entropy_backward("1", L, T),
            TypeError,
            "cross_entropy_backward: dout must be a NumPy or CuPy array, got str",
        ),
        (
            lambda: cross_entropy_backward(None, L, T),
            TypeError,
            "cross_entropy_backward: dout must be a NumPy or CuPy array, got None",
        ),
        (
            lambda: cross_entropy_backward(np.ones((), np.float32), L, T),
            TypeError,
            "cross_entropy_backward: dout must be float64 because logits is float64, got float32",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


# The page, and the kernels without the compiler


def test_the_worked_example_of_the_page_holds():
    page = Path(npmamba.ops.__file__).with_name("cross_entropy.md")
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert (failed, attempted > 3) == (0, True)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.ops.cross_entropy import cross_entropy, cross_entropy_backward
from npmamba.reference import cross_entropy as reference
rng = np.random.default_rng(0)
logits, labels = rng.standard_normal((5, 65)), rng.integers(0, 65, 5)
labels[3] = -100
np.testing.assert_allclose(cross_entropy(logits, labels), reference.forward(logits, labels), rtol=1e-13)
found, expected = (f(1.5, logits, labels) for f in (cross_entropy_backward, reference.backward))
np.testing.assert_allclose(found, expected, rtol=1e-11)
loss = cross_entropy(logits.astype(np.float32), labels)
assert loss.dtype == np.float32 and abs(loss - reference.forward(logits, labels)) < 1e-6
""")
