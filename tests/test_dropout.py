"""Dropout's generator against its published vectors, and the laws of the numbers that fall."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from arrays import layouts, run_without_compiler, same_bits
from cases import seeds
from hypothesis import given
from hypothesis import strategies as st

from npmamba.cpu import runtime
from npmamba.cpu.dropout import BLOCK, FOURS, backward, forward
from npmamba.scalar import philox

KEY = (1, 2, 3, 4)
# The known answers that come with Random123, the authors' own library: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    arguments = [np.uint64(int(word, 16)) for word in f"{counter} {key}".split()]
    assert " ".join(f"{int(word):08x}" for word in philox(*arguments)) == words


def kept(count, rate, key):
    """Which numbers stay, four words of the generator at a time."""
    words = [philox(*map(np.uint64, (i, 0, *key[2:], *key[:2]))) for i in range(-(-count // 4))]
    return np.array(words, np.uint64).reshape(-1)[:count] >= int(rate * 2**32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@given(seeds, st.integers(0, 70), st.floats(0, 0.9), st.tuples(*[st.integers(0, 2**32 - 1)] * 4))
def test_numbers_whose_word_is_small_fall(dtype, seed, count, rate, key):
    x = np.random.default_rng(seed).standard_normal(count).astype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = np.where(kept(count, rate, key), x.astype(wide) * wide(1 / (1 - rate)), wide(0)).astype(dtype)
    assert same_bits(forward(x, rate=rate, key=key), expected)


def test_words_drawn_together_are_followed_by_the_next():
    """For numbers beyond those whose words are drawn together, and beyond a block, the counter goes on."""
    for count in (4 * FOURS + 9, BLOCK + 4 * FOURS + 9):
        out = forward(np.ones(count), rate=0.5, key=KEY)
        tail = slice(count - 30, None)
        assert same_bits(out[tail], np.where(kept(count, 0.5, KEY)[tail], 2.0, 0.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_and_any_neighbours_give_the_same_bits(dtype):
    x, results = np.random.default_rng(0).standard_normal(5 * BLOCK + 7).astype(dtype), []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(forward(x, rate=0.3, key=KEY))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])
    assert same_bits(forward(x[: BLOCK + 6], rate=0.3, key=KEY), results[0][: BLOCK + 6])


def test_any_memory_gives_the_same_bits():
    x = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    expected = forward(x, rate=0.3, key=KEY)
    for layout, same in layouts(x).items():
        assert same_bits(forward(same, rate=0.3, key=KEY), expected), layout


def test_the_share_that_falls_is_the_rate():
    out = forward(np.ones(200_000, np.float32), rate=0.3, key=KEY)
    assert abs(np.mean(out == 0) - 0.3) < 0.005
    assert abs(out.mean() - 1) < 0.005


@given(seeds, st.integers(1, 70), st.floats(0, 0.9))
def test_the_gradient_is_the_transpose(seed, count, rate):
    """<dout, dropout(x)> = <gradient(dout), x>, for whole numbers, whose sums are exact but for the factor."""
    x, dout = np.random.default_rng(seed).integers(-9, 10, (2, count)).astype(np.float64)
    found, wanted = x @ backward(dout, rate=rate, key=KEY), dout @ forward(x, rate=rate, key=KEY)
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-9)


def test_the_kernel_runs_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.cpu.dropout import forward
y = forward(np.ones(19, np.float32), rate=0.5, key=(1, 2, 3, 4))
assert set(y.tolist()) == {0.0, 2.0}, y
""")
