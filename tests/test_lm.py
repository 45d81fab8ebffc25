"""The language model: logits and gradients against the reference, generation step by step, packing, dropout, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from arrays import error, run_without_compiler, same_bits
from cases import seeds, seq_idx_case
from hypothesis import given
from hypothesis import strategies as st
from models import configs, random_params, random_tokens, tiny

from npmamba import MambaConfig, MambaLM, lm
from npmamba.autodiff import value_and_grad
from npmamba.block import BlockState
from npmamba.checkpoint import in_half
from npmamba.cuda import requirements
from npmamba.reference import language_model as reference

VARIANTS = {
    "as published": {},
    "untied": {"tie_embeddings": False},
    "all biases": {"bias": True},
    "no conv bias": {"conv_bias": False},
    "zoh": {"discretization": "zoh"},
    "zoh, untied, all biases": {"discretization": "zoh", "tie_embeddings": False, "bias": True},
    "sizes of one": {"d_model": 1, "expand": 1, "d_conv": 1, "d_state": 1, "dt_rank": 1, "bias": True},
}
H = 1e-30


def tiny_model(seed: int = 0, dtype: Any = np.float64, **options: Any) -> MambaLM:
    config = tiny(**options)
    return MambaLM(config, random_params(config, seed, dtype))


def copied(state: Any) -> Any:
    return [BlockState(*(q.copy() for q in block)) for block in state]


def same_states(a: Any, b: Any) -> bool:
    return all(same_bits(tuple(x), tuple(y)) for x, y in zip(a, b, strict=True))


def state_error(found: Any, expected: Any) -> float:
    pairs = [(x, y) for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=True)]
    return max(error(x, y) for x, y in pairs)


# Against the reference, which knows neither tape nor kernels


@given(configs(), seeds, st.sampled_from([0, 1, 9, 70]), st.sampled_from([None, "runs", "padded"]))
def test_logits_are_those_of_the_reference(config, seed, seqlen, packing):
    params, ids = random_params(config, seed), random_tokens(config, 2, seqlen, seed)
    seq_idx = seq_idx_case(np.random.default_rng(seed), 2, seqlen, packing)
    expected = reference.logits(params, config, ids, seq_idx=seq_idx)
    assert error(lm.logits(params, config, ids, seq_idx=seq_idx), expected) <= 1e-12


@given(configs(), seeds)
def test_float32_logits_are_close_to_the_reference(config, seed):
    params, ids = random_params(config, seed, np.float32), random_tokens(config, 2, 40, seed)
    found = lm.logits(params, config, ids)
    assert found.dtype == np.float32
    assert error(found, reference.logits(params, config, ids)) <= 1e-4


def derivative(params: Any, key: str, direction: Any, arguments: Any, options: Any) -> float:
    """Return the derivative of the reference's loss along a direction of one parameter, by the complex step."""
    moved = {**params, key: params[key] + 1j * H * direction}
    return float(reference.loss(moved, *arguments, **options).imag / H)


def directions(gradient: np.ndarray, rng: np.random.Generator) -> Any:
    """Draw two random directions and three single elements; yield each with the size by which to judge errors."""
    for _ in range(2):
        w = rng.standard_normal(gradient.shape)
        yield w, np.abs(gradient * w).sum()
    for element in rng.integers(0, gradient.size, 3):
        w = np.zeros(gradient.shape)
        w.flat[element] = 1
        yield w, np.abs(gradient).max()


