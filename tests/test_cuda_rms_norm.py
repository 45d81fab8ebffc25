"""The CUDA twin of the root-mean-square norm: the reference's numbers, and the laws of its teams and accesses."""

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

from npmamba.cuda import rms_norm as twin
from npmamba.cuda import rms_norm_backward, rms_norm_forward
from npmamba.cuda.rows import lines
from npmamba.ops import rms_norm as public
from npmamba.reference import rms_norm as reference

SHAPES = ((1,), (7,), (3, 16), (9, 33), (2, 3, 100), (2, 2, 3, 31), (0, 5))
TOLERANCES = {np.float64: 1e-12, np.float32: 2e-6, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
ARGUMENTS = "dout x weight residual dresidual".split()
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda t: np.dtype(t).name)


def case(shape, seed, dtype=np.float32, fused=True):
    """Return dout, x, weight, residual and dresidual; the last two are None unless `fused`."""
    rng = np.random.default_rng(seed)
    real = np.float64 if dtype == np.float64 else np.float32
    dout, x, residual, dresidual = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    weight = rng.standard_normal(shape[-1]).astype(real)
    return dout, x, weight, residual if fused else None, dresidual if fused else None


@contextlib.contextmanager
def small_blocks(backend, blocks=rms_norm_backward.BLOCKS, power=6):
    """Let blocks have two warps in the interpreter: rows that are long then hold 1,025 numbers (float64: 513).

    Forward, a thread keeps 32 numbers of two bytes: there a long row holds 2,049.
    """
    sizes = {"POWER": power, "THREADS": 1 << power, "WARPS": 1 << power - 5, "SLICES": 2}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(twin, "BLOCKS", blocks))
        if not backend.fast:
            for module in (twin, rms_norm_forward, rms_norm_backward):
                for name, value in sizes.items():
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, value))
            for kernel, threads in ((twin.FORWARD, 1 << power), (twin.BACKWARD, 1 << power), (twin.COLUMN_SUMS, 64)):
                stack.enter_context(mock.patch.object(kernel, "threads", threads))
        yield


def both(backend, dout, x, weight, residual=None, dresidual=None, *, eps=1e-5, seed=None, check="races", **patched):
    """Return y, the sum, and the gradients of x, weight and residual."""
    dout, x, weight, residual, dresidual = map(backend.array, (dout, x, weight, residual, dresidual))
    with small_blocks(backend, **patched), backend.running(seed, check=check):
        y, s, saved = twin.forward(x, weight, residual, eps=eps, save=True)
        gradients = twin.backward(dout, dresidual, saved)
    return tuple(map(backend.numpy, (y, s, *gradients)))


def expected(dout, x, weight, residual=None, dresidual=None, *, eps=1e-5):
    y = reference.forward(x, weight, eps=eps, residual=residual)
    gradients = reference.backward(dout, x, weight, eps=eps, residual=residual, dresidual=dresidual)
    return *(y if residual is not None else (y, None)), *gradients


def assert_close(found, wanted, dtype, cancelling=0.0):
    real = np.float64 if dtype == np.float64 else np.float32
    for name, a, b in zip("y s x weight residual".split(), found, wanted, strict=True):
        if b is None:
            assert a is None, name
        else:
            assert a.dtype == (real if name == "weight" else dtype), name
            tolerance = TOLERANCES[real if name == "weight" and real == np.float64 else dtype]
            assert error(a, b, cancelling if name in ("x", "residual") else 0.0) <= tolerance, name


# Against the reference


@dtypes
@settings(max_examples=3)
@given(st.sampled_from(SHAPES), st.booleans(), st.sampled_from([0.0, 1e-5, 0.3]), seeds)
def test_outputs_and_gradients_are_the_references(device_backend, dtype, shape, fused, eps, seed):
    arguments = case(shape, seed, dtype, fused)
    dout, x, weight, residual, _ = (a if a is None else a.astype(np.float64) for a in arguments)
    s = x if residual is None else x + residual
    cancelling = dout * weight / np.sqrt((s * s).mean(-1, keepdims=True) + eps)
    found = both(device_backend, *arguments, eps=eps, seed=seed)
    assert_close(found, expected(*arguments, eps=eps), dtype, cancelling)


