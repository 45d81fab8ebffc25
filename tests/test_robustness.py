"""What must hold whatever callers do: memory of any kind, threads, processes, numbers that are not finite.

The cases here run over all public operations at once, by the table of tests/badcalls.py; the files of the single
operations go deeper into each. Bits are compared, not errors, wherever the same arithmetic is promised.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import mpmath
import numpy as np
import pytest
from arrays import layouts, same_bits
from badcalls import OPERATIONS, Operation

import npmamba
from npmamba.autodiff import algebra, optim, pullback
from npmamba.cpu import runtime

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"batch": 2, "dim": 20, "seqlen": 70, "dstate": 3, "groups": 4, "width": 4, "width-1": 3}
SIZES |= {"rows": 3, "cols": 5, "d_model": 37, "vocab": 41, "vocab_size": 41}
OPS = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES |= {"float32": np.float32, "float64": np.float64}
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def run(operation: Operation, given: dict[str, Any]) -> tuple[Any, ...]:
    """Return all that a call gives, a state that it changes included, in native byte order."""
    out = operation.function(**given)
    results = out if isinstance(out, tuple) else (out,)
    if operation.in_place:
        state = given[operation.in_place]
        results = (*results, np.array(state.astype(state.dtype.newbyteorder("=")), order="C"))
    return tuple(None if x is None else np.array(x, order="C", copy=True) for x in results)


def snapshot(x: Any) -> Any:
    return (x.dtype.str, x.shape, x.strides, x.flags.writeable, x.tobytes()) if isinstance(x, np.ndarray) else x


# --- memory ---


def side_by_side(x: np.ndarray) -> np.ndarray:
    """Return `x` with its last two axes the other way around in memory: channels side by side."""
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x.copy()


def far_apart(x: np.ndarray) -> np.ndarray:
    """Return the same, as a slice of wider rows, which run backwards."""
    if x.ndim < 2:
        return np.repeat(x, 3)[1::3]
    wide = np.full((*x.shape[:-2], 2 * x.shape[-1], x.shape[-2] + 5), 7, x.dtype)
    view = wide[..., ::-2, 2:-3].swapaxes(-1, -2)
    view[...] = x
    return view


def file_of(x: np.ndarray, folder: Path) -> np.memmap:
    """Return `x` in a file that cannot be written."""
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.write_bytes(x.tobytes())
    return np.memmap(path, x.dtype, "r", shape=x.shape) if x.size else x.view(np.memmap)


def laid_out(kind: str, x: Any, folder: Path) -> Any:
    if not isinstance(x, np.ndarray) or not x.ndim:
        return x
    if kind in ("side by side", "far apart"):
        return side_by_side(x) if kind == "side by side" else far_apart(x)
    return file_of(x, folder) if kind == "file" else layouts(x)[kind]


KINDS = [*layouts(np.zeros((2, 2))), "side by side", "far apart", "file"]
UNWRITABLE = ("read-only", "file")


@OPS
@ALL_DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_memory_changes_a_bit_or_an_argument(operation, dtype, kind, tmp_path):
    """All arguments at once, and each alone among others in C order, and the result is a plain array of its own."""
    wanted = run(operation, operation.arguments(dtype, SIZES))
    names = [name for name in operation.axes if kind not in UNWRITABLE or name != operation.in_place]
    for chosen in (names, *([name] for name in names)):
        given = operation.arguments(dtype, SIZES)
        given |= {name: laid_out(kind, given[name], tmp_path) for name in chosen}
        before = {name: snapshot(x) for name, x in given.items()}
        out = operation.function(**given)
        results = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        assert all(type(x) is np.ndarray and x.dtype.isnative for x in results)
        inputs = [x for x in given.values() if isinstance(x, np.ndarray)]
        assert not any(np.may_share_memory(x, y) for x in results for y in inputs)
        assert [n for n, x in given.items() if snapshot(x) != before[n] and n != operation.in_place] == []
        got = run(operation, {**given, **_fresh_state(operation, dtype, kind, chosen, tmp_path)})
        assert same_bits(got, wanted), chosen


def _fresh_state(operation: Operation, dtype: Any, kind: str, chosen: Any, folder: Path) -> dict[str, Any]:
    """Return the state of an update once more, for the first call changed it."""
    name = operation.in_place
    if name is None:
        return {}
    state = operation.arguments(dtype, SIZES)[name]
    return {name: laid_out(kind, state, folder) if name in chosen else state}


@OPS
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_a_broadcast_view_has_the_bits_of_its_copy(operation, dtype):
    """One number, or one row, stands for all along an axis, whose stride is then 0."""
    for name, layout in operation.axes.items():
        if name == operation.in_place or not layout:
            continue
        for axis in range(len(layout.split())):
            given, again = operation.arguments(dtype, SIZES), operation.arguments(dtype, SIZES)
            view = np.broadcast_to(given[name].take([0], axis=axis), given[name].shape)
            assert same_bits(run(operation, {**given, name: view}), run(operation, {**again, name: view.copy()})), name


@OPS
def test_one_array_may_be_several_arguments(operation):
    """u, delta and z may be one array, and so may D and the bias: nothing is written into any."""
    given = operation.arguments(np.float64, SIZES)
    first: dict[Any, str] = {}
    for name, layout in operation.axes.items():
        if name not in operation.integers and name != operation.in_place:
            given[name] = given[first.setdefault(layout, name)]
    copies = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in given.items()}
    before = {name: snapshot(x) for name, x in given.items() if name != operation.in_place}
    assert same_bits(run(operation, given), run(operation, copies))
    assert before == {name: snapshot(given[name]) for name in before}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_tape_have_the_same_bits_from_any_memory(kind, tmp_path):
    """The operations in a row as a block has them, with a gradient that lies in that memory too."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, 20, 33)).astype(np.float32), rng.standard_normal((20, 4)).astype(np.float32)
    A, norm = -rng.uniform(1, 9, (20, 3)).astype(np.float32), rng.standard_normal(33).astype(np.float32)
    B, dout = rng.standard_normal((2, 3, 33)).astype(np.float32), rng.standard_normal((2, 20, 33)).astype(np.float32)

    def f(x, weight, A, B, norm):
        u = npmamba.causal_conv1d(x, weight, activation="silu")
        return npmamba.rms_norm(npmamba.selective_scan(u, u, A, B, B, z=x, delta_softplus=True), norm, residual=u)[0]

    def gradients(place):
        arguments = [place(a) for a in (x, weight, A, B, norm)]
        before = list(map(snapshot, arguments))
        out, pull = pullback(f, *arguments)
        found = (out, *pull(place(dout)))
        assert list(map(snapshot, arguments)) == before
        return tuple(np.array(a.astype(a.dtype.newbyteorder("="))) for a in found)

    assert same_bits(gradients(lambda a: laid_out(kind, a, tmp_path)), gradients(np.ascontiguousarray))


