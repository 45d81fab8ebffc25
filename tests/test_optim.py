"""Optimizers: against an independent trajectory in 50 digits, and the laws of purity and reproducibility."""

from __future__ import annotations

import collections
import math
import sys

import fake_cupy
import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.autodiff import (
    adamw,
    clip_by_global_norm,
    clip_factor,
    decay_mask,
    global_norm,
    leaves,
    optim,
    sgd,
    tree_items,
    tree_map,
    warmup_cosine,
)

seeds = st.integers(0, 2**32 - 1)


def adamw_in_50_digits(p, gradients, rates, beta1, beta2, eps, decay):
    """The equations of the paper for one number, with nothing shared with the code under test."""
    with mpmath.workdps(50):
        p, m, v = mpmath.mpf(p), mpmath.mpf(0), mpmath.mpf(0)
        beta1, beta2, eps, decay = map(mpmath.mpf, (beta1, beta2, eps, decay))
        for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            g, rate = mpmath.mpf(float(g)), mpmath.mpf(rate)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            mhat, vhat = m / (1 - beta1**t), v / (1 - beta2**t)
            p = p - rate * decay * p - rate * mhat / (mpmath.sqrt(vhat) + eps)
            yield float(p)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_adamw_follows_the_equations_for_200_steps(decay, scale):
    rng = np.random.default_rng(0)
    gradients = scale * rng.standard_normal((200, 3))
    schedule = warmup_cosine(1e-2, 10, 200, 1e-3)
    optimizer = adamw(schedule, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    params = {"w": np.array([1.0, -0.5, 3.0])}
    rates = [schedule(step) for step in range(200)]
    expected = np.array([
        list(adamw_in_50_digits(p, g, rates, 0.9, 0.95, 1e-8, decay))
        for p, g in zip(params["w"], gradients.T, strict=True)
    ])  # fmt: skip
    state = optimizer.init(params)
    for step, gradient in enumerate(gradients):
        params, state = optimizer.update({"w": gradient}, state, params)
        np.testing.assert_allclose(params["w"], expected[:, step], rtol=1e-12, atol=1e-12)
    assert state.step == 200


def test_sgd_with_momentum_follows_its_equation():
    gradients = np.random.default_rng(0).standard_normal((50, 2))
    params, velocity = {"w": np.zeros(2)}, np.zeros(2)
    optimizer = sgd(lambda step: 0.1 / (1 + step), momentum=0.9)
    state, expected = optimizer.init(params), np.zeros(2)
    for step, gradient in enumerate(gradients):
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.1 / (1 + step) * velocity
        params, state = optimizer.update({"w": gradient}, state, params)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-13, atol=1e-13)


OPTIMIZERS = [adamw(1e-2), sgd(1e-2), sgd(1e-2, momentum=0.9)]


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    empty = {"a.weight": np.empty((3, 5)), "b": [np.empty(7), np.empty(())], "c": np.empty((0, 2))}
    return tree_map(lambda x: np.asarray(rng.standard_normal(x.shape)).astype(dtype), empty)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(seed=seeds)
