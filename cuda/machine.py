"""Machine code on a device: found on disk or compiled, loaded by CuPy, and handed its arguments."""

from __future__ import annotations

import functools
import logging
import operator
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from npmamba.cuda import cache, requirements
from npmamba.cuda.device import arguments_of, wide_dtype
from npmamba.cuda.requirements import CudaUnavailableError

if TYPE_CHECKING:
    from npmamba.cuda.launch import Specialization

log = logging.getLogger("npmamba")
_LARGEST = 2**32 - 1
_NULL = np.uint64(0)
_UNREADABLE = {200, 209, 218, 222, 223, 300}
"""The driver's codes for machine code that it does not understand."""


def current_device() -> int:
    """Return the number of CuPy's current device; CudaUnavailableError if there is none."""
    try:
        return sys.modules["cupy"].cuda.runtime.getDevice()
    except (KeyError, RuntimeError):
        return requirements.require_device().cuda.runtime.getDevice()


class Loaded:
    """One specialization's machine code on the current device."""

    def __init__(self, specialization: Specialization) -> None:
        self.device, self.name = current_device(), specialization.name
        entry, binary = machine_code(specialization, architecture(self.device))
        self.module = sys.modules["cupy"].cuda.function.Module()
        try:
            self.module.load(binary)
        except RuntimeError as error:
            if getattr(error, "status", None) not in _UNREADABLE:
                raise
            problem = f"the driver cannot read machine code of this nvJitLink ({error})"
            raise CudaUnavailableError(problem, "install a newer driver, https://www.nvidia.com/drivers") from error
        self.function = self.module.get_function(entry)
        driver = sys.modules["cupy"].cuda.driver
        fixed = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self.function.ptr)
        self.shared = 48 * 1024 - fixed
        self.threads = (specialization.threads,)
        self.real = wide_dtype(specialization.dtype).type
        self.describe(specialization.function)

    def describe(self, function: Any) -> None:
        """Note which of the kernel's arguments are pointers, and which are numbers of which kind."""
        kinds = arguments_of(function)
        self.names = list(kinds)
        self.sizes, self.strides, self.reals = (
            [i for i, kind in enumerate(kinds.values()) if kind == wanted] for wanted in ("Size", "Stride", "Real")
        )
        self.pointers = sorted({*range(len(kinds))} - {*self.sizes, *self.strides, *self.reals})

    def allow(self, shared: int) -> None:
        """Allow as many bytes of dynamic shared memory; CUDA asks for this beyond 48 KiB, fixed ones counted in."""
        driver = sys.modules["cupy"].cuda.driver
        driver.funcSetAttribute(self.function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        self.shared = shared

    def convert(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments as CuPy is to pass them. A Python int is passed as 64 bits, which serves 32 too."""
        out = list(arguments)
        if len(out) != len(self.names):
            raise TypeError(f"{self.name} takes {len(self.names)} arguments, got {len(out)}")
        for i in self.pointers:
            x = out[i]
            if x is None:
                out[i] = _NULL
            elif getattr(x.data, "device_id", None) != self.device:
                raise self._misplaced(i, x)
        for i in self.sizes:
            x = out[i]
            if type(x) is not int or not 0 <= x <= _LARGEST:
                out[i] = self._size(i, x)
        for i in self.strides:
            if type(out[i]) is not int:
                out[i] = np.int64(operator.index(out[i]))
        for i in self.reals:
            out[i] = self.real(out[i])
        return tuple(out)

    def _misplaced(self, i: int, x: Any) -> Exception:
        where = getattr(x.data, "device_id", None)
        if where is None:
            return TypeError(f"{self.name}: {self.names[i]} must be a CuPy array, got {type(x).__name__}")
        return ValueError(
            f"{self.name}: {self.names[i]} lies on device {where}, but the current device is {self.device}; "
            f"put the call under `with cupy.cuda.Device({where}):`"
        )

    def _size(self, i: int, x: Any) -> int:
        n = operator.index(x)
        if not 0 <= n <= _LARGEST:
            raise OverflowError(f"{self.name}: {self.names[i]} must be from 0 to {_LARGEST:,}, got {n:,}")
        return n


@functools.cache
def architecture(device: int) -> tuple[int, int]:
    requirements.require_device()
    capability = sys.modules["cupy"].cuda.Device(device).compute_capability
    return int(capability[:-1]), int(capability[-1])


def machine_code(specialization: Specialization, cc: tuple[int, int]) -> tuple[str, bytes]:
    """Return the entry point's name and the machine code for compute capability `cc`, compiled if it is not kept."""
    function, name, *bounds = specialization
    file = cache.file_name(f"{name}-sm{cc[0]}{cc[1]}", function, *bounds, cc)
    found = cache.read(file)
    if found is None:
        requirements.require_compiler(cc)
        _say_once(str(cache.folder()))
        from npmamba.cuda import compile  # Numba's CUDA compiler loads here, at the first kernel that is not kept

        machine = compile.compile_machine(*specialization, cc=cc)
        found = machine.name, machine.code
        cache.write(file, *found)
    return found


@functools.cache
def _say_once(folder: str) -> None:
    log.info("compiling CUDA kernels (once); they are kept in %s", folder)