@pytest.mark.parametrize("packing", [None, "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_is_the_complex_step_of_the_reference(variant, packing):
    rng = np.random.default_rng(len(variant))
    model = tiny_model(seed=len(variant), **VARIANTS[variant])
    ids, targets = (random_tokens(model.config, 2, 8, seed) for seed in (1, 2))
    targets[rng.random(targets.shape) < 0.3] = -7
    options = {"seq_idx": seq_idx_case(rng, 2, 8, packing), "ignore_index": -7}
    arguments = (model.config, ids, targets)
    value, gradients = value_and_grad(lm.loss)(model.params, *arguments, **options)
    assert error(value, reference.loss(model.params, *arguments, **options)) <= 1e-13
    assert gradients.keys() == model.params.keys()
    errors = dict.fromkeys(gradients, 0.0)
    for key, gradient in gradients.items():
        for w, size in directions(gradient, rng):
            expected = derivative(model.params, key, w, arguments, options)
            errors[key] = max(errors[key], abs((gradient * w).sum() - expected) / size)
    assert max(errors.values()) <= 1e-9, errors
    assert sum(bool(g.any()) for g in gradients.values()) == len(gradients)


@given(configs(), seeds)
def test_float32_gradients_are_close_to_those_of_float64(config, seed):
    params, ids = random_params(config, seed), random_tokens(config, 2, 12, seed)
    _, expected = MambaLM(config, params).loss_and_grads(ids, ids)
    _, found = MambaLM(config, {key: x.astype(np.float32) for key, x in params.items()}).loss_and_grads(ids, ids)
    assert all(g.dtype == np.float32 for g in found.values())
    whole = np.sqrt(sum((g * g).sum() for g in expected.values()))
    assert max(np.abs(found[key] - expected[key]).max() for key in expected) <= 1e-3 * whole


# Step by step

TOLERANCES = {np.float32: 1e-5, np.float64: 1e-12}
dtypes = st.sampled_from(list(TOLERANCES))


@given(configs(), seeds, dtypes, st.integers(1, 3), st.integers(1, 20))
def test_steps_from_nothing_are_the_full_pass(config, seed, dtype, batch, seqlen):
    model = MambaLM(config, random_params(config, seed, dtype))
    ids, state = random_tokens(config, batch, seqlen, seed), model.init_state(batch)
    steps = np.stack([model.step(ids[:, t], state) for t in range(seqlen)], axis=1)
    assert steps.dtype == dtype
    assert error(steps, model(ids)) <= TOLERANCES[dtype]
    assert state_error(state, model.prefill(ids)[1]) <= TOLERANCES[dtype]


@given(configs(), seeds, dtypes, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5))
def test_prefill_in_pieces_and_then_steps_are_the_full_pass(config, seed, dtype, lengths, steps):
    model = MambaLM(config, random_params(config, seed, dtype))
    ids = random_tokens(config, 2, sum(lengths) + steps, seed)
    expected, end, state = model(ids), 0, None
    for length in lengths:
        scores, state = model.prefill(ids[:, end : end + length], state)
        end += length
        assert error(scores, expected[:, end - 1]) <= TOLERANCES[dtype]
    for t in range(end, end + steps):
        assert error(model.step(ids[:, t], state), expected[:, t]) <= TOLERANCES[dtype]
    assert state_error(state, model.prefill(ids)[1]) <= TOLERANCES[dtype]


def test_prefill_from_the_empty_state_is_prefill():
    model = tiny_model()
    ids = random_tokens(model.config, 2, 5)
    (a, state_a), (b, state_b) = model.prefill(ids), model.prefill(ids, model.init_state(2))
    assert same_bits(a, b)
    assert same_states(state_a, state_b)


def test_the_empty_state_has_the_model_s_shapes_and_zeros():
    model = tiny_model(dtype=np.float32)
    state, c = model.init_state(5), model.config
    assert len(state) == c.n_layer
    for block in state:
        assert block.conv.shape == (5, c.d_inner, c.d_conv - 1)
        assert block.ssm.shape == (5, c.d_inner, c.d_state)
        assert block.conv.dtype == block.ssm.dtype == np.float32
        assert not block.conv.any()
        assert not block.ssm.any()


def test_prefill_leaves_its_state_alone_and_a_step_changes_it_in_place():
    model = tiny_model()
    ids = random_tokens(model.config, 2, 5)
    _, state = model.prefill(ids)
    before, arrays = copied(state), [q for block in state for q in block]
    _, after = model.prefill(ids, state)
    assert same_states(state, before)
    model.step(ids[:, 0], state)
    for block, old in zip(state, before, strict=True):
        assert (block.conv != old.conv).any()
        assert (block.ssm != old.ssm).any()
    assert all(a is b for a, b in zip(arrays, (q for block in state for q in block), strict=True))
    assert not any(np.may_share_memory(x, y) for a, b in zip(after, state, strict=True) for x in a for y in b)


def test_a_refused_token_leaves_the_state_alone():
    model = tiny_model()
    _, state = model.prefill(random_tokens(model.config, 2, 5))
    before = copied(state)
    with pytest.raises(ValueError, match="vocab_size=11"):
        model.step(np.array([3, 11]), state)
    assert same_states(state, before)


@given(configs(), seeds, st.integers(1, 2))
def test_greedy_generation_is_reading_everything_again_for_each_token(config, seed, batch):
    model = MambaLM(config, random_params(config, seed))
    prompt = random_tokens(config, batch, 3, seed)
    expected = prompt
    for _ in range(4):
        expected = np.c_[expected, model(expected)[:, -1].argmax(-1)]
    np.testing.assert_array_equal(model.generate(prompt, 4), expected)


def test_generation_draws_by_seed():
    model = tiny_model()
    ids = random_tokens(model.config, 2, 3)
    a, b, c = (model.generate(ids, 20, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


# Time, rows and packing


@given(configs(tie_embeddings=False), seeds, st.integers(1, 12))
def test_logits_do_not_see_the_future(config, seed, t):
    """From time t on, every token is one whose embedding is NaN."""
    params, ids = random_params(config, seed), random_tokens(config, 2, 12, seed) % (config.vocab_size - 1)
    expected = lm.logits(params, config, ids)
    params["backbone.embeddings.weight"][-1] = np.nan
    ids[:, t:] = config.vocab_size - 1
    found = lm.logits(params, config, ids)
    assert error(found[:, :t], expected[:, :t]) <= 1e-12
    assert np.isnan(found[:, t:]).all()


@given(configs(), seeds, st.integers(2, 4))
def test_rows_of_a_batch_do_not_see_each_other(config, seed, batch):
    params, ids = random_params(config, seed, np.float32), random_tokens(config, batch, 17, seed)
    together = lm.logits(params, config, ids)
    for b in range(batch):
        assert error(together[b : b + 1], lm.logits(params, config, ids[b : b + 1])) <= 1e-6


@given(configs(), seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_packed_sequences_are_the_separate_ones(config, seed, lengths, padded):
    params, ids = random_params(config, seed), random_tokens(config, 2, sum(lengths), seed)
    seq_idx = np.repeat(np.arange(len(lengths)) * 3 % 5, lengths)
    places = np.arange(sum(lengths))
    if padded:  # one absent step before every token
        ids, seq_idx = np.repeat(ids, 2, axis=1), np.stack([np.full_like(seq_idx, -1), seq_idx], axis=1).ravel()
        places = 2 * places + 1
    packed = lm.logits(params, config, ids, seq_idx=np.broadcast_to(seq_idx, ids.shape))[:, places]
    for piece in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]):
        assert error(packed[:, piece], lm.logits(params, config, ids[:, places[piece]])) <= 1e-12


def test_the_loss_of_packed_sequences_is_the_mean_over_their_tokens():
    model = tiny_model()
    a, b = random_tokens(model.config, 1, 5, seed=1), random_tokens(model.config, 1, 8, seed=2)
    targets = np.concatenate([lm.next_token_labels(a), lm.next_token_labels(b)], axis=1)
    seq_idx = np.repeat([[0, 1]], [5, 8], axis=1)
    packed = lm.loss(model.params, model.config, np.concatenate([a, b], axis=1), targets, seq_idx=seq_idx)
    (loss_a, _), (loss_b, _) = model.loss_and_grads(a, a), model.loss_and_grads(b, b)
    assert error(packed, (4 * loss_a + 7 * loss_b) / 11) <= 1e-13


# Loss and labels


@given(configs(), seeds, st.integers(1, 9))
def test_the_loss_is_the_mean_surprise_at_the_next_token(config, seed, seqlen):
    model, ids = MambaLM(config, random_params(config, seed)), random_tokens(config, 2, seqlen + 1, seed)
    labels = np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, -100, ids)
    labels[0, 1] = ids[0, 1]
    surprise = -scipy.special.log_softmax(model(ids)[:, :-1], axis=-1)
    counted = [surprise[b, t, labels[b, t + 1]] for b, t in np.ndindex(2, seqlen) if labels[b, t + 1] != -100]
    assert error(model.loss_and_grads(ids, labels)[0], np.mean(counted)) <= 1e-12


def test_another_label_can_be_the_one_that_does_not_count():
    model = tiny_model()
    ids = random_tokens(model.config, 2, 9)
    loss, gradients = model.loss_and_grads(ids, ids, ignore_index=4)
    expected, others = model.loss_and_grads(ids, np.where(ids == 4, -100, ids))
    assert (ids[:, 1:] == 4).any()
    assert same_bits(loss, expected)
    assert all(same_bits(gradients[key], others[key]) for key in others)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_type_are_shifted(dtype):
    labels = np.array([[5, 6, 7], [8, 9, 10]], dtype)
    np.testing.assert_array_equal(lm.next_token_labels(labels), [[6, 7, -100], [9, 10, -100]])
    np.testing.assert_array_equal(lm.next_token_labels(labels, ignore_index=-1000)[:, -1], -1000)
    model = tiny_model()
    expected, _ = model.loss_and_grads(labels.astype(int), labels.astype(int))
    assert same_bits(model.loss_and_grads(labels, labels)[0], expected)


def test_labels_are_left_as_they_are():
    labels = np.array([[5, 6, 7]])
    assert lm.next_token_labels(labels) is not labels
    np.testing.assert_array_equal(labels, [[5, 6, 7]])


# Dropout


def test_dropout_is_off_without_a_key():
    model, ids = tiny_model(dropout=0.5), random_tokens(tiny(), 2, 7)
    plain = MambaLM(tiny(), model.params)
    assert same_bits(model(ids), plain(ids))
    (loss, gradients), (expected, others) = model.loss_and_grads(ids, ids), plain.loss_and_grads(ids, ids)
    assert same_bits(loss, expected)
    assert all(same_bits(gradients[key], others[key]) for key in others)


def test_a_key_without_a_rate_changes_nothing():
    model, ids = tiny_model(), random_tokens(tiny(), 2, 7)
    assert same_bits(lm.logits(model.params, model.config, ids, dropout_key=(1, 2)), model(ids))


def test_dropout_is_a_function_of_its_key():
    model, ids = tiny_model(dropout=0.5), random_tokens(tiny(), 2, 7)
    one, again, next_step, other_seed = (
        lm.logits(model.params, model.config, ids, dropout_key=key) for key in [(0, 1), (0, 1), (0, 2), (1, 1)]
    )
    assert same_bits(one, again)
    assert len({x.tobytes() for x in (one, next_step, other_seed, model(ids))}) == 4


def test_the_loss_with_dropout_and_its_gradients_are_functions_of_the_key():
    model, ids = tiny_model(dropout=0.5), random_tokens(tiny(), 2, 7)
    (a, da), (b, db), (c, dc) = (model.loss_and_grads(ids, ids, dropout_key=key) for key in [(3, 1), (3, 1), (3, 2)])
    assert same_bits(a, b)
    assert all(same_bits(da[key], db[key]) for key in da)
    assert a != c
    assert all((da[key] != dc[key]).any() for key in da)


def test_every_layer_drops_values_of_its_own(monkeypatch):
    model, ids, keys = tiny_model(dropout=0.25), random_tokens(tiny(), 2, 30), []
    drop = lm.dropout

    def watched(x: Any, *, rate: float, key: Any) -> Any:
        out = drop(x, rate=rate, key=key)
        keys.append((key, (out == 0).tobytes()))
        assert rate == 0.25
        assert 0.1 < (out == 0).mean() < 0.4
        return out

    monkeypatch.setattr(lm, "dropout", watched)
    for key in [(5, 1), (5, 2)]:
        lm.logits(model.params, model.config, ids, dropout_key=key)
    assert [key for key, _ in keys] == [(5, 1, 0), (5, 1, 1), (5, 2, 0), (5, 2, 1)]
    assert len({mask for _, mask in keys}) == 4


def test_gradients_with_dropout_are_those_of_the_loss_with_dropout():
    model, ids = tiny_model(dropout=0.3), random_tokens(tiny(), 2, 6)
    targets, rng = lm.next_token_labels(ids), np.random.default_rng(0)

    def loss(params: Any) -> Any:
        return lm.loss(params, model.config, ids, targets, dropout_key=(4, 2))

    _, gradients = value_and_grad(loss)(model.params)
    w = {key: rng.standard_normal(x.shape) for key, x in model.params.items()}
    slope = sum((gradients[key] * w[key]).sum() for key in w)
    up, down = (float(loss({key: x + t * w[key] for key, x in model.params.items()})) for t in (1e-5, -1e-5))
    assert slope == pytest.approx((up - down) / 2e-5, rel=1e-6)


# Saving and loading


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_loading_and_saving_again_gives_the_same_bytes(variant, dtype, tmp_path):
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "a")
    again = MambaLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert again.config == model.config
    assert again.params.keys() == model.params.keys()
    assert all(same_bits(again.params[key], model.params[key]) for key in model.params)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_model_loads_in_the_dtype_asked_for(tmp_path):
    model = tiny_model(dtype=np.float64)
    model.save_pretrained(tmp_path)
    for dtype in (np.float32, "float32", np.dtype(np.float64)):
        loaded = MambaLM.from_pretrained(tmp_path, dtype=dtype)
        assert {x.dtype for x in loaded.params.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_stored_in_half_precision_computes_in_float32(dtype, tmp_path):
    model, ids = tiny_model(dtype=np.float32), random_tokens(tiny(), 1, 5)
    model.save_pretrained(tmp_path, dtype=dtype)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert loaded(ids).dtype == np.float32
    assert error(loaded(ids), model(ids)) <= 0.1
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype


# Errors


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        (np.array([1, 2]), ValueError, r"MambaLM: input_ids must be \(batch, seqlen\), got shape \(2,\)"),
        (np.zeros((1, 2, 3), int), ValueError, r"MambaLM: input_ids must be \(batch, seqlen\), got shape \(1, 2, 3\)"),
        (np.array([[1.0]]), TypeError, r"input_ids must be an array \(batch, seqlen\) of integers, got float64"),
        (np.array([[True]]), TypeError, r"input_ids must be an array \(batch, seqlen\) of integers, got bool"),
        ([[1, 2]], TypeError, r"input_ids must be an array \(batch, seqlen\) of integers, got list"),
        (np.array([[0, 11]]), ValueError, r"input_ids\[0, 1\] is 11, but vocab_size=11; ids must be from 0 to 10"),
        (np.array([[0], [-1]]), ValueError, r"input_ids\[1, 0\] is -1, but vocab_size=11"),
    ],
)
def test_token_ids_that_do_not_fit_are_named(ids, kind, message):
    model = tiny_model()
    for call in (model, model.prefill, lambda ids: model.loss_and_grads(ids, ids)):
        with pytest.raises(kind, match=message):
            call(ids)


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        (np.array([[1, 2]]), ValueError, r"MambaLM: token_ids must be \(batch,\), got shape \(1, 2\)"),
        (np.array([1.0, 2.0]), TypeError, r"token_ids must be an array \(batch,\) of integers, got float64"),
        (np.array([1, 99]), ValueError, r"input_ids\[1\] is 99, but vocab_size=11"),
        (np.array([1, 2, 3]), ValueError, r"causal_conv1d_update: state has batch=2, but x has batch=3"),
    ],
)
def test_tokens_of_a_step_that_do_not_fit_are_named(ids, kind, message):
    model = tiny_model()
    state = model.init_state(2)
    with pytest.raises(kind, match=message):
        model.step(ids, state)


