"""The selective scan on CUDA: its kernels against the reference, and the laws that hold to the last bit.

Cases, errors and laws are those of tests/test_selective_scan.py. In the interpreter tiles of time are short, so that a
few steps fill several; the tests that only a GPU can do in reasonable time carry its mark.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import types
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from arrays import same_bits
from cases import DELTA_MAX, DELTA_MIN, DIMS, LENGTHS, seq_idx_case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selective_scan import (
    FLOWS,
    LAYOUTS,
    ON,
    PER_STEP,
    TIMED,
    VANISHING,
    assert_same_bits,
    case_of,
    cut,
    expected,
    in_float64,
    magnitudes,
    moved,
    new_case,
    poisoned,
    row,
    specs,
    with_fast_leaks,
)

from npmamba import backend
from npmamba.autodiff import pullback
from npmamba.cpu import selective_scan as cpu
from npmamba.cuda import arrays, launch, scan_carry, scan_tile
from npmamba.cuda import selective_scan as twin
from npmamba.ops.selective_scan import SelectiveScanGradients, selective_scan, selective_scan_backward

ARRAYS = SelectiveScanGradients._fields
SHORTEST = twin.SHORTEST
STATIC = ("delta_softplus", "discretization", "seq_idx", "reverse")
ON_GPU = pytest.mark.parametrize("device_backend", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
INTERPRETED = pytest.mark.parametrize("device_backend", ["interpreter"], indirect=True)
KINDS, RULES = ("rows", "channels"), ("euler", "zoh")
LIMITS = {"float64": (1e-12, 1e-12), "float32": (1e-6, 3e-6), "float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3)}
"""Errors of y and of gradients where these have that dtype."""
ONE_GROUP = {**ON, "B": "variable", "C": "variable"}
DSTATES = (1, 2, 3, 5, 8, 16, 17, 64, 70, 128, 200, 256)
SHORT = ("float16", "bfloat16")


# --- where it runs ---


def everywhere(*interpreted: Any, **axes: Any) -> Any:
    """Parametrize a test: every combination on a GPU, those of `interpreted` in the interpreter."""
    every = [pytest.param("gpu", *values, marks=pytest.mark.gpu) for values in itertools.product(*axes.values())]
    every += [("interpreter", *(values if isinstance(values, tuple) else (values,))) for values in interpreted]
    return pytest.mark.parametrize(("device_backend", *axes), every, indirect=["device_backend"])


def short_tiles(*args: Any, **options: Any) -> scan_tile.Shape:
    shape = scan_tile.division(*args, **options)
    return shape._replace(steps=min(shape.steps, 2 if options.get("backward") else 4))


@pytest.fixture(scope="module")
def device(device_backend):
    """Give the backend. Time is not cut into segments unless a test says so. Tiles in the interpreter are of 4 steps
    forward and 2 backward at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "SHORTEST", 2**31)
        if not device_backend.fast:
            patch.setattr(twin, "division", short_tiles)
        yield device_backend


@contextlib.contextmanager
def segments_as_ever() -> Any:
    """Cut time into segments where the device would stand idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "SHORTEST", SHORTEST)
        yield


@contextlib.contextmanager
def segments_of(tiles: int) -> Any:
    """Cut time into segments of so many tiles; not at all for 0."""

    def segments(work, shape, unit, share=1.0):
        seqlen = work.u.shape[2]
        length = tiles * unit if tiles else max(seqlen, 1)
        return length, max(1, -(-seqlen // length))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "_segments", segments)
        yield


def side_by_side(x: np.ndarray) -> np.ndarray:
    """Return the same values with the channels, or the states of a map, side by side."""
    return np.ascontiguousarray(x.swapaxes(-2, -1)).swapaxes(-2, -1)


def placed(case: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the case in memory whose rows are steps ("rows"), or channels: C order."""
    place = side_by_side if kind == "rows" else np.ascontiguousarray
    return {**case, **{name: place(case[name]) for name in TIMED if np.ndim(case[name]) > 2}}


def forward(arrays: list[Any], static: dict[str, Any], **options: Any) -> Any:
    return twin.forward(*arrays, **static, **{"precise": False, **options})


