"""Sampling: the laws of temperature, top-k and top-p, and of generation with a state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.generate import generate, probabilities, sample_token

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


def draw_logits(seed: int, vocab: int, batch: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(scale=rng.choice([0.1, 3.0, 50.0]), size=(batch, vocab))
    return np.round(x) if seed % 2 else x  # half of the cases have ties


@given(seeds, sizes, st.floats(0.05, 20), st.integers(0, 45), st.floats(0.01, 1.0))
def test_probabilities_are_a_distribution(seed, vocab, temperature, top_k, top_p):
    p = probabilities(draw_logits(seed, vocab), temperature=temperature, top_k=top_k, top_p=top_p)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=1e-12)


@given(seeds, sizes, st.floats(0.05, 20))
def test_without_limits_probabilities_are_the_softmax(seed, vocab, temperature):
    x = draw_logits(seed, vocab) / temperature
    expected = np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))
    np.testing.assert_allclose(probabilities(x * temperature, temperature=temperature), expected, atol=1e-12)


@given(seeds, sizes, st.integers(1, 45))
def test_top_k_keeps_the_k_likeliest_and_their_ratios(seed, vocab, k):
    x = draw_logits(seed, vocab)
    full, p = probabilities(x), probabilities(x, top_k=k)
    for whole, kept in zip(full, p, strict=True):
        chosen = np.argsort(-whole, kind="stable")[:k]
        np.testing.assert_allclose(kept[chosen], whole[chosen] / whole[chosen].sum(), rtol=1e-9)
        assert np.delete(kept, chosen).sum() == 0


@given(seeds, sizes, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, vocab, top_p):
    x = draw_logits(seed, vocab)
    full, p = probabilities(x), probabilities(x, top_p=top_p)
    for whole, kept in zip(full, p, strict=True):
        nucleus = np.flatnonzero(kept)
        assert whole[nucleus].sum() >= top_p - 1e-9
        assert whole[nucleus].sum() - whole[nucleus].min() < top_p + 1e-9
        outside = np.delete(whole, nucleus)
        assert outside.size == 0 or outside.max() <= whole[nucleus].min()


@given(seeds, st.integers(2, 20), st.integers(1, 5), st.floats(0.3, 0.9))
def test_top_k_comes_before_top_p(seed, vocab, k, top_p):
    x = draw_logits(seed, vocab)
    with np.errstate(divide="ignore"):
        after_k = np.log(probabilities(x, top_k=k))
    np.testing.assert_allclose(
        probabilities(x, top_k=k, top_p=top_p), probabilities(after_k, top_p=top_p), atol=1e-9
    )


@given(seeds, sizes, st.integers(0, 5), st.floats(0.05, 1.0))
def test_a_token_of_probability_zero_is_never_drawn(seed, vocab, top_k, top_p):
    x = draw_logits(seed, vocab, batch=20)
    p = probabilities(x, top_k=top_k, top_p=top_p)
    token = sample_token(x, np.random.default_rng(seed), 1.0, top_k, top_p)
    assert (p[np.arange(20), token] > 0).all()


def test_rounding_never_draws_a_token_of_probability_zero():
    class AlmostOne:
        def random(self, shape):
            return np.full(shape, np.nextafter(1.0, 2.0))  # beyond what any generator draws

    assert sample_token([[1.0, 1.0, 1.0, -np.inf]], AlmostOne()) == 2


@given(seeds, sizes)
def test_temperature_zero_is_the_first_largest_and_draws_nothing(seed, vocab):
    x = draw_logits(seed, vocab)
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(sample_token(x, rng, 0.0), x.argmax(axis=-1))
    assert rng.random() == np.random.default_rng(1).random()


def test_draws_follow_the_distribution():
    x = np.log([[0.5, 0.3, 0.15, 0.05]])
    drawn = sample_token(np.repeat(x, 40_000, axis=0), np.random.default_rng(3))
    np.testing.assert_allclose(np.bincount(drawn) / 40_000, np.exp(x[0]), atol=0.01)


@given(seeds, sizes)
def test_a_tiny_temperature_is_greedy_where_there_are_no_ties(seed, vocab):
    x = np.random.default_rng(seed).permutation(vocab).astype(float)[None]
    assert sample_token(x, np.random.default_rng(seed), 1e-300) == x.argmax()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": np.nan}, "temperature must be at least 0"),
        ({"temperature": np.inf}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_p": np.nan}, "top_p must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probabilities([1.0, 2.0], **options)


@pytest.mark.parametrize("row", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_without_a_finite_largest_value_are_refused(row):
    with pytest.raises(ValueError, match="NaN or has no finite"):
        sample_token([row], np.random.default_rng(0))


class Echo:
    """A model whose next token prefers the sum of all tokens read so far: its state is that sum."""

    vocab = 11

    def prefill(self, ids):
        state = ids.sum(axis=1)
        return self._logits(state), state

    def step(self, token, state):
        state += token
        return self._logits(state)

    def _logits(self, state):
        return 2.0 * np.eye(self.vocab)[state % self.vocab]


@given(seeds, st.integers(1, 4), st.integers(0, 12))
def test_greedy_generation_equals_rereading_everything(seed, batch, new):
    ids = np.random.default_rng(seed).integers(0, 11, size=(batch, 5))
    expected = ids
    for _ in range(new):
        expected = np.c_[expected, expected.sum(axis=1) % 11]
    np.testing.assert_array_equal(generate(Echo(), ids, new), expected)


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_the_same_seed_gives_the_same_tokens_and_more_tokens_a_longer_answer(seed, n, m):
    ids = np.array([[1, 2], [3, 4]])
    long = generate(Echo(), ids, n + m, temperature=1.0, seed=seed)
    np.testing.assert_array_equal(long, generate(Echo(), ids, n + m, temperature=1.0, seed=seed))
    np.testing.assert_array_equal(long[:, : 2 + n], generate(Echo(), ids, n, temperature=1.0, seed=seed))


def test_different_seeds_differ():
    a, b = (generate(Echo(), [[1]], 50, temperature=3.0, seed=s) for s in (1, 2))
    assert (a != b).any()


def test_rows_go_on_with_eos_and_generation_stops_when_all_have_it():
    out = generate(Echo(), np.array([[1, 2], [1, 1]]), 20, eos_token_id=4)
    # row 0: 1 2 3 6 1 2 4; row 1: 1 1 2 4 4 4 4
    np.testing.assert_array_equal(out, [[1, 2, 3, 6, 1, 2, 4], [1, 1, 2, 4, 4, 4, 4]])


@pytest.mark.parametrize("ids", [[1, 2], [[1.0]], np.zeros((1, 0), int), np.zeros((0, 3), int)])
def test_prompts_that_are_no_token_rows_are_refused(ids):
    with pytest.raises(ValueError, match="input_ids must"):
        generate(Echo(), ids, 3)


def test_the_prompt_keeps_its_dtype():
    assert generate(Echo(), np.array([[1]], dtype=np.int32), 2).dtype == np.int32
