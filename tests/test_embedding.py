"""Token embedding: against its reference, and the laws it obeys."""

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
from npmamba.cpu.embedding import BLOCK_VECTORS, TOKENS
from npmamba.cpu.simd import LANES
from npmamba.ops.embedding import embedding, embedding_backward
from npmamba.reference import embedding as reference

VOCABS, WIDTHS = (1, 2, 5, 65), (1, 7, 16, 33, 300)
SHAPES = ((), (0,), (1,), (9,), (3, 70), (2, 0, 3), (2, 3, 5))


def case(vocab, d_model, shape, seed, dtype=np.float64):
    """Return weight, input_ids and dout; small ids come often, as words do."""
    rng = np.random.default_rng(seed)
    ids = np.asarray((vocab * rng.random(shape) ** 3).astype(np.int64))
    weight, dout = rng.standard_normal((vocab, d_model)), rng.standard_normal((*shape, d_model))
    return weight.astype(dtype), ids, dout.astype(dtype)


sizes = st.tuples(st.sampled_from(VOCABS), st.sampled_from(WIDTHS), st.sampled_from(SHAPES))


# Against the reference


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ">f4"])
@given(sizes, seeds)
def test_rows_are_picked_to_the_bit(dtype, sizes, seed):
    weight, ids, _ = case(*sizes, seed)
    weight = weight.astype(dtype)
    out = embedding(weight, ids)
    assert same_bits(out, weight.astype(weight.dtype.newbyteorder("="))[ids])
    assert not np.shares_memory(out, weight)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-14), (np.float32, 3e-6), (np.float16, 1e-3), (ml_dtypes.bfloat16, 8e-3)],
    ids=["float64", "float32", "float16", "bfloat16"],
)
@given(sizes, seeds)
def test_the_gradient_is_the_references(dtype, tolerance, sizes, seed):
    _, ids, dout = case(*sizes, seed, dtype)
    dweight = embedding_backward(dout, ids, sizes[0])
    assert dweight.dtype == dtype
    assert error(dweight, reference.backward(dout, ids, sizes[0])) <= tolerance


def test_the_primitive_passes_the_check_of_its_gradient():
    weight, ids, dout = case(5, 7, (3, 4), 1)
    check_vjp(lambda weight: embedding(weight, ids), weight)
    _, pull = pullback(lambda weight: embedding(weight, ids), weight)
    assert same_bits(pull(dout)[0], embedding_backward(dout, ids, 5))


@pytest.mark.parametrize("tokens", [3, TOKENS + 3])
def test_there_may_be_more_channels_than_one_block_has(tokens):
    _, ids, dout = case(1, 2 * BLOCK_VECTORS * LANES[np.dtype(np.float64)] + 3, (tokens,), 1)
    assert error(embedding_backward(dout, ids, 1), reference.backward(dout, ids, 1)) <= 1e-12


# Laws


@given(sizes, seeds)
def test_the_gradient_is_the_product_with_the_matrix_of_ones_and_zeros(sizes, seed):
    """out = P weight with P[t, id_t] = 1, so dweight = P^T dout."""
    _, ids, dout = case(*sizes, seed)
    P = (ids.reshape(-1, 1) == np.arange(sizes[0])).astype(np.float64)
    dweight = embedding_backward(dout, ids, sizes[0])
    np.testing.assert_allclose(dweight, P.T @ dout.reshape(-1, sizes[1]), rtol=0, atol=1e-12)


@given(seeds)
def test_whole_numbers_are_summed_exactly_in_any_order(seed):
    rng = np.random.default_rng(seed)
    ids, dout = rng.integers(0, 3, 500), rng.integers(-9, 9, (500, 33)).astype(np.float32)
    order = rng.permutation(500)
    assert same_bits(embedding_backward(dout[order], ids[order], 3), embedding_backward(dout, ids, 3))


def test_a_row_of_many_tokens_keeps_float32s_accuracy():
    """Summed one by one in float32, these tokens would be off by 1e-4."""
    dout, ids = np.full((100_000, 1), 0.1, np.float32), np.zeros(100_000, np.int64)
    one_by_one = np.add.accumulate(dout)[-1:]
    assert error(one_by_one, reference.backward(dout, ids, 1)) > 1e-5
    assert error(embedding_backward(dout, ids, 1), reference.backward(dout, ids, 1)) <= 1e-6


@given(seeds)
def test_tokens_of_one_row_do_not_touch_another(seed):
    _, ids, dout = case(5, 33, (200,), seed, np.float32)
    dweight = embedding_backward(dout, ids, 5)
    for k in range(5):
        mine = ids == k
        assert same_bits(embedding_backward(dout[mine], ids[mine], 5)[k], dweight[k])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    _, ids, dout = case(65, 300, (700,), 2, dtype)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(embedding_backward(dout, ids, 65))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.mark.parametrize("shape", [(70,), (2, 35), (2, 5, 7)])