def results_of(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return y, last_state and every gradient of the CUDA twin, by name, where the case lives."""
    arrays, static = [case[name] for name in ARRAYS], {name: case[name] for name in STATIC}
    y, last_state, saved = forward(arrays, static, **options, save=True)
    gradients = zip(ARRAYS, twin.backward(case["dout"], case["dlast_state"], saved), strict=True)
    results = {"y": y, "last_state": last_state, **{f"d{name}": x for name, x in gradients}}
    return {name: x for name, x in results.items() if x is not None}


def everything(
    device: Any, case: dict[str, Any], *, seed: int | None = None, check: Any = False, **options: Any
) -> dict[str, Any]:
    """Return y, last_state and every gradient of the CUDA twin, by name."""
    with device.running(seed, check=check):
        results = results_of({name: device.array(x) for name, x in case.items()}, **options)
    return {name: device.numpy(x) for name, x in results.items()}


def argument(name: str) -> str:
    """Return the argument whose dtype a result has."""
    return {"y": "u", "last_state": "A"}.get(name, name[1:])


def assert_agrees(device: Any, case: dict[str, Any], amplified: float = 1.0, **options: Any) -> None:
    """The kernels agree with the reference, which is given the same numbers."""
    assert_close(everything(device, case, **options), expected(case), magnitudes(case), case, amplified)


def assert_close(got: Any, wanted: Any, scale: Any, case: dict[str, Any], amplified: float = 1.0) -> None:
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        dtype = case[argument(name)].dtype.newbyteorder("=")
        assert (x.shape, x.dtype) == (wanted[name].shape, dtype), name
        size = max(np.max(scale[name], initial=0.0), np.abs(wanted[name]).max(initial=0.0))
        off = np.abs(x.astype(np.float64) - wanted[name]).max(initial=0.0)
        limit = LIMITS[dtype.name][name not in ("y", "last_state")]
        assert off <= amplified * limit * size + VANISHING, f"{name} is off by {off / size:.2g}"


def test_functions_are_those_of_the_cpu_twin():
    for name in ("forward", "backward"):
        found, wanted = (list(inspect.signature(getattr(t, name)).parameters) for t in (twin, cpu))
        assert found == wanted


# --- how the work is divided ---


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_state_has_a_lane_and_tiles_are_powers_of_two(itemsize):
    for dstate in range(1, 257):
        ahead, back = (scan_tile.division(dstate, itemsize, backward=b) for b in (False, True))
        assert ahead.lanes == back.lanes <= 32
        assert ahead.states == back.states <= 8
        assert dstate <= ahead.padded < 2 * max(dstate, ahead.states)
        assert ahead.steps & (ahead.steps - 1) == back.steps & (back.steps - 1) == 0
        assert 1 <= back.steps <= ahead.steps, "a state is kept before every tile of the way back"


@pytest.mark.parametrize("seqlen", [1, 255, 512, 513, 5000, 100_000])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_segments_fill_the_device_and_cover_time(monkeypatch, batch, seqlen):
    monkeypatch.setattr(twin, "WARPS_PER_MULTIPROCESSOR", 12 * 132)
    work = types.SimpleNamespace(u=np.broadcast_to(np.float32(0), (batch, 64, seqlen)), groups=1)
    shape = scan_tile.division(16, 4)
    length, count = twin._segments(work, shape, shape.steps)
    assert (count - 1) * length < seqlen <= count * length
    assert count == 1 or length % shape.steps == 0
    assert count == 1 or length >= twin.SHORTEST * shape.steps
    blocks = batch * twin._blocks(work, shape)
    assert blocks * count <= max(blocks, 12 * 132 * 32 // scan_tile.THREADS)
    assert count > 1 or seqlen < 2 * twin.SHORTEST * shape.steps or 2 * blocks > 12 * 132 * 32 // scan_tile.THREADS


@pytest.mark.parametrize("tiles", [0, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_a_layer_runs_is_shipped(dtype, tiles, monkeypatch):
    """In training, and without gradients; time whole, and cut into segments."""
    monkeypatch.setattr(twin, "division", scan_tile.division)  # the tiles of users, whatever `device` left short
    case = new_case(0, 2, 64, 1024, 16, dtype=dtype, z=True, D=True, delta_bias=True, delta_softplus=True)
    case, used = placed(case, "rows"), set()
    with launch.interpreted_by(lambda found, *_: used.add(found.name)), segments_of(tiles):
        arguments = [case[name] for name in ARRAYS], {name: case[name] for name in STATIC}
        twin.backward(case["dout"], None, forward(*arguments, save=True)[2])
        forward(*arguments, save=False)
    known = {found.name for kernel in launch.declared() for found in kernel.specializations()}
    assert len(used) == (8 if tiles else 5)
    assert used <= known


# --- against the reference ---


@INTERPRETED
@settings(max_examples=5)
@given(specs(batches=(1, 2), dims=(1, 2), lengths=(1, 3, 6), dstates=(1, 3, 16)), st.sampled_from([0, 1]))
def test_any_options_in_any_schedule_are_the_reference(device, spec, tiles):
    case = placed(case_of(spec, np.float64), "rows" if spec.seed % 2 else "channels")
    with segments_of(tiles):
        assert_agrees(device, case, seed=spec.seed, check="races")


OPTIONS = {
    "none": {},
    **{name: {name: value} for name, value in ON.items()},
    "on": ON,
    "constant B": {**ON, "B": "constant"},
    "constant C": {**ON, "C": "constant"},
    "constant": {"B": "constant", "C": "constant"},
}


@everywhere(options=OPTIONS)
def test_each_option_alone_and_all_together(device, options):
    assert_agrees(device, placed(new_case(1, 2, 48, 70, 16, **OPTIONS[options]), "rows"))


@everywhere(rule=RULES, kind=KINDS, options=("on", "constant"))
def test_both_rules_in_both_memory_orders(device, rule, kind, options):
    assert_agrees(device, placed(new_case(1, 2, 48, 70, 16, discretization=rule, **OPTIONS[options]), kind))


@everywhere(rule=RULES, kind=KINDS)
def test_float64_is_the_reference(device, rule, kind):
    assert_agrees(device, placed(new_case(1, 2, 48, 70, 16, dtype=np.float64, discretization=rule, **ON), kind))


@everywhere("float32", "bfloat16", dtype=("float32", "float16", "bfloat16"))
def test_shorter_types_are_the_reference_in_the_tiles_that_are_shipped(device_backend, dtype):
    """Two blocks, the second one with a single channel; sixteen bytes at a time for the one, and for the maps."""
    sizes = (2, 48, 70, 16) if device_backend.fast else (1, 40, 3, 16)
    options = {**ONE_GROUP, "seq_idx": None}
    assert_agrees(device_backend, placed(new_case(2, *sizes, dtype=dtype, **options), "rows"))


@everywhere(dtype=SHORT, kind=KINDS)
def test_shorter_types_with_all_options_are_the_reference(device, dtype, kind):
    rule = "zoh" if dtype == "float16" else "euler"
    assert_agrees(device, placed(new_case(3, 2, 48, 70, 5, dtype=dtype, discretization=rule, **ON), kind))


@everywhere(64, 256, dstate=(64, 256))
def test_a_channel_spread_over_many_lanes_is_the_reference(device, dstate):
    sizes = (2, 20, 33) if device.fast else (1, 3, 3)
    assert_agrees(device, placed(new_case(4, *sizes, dstate, z=True, delta_softplus=True), "rows"))


@everywhere(200, dstate=(130, 200, 255))
def test_maps_that_are_longer_than_a_block_and_do_not_fill_their_lanes(device, dstate):
    assert_agrees(device, placed(new_case(9, 1, 3, 3, dstate, z=True), "rows"))


@everywhere(160, dim=(160, 170, 300))
def test_gradients_of_maps_are_sums_over_many_blocks(device, dim):
    assert_agrees(device, placed(new_case(10, 1, dim, 2, 16), "rows"))


@everywhere(dstate=DSTATES)
def test_every_number_of_states(device, dstate):
    for seqlen in (1, 33, 65):
        assert_agrees(device, placed(new_case(4, 2, 20, seqlen, dstate, z=True, D=True), "rows"))


@everywhere(dstate=(3, 70, 256), dtype=("float64", *SHORT))
def test_every_dtype_with_few_states_and_many(device, dstate, dtype):
    assert_agrees(device, placed(new_case(5, 2, 24, 33, dstate, dtype=dtype, z=True, D=True), "rows"))


@everywhere(dim=DIMS, kind=KINDS)
def test_every_length_and_width(device, dim, kind):
    for seqlen in sorted({*LENGTHS, 16, 17, 33}):
        case = new_case(6, 2, dim, seqlen, 16, z=True, D=True, reverse=dim == 5)
        assert_agrees(device, placed(case, kind))


@ON_GPU
@pytest.mark.parametrize(
    ("batch", "dim", "groups"), [(70_000, 1, "variable"), (1, 70_000, "variable"), (1, 70_000, 70_000)]
)
def test_more_than_65535_rows_or_channels_or_groups(device, batch, dim, groups):
    assert_agrees(device, placed(new_case(7, batch, dim, 2, 1, D=True, z=True, B=groups, C=groups), "rows"))


@ON_GPU
@settings(max_examples=10)
@given(specs(dims=(1, 20), lengths=(2, 7, 70), dstates=(16,)))
def test_decays_that_are_zero_beside_others_that_are_not(device, spec):
    """The error of e^x is |x| times that of x, and a state that lasts may owe all it has to an e^(-80)."""
    spec = replace(spec, options={**ON, "discretization": "euler"}) if spec.dim == 20 else replace(spec, options={})
    assert_agrees(device, placed(with_fast_leaks(case_of(spec, np.float32), spec.seed), "rows"), amplified=50)


@everywhere(rule=RULES)
def test_growing_and_tiny_exponents_keep_their_accuracy(device, rule):
    """A of either sign over 12 orders of magnitude: series, branch point and quotient of phi and its derivative."""
    rng = np.random.default_rng(8)
    A = rng.choice([-1.0, 1.0], (48, 16), p=[0.8, 0.2]) * 10.0 ** rng.uniform(-10, 1.5, (48, 16))
    for seed in range(5):
        case = new_case(seed, 2, 48, 7, 16, discretization=rule, D=True, z=True)
        assert_agrees(device, placed({**case, "A": A.astype(np.float32)}, "rows"))


# --- short floats ---


@everywhere(("on", "bfloat16"), ("over groups", "float16"), options=("on", "over groups"), short=SHORT)
def test_short_floats_are_float32_arithmetic_rounded_once(device, options, short):
    rule, options = "zoh" if short == "float16" else "euler", ONE_GROUP if options == "on" else {"C": 2}
    case = new_case(9, *((2, 20, 70, 16) if device.fast else (1, 2, 3, 3)), dtype=short, discretization=rule, **options)
    long = {k: v.astype(np.float32) if k in TIMED and v is not None else v for k, v in case.items()}
    got, wanted = (everything(device, placed(c, "rows")) for c in (case, long))
    assert_same_bits(got, {name: x.astype(case[argument(name)].dtype) for name, x in wanted.items()})


# --- segments of time ---

CUT = {
    "rows": ("rows", {"z": True}),
    "channels": ("channels", {"z": True}),
    "on": ("rows", {**ONE_GROUP, "reverse": False}),
    "groups, backwards": ("channels", {**ON, "seq_idx": None}),
    "constant": ("rows", {**ONE_GROUP, "B": "constant", "C": "constant"}),
}


@everywhere(("channels", "euler"), ("constant", "euler"), ("on", "zoh"), kind_of_cut=CUT, rule=RULES)
def test_segments_of_time_hand_the_state_on(device, kind_of_cut, rule):
    """Of two tiles each, but for the last; where memory allows, sixteen bytes of a channel at a time."""
    kind, options = CUT[kind_of_cut]
    sizes = (2, 20, 260, 16) if device.fast else (1, 4, 12, 3)
    case = placed(new_case(10, *sizes, discretization=rule, **options), kind)
    wanted, scale = expected(case), magnitudes(case)
    with segments_of(2 if device.fast else 1):
        in_segments = everything(device, case)
    assert_close(in_segments, wanted, scale, case)
    if device.fast:
        with segments_of(0):
            assert_close(everything(device, case), wanted, scale, case)


@everywhere(
    *((count, np.float32) for count in (1, 16, 17, 33)), (18, np.float64),
    count=(1, 16, 17, 33), wide=(np.float32, np.float64),
)  # fmt: skip
def test_states_are_handed_on_through_any_number_of_segments(device, count, wide):
    """The ends of `AHEAD` are asked for at once; those of the last segment nobody has written."""
    rng, (batch, dim, dstate, padded) = np.random.default_rng(count), (2, 3, 5, 8)
    A, initial = -np.exp(rng.standard_normal((dim, dstate))), rng.standard_normal((batch, dim, dstate))
    states, sums = rng.standard_normal((batch, count, dim, padded)), rng.random((batch, count, dim))
    sums[rng.random(sums.shape) < 0.1] = np.inf  # a sequence began: nothing is left of what entered
    given = [x.astype(wide) for x in (A, initial, states, sums)]

    def run(A, initial, ends, elapsed):
        states, sums = arrays.empty(A, ends.shape, wide), arrays.empty(A, elapsed.shape, wide)
        states[:, :-1], sums[:, :-1] = ends[:, :-1], elapsed[:, :-1]
        entering, total = arrays.empty(A, ends.shape, wide), batch * dim * padded
        numbers = (dstate, dim, count, total, 1)
        grid = (-(-total // scan_tile.THREADS),)
        scan_carry.CARRY.launch(grid, np.dtype(wide), (A, initial, states, sums, entering, *numbers), padded=padded)
        return entering

    found = device.call(run, *given)
    A, initial, states, sums = (x.astype(np.float64) for x in given)
    h = np.zeros((batch, dim, padded))
    h[..., :dstate] = initial
    rates = np.pad(A, ((0, 0), (0, padded - dstate)))
    for s in range(count):
        assert np.abs(found[:, s] - h).max() <= (2e-6 if wide is np.float32 else 1e-14) * np.abs(h).max()
        elapsed = np.where(np.isinf(sums[:, s]), 0, sums[:, s])[..., None]
        h = np.where(np.isinf(sums[:, s])[..., None], 0, np.exp(rates * elapsed)) * h + states[:, s]


@everywhere(tiles=(1, 3, 8))
def test_segments_of_any_length_give_nearly_the_same(device, tiles):
    case = placed(new_case(11, 1, 48, 5000, 16, **{**ONE_GROUP, "seq_idx": None}), "rows")
    with segments_of(0):
        whole = everything(device, case)
    with segments_of(tiles):
        found = everything(device, case)
    scale = {name: np.abs(x).max() for name, x in whole.items()}
    assert_close(found, whole, scale, case, amplified=3)


@ON_GPU
def test_segments_are_made_where_the_device_would_stand_idle(device, monkeypatch):
    cuts, segments = [], twin._segments
    monkeypatch.setattr(twin, "_segments", lambda *args: cuts.append(segments(*args)) or cuts[-1])
    with segments_as_ever():
        assert_agrees(device, placed(new_case(12, 1, 48, 3000, 16, z=True, delta_softplus=True), "rows"), amplified=2)
    assert [count > 1 for _, count in cuts] == [True, True]


# --- laws that hold to the last bit ---


@INTERPRETED
def test_any_schedule_of_the_threads_gives_the_same_bits(device):
    case = placed(new_case(13, 1, 2, 6, 16, z=True), "rows")
    with segments_of(1):
        assert_same_bits(everything(device, case, seed=1), everything(device, case, seed=2))


@everywhere(dtype=("float32", "bfloat16"))
def test_twenty_runs_give_the_same_bits(device, dtype):
    case = placed(new_case(13, 2, 1024, 2048, 16, dtype=dtype, z=True, D=True, delta_softplus=True), "rows")
    with segments_as_ever():
        first = everything(device, case)
        for _ in range(19):
            assert_same_bits(everything(device, case), first)


@everywhere(("over groups", "channels"), options=("on", "constant", "over groups"), kind=KINDS)
def test_a_batch_row_alone_has_the_same_bits(device, options, kind):
    options = {"on": ON, "constant": {"B": "constant", "C": 4}, "over groups": {"C": 2}}[options]
    case = placed(new_case(14, *((3, 40, 70, 16) if device.fast else (2, 2, 1, 3)), **options), kind)
    with segments_of(0):
        whole, alone = everything(device, case), [everything(device, row(case, b)) for b in range(len(case["u"]))]
    names = [n for n in (*PER_STEP, "last_state", "dinitial_state") if n in whole and whole[n].ndim > 2]
    assert_same_bits({n: np.concatenate([a[n] for a in alone]) for n in names}, whole, names)


@everywhere(("channels", "zoh"), kind=KINDS, rule=RULES)
def test_a_scan_is_the_scan_of_its_parts(device, kind, rule):
    """However time is cut: the state is handed on through arrays, and its gradient back."""
    sizes, edges = ((2, 20, 150, 16), (0, 0, 1, 67, 150)) if device.fast else ((1, 2, 4, 3), (0, 1, 4))
    case = placed(new_case(15, *sizes, discretization=rule, **{**ONE_GROUP, "seq_idx": None}), kind)
    parts = [np.s_[i:j] for i, j in zip(edges[:-1], edges[1:], strict=True)]
    state, pieces, results = case["initial_state"], {}, {}
    with segments_of(0):
        whole = everything(device, case)
        for i in reversed(range(len(parts))):  # time runs backwards in this case
            pieces[i] = placed(cut(case, parts[i], initial_state=state), kind)
            state = everything(device, pieces[i])["last_state"]
        dstate = case["dlast_state"]
        for i in range(len(parts)):
            results[i] = everything(device, {**pieces[i], "dlast_state": dstate})
            dstate = results[i]["dinitial_state"]
    names = [n for n in PER_STEP if whole[n].ndim > 2]
    joined = {n: np.concatenate([results[i][n] for i in range(len(parts))], axis=-1) for n in names}
    assert_same_bits({**joined, "last_state": state, "dinitial_state": dstate}, whole, [*joined, "last_state"])
    assert_same_bits({"dinitial_state": dstate}, whole, ["dinitial_state"])


@everywhere("rows", kind=KINDS)
def test_reverse_is_a_flip_before_and_after(device, kind):
    case = new_case(16, *((2, 20, 70, 16) if device.fast else (1, 2, 5, 3)), **ONE_GROUP)
    flipped = placed(cut(case, np.s_[::-1], reverse=False), kind)
    with segments_of(1):
        got, wanted = everything(device, placed(case, kind)), everything(device, flipped)
    names = [name for name in PER_STEP if wanted[name].ndim > 2]
    assert_same_bits(got, {**wanted, **{name: wanted[name][..., ::-1] for name in names}})


@everywhere(reverse=(False, True), rule=RULES)
def test_packed_sequences_are_sequences_of_their_own(device, reverse, rule):
    case = new_case(17, 2, 20, 170, 16, discretization=rule, **{**ON, "reverse": reverse})
    edges = [0, 1, 65, 70, 135, 170]
    case["seq_idx"] = np.repeat(np.tile([4, 2, 0, 2, 9], (2, 1)), np.diff(edges), axis=1)
    parts = [np.s_[i:j] for i, j in zip(edges[:-1], edges[1:], strict=True)]
    first, last = (4, 0) if reverse else (0, 4)
    packed, apart = everything(device, placed(case, "rows")), []
    for i, part in enumerate(parts):
        alone = cut(case, part, seq_idx=None)
        alone |= {} if i == first else {"initial_state": None}
        alone |= {} if i == last else {"dlast_state": None}
        apart.append(everything(device, placed(alone, "rows")))
    joined = {name: np.concatenate([a[name] for a in apart], axis=-1) for name in PER_STEP}
    joined |= {"last_state": apart[last]["last_state"], "dinitial_state": apart[first]["dinitial_state"]}
    assert_same_bits(joined, packed, joined)


@everywhere((1, "zoh"), tiles=(0, 1), rule=RULES)
def test_padding_is_as_if_absent_whatever_stands_there(device, tiles, rule):
    case = new_case(18, *((1, 20, 150, 16) if device.fast else (1, 2, 9, 3)), discretization=rule, **ONE_GROUP)
    case["seq_idx"] = seq_idx_case(np.random.default_rng(1), 1, case["u"].shape[2], "padded")
    kept = case["seq_idx"][0] >= 0
    for name in TIMED:
        case[name][..., ~kept] = np.nan
    with segments_of(tiles):
        got = everything(device, placed(case, "rows"))
    wanted, scale = (f(cut(case, kept)) for f in (expected, magnitudes))
    for name in PER_STEP:
        assert not got[name][..., ~kept].any(), name
        got[name] = got[name][..., kept]
    assert_close(got, wanted, scale, case)


@everywhere(seq_idx=("padding", "runs"))
def test_nothing_but_padding_or_no_padding_at_all(device, seq_idx):
    assert_agrees(device, placed(new_case(19, 2, 20, 70, 16, **{**ON, "seq_idx": seq_idx}), "rows"))


# --- memory ---


def half_of_a_row(x: np.ndarray) -> np.ndarray:
    """Return the values as the second half of wider rows: what the input projection hands to the gate."""
    if x.ndim < 2:
        return x
    wide = np.full((*x.shape[:-2], x.shape[-1], 2 * x.shape[-2]), 7, x.dtype)
    wide[..., x.shape[-2] :] = x.swapaxes(-1, -2)
    return wide[..., x.shape[-2] :].swapaxes(-1, -2)


def off_by_one(x: np.ndarray) -> np.ndarray:
    """Return rows whose channels are side by side, and begin one element behind a multiple of 16 bytes."""
    if x.ndim < 2:
        return np.concatenate([x[:1], x])[1:]
    wide = np.full((*x.shape[:-2], x.shape[-1], x.shape[-2] + 16 // x.itemsize), 7, x.dtype)
    wide[..., 1 : 1 + x.shape[-2]] = x.swapaxes(-1, -2)
    return wide[..., 1 : 1 + x.shape[-2]].swapaxes(-1, -2)


def channels_off_by_one(x: np.ndarray) -> np.ndarray:
    """Return C order in rows that begin one element behind a multiple of 16 bytes."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 16 // x.itemsize), 7, x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


MEMORY = {
    **{name: LAYOUTS[name] for name in ("slice", "strided", "negative", "read-only", "byte-swapped", "unaligned")},
    "half of a row": half_of_a_row,
    "off by one": off_by_one,
    "channels off by one": channels_off_by_one,
    "C": np.ascontiguousarray,
}


def laid(case: dict[str, Any], layout: str) -> dict[str, Any]:
    return {name: MEMORY[layout](x) if isinstance(x, np.ndarray) else x for name, x in case.items()}


@functools.cache
def contiguous(device: Any, kind: str) -> dict[str, Any]:
    return everything(device, placed(memory_case(device), kind))


def memory_case(device: Any) -> dict[str, Any]:
    options = {**ONE_GROUP, "reverse": False}
    return new_case(20, *((2, 48, 64, 16) if device.fast else (1, 4, 4, 4)), **options)


@everywhere(*MEMORY, layout=[name for name in MEMORY if name not in ("byte-swapped", "unaligned")])
def test_no_memory_changes_a_bit_or_an_argument(device, layout):
    """Other memory may ask for another kernel; what it computes is the same, in the same order.

    CuPy has no arrays in other byte order, nor any between the places of numbers.
    """
    case = laid(memory_case(device), layout)
    before = {name: x.tobytes() for name, x in case.items() if isinstance(x, np.ndarray)}
    got = everything(device, case)
    assert_same_bits(got, contiguous(device, "rows"))
    assert before == {name: case[name].tobytes() for name in before}
    assert all(x.dtype.isnative for x in got.values())


def test_both_orders_of_memory_give_the_same(device):
    assert_same_bits(contiguous(device, "rows"), contiguous(device, "channels"))


@everywhere(name=[*ARRAYS, "dout", "dlast_state", "seq_idx"])
def test_one_argument_in_other_memory_changes_no_bit(device, name):
    case = placed(memory_case(device), "rows")
    for layout in ("off by one", "strided", "negative", "C"):
        got = everything(device, {**case, name: MEMORY[layout](case[name])})
        assert_same_bits(got, contiguous(device, "rows"))


def test_broadcast_arguments_have_the_bits_of_their_copies(device):
    case = placed(new_case(21, *((2, 4, 70, 16) if device.fast else (1, 4, 2, 3)), z=True, D=True), "rows")
    for name, shape in [("delta", (1, 1, 1)), ("z", (1, 4, 1)), ("B", (1, case["A"].shape[1], 1)), ("D", 1)]:
        first = case[name][tuple(np.s_[:n] for n in np.atleast_1d(shape))]
        case[name] = np.broadcast_to(first, case[name].shape)
    case["dout"] = np.broadcast_to(np.float32(1.5), case["dout"].shape)
    copies = {name: np.copy(x, order="A") if isinstance(x, np.ndarray) else x for name, x in case.items()}
    assert_same_bits(everything(device, case), everything(device, placed(copies, "rows")))


def test_results_have_the_memory_order_of_u(device):
    case = new_case(22, *((2, 5, 7, 16) if device.fast else (1, 3, 2, 1)), z=True)
    for place, axis in ((half_of_a_row, 1), (np.ascontiguousarray, 2)):
        laid = {**case, **{name: place(case[name]) for name in ("u", "delta", "z")}}
        with device.running():
            got = results_of({name: device.array(x) for name, x in laid.items()})
        assert [got[name].strides[axis] for name in ("y", "du", "ddelta", "dz")] == [4] * 4
        assert got["dA"].flags.c_contiguous
        assert got["last_state"].flags.c_contiguous


def test_halves_of_a_projection_are_read_where_they_lie(device):
    case = new_case(23, 1, 8, 2, 4, z=True)
    u, z, delta = (device.array(half_of_a_row(case[name])) for name in ("u", "z", "delta"))
    B, C = (device.array(half_of_a_row(case[name])) for name in "BC")
    A = device.array(case["A"])
    options = {"softplus": True, "zoh": False, "seq_idx": None, "reverse": True}
    with device.running():
        work = twin._prepare(u, delta, A, B, C, None, z, None, **options)
        shape = scan_tile.division(4, 4)
        layout = twin._layout(work, shape, True, work.u, work.delta, work.z)
    for x, y in ((work.u, u), (work.delta, delta), (work.z, z), (work.B, B), (work.C, C)):
        assert arrays.address(x) == arrays.address(y)
    assert layout == {"by_channel": False, "wide": True, "wide_maps": True}


# --- what is not there, and what is no number ---


@pytest.mark.parametrize("options", [{}, ON, {"B": "constant", "C": "constant"}], ids=["off", "on", "constant"])
@pytest.mark.parametrize(("batch", "dim", "seqlen"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_an_empty_scan_returns_a_fresh_copy_of_the_initial_state(device, batch, dim, seqlen, options):
    case = new_case(24, batch, dim, seqlen, 3, **options)
    for kind in ("rows", "channels"):
        got, wanted = everything(device, placed(case, kind)), expected(case)
        assert got.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])
            assert got[name].dtype == np.float32
        start = case["initial_state"]
        assert start is None or not np.shares_memory(got["last_state"], start)


def test_a_result_that_nobody_uses_has_a_gradient_of_zero(device):
    case = placed(new_case(25, *((2, 20, 70, 16) if device.fast else (1, 3, 1, 3)), initial_state=True), "rows")
    for name in ("dout", "dlast_state"):
        zeros = np.zeros_like(case[name])
        assert_same_bits(everything(device, {**case, name: None}), everything(device, {**case, name: zeros}))


@everywhere("zoh", rule=RULES)
def test_a_step_of_no_length_keeps_the_state_whatever_its_rate(device, rule):
    case = new_case(
        26, *((2, 5, 70, 16) if device.fast else (1, 4, 5, 3)), initial_state=True, discretization=rule, B="constant"
    )
    case["A"][:, 0], case["A"][1] = -np.inf, -1e30
    case["delta"][...] = 0
    for tiles in (0, 1) if device.fast else (1,):
        with segments_of(tiles):
            got = everything(device, placed(case, "rows"))
        assert_same_bits(moved(got, ["last_state"]), {"last_state": case["initial_state"]})
        readout = np.einsum("bnt,bdn->bdt", case["C"], case["initial_state"], dtype=np.float64)
        assert np.abs(got["y"] - readout).max() <= 3e-6
        assert not [name for name, x in got.items() if np.isnan(x).any()]


@everywhere(rule=RULES)
def test_an_infinite_decay_forgets_at_once(device, rule):
    case = new_case(27, 2, 6, 70, 16, discretization=rule, **{**ON, "seq_idx": None})
    case["A"][1, 0], case["A"][3] = -np.inf, -np.inf
    assert_agrees(device, placed(case, "rows"))
    got = everything(device, placed(case, "rows"))
    assert not got["dinitial_state"][:, 3].any()
    assert rule == "euler" or np.abs(got["last_state"][:, 3]).max() <= 1e-36


@everywhere(name=FLOWS, rule=RULES)
def test_nan_flows_where_it_should_and_nowhere_else(device, name, rule):
    """Forward to later steps, backward to earlier ones, never to another channel or row but through a sum over them."""
    options = {"D": True, "z": True, "initial_state": True}
    case = placed(new_case(28, 2, 20, 70, 16, discretization=rule, **options), "rows")
    case["delta"][0, 3, 40] = 40  # a decay of zero
    place, reached = FLOWS[name]
    if name == "A":  # by zoh the inflow of the last step has it too; and so do the empty steps that fill the last tile
        reached = {**reached, "dB": np.s_[:, 1], "du": np.s_[:, 3]}
    clean = everything(device, case)
    got = everything(device, {**case, name: poisoned(case[name], place, 1)})
    for result, where in reached.items():
        assert np.isnan(got[result][where]).all(), result
        got[result][where] = clean[result][where]
    assert_same_bits(got, clean)


@everywhere(kind=KINDS)
def test_the_future_does_not_reach_the_past(device, kind):
    """NaN in everything from some step on, and in its gradients before it; the two meet inside a tile."""
    case, now = new_case(29, 2, 20, 70, 16, D=True, z=True), 41
    clean, later, earlier = everything(device, placed(case, kind)), {**case}, {**case, "dout": case["dout"].copy()}
    for name in ("u", "delta", "z", "B", "C"):
        later[name] = case[name].copy()
        later[name][..., now:] = np.nan
    earlier["dout"][..., :now] = np.nan
    after, before = (everything(device, placed(c, kind)) for c in (later, earlier))
    assert_same_bits({"y": after["y"][..., :now]}, {"y": clean["y"][..., :now]})
    names = [name for name in PER_STEP[1:] if name in clean]
    assert_same_bits({n: before[n][..., now:] for n in names}, {n: clean[n][..., now:] for n in names})


# --- precision ---


def test_precise_is_float64_arithmetic_rounded_once(device):
    case = placed(new_case(30, *((2, 20, 70, 16) if device.fast else (1, 2, 3, 3)), **ONE_GROUP), "rows")
    got, long = everything(device, case, precise=True), everything(device, in_float64(case))
    assert_same_bits(got, {name: x.astype(np.float32) for name, x in long.items()})


@ON_GPU
def test_precise_keeps_what_a_million_slow_steps_would_lose(device):
    """|delta A| = 1e-6 over 2**20 steps: plain float32 rounds each decay to a multiple of 6e-8."""
    one, delta = np.ones((1, 1, 1 << 20), np.float32), float(np.float32(1e-6))
    case = {"u": one, "delta": np.float32(delta) * one, "A": np.full((1, 1), -1, np.float32), "B": one, "C": one}
    case |= dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "dlast_state"))
    case |= {"delta_softplus": False, "discretization": "euler", "reverse": False, "dout": one}
    exact = delta * -np.expm1(-delta * np.arange(1, 1 + one.size)) / -np.expm1(-delta)
    with segments_as_ever():
        y = everything(device, case, precise=True)["y"]
    assert np.abs(y[0, 0] - exact).max() / exact.max() <= 2e-7


