"""What a law is: a theorem about every selective scan, and a function that tries to break it on given arguments.

A law asks the scan twice or more, in different words, and compares the answers; it needs no other implementation. What
a scan cannot be asked stands in its `Capabilities`, and laws that need it are skipped, with the reason said.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from npmamba.testing.capabilities import ARRAYS, MAPS, OPTIONS, REQUIRED, Capabilities, is_given
from npmamba.testing.scales import gradient_scale, scan_scale

# Roundings on the longest way through a scan, in units of eps times the scale: arithmetic is float32 at least, so that
# the short types are rounded but when they are read and written.
ROUNDINGS = {"float64": 64, "float32": 64, "float16": 4, "bfloat16": 4}
GRADIENT_ROUNDINGS = 4  # times as many


class Results(NamedTuple):
    """What a scan returns; or the tolerances for it."""

    y: Any
    last_state: Any = None


@dataclass(frozen=True)
class Violation:
    """A law that does not hold.

    Attributes
    ----------
    law : str
    what : str
        Which result, and what is wrong with it.
    expected, got : array or None
    error : float
        Largest difference in units of the tolerance; inf where one is not a number and the other is.
    arguments : dict
        Of the call whose result is `got`.
    where : tuple of int or None
        Index of the largest error.
    """

    law: str
    what: str
    expected: Any
    got: Any
    error: float
    arguments: dict[str, Any] = field(repr=False)
    where: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"{self.law.replace('_', ' ')}: {self.what}, {self.error:.3g} times what rounding allows"
        if self.where is None:
            return text
        got, expected = (float(np.asarray(x)[self.where]) for x in (self.got, self.expected))
        place = f" at {self.where}" if self.where else ""
        return f"{text}; got {got:.9g}{place}, expected {expected:.9g}"


class Broken(Exception):
    """Raised inside a law, with the violation; `Law.check` returns it."""

    def __init__(
        self, what: str, expected: Any, got: Any, error: float, arguments: dict[str, Any], where: Any = None
    ) -> None:
        super().__init__(what)
        self.violation = Violation("", what, expected, got, error, arguments, where)


class Unsuited(Exception):
    """Raised inside a law that finds that it says nothing about a case, with the reason."""


class Outcome(NamedTuple):
    """What came of a law on one case."""

    violation: Violation | None
    skipped: str  # the reason, or "" if the law was checked
    worst: float  # largest difference that was seen, in units of the tolerance


@dataclass(frozen=True)
class Law:
    """A theorem with its check. Its docstring, `statement`, says the theorem."""

    name: str
    statement: str
    body: Callable[[Any, dict[str, Any], np.random.Generator], None] = field(repr=False)
    needs: tuple[str, ...] = ()
    only: Callable[[dict[str, Any]], str] = field(default=lambda arguments: "", repr=False)
    kind: type[Candidate] = field(default_factory=lambda: Scan, repr=False)

    def why_skipped(self, arguments: dict[str, Any], capabilities: Capabilities) -> str:
        """Return why the law cannot be checked on these arguments, or "" if it can."""
        for word in self.needs:
            if not capabilities.can(word):
                return f"the {self.kind.what} has no {word}"
        return self.kind.refused(arguments, capabilities) or self.only(arguments)

    def check(
        self,
        fn: Callable[..., Any],
        arguments: dict[str, Any],
        rng: np.random.Generator,
        capabilities: Capabilities | None = None,
    ) -> Violation | None:
        """Try to break the law.

        Parameters
        ----------
        fn : callable
            Called as ``fn(**arguments)`` only; returns y, or y and the last state.
        arguments : dict
            Keyword arguments of ``npmamba.selective_scan``, NumPy arrays.
        rng : numpy.random.Generator
            Draws where to cut, what to add and so on.
        capabilities : Capabilities, optional
            Read off the signature of `fn` if None.

        Returns
        -------
        Violation or None
            None if the law holds here, and also where it is skipped, which `why_skipped` tells.
        """
        return self.examine(fn, arguments, rng, capabilities).violation

    def examine(
        self,
        fn: Callable[..., Any],
        arguments: dict[str, Any],
        rng: np.random.Generator,
        capabilities: Capabilities | None = None,
    ) -> Outcome:
        """Try to break the law, as `check` does, and tell more: why it was skipped, and how near it came."""
        capabilities = self.kind.read_off(fn) if capabilities is None else capabilities
        reason = self.why_skipped(arguments, capabilities)
        if reason:
            return Outcome(None, reason, 0.0)
        candidate = self.kind(fn, capabilities)
        try:
            with np.errstate(all="ignore"):
                self.body(candidate, dict(arguments), rng)
        except Unsuited as unsuited:
            return Outcome(None, str(unsuited), 0.0)
        except Broken as broken:
            violation = replace(broken.violation, law=self.name)
            return Outcome(violation, "", max(candidate.worst, violation.error))
        return Outcome(None, "", candidate.worst)


def law(
    *needs: str, only: Callable[[dict[str, Any]], str] | None = None, kind: type[Candidate] | None = None
) -> Callable[[Any], Law]:
    """Make a `Law` of a function ``(scan, arguments, rng)`` that raises `Broken`, through the scan's `close` and
    `same`.

    Parameters
    ----------
    *needs : str
        What the scan has to be able to: words that `Capabilities.can` knows.
    only : callable, optional
        From arguments to the reason why the law says nothing about them, or "".
    kind : type, optional
        What the law is about: `Scan`, unless told otherwise.
    """

    def make(body: Any) -> Law:
        return Law(body.__name__, inspect.getdoc(body) or "", body, needs, only or (lambda arguments: ""), kind or Scan)

    return make


def tolerance(arguments: dict[str, Any]) -> Results:
    """Return how far y and the last state may be off: a number of roundings times eps times the scan's scale."""
    allowed = _allowed(arguments, 1, **dict(zip(("y", "last_state"), scan_scale(arguments), strict=True)))
    return Results(**allowed)


