"""Flags and lists of packed sequences, found on the device: what the CPU's schedule says."""

from __future__ import annotations

import backends
import numpy as np
import pytest
from arrays import layouts, same_bits
from cases import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cpu.schedule import schedule
from npmamba.cuda.schedule import ABSENT, CHUNK, step_flags, walk

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def drawn(seed, batch, seqlen, padding):
    """Draw runs of one step in ten, and padding in long stretches."""
    rng = np.random.default_rng(seed)
    seq_idx = np.cumsum(rng.random((batch, seqlen)) < 0.1, axis=1) % 3
    here = rng.random((batch, seqlen // 40 + 1)) >= padding
    return np.where(np.repeat(here, 40, axis=1)[:, :seqlen], seq_idx, -1 - rng.integers(0, 3, (batch, seqlen)))


def flags_by_hand(seq_idx, reverse):
    """Return what `step_flags` promises, from the CPU's schedule."""
    steps = schedule(seq_idx.shape[1], seq_idx, reverse)
    flags = np.full(seq_idx.shape, ABSENT, np.uint8)
    for b, total in enumerate(steps.steps):
        at = steps.order[b, :total]
        flags[b, seq_idx.shape[1] - 1 - at if reverse else at] = steps.fresh[b, :total]
    return flags


def walk_by_hand(seq_idx, reverse):
    steps = schedule(seq_idx.shape[1], seq_idx, reverse)
    entries = np.empty(seq_idx.shape, np.int64)
    for b, total in enumerate(steps.steps):
        at = steps.order[b, :total]
        padding = np.flatnonzero(seq_idx[b] < 0)[:: -1 if reverse else 1]
        entries[b] = np.concatenate([np.where(steps.fresh[b, :total], -1 - at, at), padding])
    return entries, steps.steps


@settings(max_examples=8)
@given(seeds, st.sampled_from((0, 1, 7, 31, 130)), st.sampled_from((0.0, 0.5, 1.0)), st.booleans())
def test_flags_and_list_are_those_of_the_schedule(device_backend, seed, seqlen, padding, reverse):
    seq_idx = drawn(seed, 2, seqlen, padding)
    found = device_backend.call(step_flags, seq_idx, reverse, seed=seed)
    assert same_bits(found, flags_by_hand(seq_idx, reverse))
    assert same_bits(device_backend.call(walk, seq_idx, reverse, seed=seed), walk_by_hand(seq_idx, reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("padding", [0.0, 0.98])
def test_chunks_find_what_lies_before_them(device_backend, padding, reverse):
    seq_idx = drawn(3, 2, 2 * CHUNK + 5, padding)
    found = device_backend.call(step_flags, seq_idx, reverse)
    assert same_bits(found, flags_by_hand(seq_idx, reverse))
    assert same_bits(device_backend.call(walk, seq_idx, reverse), walk_by_hand(seq_idx, reverse))


@pytest.mark.gpu
def test_a_million_steps():
    device, seq_idx = backends.backend("gpu"), drawn(4, 2, 2**20 + 3, 0.9)
    assert same_bits(device.call(step_flags, seq_idx, False), flags_by_hand(seq_idx, False))
    assert same_bits(device.call(walk, seq_idx, True), walk_by_hand(seq_idx, True))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integers_tell_sequences_apart(device_backend, dtype):
    """Also the largest ones, which are no padding where they are unsigned."""
    top = np.iinfo(dtype).max
    seq_idx = np.array([[0, 0, top, top, top - 1, 0, 0], [top, 1, 1, top, top, top, 2]], dtype)
    expected = flags_by_hand(np.unique(seq_idx, return_inverse=True)[1].reshape(2, 7), False)
    assert same_bits(device_backend.call(step_flags, seq_idx, False), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_any_memory_gives_the_same_flags(device_backend, reverse):
    seq_idx = drawn(5, 2, 40, 0.2)
    expected = flags_by_hand(seq_idx, reverse)
    for layout, x in layouts(seq_idx).items():
        if device_backend.name == "interpreter" or layout not in ("byte-swapped", "unaligned"):  # CuPy has none
            assert same_bits(device_backend.call(step_flags, x, reverse), expected), layout
