"""The selective scan: its kernels against the reference, and the laws that hold to the last bit.

An error is the largest difference divided by the largest value; for gradients by the largest value that the same
scan has when every term is counted with its absolute value, for no rounding can be smaller than that.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from arrays import run_without_compiler
from cases import DIMS, DSTATES, LENGTHS, cotangents, scan_case, scan_specs, seeds, seq_idx_case
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.autodiff import check_vjp, pullback
from npmamba.cpu import runtime
from npmamba.cpu import selective_scan as cpu
from npmamba.cpu.simd import LANES
from npmamba.ops.selective_scan import SelectiveScanGradients, selective_scan, selective_scan_backward
from npmamba.reference import selective_scan as reference
from npmamba.testing.oracles import double_double

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(cpu.__file__).resolve().parent.parent
PAGE = PACKAGE / "ops" / "selective_scan.md"
SOURCES = ["cpu/scan_tile.py", "cpu/selective_scan.py", "ops/selective_scan.py"]
ON = {
    "B": 2, "C": 2, "D": True, "z": True, "delta_bias": True, "delta_softplus": True, "initial_state": True,
    "seq_idx": "padded", "reverse": True,
}  # fmt: skip
ALONE = [{}, *({name: value} for name, value in ON.items()), ON]
CONSTANT = [{**ON, "B": "constant"}, {**ON, "C": "constant"}, {"B": "constant", "C": "constant"}]
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
RULES = pytest.mark.parametrize("rule", ["euler", "zoh"])
PER_STEP = ("y", "du", "ddelta", "dz", "dB", "dC")
VANISHING = 1e-30  # decays below 2**-126 are taken as 0, and so are their products with anything of this world
TIMED = ("u", "delta", "z", "B", "C", "dout")


def one_number_of_groups(spec: Any) -> Any:
    """B and C may differ in layout, but where both have groups they have as many."""
    B, C = spec.options["B"], spec.options["C"]
    same = isinstance(B, int) and isinstance(C, int)
    return replace(spec, options={**spec.options, "C": B}) if same else spec


def specs(**sizes: Any) -> st.SearchStrategy[Any]:
    return scan_specs(**sizes).map(one_number_of_groups)


small = specs(dims=(1, 4, 20), lengths=(1, 2, 7, 70), dstates=(1, 3))


def case_of(spec: Any, dtype: Any, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `selective_scan_backward` that `spec` describes."""
    case = {**spec.arguments(dtype), **changes}
    case["dout"], case["dlast_state"] = cotangents(spec.seed, case["u"], spec.state_shape)
    return case


def new_case(seed: int, *sizes: int, dtype: Any = np.float32, **options: Any) -> dict[str, Any]:
    case = scan_case(np.random.default_rng((seed, 0)), *sizes, dtype=dtype, **options)
    case["dout"], case["dlast_state"] = cotangents(seed, case["u"], (sizes[0], sizes[1], sizes[3]))
    return case


def with_fast_leaks(case: dict[str, Any], seed: int) -> dict[str, Any]:
    """Multiply A by 1 to 10**4, so that some decays are too small for float32 and others are not."""
    rng = np.random.default_rng((seed, 3))
    return {**case, "A": (case["A"] * 10 ** rng.uniform(0, 4, case["A"].shape)).astype(case["A"].dtype)}


def forward(case: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: x for name, x in case.items() if name not in ("dout", "dlast_state")}
    return dict(zip(("y", "last_state"), selective_scan(**inputs, return_last_state=True), strict=True))


def present(gradients: Any) -> dict[str, Any]:
    return {f"d{name}": x for name, x in gradients._asdict().items() if x is not None}


def everything(case: dict[str, Any]) -> dict[str, Any]:
    """Return y, last_state and every gradient, by name."""
    return {**forward(case), **present(selective_scan_backward(**case))}


def expected(case: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: x for name, x in case.items() if name not in ("dout", "dlast_state")}
    y, last_state = reference.forward(**inputs)
    return {"y": y, "last_state": last_state, **present(reference.backward(**case))}


def magnitudes(case: dict[str, Any]) -> dict[str, float]:
    """Return the largest value of each result of the scan whose terms cannot cancel."""
    names = ("u", "B", "C", "D", "z", "initial_state", "dout", "dlast_state")
    absolute = {**case, **{name: np.abs(case[name]) for name in names if case[name] is not None}}
    return {name: np.abs(x).max(initial=0.0) for name, x in expected(absolute).items()}


def in_float64(case: dict[str, Any]) -> dict[str, Any]:
    return {k: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for k, x in case.items()}


def assert_agrees(case: dict[str, Any], amplified: float = 1.0) -> None:
    """The kernels agree with the reference for a case in float32: there y to 1e-6 and gradients to 3e-6, and to 1e-14
    when they are given the same numbers in float64."""
    assert case["u"].dtype == np.float32
    wanted, scale = expected(case), magnitudes(case)
    for same, limit_y, limit in ((case, 1e-6, 3e-6), (in_float64(case), 1e-14, 1e-14)):
        got = everything(same)
        assert got.keys() == wanted.keys()
        for name, x in got.items():
            assert (x.shape, x.dtype) == (wanted[name].shape, same["u"].dtype), name
            size = max(scale[name], np.abs(wanted[name]).max(initial=0.0))
            error = np.abs(x - wanted[name]).max(initial=0.0)
            allowed = amplified * (limit_y if name in ("y", "last_state") else limit) * size
            assert error <= allowed + VANISHING, f"{name} is off by {error / size:.2g}"


def assert_same_bits(got: Any, wanted: Any, names: Any = None) -> None:
    names = got.keys() | wanted.keys() if names is None else [name for name in names if name in wanted]
    for name in names:
        x, y = got[name], wanted[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), f"{name} has other bits: {np.flatnonzero(x != y)[:5]} of {x.size}"


def cut(case: dict[str, Any], times: Any, **changes: Any) -> dict[str, Any]:
    """Return the case of the given times only."""
    part = {name: case[name][..., times] for name in TIMED if np.ndim(case[name]) > 2}
    seq_idx = None if case["seq_idx"] is None else case["seq_idx"][:, times]
    return {**case, **part, "seq_idx": seq_idx, **changes}


def row(case: dict[str, Any], b: int) -> dict[str, Any]:
    """Return the case of one batch row."""
    names = [name for name in TIMED if np.ndim(case[name]) > 2] + ["initial_state", "dlast_state", "seq_idx"]
    return {**case, **{name: None if case[name] is None else case[name][b : b + 1] for name in names}}


def moved(results: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: results[name] for name in names if name in results}