# --- the public functions ---


@contextlib.contextmanager
def running(device: Any) -> Any:
    """Run the kernels; in the interpreter, NumPy arrays go to the CUDA twins meanwhile."""
    with device.running(), pytest.MonkeyPatch.context() as patch:
        if not device.fast:
            load = backend._load
            patch.setattr(backend, "_load", lambda _, op: load("cuda", op))
        yield


def test_the_tape_has_the_gradients_of_the_public_operation(device):
    case = new_case(31, *((2, 20, 70, 16) if device.fast else (1, 2, 3, 3)), dtype=np.float64, **ONE_GROUP)
    case = {name: device.array(x) for name, x in placed(case, "rows").items()}
    static = {name: x for name, x in case.items() if name not in (*ARRAYS, "dout", "dlast_state")}

    def scan(*given):
        return selective_scan(**dict(zip(ARRAYS, given, strict=True)), **static, return_last_state=True)

    with running(device):
        (y, last_state), pull = pullback(scan, *[case[name] for name in ARRAYS])
        taped = pull((case["dout"], case["dlast_state"]))
        public = selective_scan_backward(**case)
    assert {type(x) for x in (y, last_state, *taped, *public)} == {type(case["u"])}
    assert same_bits(tuple(map(device.numpy, taped)), tuple(map(device.numpy, public)))
    case = {name: device.numpy(x) for name, x in case.items()}
    results = {"y": y, "last_state": last_state, **{f"d{n}": g for n, g in zip(ARRAYS, taped, strict=True)}}
    found = {name: device.numpy(x) for name, x in results.items()}
    assert_close(found, expected(case), magnitudes(case), case)


