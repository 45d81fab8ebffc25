"""A catalogue of bad calls: operations x arguments x kinds of badness, built from tables.

A bad call is a right one with one thing changed; some changes turn out to be harmless. `CALLS` holds those of the
operations on arrays, `OTHER_CALLS` those of configurations, sampling, optimizers and whole-array primitives.
tests/test_badcalls.py makes every one of them and asks for the reference's value, or for an error that names the
operation, the argument, what came and what was expected.
"""

from __future__ import annotations

import array
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from arrays import layouts

import npmamba
from npmamba.autodiff import algebra, optim
from npmamba.autodiff.tape import Tape
from npmamba.config import MambaConfig
from npmamba.generate import generate, probabilities, sample_token
from npmamba.reference import causal_conv1d, cross_entropy, embedding, rms_norm, selective_scan, selective_state_update

SIZES = {"batch": 2, "dim": 6, "seqlen": 5, "dstate": 3, "groups": 2, "width": 3, "width-1": 2}
SIZES |= {"rows": 2, "cols": 4, "d_model": 7, "vocab": 9, "vocab_size": 9}
MISSING = object()
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


@dataclass(frozen=True)
class Operation:
    """A public operation: the axes of its arrays, what its options are, and what computes the right value.

    Attributes
    ----------
    axes : mapping
        Layout of each array argument; those of `integers` hold numbers below the size named there.
    optional : set of names
        Arrays that may be None.
    options : mapping
        Name to (kind, a right value).
    wide : set of names
        Arrays whose dtype is the one that is computed in.
    """

    name: str
    reference: Callable[[Arguments], Any]
    axes: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    integers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    in_place: str | None = None

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(npmamba, self.name)

    def arguments(self, dtype: Any = np.float64, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> Arguments:
        """Return the arguments of a right call, always the same ones for a seed."""
        rng, wide = np.random.default_rng(seed), np.float64 if dtype == np.float64 else np.float32
        drawn: Arguments = {}
        for name, axes in self.axes.items():
            shape = tuple(sizes[axis] for axis in axes.split())
            if name in self.integers:
                drawn[name] = rng.integers(0, sizes[self.integers[name]], shape)
            else:
                drawn[name] = np.asarray(rng.uniform(0.1, 1, shape), wide if name in self.wide else dtype)
        if "A" in drawn:
            drawn["A"] = -drawn["A"]
        if "vocab_size" in self.options:
            drawn["vocab_size"] = sizes["vocab_size"]
        return {name: value for name, (_, value) in self.options.items()} | drawn


def _named(module: ModuleType, way: str, drop: str = "") -> Callable[[Arguments], Any]:
    """Call a reference with the arguments it knows."""
    return lambda given: getattr(module, way)(**{k: v for k, v in given.items() if k not in drop.split()})


def _first(module: ModuleType, drop: str = "") -> Callable[[Arguments], Any]:
    """Call the forward of a reference; the last state counts only where it was asked for."""
    both = _named(module, "forward", drop)
    return lambda given: both(given) if given.get("return_last_state") else both(given)[0]


def _update_by_forward(given: Arguments) -> Any:
    names = {k: v for k, v in given.items() if k not in ("state", "x")}
    y, last = causal_conv1d.forward(np.asarray(given["x"])[..., None], initial_state=given["state"], **names)
    return y[..., 0], last


def _embedding_gradient(given: Arguments) -> Any:
    return embedding.backward(given["dout"], given["input_ids"], given["vocab_size"])


_STEPS, _STATE = "batch dim seqlen", "batch dim dstate"
_SCAN = {"u": _STEPS, "delta": _STEPS, "A": "dim dstate", "B": "batch dstate seqlen"}
_SCAN |= {"C": "batch groups dstate seqlen", "D": "dim", "z": _STEPS, "delta_bias": "dim"}
_SCAN_OPTIONS = {"delta_softplus": ("flag", True), "discretization": ("rule", "euler"), "reverse": ("flag", False)}
_TAPS = "batch dim width-1"
_CONV = {"x": _STEPS, "weight": "dim width", "bias": "dim"}
_CONV_OPTIONS = {"activation": ("activation", "silu"), "reverse": ("flag", False)}
_LAST = {"return_last_state": ("flag", True)}
_SCAN_WIDE = frozenset({"A", "D", "delta_bias", "initial_state", "dlast_state"})
_CONV_WIDE = frozenset({"weight", "bias", "initial_state", "dlast_state", "state"})

OPERATIONS = [
    Operation(
        "selective_scan",
        _first(selective_scan, "return_last_state precise"),
        _SCAN | {"initial_state": _STATE, "seq_idx": "batch seqlen"},
        frozenset({"D", "z", "delta_bias", "initial_state", "seq_idx"}),
        _SCAN_WIDE,
        {"seq_idx": "rows"},
        _SCAN_OPTIONS | _LAST | {"precise": ("flag", False)},
    ),
    Operation(
        "selective_scan_backward",
        _named(selective_scan, "backward"),
        {"dout": _STEPS} | _SCAN | {"initial_state": _STATE, "dlast_state": _STATE, "seq_idx": "batch seqlen"},
        frozenset({"D", "z", "delta_bias", "initial_state", "dlast_state", "seq_idx"}),
        _SCAN_WIDE,
        {"seq_idx": "rows"},
        _SCAN_OPTIONS,
    ),
    Operation(
        "selective_state_update",
        _named(selective_state_update, "forward"),
        {"state": _STATE, "x": "batch dim", "dt": "batch dim", "A": "dim dstate", "B": "batch dstate"}
        | {"C": "batch groups dstate", "D": "dim", "z": "batch dim", "dt_bias": "dim"},
        frozenset({"D", "z", "dt_bias"}),
        frozenset({"state", "A", "D", "dt_bias"}),
        options={"dt_softplus": ("flag", True), "discretization": ("rule", "euler")},
        in_place="state",
    ),
    Operation(
        "causal_conv1d",
        _first(causal_conv1d, "return_last_state"),
        _CONV | {"initial_state": _TAPS, "seq_idx": "batch seqlen"},
        frozenset({"bias", "initial_state", "seq_idx"}),
        _CONV_WIDE,
        {"seq_idx": "rows"},
        _CONV_OPTIONS | _LAST,
    ),
    Operation(
        "causal_conv1d_backward",
        _named(causal_conv1d, "backward"),
        {"dout": _STEPS} | _CONV | {"initial_state": _TAPS, "dlast_state": _TAPS, "seq_idx": "batch seqlen"},
        frozenset({"bias", "initial_state", "dlast_state", "seq_idx"}),
        _CONV_WIDE,
        {"seq_idx": "rows"},
        _CONV_OPTIONS,
    ),
    Operation(
        "causal_conv1d_update",
        _update_by_forward,
        {"state": _TAPS, "x": "batch dim", "weight": "dim width", "bias": "dim"},
        frozenset({"bias"}),
        _CONV_WIDE,
        options={"activation": ("activation", "silu")},
        in_place="state",
    ),
    Operation(
        "rms_norm",
        _named(rms_norm, "forward"),
        {"x": "rows cols d_model", "weight": "d_model", "residual": "rows cols d_model"},
        frozenset({"residual"}),
        frozenset({"weight"}),
        options={"eps": ("number", 1e-5)},
    ),
    Operation(
        "rms_norm_backward",
        _named(rms_norm, "backward"),
        {"dout": "rows cols d_model", "x": "rows cols d_model", "weight": "d_model", "residual": "rows cols d_model"}
        | {"dresidual": "rows cols d_model"},
        frozenset({"residual", "dresidual"}),
        frozenset({"weight"}),
        options={"eps": ("number", 1e-5)},
    ),
    Operation(
        "cross_entropy",
        _named(cross_entropy, "forward"),
        {"logits": "rows cols vocab", "labels": "rows cols"},
        integers={"labels": "vocab"},
        options={"ignore_index": ("integer", -100)},
    ),
    Operation(
        "cross_entropy_backward",
        _named(cross_entropy, "backward"),
        {"dout": "", "logits": "rows cols vocab", "labels": "rows cols"},
        wide=frozenset({"dout"}),
        integers={"labels": "vocab"},
        options={"ignore_index": ("integer", -100)},
    ),
    Operation(
        "embedding",
        _named(embedding, "forward"),
        {"weight": "vocab_size d_model", "input_ids": "rows cols"},
        integers={"input_ids": "vocab_size"},
    ),
    Operation(
        "embedding_backward",
        _embedding_gradient,
        {"dout": "rows cols d_model", "input_ids": "rows cols"},
        integers={"input_ids": "vocab_size"},
        options={"vocab_size": ("count", 9)},
    ),
]
BY_NAME = {operation.name: operation for operation in OPERATIONS}


@dataclass(frozen=True)
class Call:
    """A right call of an operation with one thing changed.

    A refusal must name the argument; where several words stand there, one of them.
    """

    operation: Operation
    argument: str
    kind: str
    change: Change
    dtype: Any = np.float64

    def arguments(self) -> Arguments:
        given = self.change(self.operation.arguments(self.dtype))
        return {name: value for name, value in given.items() if value is not MISSING}

    def __repr__(self) -> str:
        return f"{self.operation.name}: {self.argument}: {self.kind}"


# --- what may come instead of an array ---


class Pretender:
    """Something with the attributes of an array and none of its memory."""

    shape, ndim, dtype, size, strides = (2, 6, 5), 3, np.dtype(np.float64), 60, (240, 40, 8)


class Subclass(np.ndarray):
    """A subclass of NumPy's arrays that adds nothing: to be taken as an array."""


def _zeros(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.zeros(x.shape, dtype)


def _nothing(x: np.ndarray) -> None:
    return None


OTHERS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": lambda x: x.tolist(),
    "tuple": lambda x: tuple(map(tuple, x)) if x.ndim > 1 else tuple(x.reshape(-1).tolist()),
    "number": lambda x: 1.0,
    "integer": lambda x: 1,
    "truth": lambda x: True,
    "complex number": lambda x: 1j,
    "NumPy number": lambda x: np.float64(1),
    "string": lambda x: "array",
    "bytes": lambda x: x.tobytes(),
    "object": lambda x: object(),
    "dictionary": lambda x: {"array": x},
    "generator": lambda x: (row for row in x.reshape(-1)),
    "memoryview": lambda x: memoryview(np.ascontiguousarray(x)),
    "matrix": lambda x: x.view(np.matrix) if x.ndim == 2 else x[None],
    "array.array": lambda x: array.array("d", x.reshape(-1).tolist()),
    "class": lambda x: np.ndarray,
    "function": lambda x: np.zeros,
    "pretender": lambda x: Pretender(),
    "masked array": lambda x: np.ma.array(x),
    "0-d array": lambda x: np.zeros((), x.dtype),
    "empty array": lambda x: np.zeros(0, x.dtype),
    "one axis more": lambda x: x[None],
    "one axis more behind": lambda x: x[..., None],
    "one axis less": lambda x: x[0] if x.ndim else x,
    "flat": lambda x: x.reshape(-1),
    "subclass": lambda x: x.view(Subclass),
    "ndarray of records": lambda x: _zeros(x, [("re", "f8"), ("im", "f8")]),
    "record array": lambda x: x.view(np.recarray),
    "dtype with metadata": lambda x: x.astype(np.dtype(x.dtype, metadata={"unit": "m"})),
    "traced": lambda x: Tape().watch(x),
}
DTYPES: dict[str, Any] = {
    "bool": bool,
    "int8": np.int8,
    "int32": np.int32,
    "int64": np.int64,
    "uint64": np.uint64,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "longdouble": np.longdouble,
    "float8": ml_dtypes.float8_e4m3fn,
    "int4": ml_dtypes.int4,
    "object": object,
    "string": "U1",
    "bytes": "S1",
    "void": "V8",
    "date": "M8[s]",
    "duration": "m8[s]",
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


def _replaced(name: str, make: Callable[[np.ndarray], Any]) -> Change:
    return lambda given: {**given, name: make(given[name])}


def _set(**changes: Any) -> Change:
    return lambda given: {**given, **changes}


def _cast(dtype: Any, name: str) -> Change:
    return lambda given: {**given, name: _converted(given[name], dtype)}


def _converted(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return `x` in another dtype, or zeros of it where there is no way."""
    kind = np.dtype(dtype).kind
    return x.astype(dtype) if kind in "biufcO" or np.dtype(dtype) == ml_dtypes.bfloat16 else _zeros(x, dtype)


def _resized(name: str, axis: int, length: int) -> Change:
    def change(given: Arguments) -> Arguments:
        shape = list(given[name].shape)
        shape[axis] = length
        return {**given, name: np.full(shape, given[name].reshape(-1)[0], given[name].dtype)}

    return change


def array_calls(operation: Operation) -> Iterator[Call]:
    """Yield calls with something else for each array argument: no array, another dtype, another shape."""
    for name, layout in operation.axes.items():
        yield Call(operation, name, "missing", _set(**{name: MISSING}))
        yield Call(operation, name, "None", _set(**{name: None}))
        for kind, make in OTHERS.items():
            yield Call(operation, name, kind, _replaced(name, make))
        for kind, dtype in DTYPES.items():
            yield Call(operation, name, f"of {kind}", _cast(dtype, name))
            if kind in ("float16", "bfloat16", "float64"):
                yield Call(operation, name, f"of {kind} among float32", _cast(dtype, name), np.float32)
        for i, axis in enumerate(layout.split()):
            for length in sorted({0, 1, SIZES[axis] - 1, SIZES[axis] + 1, 2 * SIZES[axis], 70} - {SIZES[axis]}):
                names = f"{name} {axis}" if axis == "vocab_size" else name  # ids that are too large are named with it
                yield Call(operation, names, f"{axis}={length}", _resized(name, i, length))


def memory_calls(operation: Operation) -> Iterator[Call]:
    """Yield calls with the same values in other memory: right, or refused where the state cannot be written."""
    for name in operation.axes:
        for kind in layouts(np.zeros((2, 2))):
            yield Call(operation, name, kind, _replaced(name, lambda x, kind=kind: layouts(x)[kind] if x.ndim else x))
        yield Call(operation, name, "memmap", _replaced(name, lambda x: x.view(np.memmap)))
        yield Call(operation, name, "broadcast", _replaced(name, lambda x: np.broadcast_to(x.reshape(-1)[0], x.shape)))


def whole_calls(operation: Operation) -> Iterator[Call]:
    """Yield calls with all arrays changed alike."""
    floats = [name for name in operation.axes if name not in operation.integers]
    for kind in ("bool", "int32", "int64", "complex128", "object", "longdouble", "string", "float8"):

        def change(given: Arguments, kind: str = kind) -> Arguments:
            return {**given, **{name: _converted(given[name], DTYPES[kind]) for name in floats}}

        yield Call(operation, " ".join(floats), f"all of {kind}", change)
    for kind in ("list", "masked array", "object", "subclass"):

        def change(given: Arguments, kind: str = kind) -> Arguments:
            return {**given, **{name: OTHERS[kind](given[name]) for name in operation.axes}}

        yield Call(operation, " ".join(operation.axes), f"all as {kind}", change)
    axes = dict.fromkeys(axis for layout in operation.axes.values() for axis in layout.split())
    for axis in axes:
        for length in (0, 1):  # an axis of no length is right where the documentation allows it
            yield Call(operation, axis, f"{axis}={length} everywhere", _everywhere(operation, axis, length))


def _everywhere(operation: Operation, axis: str, length: int) -> Change:
    lengths = {axis: length, "groups": 1} if axis == "dim" else {axis: length}
    if axis == "width":
        lengths["width-1"] = length - 1

    def change(given: Arguments) -> Arguments:
        given = dict(given)
        for name, layout in operation.axes.items():
            for i, other in enumerate(layout.split()):
                if other in lengths:
                    given[name] = given[name].take(range(max(lengths[other], 0)), axis=i)
        return given

    return change


# --- options ---

NAN, INF, HUGE = math.nan, math.inf, 10**400
ODD: list[Any] = [None, "x", b"zoh", "", 0, 1, -1, 1.5, True, NAN, INF, -INF, HUGE, -HUGE, 10**5000, 2**63, 2**70]
ODD += [1j, [], {}, (1,), object(), np.float64(2), np.int64(3), np.float32(NAN), np.float16(0.5), np.longdouble(0.5)]
ODD += [np.True_, np.array(True), np.zeros(2), np.zeros((), int), "EULER", "zoh ", "Silu", "relu", ["zoh"]]
ODD += [np.str_("zoh"), np.array("zoh"), type, np.float16, 1e300, 5e-324, -0.0, ml_dtypes.bfloat16(0.5)]


def _shown(value: Any) -> str:
    text = "of 5001 digits" if type(value) is int and value > HUGE else repr(value)
    return type(value).__name__ + ("" if " at 0x" in text else f" {text[:30]}")


def option_calls(operation: Operation) -> Iterator[Call]:
    """Yield calls with odd values of each option, and with options that do not exist."""
    for name in operation.options:
        for value in ODD:
            yield Call(operation, name, _shown(value), _set(**{name: value}))
    for wrong in ("dtype", "out", "axis", "delta_sofplus", "revers", "seq_indx", "epsilon", "self"):
        yield Call(operation, wrong, "unknown", _set(**{wrong: None}))


# --- values ---


def _with(name: str, place: Any, value: Any, dtype: Any = None) -> Change:
    def change(given: Arguments) -> Arguments:
        x = given[name].copy() if dtype is None else given[name].astype(dtype)
        x[place] = value
        return {**given, name: x}

    return change


def value_calls() -> Iterator[Call]:
    """Yield calls whose numbers are out of range, whose groups do not divide, and whose sizes are beyond the limits."""
    for value in ODD:
        for dtype in (np.float64, np.float32):
            kind = f"{_shown(value)} with {np.dtype(dtype)}"
            yield Call(BY_NAME["cross_entropy_backward"], "dout", kind, _set(dout=value), dtype)
    for eps in (1e-300, 1e38, 3e38, 1e39, 1e308):
        for op in ("rms_norm", "rms_norm_backward"):
            yield Call(BY_NAME[op], "eps", f"{eps} with float32", _set(eps=eps), np.float32)
    for size in (2**31, 10**12, 2**62):
        yield Call(BY_NAME["embedding_backward"], "vocab_size", f"{size}", _set(vocab_size=size))
    yield Call(BY_NAME["rms_norm_backward"], "dresidual", "without residual", _set(residual=None))
    for op, name in (("cross_entropy", "labels"), ("cross_entropy_backward", "labels")):
        for value in (-1, -2, 9, 10, 2**31, 2**62, -(2**63)):
            yield Call(BY_NAME[op], name, f"label {value}", _with(name, (1, 2), value))
        for value in (9, 2**64 - 1, 2**63):
            yield Call(BY_NAME[op], name, f"label {value} of uint64", _with(name, (0, 0), value, np.uint64))
        for value in (-1, 9, 127, -128):
            yield Call(BY_NAME[op], name, f"label {value} of int8", _with(name, (0, 0), value, np.int8))
    for op in ("embedding", "embedding_backward"):
        for value in (-1, 9, 10**6, 2**63 - 1, -(2**63)):
            yield Call(BY_NAME[op], "input_ids", f"id {value}", _with("input_ids", (1, 3), value))
        for value in (9, 2**63, 2**64 - 1):
            yield Call(BY_NAME[op], "input_ids", f"id {value} of uint64", _with("input_ids", (0, 0), value, np.uint64))
    for op in ("selective_scan", "selective_scan_backward", "causal_conv1d", "causal_conv1d_backward"):
        for value in (-1, -(2**31), -(2**63), 2**63 - 1):
            yield Call(BY_NAME[op], "seq_idx", f"number {value}", _with("seq_idx", (0, 2), value))
        for value in (2**63, 2**64 - 1):
            yield Call(BY_NAME[op], "seq_idx", f"number {value} of uint64", _with("seq_idx", (0, 2), value, np.uint64))
    yield from _map_calls()


def _map_calls() -> Iterator[Call]:
    for op in ("selective_scan", "selective_scan_backward", "selective_state_update"):
        operation, timed = BY_NAME[op], (5,) if op != "selective_state_update" else ()
        for name in ("B", "C"):
            for groups in (0, 1, 3, 4, 5, 6, 7, 12):
                maps = {name: np.full((2, groups, 3, *timed), 0.5)}
                yield Call(operation, name, f"groups={groups} of 6 channels", _set(**maps))
            for shape in ((6, 3), (3, 6), (6, 4), (3,), (2, 3), (2, 3, 5), (2, 5, 3), (2, 2, 5, 3), (1, 1, 3, 5, 1)):
                yield Call(operation, name, f"shape {shape}", _set(**{name: np.full(shape, 0.5)}))
        for dstate in (0, 256, 257, 1000):
            for dtype in (np.float64, np.float32):
                yield Call(operation, "dstate", f"{dstate} of {np.dtype(dtype)}", _of_dstate(op, dstate, dtype), dtype)


def _of_dstate(op: str, dstate: int, dtype: Any) -> Change:
    layouts = BY_NAME[op].axes

    def change(given: Arguments) -> Arguments:
        given = dict(given)
        for name, layout in layouts.items():
            shape = tuple(dstate if axis == "dstate" else SIZES[axis] for axis in layout.split())
            if "dstate" in layout:
                given[name] = np.full(shape, -0.5 if name == "A" else 0.5, given[name].dtype)
        return given

    return change


CALLS = [
    call
    for operation in OPERATIONS
    for calls in (array_calls, memory_calls, whole_calls, option_calls)
    for call in calls(operation)
]
CALLS += list(value_calls())


# --- what takes no arrays of fixed axes: configurations, sampling, optimizers, primitives ---


@dataclass(frozen=True)
class OtherCall:
    """A call of `function`; `right` judges what it returns."""

    operation: str
    argument: str
    kind: str
    function: Callable[..., Any] = field(repr=False)
    given: Arguments = field(repr=False)
    right: Callable[[Any], bool] = field(repr=False)


class Echo:
    """A model whose next token is the sum of all tokens read so far."""

    def prefill(self, ids: Any) -> Any:
        state = ids.sum(axis=1).astype(np.int64)
        return 5.0 * np.eye(8)[state % 8], state

    def step(self, token: Any, state: Any) -> Any:
        state += token
        return 5.0 * np.eye(8)[state % 8]


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python has it."""
    return value.item() if isinstance(value, np.generic) else value


def _same(x: Any, y: Any) -> bool:
    return np.shape(x) == np.shape(y) and np.allclose(np.asarray(x, float), np.asarray(y, float), equal_nan=True)


def _again(function: Callable[..., Any], plain: Arguments) -> Callable[[Any], bool]:
    """Ask for what the same call gives with Python's own number."""
    return lambda out: plain.get("seed") is None or _same(out, function(**plain))


def _any_token(out: Any) -> bool:
    return set(np.ravel(out)) <= {0, 1, 2}


def _sampling_calls() -> Iterator[OtherCall]:
    ids, logits = np.array([[1, 2, 3]]), np.array([[0.0, 3.0, 1.0]])
    options: Arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    more: Arguments = {"max_new_tokens": 2, "seed": 0, "eos_token_id": None}
    calls: dict[str, tuple[Callable[..., Any], Arguments]] = {
        "generate": (generate, {"model": Echo(), "input_ids": ids, **options, **more}),
        "probabilities": (probabilities, {"logits": logits, **options}),
        "sample_token": (sample_token, {"logits": logits, "rng": np.random.default_rng(0), **options}),
    }
    for name, (function, good) in calls.items():
        for argument, usual in good.items():
            for value in ODD:
                if argument == "max_new_tokens" and isinstance(value, int) and value > 100:
                    continue  # it would be obeyed

                given, plain = {**good, argument: value}, {**good, argument: _plain(value)}
                again = _again(function, plain) if name != "sample_token" else _any_token
                yield OtherCall(name, argument, _shown(value), function, given, again)
            if isinstance(usual, np.ndarray):
                kinds = {k: f(usual) for k, f in OTHERS.items() if k not in ("traced", "bytes", "generator")}
                kinds |= {f"of {k}": _converted(usual, dtype) for k, dtype in DTYPES.items()}
                kinds |= {"ragged": [[1], [2, 3]], "nested": [[[1]]], "huge": [[2**70]], "of None": [[1, None]]}
                for kind, value in kinds.items():
                    yield OtherCall(
                        name, argument, kind, function, {**good, argument: value}, lambda out: np.ndim(out) < 5
                    )


def _config_calls() -> Iterator[OtherCall]:
    good = {"vocab_size": 11, "d_model": 8, "n_layer": 1}
    for spec in dataclasses.fields(MambaConfig):
        for value in ODD:

            def right(config: Any, name: str = spec.name, value: Any = value) -> bool:
                return bool(getattr(config, name) == value) or (name, value) == ("dt_rank", "auto")

            yield OtherCall(
                "MambaConfig", spec.name, _shown(value), MambaConfig, {**good, spec.name: value}, right
            )
    for wrong in ("d_modl", "n_layers", "vocabsize", "dstate", "tie_embedding", "drop_out", "eos_id", "nonsense"):
        yield OtherCall("MambaConfig", wrong, "unknown", MambaConfig, {**good, wrong: 1}, lambda config: False)
    for value in ODD:
        yield OtherCall("MambaConfig", "", _shown(value), MambaConfig.from_dict, {"data": value}, lambda config: False)
        yield OtherCall("MambaConfig", "", _shown(value), MambaConfig.from_json, {"text": value}, lambda config: False)


# One step of each optimizer, by its equation.


def _adamw_by_hand(given: Arguments) -> Any:
    o = {"learning_rate": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, **given["options"]}
    (b1, b2), t = o["betas"], given["state"].step + 1
    lr = float(o["learning_rate"](t - 1) if callable(o["learning_rate"]) else o["learning_rate"])
    new = {}
    for name, p in given["params"].items():
        if p is None or isinstance(p, (list, dict)):
            continue
        g = np.asarray(given["grads"][name], float) * float(given["grad_scale"])
        m = b1 * np.asarray(given["state"].m[name], float) + (1 - b1) * g
        v = b2 * np.asarray(given["state"].v[name], float) + (1 - b2) * g * g
        decay = 1 - lr * float(o["weight_decay"])
        new[name] = decay * np.asarray(p, float) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + float(o["eps"]))
    return new


def _sgd_by_hand(given: Arguments) -> Any:
    o = {"learning_rate": 0.1, "momentum": 0.5, **given["options"]}
    lr = float(o["learning_rate"](0) if callable(o["learning_rate"]) else o["learning_rate"])
    new = {}
    for name, p in given["params"].items():
        if p is None or isinstance(p, (list, dict)):
            continue
        old = given["state"].velocity
        velocity = 0 if old is None or old[name] is None else np.asarray(old[name], float)
        g = np.asarray(given["grads"][name], float) * float(given["grad_scale"])
        new[name] = np.asarray(p, float) - lr * (float(o["momentum"]) * velocity + g)
    return new


BY_HAND = {"adamw": _adamw_by_hand, "sgd": _sgd_by_hand}


def _update(name: str, options: Arguments, more: Arguments, **given: Any) -> Any:
    usual: Arguments = {"learning_rate": 0.1, **({"momentum": 0.5} if name == "sgd" else {})}
    return getattr(optim, name)(**{**usual, **options}).update(**given, **more)[0]


def _agrees(given: Arguments) -> Callable[[Any], bool]:
    def right(new: Any) -> bool:
        if given["params"] is None or not len(given["params"]):
            return not new
        wanted = BY_HAND[given["name"]](given)
        return all(np.allclose(np.asarray(new[k], float), x, rtol=1e-2, equal_nan=True) for k, x in wanted.items())

    return right


def _update_call(name: str, argument: str, kind: str, **changes: Any) -> OtherCall:
    params = {"w": np.full((2, 3), 0.5), "b": np.array([1.0, -1.0, 2.0])}
    grads = {"w": np.full((2, 3), 0.25), "b": np.array([0.5, 1.0, -1.0])}
    zeros = {key: np.zeros(p.shape) for key, p in params.items()}
    state = optim.AdamWState(0, zeros, zeros) if name == "adamw" else optim.SGDState(0, zeros)
    trees: Arguments = {"params": params, "grads": grads, "state": state}
    for what, value in changes.pop("leaf", {}).items():
        trees[what] = {**trees[what], "w": value(trees[what]["w"])}
    for what, make in changes.pop("mean", {}).items():
        trees["state"] = state._replace(**{what: {**zeros, "w": make(zeros["w"])}})
    if "field" in changes:
        trees["state"] = state._replace(**changes.pop("field"))
    given = {"name": name, "options": {}, "more": {}, "grad_scale": 1.0, **trees, **changes}
    return OtherCall(name, argument, kind, _update, given, _agrees(given))


def _optimizer_calls() -> Iterator[OtherCall]:
    options = {"adamw": ("learning_rate", "betas", "eps", "weight_decay", "mask"), "sgd": ("learning_rate", "momentum")}
    kinds: dict[str, Callable[[Any], Any]] = {k: f for k, f in OTHERS.items() if k != "None"}
    kinds |= {f"of {k}": (lambda x, dtype=dtype: _converted(x, dtype)) for k, dtype in DTYPES.items()}
    for name, names in options.items():
        fields = ("m", "v") if name == "adamw" else ("velocity",)
        for value in ODD:
            kind = _shown(value)
            for option in names:
                if option == "mask" and (value is None or callable(value)):
                    continue
                yield _update_call(name, option, kind, options={option: value})
            for argument in ("state", "grad_scale"):
                yield _update_call(name, argument, kind, **{argument: value})
            for argument in ("grads", "params"):
                if value is not None and not (isinstance(value, (list, dict)) and not value):  # an empty tree is right
                    yield _update_call(name, f"{argument} grads", kind, **{argument: value})
            if name == "adamw" and value is not True and value is not np.True_:  # these lose the old arrays, rightly
                yield _update_call(name, "donate", kind, more={"donate": value})
            for what in fields:
                if value is not None:
                    yield _update_call(name, what, kind, field={what: value})
            yield _update_call(name, "step", kind, field={"step": value})
        for kind, make in kinds.items():
            yield _update_call(name, "grads gradient", kind, leaf={"grads": make})
            yield _update_call(name, "params gradient", kind, leaf={"params": make})
            for what in fields:
                yield _update_call(name, what, kind, mean={what: make})


def _tree_calls() -> Iterator[OtherCall]:
    tree = {"w": np.array([[3.0, 0.0], [0.0, 4.0]])}
    calls: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
        "clip_factor": (optim.clip_factor, lambda out: out[1]),
        "clip_by_global_norm": (optim.clip_by_global_norm, lambda out: out[1]),
        "global_norm": (optim.global_norm, lambda out: out),
    }
    for name, (function, norm) in calls.items():
        first = "tree" if name == "global_norm" else "grads"
        rest = {} if name == "global_norm" else {"max_norm": 1.0}
        for value in ODD if rest else ():
            given = {first: tree, "max_norm": value}
            yield OtherCall(name, "max_norm", _shown(value), function, given, lambda out, n=norm: _same(n(out), 5.0))
        kinds = {k: f(tree["w"]) for k, f in OTHERS.items() if k not in ("list", "tuple", "dictionary", "None")}
        kinds |= {f"of {k}": _converted(tree["w"], dtype) for k, dtype in DTYPES.items()}
        for kind, value in kinds.items():

            def right(out: Any, norm: Any = norm, value: Any = value) -> bool:
                return bool(np.isclose(norm(out), np.linalg.norm(np.asarray(value, float).ravel()), rtol=1e-2))

            yield OtherCall(name, "w", kind, function, {first: {"w": value}, **rest}, right)
    good = {"peak": 1.0, "warmup_steps": 2, "total_steps": 5, "final": 0.1}
    for argument in good:
        for value in ODD:
            given = {**good, argument: value}
            yield OtherCall(
                "warmup_cosine", argument, _shown(value), optim.warmup_cosine, given, lambda rate: rate(3) >= 0
            )


def _primitive_calls() -> Iterator[OtherCall]:
    x = np.arange(6.0).reshape(2, 3)
    y = np.full((4, 3), 0.5)
    calls: dict[str, tuple[Callable[..., Any], Arguments, Callable[..., Any]]] = {
        "linear": (algebra.linear, {"x": x, "weight": y, "bias": np.ones(4)}, _linear_by_hand),
        "dropout": (algebra.dropout, {"x": x, "rate": 0.5, "key": (1, 2)}, _dropout_by_hand),
        "split": (algebra.split, {"x": x, "sizes": (1, 2), "axis": -1}, _split_by_hand),
    }
    for name, (function, good, by_hand) in calls.items():
        for argument, usual in good.items():
            kinds = {_shown(value): value for value in ODD if not (name == "split" and argument == "x")}
            if isinstance(usual, np.ndarray) and name != "split":
                left_out = ("traced", "flat", "subclass", "ndarray of records")
                kinds |= {k: f(usual) for k, f in OTHERS.items() if k not in left_out}
                kinds |= {f"of {k}": _converted(usual, t) for k, t in DTYPES.items() if name == "dropout"}
            for kind, value in kinds.items():
                given = {**good, argument: value}

                def right(out: Any, given: Arguments = given, by_hand: Any = by_hand) -> bool:
                    wanted = by_hand(**given)
                    pairs = zip(out, wanted, strict=True) if isinstance(out, tuple) else [(out, wanted)]
                    return all(_same(a, b) for a, b in pairs)

                yield OtherCall(name, argument, kind, function, given, right)


def _linear_by_hand(x: Any, weight: Any, bias: Any) -> Any:
    out = np.einsum("...i,oi->...o", np.asarray(x, float), np.asarray(weight, float))
    return out if bias is None else out + np.asarray(bias, float)


def _split_by_hand(x: Any, sizes: Any, axis: Any) -> Any:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _dropout_by_hand(x: Any, rate: Any, key: Any) -> Any:
    kept = algebra.dropout(np.ones(np.shape(x)), rate=float(rate), key=tuple(map(int, key)))
    return np.asarray(x, float) * np.asarray(kept, float)


OTHER_CALLS = [
    call
    for calls in (_sampling_calls, _config_calls, _optimizer_calls, _tree_calls, _primitive_calls)
    for call in calls()
]