# --- against the reference ---


@settings(max_examples=200)
@given(specs(max_elements=30_000))
def test_the_kernels_are_the_reference_for_any_options(spec):
    assert_agrees(case_of(spec, np.float32))


@RULES
@pytest.mark.parametrize("options", [*ALONE, *CONSTANT], ids=lambda o: "-".join(o) if len(o) < 3 else f"{len(o)}")
def test_each_option_alone_and_all_together(options, rule):
    assert_agrees(new_case(1, 2, 48, 70, 5, discretization=rule, **options))


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize(("dim", "dstate"), list(zip(DIMS, reversed(DSTATES), strict=True)))
def test_every_length_and_width(dim, seqlen, dstate):
    options = {**ON, "B": "variable", "C": "variable" if dim == 5 else dim}
    assert_agrees(new_case(2, 1, dim, seqlen, dstate, discretization="zoh", **options))


def test_the_largest_state_is_256():
    assert_agrees(new_case(3, 1, 3, 5, 256, **{**ON, "B": "variable", "C": "variable"}))


@pytest.mark.parametrize(("batch", "dim"), [(70_000, 1), (1, 70_000)])
def test_more_than_65535_rows_or_channels(batch, dim):
    assert_agrees(new_case(4, batch, dim, 2, 1, D=True, z=True, delta_softplus=True))


@pytest.mark.parametrize(("B", "C"), [("variable", "variable"), ("constant", 2), (4, "constant")])
def test_zoh_is_the_matrix_exponential(B, C):
    case = new_case(5, 1, 4, 7, 3, dtype=np.float64, B=B, C=C, D=True, initial_state=True, discretization="zoh")
    names = ("u", "delta", "A", "B", "C", "D", "initial_state")
    exact = reference.exact_zoh(**{name: case[name] for name in names})
    for got, wanted in zip(forward(case).values(), exact, strict=True):
        assert np.abs(got - wanted).max() <= 1e-12 * np.abs(wanted).max()


@settings(max_examples=40)
@given(small, seeds)
def test_growing_and_tiny_exponents_keep_their_accuracy(spec, seed):
    """A of either sign over 12 orders of magnitude: series, branch point and quotient of phi and its derivative."""
    rng = np.random.default_rng(seed)
    shape = (spec.dim, spec.dstate)
    A = rng.choice([-1.0, 1.0], shape, p=[0.8, 0.2]) * 10.0 ** rng.uniform(-10, 1.5, shape)
    case = case_of(spec, np.float32, A=A.astype(np.float32), discretization="zoh", initial_state=None)
    assert_agrees(cut(case, np.s_[:7]))


@RULES
def test_few_steps_with_fast_and_slow_leaks_side_by_side(rule):
    """Where an exponent may be large, kernels take another power than elsewhere; five states are four and one."""
    for seed in range(2):
        assert_agrees(with_fast_leaks(new_case(seed, 1, 4, 4, 5, discretization=rule, **ON), seed), amplified=50)


def test_one_large_exponent_among_small_ones_is_found_on_every_processor():
    """Also where there is no AVX-512; the power for small exponents, which here gives NaN for others, is not taken."""
    run_without_compiler("""
import numpy as np
from npmamba import scalar

def small(x, y):
    return np.where(np.abs(x * y) > 126, np.nan, np.exp2(x * y))

scalar.exp2_product_small = small
from npmamba.cpu import simd
simd.AVX512 = False
from npmamba.ops.selective_scan import selective_scan, selective_scan_backward
from npmamba.reference import selective_scan as reference
rng = np.random.default_rng(0)
u, delta, B, C = (rng.uniform(0.5, 1, shape) for shape in [(1, 19, 3), (1, 19, 3), (1, 5, 3), (1, 5, 3)])
for channel, state in [(0, 0), (0, 4), (7, 2), (8, 0), (18, 0), (18, 4)]:
    A = -rng.uniform(1, 2, (19, 5))
    A[channel, state] = -300
    arguments = u, delta, A, B, C
    np.testing.assert_allclose(selective_scan(*arguments), reference.forward(*arguments)[0], rtol=1e-12)
    found, wanted = selective_scan_backward(u, *arguments), reference.backward(u, *arguments)
    for name in ("u", "delta", "A", "B", "C"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-11, atol=1e-12)
""")


@settings(max_examples=40)
@given(small)
def test_decays_that_are_zero_beside_others_that_are_not(spec):
    """The error of e^x is |x| times that of x, and a state that lasts may owe all it has to an e^(-80)."""
    assert_agrees(with_fast_leaks(case_of(spec, np.float32), spec.seed), amplified=50)


@pytest.mark.parametrize("short", [np.float16, ml_dtypes.bfloat16])
@RULES
def test_short_floats_are_float32_arithmetic_rounded_once(short, rule):
    case = new_case(6, 2, 20, 70, 3, dtype=short, discretization=rule, **ON)
    long = {k: v.astype(np.float32) if k in TIMED else v for k, v in case.items()}
    got, wanted = everything(case), everything(long)
    for name in wanted:
        argument = {"y": "u", "last_state": "A"}.get(name, name[1:])
        wanted[name] = wanted[name].astype(case[argument].dtype)
    assert_same_bits(got, wanted)


# --- gradients through the tape ---


@RULES
@pytest.mark.parametrize("options", [{}, ON, {"B": "constant", "C": 2, "z": True}], ids=["off", "on", "constant"])
def test_the_tape_has_the_gradients_of_the_public_operation(options, rule):
    case = new_case(7, 2, 4, 5, 3, dtype=np.float64, discretization=rule, **options)
    arrays = [name for name in SelectiveScanGradients._fields if case[name] is not None]
    static = {name: x for name, x in case.items() if name not in (*arrays, "dout", "dlast_state")}

    def scan(*given):
        return selective_scan(**dict(zip(arrays, given, strict=True)), **static, return_last_state=True)

    check_vjp(scan, *[case[name] for name in arrays])
    _, pull = pullback(scan, *[case[name] for name in arrays])
    taped = pull((case["dout"], case["dlast_state"]))
    wanted = present(selective_scan_backward(**case))
    assert_same_bits({f"d{name}": x for name, x in zip(arrays, taped, strict=True)}, wanted)


