"""The names that kernels use, and what the compiler puts in their place.

Words of `npmamba.cuda.device` and primitives of `npmamba.scalar` become intrinsics or functions of
`npmamba.cuda.primitives`; every other Python function becomes a device function of the same source.
"""

from __future__ import annotations

import dis
import types as python
from typing import Any

import ml_dtypes
import numpy as np
from numba import cuda
from numba.cuda import types

from npmamba import scalar
from npmamba.cuda import device, intrinsics, primitives

_WORDS: dict[Any, Any] = {
    getattr(device, name): getattr(intrinsics, name)
    for name in (
        "load", "store", "shift", "follow", "load2", "load4", "load8", "store2", "store4", "store8",
        "fetch2", "fetch4", "unpacked", "copy_async", "commit_async", "wait_async", "double",
    )
}  # fmt: skip
_COMMON = {
    scalar.cast: intrinsics.cast,
    scalar.fma: intrinsics.fma,
    scalar.select: intrinsics.select,
    scalar.exp2m1: scalar.exp2m1_series,
}
_PRODUCTS = {scalar.exp2_product: primitives.exp2_product, scalar.exp2_product_small: primitives.exp2_product}
_FLOAT32 = {
    scalar.is_double: primitives.is_not_double,
    scalar.exp2: intrinsics.exp2_float32,
    scalar.sqrt: intrinsics.sqrt_float32,
    scalar.divide: primitives.divide_float32,
    scalar.magnitude: primitives.magnitude_float32,
    device.rcp: intrinsics.rcp_float32,
    scalar.exp: primitives.exp_float32,
    scalar.expm1: primitives.expm1_float32,
    scalar.log1p: scalar.log1p_polynomial,
}
_FLOAT64 = {
    scalar.is_double: primitives.is_double,
    scalar.exp2: primitives.exp2_float64,
    scalar.sqrt: primitives.sqrt_float64,
    scalar.divide: primitives.divide_float64,
    scalar.magnitude: primitives.magnitude_float64,
    device.rcp: primitives.rcp_float64,
    scalar.exp: primitives.exp_float64,
    scalar.expm1: primitives.expm1_float64,
    scalar.log1p: primitives.log1p_float64,
}
NUMBERS = {
    np.dtype(np.float16): types.int16,
    np.dtype(ml_dtypes.bfloat16): types.uint16,
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.uint32): types.uint32,
    np.dtype(np.int32): types.int32,
    np.dtype(np.int64): types.int64,
    np.dtype(np.uint8): types.uint8,
}
_CASTS = {t: NUMBERS[np.dtype(t)] for t in (np.uint32, np.int32, np.int64, np.float32, np.float64)}


_shared: dict[Any, dict[Any, Any]] = {}
"""Device functions that are the same in all kernels, by the dtype they compute in and the architecture."""


class Translation:
    """The names of one kernel and what stands in their place."""

    def __init__(self, wide: np.dtype, cc: tuple[int, int]) -> None:
        own = _FLOAT32 if wide == np.float32 else _FLOAT64
        self.table = {device.cuda: cuda, **_WORDS, **_COMMON, **_PRODUCTS, **own}
        self.memo: dict[Any, Any] = {}
        self.shared = _shared.setdefault((wide, cc), {})

    def of(self, x: Any) -> Any:
        """Return what stands for the value `x` of a name."""
        if isinstance(x, np.dtype):
            return NUMBERS[x]
        if isinstance(x, type):
            return _CASTS.get(x, x)
        if isinstance(x, python.FunctionType):
            found = self.table.get(x)
            if isinstance(found, python.FunctionType):
                return self.device(found)
            return self.device(x) if found is None else found
        if isinstance(x, device._Cuda):
            return cuda
        return x

    def device(self, function: Any) -> Any:
        """Return a function as a device function, which is always put in place of its call."""
        memo = self.memo if function.__closure__ or "<locals>" in function.__qualname__ else self.shared
        if function not in memo:
            memo[function] = cuda.jit(device=True, forceinline=True, fastmath=False)(self.copy(function))
        return memo[function]

    def copy(self, function: Any) -> Any:
        """Return a copy of a function with its names replaced."""
        known = function.__globals__
        # Names of globals only: in cuda.libdevice.exp2 the last one is none.
        called = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        scope = {name: self.of(known[name]) for name in called if name in known}
        scope |= {"__builtins__": __builtins__, "__name__": function.__module__}
        cells = tuple(python.CellType(self.of(cell.cell_contents)) for cell in function.__closure__ or ())
        return python.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)