# --- threads and processes ---


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    yield
    runtime.set_num_threads(None)


def mixed(seed: int) -> list[Any]:
    """Call one operation after the other, and what has kernels besides; the seed decides the order too."""
    rng = np.random.default_rng(seed)
    dtype = [np.float32, np.float64, np.float16][seed % 3]
    results = {op.name: run(op, op.arguments(dtype, SIZES, seed)) for op in rng.permutation(OPERATIONS)}
    params = {"w": rng.standard_normal(40_000).astype(np.float32)}
    adamw = optim.adamw(0.1)
    new, state = adamw.update(params, adamw.init(params), params, optim.clip_factor(params, 1.0)[0])
    dropped = algebra.dropout(params["w"], rate=0.3, key=(seed,))
    return [*(results[op.name] for op in OPERATIONS), (new["w"], state.m["w"], state.v["w"], dropped)]


def test_sixteen_threads_of_mixed_calls_get_the_bits_of_one(many_threads):
    runtime.set_num_threads(1)
    serial = [mixed(seed) for seed in range(6)]
    runtime.set_num_threads(3)
    with ThreadPoolExecutor(16) as callers:
        for seed, found in zip(itertools.cycle(range(6)), callers.map(mixed, [i % 6 for i in range(48)]), strict=False):
            assert all(map(same_bits, found, serial[seed]))