def test_a_result_that_nobody_uses_has_a_gradient_of_zero():
    case = new_case(8, 2, 4, 5, 3, **ON)
    static = {name: x for name, x in case.items() if name not in ("u", "dout", "dlast_state")}

    def scan(u):
        return selective_scan(u, **static, return_last_state=True)

    def taped(dout, dlast_state):
        return {"du": pullback(scan, case["u"])[1]((dout, dlast_state))[0]}

    def public(**changes):
        return {"du": selective_scan_backward(**{**case, **changes}).u}

    zeros = np.zeros_like(case["dout"])
    assert_same_bits(taped(None, case["dlast_state"]), public(dout=zeros))
    assert_same_bits(taped(case["dout"], None), public(dlast_state=None))
    assert_same_bits(public(dlast_state=None), public(dlast_state=np.zeros_like(case["dlast_state"])))


# --- laws that hold to the last bit ---


@BOTH
@settings(max_examples=40)
@given(spec=specs(dims=(1, 5, 20), lengths=(7, 65, 150), dstates=(1, 3), max_elements=20_000), data=st.data())
def test_a_scan_is_the_scan_of_its_parts(dtype, spec, data):
    """Any cuts, 0 and seqlen among them: the state is handed on through arrays, and its gradient back."""
    cuts = data.draw(st.lists(st.integers(0, spec.seqlen), max_size=4).map(sorted))
    case = case_of(spec, dtype, seq_idx=None)
    if data.draw(st.booleans(), "fast leaks"):
        case = with_fast_leaks(case, spec.seed)
    whole = everything(case)
    edges = [0, *cuts, spec.seqlen]
    parts = [np.s_[i:j] for i, j in zip(edges[:-1], edges[1:], strict=True)]
    order = range(len(parts))[:: -1 if case["reverse"] else 1]
    pieces: dict[int, Any] = {}
    state = case["initial_state"]
    for i in order:
        pieces[i] = cut(case, parts[i], initial_state=state)
        state = forward(pieces[i])["last_state"]
    assert_same_bits({"last_state": state}, moved(whole, ["last_state"]))
    results, dstate = {}, case["dlast_state"]
    for i in reversed(order):
        if pieces[i]["initial_state"] is None:
            pieces[i]["initial_state"] = np.zeros_like(dstate)
        results[i] = everything({**pieces[i], "dlast_state": dstate})
        dstate = results[i]["dinitial_state"]
    timed = [name for name in PER_STEP if name in whole and whole[name].ndim > 2]
    joined = {name: np.concatenate([results[i][name] for i in range(len(parts))], axis=-1) for name in timed}
    assert_same_bits({**joined, "dinitial_state": dstate}, whole, [*timed, "dinitial_state"])
    if dtype == np.float64:
        assert_sums_agree(list(results.values()), whole, ["dA", "dD", "ddelta_bias", "dB", "dC"])


def assert_sums_agree(parts: list[dict[str, Any]], whole: dict[str, Any], names: Any) -> None:
    """What is summed over time or batch agrees to 1e-12 of the sum of absolute values."""
    for name in names:
        if name in whole and (name[1:] not in ("B", "C") or whole[name].ndim == 2):
            size = sum(np.abs(part[name]) for part in parts).max(initial=0)
            difference = sum(part[name] for part in parts) - whole[name]
            assert np.abs(difference).max(initial=0) <= 1e-12 * size, name


@BOTH
@settings(max_examples=30)
@given(spec=specs(batches=(2, 3), dims=(1, 20, 150), lengths=(1, 7, 70), dstates=(1, 3), max_elements=40_000))
def test_a_batch_row_alone_has_the_same_bits(dtype, spec):
    case = case_of(spec, dtype)
    whole, names = everything(case), [*PER_STEP, "last_state", "dinitial_state"]
    alone = [everything(row(case, b)) for b in range(spec.batch)]
    names = [n for n in names if n in whole and whole[n].ndim > 2]
    assert_same_bits({n: np.concatenate([a[n] for a in alone]) for n in names}, whole, names)
    if dtype == np.float64:
        assert_sums_agree(alone, whole, ["dA", "dD", "ddelta_bias", "dB", "dC"])


@BOTH
def test_a_batch_row_alone_has_the_same_bits_where_many_blocks_are_summed(dtype):
    """One step and one state: nothing but the blocks is left to sum over, which NumPy would do in another order."""
    case = new_case(9, 2, 2500, 1, 1, dtype=dtype)
    whole, names = everything(case), ["dB", "dC"]
    alone = [everything(row(case, b)) for b in range(2)]
    assert_same_bits({n: np.concatenate([a[n] for a in alone]) for n in names}, whole, names)
    grouped = new_case(9, 2, 2500, 1, 1, dtype=dtype, C=100)
    whole, alone = everything(grouped), [everything(row(grouped, b)) for b in range(2)]
    assert_same_bits({n: np.concatenate([a[n] for a in alone]) for n in names}, whole, names)


@pytest.fixture
def no_work_is_too_small(monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    yield
    runtime.set_num_threads(None)


@BOTH
@pytest.mark.parametrize("options", [ON, {"B": "constant", "C": 4}], ids=["on", "constant"])
def test_the_number_of_threads_changes_no_bit(no_work_is_too_small, options, dtype):
    case = new_case(10, 3, 400, 70, 3, dtype=dtype, **options)
    runs = []
    for threads in (1, 2, 8, 8, 1):
        runtime.set_num_threads(threads)
        runs.append(everything(case))
    for again in runs[1:]:
        assert_same_bits(again, runs[0])


def strided(x: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n for n in x.shape], 7, x.dtype)
    view = wide[tuple(np.s_[1::2] for _ in x.shape)]
    view[...] = x
    return view


def negative(x: np.ndarray) -> np.ndarray:
    flip = tuple(np.s_[::-1] for _ in x.shape)
    return x[flip].copy()[flip]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x: np.ndarray) -> np.ndarray:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def slice_of_a_product(x: np.ndarray) -> np.ndarray:
    """Channels side by side, rows far apart: what a projection's output gives for u, z, B and C."""
    if x.ndim < 2:
        return x
    wide = np.full((*x.shape[:-2], x.shape[-1], 3 * x.shape[-2] + 1), 7, x.dtype)
    view = wide[..., 1 : 1 + x.shape[-2]].swapaxes(-1, -2)
    view[...] = x
    return view


