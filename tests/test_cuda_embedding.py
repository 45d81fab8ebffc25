"""The CUDA twin of the token embedding, and the sort of tokens beneath it."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, same_bits
from cases import seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npmamba.cuda import embedding as twin
from npmamba.cuda import token_order as order
from npmamba.cuda.blockwise import make_block, total
from npmamba.cuda.token_order import token_order
from npmamba.ops import embedding as public
from npmamba.reference import embedding as reference

VOCABS, WIDTHS = (1, 3, 9), (1, 7, 16, 33)
SHAPES = ((), (0,), (9,), (3, 13), (2, 0, 3), (45,))
TOLERANCES = {np.float64: 1e-14, np.float32: 1e-6, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda t: np.dtype(t).name)
sizes = st.tuples(st.sampled_from(VOCABS), st.sampled_from(WIDTHS), st.sampled_from(SHAPES))


def case(vocab, d_model, shape, seed, dtype=np.float32):
    """Return weight, input_ids and dout; small ids come often, as words do."""
    rng = np.random.default_rng(seed)
    ids = np.asarray((vocab * rng.random(shape) ** 3).astype(np.int64))
    weight, dout = rng.standard_normal((vocab, d_model)), rng.standard_normal((*shape, d_model))
    return weight.astype(dtype), ids, dout.astype(dtype)


@contextlib.contextmanager
def small_tiles(backend):
    """Let a tile have 64 tokens in the interpreter, and a pass of the sort six bits."""
    if backend.fast:
        yield
        return
    tile = {"TILE": 64, "WARPS": 2, "_sum_before": make_block(total, 64)[1]}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(order, **tile))
        stack.enter_context(mock.patch.object(twin, "token_order", functools.partial(token_order, bits=6)))
        for kernel in (order.COUNT, order.MOVE):
            stack.enter_context(mock.patch.object(kernel, "threads", 64))
        yield


def looked_up(backend, weight, ids, *, seed=None, check="races"):
    weight, ids = backend.array(weight), backend.array(ids)
    with backend.running(seed, check=check):
        out, _ = twin.forward(weight, ids, save=False)
    return backend.numpy(out)


def gradient(backend, dout, ids, vocab, *, seed=None, check="races", many=twin.MANY):
    dout, ids = backend.array(dout), backend.array(ids)
    with small_tiles(backend), mock.patch.object(twin, "MANY", many), backend.running(seed, check=check):
        (dweight,) = twin.backward(dout, twin.Saved(ids, vocab))
    return backend.numpy(dweight)


# Against the reference


@dtypes
@settings(max_examples=4)
@given(sizes, seeds)
def test_rows_are_picked_to_the_bit(device_backend, dtype, sizes, seed):
    weight, ids, _ = case(*sizes, seed, dtype)
    assert same_bits(looked_up(device_backend, weight, ids, seed=seed), weight[ids])


@pytest.mark.parametrize("d_model", [6, 7, 16])
def test_every_pattern_of_bits_is_copied(device_backend, d_model):
    bits = np.random.default_rng(1).integers(0, 2**16, (9, d_model), np.uint16) | 0x7C00  # NaN and infinity only
    ids = np.array([3, 0, 8])
    shifted = np.append(np.uint16(0), bits)[1:].reshape(bits.shape)  # two bytes behind a multiple of four
    for dtype in (np.float16, ml_dtypes.bfloat16):
        for table in (bits, shifted):
            found = looked_up(device_backend, table.view(dtype), ids)
            assert same_bits(found.view(np.uint16), bits[ids])


@dtypes
@settings(max_examples=3)
@given(sizes, st.sampled_from([twin.MANY, 0]), seeds)
def test_the_gradient_is_the_references(device_backend, dtype, sizes, many, seed):
    _, ids, dout = case(*sizes, seed, dtype)
    found = gradient(device_backend, dout, ids, sizes[0], seed=seed, many=many, check=False)
    assert found.dtype == dtype
    assert error(found, reference.backward(dout, ids, sizes[0])) <= TOLERANCES[dtype]


@pytest.mark.parametrize("many", [twin.MANY, 0])
@pytest.mark.parametrize(
    "split",
    [(110,), (1, 100, 1), (31, 33, 32), (64, 63, 5), (10, 64, 3), (40, 70, 33, 66, 0, 130), (32, 32, 1, 63, 65)],
)
def test_ids_of_whole_chunks_and_of_parts_are_summed(device_backend, many, split):
    """The sorted tokens of an id may begin and end anywhere between the chunks of 32; a block may own several ids."""
    ids = np.random.default_rng(2).permutation(np.repeat(np.arange(len(split)), split))
    dout = np.random.default_rng(3).standard_normal((ids.size, 4)).astype(np.float32)
    found = gradient(device_backend, dout, ids, len(split), many=many, check=False)
    assert error(found, reference.backward(dout, ids, len(split))) <= 1e-6


@pytest.mark.parametrize("many", [twin.MANY, 0])
@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16], ids=["float64", "bfloat16"])
def test_wide_rows_are_divided_among_blocks_or_steps(device_backend, many, dtype):
    for width in (200, 776):
        _, ids, dout = case(2, width, (40 if width == 200 else 9,), 4, dtype)
        found = gradient(device_backend, dout, ids, 2, many=many, check=False)
        assert error(found, reference.backward(dout, ids, 2)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("many", [twin.MANY, 0])
def test_no_two_threads_write_what_others_read(device_backend, many):
    ids = np.repeat(np.arange(4), (70, 3, 33, 0))
    dout = np.random.default_rng(14).standard_normal((ids.size, 12)).astype(np.float32)
    found = gradient(device_backend, dout, ids, 4, many=many, seed=3)
    assert error(found, reference.backward(dout, ids, 4)) <= 1e-6


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_without_tokens_there_are_no_rows_and_every_gradient_is_zero(device_backend, shape):
    weight, ids, dout = case(5, 8, shape, 16)
    assert looked_up(device_backend, weight, ids).shape == (*shape, 8)
    assert same_bits(gradient(device_backend, dout, ids, 5), np.zeros((5, 8), np.float32))


def test_rows_of_dout_that_no_single_stride_walks_are_copied(device_backend):
    _, ids, dout = case(5, 8, (3, 6), 15)
    part = np.concatenate([dout, dout], 1)[:, :6]
    assert same_bits(gradient(device_backend, part, ids, 5), gradient(device_backend, dout, ids, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("vocab", "d_model"), [(65, 384), (50280, 768), (256, 100), (70_000, 64), (1, 64)])
def test_models_sizes_are_served_and_give_the_same_bits_twice(device_backend, dtype, vocab, d_model):
    weight, ids, dout = case(vocab, d_model, (16, 1024), 5, dtype)
    assert same_bits(looked_up(device_backend, weight, ids), weight[ids])
    found = gradient(device_backend, dout, ids, vocab)
    wanted = np.zeros((vocab, d_model))
    np.add.at(wanted, ids.reshape(-1), dout.reshape(-1, d_model).astype(np.float64))
    assert error(found, wanted) <= TOLERANCES[dtype]
    assert same_bits(gradient(device_backend, dout, ids, vocab), found)


# Laws


def test_any_order_of_the_threads_gives_the_same_bits(device_backend):
    _, ids, dout = case(3, 9, (40,), 6)
    assert same_bits(gradient(device_backend, dout, ids, 3, seed=1), gradient(device_backend, dout, ids, 3, seed=2))


@pytest.mark.parametrize("d_model", [9, 16])
def test_any_strides_give_the_same_bits(device_backend, d_model):
    weight, ids, dout = case(3, d_model, (2, 5), 7)
    wanted = gradient(device_backend, dout, ids, 3, check=False)
    for layout in ("fortran", "every second column", "part of a row", "negative strides"):
        changed = [layouts(x)[layout] for x in (weight, ids, dout)]
        assert same_bits(looked_up(device_backend, *changed[:2], check=False), weight[ids]), layout
        assert same_bits(gradient(device_backend, changed[2], changed[1], 3, check=False), wanted), layout
    for kind in (np.uint8, np.int32):
        assert same_bits(gradient(device_backend, dout, ids.astype(kind), 3, check=False), wanted), kind


def test_whole_numbers_are_summed_exactly_in_any_order(device_backend):
    rng = np.random.default_rng(8)
    ids, dout = rng.integers(0, 3, 80), rng.integers(-9, 9, (80, 5)).astype(np.float32)
    by = rng.permutation(80)
    found = gradient(device_backend, dout, ids, 3, check=False)
    assert same_bits(gradient(device_backend, dout[by], ids[by], 3, check=False), found)


def test_a_row_of_many_tokens_keeps_float32s_accuracy(device_backend):
    """Summed one by one in float32, a hundred thousand tokens would be off by 1e-4."""
    count = 100_000 if device_backend.fast else 300
    dout, ids = np.full((count, 1), 0.1, np.float32), np.zeros(count, np.int64)
    wanted = reference.backward(dout, ids, 1)
    assert error(gradient(device_backend, dout, ids, 1, check=False), wanted) <= 5e-7


def test_nan_and_infinity_stay_in_their_row_and_channel(device_backend):
    _, ids, dout = case(5, 33, (20,), 9)
    dout[7, 20], dout[9, 3] = np.nan, np.inf
    found = gradient(device_backend, dout, ids, 5, check=False)
    assert np.argwhere(np.isnan(found)).tolist() == [[ids[7], 20]]
    assert np.argwhere(np.isinf(found)).tolist() == [[ids[9], 3]]


@dtypes
@pytest.mark.parametrize("d_model", [7, 16])
def test_an_id_that_is_no_row_gives_nan_and_no_gradient(device_backend, dtype, d_model):
    weight, ids, dout = case(5, d_model, (6,), 10, dtype)
    ids[1:4] = -1, 5, 2**40
    wrong = np.isin(np.arange(6), [1, 2, 3])
    out = looked_up(device_backend, weight, ids)
    assert np.isnan(out[wrong]).all()
    assert same_bits(out[~wrong], weight[ids[~wrong]])
    found = gradient(device_backend, dout, ids, 5)
    assert error(found, reference.backward(dout[~wrong], ids[~wrong], 5)) <= TOLERANCES[dtype]


def test_all_of_a_long_row_is_nan_for_an_id_that_is_no_row(device_backend):
    found = looked_up(device_backend, np.zeros((2, 700), np.float32), np.array([2, 1]), check=False)
    assert np.isnan(found[0]).all()
    assert not found[1].any()


# The sort


@settings(max_examples=4)
@given(st.sampled_from([(1, 1), (9, 5), (150, 7), (20, 5000)]), seeds)
@example((20, 5000), 0)
def test_tokens_are_sorted_stably_by_their_ids(device_backend, sizes, seed):
    """Several passes of four bits here; ids that are no row come last."""
    count, vocab = sizes
    ids = np.random.default_rng(seed).integers(-1, vocab + 1, count)
    with small_tiles(device_backend):
        keys, tokens = device_backend.call(token_order, ids, vocab, 4, seed=seed)
    clipped = np.where((ids < 0) | (ids >= vocab), vocab, ids)
    assert tokens.tolist() == np.argsort(clipped, kind="stable").tolist()
    assert keys.tolist() == clipped[tokens].tolist()


def test_counts_are_summed_over_any_number_of_tiles(device_backend):
    counts = np.random.default_rng(11).integers(0, 256, (2, 600)).astype(np.uint32)
    arrays = device_backend.array(counts.copy()), device_backend.array(np.zeros(2, np.uint32))
    with device_backend.running(seed=1):
        order.SUM_TILES.launch((2,), order.KEY, (*arrays, 600))
    before, totals = map(device_backend.numpy, arrays)
    assert before.tolist() == (counts.cumsum(1) - counts).tolist()
    assert totals.tolist() == counts.sum(1).tolist()


# On the device alone


@pytest.mark.gpu
def test_the_public_functions_take_cupy_arrays(device_backend):
    weight, ids, dout = case(65, 48, (3, 70), 12)
    x, tokens, d = map(device_backend.array, (weight, ids, dout))
    assert same_bits(device_backend.numpy(public.embedding(x, tokens)), weight[ids])
    found = device_backend.numpy(public.embedding_backward(d, tokens, 65))
    assert error(found, reference.backward(dout, ids, 65)) <= 1e-6


@pytest.mark.gpu
def test_arrays_of_more_than_2_to_the_31_numbers(device_backend):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.Device().mem_info[0] < 30e9:
        pytest.skip("needs 30 GB of memory on the device")
    count = 1_100_000
    weight, ids = cupy.arange(3, dtype=np.float16).repeat(2048).reshape(3, 2048), cupy.arange(count) % 3
    out, saved = twin.forward(weight, ids, save=True)
    assert (out[-1] == (count - 1) % 3).all()
    assert (out[1_050_000] == 0).all()
    out[...] = 2**-10
    (dweight,) = twin.backward(out, saved)
    assert cupy.abs(dweight.astype(np.float32) - count / 3 / 1024).max() < 1
