"""Argument checks: every operation's shapes and dtypes are checked here, before any kernel runs.

A check speaks the notation of the documentation: axes have names (``batch dim seqlen``), the first argument that shows
an axis binds its length, and an argument that disagrees is named together with the one that bound it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

HALF = ("float16", "bfloat16")
FLOATS = ("float16", "bfloat16", "float32", "float64")


def compute_dtype(dtype: Any) -> np.dtype:
    """Return the dtype an operation computes in: float64 for float64, float32 for the shorter types.

    >>> compute_dtype(np.float16)
    dtype('float32')
    """
    return np.dtype(np.float64 if np.dtype(dtype).newbyteorder("=") == np.float64 else np.float32)


@functools.cache
def native_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` in this machine's byte order."""
    return dtype.newbyteorder("=")


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return the name of `dtype`, which NumPy takes microseconds to build."""
    return dtype.name


def shown(value: Any) -> str:
    """Return what an error says of a value that came: its representation, cut where it is long.

    >>> shown("relu"), shown(10**5000)
    ("'relu'", 'a value of int that cannot be shown')
    """
    try:
        text = repr(value)
    except Exception:  # a number of thousands of digits has none, and other people's objects may do anything
        return f"a value of {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def _expectation(name: str, x: Any, layouts: tuple[str, ...]) -> str:
    expected = " or ".join(f"({', '.join(layout.split())}{',' * (' ' not in layout)})" for layout in layouts)
    return f"{name} must be {expected}, got shape {tuple(x.shape)}"


class Known:
    """The calls whose arguments were found right: shapes, dtypes and options that came before need no second look.

    A check of a dozen arguments takes longer than a GPU needs for a small scan. A call is known by the operation, the
    type, shape and dtype of each array, and the options with their types.

    Examples
    --------
    >>> known = Known()
    >>> call = known.call("scan", (np.zeros(3), None), (True,))
    >>> call in known, known.add(call), known.call("scan", (np.ones(3), None), (True,)) in known
    (False, None, True)
    >>> known.call("scan", (np.ones(3), None), (1,)) in known, known.call("scan", (np.ones(3),), ([],)) in known
    (False, False)
    """

    LIMIT = 4096

    def __init__(self) -> None:
        self._calls: set[Any] = set()

    @staticmethod
    def call(op: str, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a call is known by."""
        try:
            kinds = [None if x is None else (x.shape, x.dtype) for x in arrays]
        except AttributeError:  # no arrays: never known
            return (object(),)
        return (op, *kinds, *map(type, arrays), *options, *map(type, options))

    def __contains__(self, call: tuple[Any, ...]) -> bool:
        try:
            return call in self._calls
        except TypeError:  # an option that cannot be hashed is none that any operation takes
            return False

    def add(self, call: tuple[Any, ...]) -> None:
        """Remember a call that was found right."""
        if len(self._calls) >= self.LIMIT:  # lengths that vary for ever must not fill the memory
            self._calls.clear()
        self._calls.add(call)


