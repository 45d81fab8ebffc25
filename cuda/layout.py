"""From the callers' memory to what the CUDA kernels read: the same memory wherever they can walk it."""

from __future__ import annotations

from typing import Any

from npmamba.cuda.arrays import address


def native(x: Any, dtype: Any) -> Any:
    """Return `x` in `dtype` and native byte order, aligned, with no negative stride: itself where it is so already."""
    x = x.astype(dtype, copy=False)
    unit = x.itemsize
    good = address(x) % unit == 0 and all(s >= 0 and s % unit == 0 for s in x.strides)
    return x if good else x.copy(order="K")
