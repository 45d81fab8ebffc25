"""What laws of convolutions are made of: the convolution under test, comparing, cutting time, drawing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from npmamba.testing.capabilities import Capabilities
from npmamba.testing.law import Candidate, Results
from npmamba.testing.law_tools import normal
from npmamba.testing.tolerance import conv_gradient_tolerance, conv_tolerance

Arrays = dict[str, Any]
OPTIONS: Arrays = {"bias": None, "activation": None, "initial_state": None, "seq_idx": None, "reverse": False}
ARRAYS = ("x", "weight", "bias", "initial_state")


class Conv(Candidate):
    """The convolution under test: calls it with what it takes, and compares what it returns."""

    what = "convolution"

    @staticmethod
    def read_off(fn: Callable[..., Any], **changes: Any) -> Capabilities:
        """Return what a convolution can be asked, as its signature tells; say the rest by `changes`.

        >>> def fn(x, weight, bias=None, *, return_last_state=False): ...
        >>> capabilities = Conv.read_off(fn)
        >>> sorted(capabilities.keywords), capabilities.last_state
        (['bias', 'return_last_state'], True)
        """
        names = inspect.signature(fn).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in names.values())
        known = {*OPTIONS, "return_last_state"}
        keywords = frozenset(known if open_ended else known & set(names))
        return Capabilities(**{"keywords": keywords, "last_state": "return_last_state" in keywords, **changes})

    @staticmethod
    def refused(arguments: Arrays, capabilities: Capabilities) -> str:
        """Return why the convolution cannot be asked a case, or ""."""
        for name, off in OPTIONS.items():
            if arguments.get(name, off) is not off and not capabilities.can(name):
                return f"the case has {name}, which the convolution does not take"
        for name in ARRAYS:
            if arguments.get(name) is not None and not np.isfinite(arguments[name]).all():
                return f"the case has a {name} that is not finite"
        return ""

    def __call__(self, arguments: Arrays) -> Results:
        """Return y and the last state; None for the latter if the convolution has none."""
        shape = arguments["x"].shape
        return self._results(self._given(arguments), arguments, shape, state_shape(arguments))

    def gradients(self, arguments: Arrays, dout: Any, dlast_state: Any = None) -> Arrays:
        """Return the gradients of the arguments that are given, by their names."""
        given = {**self._given(arguments), "dout": dout}
        if dlast_state is not None:
            given["dlast_state"] = dlast_state
        return self._gradients(given, arguments, ARRAYS)

    def _given(self, arguments: Arrays) -> Arrays:
        asked = ("x", "weight", *(n for n, off in OPTIONS.items() if self.can(n) and arguments.get(n, off) is not off))
        return {name: arguments[name] for name in asked}


# --- comparing ---


def compare(conv: Conv, got: Results, expected: Results, arguments: Arrays, **how: Any) -> None:
    """Compare y and the last state; `how` has `bits`, `places` of y, `times` what rounding allows, for `sized`."""
    test, times = conv.same if how.get("bits") else conv.close, how.get("times", 2.0)
    allowed, _ = conv_tolerance(how.get("sized") or arguments)
    room = np.broadcast_to(allowed.absolute, arguments["x"].shape)[how.get("places", ...)]
    room = times * allowed._replace(absolute=room).of(_larger(got.y, expected.y))
    test("y", got.y, expected.y, room, arguments)
    if got.last_state is not None and expected.last_state is not None:
        eps = 0 if times <= 2 else times * float(np.finfo(arguments["weight"].dtype).eps)  # else it is a copy
        room = eps * _larger(got.last_state, expected.last_state)
        test("last_state", got.last_state, expected.last_state, room, arguments)


def compare_gradients(
    conv: Conv, got: Arrays, expected: Arrays, arguments: Arrays, dout: Any, dlast: Any, bits: Any = (),
    times: float = 4,
) -> None:  # fmt: skip
    """Compare gradients by name, all of `expected`; `bits` are names of which the bits are promised."""
    allowed = conv_gradient_tolerance(dout, arguments, dlast)._asdict()
    for name in expected:
        test = conv.same if name in bits else conv.close
        room = times * allowed[name].of(_larger(got[name], expected[name]))
        test(f"the gradient of {name}", got[name], expected[name], room, arguments)


def _larger(x: Any, y: Any) -> Any:
    with np.errstate(invalid="ignore"):
        size = np.maximum(np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(y, np.float64)))
    return np.where(np.isfinite(size), size, 0.0)


# --- what laws say something about ---


def any_step(arguments: Arrays) -> str:
    return "" if arguments["x"].size else "the case is empty"


def two_steps(arguments: Arrays) -> str:
    return any_step(arguments) or ("" if arguments["x"].shape[2] > 1 else "the case has fewer than two steps")


def two_rows(arguments: Arrays) -> str:
    return any_step(arguments) or ("" if arguments["x"].shape[0] > 1 else "the case has fewer than two batch rows")


def two_channels(arguments: Arrays) -> str:
    return any_step(arguments) or ("" if arguments["x"].shape[1] > 1 else "the case has fewer than two channels")


def long_numbers(arguments: Arrays) -> str:
    return any_step(arguments) or ("the case is of a short type" if arguments["x"].dtype.itemsize < 4 else "")


def not_float64(arguments: Arrays) -> str:
    return any_step(arguments) or ("the case has the widest type" if arguments["x"].dtype == np.float64 else "")


# --- parts and drawings ---


def state_shape(arguments: Arrays) -> tuple[int, int, int]:
    return (*arguments["x"].shape[:2], arguments["weight"].shape[1] - 1)


def linear(arguments: Arrays) -> Arrays:
    """Return the case without its activation."""
    return {**arguments, "activation": None}


def with_state(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> Arrays:
    """Return the case with an initial state if the convolution takes one, of numbers that x could have."""
    if not conv.can("initial_state"):
        return arguments
    state = normal(rng, arguments["x"], state_shape(arguments)).astype(arguments["weight"].dtype)
    return {**arguments, "initial_state": state}


def with_bias(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> Arrays:
    """Return the case with a bias if the convolution takes one."""
    if arguments.get("bias") is not None or not conv.can("bias"):
        return arguments
    return {**arguments, "bias": normal(rng, arguments["weight"], arguments["weight"].shape[:1])}


def piece(arguments: Arrays, first: int, last: int) -> Any:
    """Return the slice of time from step `first` to `last` in the order of the convolution."""
    seqlen = arguments["x"].shape[2]
    return np.s_[seqlen - last : seqlen - first] if arguments.get("reverse") else np.s_[first:last]


def steps(arguments: Arrays, index: Any, **changes: Any) -> Arrays:
    """Return the arguments of the steps that `index` picks, with `changes`."""
    seq_idx = arguments.get("seq_idx")
    cut = {"x": arguments["x"][..., index], "seq_idx": None if seq_idx is None else seq_idx[:, index]}
    return {**arguments, **cut, **changes}


def rows(arguments: Arrays, index: Any) -> Arrays:
    """Return the arguments of some batch rows."""
    names = [name for name in ("x", "initial_state", "seq_idx") if arguments.get(name) is not None]
    return {**arguments, **{name: arguments[name][index] for name in names}}


def channels(arguments: Arrays, index: Any) -> Arrays:
    """Return the arguments of some channels."""
    where = {"x": np.s_[:, index], "initial_state": np.s_[:, index], "weight": index, "bias": index}
    given = {name: place for name, place in where.items() if arguments.get(name) is not None}
    return {**arguments, **{name: arguments[name][place] for name, place in given.items()}}


def backwards(arguments: Arrays) -> Arrays:
    """Return the arguments with time flipped and `reverse` the other way round."""
    flipped = steps(arguments, np.s_[::-1])
    return {**flipped, "reverse": not arguments.get("reverse", False)}


def join(parts: list[Any], arguments: Arrays) -> Any:
    """Join pieces of time that are in the order of the convolution."""
    return np.concatenate(parts[:: -1 if arguments.get("reverse") else 1], axis=-1)