LAYOUTS = {
    "F": np.asfortranarray,
    "slice": slice_of_a_product,
    "strided": strided,
    "negative": negative,
    "read-only": read_only,
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "unaligned": unaligned,
    "negative slice": lambda x: negative(slice_of_a_product(x)) if x.ndim < 2 else slice_of_a_product(x[::-1])[::-1],
    "memmap": lambda x: x.view(np.memmap),
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [ON, {"B": "constant", "C": "variable"}], ids=["on", "constant"])
def test_no_memory_layout_changes_a_bit_or_an_argument(layout, options, dtype):
    case = new_case(11, 2, 20, 70, 3, dtype=dtype, **options)
    laid = {name: LAYOUTS[layout](x) if isinstance(x, np.ndarray) else x for name, x in case.items()}
    before = {name: (x.dtype, x.strides, x.tobytes()) for name, x in laid.items() if isinstance(x, np.ndarray)}
    got = everything(laid)
    assert_same_bits(got, everything(case))
    assert all(type(x) is np.ndarray and x.dtype.isnative for x in got.values())
    assert before == {name: (laid[name].dtype, laid[name].strides, laid[name].tobytes()) for name in before}
    for name, x in got.items():
        assert not any(np.shares_memory(x, laid[argument]) for argument in before), name


def test_broadcast_arguments_have_the_bits_of_their_copies():
    case = new_case(12, 2, 4, 7, 3, **{**ON, "seq_idx": None})
    for name, shape in [("u", (1, 4, 1)), ("delta", (1, 1, 1)), ("z", (2, 1, 1)), ("B", (1, 1, 3, 1)), ("D", 1)]:
        first = case[name][tuple(np.s_[:n] for n in np.atleast_1d(shape))]
        case[name] = np.broadcast_to(first, case[name].shape)
    case["dout"] = np.broadcast_to(np.float32(1.5), case["dout"].shape)
    copies = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in case.items()}
    assert_same_bits(everything(case), everything(copies))


@pytest.mark.parametrize("batch", [1, 2])
def test_results_have_the_memory_order_of_their_arguments(batch):
    case = new_case(13, batch, 5, 7, 3, z=True)
    for name in ("u", "z"):
        case[name] = slice_of_a_product(case[name])
    got = everything(case)
    names = ("y", "last_state", "du", "dz", "ddelta")
    side_by_side = {name: got[name].swapaxes(1, 2).flags.c_contiguous for name in names}
    assert side_by_side == {"y": True, "last_state": True, "du": True, "dz": True, "ddelta": False}
    assert all(got[name].flags.c_contiguous for name in ("ddelta", "dA"))
    case["u"] = case["u"].copy()
    assert forward(case)["last_state"].flags.c_contiguous


@BOTH
@RULES
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_two_steps_at_once_are_those_that_come_one_by_one(dtype, rule, constant):
    """Whole vectors without softplus and gate go two steps at a time; a channel more, and all go step by step."""
    lanes = LANES[np.dtype(dtype)]
    for seqlen, dstate, packed in ((1, 2, False), (2, 1, False), (7, 4, True), (8, 3, False), (67, 5, True)):
        case = new_case(
            seqlen, 2, 2 * lanes + 1, seqlen, dstate, dtype=dtype, C="constant" if constant else 1, D=True,
            initial_state=True, discretization=rule,
        )  # fmt: skip
        case["seq_idx"] = np.arange(2 * seqlen).reshape(2, -1) // 3 % 4 - 1 if packed else None
        channel = ("u", "delta", "A", "D", "initial_state") + ("C",) * constant
        whole = dict(case)
        for name in channel:
            whole[name] = case[name][:-1] if name in ("A", "D", "C") else case[name][:, :-1]
        one_by_one = {name: x[:, :-1] for name, x in forward(case).items()}
        assert_same_bits(forward(whole), one_by_one)


# --- laws of the mathematics ---


@settings(max_examples=20)
@given(small)
def test_the_scan_is_linear_in_its_input_and_initial_state(spec):
    case, other = case_of(spec, np.float64), case_of(replace(spec, seed=spec.seed + 1), np.float64)
    names = [name for name in ("u", "initial_state") if case[name] is not None]
    sums = {**case, **{name: 2 * case[name] - 3 * other[name] for name in names}}
    one, two = forward(case), forward({**case, **moved(other, names)})
    scale = magnitudes(case)
    for name, got in forward(sums).items():
        np.testing.assert_allclose(got, 2 * one[name] - 3 * two[name], rtol=0, atol=1e-12 * (1 + scale[name]))


@BOTH
@settings(max_examples=25)
@given(spec=specs(dims=(1, 20), lengths=(2, 7, 70), dstates=(1, 3)), data=st.data())
def test_the_future_does_not_reach_the_past(dtype, spec, data):
    """NaN in everything from some step on, and in its gradients before it."""
    case = case_of(spec, dtype, reverse=False)
    now = data.draw(st.integers(0, spec.seqlen - 1))
    clean, later = forward(case)["y"][..., :now], {**case}
    for name in ("u", "delta", "z", "B", "C"):
        if np.ndim(case[name]) > 2:
            later[name] = case[name].copy()
            later[name][..., now:] = np.nan
    assert_same_bits({"y": forward(later)["y"][..., :now]}, {"y": clean})
    earlier = {**case, "dout": case["dout"].copy()}
    earlier["dout"][..., :now] = np.nan
    names = [name for name in PER_STEP[1:] if np.ndim(case[name[1:]]) > 2]
    got, wanted = everything(earlier), everything(case)
    assert_same_bits({n: got[n][..., now:] for n in names}, {n: wanted[n][..., now:] for n in names})


@BOTH
@RULES
def test_a_step_of_no_length_keeps_the_state_whatever_its_rate(rule, dtype):
    case = new_case(14, 2, 5, 70, 3, dtype=dtype, initial_state=True, discretization=rule, B="constant")
    case["A"][:, 0], case["A"][1] = -np.inf, -1e30
    case["delta"][...] = 0
    got = everything(case)
    assert_same_bits(moved(got, ["last_state"]), {"last_state": case["initial_state"]})
    readout = np.einsum("bnt,bdn->bdt", case["C"], case["initial_state"], dtype=np.float64)
    assert np.abs(got["y"] - readout).max() <= 1e-6
    assert not any(np.isnan(x).any() for x in got.values())


@BOTH
@RULES
def test_an_infinite_decay_forgets_at_once(rule, dtype):
    """A = -inf gives a = 0 and, by the exact rule, no inflow; its neighbours in the vector do not notice."""
    case = new_case(15, 2, 6, 70, 3, dtype=dtype, discretization=rule, **{**ON, "seq_idx": None})
    finite = everything(case)
    case["A"][1, 0], case["A"][3] = -np.inf, -np.inf
    got = everything(case)
    if dtype == np.float32:
        assert_agrees(case)
    others = [0, 2, 4, 5]
    for name in ("y", "last_state", "du", "ddelta", "dz", "dinitial_state"):
        assert_same_bits({name: got[name][:, others]}, {name: finite[name][:, others]})
    assert not got["dinitial_state"][:, 3].any()
    assert rule == "euler" or np.abs(got["last_state"][:, 3]).max() <= 1e-36


