"""The loops of the CPU scan, run as Python: what no result shows, and what only wide or deep arrays reach.

Which exponential is taken, and what is asked of memory ahead of time, changes nothing but the time; or changes it on
other processors alone. Without Numba's compiler the functions can be watched: `NUMBA_DISABLE_JIT=1 pytest` runs these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import error
from numba import config

from npmamba import selective_scan, selective_scan_backward
from npmamba.cpu import layout, scan_row, scan_tile
from npmamba.cpu import selective_scan as cpu
from npmamba.cpu.schedule import channel_blocks
from npmamba.reference import selective_scan as reference

pytestmark = pytest.mark.skipif(not config.DISABLE_JIT, reason="a compiled loop cannot be watched")
TILE = scan_tile.TILE


def drawn(dim: int, seqlen: int, dstate: int, *, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """Draw arguments of one row whose channels, and states of a step, lie side by side."""
    rng = np.random.default_rng(seed)
    u, delta = rng.standard_normal((2, 1, seqlen, dim)).astype(np.float32).swapaxes(2, 3)
    B, C = rng.standard_normal((2, 1, seqlen, dstate)).astype(np.float32).swapaxes(2, 3)
    A = -rng.uniform(0.5, 1, (dim, dstate)).astype(np.float32)
    return {"u": u, "delta": 0.1 * np.abs(delta), "A": A, "B": B, "C": C, **changed}


def assert_agrees(arguments: dict[str, Any], **options: Any) -> None:
    """Compare y and all gradients with the reference."""
    expected, dout = reference.forward(**arguments, **options)[0], np.ones_like(arguments["u"])
    assert error(selective_scan(**arguments, **options), expected) <= 1e-5
    gradients = selective_scan_backward(dout, **arguments, **options)
    wanted = reference.backward(dout, **arguments, **options)
    for name, x in wanted._asdict().items():
        if x is not None:
            assert error(getattr(gradients, name), x) <= 1e-5, name


# --- which exponential ---


class Exponentials:
    """Stand in for both exponentials: the short one is nothing beyond its range, and wants the one NaN it keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short = self.whole = 0
        monkeypatch.setattr(scan_row, "AVX512", False)  # it takes any exponent the short way
        for module in (scan_row, cpu):
            monkeypatch.setattr(module, "exp2_product", self.exp2_product)
            monkeypatch.setattr(module, "exp2_product_small", self.exp2_product_small)
        monkeypatch.setattr(cpu, "_BACKWARD", {rule: cpu._make_backward(*rule) for rule in cpu._RULES})

    def exp2_product(self, x: Any, y: Any) -> Any:
        self.whole += 1
        return np.exp2(x * y)

    def exp2_product_small(self, x: Any, y: Any) -> Any:
        self.short += 1
        bits = np.atleast_1d(x)[np.isnan(np.atleast_1d(x))].view(np.uint32)
        assert (bits == np.float32(np.nan).view(np.uint32)).all()
        return np.where(np.abs(x * y) > 126, np.float32(np.nan), np.exp2(x * y))


@pytest.fixture
def exponentials(monkeypatch):
    return Exponentials(monkeypatch)


LOG2E = 1.4426950408889634


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("dstate", [1, 3, 5])
def test_the_short_exponential_is_taken_where_no_exponent_exceeds_126(exponentials, dstate, softplus):
    arguments = drawn(40, 4, dstate)
    steps = (np.float32(125.9 / LOG2E), np.float32(126.1 / LOG2E))
    arguments["delta"][...], arguments["A"][...] = steps[0], -1
    assert_agrees(arguments, delta_softplus=softplus)
    assert (exponentials.whole, exponentials.short > 0) == (0, True)
    for channel in (0, 17, 39):
        delta = arguments["delta"].copy(order="K")
        delta[0, channel, 2] = steps[1]
        assert_agrees(arguments | {"delta": delta}, delta_softplus=softplus)
        assert exponentials.whole > 0
        exponentials.whole = 0


@pytest.mark.parametrize("state", [0, 1, 4])
def test_one_fast_state_of_one_channel_is_enough_for_the_whole_exponential(exponentials, state):
    arguments = drawn(40, 4, 5)
    arguments["delta"][...] = 1
    for channel in (0, 15, 33):
        A = arguments["A"].copy()
        A[channel, state] = -100
        assert_agrees(arguments | {"A": A})
        assert exponentials.whole > 0
        exponentials.whole = 0


def test_long_steps_of_slow_states_are_no_large_exponents(exponentials):
    arguments = drawn(40, 4, 3)
    arguments["delta"][...], arguments["A"][...] = 1000, -1e-3
    assert_agrees(arguments)
    assert (exponentials.whole, exponentials.short > 0) == (0, True)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FC00001])