@pytest.mark.parametrize(
    ("dtype", "length", "fused"),
    [
        (np.float32, 513, True),
        (np.float32, 1025, False),
        (ml_dtypes.bfloat16, 1032, True),
        (ml_dtypes.bfloat16, 2056, True),
        (np.float64, 514, True),
    ],
)
def test_a_row_longer_than_a_team_or_all_registers_is_read_again(device_backend, dtype, length, fused):
    length *= 4 if device_backend.fast else 1
    arguments = case((1, length), 1, dtype, fused)
    assert_close(both(device_backend, *arguments), expected(*arguments), dtype)


@pytest.mark.parametrize(
    ("shape", "power", "blocks"),
    [((70, 40), 6, 1), ((70, 40), 6, 2), ((9, 130), 6, 2), ((5, 520), 7, 1), ((3, 1040), 6, 2)],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_a_block_takes_many_rows_and_sums_the_weights_gradient(device_backend, dtype, shape, power, blocks):
    """Teams of 4 and 16 lanes, and of two warps, which meet at barriers row after row; the last rows are read twice."""
    arguments = case(shape, 2, dtype)
    found = both(device_backend, *arguments, blocks=blocks, power=power, seed=blocks)
    assert_close(found, expected(*arguments), dtype)


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_walks_rows_that_are_not_evenly_apart(device_backend, fused):
    """Numbers of two bytes, whose next row is asked for ahead: without the last of each seven, and those behind."""
    cut = tuple(x if x is None or x.ndim == 1 else x[:, :-1] for x in case((5, 7, 40), 3, ml_dtypes.bfloat16, fused))
    found = both(device_backend, *cut, blocks=1, power=6)
    assert_close(found, expected(*cut), ml_dtypes.bfloat16)


@pytest.mark.parametrize("length", [40, 1040])
def test_where_the_weights_gradient_is_summed_changes_no_bit_of_the_rest(device_backend, length):
    """In shared memory, or where it stands if the row is too long for that."""
    long = length > 1024
    arguments = case((3, length * 4 if long and device_backend.fast else length), 12)
    kept = both(device_backend, *arguments, blocks=1)
    with mock.patch.object(twin, "CELLS", 0 if long else twin.CELLS):
        far = both(device_backend, *arguments, blocks=1)
    assert same_bits(kept[:3], far[:3])
    assert_close(far, expected(*arguments), np.float32)


@pytest.mark.parametrize("rows", [1, 8, 35])
def test_teams_of_every_size_hold_their_rows(device_backend, rows):
    """From two lanes to all: what a lane holds of a row that it does not fill counts for nothing."""
    for length in (1, 17, 64, 65, 257):
        arguments = case((rows if length < 65 else 3, length), rows)
        assert_close(both(device_backend, *arguments, check=False), expected(*arguments), np.float32)


def test_infinity_stays_in_its_row_wherever_it_stands(device_backend):
    """Lanes behind a row's end read its first number, which must not get into the sum."""
    for place in (0, 5):
        _, x, weight, *_ = case((3, 20), 13)
        x[1, place] = np.inf
        with np.errstate(invalid="ignore"):
            y, *_ = both(device_backend, np.ones_like(x), x, weight)
            wanted = reference.forward(x, weight, eps=1e-5)
        assert np.array_equal(np.isnan(y), np.isnan(wanted))
        assert np.array_equal(y[1] == 0, wanted[1] == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("d_model", [64, 768, 2560, 4096, 5000])
def test_models_sizes_are_served_and_give_the_same_bits_twice(device_backend, dtype, d_model):
    arguments = case((3000, d_model), 3, dtype)
    found = both(device_backend, *arguments)
    assert_close(found, expected(*arguments), dtype)
    assert same_bits(both(device_backend, *arguments), found)


# Laws


def test_any_order_of_the_threads_gives_the_same_bits(device_backend):
    arguments = case((5, 40), 4)
    assert same_bits(both(device_backend, *arguments, seed=1), both(device_backend, *arguments, seed=2))


@pytest.mark.parametrize("d_model", [12, 16])
def test_any_strides_give_the_same_bits(device_backend, d_model):
    """Rows are read by 16 bytes where they are aligned; that any other way is taken must not show."""
    arguments = case((2, 2, d_model), 5)
    wanted = both(device_backend, *arguments, check=False)
    changed = [layouts(x) for x in arguments]
    for layout in ("fortran", "every second column", "part of a row", "negative strides"):
        found = both(device_backend, *(x[layout] for x in changed), check=False)
        assert same_bits(found, wanted), layout
    longer = [x if x.ndim == 1 else np.concatenate([x, x], 1)[:, :2] for x in arguments]
    assert same_bits(both(device_backend, *longer, check=False), wanted)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 6, 8))[:, :-1],
        np.zeros((4, 6, 8))[..., :4],
        np.zeros((4, 6, 8))[1, 2],
        np.zeros((4, 6, 8))[::-1],
        np.broadcast_to(np.zeros(8), (4, 6, 8)),
    ],
)
def test_rows_are_walked_where_they_stand(x):
    found = lines(x)
    assert np.shares_memory(found.array, x)
    assert found.array.shape[-1] == x.shape[-1]