def poisoned(x: np.ndarray, place: Any, payload: int) -> np.ndarray:
    """Return a copy of `x` with a NaN there; its payload is what tells one NaN from another."""
    bits = {4: np.uint32, 8: np.uint64}[x.itemsize]
    x = x.copy()
    x[place] = np.array(np.array(np.nan, x.dtype).view(bits) | bits(payload), bits).view(x.dtype)
    return x


D, T = 3, 30  # where the NaN is: channel and time
OF_CHANNEL = np.s_[:, D]
FLOWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "u": (np.s_[0, D, T], {
        "y": np.s_[0, D, T:], "last_state": np.s_[0, D], "dz": np.s_[0, D, T:], "ddelta": np.s_[0, D, T:],
        "dC": np.s_[0, :, T:], "dB": np.s_[0, :, T], "dA": np.s_[D], "dD": np.s_[D],
    }),
    "delta": (np.s_[0, D, T], {
        "y": np.s_[0, D, T:], "last_state": np.s_[0, D], "dz": np.s_[0, D, T:], "ddelta": np.s_[0, D],
        "dC": np.s_[0, :, T:], "dB": np.s_[0, :, : T + 1], "dA": np.s_[D], "du": np.s_[0, D, : T + 1],
        "dinitial_state": np.s_[0, D],
    }),
    "z": (np.s_[0, D, T], {
        "y": np.s_[0, D, T], "dz": np.s_[0, D, T], "du": np.s_[0, D, : T + 1], "ddelta": np.s_[0, D, : T + 1],
        "dB": np.s_[0, :, : T + 1], "dC": np.s_[0, :, T], "dA": np.s_[D], "dD": np.s_[D],
        "dinitial_state": np.s_[0, D],
    }),
    "A": (np.s_[D, 1], {
        "y": OF_CHANNEL, "last_state": np.s_[:, D, 1], "dz": OF_CHANNEL, "ddelta": OF_CHANNEL, "dC": np.s_[:, 1],
        "dB": np.s_[:, 1, :-1], "dA": np.s_[D, 1], "du": np.s_[:, D, :-1], "dinitial_state": np.s_[:, D, 1],
    }),
    "B": (np.s_[0, 1, T], {
        "y": np.s_[0, :, T:], "last_state": np.s_[0, :, 1], "dz": np.s_[0, :, T:], "ddelta": np.s_[0, :, T:],
        "dC": np.s_[0, 1, T:], "dA": np.s_[:, 1], "du": np.s_[0, :, T],
    }),
    "C": (np.s_[0, 1, T], {
        "y": np.s_[0, :, T], "dz": np.s_[0, :, T], "du": np.s_[0, :, : T + 1], "ddelta": np.s_[0, :, : T + 1],
        "dB": np.s_[0, 1, : T + 1], "dA": np.s_[:, 1], "dinitial_state": np.s_[0, :, 1],
    }),
    "D": (D, {"y": OF_CHANNEL, "dz": OF_CHANNEL, "du": OF_CHANNEL}),
    "initial_state": (np.s_[0, D, 1], {
        "y": np.s_[0, D], "last_state": np.s_[0, D, 1], "dz": np.s_[0, D], "ddelta": np.s_[0, D],
        "dC": np.s_[0, 1], "dA": np.s_[D, 1],
    }),
    "dout": (np.s_[0, D, T], {
        "du": np.s_[0, D, : T + 1], "ddelta": np.s_[0, D, : T + 1], "dz": np.s_[0, D, T], "dB": np.s_[0, :, : T + 1],
        "dC": np.s_[0, :, T], "dA": np.s_[D], "dD": np.s_[D], "dinitial_state": np.s_[0, D],
    }),
    "dlast_state": (np.s_[0, D, 1], {
        "du": np.s_[0, D], "ddelta": np.s_[0, D], "dB": np.s_[0, 1], "dA": np.s_[D, 1],
        "dinitial_state": np.s_[0, D, 1],
    }),
}  # fmt: skip


@BOTH
@RULES
@pytest.mark.parametrize("payload", [0, 1, 0x3FFFFF])
@pytest.mark.parametrize("name", FLOWS)
def test_nan_flows_where_it_should_and_nowhere_else(name, payload, rule, dtype):
    """Forward to later steps, backward to earlier ones, never to another channel or row but through a sum over them."""
    case = new_case(16, 2, 20, 70, 3, dtype=dtype, discretization=rule, D=True, z=True, initial_state=True)
    case["delta"][0, D, 40] = 40  # a decay of zero, where some exponentials take another path
    place, reached = FLOWS[name]
    if (name, rule) == ("A", "zoh"):  # there the inflow of the last step has it too
        reached = {**reached, "dB": np.s_[:, 1], "du": OF_CHANNEL}
    clean = everything(case)
    got = everything({**case, name: poisoned(case[name], place, payload)})
    for result, where in reached.items():
        assert np.isnan(got[result][where]).all(), result
        got[result][where] = clean[result][where]
    assert_same_bits(got, clean)


@BOTH
@settings(max_examples=25)
@given(spec=small)
def test_reverse_is_a_flip_before_and_after(dtype, spec):
    case = case_of(spec, dtype, reverse=True)
    flipped = everything(cut(case, np.s_[::-1], reverse=False))
    for name in PER_STEP:
        if name in flipped and flipped[name].ndim > 2:
            flipped[name] = flipped[name][..., ::-1]
    assert_same_bits(everything(case), flipped)


@BOTH
@RULES
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_sequences_of_their_own(reverse, rule, dtype):
    options = {**ON, "reverse": reverse, "discretization": rule}
    case = new_case(18, 2, 20, 170, 3, dtype=dtype, **options)
    edges = [0, 1, 65, 70, 135, 170]
    case["seq_idx"] = np.repeat(np.tile([4, 2, 0, 2, 9], (2, 1)), np.diff(edges), axis=1)
    packed = everything(case)
    parts = [np.s_[i:j] for i, j in zip(edges[:-1], edges[1:], strict=True)]
    first, last = (-1, 0) if reverse else (0, -1)
    apart = []
    for i, part in enumerate(parts):
        alone = cut(case, part, seq_idx=None)
        if i != first % len(parts):
            alone["initial_state"] = None
        if i != last % len(parts):
            alone["dlast_state"] = None
        apart.append(everything(alone))
    joined = {name: np.concatenate([a[name] for a in apart], axis=-1) for name in PER_STEP}
    joined |= {"last_state": apart[last]["last_state"], "dinitial_state": apart[first]["dinitial_state"]}
    assert_same_bits(joined, packed, joined)
    if dtype == np.float64:
        assert_sums_agree(apart, packed, ["dA", "dD", "ddelta_bias"])


