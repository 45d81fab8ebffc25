"""Arrays as lines of numbers: what operations over the last axis (norm, loss) hand to their kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmamba.cpu.layout import native


def lines(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return `x` (..., n) as (outer, inner, n) with unit stride along n: a view where memory allows.

    Two leading axes, so that the slice ``logits[:, :-1]`` of (batch, seqlen, vocab) needs no copy.
    """
    x = native(x, dtype)
    if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        x = np.ascontiguousarray(x)
    if x.ndim <= 3:
        return x[(None,) * (3 - x.ndim)]
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