def test_fusing_the_residual_changes_no_bit(device_backend):
    dout, x, weight, residual, dresidual = case((3, 40), 6)
    y, s, dx, dweight, dresidual_found = both(device_backend, dout, x, weight, residual, dresidual)
    assert same_bits(s, x + residual)
    plain_y, _, plain_dx, plain_dweight, _ = both(device_backend, dout, x + residual, weight)
    assert same_bits((y, dweight), (plain_y, plain_dweight))
    assert same_bits((dx, dresidual_found), (plain_dx + dresidual,) * 2)


def test_rows_have_the_same_bits_alone(device_backend):
    dout, x, weight, residual, dresidual = case((2, 3, 24), 7)
    whole = both(device_backend, dout, x, weight, residual, dresidual)
    alone = both(device_backend, dout[1, 2], x[1, 2], weight, residual[1, 2], dresidual[1, 2])
    for k in (0, 1, 2, 4):
        assert same_bits(alone[k], whole[k][1, 2])


def test_nan_stays_in_its_row(device_backend):
    dout, x, weight, *_ = case((4, 33), 8)
    x[2, 0] = np.nan
    y, _, dx, _, _ = both(device_backend, dout, x, weight)
    for found in (y, dx):
        assert np.isnan(found).all(-1).tolist() == [False, False, True, False]


def test_an_output_that_nobody_used_has_gradient_zero(device_backend):
    _, x, weight, residual, dresidual = case((3, 17), 9)
    *_, dx, dweight, _ = both(device_backend, None, x, weight, residual, dresidual)
    assert same_bits((dx, dweight), (dresidual, np.zeros(17, np.float32)))


def test_without_rows_the_weight_has_gradient_zero(device_backend):
    y, s, dx, dweight, _ = both(device_backend, *case((0, 5), 10))
    assert y.shape == s.shape == dx.shape == (0, 5)
    assert same_bits(dweight, np.zeros(5, np.float32))


# On the device alone


@pytest.mark.gpu
def test_the_public_functions_take_cupy_arrays(device_backend):
    arguments = case((2, 5, 48), 11)
    dout, x, weight, residual, dresidual = map(device_backend.array, arguments)
    outputs = public.rms_norm(x, weight, residual=residual)
    gradients = public.rms_norm_backward(dout, x, weight, residual=residual, dresidual=dresidual)
    assert_close(tuple(map(device_backend.numpy, (*outputs, *gradients))), expected(*arguments), np.float32)


@pytest.mark.gpu
def test_arrays_of_more_than_2_to_the_31_numbers(device_backend):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.Device().mem_info[0] < 30e9:
        pytest.skip("needs 30 GB of memory on the device")
    x = cupy.zeros((600_000, 4096), np.float16)
    x[-1] = 2
    weight = cupy.ones(4096, np.float32)
    y, _, saved = twin.forward(x, weight, None, eps=1e-5, save=True)
    assert (y[-1] == 1).all()
    dx, dweight, _ = twin.backward(x, None, saved._replace(s=x, rstd=cupy.ones_like(saved.rstd)))
    assert (dx[-1] == cupy.float16(2 - 2 * 4)).all()
    assert (dweight == 4).all()