def test_prefill_wants_a_token():
    with pytest.raises(ValueError, match=r"input_ids must have at least one token each, got shape \(2, 0\)"):
        tiny_model().prefill(np.zeros((2, 0), int))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_state_of_another_model_is_refused(layers):
    model, ids = tiny_model(), random_tokens(tiny(), 2, 3)
    state = tiny_model(n_layer=layers).init_state(2)
    for call in (lambda: model.prefill(ids, state), lambda: model.step(ids[:, 0], state)):
        with pytest.raises(ValueError, match=f"state must hold a BlockState for each of 2 layers, got {layers}"):
            call()


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (np.zeros((2, 4), int), ValueError, r"labels have shape \(2, 4\), but input_ids have shape \(2, 5\)"),
        (np.zeros(5, int), ValueError, r"labels must be \(batch, seqlen\), got shape \(5,\)"),
        (np.zeros((2, 5)), TypeError, r"labels must be an array \(batch, seqlen\) of integers, got float64"),
        (np.full((2, 5), 11), ValueError, r"labels\[0, 0\] is 11, but logits has vocab=11"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, kind, message):
    with pytest.raises(kind, match=message):
        tiny_model().loss_and_grads(np.ones((2, 5), int), labels)


def test_a_seq_idx_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"seq_idx has seqlen=4, but x has seqlen=5; seq_idx must be \(batch, "):
        tiny_model()(np.ones((2, 5), int), seq_idx=np.zeros((2, 4), int))