# --- on the device alone ---


def on_cpu(case: dict[str, Any]) -> dict[str, Any]:
    """Return what the CPU twin makes of a case in float64, which is the reference and faster."""
    case = {k: v.astype(np.float64) if getattr(v, "dtype", np.int32) != np.int32 else v for k, v in case.items()}
    forward = {name: x for name, x in case.items() if name not in ("dout", "dlast_state")}
    results = dict(zip(("y", "last_state"), selective_scan(**forward, return_last_state=True), strict=True))
    gradients = selective_scan_backward(**case)._asdict()
    return results | {f"d{name}": x for name, x in gradients.items() if x is not None}


@everywhere(kind=KINDS, dtype=("float32", "bfloat16"))
def test_the_sizes_of_a_model(device, kind, dtype):
    options = {"z": True, "D": True, "delta_bias": True, "delta_softplus": True}
    case = placed(new_case(32, 2, 1536, 1024, 16, dtype=dtype, **options), kind)
    case["A"][...] = -np.arange(1, 17)
    absolute = {k: np.abs(v) if k in ("u", "B", "C", "D", "z", "dout", "dlast_state") else v for k, v in case.items()}
    scale = {name: np.abs(x).max() for name, x in on_cpu(absolute).items()}
    with segments_as_ever():
        assert_close(everything(device, case), on_cpu(case), scale, case)


