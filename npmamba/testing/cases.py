"""Test cases: sizes, options and a seed, of which the arguments of an operation are made.

A case is one line. Its repr evaluates back to it, so a failing example can be pasted into a test, and
`ScanCase.script` is a program that shows what is wrong::

    case = ScanCase(batch=2, dim=4, seqlen=65, dstate=3, options=ScanOptions(z=True), seed=7)
    y, last_state = selective_scan(**case.arguments(np.float32), return_last_state=True)

`npmamba.testing.strategies` draws cases for Hypothesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from npmamba.testing.layouts import LAYOUTS, laid_out
from npmamba.testing.options import Compact, ConvOptions, ScanOptions, UpdateOptions, refuse_unless
from npmamba.testing.script import script
from npmamba.testing.values import (
    CONV_MAGNITUDES,
    MAGNITUDES,
    Numbers,
    draw_conv,
    draw_scan,
    draw_update,
    parameter_dtype,
)

SPECIAL_VALUES = ("nan", "inf", "-inf")
CASE_LAYOUTS = (*LAYOUTS, "mixed")
_PARAMETERS = ("A", "D", "delta_bias", "dt_bias", "initial_state", "state", "weight", "bias")  # of the state's dtype


@dataclass(frozen=True, kw_only=True, repr=False)
class _Case(Compact):
    """What cases of all operations do alike: round, place special values, lay out."""

    size_names: ClassVar[tuple[str, ...]]
    magnitudes: ClassVar[tuple[str, ...]] = tuple(MAGNITUDES)
    magnitude: str = "tame"
    layout: str = "C"
    special: tuple[str, str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_unless(self, "magnitude", self.magnitudes)
        refuse_unless(self, "layout", CASE_LAYOUTS)
        if self.special is not None and self.special[1] not in SPECIAL_VALUES:
            raise ValueError(f"{type(self).__name__}: special must be (argument, 'nan', 'inf' or '-inf')")
        for name, size in zip(self.size_names, self._sizes, strict=True):
            if size < (name in ("dstate", "width")):
                raise ValueError(f"{type(self).__name__}: {name}={size} is too small")
        for name in ("B", "C"):
            groups, dim = getattr(self.options, name, None), self._sizes[1]  # type: ignore[attr-defined]
            if isinstance(groups, int) and dim % groups:
                raise ValueError(f"{type(self).__name__}: {name}={groups} groups do not divide dim={dim}")

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.size_names)

    def _numbers(self, dtype: Any) -> Numbers:
        return Numbers(np.random.default_rng((self.seed, 0)), self.magnitude, dtype)

    def _finished(self, drawn: dict[str, Any], dtype: Any) -> dict[str, Any]:
        """Round what was drawn in float64 to its dtype, and give it special values and its place in memory."""
        wide, short = parameter_dtype(dtype), np.dtype(dtype)
        for name, x in drawn.items():
            if isinstance(x, np.ndarray) and x.dtype == np.float64:
                drawn[name] = x.astype(wide if name in _PARAMETERS else short)
        place = self.special_index(drawn)
        if self.special and place is not None:
            drawn[self.special[0]][place] = float(self.special[1])
        return self._laid_out(drawn)

    def _laid_out(self, arrays: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 4))
        out = {}
        for name, x in arrays.items():
            layout = str(rng.choice(list(LAYOUTS))) if self.layout == "mixed" else self.layout
            out[name] = laid_out(x, "C" if layout == "readonly" and name == "state" else layout)
        return out

    def special_index(self, arguments: dict[str, Any]) -> tuple[int, ...] | None:
        """Return the index of the special value in its argument; None where the case has none.

        >>> case = ScanCase(1, 1, 4, 1, special=("u", "nan"), seed=1)
        >>> arguments = case.arguments()
        >>> case.special_index(arguments), arguments["u"].round(1)
        ((0, 0, 1), array([[[0.4, nan, 0.6, 0.4]]]))
        """
        x = None if self.special is None else arguments[self.special[0]]
        if x is None or x.size == 0:
            return None
        rng = np.random.default_rng((self.seed, 3))
        return tuple(int(rng.integers(n)) for n in x.shape)

    def _cotangents(self, shapes: tuple[Any, Any], dtype: Any) -> tuple[Any, Any]:
        rng = np.random.default_rng((self.seed, 1))
        dout = rng.standard_normal(shapes[0]).astype(dtype)
        dstate = rng.standard_normal(shapes[1]).astype(parameter_dtype(dtype))
        return tuple(self._laid_out({"dout": dout, "dstate": dstate}).values())

    def script(self, target: str, dtype: Any = np.float64) -> str:
        """Return a program that makes the case and shows where a function is wrong.

        Parameters
        ----------
        target : str
            The function, as ``module:function``.
        dtype : dtype of the arguments

        Returns
        -------
        str
            Python source. Run, it prints each result's error in units of its tolerance, with the worst place, and
            ends with status 1 if one is too large.

        Examples
        --------
        >>> print(ScanCase(1, 1, 2, 1).script("npmamba:selective_scan"))
        \"""Compares npmamba:selective_scan with the exact result.\"""
        ...
        case = ScanCase(batch=1, dim=1, seqlen=2, dstate=1)
        ...
        """
        return script(self, target, dtype)


