"""What tests of array functions share: other memory for the same values, the size of an error, bits."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np


def error(value: Any, expected: Any, terms: Any = 0.0) -> float:
    """Return max|value - expected| / max|expected|; 0 where both are empty or all zero.

    Where large numbers cancel, `terms` are these numbers: the largest of them takes the place of a smaller result.
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    worst = np.max(np.abs(value - expected), initial=0.0)
    return float(worst and worst / max(np.max(np.abs(expected), initial=0.0), np.max(np.abs(terms), initial=0.0)))


def same_bits(x: Any, y: Any) -> bool:
    """Tell whether two arrays, or two tuples of arrays, agree in shape, dtype and every bit."""
    if isinstance(x, tuple):
        return len(x) == len(y) and all(same_bits(a, b) for a, b in zip(x, y, strict=True))
    if x is None or y is None:
        return x is y
    x, y = np.asarray(x), np.asarray(y)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return `x` in every kind of memory: the same values, other strides, byte order, alignment or flags."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
    wide[..., 1::2] = x
    rows = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
    rows[..., 1:-2] = x
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    reversed_ = x[tuple(slice(None, None, -1) for _ in x.shape)].copy()
    readonly = x.copy()
    readonly.flags.writeable = False
    return {
        "fortran": np.asfortranarray(x),
        "every second column": wide[..., 1::2],
        "part of a row": rows[..., 1:-2],
        "negative strides": reversed_[tuple(slice(None, None, -1) for _ in x.shape)],
        "byte-swapped": x.astype(x.dtype.newbyteorder()),
        "unaligned": unaligned,
        "read-only": readonly,
    }


def run_without_compiler(program: str) -> None:
    """Run a program in a fresh interpreter with Numba's compiler switched off; it must end well."""
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
