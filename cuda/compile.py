"""From a kernel's Python function to machine code, with no device and no driver needed.

Numba compiles to PTX a copy of the function whose names `npmamba.cuda.translate` has replaced; NVIDIA's linker makes
machine code of that.
"""

from __future__ import annotations

import contextlib
import re
import threading
import types as python
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba.cuda import dispatcher, types
from numba.cuda.compiler import compile_cuda, kernel_fixup
from numba.cuda.cudadrv import nvvm

from npmamba.cuda.device import arguments_of, wide_dtype
from npmamba.cuda.translate import NUMBERS, Translation

OPTIONS = {"ftz": True, "prec_div": False, "prec_sqrt": False, "fma": False, "opt": 3}
"""For NVVM alone: denormal float32 results become 0, divisions are good to two units in the last place; a product and a
sum become one operation only where the source says `fma`, so that all variants of a kernel give the same bits. Numba
itself keeps NaN and infinity."""


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


def signature(function: Callable[..., None], dtype: np.dtype) -> tuple[Any, ...]:
    """Return the Numba types of a kernel's arguments, from its annotations."""
    wide = wide_dtype(dtype)
    pointers = {
        "Data": dtype, "Wide": wide, "Double": np.float64, "Long": np.int64, "Flags": np.uint8,
    }  # fmt: skip
    values = {"Size": types.uint32, "Stride": types.int64, "Real": NUMBERS[wide]}
    kinds = arguments_of(function).values()
    return tuple(types.CPointer(NUMBERS[np.dtype(pointers[n])]) if n in pointers else values[n] for n in kinds)


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


def _front_end(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> tuple[str, Any]:
    """Return the entry point's name, which profilers show, and what NVVM makes PTX of."""
    copy = Translation(wide_dtype(dtype), cc).copy(function)
    arguments = signature(function, np.dtype(dtype))
    with _compiling_for(cc):
        result = compile_cuda(copy, types.void, arguments, nvvm_options=OPTIONS, cc=cc, abi="numba")
    library, mangled = result.library, result.fndesc.llvm_func_name
    library._entry_name = mangled
    kernel = library.get_function(mangled)
    kernel_fixup(kernel, False)
    nvvm.set_launch_bounds(kernel, (threads, blocks))
    entry = re.sub(r"\W", "_", f"npmamba_{name}")
    library._llvm_strs = _named([module.replace(mangled, entry) for module in library.llvm_strs])
    return entry, library


def _named(modules: list[str]) -> list[str]:
    """Number functions and shared arrays within the kernel rather than the process: NVVM sorts by name, and the same
    kernel is to be the same machine code whatever was compiled before it."""
    counted = re.compile(r"_cudapy_smem_\d+|B\d+v\d+B")
    seen = dict.fromkeys(name for module in modules for name in counted.findall(module))
    number = {name: f"{name[:2]}_{k}_" for k, name in enumerate(seen)}
    return [counted.sub(lambda found: number[found.group()], module) for module in modules]


def compile_machines(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, ccs: Sequence[tuple[int, int]]
) -> Iterator[Machine]:
    """Compile a kernel to machine code for each of the compute capabilities `ccs`, one when it is asked for."""
    entry, library = _front_end(function, name, dtype, threads, blocks, ccs[0])
    for cc in ccs:
        (ptx,) = library.get_asm_strs(cc=cc)
        yield _link(entry, re.sub(r"^\.common \.global .* \w*NumbaEnv\w*;\n", "", ptx, flags=re.MULTILINE), cc)


def compile_machine(
    function: Callable[..., None], name: str, dtype: Any, threads: int, blocks: int, cc: tuple[int, int]
) -> Machine:
    """Compile a kernel to machine code for compute capability `cc`."""
    return next(compile_machines(function, name, dtype, threads, blocks, [cc]))


def _link(entry: str, ptx: str, cc: tuple[int, int]) -> Machine:
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    code = linker.link("cubin").code
    return Machine(entry, bytes(code), linker.get_info_log(), ptx)