@dataclass(frozen=True, repr=False)
class ScanCase(_Case):
    """The arguments of a selective scan, described.

    Parameters
    ----------
    batch, dim, seqlen, dstate : int
        Sizes; all but dstate may be 0.
    options : ScanOptions
    magnitude : str
        What size the numbers have: a name in ``values.MAGNITUDES``.
    layout : str
        What memory they lie in: a name in ``layouts.LAYOUTS``, or "mixed" for one of its own for every argument.
    special : (str, str), optional
        An argument and "nan", "inf" or "-inf", which stands at one place of it.
    seed : int

    Examples
    --------
    >>> case = ScanCase(1, 2, 3, 4, ScanOptions(D=True), magnitude="slow")
    >>> case
    ScanCase(batch=1, dim=2, seqlen=3, dstate=4, options=ScanOptions(D=True), magnitude='slow')
    >>> eval(repr(case)) == case
    True
    >>> {name: x.shape for name, x in case.arguments().items() if isinstance(x, np.ndarray)}
    {'u': (1, 2, 3), 'delta': (1, 2, 3), 'A': (2, 4), 'B': (1, 4, 3), 'C': (1, 4, 3), 'D': (2,)}
    """

    size_names: ClassVar[tuple[str, ...]] = ("batch", "dim", "seqlen", "dstate")
    batch: int
    dim: int
    seqlen: int
    dstate: int
    options: ScanOptions = ScanOptions()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of initial and last state."""
        return self.batch, self.dim, self.dstate

    def arguments(self, dtype: Any = np.float64) -> dict[str, Any]:
        """Return the keyword arguments of ``selective_scan``, without `return_last_state`.

        Parameters
        ----------
        dtype : dtype of u, delta, z, B and C
            The other arrays have `parameter_dtype` of it.
        """
        return self._finished(draw_scan(self._numbers(dtype), self._sizes, self.options), dtype)

    def cotangents(self, dtype: Any = np.float64) -> tuple[Any, Any]:
        """Return dout, like u, and dlast_state, both standard normal."""
        return self._cotangents(((self.batch, self.dim, self.seqlen), self.state_shape), dtype)


@dataclass(frozen=True, repr=False)
class ConvCase(_Case):
    """The arguments of a causal convolution, described; fields as those of `ScanCase`.

    >>> ConvCase(1, 2, 3, 4).arguments()["weight"].shape
    (2, 4)
    """

    size_names: ClassVar[tuple[str, ...]] = ("batch", "dim", "seqlen", "width")
    magnitudes: ClassVar[tuple[str, ...]] = CONV_MAGNITUDES
    batch: int
    dim: int
    seqlen: int
    width: int
    options: ConvOptions = ConvOptions()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of initial and last state."""
        return self.batch, self.dim, self.width - 1

    def arguments(self, dtype: Any = np.float64) -> dict[str, Any]:
        """Return the keyword arguments of ``causal_conv1d``, without `return_last_state`; x has `dtype`."""
        return self._finished(draw_conv(self._numbers(dtype), self._sizes, self.options), dtype)

    def cotangents(self, dtype: Any = np.float64) -> tuple[Any, Any]:
        """Return dout, like x, and dlast_state, both standard normal."""
        return self._cotangents(((self.batch, self.dim, self.seqlen), self.state_shape), dtype)


@dataclass(frozen=True, repr=False)
class UpdateCase(_Case):
    """The arguments of one step of a selective scan, described; fields as those of `ScanCase`.

    A constant B or C is read as (batch, dstate) where batch equals dim, as `selective_state_update` does.

    >>> UpdateCase(1, 2, 3).arguments()["state"].shape
    (1, 2, 3)
    """

    size_names: ClassVar[tuple[str, ...]] = ("batch", "dim", "dstate")
    batch: int
    dim: int
    dstate: int
    options: UpdateOptions = UpdateOptions()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of the state."""
        return self.batch, self.dim, self.dstate

    def arguments(self, dtype: Any = np.float64) -> dict[str, Any]:
        """Return the keyword arguments of ``selective_state_update``; it writes to the state, which is fresh."""
        return self._finished(draw_update(self._numbers(dtype), self._sizes, self.options), dtype)

    def cotangents(self, dtype: Any = np.float64) -> tuple[Any, Any]:
        """Return the weights of y and of the new state, both standard normal."""
        return self._cotangents(((self.batch, self.dim), self.state_shape), dtype)


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None, False or the default, for functions that do not have every option.

    >>> list(given(ScanCase(1, 1, 1, 1).arguments()))
    ['u', 'delta', 'A', 'B', 'C']
    """
    off = (None, False, "euler")
    return {name: x for name, x in arguments.items() if isinstance(x, np.ndarray) or x not in off}
