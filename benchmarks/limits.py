"""What this machine allows: the rate of polynomial exponentials, against which the scan is measured."""

from __future__ import annotations

import numpy as np
from harness import best

REPEATS = 2000
BUFFER = 4096
"""Numbers that fit into the first-level cache beside their results."""


def exp2_rate(seconds: float = 0.5) -> float:
    """Return how many float32 2^(x y) a core computes in a second as the scan does, data in the first-level cache."""
    from numba import njit

    from npmamba.cpu.simd import load, store, width
    from npmamba.scalar import cast, exp2_product_small

    @njit(nogil=True)
    def run(x, y, repeats):
        lanes = width(x)
        half = cast(0.5, load(x, (0,)))
        for _ in range(repeats):
            for i in range(0, x.shape[0], 4 * lanes):
                store(y, (i,), exp2_product_small(load(x, (i,)), half))
                store(y, (i + lanes,), exp2_product_small(load(x, (i + lanes,)), half))
                store(y, (i + 2 * lanes,), exp2_product_small(load(x, (i + 2 * lanes,)), half))
                store(y, (i + 3 * lanes,), exp2_product_small(load(x, (i + 3 * lanes,)), half))

    x = np.linspace(-40, 0, BUFFER, dtype=np.float32)
    y = np.empty_like(x)
    time = best(lambda: run(x, y, REPEATS), seconds)
    if not np.allclose(y, np.exp2(x / 2), rtol=1e-6):
        raise AssertionError("exp2_rate: the kernel's results are wrong, so its rate means nothing")
    return REPEATS * BUFFER / time