PROCESSES = """
import hashlib
import multiprocessing
import sys
import threading
import warnings

warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forks of processes with threads
sys.path[:0] = [{tests!r}, {root!r}]
from test_robustness import mixed

from npmamba.cpu import runtime


def digest(seed):
    runtime.SERIAL_WORK = 0
    runtime.set_num_threads(3)
    return hashlib.sha256(b"".join(x.tobytes() for out in mixed(seed) for x in out if x is not None)).hexdigest()


def answer(pipe):
    pipe.send(digest(0))
    pipe.close()


def ask(method):
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context(method).Process(target=answer, args=(there,))
    child.start()
    there.close()
    found = here.recv() if here.poll(60) else "nothing in 60 s"
    child.join(60)
    return found


if __name__ == "__main__":
    wanted = digest(0)  # the parent's threads are awake now
    assert runtime._pool is not None
    for method in {methods!r}:
        assert ask(method) == wanted, method
    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [digest(0) for _ in iter(stop.is_set, True)]) for _ in range(4)]
    for thread in busy:
        thread.start()
    try:
        while_others_compute = [ask("fork") for _ in range(3)] if "fork" in {methods!r} else []
    finally:
        stop.set()
    for thread in busy:
        thread.join()
    assert while_others_compute == [wanted] * len(while_others_compute)
    assert digest(0) == wanted
"""


def test_children_of_every_kind_compute_after_their_parent_used_threads(tmp_path):
    """Forked, from a server and spawned; and forked while four threads of the parent compute."""
    methods = ["fork", "forkserver", "spawn"] if hasattr(os, "fork") else ["spawn"]
    script = tmp_path / "parent.py"
    script.write_text(PROCESSES.format(tests=str(ROOT / "tests"), root=str(ROOT), methods=methods))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


# --- numbers that are not finite, or hardly so ---