def gradient_tolerance(arguments: dict[str, Any], dout: Any, dlast_state: Any = None) -> dict[str, Any]:
    """Return how far each gradient may be off; B and C as every channel sees them."""
    return _allowed(arguments, GRADIENT_ROUNDINGS, **gradient_scale(arguments, dout, dlast_state))


def _allowed(arguments: dict[str, Any], times: int, **scales: Any) -> dict[str, Any]:
    """Return tolerances for results of the given scales.

    What numbers below the smallest normal one may lose is counted in products with the largest of the result.
    """
    dtype = arguments["u"].dtype
    short, wide = ml_dtypes.finfo(dtype), np.finfo(np.float64 if dtype == np.float64 else np.float32)
    k, floor = times * ROUNDINGS[dtype.name] * float(short.eps), 8 * float(short.smallest_subnormal)
    allowed = {}
    for name, E in scales.items():
        largest = float(np.max(E, initial=1.0))
        if not largest < float(short.max) / 16:
            raise Unsuited(f"the case has results that are no numbers in {dtype.name}, or too large")
        allowed[name] = k * E + 16 * float(wide.tiny) * largest + floor
    return allowed


def _native(x: Any) -> Any:
    return np.asarray(x).astype(same_dtype(x), copy=False)


def same_dtype(x: Any) -> np.dtype:
    """Return the dtype of an array, in the byte order of this machine."""
    return x.dtype.newbyteorder("=")


def _distance(got: Any, expected: Any, allowed: Any) -> Any:
    """Return the differences in units of what is allowed; inf where just one is no finite number."""
    with np.errstate(all="ignore"):
        off = np.abs(got - expected) / allowed
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(off), np.inf, off))


