"""The CUDA twin of the cross entropy: the reference's numbers, and where numbers and labels end."""

from __future__ import annotations

import contextlib
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, same_bits
from cases import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cuda import cross_entropy as twin
from npmamba.cuda import cross_entropy_backward, cross_entropy_forward, cross_entropy_short
from npmamba.ops import cross_entropy as public
from npmamba.reference import cross_entropy as reference

SHAPES = ((1,), (7,), (3, 16), (11, 65), (2, 5, 31), (2, 2, 3, 33))
TOLERANCES = {
    np.float64: (1e-12, 1e-10),
    np.float32: (1e-6, 3e-6),
    np.float16: (1e-6, 1e-3),
    ml_dtypes.bfloat16: (1e-6, 8e-3),
}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda t: np.dtype(t).name)
IGNORED = -100


def case(shape, seed, dtype=np.float32, ignored=0.3):
    """Return logits, some of them -inf, and labels that these do not forbid; about a third do not count."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    labels = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    forbidden = rng.random(shape) < 0.1
    np.put_along_axis(forbidden, labels[..., None], False, -1)
    logits[forbidden] = -np.inf
    return logits, np.where(rng.random(labels.shape) < ignored, IGNORED, labels)


@contextlib.contextmanager
def small_blocks(backend, **patched):
    """Let the second kernel have two warps in the interpreter, and what is patched beside it."""
    with contextlib.ExitStack() as stack:
        for name, value in patched.items():
            for module in (twin, cross_entropy_backward, cross_entropy_short):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        if not backend.fast:
            stack.enter_context(mock.patch.object(cross_entropy_forward, "ADDERS", 64))
            stack.enter_context(mock.patch.object(twin.MEAN, "threads", 64))
        yield


def both(backend, logits, labels, dout=1.5, *, ignore_index=IGNORED, seed=None, check="races", **patched):
    """Return the loss and the gradient."""
    dout = np.asarray(dout, np.float64 if logits.dtype == np.float64 else np.float32)
    logits, labels, dout = (backend.array(np.asarray(x)) for x in (logits, labels, dout))
    with small_blocks(backend, **patched), backend.running(seed, check=check):
        loss, saved = twin.forward(logits, labels, ignore_index=ignore_index, save=True)
        (dlogits,) = twin.backward(dout, saved)
    return backend.numpy(loss), backend.numpy(dlogits)


def assert_close(found, logits, labels, forward, backward):
    scale = np.log(logits.shape[-1])  # what a guess among all classes costs: a loss near 0 is a difference
    assert found[0].shape == ()
    assert found[0].dtype == (np.float64 if logits.dtype == np.float64 else np.float32)
    assert found[1].dtype == logits.dtype
    if (labels == IGNORED).all():
        assert np.isnan(found[0])
    else:
        assert error(found[0], reference.forward(logits, labels), scale) <= forward
    assert error(found[1], reference.backward(1.5, logits, labels), 1.5 / max(labels.size, 1)) <= backward


# Against the reference


@dtypes
@settings(max_examples=4)
@given(st.sampled_from(SHAPES), seeds)
def test_loss_and_gradient_are_the_references(device_backend, dtype, shape, seed):
    logits, labels = case(shape, seed, dtype)
    assert_close(both(device_backend, logits, labels, seed=seed), logits, labels, *TOLERANCES[dtype])


@dtypes
@pytest.mark.parametrize("vocab", [1032, 1029])
def test_a_long_row_belongs_to_a_block(device_backend, dtype, vocab):
    logits, labels = case((2, vocab), 1, dtype, ignored=0)
    found = both(device_backend, logits, labels, SHORT=1000, check=False)
    assert_close(found, logits, labels, *TOLERANCES[dtype])


def test_a_very_long_row_is_read_in_chunks_and_written_by_several_blocks(device_backend):
    logits, labels = case((2, 5001), 2, ignored=0)
    assert_close(both(device_backend, logits, labels, SPAN=4096, check=False), logits, labels, 1e-6, 3e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "vocab"), [(300, 17), (60, 65), (20, 256), (33, 300)])
def test_teams_of_any_size_take_row_after_row(device_backend, dtype, rows, vocab):
    logits, labels = case((rows, vocab), 12, dtype)
    blocks = {"FORWARD_BLOCKS": 1, "BACKWARD_BLOCKS": 2}
    found = both(device_backend, logits, labels, check="races" if vocab < 65 else False, **blocks)
    assert_close(found, logits, labels, *TOLERANCES[dtype])
    assert same_bits(both(device_backend, logits, labels, check=False)[1], found[1])


def test_a_teams_row_is_read_in_chunks(device_backend):
    logits, labels = case((9, 700), 3)
    assert_close(both(device_backend, logits, labels, check=False), logits, labels, 1e-6, 3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(16384, 65), (300, 50280), (300, 50257), (5000, 256)])
def test_models_sizes_are_served_and_give_the_same_bits_twice(device_backend, dtype, rows, vocab):
    logits, labels = case((rows, vocab), 4, dtype)
    found = both(device_backend, logits, labels)
    assert_close(found, logits, labels, *TOLERANCES[dtype])
    assert same_bits(both(device_backend, logits, labels), found)


# Laws


def test_any_order_of_the_threads_gives_the_same_bits(device_backend):
    arguments = case((11, 40), 5)
    assert same_bits(both(device_backend, *arguments, seed=1), both(device_backend, *arguments, seed=2))


@pytest.mark.parametrize("vocab", [9, 16])
def test_any_strides_give_the_same_bits(device_backend, vocab):
    """Rows of 16 are read by 16 bytes where they are aligned; that any other way is taken must not show."""
    logits, labels = case((2, 3, vocab), 6)
    wanted = both(device_backend, logits, labels, check=False)
    for layout in ("fortran", "every second column", "part of a row", "negative strides"):
        found = both(device_backend, layouts(logits)[layout], layouts(labels)[layout], check=False)
        assert same_bits(found, wanted), layout
    wider = np.concatenate([logits, logits], 1)
    assert same_bits(both(device_backend, wider[:, :3], labels.astype(np.int32), check=False), wanted)


def test_rows_have_the_same_bits_alone_and_the_mean_is_that_of_the_rows_that_count(device_backend):
    logits, labels = case((3, 17), 7, ignored=0)
    loss, dlogits = both(device_backend, logits, labels, 3.0)
    alone = [both(device_backend, logits[k], labels[k], 1.0) for k in range(3)]
    assert error(loss, np.mean([one for one, _ in alone], dtype=np.float64)) <= 1e-7
    assert same_bits(np.stack([gradient for _, gradient in alone]), dlogits)


def test_ignored_rows_are_as_if_absent_whatever_stands_in_them(device_backend):
    logits, labels = case((12, 17), 8)
    keep = labels != IGNORED
    logits[~keep] = np.nan
    loss, dlogits = both(device_backend, logits, labels)
    kept_loss, kept = both(device_backend, logits[keep], labels[keep])
    assert error(loss, kept_loss) <= 1e-7
    assert same_bits(dlogits[keep], kept)
    assert same_bits(dlogits[~keep], np.zeros_like(dlogits[~keep]))


@pytest.mark.parametrize("vocab", [17, 40])
def test_what_is_read_in_the_place_of_ignored_rows_is_not_counted(device_backend, vocab):
    """A team whose turn is an ignored row's reads the first row, which may itself be ignored."""
    logits, labels = case((70, vocab), 13, ignored=0)
    labels[:1], labels[5:50], labels[69:] = IGNORED, IGNORED, IGNORED
    logits[0] = np.nan
    loss, dlogits = both(device_backend, logits, labels, FORWARD_BLOCKS=1)
    keep = labels != IGNORED
    kept_loss, kept = both(device_backend, logits[keep], labels[keep])
    assert error(loss, kept_loss) <= 1e-7
    assert same_bits(dlogits[keep], kept)


