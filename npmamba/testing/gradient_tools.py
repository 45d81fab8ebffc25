"""What laws of gradients are made of: cotangents, comparing, and maps that channels share."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.testing.law import Scan
from npmamba.testing.law_tools import negative, normal, strided, wide
from npmamba.testing.parts import TIMED, is_timed

Arrays = dict[str, Any]
SUMMED = ("A", "D", "delta_bias")  # over batch and time; B and C too where they are constant


def cotangents(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> tuple[Any, Any]:
    """Draw dout and, if the scan returns a last state, dlast_state."""
    shape = (arguments["u"].shape[0], *arguments["A"].shape)
    dout = normal(rng, arguments["u"])
    return dout, normal(rng, arguments["A"], shape) if scan.can("last_state") else None


def of_maps(allowed: Arrays, arguments: Arrays) -> Arrays:
    """Return tolerances with those of B and C added up to the shapes that these have."""
    return {**allowed, **{name: summed_map(allowed[name], arguments[name]) for name in ("B", "C")}}


def summed_map(dM: Any, M: Any) -> Any:
    """Add the gradient of a map of every channel (batch, dim, dstate, seqlen) up to that of B or C as it was given."""
    if M.ndim == 2:
        return dM.sum((0, 3))
    if M.ndim == 3:
        return dM.sum(1)
    batch, groups, dstate, seqlen = M.shape
    return dM.reshape(batch, groups, -1, dstate, seqlen).sum(2)


def timed(arguments: Arrays) -> list[str]:
    """Return the names of the arguments that have a time axis."""
    return [name for name in TIMED if is_timed(arguments, name)]


def compare(scan: Scan, got: Arrays, expected: Arrays, allowed: Arrays, arguments: Arrays, **how: Any) -> None:
    """Compare gradients by name, all of `expected`; `how` may have `bits`, names of which the bits are promised."""
    for name in expected:
        test = scan.same if name in how.get("bits", ()) else scan.close
        test(f"the gradient of {name}", got[name], expected[name], allowed[name], arguments)


def dot(x: Any, y: Any) -> float:
    """Return the sum of all products of two arrays; 0 if one is None."""
    return 0.0 if x is None or y is None else float(np.sum(wide(x) * wide(y)))


def longer(x: Any) -> Any:
    """Return an array of floats as float64, and anything else as it is."""
    return x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind not in "iu" else x


def elsewhere(x: Any, rng: np.random.Generator) -> Any:
    """Return an array with other strides, and anything else as it is."""
    return (strided, negative)[rng.integers(2)](x) if isinstance(x, np.ndarray) else x