class Candidate:
    """What is under test: a function, how to call it, and how far its answers were from each other at worst."""

    what = "function"

    def __init__(self, fn: Callable[..., Any], capabilities: Capabilities) -> None:
        self.fn, self.capabilities, self.worst = fn, capabilities, 0.0
        self.can = capabilities.can

    @staticmethod
    def read_off(fn: Callable[..., Any]) -> Capabilities:
        """Return what a function can be asked, as its signature tells."""
        raise NotImplementedError

    @staticmethod
    def refused(arguments: dict[str, Any], capabilities: Capabilities) -> str:
        """Return why a case cannot be asked, or ""."""
        raise NotImplementedError

    def _call(self, fn: Callable[..., Any], given: dict[str, Any], arguments: dict[str, Any]) -> Any:
        if not self.can("strides"):  # a part of time, or a few of the channels, may lie in any order
            given = {n: np.asarray(x, order="C") if isinstance(x, np.ndarray) else x for n, x in given.items()}
        try:
            return fn(**given)
        except NotImplementedError:
            raise
        except Exception as error:
            what = f"the call raised {type(error).__name__}: {error}"
            raise Broken(what, None, None, np.inf, arguments) from error

    def step(self, given: dict[str, Any], arguments: dict[str, Any]) -> Any:
        """Take one step of `arguments`: call the step, which changes the state it is given, and return y."""
        assert self.capabilities.step is not None
        return self._call(self.capabilities.step, given, arguments)

    def _results(
        self, given: dict[str, Any], arguments: dict[str, Any], shape: tuple[int, ...], of_state: tuple[int, ...]
    ) -> Results:
        """Call the function; return y, of `shape`, and the last state, None if there is none."""
        if self.can("return_last_state") and self.can("last_state"):
            given["return_last_state"] = True
        with np.errstate(all="ignore"):
            out = self._call(self.fn, given, arguments)
        y, last_state = out if isinstance(out, tuple) else (out, None)
        self._expect_shape("y", y, shape, arguments)
        if self.can("last_state"):
            self._expect_shape("last_state", last_state, of_state, arguments)
        return Results(np.asarray(y), None if last_state is None else np.asarray(last_state))

    def _gradients(self, given: dict[str, Any], arguments: dict[str, Any], arrays: Iterable[str]) -> dict[str, Any]:
        """Call the backward; return the gradients of those of `arrays` that are given, by their names."""
        assert self.capabilities.backward is not None
        with np.errstate(all="ignore"):
            out = self._call(self.capabilities.backward, given, arguments)
        out = out if isinstance(out, dict) else out._asdict()
        names = [name for name in arrays if arguments.get(name) is not None]
        for name in names:
            if out.get(name) is None:
                raise Broken(f"the gradient of {name} is missing", None, None, np.inf, arguments)
            self._expect_shape(f"the gradient of {name}", out[name], arguments[name].shape, arguments)
        return {name: np.asarray(out[name]) for name in names}

    def _expect_shape(self, what: str, got: Any, shape: tuple[int, ...], arguments: dict[str, Any]) -> None:
        if np.shape(got) != tuple(shape):
            raise Broken(f"{what} has shape {np.shape(got)}, not {tuple(shape)}", None, got, np.inf, arguments)

    def close(self, what: str, got: Any, expected: Any, allowed: Any, arguments: dict[str, Any]) -> None:
        """Raise `Broken` where `got` is farther from `expected` than `allowed`."""
        expected = np.broadcast_to(expected, np.shape(got))
        distance = _distance(np.asarray(got, np.float64), np.asarray(expected, np.float64), allowed)
        error = float(np.max(distance, initial=0.0))
        self.worst = max(self.worst, error)
        if not error <= 1:
            where = tuple(int(i) for i in np.unravel_index(np.argmax(distance), distance.shape))
            raise Broken(f"{what} is off", expected, got, error, arguments, where)

    def same(self, what: str, got: Any, expected: Any, allowed: Any, arguments: dict[str, Any]) -> None:
        """Raise `Broken` if bits differ, where the candidate promises bits; else like `close`."""
        self.close(what, got, expected, allowed, arguments)
        if self.capabilities.same_bits and _native(got).tobytes() != _native(expected).tobytes():
            raise Broken(f"{what} has other bits", expected, got, self.worst, arguments)


class Scan(Candidate):
    """The scan under test: calls it with what it takes, and compares what it returns."""

    what = "scan"
    read_off = staticmethod(Capabilities.of)

    @staticmethod
    def refused(arguments: dict[str, Any], capabilities: Capabilities) -> str:
        """Return why the scan cannot be asked a case, or ""."""
        for name in OPTIONS:
            if is_given(arguments, name) and name != "discretization" and not capabilities.can(name):
                return f"the case has {name}, which the scan does not take"
        for word in (arguments.get("discretization", "euler"), *(MAPS[np.ndim(arguments[n])] for n in "BC")):
            if not capabilities.can(word):
                return f"the case has {word}, which the scan does not know"
        for name in ARRAYS:
            if arguments.get(name) is not None and not np.isfinite(arguments[name]).all():
                return f"the case has a {name} that is not finite"
        return ""

    def __call__(self, arguments: dict[str, Any]) -> Results:
        """Return y and the last state; None for the latter if the scan has none."""
        of_state = arguments["u"].shape[:2] + arguments["A"].shape[1:]
        return self._results(self._given(arguments), arguments, arguments["u"].shape, of_state)

    def gradients(self, arguments: dict[str, Any], dout: Any, dlast_state: Any = None) -> dict[str, Any]:
        """Return the gradients of the arguments that are given, by their names."""
        given = {**self._given(arguments), "dout": dout}
        if dlast_state is not None and self.can("last_state"):
            given["dlast_state"] = dlast_state
        return self._gradients(given, arguments, ARRAYS)

    def _given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names = [*REQUIRED, *(name for name in OPTIONS if self.can(name) and is_given(arguments, name))]
        return {name: arguments[name] for name in names}
