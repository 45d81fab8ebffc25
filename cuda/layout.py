"""From the callers' memory to what the CUDA kernels read: the same memory wherever they can walk it."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import address


def native(x: Any, dtype: Any) -> Any:
    """Return `x` in `dtype` and native byte order, aligned to its elements: itself where it is so already."""
    if x.dtype != dtype:
        x = x.astype(dtype)
    if isinstance(x, np.ndarray) and not x.flags.aligned:  # CuPy's arrays always are
        x = x.copy(order="K")
    return x


def side_by_side(x: Any, axis: int) -> bool:
    """Tell whether `x` can be read along `axis` by 16 bytes at a time, wherever the other indices point."""
    if x.strides[axis] != x.itemsize or x.shape[axis] * x.itemsize % 16 or address(x) % 16:
        return False
    return all(n < 2 or s % 16 == 0 for k, (n, s) in enumerate(zip(x.shape, x.strides, strict=True)) if k != axis)
