"""The Mamba block: against its reference, in pieces and step by step, its gradients, and that it copies nothing."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from arrays import error
from cases import seeds, seq_idx_case
from hypothesis import given
from hypothesis import strategies as st
from models import configs, random_params, random_tokens, tiny

from npmamba import lm
from npmamba.autodiff import algebra, check_vjp, pullback
from npmamba.block import BlockState, mamba_block, mamba_block_step, rates
from npmamba.cpu import runtime
from npmamba.ops.causal_conv1d import causal_conv1d
from npmamba.reference import language_model as reference


def mixer_params(config: Any, seed: int = 0, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    prefix = "backbone.layers.0.mixer."
    params = random_params(config, seed, dtype)
    return {key.removeprefix(prefix): x for key, x in params.items() if key.startswith(prefix)}


def block_input(config: Any, batch: int, seqlen: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    rng = np.random.default_rng((seed, 9))
    return rng.standard_normal((batch, seqlen, config.d_model)).astype(dtype)


def block_state(config: Any, batch: int, seed: int = 0) -> BlockState:
    rng = np.random.default_rng((seed, 10))
    conv = rng.standard_normal((batch, config.d_inner, config.d_conv - 1))
    return BlockState(conv, rng.standard_normal((batch, config.d_inner, config.d_state)))


def assert_same_states(found: BlockState, expected: Any, tolerance: float) -> None:
    assert error(found[0], expected[0]) <= tolerance
    assert error(found[1], expected[1]) <= tolerance


# Against the reference


PACKINGS = st.sampled_from([None, "runs", "padded"])


@given(configs(n_layer=1), seeds, st.sampled_from([1, 2, 9, 70]), PACKINGS, st.booleans())
def test_a_block_is_its_reference(config, seed, seqlen, packing, continued):
    p, x = mixer_params(config, seed), block_input(config, 2, seqlen, seed)
    seq_idx = seq_idx_case(np.random.default_rng(seed), 2, seqlen, packing)
    state = block_state(config, 2, seed) if continued else None
    out, new_state = mamba_block(p, x, config, state=state, seq_idx=seq_idx)
    expected, expected_state = reference.mixer(p, x, config, state=state, seq_idx=seq_idx)
    assert error(out, expected) <= 1e-12
    assert_same_states(new_state, expected_state, 1e-12)


def test_the_rates_are_negative_and_those_of_the_parameter():
    np.testing.assert_array_equal(rates(np.log([[1.0, 2.0]])).round(14), [[-1.0, -2.0]])


def test_float32_stays_float32():
    config = tiny()
    p, x = mixer_params(config, dtype=np.float32), block_input(config, 2, 5, dtype=np.float32)
    out, state = mamba_block(p, x, config)
    assert out.dtype == state.conv.dtype == state.ssm.dtype == np.float32


# Pieces and steps


@given(configs(n_layer=1), seeds, st.lists(st.integers(0, 12), min_size=1, max_size=4), st.booleans())
def test_a_sequence_in_pieces_is_the_whole(config, seed, lengths, continued):
    p, x = mixer_params(config, seed), block_input(config, 2, sum(lengths), seed)
    state = first = block_state(config, 2, seed) if continued else None
    outputs = []
    for piece in np.split(x, np.cumsum(lengths)[:-1], axis=1):
        out, state = mamba_block(p, piece, config, state=state)
        outputs.append(out)
    whole, last = mamba_block(p, x, config, state=first)
    assert error(np.concatenate(outputs, axis=1), whole) <= 1e-12
    assert_same_states(state, last, 1e-12)


@given(configs(n_layer=1), seeds, st.integers(1, 3), st.integers(1, 9))
def test_steps_are_the_sequence(config, seed, batch, seqlen):
    p, x = mixer_params(config, seed), block_input(config, batch, seqlen, seed)
    start = block_state(config, batch, seed)
    whole, last = mamba_block(p, x, config, state=start)
    state = BlockState(*(q.copy() for q in start))
    outputs = [mamba_block_step(p, x[:, t], config, state) for t in range(seqlen)]
    assert error(np.stack(outputs, axis=1), whole) <= 1e-12
    assert_same_states(state, last, 1e-12)


def test_a_block_leaves_its_state_and_input_as_they_are():
    config = tiny()
    x, state = block_input(config, 2, 5), block_state(config, 2)
    before = [q.copy() for q in (x, *state)]
    mamba_block(mixer_params(config), x, config, state=state)
    for q, copy in zip((x, *state), before, strict=True):
        np.testing.assert_array_equal(q, copy)


# Gradients (those of the parameters stand in test_lm.py, against the complex step)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_gradients_flow_through_input_parameters_and_state(discretization):
    config = tiny(bias=True, discretization=discretization)
    p, x, state = mixer_params(config), block_input(config, 2, 6), block_state(config, 2)

    def outputs(p: Any, x: Any, conv: Any, ssm: Any) -> Any:
        out, new_state = mamba_block(p, x, config, state=BlockState(conv, ssm))
        return out, *new_state

    check_vjp(outputs, p, x, *state, rtol=1e-8)


def test_a_gradient_through_a_step_in_place_is_refused():
    config = tiny()
    p, state = mixer_params(config), block_state(config, 2)
    with pytest.raises(TypeError, match="traced"):
        pullback(lambda x: mamba_block_step(p, x, config, state), block_input(config, 2, 1)[:, 0])


# Inspection


def test_observers_see_the_arguments_of_the_scan():
    config, seen = tiny(), {}
    p, x = mixer_params(config), block_input(config, 2, 5)
    mamba_block(p, x, config, observe=lambda **arguments: seen.update(arguments))
    shapes = {name: q.shape for name, q in seen.items()}
    d, n = config.d_inner, config.d_state
    assert shapes == {"delta": (2, d, 5), "delta_bias": (d,), "A": (d, n), "B": (2, n, 5), "C": (2, n, 5)}
    assert (seen["A"] < 0).all()


# Copies


class Memory:
    """Watch which arrays kernels and matrix products write, and read; views count as what they show."""

    def __init__(self, patch: pytest.MonkeyPatch, least: int) -> None:
        self.written: list[np.ndarray] = []
        self.read: list[tuple[str, np.ndarray]] = []
        self.copied: list[tuple[int, ...]] = []
        self.least = least
        compiled, product, contiguous = runtime.Kernel.__getitem__, algebra._product, np.ascontiguousarray

        def watched_kernel(kernel: runtime.Kernel, dtype: Any) -> Any:
            run = compiled(kernel, dtype)
            names = list(inspect.signature(kernel.function).parameters)
            kinds = inspect.get_annotations(kernel.function, eval_str=True)

            def call(*arguments: Any) -> None:
                for name, x in zip(names, arguments, strict=True):
                    if isinstance(x, np.ndarray) and kinds[name].readonly:
                        self.reads(f"{kernel.name}: {name}", x)
                    elif isinstance(x, np.ndarray) and not kernel.name.startswith("npmamba.cpu.layout"):
                        self.written.append(x)
                run(*arguments)

            return call

        def watched_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            self.reads("matrix product", x)
            self.written.append(product(x, y))
            return self.written[-1]

        def watched_contiguous(x: np.ndarray, *options: Any) -> np.ndarray:
            out = contiguous(x, *options)
            if out.size >= least and not np.may_share_memory(out, x):
                self.copied.append(out.shape)
            return out

        patch.setattr(runtime.Kernel, "__getitem__", watched_kernel)
        patch.setattr(algebra, "_product", watched_product)
        patch.setattr(np, "ascontiguousarray", watched_contiguous)

    def reads(self, who: str, x: np.ndarray) -> None:
        if x.dtype.kind == "f" and x.size >= self.least:
            self.read.append((who, x))

    def copies(self, *given: np.ndarray) -> list[Any]:
        """Name the readers of activations that are neither `given` nor the place where they were computed."""
        known = [*given, *self.written]
        strange = [(who, x.shape) for who, x in self.read if not any(np.may_share_memory(x, y) for y in known)]
        return strange + self.copied


BATCH, SEQLEN = 2, 300  # so many tokens that every activation is larger than every parameter
SMALLEST = BATCH * SEQLEN * min(tiny().dt_rank, tiny().d_state)


@pytest.mark.parametrize("packing", [None, "padded"])
@pytest.mark.parametrize("traced", [False, True])
def test_no_activation_is_copied_in_a_block(traced, packing, monkeypatch):
    config = tiny(bias=True)
    p, x = mixer_params(config), block_input(config, BATCH, SEQLEN)
    seq_idx = seq_idx_case(np.random.default_rng(0), BATCH, SEQLEN, packing)
    assert max(q.size for q in p.values()) < SMALLEST
    memory = Memory(monkeypatch, SMALLEST)
    run = (lambda f, p: pullback(f, p)[0]) if traced else (lambda f, p: f(p))
    out, _ = run(lambda p: mamba_block(p, x, config, seq_idx=seq_idx), p)
    readers = {who.rpartition(": ")[2] for who, _ in memory.read}
    assert {"matrix product", "x", "u", "raw_delta", "B", "C", "z"} <= readers
    assert memory.copies(x) == []
    assert any(out.base is y or np.may_share_memory(out, y) for y in memory.written)


def test_no_activation_is_copied_between_the_tokens_and_the_loss(monkeypatch):
    config = tiny(n_layer=2)
    params, ids = random_params(config), random_tokens(config, BATCH, SEQLEN)
    memory, looked_up = Memory(monkeypatch, SMALLEST), []
    embed = lm.embedding

    def watched_embedding(weight: Any, input_ids: Any) -> Any:
        looked_up.append(embed(weight, input_ids))
        return looked_up[-1]

    monkeypatch.setattr(lm, "embedding", watched_embedding)
    lm.loss(params, config, ids, ids)
    assert len(looked_up) == 1
    assert len(memory.read) >= 2 * 12
    assert memory.copies(*looked_up) == []


def test_the_search_for_copies_can_fail(monkeypatch):
    x = np.zeros((BATCH, 20, SEQLEN))  # C order: the kernel wants the channels side by side
    memory = Memory(monkeypatch, SMALLEST)
    causal_conv1d(x, np.ones((20, 4)))
    assert memory.copies(x)
