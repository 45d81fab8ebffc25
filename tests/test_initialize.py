"""The published initialization: every array's range and distribution, and what decides its values."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from models import configs, tiny

from npmamba.config import MambaConfig
from npmamba.initialize import init_params

SEEDS = st.integers(0, 2**70)
BIG = MambaConfig(vocab_size=300, d_model=96, n_layer=3, d_state=16, tie_embeddings=False, bias=True)


def drawn(config: MambaConfig, end: str, **options: Any) -> list[np.ndarray]:
    """Return the parameters whose keys end so, in float64."""
    params = init_params(config, **{"seed": 1, "dtype": np.float64, **options})
    found = [x for key, x in params.items() if key.endswith(end)]
    assert found
    return found


def agree(x: np.ndarray, distribution: Any) -> bool:
    """Tell whether `x` may be a sample of the distribution: Kolmogorov and Smirnov's test, at a fixed seed."""
    return scipy.stats.kstest(x.ravel(), distribution.cdf).pvalue > 1e-3


def uniform(bound: float) -> Any:
    return scipy.stats.uniform(-bound, 2 * bound)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def test_the_test_of_distributions_can_fail():
    x = np.random.default_rng(0).uniform(-1, 1, 20_000)
    assert agree(x, uniform(1))
    assert not agree(x, uniform(1.05))
    assert not agree(x, scipy.stats.norm(0, 3**-0.5))


# Ranges and distributions


@given(configs(), SEEDS, st.sampled_from([np.float32, np.float64]))
def test_every_parameter_has_its_key_shape_and_dtype(config, seed, dtype):
    params = init_params(config, seed=seed, dtype=dtype)
    assert {key: x.shape for key, x in params.items()} == config.parameter_shapes()
    assert list(params) == list(config.parameter_shapes())
    for x in params.values():
        assert x.dtype == dtype
        assert np.isfinite(x).all()
        assert x.flags.c_contiguous
        assert x.flags.owndata
        assert x.flags.writeable


@given(SEEDS, st.floats(1e-5, 0.1), st.floats(1, 100), st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_steps_lie_between_their_bounds_and_above_the_floor(seed, dt_min, ratio, floor):
    config = tiny(dt_min=dt_min, dt_max=dt_min * ratio, dt_init_floor=floor)
    for bias in drawn(config, "dt_proj.bias", seed=seed):
        assert softplus(bias).min() >= max(dt_min, floor) * (1 - 1e-9)
        assert softplus(bias).max() <= max(dt_min * ratio, floor) * (1 + 1e-9)


def test_steps_are_log_uniform():
    """As in the authors' code; section 3.6 of the paper writes uniform."""
    dt = softplus(np.concatenate(drawn(tiny(d_model=4, expand=1000, d_state=1), "dt_proj.bias")))
    assert agree(np.log(dt), scipy.stats.uniform(np.log(0.001), np.log(100)))
    assert not agree(dt, scipy.stats.uniform(0.001, 0.099))


def test_float32_steps_are_right_to_rounding():
    exact, rounded = (drawn(BIG, "dt_proj.bias", dtype=dtype)[0] for dtype in (np.float64, np.float32))
    np.testing.assert_allclose(softplus(rounded.astype(float)), softplus(exact), rtol=1e-6)


def test_rates_are_one_to_d_state_on_every_channel():
    for A_log in drawn(BIG, ".A_log"):
        np.testing.assert_allclose(np.exp(A_log), np.broadcast_to(np.arange(1.0, 17), A_log.shape), rtol=1e-15)


@pytest.mark.parametrize("end", [".D", "norm.weight", "norm_f.weight"])
def test_direct_paths_and_norms_start_at_one(end):
    assert all((x == 1).all() for x in drawn(BIG, end))


@pytest.mark.parametrize("end", ["in_proj.bias", "out_proj.bias"])
def test_biases_of_projections_start_at_zero(end):
    assert not any(x.any() for x in drawn(BIG, end))


@pytest.mark.parametrize(
    ("end", "bound"),
    [
        ("in_proj.weight", 96**-0.5),
        ("x_proj.weight", 192**-0.5),
        ("dt_proj.weight", 6**-0.5),
        ("conv1d.weight", 4**-0.5),
        ("conv1d.bias", 4**-0.5),
        ("out_proj.weight", 192**-0.5 * 3**-0.5),  # three layers add to the stream
    ],
)
def test_projections_are_uniform_within_their_bound(end, bound):
    x = np.concatenate([q.ravel() for q in drawn(BIG, end)])
    assert np.abs(x).max() <= bound
    assert agree(x, uniform(bound))


def test_out_projections_keep_their_size_where_asked():
    x = drawn(tiny(d_model=64, rescale_prenorm_residual=False), "out_proj.weight")[0]
    assert agree(x, uniform(128**-0.5))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_step_s_projection_can_be_constant(scale):
    for x in drawn(tiny(dt_rank=4, dt_init="constant", dt_scale=scale), "dt_proj.weight"):
        np.testing.assert_array_equal(x, scale / 2)
    assert agree(drawn(tiny(d_model=300, dt_rank=4, dt_scale=scale), "dt_proj.weight")[0], uniform(scale / 2))


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("end", ["embeddings.weight", "lm_head.weight"])
def test_embeddings_and_an_untied_head_are_normal(end, std):
    config = tiny(vocab_size=300, d_model=64, tie_embeddings=False, initializer_range=std)
    assert agree(drawn(config, end)[0], scipy.stats.norm(0, std))


# What decides the values


@given(configs(), SEEDS)
def test_the_seed_decides_all(config, seed):
    first, again = (init_params(config, seed=seed) for _ in range(2))
    assert all(first[key].tobytes() == again[key].tobytes() for key in first)


def test_different_seeds_and_different_layers_differ():
    params = [init_params(tiny(), seed=seed, dtype=np.float64) for seed in (0, 1, 2**64)]
    random = [x.ravel()[:4] for p in params for key, x in p.items() if re.search("proj.weight|conv1d|dt_proj|emb", key)]
    assert len({x.tobytes() for x in random}) == len(random)


@given(SEEDS)
def test_float32_is_float64_rounded(seed):
    long, short = (init_params(tiny(), seed=seed, dtype=dtype) for dtype in (np.float64, np.float32))
    assert all(short[key].tobytes() == long[key].astype(np.float32).tobytes() for key in long)


CHANGES = [{"n_layer": 5}, {"bias": True}, {"conv_bias": False}, {"tie_embeddings": False}, {"vocab_size": 99}]


@pytest.mark.parametrize("change", [*CHANGES, {"d_state": 7}], ids=str)
def test_a_parameter_does_not_depend_on_others(change):
    """Of two models, parameters with the same key and shape start alike; depth scales the out projections only."""
    a, b = (init_params(tiny(rescale_prenorm_residual=False, **options), seed=3) for options in ({}, change))
    common = [key for key in a if key in b and a[key].shape == b[key].shape]
    assert len(common) > len(a) / 2
    assert all(a[key].tobytes() == b[key].tobytes() for key in common)


# Errors


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", int, np.complex128])
def test_other_dtypes_are_refused(dtype):
    import ml_dtypes

    with pytest.raises(TypeError, match="init_params: dtype must be float32 or float64, got"):
        init_params(tiny(), dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize(("seed", "kind"), [(-1, ValueError), (1.5, TypeError)])
def test_seeds_that_are_no_whole_numbers_are_refused(seed, kind):
    with pytest.raises(kind):
        init_params(tiny(), seed=seed)
