"""From a kernel's Python function to machine code, with no device and no driver needed.

Numba compiles to PTX, NVIDIA's linker makes machine code of it. The function is compiled in a copy whose names are
replaced: ``cuda`` by Numba's module, the words of `npmamba.cuda.device` and the primitives of `npmamba.scalar` by
intrinsics, every other Python function by a device function of the same source. Numba is imported here only.
"""

from __future__ import annotations

import contextlib
import re
import threading
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
from npmamba.cuda import device, intrinsics, primitives
from npmamba.cuda.device import wide_dtype

OPTIONS = {"fastmath": True, "opt": 3}
"""For NVVM alone: denormal float32 results become 0, divisions are good to two units in the last place. Numba itself
keeps NaN and infinity."""


class Resources(NamedTuple):
    """What a kernel takes: registers of a thread, bytes of a block's shared memory, bytes spilled and on the stack."""

    registers: int
    shared: int
    spilled: int
    stack: int


class Machine(NamedTuple):
    """Machine code of one kernel."""

    name: str
    code: bytes
    log: str
    """What the assembler and the linker say of it."""
    ptx: str

    @property
    def resources(self) -> Resources:
        """What the log says; the shared memory is what CUDA itself takes (1 KiB from sm_90 on) and the kernel's."""
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", self.log)]
        stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", self.log)]
        linked = re.search(r"used (\d+) registers.* (\d+) stack, (\d+) bytes smem.* (\d+) bytes lmem", self.log)
        if linked is None or not spills or not stack:
            raise ValueError(f"the linker's log says nothing of {self.name}: {self.log}")
        registers, frame, shared, local = (int(n) for n in linked.groups())
        return Resources(registers, shared, sum(spills), max(frame, local, *stack))


_WORDS: dict[Any, Any] = {
    getattr(device, name): getattr(intrinsics, name)
    for name in (
        "load", "store", "shift", "load2", "load4", "load8", "store2", "store4", "store8",
        "copy_async", "commit_async", "wait_async",
    )
}  # fmt: skip
_COMMON = {scalar.cast: intrinsics.cast, scalar.fma: intrinsics.fma, scalar.select: intrinsics.select}
_PRODUCTS = {scalar.exp2_product: primitives.exp2_product, scalar.exp2_product_small: primitives.exp2_product}
_FLOAT32 = {
    scalar.exp2: intrinsics.exp2_float32,
    scalar.sqrt: intrinsics.sqrt_float32,
    scalar.divide: primitives.divide_float32,
    scalar.magnitude: primitives.magnitude_float32,
    device.rcp: intrinsics.rcp_float32,
    scalar.exp: primitives.exp_float32,
    scalar.expm1: primitives.expm1_float32,
    scalar.log1p: primitives.log1p_float32,
}
_FLOAT64 = {
    scalar.exp2: primitives.exp2_float64,
    scalar.sqrt: primitives.sqrt_float64,
    scalar.divide: primitives.divide_float64,
    scalar.magnitude: primitives.magnitude_float64,
    device.rcp: primitives.rcp_float64,
    scalar.exp: primitives.exp_float64,
    scalar.expm1: primitives.expm1_float64,
    scalar.log1p: primitives.log1p_float64,
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


_lock = threading.Lock()


@contextlib.contextmanager
def _compiling_for(cc: tuple[int, int]) -> Iterator[None]:
    """Let device functions be compiled for `cc`: Numba would ask the current device, and needs a driver to."""
    with _lock:
        asked = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: python.SimpleNamespace(compute_capability=cc)
        try:
            yield
        finally:
            dispatcher.get_current_device = asked


def compile_ptx(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> tuple[str, str]:
    """Compile a kernel to PTX; return the entry point's name, which profilers show, and the text."""
    copy = _Translation(wide_dtype(dtype)).copy(function)
    arguments = signature(function, np.dtype(dtype))
    with _compiling_for(cc):
        result = compile_cuda(copy, types.void, arguments, nvvm_options=OPTIONS, cc=cc, abi="numba")
        library, mangled = result.library, result.fndesc.llvm_func_name
        library._entry_name = mangled
        kernel = library.get_function(mangled)
        kernel_fixup(kernel, False)
        nvvm.set_launch_bounds(kernel, (threads, blocks))
        (ptx,) = library.get_asm_strs(cc=cc)
    entry = re.sub(r"\W", "_", f"npmamba_{name}")
    return entry, _NUMBA_ENVIRONMENT.sub("", ptx).replace(mangled, entry)


_NUMBA_ENVIRONMENT = re.compile(r"^\.common \.global .* \w*NumbaEnv\w*;\n", re.MULTILINE)
"""Eight bytes for each function that was compiled, which nothing reads."""


def compile_machine(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> Machine:
    """Compile a kernel to machine code for compute capability `cc`."""
    entry, ptx = compile_ptx(function, name, dtype, threads, blocks, cc)
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    code = linker.link("cubin").code
    return Machine(entry, bytes(code), linker.get_info_log(), ptx)
