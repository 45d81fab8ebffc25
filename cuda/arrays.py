"""What the host side of a CUDA twin asks of its arrays: CuPy's, or NumPy's when the kernels are interpreted."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from npmamba.cuda.stand_in import StandIn


def library(x: Any) -> Any:
    """Return the module that `x` belongs to: ``cupy``, or ``numpy`` under the kernel interpreter."""
    if type(x) is StandIn:
        return x.library
    return sys.modules[type(x).__module__.partition(".")[0]]


def empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Allocate what a kernel will write completely, where `like` lives. Tests fill it with NaN."""
    return library(like).empty(shape, dtype)


def zeros(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Allocate zeros where `like` lives."""
    return library(like).zeros(shape, dtype)


def strides(x: Any) -> tuple[int, ...]:
    """Return the strides of `x` in elements."""
    return tuple(s // x.itemsize for s in x.strides)


def address(x: Any) -> int:
    """Return where the first element of `x` lies in memory."""
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


def aligned(x: Any, unit: int = 16) -> bool:
    """Tell whether `x` starts at a multiple of `unit` bytes, and every row of its last axis, which is contiguous."""
    return not (address(x) % unit or any(s % unit for s in x.strides[:-1]) or x.strides[-1] != x.itemsize)


def multiprocessors(x: Any) -> int:
    """Return the multiprocessors of the device of `x`; the interpreter has one."""
    return 1 if isinstance(x, np.ndarray) else _multiprocessors(x.data.device_id)


@functools.cache
def _multiprocessors(device: int) -> int:
    return sys.modules["cupy"].cuda.Device(device).attributes["MultiProcessorCount"]
