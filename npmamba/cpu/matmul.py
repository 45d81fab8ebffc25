"""Matrix products on the kernels' threads, where NumPy's BLAS has been told to use one.

Two pools of threads on the same cores get in each other's way, and a BLAS whose threads wait for each other stalls as
soon as another program takes a core: a training step beside one was seen to take four times as long. Where
``OPENBLAS_NUM_THREADS=1`` (or its like) stands in the environment, as the command line sets it, the rows or columns of
a product are therefore divided here, in more pieces than there are threads.
"""

from __future__ import annotations

import functools
import os

import numpy as np

from npmamba.cpu import runtime

PIECES_PER_THREAD = 2
SERIAL_WORK = 1 << 22
"""Below this many multiplications (some 40 microseconds) a product is not divided."""


@functools.cache
def blas_is_serial() -> bool:
    """Tell whether the environment bids NumPy's BLAS to use a single thread; it is read when NumPy is imported."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    return next((os.environ[name] for name in names if os.environ.get(name)), "") == "1"


def matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``x @ y`` of two matrices of one dtype, float32 or float64."""
    (m, k), n = x.shape, y.shape[-1]
    if m * k * n < SERIAL_WORK or not blas_is_serial() or runtime.num_threads() == 1:
        return x @ y
    out = runtime.empty((m, n), x.dtype)

    def rows(start: int, stop: int) -> None:
        np.matmul(x[start:stop], y, out=out[start:stop])

    def columns(start: int, stop: int) -> None:
        np.matmul(x, y[:, start:stop], out=out[:, start:stop])

    runtime.share(rows if m >= n else columns, max(m, n), runtime.num_threads() * PIECES_PER_THREAD)
    return out
