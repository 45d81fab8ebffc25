"""The CUDA twin of the optimizer's kernels: against the CPU twin and the equations, in the interpreter and on a GPU."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, same_bits
from cases import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimizer_update import OPTIONS, case

from npmamba.autodiff import clip_by_global_norm, optim, tree_map
from npmamba.cpu import optimizer_update as cpu
from npmamba.cuda import launch
from npmamba.cuda import optimizer_update as cuda
from npmamba.cuda.device import Data, Long, follow, load, store
from npmamba.testing.findings import OutOfRangeError
from npmamba.testing.interpret import interpreted

CHUNK = cuda.CHUNK
SHAPES = ((), (0,), (1,), (7,), (3, 33), (2, 3, 16), (CHUNK + 5,))
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
TOLERANCE = {np.float16: 1e-3, ml_dtypes.bfloat16: 1e-2, np.float32: 1e-6, np.float64: 1e-14}


def cases(shapes, seed, dtypes):
    """Return lists of params, grads, m and v."""
    found = [case(shape, seed + i, dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]
    return [list(column) for column in zip(*found, strict=True)]


def _beyond(real):
    def beyond(addresses: Long, like: Data, y: Data):
        p = follow(like, load(addresses, np.uint32(0)), np.int64(3))
        store(y, np.uint32(0), load(p, np.uint32(2)))
        store(y, np.uint32(1), load(p, np.uint32(3)))

    return beyond


def test_the_interpreter_holds_a_followed_pointer_to_its_count():
    x, y, kernel = np.arange(4.0), np.zeros(2), launch.Kernel(_beyond, threads=1)
    with interpreted(), pytest.raises(OutOfRangeError, match="is outside its 3 elements"):
        kernel.launch((1,), x.dtype, (np.array([x.ctypes.data]), y, y))
    assert y.tolist() == [2, 0]
    launch.KERNELS.remove(kernel)


KINDS = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.booleans())


@given(st.lists(KINDS, min_size=1, max_size=4), seeds)
@settings(max_examples=5)
def test_lists_of_any_shapes_and_dtypes_are_updated_as_on_the_cpu(device_backend, kinds, seed):
    shapes, dtypes, decays = zip(*kinds, strict=True)
    columns = cases(shapes, seed, dtypes)
    options = {**OPTIONS, "step": 3, "grad_scale": 0.3}
    found = device_backend.call(cuda.adamw_update, *columns, decays, **options, seed=seed)
    expected = cpu.adamw_update(*columns, decays, **options)
    for column, wanted in zip(found, expected, strict=True):
        for x, y, shape, dtype in zip(column, wanted, shapes, dtypes, strict=True):
            assert (x.shape, x.dtype) == (shape, y.dtype)
            assert x.flags.c_contiguous
            assert error(x, y, 1.0) <= TOLERANCE[dtype]


def test_a_gradient_wider_than_its_parameter_is_not_rounded_to_it(device_backend):
    param, grad, m, v = case((70,), 0, np.float16)
    grad = grad.astype(np.float32) + np.float32(1e-5)
    found = device_backend.call(cuda.adamw_update, [param], [grad], [m], [v], [True], step=2, **OPTIONS)
    (p,), (new_m,), _ = found
    expected = cpu.adamw_update([param], [grad], [m], [v], [True], step=2, **OPTIONS)
    assert p.dtype == np.float16
    assert error(new_m, expected[1][0]) <= 1e-6
    assert error(p, expected[0][0]) <= 1e-3


def test_the_factor_may_be_a_number_on_the_device(device_backend):
    columns, decays = cases([(5, 9), (4,)], 0, [np.float32, np.float64]), [True, False]
    with device_backend.running():
        lists = [[device_backend.array(x) for x in column] for column in columns]
        norm, factor = cuda.global_norm(lists[1], 0.5)
        clipped = cuda.adamw_update(*lists, decays, step=1, **OPTIONS, grad_scale=factor)
    found = [[device_backend.numpy(x) for x in column] for column in clipped]
    expected_norm, expected = cpu.global_norm(columns[1], 0.5)
    assert device_backend.numpy(norm) == pytest.approx(expected_norm, rel=1e-14)
    assert device_backend.numpy(factor) == pytest.approx(expected, rel=1e-14)
    wanted_columns = cpu.adamw_update(*columns, decays, step=1, **OPTIONS, grad_scale=expected)
    for column, wanted in zip(found, wanted_columns, strict=True):
        for x, y in zip(column, wanted, strict=True):
            assert error(x, y, 1.0) <= 1e-6


@pytest.mark.parametrize("name", ["param", "grad", "m", "v"])
def test_any_memory_gives_the_same_bits(device_backend, name):
    arguments = dict(zip(["param", "grad", "m", "v"], case((5, 9), 3, np.float32), strict=True))
    kept = {} if device_backend.name == "interpreter" else {"byte-swapped", "unaligned"}

    def update(**arrays):
        columns = device_backend.call(cuda.adamw_update, *[[x] for x in arrays.values()], [True], step=2, **OPTIONS)
        return tuple(x for (x,) in columns)

    expected = update(**arguments)
    for layout, x in layouts(arguments[name]).items():
        if layout not in kept:
            assert same_bits(update(**{**arguments, name: x}), expected), layout


def test_inputs_are_left_as_they_are_and_results_are_fresh(device_backend):
    columns = cases([(70,), (3,)], 4, [np.float32] * 2)
    copies = [[x.copy() for x in column] for column in columns]
    found = device_backend.call(cuda.adamw_update, *columns, [True, True], step=2, **OPTIONS)
    assert same_bits(tuple(map(tuple, columns)), tuple(map(tuple, copies)))
    assert not any(np.shares_memory(x, y) for new in found for x in new for old in columns for y in old)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float64, np.float16)])
def test_donated_arrays_hold_the_same_results(device_backend, dtypes):
    columns, decays = cases([(CHUNK + 5,), (5, 9)], 6, dtypes), [True, False]
    wanted = device_backend.call(cuda.adamw_update, *columns, decays, step=2, **OPTIONS)
    with device_backend.running():
        lists = [[device_backend.array(x.copy()) for x in column] for column in columns]
        given = [lists[k] for k in (0, 2, 3)]
        found = cuda.adamw_update(*lists, decays, step=2, **OPTIONS, donate=True)
        assert all(x is y for new, old in zip(found, given, strict=True) for x, y in zip(new, old, strict=True))
    found = [[device_backend.numpy(x) for x in column] for column in found]
    assert same_bits(tuple(map(tuple, found)), tuple(map(tuple, wanted)))
    assert same_bits(tuple(map(device_backend.numpy, lists[1])), tuple(columns[1]))


def test_what_cannot_be_donated_is_not(device_backend):
    param, grad, m, v = case((5, 9), 7, np.float32)
    wanted = device_backend.call(cuda.adamw_update, [param], [grad], [m], [v], [True], step=2, **OPTIONS)
    arguments = [np.asfortranarray(param)], [grad], [m], [v]
    found = device_backend.call(cuda.adamw_update, *arguments, [True], step=2, **OPTIONS, donate=True)
    assert same_bits(tuple(map(tuple, found)), tuple(map(tuple, wanted)))


def test_the_same_bits_run_after_run(device_backend):
    columns = cases([(3 * CHUNK + 2,), (5,)], 5, [np.float32] * 2)
    results = [device_backend.call(cuda.global_norm, columns[1], 1.0, seed=seed) for seed in (0, 1)]
    assert same_bits(results[0], results[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(st.lists(st.sampled_from([*SHAPES, (2 * CHUNK + 2,)]), min_size=1, max_size=3), seeds, st.floats(0.01, 100))
@settings(max_examples=2)
def test_the_norm_is_summed_in_float64_and_the_factor_brings_it_down(device_backend, dtype, shapes, seed, max_norm):
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]
    norm, factor = device_backend.call(cuda.global_norm, arrays, max_norm, seed=seed)
    expected = math.sqrt(math.fsum((x.astype(np.float64) ** 2).sum() for x in arrays))
    assert norm.shape == factor.shape == ()
    assert abs(norm - expected) <= 1e-14 * expected
    assert factor == pytest.approx(max_norm / expected if expected > max_norm else 1.0, rel=1e-12)


def test_norms_neither_overflow_nor_hide_what_is_not_finite(device_backend):
    norm, factor = device_backend.call(cuda.global_norm, [np.full(4, 1e30, np.float32)], 1.0)
    assert norm == pytest.approx(2e30, rel=1e-6)
    assert factor == pytest.approx(0.5e-30, rel=1e-6)
    for bad in (np.nan, np.inf):
        norm, factor = device_backend.call(cuda.global_norm, [np.ones(3), np.array([1.0, bad])], 1.0)
        assert not math.isfinite(norm)
        assert factor == 1.0
    assert cuda.global_norm([]) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gradients_are_clipped_by_a_factor_that_stays_on_the_device(device_backend, monkeypatch, dtype):
    """As those of CuPy are: nobody waits for the norm, so gradients are scaled even where they are short enough."""
    grads = {"a": np.arange(6).astype(dtype).reshape(2, 3), "b": -np.ones(4, dtype)}
    monkeypatch.setattr(optim, "twin", lambda op, array: cuda)
    for max_norm in (0.5, 1e6):
        with device_backend.running():
            clipped, norm = clip_by_global_norm(tree_map(device_backend.array, grads), max_norm)
        assert norm.shape == ()
        wanted = math.sqrt(sum(k * k for k in range(6)) + 4)
        assert device_backend.numpy(norm) == pytest.approx(wanted, rel=1e-14)
        for name, g in grads.items():
            found = device_backend.numpy(clipped[name])
            assert found.dtype == dtype
            assert error(found, g * min(1.0, max_norm / wanted)) <= TOLERANCE[dtype]


def test_nan_stays_where_it_is(device_backend):
    param, grad, m, v = case((70,), 5, np.float32)
    grad[20] = np.nan
    for (x,) in device_backend.call(cuda.adamw_update, [param], [grad], [m], [v], [True], step=2, **OPTIONS):
        assert np.flatnonzero(np.isnan(x)).tolist() == [20]
