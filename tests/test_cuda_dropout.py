"""The CUDA twin of dropout drops the same numbers as the CPU twin, to the bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from arrays import same_bits
from cases import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cpu import dropout as cpu
from npmamba.cuda import dropout as cuda


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@given(seeds, st.integers(0, 3 * cuda.BLOCK), st.booleans(), st.floats(0, 0.9))
@settings(max_examples=5)
def test_the_twins_agree_to_the_bit(device_backend, dtype, seed, count, unaligned, rate):
    rng = np.random.default_rng(seed)
    key = tuple(rng.integers(0, 2**32, 4).tolist())
    x = rng.standard_normal(count + 1).astype(dtype)[int(unaligned) :]
    found = tuple(device_backend.call(f, x, rate=rate, key=key, seed=seed) for f in (cuda.forward, cuda.backward))
    expected = cpu.forward(x, rate=rate, key=key)
    assert same_bits(found, (expected, expected))


def test_any_strides_give_the_same_bits(device_backend):
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5) + 1
    for view in (x.T, x[:, ::2], x[::-1]):
        found = device_backend.call(cuda.forward, view, rate=0.3, key=(1, 2, 3, 4))
        assert same_bits(found, cpu.forward(view, rate=0.3, key=(1, 2, 3, 4)))
