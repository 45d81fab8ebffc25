"""From a kernel's Python function to machine code, with no device and no driver needed.

Numba compiles to PTX, NVIDIA's linker makes machine code of it. The function is compiled in a copy whose names are
replaced: ``cuda`` by Numba's module, the words of `npmamba.cuda.device` and the primitives of `npmamba.scalar` by
intrinsics, every other Python function by a device function of the same source. Numba is imported here only.
"""

from __future__ import annotations

import contextlib
import re
import types as python
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.cuda import dispatcher, types
from numba.cuda.compiler import compile_cuda, kernel_fixup
from numba.cuda.cudadrv import nvvm

from npmamba import scalar
from npmamba.cuda import device, intrinsics
from npmamba.cuda.device import rcp, wide_dtype
from npmamba.scalar import cast, exp2, fma, select

OPTIONS = {"fastmath": True, "opt": 3}
"""For NVVM alone: denormal float32 results become 0, divisions are good to two units in the last place. Numba itself
keeps NaN and infinity."""


class Machine(NamedTuple):
    """Machine code of one kernel."""

    name: str
    code: bytes
    log: str
    """What the assembler says of registers, spills and shared memory."""
    ptx: str


# --- float32 primitives that are more than one instruction, in the words of scalar.py ---

_LOG2E, _LOG2E_LOW = 1.4426950216293335, 1.9259629911266175e-08  # their sum is log2(e); the first one is a float32


def _exp(x):
    # 2^(x log2 e) with the product in two parts: its rounding would cost 1e-5 at x = 80
    high = x * cast(_LOG2E, x)
    low = fma(x, cast(_LOG2E_LOW, x), fma(x, cast(_LOG2E, x), -high))
    power = exp2(high)
    low = select(low == low, low, cast(0, x))  # at x = +-inf
    return power * fma(low, cast(0.6931471805599453, x), cast(1, x))


def _log1p(x):
    # log(1 + x) = 2 artanh(s) with s = x / (2 + x) <= 1/3
    s = x * rcp(cast(2, x) + x)
    q = s * s
    p = fma(cast(0.12461131066083908, x), q, cast(0.10634681582450867, x))
    p = fma(p, q, cast(0.1431531310081482, x))
    p = fma(p, q, cast(0.1999920755624771, x))
    p = fma(p, q, cast(0.33333340287208557, x))
    twice = s + s
    return fma(p * q, twice, twice)


def _divide(x, y):
    return x * rcp(y)


def _divide_double(x, y):
    return x / y


def _exp2_product(x, y):
    return exp2(x * y)


def _libdevice_expm1f(x):
    return cuda.libdevice.expm1f(x)


def _exp2_double(x):
    return cuda.libdevice.exp2(x)


def _exp_double(x):
    return cuda.libdevice.exp(x)


def _expm1_double(x):
    return cuda.libdevice.expm1(x)


def _log1p_double(x):
    return cuda.libdevice.log1p(x)


def _magnitude(x):
    return cuda.libdevice.fabsf(x)


def _magnitude_double(x):
    return cuda.libdevice.fabs(x)


def _sqrt_double(x):
    return cuda.libdevice.sqrt(x)


def _rcp_double(x):
    return cast(1, x) / x


_WORDS: dict[Any, Any] = {
    getattr(device, name): getattr(intrinsics, name)
    for name in (
        "load", "store", "shift", "load2", "load4", "load8", "store2", "store4", "store8",
        "copy_async", "commit_async", "wait_async",
    )
}  # fmt: skip
_COMMON = {scalar.cast: intrinsics.cast, scalar.fma: intrinsics.fma, scalar.select: intrinsics.select}
_PRODUCTS = {scalar.exp2_product: _exp2_product, scalar.exp2_product_small: _exp2_product}
_FLOAT32 = {
    scalar.exp2: intrinsics.exp2_float32,
    scalar.sqrt: intrinsics.sqrt_float32,
    scalar.divide: _divide,
    scalar.magnitude: _magnitude,
    device.rcp: intrinsics.rcp_float32,
    scalar.exp: _exp,
    scalar.expm1: _libdevice_expm1f,
    scalar.log1p: _log1p,
}
_FLOAT64 = {
    scalar.exp2: _exp2_double,
    scalar.sqrt: _sqrt_double,
    scalar.divide: _divide_double,
    scalar.magnitude: _magnitude_double,
    device.rcp: _rcp_double,
    scalar.exp: _exp_double,
    scalar.expm1: _expm1_double,
    scalar.log1p: _log1p_double,
}
_NUMBERS = {
    np.dtype(np.float16): types.int16,
    np.dtype(ml_dtypes.bfloat16): types.uint16,
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.uint32): types.uint32,
    np.dtype(np.int32): types.int32,
    np.dtype(np.int64): types.int64,
    np.dtype(np.uint8): types.uint8,
}
_CASTS = {t: _NUMBERS[np.dtype(t)] for t in (np.uint32, np.int32, np.int64, np.float32, np.float64)}


