"""The fused kernels of the optimizer: against the equations, written in NumPy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, run_without_compiler, same_bits
from cases import seeds
from hypothesis import given
from hypothesis import strategies as st

from npmamba.cpu import optimizer_update, runtime
from npmamba.cpu.optimizer_update import BLOCK, global_norm

OPTIONS = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((), (0,), (1,), (7,), (3, 33), (2, 3, 16), (BLOCK + 1,))


def case(shape, seed, dtype=np.float64):
    """Return param, grad, m and v, as they are after some steps."""
    rng = np.random.default_rng(seed)
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    param, grad, m = (np.asarray(rng.standard_normal(shape)) for _ in range(3))
    v = np.asarray(rng.random(shape))
    return param.astype(dtype), grad.astype(dtype), m.astype(wide), v.astype(wide)


def adamw_update(param, grad, m, v, **options):
    """Update one array."""
    return tuple(x for (x,) in optimizer_update.adamw_update([param], [grad], [m], [v], [True], **options))


def sum_of_squares(x):
    return optimizer_update._sum_of_squares_of(x)


def by_the_equations(param, grad, m, v, step, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0):
    """Decoupled weight decay, Loshchilov and Hutter, line by line in float64."""
    param, grad, m, v = (np.asarray(x, np.float64) for x in (param, grad, m, v))
    g = grad_scale * grad
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return param - lr * weight_decay * param - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 1e-6)])
@given(st.sampled_from(SHAPES), st.sampled_from([1, 2, 1000]), seeds)
def test_an_update_is_the_equations(dtype, tolerance, shape, step, seed):
    arguments = case(shape, seed, dtype)
    found = adamw_update(*arguments, step=step, **OPTIONS)
    for x, expected in zip(found, by_the_equations(*arguments, step, **OPTIONS), strict=True):
        assert (x.shape, x.dtype) == (shape, dtype)
        assert x.flags.c_contiguous
        assert error(x, expected, 1.0) <= tolerance


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_a_short_parameter_is_updated_in_float32_and_rounded_once(dtype):
    param, grad, m, v = case((3, 33), 1, dtype)
    p, *means = adamw_update(param, grad, m, v, step=3, **OPTIONS)
    wide = adamw_update(param.astype(np.float32), grad.astype(np.float32), m, v, step=3, **OPTIONS)
    assert same_bits(p, wide[0].astype(dtype))
    assert same_bits(tuple(means), wide[1:])


def test_many_updates_find_the_minimum():
    target = np.linspace(-1, 1, 100)
    p, m, v = np.zeros(100), np.zeros(100), np.zeros(100)
    for step in range(1, 400):
        lr = 0.1 * (1 - step / 400)
        p, m, v = adamw_update(p, p - target, m, v, step=step, **{**OPTIONS, "lr": lr, "weight_decay": 0.0})
    assert error(p, target) <= 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seeds)
def test_scaling_the_gradient_on_the_way_changes_no_bit(dtype, seed):
    param, grad, m, v = case((70,), seed, dtype)
    scaled = grad * dtype(0.3)
    fused = adamw_update(param, grad, m, v, step=2, **OPTIONS, grad_scale=float(dtype(0.3)))
    assert same_bits(fused, adamw_update(param, scaled, m, v, step=2, **OPTIONS))


@given(seeds)
def test_the_first_step_without_decay_is_the_sign_of_the_gradient(seed):
    _, grad, *_ = case((70,), seed)
    zeros = np.zeros(70)
    p, *_ = adamw_update(zeros, grad, zeros, zeros, step=1, **{**OPTIONS, "eps": 0.0})
    assert error(p, -OPTIONS["lr"] * np.sign(grad)) <= 1e-14


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_and_any_neighbours_give_the_same_bits(dtype):
    arguments = case((5 * BLOCK + 7,), 2, dtype)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append((*adamw_update(*arguments, step=2, **OPTIONS), sum_of_squares(arguments[1])))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])
    part = adamw_update(*(x[3:44] for x in arguments), step=2, **OPTIONS)
    assert same_bits(part, tuple(x[3:44] for x in results[0][:3]))


@pytest.mark.parametrize("name", ["param", "grad", "m", "v"])
def test_any_memory_gives_the_same_bits(name):
    arguments = dict(zip(["param", "grad", "m", "v"], case((5, 9), 3, np.float32), strict=True))
    expected = adamw_update(**arguments, step=2, **OPTIONS)
    for layout, x in layouts(arguments[name]).items():
        assert same_bits(adamw_update(**{**arguments, name: x}, step=2, **OPTIONS), expected), layout
        assert sum_of_squares(x) == sum_of_squares(arguments[name]), layout


def test_inputs_are_left_as_they_are_and_results_are_fresh():
    arguments = case((70,), 4)
    copies = tuple(x.copy() for x in arguments)
    found = adamw_update(*arguments, step=2, **OPTIONS)
    assert same_bits(arguments, copies)
    assert not any(np.shares_memory(x, y) for x in found for y in arguments)


def test_nan_stays_where_it_is():
    param, grad, m, v = case((70,), 5)
    grad[20] = np.nan
    for x in adamw_update(param, grad, m, v, step=2, **OPTIONS):
        assert np.flatnonzero(np.isnan(x)).tolist() == [20]
    assert math.isnan(sum_of_squares(grad))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(st.sampled_from([*SHAPES, (3 * BLOCK + 2,)]), seeds)
def test_squares_are_summed_in_float64(dtype, shape, seed):
    x = np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    expected = math.fsum((x.astype(np.float64) ** 2).reshape(-1))
    assert abs(sum_of_squares(x) - expected) <= 1e-14 * expected


def test_squares_beyond_float32_neither_overflow_nor_vanish():
    assert sum_of_squares(np.array([1e30, 1e-30], np.float32)) == float(np.float32(1e30)) ** 2
    assert sum_of_squares(np.array([1e-30], np.float32)) == float(np.float32(1e-30)) ** 2


@given(seeds)
def test_a_list_is_updated_as_its_arrays_alone(seed):
    """Dtypes may differ, and which of them decay."""
    cases = [case(shape, seed, dtype) for shape, dtype in [((3, 5), np.float32), ((), np.float64), ((7,), np.float16)]]
    decays = [True, False, True]
    found = optimizer_update.adamw_update(*zip(*cases, strict=True), decays, step=2, **OPTIONS, grad_scale=0.3)
    for i, (arrays, decayed) in enumerate(zip(cases, decays, strict=True)):
        options = {**OPTIONS, "weight_decay": OPTIONS["weight_decay"] * decayed}
        alone = adamw_update(*arrays, step=2, **options, grad_scale=0.3)
        assert same_bits(tuple(column[i] for column in found), alone)


@given(seeds, st.floats(0.01, 100))
def test_the_factor_brings_the_norm_down(seed, max_norm):
    arrays = list(case((5, 9), seed))
    norm, factor = global_norm(arrays, max_norm)
    assert norm == pytest.approx(np.linalg.norm(np.ravel(arrays)), rel=1e-14)
    assert factor == (max_norm / norm if norm > max_norm else 1.0)
    assert global_norm([]) == (0.0, 1.0)
    assert global_norm([np.array([np.inf])], max_norm) == (np.inf, 1.0)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.cpu.optimizer_update import adamw_update, global_norm
p, g, zeros = np.ones(19, np.float32), np.linspace(1, 2, 19, dtype=np.float32), np.zeros(19, np.float32)
options = {"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 0.0, "weight_decay": 0.1}
(new,), (m,), (v,) = adamw_update([p], [g], [zeros], [zeros], [True], step=1, **options)
np.testing.assert_allclose(new, 0.45, rtol=1e-5)
np.testing.assert_allclose(m, 0.1 * g, rtol=1e-6)
assert new.dtype == v.dtype == np.float32
np.testing.assert_allclose(global_norm([g])[0], np.linalg.norm(g.astype(float)), rtol=1e-14)
""")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_donated_arrays_hold_the_same_results(dtype):
    arguments = case((3, 50), 8, dtype)
    wanted = adamw_update(*arguments, step=2, **OPTIONS)
    given = [x.copy() for x in arguments]
    found = adamw_update(*given, step=2, **OPTIONS, donate=True)
    assert all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(found, wanted, strict=True))
    shared = [np.shares_memory(x, y) for x, y in zip(found, (given[0], *given[2:]), strict=True)]
    assert shared == [dtype == np.float32, True, True]
    assert np.array_equal(given[1], arguments[1])


def test_an_array_that_must_not_be_written_is_not():
    param, grad, m, v = case((50,), 9, np.float32)
    param.flags.writeable = False
    copy = param.copy()
    found = adamw_update(param, grad, m, v, step=2, **OPTIONS, donate=True)
    assert np.array_equal(param, copy)
    assert not np.shares_memory(found[0], param)