def test_updates_are_pure_and_repeat_to_the_bit(optimizer, seed):
    params, grads = tree(seed), tree(seed + 1)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    before = [x.copy() for _, x in tree_items((params, grads, state)) if isinstance(x, np.ndarray)]
    for _, x in tree_items((params, grads, state)):
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    once, again = optimizer.update(grads, state, params), optimizer.update(grads, state, params)
    after = [x for _, x in tree_items((params, grads, state)) if isinstance(x, np.ndarray)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    for (path, x), (_, y) in zip(tree_items(once), tree_items(again), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
        assert not any(np.shares_memory(x, z) for z in after), path


@given(seed=seeds, nested=st.booleans())
def test_donated_trees_hold_the_same_results(seed, nested):
    params, grads, optimizer = tree(seed), tree(seed + 1), adamw(1e-2)
    if nested:
        params, grads = [params], [grads]
    state = optimizer.init(params)
    wanted = optimizer.update(grads, state, params, 0.3)
    found = optimizer.update(grads, state, params, 0.3, donate=True)
    for (path, x), (_, y) in zip(tree_items(found), tree_items(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    olds = [x for _, x in tree_items((params, state.m, state.v))]
    news = [x for _, x in tree_items((found[0], found[1].m, found[1].v))]
    assert all(np.shares_memory(x, y) for x, y in zip(news, olds, strict=True) if x.size)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_parameters_keep_their_dtype_and_short_ones_have_a_float32_state(optimizer, dtype):
    params = tree(0, dtype)
    state = optimizer.init(params)
    for _ in range(2):
        new, state = optimizer.update(tree(1, dtype), state, params)
        assert [(p, x.shape, x.dtype) for p, x in tree_items(new)] == [
            (p, x.shape, x.dtype) for p, x in tree_items(params)
        ]
        kept = np.float64 if dtype == np.float64 else np.float32
        assert all(isinstance(x, np.ndarray) and x.dtype == kept for _, x in tree_items(state[1:]))
        assert type(state.step) is int


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(seed=seeds)
def test_a_factor_on_the_way_is_a_scaled_gradient(optimizer, seed):
    params, grads, factor = tree(seed), tree(seed + 1), 0.3
    state = optimizer.init(params)
    fused, _ = optimizer.update(grads, state, params, factor)
    scaled = tree_map(lambda g: np.asarray(g * np.float32(factor)), grads)
    plain, _ = optimizer.update(scaled, state, params)
    for (path, x), (_, y) in zip(tree_items(fused), tree_items(plain), strict=True):
        assert x.tobytes() == y.tobytes(), path


@given(seed=seeds, max_norm=st.floats(1e-3, 1e3))
def test_the_clip_factor_clips(seed, max_norm):
    grads = tree(seed)
    factor, norm = clip_factor(grads, max_norm)
    clipped, same = clip_by_global_norm(grads, max_norm)
    assert norm == same
    for (_, x), (_, y) in zip(tree_items(clipped), tree_items(grads), strict=True):
        np.testing.assert_array_equal(x, y * np.float32(factor))
    assert clip_factor(grads, math.inf)[0] == 1.0
    assert clip_factor({}, 1.0) == (1.0, 0.0)
    with pytest.raises(ValueError, match="max_norm must be above 0, got -1"):
        clip_factor(grads, -1)


def test_memory_order_of_the_gradient_changes_no_bit():
    rng = np.random.default_rng(0)
    params, gradient = {"w": rng.standard_normal((4, 6))}, rng.standard_normal((4, 6))
    optimizer = adamw(1e-2)
    state = optimizer.init(params)
    plain, _ = optimizer.update({"w": gradient}, state, params)
    turned, _ = optimizer.update({"w": np.asfortranarray(gradient)}, state, params)
    assert plain["w"].tobytes() == turned["w"].tobytes()
    assert turned["w"].flags.c_contiguous


def test_a_state_restored_by_path_continues_to_the_bit():
    """What a checkpoint does: every leaf of a state is an array or an integer and is found by its path."""
    optimizer, params = adamw(1e-2), tree(0)
    _, state = optimizer.update(tree(1), optimizer.init(params), params)
    saved = dict(tree_items(state))
    assert all(isinstance(x, np.ndarray | int) for x in saved.values())
    assert saved["step"] == 1
    assert "m.a.weight" in saved
    restored = optim.tree_map_path(lambda path, _: saved[path], optimizer.init(params))
    for (_, x), (_, y) in zip(
        tree_items(optimizer.update(tree(2), state, params)),
        tree_items(optimizer.update(tree(2), restored, params)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


MASKS = [
    {"w": True, "norm.weight": False},
    lambda path, x: path == "w" and x.ndim == 1,
    decay_mask({"w": np.ones(1), "norm.weight": np.ones(1)}),
]


@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_says_which_parameters_decay(mask):
    params = {"w": np.ones(1), "norm.weight": np.ones(1)}
    optimizer = adamw(0.1, weight_decay=0.5, mask=mask)
    new, _ = optimizer.update(tree_map(np.zeros_like, params), optimizer.init(params), params)
    assert new["w"] == 1 - 0.1 * 0.5
    assert new["norm.weight"] == 1.0
    everything = adamw(0.1, weight_decay=0.5)
    new, _ = everything.update(tree_map(np.zeros_like, params), everything.init(params), params)
    assert new["norm.weight"] == 0.95


def test_decay_mask_spares_time_scales_skips_norms_and_biases():
    layer = "backbone.layers.0."
    decays = ["backbone.embeddings.weight", "lm_head.weight", layer + "mixer.in_proj.weight",
              layer + "mixer.conv1d.weight", layer + "mixer.dt_proj.weight"]  # fmt: skip
    spared = [layer + "mixer.A_log", layer + "mixer.D", layer + "norm.weight", "backbone.norm_f.weight",
              layer + "mixer.conv1d.bias", layer + "mixer.dt_proj.bias", "A_log", "D", "bias"]  # fmt: skip
    mask = decay_mask(dict.fromkeys([*decays, *spared], np.ones(1)))
    assert [key for key, decayed in mask.items() if decayed] == decays
    assert decay_mask({"mixer": {"D": 0, "BAD": 0}}) == {"mixer": {"D": False, "BAD": True}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_wrong_gradient_is_named(optimizer):
    params = {"layer": {"w": np.ones((2, 3))}}
    state = optimizer.init(params)
    name = "adamw" if isinstance(state, optim.AdamWState) else "sgd"
    message = rf"{name}: the gradient of layer\.w must have shape \(2, 3\), got shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        optimizer.update({"layer": {"w": np.ones(3)}}, state, params)
    with pytest.raises(ValueError, match=r"gradient of layer\.w .* got NoneType"):
        optimizer.update({"layer": {"w": None}}, state, params)
    with pytest.raises(ValueError, match="trees differ at layer"):
        optimizer.update({"layer": {"v": np.ones(3)}}, state, params)


@given(seed=seeds, max_norm=st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_bounds_the_norm(seed, max_norm):
    grads = tree(seed, np.float64)
    flat = np.concatenate([x.ravel() for _, x in tree_items(grads)])
    clipped, norm = clip_by_global_norm(grads, max_norm)
    assert norm == pytest.approx(np.linalg.norm(flat), rel=1e-14)
    assert norm == global_norm(grads)
    assert global_norm(clipped) == pytest.approx(min(norm, max_norm), rel=1e-12)
    assert all(isinstance(x, np.ndarray) for _, x in tree_items(clipped))
    if norm <= max_norm:
        assert clipped is grads
    for (_, x), (_, y) in zip(tree_items(clipped), tree_items(grads), strict=True):
        np.testing.assert_allclose(x * norm, y * min(norm, max_norm), rtol=1e-12)


def test_norms_neither_overflow_nor_hide_what_is_not_finite():
    assert global_norm({"w": np.full(4, 1e30, np.float32)}) == pytest.approx(2e30, rel=1e-6)
    assert global_norm({"w": np.full(4, 300, np.float16)}) == 600.0
    for bad in (np.nan, np.inf):
        grads = {"w": np.array([1.0, bad])}
        clipped, norm = clip_by_global_norm(grads, 1.0)
        assert not math.isfinite(norm)
        assert clipped is grads
    assert clip_by_global_norm({"w": np.full(4, 300, np.float16)}, 1.0)[0]["w"].dtype == np.float16
    assert global_norm({}) == 0.0
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        clip_by_global_norm({}, 0)


@given(
    warmup=st.integers(0, 20), decay=st.integers(1, 50), peak=st.floats(1e-5, 1.0), share=st.floats(0.0, 1.0)
)
def test_the_schedule_rises_to_its_peak_and_falls_to_its_end(warmup, decay, peak, share):
    rate = warmup_cosine(peak, warmup, warmup + decay, peak * share)
    values = [rate(step) for step in range(warmup + decay + 2)]
    assert values[0] > 0
    assert values[warmup] == pytest.approx(peak, rel=1e-14)
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[-2:] == [pytest.approx(peak * share, abs=1e-16)] * 2


@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (5, 5), (6, 5)])
def test_a_schedule_needs_room_to_fall(warmup, total):
    with pytest.raises(ValueError, match=rf"must be in \[0, total_steps\), got {warmup} of {total}"):
        warmup_cosine(1.0, warmup, total)


def test_a_tree_without_arrays_has_its_updates_counted():
    for optimizer in OPTIMIZERS:
        _, state = optimizer.update({}, optimizer.init({}), {})
        assert state.step == 1


def test_eps_is_1e_8_unless_told():
    """Beside a gradient of that size it halves the first step."""
    update = adamw(1.0, weight_decay=0.0)
    params = {"w": np.zeros(1)}
    moved, _ = update.update({"w": np.full(1, 1e-8)}, update.init(params), params)
    assert moved["w"] == pytest.approx(-0.5, rel=1e-9)


def test_without_momentum_no_velocity_is_kept():
    params = {"w": np.ones(2)}
    assert sgd(0.1).init(params).velocity is None
    assert sgd(0.1, momentum=0.5).init(params).velocity["w"].tolist() == [0.0, 0.0]


def test_rates_begin_at_zero_and_end_before_infinity():
    for number in (-0.5, math.inf):
        with pytest.raises(ValueError, match="learning_rate must be at least 0 and finite"):
            adamw(number)
        with pytest.raises(ValueError, match="learning_rate must be at least 0 and finite"):
            sgd(number)
        with pytest.raises(ValueError, match="peak must be at least 0 and finite"):
            warmup_cosine(number, 1, 5)
        with pytest.raises(ValueError, match="momentum must be at least 0 and finite"):
            sgd(0.1, momentum=number)
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\)"):
        adamw(0.1, betas=(-0.5, 0.9))


class Layer(collections.namedtuple("Layer", "weight")):
    """A branch that takes no leaf but arrays."""

    def __new__(cls, weight):
        if weight is None:
            raise ValueError("a Layer has a weight")
        return super().__new__(cls, weight)


def test_what_a_tree_of_another_class_raises_is_told_as_it_is():
    with pytest.raises(ValueError, match="^a Layer has a weight$"):
        global_norm(Layer(np.ones(2)))


def test_arrays_of_one_gpu_are_asked_together_and_those_of_two_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    here = [fake_cupy.array(np.zeros(3, dtype)) for dtype in (np.float32, np.float16)]
    assert leaves.library("adamw", ["a", "b"], params=here, grads=[None, here[0]]) is fake_cupy
    with pytest.raises(TypeError, match=r"params\['b'\] must be .* got int64"):
        leaves.library("adamw", ["a", "b"], params=[here[0], fake_cupy.array(np.zeros(3, np.int64))])
    with pytest.raises(TypeError, match=r"params\['a'\] is a cupy array, but params\['b'\] is a numpy array"):
        leaves.library("adamw", ["a", "b"], params=[here[0], np.zeros(3)])
    monkeypatch.setattr(fake_cupy.cuda, "current", 1)
    there = fake_cupy.array(np.zeros(3))
    with pytest.raises(ValueError, match=r"params\['a'\] is on GPU 0, but params\['b'\] is on GPU 1"):
        leaves.library("adamw", ["a", "b"], params=[here[0], there])


def test_only_floating_arrays_are_parameters():
    for optimizer in OPTIMIZERS:
        with pytest.raises(TypeError, match=r"params\['w'\] must be"):
            optimizer.init({"w": np.ones(2, np.int64)})
    with pytest.raises(TypeError, match=r"tree\['w'\] must be"):
        global_norm({"w": np.ones(2, np.int64)})