class _Translation:
    """The names of kernels and what stands in their place, for kernels that compute in one dtype."""

    def __init__(self, wide: np.dtype) -> None:
        own = _FLOAT32 if wide == np.float32 else _FLOAT64
        self.table = {device.cuda: cuda, **_WORDS, **_COMMON, **_PRODUCTS, **own}
        self.memo: dict[Any, Any] = {}

    def of(self, x: Any) -> Any:
        """Return what stands for the value `x` of a name."""
        if isinstance(x, np.dtype):
            return _NUMBERS[x]
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
        if function not in self.memo:
            self.memo[function] = cuda.jit(device=True, forceinline=True, fastmath=False)(self.copy(function))
        return self.memo[function]

    def copy(self, function: Any) -> Any:
        """Return a copy of a function with its names replaced."""
        known = function.__globals__
        scope = {name: self.of(known[name]) for name in function.__code__.co_names if name in known}
        scope |= {"__builtins__": __builtins__, "__name__": function.__module__}
        cells = tuple(python.CellType(self.of(cell.cell_contents)) for cell in function.__closure__ or ())
        return python.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)


def signature(function: Callable[..., None], dtype: np.dtype) -> tuple[Any, ...]:
    """Return the Numba types of a kernel's arguments, from its annotations."""
    wide = wide_dtype(dtype)
    pointers = {
        "Data": dtype, "Wide": wide, "Double": np.float64, "Long": np.int64, "Flags": np.uint8,
    }  # fmt: skip
    values = {"Size": types.uint32, "Stride": types.int64, "Real": _NUMBERS[wide]}
    names = [annotation_of(function, argument) for argument in argument_names(function)]
    return tuple(types.CPointer(_NUMBERS[np.dtype(pointers[n])]) if n in pointers else values[n] for n in names)


def argument_names(function: Callable[..., None]) -> tuple[str, ...]:
    """Return the names of a kernel's arguments."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def annotation_of(function: Callable[..., None], argument: str) -> str:
    """Return the name of an argument's annotation, such as ``Data``."""
    return str(function.__annotations__[argument])


@contextlib.contextmanager
def _compiling_for(cc: tuple[int, int]) -> Iterator[None]:
    """Let device functions be compiled for `cc`: Numba would ask the current device, and needs a driver to."""
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: python.SimpleNamespace(compute_capability=cc)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def compile_ptx(
    function: Callable[..., None], dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> tuple[str, str]:
    """Compile a kernel to PTX; return its name and the text."""
    copy = _Translation(wide_dtype(dtype)).copy(function)
    arguments = signature(function, np.dtype(dtype))
    with _compiling_for(cc):
        result = compile_cuda(copy, types.void, arguments, nvvm_options=OPTIONS, cc=cc, abi="numba")
    entry = result.fndesc.llvm_func_name
    kernel = result.library.get_function(entry)
    result.library._entry_name = entry
    kernel_fixup(kernel, False)
    nvvm.set_launch_bounds(kernel, (threads, blocks))
    (ptx,) = result.library.get_asm_strs(cc=cc)
    found = re.search(r"\.entry (\w+)\(", ptx)
    assert found is not None
    return found.group(1), ptx


def compile_machine(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> Machine:
    """Compile a kernel to machine code for compute capability `cc`."""
    entry, ptx = compile_ptx(function, dtype, threads, blocks, cc)
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    code = linker.link("cubin").code
    return Machine(entry, bytes(code), linker.get_info_log(), ptx)