@ON_GPU
def test_the_kernels_follow_the_current_stream(device):
    """Which does not wait for the default one: only on the same stream do they come after what u is given there."""
    cupy = sys.modules["cupy"]
    options = {**ONE_GROUP, "seq_idx": None}
    case = placed(new_case(33, 2, 48, 600, 16, **options), "rows")
    with segments_of(8):
        wanted = everything(device, case)
    held = {name: device.array(x) for name, x in case.items()}

    stream = cupy.cuda.Stream(non_blocking=True)
    true_u, busy = held["u"].copy(order="K"), cupy.ones((4096, 4096), np.float32)
    held["u"][...] = 0
    cupy.cuda.Device().synchronize()
    with stream, segments_of(8):
        for _ in range(200):
            busy = cupy.sin(busy)
        held["u"][...] = true_u
        found = results_of(held)
        stream.synchronize()
    assert_same_bits({name: device.numpy(x) for name, x in found.items()}, wanted)


def big_case(xp: Any, batch: int, dim: int, seqlen: int) -> dict[str, Any]:
    """Draw bfloat16 arguments on the device, a row at a time; channels and states lie side by side."""
    rng, short = xp.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    low, high = np.log(np.expm1([DELTA_MIN, DELTA_MAX]))
    case = {name: xp.empty((batch, seqlen, dim), short) for name in ("u", "delta", "z", "dout")}
    case |= {name: xp.empty((batch, seqlen, 16), short) for name in "BC"}
    for name, x in case.items():
        for part in x:
            drawn = rng.standard_normal(part.shape, np.float32)
            part[...] = (low + high) / 2 + (high - low) / 6 * drawn.clip(-3, 3) if name == "delta" else drawn
    case = {name: x.swapaxes(1, 2) for name, x in case.items()}
    case |= {"A": xp.tile(-xp.arange(1, 17, dtype=np.float32), (dim, 1)), "D": xp.ones(dim, np.float32)}
    case |= {"delta_softplus": True, "discretization": "euler", "reverse": False}
    return case | dict.fromkeys(("delta_bias", "initial_state", "dlast_state", "seq_idx"))