def test_every_nan_becomes_the_one_that_the_short_exponential_keeps(exponentials, bits):
    arguments = drawn(20, 3, 2)
    arguments["delta"][0, 3, 1] = np.uint32(bits).view(np.float32)
    y = selective_scan(**arguments)
    gradients = selective_scan_backward(np.ones_like(arguments["u"]), **arguments)
    assert np.isnan(y[0, 3, 1:]).all()
    assert np.isnan(gradients.delta[0, 3, 1])
    assert not np.isnan(np.delete(y, 3, axis=1)).any()


# --- what is asked for ahead ---


def asked_ahead(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], **options: Any) -> list[int]:
    """Return the steps of u that a forward pass asks for, in order."""
    asked = []

    def prefetch_near(x: np.ndarray, index: tuple[int, int, int]) -> None:
        if np.shares_memory(x, arguments["u"]) and index[2] == 0:
            asked.append(int(index[1]))

    monkeypatch.setattr(scan_row, "prefetch_near", prefetch_near)
    selective_scan(**arguments, **options)
    return asked


@pytest.mark.parametrize("seqlen", [1, 2, 5, 8, TILE + 3])
def test_two_steps_ask_for_the_two_that_follow(monkeypatch, seqlen):
    """The first two are not asked for, and the last ones, which nothing follows, ask for the last again."""
    monkeypatch.setattr(scan_row, "AVX512", True)
    for reverse in (False, True):
        asked = asked_ahead(monkeypatch, drawn(32, seqlen, 2), reverse=reverse)
        asked = [seqlen - 1 - t if reverse else t for t in asked]
        assert len(asked) == seqlen
        assert asked == sorted(asked)
        assert [*dict.fromkeys(asked)] == [*range(min(2, seqlen - 1), seqlen)]


@pytest.mark.parametrize("seqlen", [1, 2, 5])
def test_a_step_asks_for_the_one_that_follows(monkeypatch, seqlen):
    asked = asked_ahead(monkeypatch, drawn(32, seqlen, 2), delta_softplus=True)
    assert asked == [*range(1, seqlen), seqlen - 1]


@pytest.mark.parametrize("dstate", [1, 3, TILE - 1, TILE + 6])
def test_the_tile_before_is_asked_for_piece_by_piece(monkeypatch, dstate):
    """Each of its steps once for each vector, while the states of this tile are walked back."""
    pieces: dict[int, list[int]] = {}

    def prefetch_rows(x: Any, b: int, d: int, order: Any, row: int, first: int, last: int) -> None:
        pieces.setdefault(id(x), []).extend(range(first, last))

    monkeypatch.setattr(cpu, "prefetch_rows", prefetch_rows)
    arguments = drawn(3, 2 * TILE + 2, dstate)
    selective_scan_backward(np.ones_like(arguments["u"]), **arguments)
    assert len(pieces) == 5
    for steps in pieces.values():
        assert steps == [*range(TILE, 2 * TILE), *range(TILE)]


# --- wide and deep ---


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dim", [256, 300])
def test_more_channels_than_a_block_has(dim, gated):
    arguments = drawn(dim, 3, 2)
    z = np.random.default_rng(1).standard_normal((1, 3, dim)).astype(np.float32).swapaxes(1, 2) if gated else None
    assert_agrees(arguments | {"z": z}, delta_softplus=gated)


@pytest.mark.parametrize("dstate", [17, 40])
def test_more_states_than_a_vector_has_lanes(dstate):
    assert_agrees(drawn(5, 3, dstate))
    arguments = drawn(5, 3, dstate)
    assert_agrees(arguments | {name: np.ascontiguousarray(arguments[name]) for name in "BC"})


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("constant", ["B", "C", "BC"])
def test_constant_maps_beside_a_gate(constant, discretization):
    rng = np.random.default_rng(2)
    maps = {name: rng.standard_normal((5, 3)).astype(np.float32) for name in constant}
    z = rng.standard_normal((1, 5, 4)).astype(np.float32)
    assert_agrees(drawn(5, 4, 3, z=z, **maps), discretization=discretization)


@pytest.mark.parametrize(
    ("dim", "groups", "size", "counts"), [(512, 1, 256, [2]), (10, 2, 4, [2, 2]), (3, 3, 4, [1, 1, 1])]
)
def test_blocks_hold_every_channel_once(dim, groups, size, counts):
    blocks = channel_blocks(dim, groups, size)
    assert np.concatenate([np.arange(first, end) for first, end, _ in blocks]).tolist() == [*range(dim)]
    assert all(0 < end - first <= size for first, end, _ in blocks)
    assert [int((blocks[:, 2] == group).sum()) for group in range(groups)] == counts


def test_results_take_the_memory_order_of_u():
    """Steps side by side, also where they are a part of longer rows; or channels."""
    result = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    for u in (np.empty((1, 6, 4), np.float32), np.empty((1, 6, 5), np.float32)[:, :, :4]):
        found = layout.in_memory_order_of(result, u)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, result.swapaxes(1, 2))
    u = np.empty((1, 4, 6), np.float32).swapaxes(1, 2)
    assert np.shares_memory(layout.in_memory_order_of(result, u), result)