@BOTH
@settings(max_examples=30)
@given(spec=specs(batches=(1,), dims=(1, 20), lengths=(1, 7, 150), dstates=(1, 3)))
def test_padding_is_as_if_absent_whatever_stands_there(dtype, spec):
    case = case_of(spec, dtype)
    case["seq_idx"] = seq_idx_case(np.random.default_rng(spec.seed), 1, spec.seqlen, "padded")
    kept = case["seq_idx"][0] >= 0
    for name in TIMED:
        if np.ndim(case[name]) > 2:
            case[name] = case[name].copy()
            case[name][..., ~kept] = np.nan
    got, without = everything(case), everything(cut(case, kept))
    for name in PER_STEP:
        if name in got and got[name].ndim > 2:
            assert not got[name][..., ~kept].any(), name
            got[name] = got[name][..., kept]
    assert_same_bits(got, without)


@BOTH
@pytest.mark.parametrize("options", [{}, ON, {"B": "constant", "C": "constant"}], ids=["off", "on", "constant"])
@pytest.mark.parametrize(("batch", "dim", "seqlen"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_an_empty_scan_returns_a_fresh_copy_of_the_initial_state(batch, dim, seqlen, options, dtype):
    case = new_case(19, batch, dim, seqlen, 3, dtype=dtype, **options)
    got, wanted = everything(case), expected(case)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
        assert got[name].dtype == dtype
    start = case["initial_state"]
    np.testing.assert_array_equal(got["last_state"], np.zeros((batch, dim, 3)) if start is None else start)
    assert start is None or not np.shares_memory(got["last_state"], start)


# --- precision ---


MILLION = 1 << 20
LIMITS = {  # largest error over a million steps, of the largest value: dtype, steps, precise
    ("float32", "drawn", False): 1e-6,
    ("float32", "drawn", True): 2e-7,
    ("float32", "slow", True): 2e-7,
    ("float32", "constant", True): 2e-7,
    ("float64", "drawn", False): 1e-14,
    ("float64", "slow", False): 1e-13,
    ("float64", "constant", False): 1e-12,
}


def a_million_steps(steps: str, dtype: str) -> dict[str, Any]:
    """One channel and state: steps from 0.001 to 0.1, or |delta A| = 1e-6, or one step of 0.001 after another."""
    rng, one = np.random.default_rng(30), np.ones((1, 1, MILLION))
    deltas = {"drawn": np.exp(rng.uniform(np.log(1e-3), np.log(0.1), one.shape)), "slow": 1e-6, "constant": 1e-3}
    varying = {name: rng.normal(size=one.shape) if steps == "drawn" else one for name in "uBC"}
    return {n: np.asarray(x, dtype) for n, x in {**varying, "delta": deltas[steps] * one, "A": -one[0, :, :1]}.items()}


@pytest.mark.parametrize(("dtype", "steps", "precise"), LIMITS, ids=lambda x: str(x))
def test_over_a_million_steps_errors_do_not_add_up(dtype, steps, precise):
    case = a_million_steps(steps, dtype)
    y, last_state = selective_scan(**case, return_last_state=True, precise=precise)
    exact, state = double_double(case)
    assert y.dtype == last_state.dtype == dtype
    assert np.abs(y - exact).max() <= LIMITS[dtype, steps, precise] * np.abs(exact).max()
    assert abs(last_state - state).item() <= LIMITS[dtype, steps, precise] * np.abs(exact).max()


def test_without_precise_float32_loses_slow_steps():
    """|delta A| = 1e-6: each decay is rounded to a multiple of 6e-8."""
    case = a_million_steps("slow", "float32")
    y, (exact, _) = selective_scan(**case), double_double(case)
    assert 1e-3 <= np.abs(y - exact).max() / exact.max() <= 1e-2


def test_gradients_of_a_million_slow_steps_are_right_in_float64():
    """What the last y has of each earlier input: delta exp(-delta (L - 1 - t))."""
    case = a_million_steps("slow", "float64")
    dout = np.zeros_like(case["u"])
    dout[..., -1] = 1
    gradients = selective_scan_backward(dout, **case, initial_state=np.zeros((1, 1, 1)))
    wanted = np.exp(-case["delta"] * np.arange(MILLION)[::-1])
    np.testing.assert_allclose(gradients.u, case["delta"] * wanted, rtol=1e-13)
    np.testing.assert_allclose(gradients.initial_state.item(), np.exp(-1e-6 * MILLION), rtol=1e-13)


@RULES
def test_precise_is_float64_arithmetic_rounded_once(rule):
    case = new_case(20, 2, 20, 70, 3, discretization=rule, **ON)
    arrays = [name for name in SelectiveScanGradients._fields if case[name] is not None]
    static = {name: x for name, x in case.items() if name not in (*arrays, "dout", "dlast_state")}

    def scan(*given):
        given = dict(zip(arrays, given, strict=True))
        return selective_scan(**given, **static, return_last_state=True, precise=True)

    (y, last_state), pull = pullback(scan, *[case[name] for name in arrays])
    gradients = pull((case["dout"], case["dlast_state"]))
    got = {"y": y, "last_state": last_state, **{f"d{n}": g for n, g in zip(arrays, gradients, strict=True)}}
    assert_same_bits(got, {name: x.astype(np.float32) for name, x in everything(in_float64(case)).items()})


# --- without the compiler ---

WITHOUT_THE_COMPILER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import test_selective_scan as tests
from numba import config
assert config.DISABLE_JIT
results = {}
for i, options in enumerate(tests.UNCOMPILED):
    case = tests.new_case(21, 2, 4, 5, 3, dtype=np.float64, **options)
    results |= {f"{i}-{name}": x for name, x in tests.everything(case).items()}
np.savez(sys.argv[2], **results)
"""
UNCOMPILED = [{**ON, "discretization": "euler"}, {**ON, "discretization": "zoh", "B": "constant"}]


def test_the_loops_give_the_same_results_without_the_compiler(tmp_path):
    file = tmp_path / "results.npz"
    command = [sys.executable, "-c", WITHOUT_THE_COMPILER, str(ROOT / "tests"), str(file)]
    subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, cwd=ROOT, check=True)
    with np.load(file) as plain:
        for i, options in enumerate(UNCOMPILED):
            case = new_case(21, 2, 4, 5, 3, dtype=np.float64, **options)
            scale = magnitudes(case)
            for name, x in everything(case).items():
                assert np.abs(plain[f"{i}-{name}"] - x).max() <= 1e-12 * scale[name], name


# --- errors ---

MAPS = "(dim, dstate) or (batch, dstate, seqlen) or (batch, groups, dstate, seqlen)"
WIDE = "must be float16, bfloat16, float32 or float64"
NO_ARRAY = "must be a NumPy or CuPy array"


def zeros(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return np.zeros(shape, dtype)


WRONG_VALUES = [
    ({"u": zeros(4, 8)}, "u has 2 axes; u must be (batch, dim, seqlen), got shape (4, 8)"),
    (
        {"delta": zeros(2, 4, 9)},
        "delta has seqlen=9, but u has seqlen=8; delta must be (batch, dim, seqlen), got shape (2, 4, 9)",
    ),
    ({"z": zeros(3, 4, 8)}, "z has batch=3, but u has batch=2; z must be (batch, dim, seqlen), got shape (3, 4, 8)"),
    ({"A": zeros(5, 3)}, "A has dim=5, but u has dim=4; A must be (dim, dstate), got shape (5, 3)"),
    ({"A": zeros(3)}, "A has 1 axes; A must be (dim, dstate), got shape (3,)"),
    ({"B": zeros(2, 3, 7)}, f"B has seqlen=7, but u has seqlen=8; B must be {MAPS}, got shape (2, 3, 7)"),
    ({"C": zeros(2, 16, 8)}, f"C has dstate=16, but A has dstate=3; C must be {MAPS}, got shape (2, 16, 8)"),
    ({"B": zeros(3)}, f"B has 1 axes; B must be {MAPS}, got shape (3,)"),
    ({"D": zeros(5)}, "D has dim=5, but u has dim=4; D must be (dim,), got shape (5,)"),
    ({"delta_bias": zeros(4, 1)}, "delta_bias has 2 axes; delta_bias must be (dim,), got shape (4, 1)"),
    (
        {"initial_state": zeros(2, 4, 4)},
        "initial_state has dstate=4, but A has dstate=3; "
        "initial_state must be (batch, dim, dstate), got shape (2, 4, 4)",
    ),
    (
        {"dlast_state": zeros(2, 3, 4)},
        "dlast_state has dim=3, but u has dim=4; dlast_state must be (batch, dim, dstate), got shape (2, 3, 4)",
    ),
    (
        {"dout": zeros(2, 4, 7)},
        "dout has seqlen=7, but u has seqlen=8; dout must be (batch, dim, seqlen), got shape (2, 4, 7)",
    ),
    (
        {"seq_idx": zeros(2, 7, dtype=int)},
        "seq_idx has seqlen=7, but u has seqlen=8; seq_idx must be (batch, seqlen), got shape (2, 7)",
    ),
    ({"B": zeros(2, 3, 3, 8)}, "B has groups=3, but u has dim=4; groups must divide dim"),
    ({"C": zeros(2, 0, 3, 8)}, "C has groups=0, but u has dim=4; groups must divide dim"),
    (
        {"B": zeros(2, 2, 3, 8), "C": zeros(2, 4, 3, 8)},
        f"C has groups=4, but B has groups=2; C must be {MAPS}, got shape (2, 4, 3, 8)",
    ),
    ({**{M: zeros(4, 0) for M in "ABC"}, "dlast_state": None}, "A has dstate=0; dstate must be at least 1"),
    ({**{M: zeros(4, 257) for M in "ABC"}, "dlast_state": None}, "A has dstate=257; dstate must be at most 256"),
    ({"discretization": "tustin"}, "discretization must be one of 'euler', 'zoh', got 'tustin'"),
    ({"discretization": None}, "discretization must be one of 'euler', 'zoh', got None"),
]
WRONG_TYPES = [
    *[({name: None}, f"{name} {NO_ARRAY}, got None") for name in ("u", "delta", "A", "B", "C", "dout")],
    *[({name: [1.0]}, f"{name} {NO_ARRAY}, got list") for name in ("u", "D", "z", "seq_idx", "dlast_state")],
    ({"u": 1.0}, f"u {NO_ARRAY}, got float"),
    ({"A": np.float64(1)}, f"A {NO_ARRAY}, got float64"),
    ({"delta": np.ma.zeros((2, 4, 8))}, f"delta {NO_ARRAY}, got MaskedArray"),
    *[
        ({"u": zeros(2, 4, 8, dtype=dtype)}, f"u {WIDE}, got {np.dtype(dtype)}")
        for dtype in (int, bool, complex, object, np.longdouble)
    ],
    ({"delta": zeros(2, 4, 8, dtype=np.float32)}, "delta must be float64 because u is float64, got float32"),
    ({"C": zeros(4, 3, dtype=np.float16)}, "C must be float64 because u is float64, got float16"),
    ({"A": zeros(4, 3, dtype=np.float32)}, "A must be float64 because u is float64, got float32"),
    ({"dout": zeros(2, 4, 8, dtype=np.float32)}, "dout must be float64 because u is float64, got float32"),
    (
        {"dlast_state": zeros(2, 4, 3, dtype=np.float32)},
        "dlast_state must be float64 because u is float64, got float32",
    ),
    ({"seq_idx": zeros(2, 8)}, "seq_idx must be an array of integers, got float64"),
    ({"seq_idx": zeros(2, 8, dtype=bool)}, "seq_idx must be an array of integers, got bool"),
    ({"delta_softplus": "yes"}, "delta_softplus must be True or False, got 'yes'"),
    ({"reverse": 1}, "reverse must be True or False, got 1"),
]


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [(*wrong, ValueError) for wrong in WRONG_VALUES] + [(*wrong, TypeError) for wrong in WRONG_TYPES],
    ids=lambda x: x.partition(";")[0] if isinstance(x, str) else "",
)
def test_errors_say_what_came_and_what_was_expected(change, message, kind):
    case = {**new_case(22, 2, 4, 8, 3, dtype=np.float64), **change}
    if change.get("dlast_state") is None and "dout" not in change:
        with pytest.raises(kind, match=f"^selective_scan: {re.escape(message)}$"):
            forward(case)
    with pytest.raises(kind, match=f"^selective_scan_backward: {re.escape(message)}$"):
        selective_scan_backward(**case)


@pytest.mark.parametrize("name", ["precise", "return_last_state"])
def test_a_flag_of_the_forward_must_be_one(name):
    case = {k: v for k, v in new_case(22, 2, 4, 8, 3, dtype=np.float64).items() if k not in ("dout", "dlast_state")}
    with pytest.raises(TypeError, match=f"^selective_scan: {name} must be True or False, got 'no'$"):
        selective_scan(**case, **{name: "no"})


@pytest.mark.parametrize(("name", "dtype"), [("A", np.float16), ("D", np.float64), ("initial_state", np.float16)])
def test_parameters_of_short_floats_are_float32(name, dtype):
    case = new_case(23, 2, 4, 8, 3, dtype=np.float16, **ON)
    case[name] = case[name].astype(dtype)
    message = f"^selective_scan: {name} must be float32 because u is float16, got {np.dtype(dtype)}$"
    with pytest.raises(TypeError, match=message):
        forward(case)


def test_the_two_short_floats_do_not_mix():
    case = new_case(23, 2, 4, 8, 3, dtype=np.float16)
    case["B"] = case["B"].astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match="^selective_scan: B must be float16 because u is float16, got bfloat16$"):
        forward(case)


def test_numpy_and_cupy_arrays_do_not_mix(monkeypatch):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    message = (
        "selective_scan: u is a numpy array, but B is a cupy array; move them to one device first"
    )
    with pytest.raises(TypeError, match=f"^{message}$"):
        forward({**new_case(24, 2, 4, 8, 3), "B": cupy.ndarray()})


# --- the derivation page ---


def table(title: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {title}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def numbers(cell: str) -> list[float]:
    return [float(x.replace("−", "-")) for x in re.findall(r"[-−]?\d+(?:\.\d+)?", cell)]


def tokens(title: str) -> dict[str, Any]:
    """Return a table of the worked example: by the name that starts its row, an array (states, tokens)."""
    return {re.match("Δ φ|[^ ]+", row[0])[0]: np.array([numbers(c) for c in row[1:]]).T for row in table(title)}


def worked_example(given: dict[str, Any]) -> dict[str, Any]:
    case = {"u": given["u"][None], "delta": given["Δ"][None], "B": given["B"][None], "C": given["C"][None]}
    return {**case, "A": -np.log(2) * np.array([[1.0, 2.0]])}


@RULES
def test_the_forward_on_paper_is_what_the_kernel_computes(rule):
    given = tokens("Forward")
    case, shown = worked_example(given), given if rule == "euler" else tokens("By the exact rule")
    for t in range(3):
        y, h = selective_scan(**cut_example(case, t + 1), return_last_state=True, discretization=rule)
        np.testing.assert_allclose(y[0, 0, t], shown["y"][0, t], atol=5.1e-5)
        np.testing.assert_allclose(h[0, 0], shown["h"][:, t], atol=5.1e-5)
        before = shown["h"][:, t - 1] if t else 0
        np.testing.assert_allclose(h[0, 0], given["decay"][:, t] * before + shown["inflow"][:, t], atol=1.1e-4)
        np.testing.assert_allclose(given["decay"][:, t], np.exp(case["A"][0] * given["Δ"][0, t]), atol=1e-12)
    if rule == "zoh":
        np.testing.assert_allclose(shown["inflow"], shown["Δ φ"] * given["B"] * given["u"], atol=4.1e-4)


def cut_example(case: dict[str, Any], end: int) -> dict[str, Any]:
    return {name: x if name == "A" else x[..., :end] for name, x in case.items()}


def test_the_backward_on_paper_is_what_the_kernel_computes():
    given, shown = tokens("Forward"), tokens("Backward")
    case = worked_example(given)
    state = np.zeros((1, 1, 2))
    gradients = selective_scan_backward(np.ones((1, 1, 3)), **case, initial_state=state)
    np.testing.assert_allclose(gradients.B[0], shown["dB"], atol=1e-12)
    np.testing.assert_allclose(gradients.C[0], shown["dC"], atol=1e-12)
    np.testing.assert_allclose(gradients.u[0], shown["du"], atol=1e-12)
    np.testing.assert_allclose(gradients.delta[0], shown["dΔ"], atol=5.1e-4)
    said = re.search(r"gradient of A is (.*), that .* = (\(.*\))\.", PAGE.read_text(encoding="utf-8"))
    np.testing.assert_allclose(gradients.A[0], numbers(said[1]), atol=1e-12)
    np.testing.assert_allclose(gradients.initial_state[0, 0], numbers(said[2]), atol=1e-12)
    for t in range(2, -1, -1):
        later = given["decay"][:, t + 1] * shown["g"][:, t + 1] if t < 2 else 0
        np.testing.assert_allclose(shown["g"][:, t], given["C"][:, t] + later, atol=1e-12)
        before = given["h"][:, t - 1] if t else 0
        np.testing.assert_allclose(shown["p"][:, t], shown["g"][:, t] * given["decay"][:, t] * before, atol=1e-12)


def test_the_page_states_the_memory_that_is_kept():
    case = {k: v for k, v in new_case(25, 2, 5, 130, 3).items() if k not in ("dout", "dlast_state")}
    options = {"delta_softplus", "discretization", "seq_idx", "reverse"}
    static = {k: case[k] for k in options} | {"precise": False, "save": True}
    saved = cpu.forward(**{k: v for k, v in case.items() if k not in options}, **static)[2]
    assert saved.checkpoints.nbytes == 2 * 5 * 3 * 3 * 4
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    batch, dim, seqlen, dstate = 8, 1536, 2048, 16
    assert f"(batch, dim, seqlen, dstate) = {batch, dim, seqlen, dstate}" in page
    assert f"u itself takes {4 * batch * dim * seqlen / 1e6:.1f} MB" in page
    states = 4 * batch * dim * dstate
    expected = [states * seqlen, states * -(-seqlen // cpu.TILE), states, 0]
    assert [row[2] for row in table("4. What is kept")] == [f"{round(x / 1e6, 1):g} MB" for x in expected]
    block = 16 * cpu.BLOCK_VECTORS  # with 16 lanes
    parts = 2 * 4 * -(-dim // block) * batch * seqlen * dstate
    assert f"2 · ⌈dim / {block}⌉ · batch · seqlen · dstate numbers: {parts / 1e6:.1f} MB" in page


def test_the_code_on_the_page_runs():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted > 5
    assert result.failed == 0


def test_the_names_on_the_page_are_those_of_the_code():
    code = "".join((PACKAGE / folder).read_text(encoding="utf-8") for folder in SOURCES)
    section = PAGE.read_text(encoding="utf-8").split("## 3. ")[1].split("\n## 5. ")[0]
    names = {name for quoted in re.findall(r"`([^`]+)`", section) for name in re.findall(r"[A-Za-z_]\w*", quoted)}
    assert len(names) > 15
    assert not [name for name in sorted(names - {"zoh", "py", "cpu"}) if not re.search(rf"\b{name}\b", code)]