class Arguments:
    """The checked arguments of one call: axis lengths and dtypes, bound as arguments are seen.

    Parameters
    ----------
    op : str
        Name of the operation, with which every message begins.

    Examples
    --------
    >>> arguments = Arguments("scan")
    >>> arguments.shape("u", np.zeros((2, 3)), "batch dim")
    'batch dim'
    >>> arguments["dim"]
    3
    >>> arguments.shape("z", np.zeros((2, 4)), "batch dim")
    Traceback (most recent call last):
        ...
    ValueError: scan: z has dim=4, but u has dim=3; z must be (batch, dim), got shape (2, 4)
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self._axes: dict[str, tuple[int, str]] = {}

    def __getitem__(self, axis: str) -> int:
        return self._axes[axis][0]

    def shape(self, name: str, x: Any, *layouts: str) -> str:
        """Bind the axes of `x` by the layout with its number of axes, and return that layout.

        Raises
        ------
        ValueError
            If no layout has as many axes as `x`, or a bound axis has another length.
        """
        for layout in layouts:
            axes = layout.split()
            if len(axes) == x.ndim:
                for axis, length in zip(axes, x.shape, strict=True):
                    bound, owner = self._axes.setdefault(axis, (length, name))
                    if bound != length:
                        clash = f"{name} has {axis}={length}, but {owner} has {axis}={bound}"
                        raise ValueError(f"{self.op}: {clash}; {_expectation(name, x, layouts)}")
                return layout
        raise ValueError(f"{self.op}: {name} has {x.ndim} axes; {_expectation(name, x, layouts)}")

    def bind(self, axis: str, length: int, owner: str) -> None:
        """Bind an axis whose length follows from `owner`, like ``width-1`` from the weights."""
        self._axes.setdefault(axis, (length, owner))

    def at_least(self, axis: str, minimum: int) -> None:
        """Raise ValueError if the bound `axis` is shorter than `minimum`."""
        length, owner = self._axes[axis]
        if length < minimum:
            raise ValueError(f"{self.op}: {owner} has {axis}={length}; {axis} must be at least {minimum}")

    def at_most(self, axis: str, maximum: int) -> None:
        """Raise ValueError if the bound `axis` is longer than `maximum`."""
        length, owner = self._axes[axis]
        if length > maximum:
            raise ValueError(f"{self.op}: {owner} has {axis}={length}; {axis} must be at most {maximum}")

    def dtype(self, name: str, x: Any, expected: Any = None, like: str | None = None) -> np.dtype:
        """Check that `x` has the dtype `expected`, or any floating dtype if that is None.

        Raises
        ------
        TypeError
            If `x` has another dtype; `like` names the argument that asks for `expected`.
        """
        native = native_dtype(x.dtype)
        if dtype_name(native) not in FLOATS:
            raise TypeError(f"{self.op}: {name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {x.dtype}")
        if expected is not None and native != np.dtype(expected):
            why = f" because {like}" if like else ""
            raise TypeError(f"{self.op}: {name} must be {np.dtype(expected).name}{why}, got {native.name}")
        return native

    def writable(self, name: str, x: Any) -> None:
        """Raise ValueError if `x`, which the operation changes in place, cannot be written."""
        if not getattr(x.flags, "writeable", True):  # CuPy's arrays have no such flag: all can be written
            raise ValueError(f"{self.op}: {name} is changed in place, but it is read-only")

    def integers(self, name: str, x: Any) -> None:
        """Raise TypeError unless `x` holds integers (booleans are none)."""
        if x.dtype.kind not in "iu":
            raise TypeError(f"{self.op}: {name} must be an array of integers, got {x.dtype}")

    def choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> None:
        """Raise ValueError unless `value` is one of `choices`."""
        if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
            raise ValueError(f"{self.op}: {name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")

    def flag(self, name: str, value: Any) -> None:
        """Raise TypeError unless `value` is True or False."""
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{self.op}: {name} must be True or False, got {shown(value)}")

    def integer(self, name: str, value: Any, low: float = -(2**63), high: float = 2**63 - 1) -> int:
        """Return `value` as an int; TypeError unless it is an integer, ValueError unless it is from `low` to `high`."""
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{self.op}: {name} must be an integer, got {type(value).__name__}")
        if not low <= value <= high:
            expected = f"at least {low}" if value < low else f"at most {high}"
            raise ValueError(f"{self.op}: {name} must be {expected}, got {shown(value)}")
        return int(value)

    def number(self, name: str, value: Any, allowed: Callable[[float], bool], expected: str) -> float:
        """Return `value` as a float; TypeError unless it is a number, ValueError unless it is `allowed`."""
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"{self.op}: {name} must be a number, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf if value > 0 else -math.inf
        if not allowed(number):
            raise ValueError(f"{self.op}: {name} must be {expected}, got {shown(value)}")
        return number