def test_any_memory_gives_the_same_bits(shape):
    weight, ids, dout = case(5, 9, shape, 3, np.float32)
    out, dweight = embedding(weight, ids), embedding_backward(dout, ids, 5)
    for name, x in layouts(weight).items():
        assert same_bits(embedding(x, ids), out), name
    for name, x in layouts(dout).items():
        assert same_bits(embedding_backward(x, ids, 5), dweight), name
    for name, x in layouts(ids).items():
        assert same_bits((embedding(weight, x), embedding_backward(dout, x, 5)), (out, dweight)), name
    for kind in (np.int8, np.uint8, np.int32, np.uint64):
        x = ids.astype(kind)
        assert same_bits((embedding(weight, x), embedding_backward(dout, x, 5)), (out, dweight)), kind


def test_inputs_are_left_as_they_are():
    arguments = case(5, 33, (9,), 4)
    copies = tuple(x.copy() for x in arguments)
    weight, ids, dout = arguments
    embedding(weight, ids), embedding_backward(dout, ids, 5)
    assert same_bits(arguments, copies)


def test_nan_stays_in_its_row_and_channel():
    _, ids, dout = case(5, 33, (40,), 5)
    dout[7, 20] = np.nan
    assert np.argwhere(np.isnan(embedding_backward(dout, ids, 5))).tolist() == [[ids[7], 20]]


# Errors


W, I = np.zeros((5, 3)), np.zeros((2, 4), int)  # noqa: E741
OUT_OF_RANGE = np.array([[0, 4, 4, 4], [0, 1, 5, -1]])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: embedding([[1.0]], I), TypeError, "embedding: weight must be a NumPy or CuPy array, got list"),
        (lambda: embedding(W, [1]), TypeError, "embedding: input_ids must be a NumPy or CuPy array, got list"),
        (lambda: embedding(None, I), TypeError, "embedding: weight must be a NumPy or CuPy array, got None"),
        (
            lambda: embedding(W[0], I),
            ValueError,
            "embedding: weight has 1 axes; weight must be (vocab_size, d_model), got shape (3,)",
        ),
        (
            lambda: embedding(W[:0], I),
            ValueError,
            "embedding: weight has vocab_size=0; vocab_size must be at least 1",
        ),
        (
            lambda: embedding(W.astype(int), I),
            TypeError,
            "embedding: weight must be float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda: embedding(W, I.astype(bool)),
            TypeError,
            "embedding: input_ids must be an array of integers, got bool",
        ),
        (
            lambda: embedding(W, OUT_OF_RANGE),
            ValueError,
            "embedding: input_ids[1, 2] is 5, but vocab_size=5; ids must be from 0 to 4",
        ),
        (
            lambda: embedding(W, np.array(-1)),
            ValueError,
            "embedding: input_ids is -1, but vocab_size=5; ids must be from 0 to 4",
        ),
        (
            lambda: embedding_backward(np.zeros((2, 4, 3)), OUT_OF_RANGE, 5),
            ValueError,
            "embedding_backward: input_ids[1, 2] is 5, but vocab_size=5; ids must be from 0 to 4",
        ),
        (
            lambda: embedding_backward(np.zeros((2, 3)), I, 5),
            ValueError,
            "embedding_backward: dout has shape (2, 3), but input_ids has shape (2, 4); "
            "dout must be (..., d_model) where input_ids is (...)",
        ),
        (
            lambda: embedding_backward(None, I, 5),
            TypeError,
            "embedding_backward: dout must be a NumPy or CuPy array, got None",
        ),
        (
            lambda: embedding_backward(np.zeros((2, 4, 3)), I, 5.0),
            TypeError,
            "embedding_backward: vocab_size must be an integer, got float",
        ),
        (
            lambda: embedding_backward(np.zeros((2, 4, 3)), I, 0),
            ValueError,
            "embedding_backward: vocab_size must be at least 1, got 0",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


# The page, and the kernels without the compiler


def test_the_worked_example_of_the_page_holds():
    page = Path(npmamba.ops.__file__).with_name("embedding.md")
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert (failed, attempted > 3) == (0, True)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.ops.embedding import embedding, embedding_backward
from npmamba.reference import embedding as reference
rng = np.random.default_rng(0)
ids, dout = rng.integers(0, 2, 150), rng.standard_normal((150, 19))
np.testing.assert_allclose(embedding_backward(dout, ids, 3), reference.backward(dout, ids, 3), atol=1e-13)
""")