@pytest.mark.parametrize("vocab", [3, 40])
def test_an_ignored_row_keeps_a_sum_of_one_and_a_largest_logit_of_zero(device_backend, vocab):
    logits, labels = case((70, vocab), 21)
    with small_blocks(device_backend, FORWARD_BLOCKS=1), device_backend.running(check="races"):
        _, saved = twin.forward(*map(device_backend.array, (logits, labels)), ignore_index=IGNORED, save=True)
    tops, sums = device_backend.numpy(saved.tops), device_backend.numpy(saved.sums)
    there = labels != IGNORED
    assert same_bits(tops, np.where(there, logits.max(1), 0).astype(np.float32))
    assert (sums[~there] == 1).all()
    wanted = np.exp(logits[there] - logits[there].max(1, keepdims=True)).sum(1)
    assert error(sums[there], wanted) <= 1e-6


def test_so_many_rows_that_32_bits_do_not_number_them_belong_to_blocks():
    """Each warp takes as many, so the last ones number rows that are not there."""
    for rows in (1, 2**31, cross_entropy_short.MOST):
        for p in range(6):
            share, blocks = cross_entropy_short.forward_share(rows, p)
            assert rows <= share * cross_entropy_short.WARPS * blocks < 2**32
    beyond = [cross_entropy_short.forward_share(2**32 - 1, p) for p in range(6)]
    assert all(share * cross_entropy_short.WARPS * blocks > 2**32 for share, blocks in beyond)


@pytest.mark.parametrize("vocab", [1032, 1029])
def test_an_ignored_row_that_belongs_to_a_block_is_never_read(device_backend, vocab):
    logits, labels = case((3, vocab), 8, ignored=0)
    labels[1] = IGNORED
    kept_loss, kept = both(device_backend, logits[::2], labels[::2], SHORT=1000, check=False)
    logits[1] = np.nan
    loss, dlogits = both(device_backend, logits, labels, SHORT=1000, check=False)
    assert error(loss, kept_loss) <= 1e-7
    assert same_bits(dlogits, np.stack([kept[0], np.zeros_like(kept[0]), kept[1]]))