def assert_rows_are_rows_alone(case: dict[str, Any], to_host: Any) -> None:
    """To the last bit; sums over rows agree. A few channels of the last row are compared with the CPU twin."""
    whole, sums = results_of(case), {"dA": 0.0, "dD": 0.0}
    for b in range(len(case["u"])):
        one = results_of(row(case, b))
        for name in ("y", "last_state", "du", "ddelta", "dz", "dB", "dC"):
            together, alone = (x.view(f"u{x.itemsize}") for x in (whole[name][b : b + 1], one[name]))
            assert (together == alone).all(), (name, b)
        sums = {name: total + to_host(one[name]).astype(np.float64) for name, total in sums.items()}
    for name, total in sums.items():
        assert np.abs(to_host(whole[name]) - total).max() <= 1e-5 * np.abs(total).max(), name
    few = {name: x[:4] if x.ndim < 3 else x if name in "BC" else x[:, :4] for name, x in row(case, b).items()
           if hasattr(x, "ndim")}  # fmt: skip
    wanted = on_cpu({**case, **{name: to_host(x) for name, x in few.items()}})
    for name in ("y", "du", "ddelta", "dz"):
        assert np.abs(to_host(one[name][:, :4]) - wanted[name]).max() <= 8e-3 * np.abs(wanted[name]).max(), name


@pytest.mark.big
@ON_GPU
def test_arrays_of_more_than_2_to_the_31_numbers(device):
    cupy = sys.modules["cupy"]
    if cupy.cuda.Device().mem_info[0] < 100e9:
        pytest.skip("needs 100 GB of memory on the device")
    with device.running():
        assert_rows_are_rows_alone(big_case(cupy, 9, 8192, 32768), cupy.asnumpy)
    cupy.get_default_memory_pool().free_all_blocks()