def one_step(x: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments of a scan of one step on as many channels as there are numbers, all else 1 and A = -1."""
    dtype, wide = x.dtype, np.float64 if x.dtype == np.float64 else np.float32
    u = np.ones((1, x.size, 1), dtype)
    maps = {"A": -np.ones((x.size, 1), wide), "B": np.ones((x.size, 1), dtype), "C": np.ones((x.size, 1), dtype)}
    return {"u": u, "delta": x.reshape(u.shape), **maps, **options}


def _gate(x: Any) -> dict[str, Any]:
    """Let the gate alone vary: the step is 0, and the direct path gives 1."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    return {**one_step(np.zeros_like(x)), "z": x.reshape(1, -1, 1), "D": np.ones(x.size, wide)}


def _gradients(**case: Any) -> Any:
    return npmamba.selective_scan_backward(np.ones_like(case["u"]), **case)


def _filter(x: Any) -> dict[str, Any]:
    """Let a filter of one weight, 1, lead to the activation."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    return {"x": x.reshape(1, -1, 1), "weight": np.ones((x.size, 1), wide), "activation": "silu"}


def _filter_gradient(x: Any) -> Any:
    return npmamba.causal_conv1d_backward(np.ones((1, x.size, 1), x.dtype), **_filter(x)).x


def _decay(x: Any) -> Any:
    wide = np.float64 if x.dtype == np.float64 else np.float32
    case = one_step(x, initial_state=np.ones((1, x.size, 1), wide))
    return npmamba.selective_scan(**{**case, "u": np.zeros_like(case["u"])})


def _update(x: Any, **options: Any) -> Any:
    case = {name: a[..., 0] if name in ("u", "delta") else a for name, a in one_step(x).items()}
    state = np.zeros((1, x.size, 1), case["A"].dtype)
    return npmamba.selective_state_update(state, case.pop("u"), case.pop("delta"), **case, **options)


def _losses(x: Any) -> Any:
    """log(e^0 + e^x) - 0, row by row: the softplus once more."""
    return [npmamba.cross_entropy(np.array([[0, v]], x.dtype), np.array([0])) for v in x]


def _loss_gradients(x: Any) -> Any:
    return [npmamba.cross_entropy_backward(1.0, np.array([[0, v]], x.dtype), np.array([0]))[0, 1] for v in x]


def softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x)) if x < 1e5 else x


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x)) if x > -1e5 else mpmath.mpf(0)


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def silu_derivative(x: Any) -> Any:
    return sigmoid(x) * (1 + x * sigmoid(-x)) if abs(x) < 1e5 else mpmath.mpf(x > 0)


def decay(x: Any) -> Any:
    return mpmath.exp(-x) if abs(x) < 1e5 else mpmath.inf if x < 0 else mpmath.mpf(0)


def inflow(x: Any) -> Any:
    return -mpmath.expm1(-x) if abs(x) < 1e5 else -mpmath.inf if x < 0 else mpmath.mpf(1)


Rule = tuple[Callable[[Any], Any], Callable[[Any], Any]]
RULES: dict[str, Rule] = {
    "softplus of the step": (lambda x: npmamba.selective_scan(**one_step(x, delta_softplus=True)), softplus),
    "softplus of an update": (lambda x: _update(x, dt_softplus=True), softplus),
    "softplus of the loss": (_losses, softplus),
    "sigmoid of the step": (lambda x: _gradients(**one_step(x, delta_softplus=True)).delta, sigmoid),
    "sigmoid of the loss": (_loss_gradients, sigmoid),
    "silu of the gate": (lambda x: npmamba.selective_scan(**_gate(x)), silu),
    "silu of the filter": (lambda x: npmamba.causal_conv1d(**_filter(x)), silu),
    "slope of the gate": (lambda x: _gradients(**_gate(x)).z, silu_derivative),
    "slope of the filter": (_filter_gradient, silu_derivative),
    "exp of the decay": (_decay, decay),
    "expm1 of the inflow": (lambda x: npmamba.selective_scan(**one_step(x, discretization="zoh")), inflow),
    "expm1 of an update": (lambda x: _update(x, discretization="zoh"), inflow),
}
UNITS = 6  # of the last place, as a chain of a few roundings has them


def slack(name: str, x: float, right: Any, dtype: Any) -> Any:
    """Return the error that is allowed: of rounding a product that goes into exp, and where numbers of size 1 cancel.

    What is too small for a normal number may be 0, and then so is its product with x.
    """
    info = np.finfo(dtype)
    units = UNITS + (abs(x) if "loss" in name or "decay" in name else 0)
    of_one = {"softplus of the loss": 1, "slope of the gate": 3, "slope of the filter": 3}.get(name, 0)
    return abs(right) * units * float(info.eps) + of_one * float(info.eps) + max(1.0, abs(x)) * float(info.tiny)


def special(dtype: Any) -> np.ndarray:
    """Return zeros, the smallest and largest numbers, and where formulas of each dtype change."""
    info = ml_dtypes.finfo(dtype)
    sizes = [0, info.smallest_subnormal, info.tiny, info.eps, info.eps**2, 1e-3, 0.1, 0.5, 1, 2, 10, 17, 20, 40, 87, 88]
    sizes += [88.5, 89, 100, 104, 126, 128, 150, 300, 700, 709, 710, 745, 1000, 1e4, 6e4, float(info.max) / 2, info.max]
    x = np.array([s for s in map(float, sizes) if s <= float(info.max)], dtype)
    return np.concatenate([x, -x])


def farthest_off(name: str, function: Callable[[Any], Any], dtype: Any) -> tuple[float, float, Any] | None:
    """Return a number, what `function` makes of it and what is right, if that is farther off than allowed."""
    exact, x = RULES[name][1], special(dtype)
    if exact is inflow:
        x = x[x > -80]  # beyond, the decay overflows, and infinity times the empty state is no number
    with np.errstate(all="ignore"):  # a result beyond float16 is infinite, of which NumPy warns
        got = np.asarray(function(x)).ravel()
    computed, info = np.float64 if dtype == np.float64 else np.float32, ml_dtypes.finfo(got.dtype)
    with mpmath.workdps(60):
        wanted = [exact(mpmath.mpf(float(v))) for v in x]
    for v, value, right in zip(map(float, x), map(float, got), wanted, strict=True):
        allowed = slack(name, v, right, computed) + abs(right) * float(info.eps) + float(info.smallest_subnormal)
        overflow = abs(right) + allowed >= float(info.max) and abs(value) == np.inf
        if not (np.sign(value) == mpmath.sign(right) if overflow else abs(value - right) <= allowed):
            return v, value, right
    return None


@ALL_DTYPES
@pytest.mark.parametrize("name", RULES)
def test_special_numbers_have_the_values_of_mpmath(name, dtype):
    """From the smallest to the largest that there are; what is too small for a normal number may be 0."""
    assert farthest_off(name, RULES[name][0], dtype) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_the_tables_find_naive_formulas(dtype):
    naive = {
        "softplus of the step": lambda x: np.log(1 + np.exp(x)),
        "sigmoid of the step": lambda x: np.exp(x) / (1 + np.exp(x)),
        "silu of the gate": lambda x: x * (np.tanh(x / 2) + 1) / 2,
        "expm1 of the inflow": lambda x: 1 - np.exp(-x),
    }
    assert all(farthest_off(name, function, dtype) for name, function in naive.items())


# None: no number, or its limit; the formula has infinity times 0 there.
AT_INFINITY = {softplus: (np.inf, 0), sigmoid: (1, 0), silu: (np.inf, None)}


@ALL_DTYPES
@pytest.mark.parametrize("name", [name for name in RULES if "loss" not in name])
def test_infinities_have_their_limits_and_nan_is_nan(name, dtype):
    function, exact = RULES[name]
    x = np.array([np.inf, -np.inf, np.nan, -np.nan], dtype)
    with np.errstate(invalid="ignore"):
        got = np.asarray(function(x)).ravel().astype(np.float64)
    assert np.isnan(got[2:]).all()
    for found, limit in zip(got, AT_INFINITY.get(exact, ()), strict=False):
        assert limit is None or found == limit, (found, limit)


@ALL_DTYPES
def test_a_class_that_is_forbidden_costs_nothing(dtype):
    forbidden = np.array([-np.inf], dtype)
    assert _losses(forbidden) == [0]
    assert _loss_gradients(forbidden) == [0]


# --- what a number that is not finite reaches ---

_SCAN_GRADIENTS = "u delta A B C D z delta_bias initial_state"
RESULTS: dict[str, list[str]] = {op.name: [op.axes[n] for n in _SCAN_GRADIENTS.split()] for op in OPERATIONS[1:2]}
RESULTS["selective_scan"] = ["batch dim seqlen", "batch dim dstate"]
RESULTS["selective_state_update"] = ["batch dim", "batch dim dstate"]
RESULTS["causal_conv1d"] = ["batch dim seqlen", "batch dim width-1"]
RESULTS["causal_conv1d_backward"] = ["batch dim seqlen", "dim width", "dim", "batch dim width-1"]
RESULTS["causal_conv1d_update"] = ["batch dim", "batch dim width-1"]
RESULTS["rms_norm"] = ["rows cols d_model"] * 2
RESULTS["rms_norm_backward"] = ["rows cols d_model", "d_model", "rows cols d_model"]
RESULTS["cross_entropy_backward"] = ["rows cols vocab"]
APART = ("batch", "dim", "rows", "cols")
"""Along these axes nothing spreads, but by a sum over them."""
STRANGE = (np.nan, np.inf, -np.inf, 3e38)


def reached(operation: Operation, name: str, place: Any, axes: list[str], reverse: bool) -> np.ndarray:
    """Return where a result may change with ``name[place]``: not in other rows or channels, and not before it."""
    where = dict(zip(operation.axes[name].split(), place, strict=True))
    share = SIZES["dim"] // SIZES["groups"]
    indices = dict(zip(axes, np.indices([SIZES[axis] for axis in axes]), strict=True))
    mask = np.ones([SIZES[axis] for axis in axes], bool)
    for axis in APART:
        if axis in where and axis in indices:
            mask &= indices[axis] == where[axis]
    if "groups" in where and "dim" in indices:
        mask &= indices["dim"] // share == where["groups"]
    if "dim" in where and "groups" in indices:
        mask &= indices["groups"] == where["dim"] // share
    if "seqlen" in where and "seqlen" in indices and (not operation.name.endswith("backward") or name == "dout"):
        time, now = indices["seqlen"], where["seqlen"]
        mask &= time >= now if (name == "dout") == reverse else time <= now  # gradients flow the other way
    return mask


def spreading() -> Iterator[Any]:
    for operation in OPERATIONS:
        for name in operation.axes:
            if operation.name in RESULTS and name not in operation.integers and operation.axes[name]:
                for reverse in (False, True)[: 1 + ("reverse" in operation.options)]:
                    yield pytest.param(operation, name, reverse, id=f"{operation.name}-{name}-{reverse}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("operation", "name", "reverse"), list(spreading()))
def test_a_strange_number_changes_nothing_before_it_nor_in_other_rows_or_channels(operation, name, reverse, dtype):
    """Not a bit of what it must not reach; and NaN reaches something."""
    options = {"reverse": reverse} if "reverse" in operation.options else {}
    clean = run(operation, {**operation.arguments(dtype, SIZES), **options})
    rng = np.random.default_rng(7)
    for strange in STRANGE:
        given = {**operation.arguments(dtype, SIZES), **options}
        place = tuple(int(rng.integers(n)) for n in given[name].shape)
        given[name] = given[name].copy()
        given[name][place] = strange
        with np.errstate(all="ignore"):
            found = run(operation, given)
        for got, wanted, axes in zip(found, clean, RESULTS[operation.name], strict=True):
            free = reached(operation, name, place, axes.split(), reverse)
            assert got[~free].tobytes() == wanted[~free].tobytes(), (strange, place, axes)
        assert not np.isnan(strange) or any(np.isnan(x).any() for x in found)


def test_the_search_for_what_spreads_can_fail():
    """Packed rows spread nothing, but a mean over time does."""
    operation = OPERATIONS[0]
    mask = reached(operation, "u", (1, 3, 5), ["batch", "dim", "seqlen"], reverse=False)
    assert mask.sum() == SIZES["seqlen"] - 5
    assert reached(operation, "u", (1, 3, 5), ["batch", "dim", "seqlen"], reverse=True).sum() == 6
    assert reached(operation, "B", (1, 2, 5), ["batch", "dim", "seqlen"], reverse=False).sum() == 20 * (70 - 5)
    assert reached(operation, "C", (1, 2, 0, 5), ["batch", "dim", "dstate"], reverse=False).sum() == 5 * 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=["float16", "float32", "float64"])
def test_an_embedding_moves_every_bit_pattern_as_it_is(dtype):
    """NaN with its sign and payload, infinities, zeros of either sign and the smallest numbers."""
    bits = np.random.default_rng(8).integers(0, 256, (64, 8 * np.dtype(dtype).itemsize), np.uint8)
    table, ids = bits.view(dtype), np.random.default_rng(9).permutation(64)
    assert same_bits(npmamba.embedding(table, ids).view(np.uint8), bits[ids])