def test_any_integer_can_be_the_one_to_ignore(device_backend):
    logits, labels = case((9, 17), 9)
    unsigned = np.where(labels == IGNORED, 255, labels).astype(np.uint8)
    other = both(device_backend, logits, unsigned, ignore_index=255)
    assert same_bits(other, both(device_backend, logits, labels))


def test_the_mean_of_many_losses_keeps_float32s_accuracy(device_backend):
    """Large ones cancel here: of each thread's sum, and of what was rounded away beside it, every digit counts."""
    count = 1_000_000 if device_backend.fast else 3000
    losses, counts = np.full(count, 0.1, np.float32), np.full(count, 2, np.int64)
    losses[:1000], losses[1000:2000] = 1e5, -1e5
    mean, total = np.zeros((), np.float32), np.zeros((), np.int64)
    arguments = [device_backend.array(x) for x in (losses, counts, mean, total)]
    with small_blocks(device_backend), device_backend.running(check=False):
        twin.MEAN.launch((1,), np.float32, (*arguments, count))
    assert device_backend.numpy(arguments[3]) == 2 * count
    assert error(device_backend.numpy(arguments[2]), losses.sum(dtype=np.float64) / (2 * count)) <= 1e-6


# Where numbers and labels end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_in_a_row_that_counts_gives_nan(device_backend, dtype):
    for where in (0, 5, 32):
        logits, labels = case((3, 33), 10, dtype, ignored=0)
        logits[1, where] = np.nan
        loss, dlogits = both(device_backend, logits, labels, check=False)
        assert np.isnan(loss)
        assert np.isnan(dlogits).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_neither_overflow_nor_lose_the_difference(device_backend, dtype):
    logits = np.array([[1e30, -1e30, 0], [1000, 999, 1000], [-1e30, -1e30, -1e30]], dtype)
    loss, dlogits = both(device_backend, logits, np.array([0, 1, 2]))
    assert error(loss, (0 + np.log(2 + np.exp(-1)) + 1 + np.log(3)) / 3) <= 1e-6
    assert error(dlogits, reference.backward(1.5, logits, np.array([0, 1, 2]))) <= 3e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minus_infinity_forbids_a_class(device_backend, dtype):
    logits = np.array([[-np.inf, 0.0, 0.0]], dtype)
    loss, dlogits = both(device_backend, logits, np.array([1]), 1.0)
    assert error(loss, np.log(2)) <= 1e-7
    np.testing.assert_array_equal(dlogits, [[0, -0.5, 0.5]])
    assert both(device_backend, logits, np.array([0]))[0] == np.inf
    assert np.isnan(both(device_backend, np.full_like(logits, -np.inf), np.array([0]))[0])


def test_without_a_row_that_counts_there_is_no_mean_and_no_gradient(device_backend):
    for logits, labels in [(np.zeros((2, 3)), np.array([-100, -100])), (np.zeros((0, 3)), np.zeros(0, int))]:
        loss, dlogits = both(device_backend, logits, labels)
        assert np.isnan(loss)
        assert same_bits(dlogits, np.zeros(logits.shape))


@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**63)])
def test_a_label_that_names_no_class_makes_the_loss_nan_and_its_rows_gradient(device_backend, label):
    logits = np.arange(15, dtype=np.float32).reshape(3, 5)
    loss, dlogits = both(device_backend, logits, np.array([0, label, IGNORED]))
    assert np.isnan(loss)
    assert np.isnan(dlogits).all(-1).tolist() == [False, True, False]


# On the device alone


@pytest.mark.gpu
def test_the_public_functions_take_cupy_arrays(device_backend):
    logits, labels = case((4, 5, 65), 11)
    x, targets = device_backend.array(logits), device_backend.array(labels)
    found = public.cross_entropy(x, targets), public.cross_entropy_backward(1.5, x, targets)
    assert_close(tuple(map(device_backend.numpy, found)), logits, labels, 1e-6, 3e-6)
    assert np.isnan(device_backend.numpy(public.cross_entropy(x, targets + 65)))


@pytest.mark.gpu
def test_arrays_of_more_than_2_to_the_31_numbers(device_backend):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.Device().mem_info[0] < 30e9:
        pytest.skip("needs 30 GB of memory on the device")
    logits = cupy.zeros((44_000, 50_280), np.float16)
    logits[-1, -1] = 10
    labels = cupy.full(44_000, 50_279)
    loss, saved = twin.forward(logits, labels, ignore_index=IGNORED, save=True)
    (dlogits,) = twin.backward(cupy.full((), 44_000, np.float32), saved)
    last = np.log(50_279 + np.exp(10))
    assert abs(float(loss) - (np.log(50_280) * 43_999 + last - 10) / 44_000) <= 1e-5
    assert error(cupy.asnumpy(dlogits[-1, -2:]), np.array([1, np.exp(10) - np.exp(last)]) / np.exp(last)) <= 1e-3
