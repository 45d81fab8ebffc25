"""What a function returns for a case, and how far that is from what is expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from npmamba.testing.cases import given
from npmamba.testing.layouts import copied
from npmamba.testing.tolerance import Tolerance
from npmamba.testing.values import finfo

Array = Any


class Difference(NamedTuple):
    """The worst place of one result.

    Attributes
    ----------
    name : str
        Of the result.
    units : float
        Its error divided by its tolerance: right up to 1. Infinite where only one of the two numbers is finite, and
        for a wrong shape.
    place : tuple of int or None
        Where it is; None for a wrong shape or an empty result.
    found, expected, allowed : float
        The numbers there, and the tolerance.
    """

    name: str
    units: float
    place: tuple[int, ...] | None
    found: Any
    expected: Any
    allowed: float

    def __str__(self) -> str:
        place = "" if self.place is None else f"[{', '.join(map(str, self.place))}]"
        what = "ok" if self.units <= 1 else "WRONG"
        return (
            f"{self.name}: {what}, {self.units:.3g} tolerances off; "
            f"{self.name}{place} is {self.found}, expected {self.expected} within {self.allowed:.3g}"
        )


def difference(name: str, found: Array, expected: Array, tolerance: Tolerance) -> Difference:
    """Find the place of a result that is farthest off, in units of its tolerance.

    NaN must be where NaN is expected. Where an infinity is, NaN will do too, for the difference of two infinities
    depends on the order of operations; and what lies at the end of its format's range may become infinite.

    Examples
    --------
    >>> allowed = Tolerance(np.array([1e-15, 1e-15]), np.dtype(np.float64))
    >>> print(difference("y", np.array([1.0, 2.5]), np.array([1.0, 2.0]), allowed))
    y: WRONG, 3.46e+14 tolerances off; y[1] is 2.5, expected 2.0 within 1.44e-15
    """
    found, expected = np.asarray(found), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return Difference(name, np.inf, None, f"of shape {found.shape}", f"shape {expected.shape}", 0.0)
    if found.size == 0:
        return Difference(name, 0.0, None, "empty", "nothing else", 0.0)
    found, allowed = found.astype(np.float64), np.broadcast_to(tolerance.of(expected), expected.shape)
    units = _units(found, expected, allowed, float(finfo(tolerance.dtype).max))
    place = tuple(int(i) for i in np.unravel_index(np.argmax(units), units.shape))
    worst, *numbers = (float(x[place]) for x in (units, found, expected, allowed))
    return Difference(name, worst, place, *numbers)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def _units(found: Array, expected: Array, allowed: Array, largest: float) -> Array:
    off, close = np.abs(found - expected), np.where(np.isfinite(allowed), allowed, np.inf)
    units = np.where(off == 0, 0.0, off / close)  # where there is no bound, any finite number will do
    units = np.where(np.isfinite(expected) & np.isfinite(found), units, np.inf)
    overflow = np.isinf(found) & (np.sign(found) == np.sign(expected)) & (np.abs(expected) + allowed >= largest)
    same = (np.isnan(found) & ~np.isfinite(expected)) | (found == expected)
    return np.where(overflow | same, 0.0, units)


def takes(fn: Callable[..., Any], name: str) -> bool:
    """Tell whether a function has a parameter of this name, or takes any keyword.

    >>> takes(lambda u, z=None: u, "z"), takes(lambda u: u, "z"), takes(lambda u, **rest: u, "z")
    (True, False, True)
    """
    parameters = inspect.signature(fn).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def outputs(fn: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Array, ...]:
    """Call a function with the arguments that are not at their defaults, and return its results.

    Parameters
    ----------
    fn : callable
        A scan, convolution or step. If it has a parameter `return_last_state`, the last state is asked for.
    arguments : dict
        A `state`, which a step writes to, is copied; memory layouts stay what they are.

    Returns
    -------
    tuple of arrays
        y, and the last state if there is one; for a step the state that it has left in `state`.

    Examples
    --------
    >>> outputs(lambda u, delta: u + delta, dict(u=np.ones(2), delta=np.ones(2), D=None))
    (array([2., 2.]),)
    """
    asked = {name: copied(x) if name == "state" else x for name, x in given(arguments).items()}
    if "return_last_state" in inspect.signature(fn).parameters:
        asked["return_last_state"] = True
    result = fn(**asked)
    if isinstance(result, (tuple, list)):
        return tuple(result)
    return (result, asked["state"]) if "state" in asked else (result,)


def compare(found: Iterable[Array], expected: Iterable[Array], tolerances: Iterable[Tolerance]) -> list[Difference]:
    """Compare y, and the last state if it was found.

    >>> allowed = Tolerance(np.zeros(1), np.dtype(np.float64))
    >>> [d.units for d in compare((np.ones(1),), (np.ones(1), np.ones(1)), (allowed, allowed))]
    [0.0]
    """
    rows = zip(("y", "last_state"), found, expected, tolerances, strict=False)
    return [difference(*row) for row in rows]