def test_parameters_that_are_not_the_model_s_are_named():
    params = random_params(tiny())
    key = "backbone.layers.1.mixer.D"
    with pytest.raises(ValueError, match=r"params\['backbone.layers.1.mixer.D'\] must have shape \(20,\), got none"):
        MambaLM(tiny(), {name: x for name, x in params.items() if name != key})
    with pytest.raises(ValueError, match=r"mixer.D'\] must have shape \(20,\), got \(21,\)"):
        MambaLM(tiny(), {**params, key: np.ones(21)})
    with pytest.raises(ValueError, match=r"params\['lm_head.weight'\] must not be there, got \(11, 10\)"):
        MambaLM(tiny(), {**params, "lm_head.weight": np.ones((11, 10))})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"backend": "torch"}, ValueError, "from_pretrained: backend must be 'numpy' or 'cupy', got 'torch'"),
        ({"dtype": "int8"}, TypeError, "from_pretrained: dtype must be float16, bfloat16, float32, float64 or None"),
        ({"dtype": "bf16"}, TypeError, "from_pretrained: dtype must be float16, .* or None, got 'bf16'"),
    ],
)
def test_unknown_options_of_loading_are_refused(options, kind, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(kind, match=message):
        MambaLM.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", ml_dtypes.bfloat16])
def test_a_model_runs_in_half_precision_with_a_float32_stream(dtype, tmp_path):
    config = tiny(d_model=32, n_layer=3)
    model, ids = MambaLM(config, random_params(config, dtype=np.float32)), random_tokens(config, 2, 9)
    model.save_pretrained(tmp_path)
    half = MambaLM.from_pretrained(tmp_path, dtype=dtype)
    wide = {key for key, x in half.params.items() if x.dtype == np.float32}
    ends = ("norm.weight", "norm_f.weight", "conv1d.weight", "conv1d.bias", "A_log", ".D", "dt_proj.bias")
    assert wide == {key for key in half.params if key.endswith(ends)}
    assert {x.dtype for key, x in half.params.items() if key not in wide} == {np.dtype(dtype)}
    scores = half(ids)
    assert scores.dtype == np.float32
    assert 0 < error(scores, model(ids)) <= 0.02
    last, state = half.prefill(ids[:, :-1])
    assert same_bits(last, scores[:, -2])
    assert error(half.step(ids[:, -1], state), scores[:, -1]) <= 1e-6
    assert {x.dtype for block in state for x in block} == {np.dtype(np.float32)}
    loss, gradients = half.loss_and_grads(ids, ids)
    assert loss.dtype == np.float32
    assert {key: g.dtype for key, g in gradients.items()} == {key: x.dtype for key, x in half.params.items()}


def test_the_stream_is_as_narrow_as_the_configuration_asks():
    """With residual_in_fp32 switched off, the sums of the layers are rounded to half precision."""
    config = tiny(d_model=32, n_layer=3)
    params, ids = in_half(random_params(config, dtype=np.float32), "bfloat16"), random_tokens(config, 2, 9)
    wide, narrow = (MambaLM(replace(config, residual_in_fp32=flag), params)(ids) for flag in (True, False))
    assert 0 < error(narrow, wide) <= 0.05


def test_a_missing_cupy_names_the_extra(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(requirements, "release", lambda: (12, 8))
    monkeypatch.setattr(requirements, "version", lambda package: None)
    with pytest.raises(requirements.CudaUnavailableError, match=r"CuPy is not installed; .* 'npmamba\[cuda12\]'"):
        MambaLM.from_pretrained(tmp_path, backend="cupy")


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        MambaLM.from_pretrained(tmp_path)


# The rest


def test_a_new_model_is_drawn_by_its_seed_and_tells_its_size():
    config = tiny(pad_vocab_size_multiple=8)
    a, b = MambaLM(config, seed=5), MambaLM(config, seed=6)
    ids = random_tokens(config, 1, 4)
    assert a(ids).shape == (1, 4, 16)
    assert a(ids).dtype == np.float32
    assert (a(ids) != b(ids)).any()
    sizes = "2 layers, d_model 10, d_state 3, vocabulary 11"
    assert repr(a) == f"MambaLM({sizes}: {config.parameter_count():,} parameters)"


def test_an_empty_batch_has_empty_logits():
    assert tiny_model()(np.zeros((0, 5), int)).shape == (0, 5, 11)
    assert tiny_model()(np.zeros((2, 0), int)).shape == (2, 0, 11)


def test_without_the_compiler_the_logits_are_the_same(tmp_path):
    config = MambaConfig(vocab_size=5, d_model=3, n_layer=2, d_state=2, dt_rank=1)
    model, ids = MambaLM(config, random_params(config)), random_tokens(config, 1, 3)
    model.save_pretrained(tmp_path)
    np.save(tmp_path / "logits.npy", model(ids))
    run_without_compiler(f"""
import numpy as np
from npmamba import MambaLM
model, ids = MambaLM.from_pretrained({str(tmp_path)!r}), np.array({ids.tolist()})
expected = np.load({str(tmp_path / "logits.npy")!r})
np.testing.assert_allclose(model(ids), expected, rtol=0, atol=1e-12 * abs(expected).max())
state = model.init_state(1)
steps = [model.step(ids[:, t], state) for t in range(3)]
np.testing.assert_allclose(np.stack(steps, 1), expected, rtol=0, atol=1e-12 * abs(expected).max())
""")
