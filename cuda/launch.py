"""How a CUDA kernel is declared, compiled, kept and launched: Numba compiles, CuPy launches.

A kernel is declared by the function that builds it for given constants::

    def _forward(real, width):
        def rms_norm_forward(x: Data, weight: Wide, y: Data, rows: Size):
            ...
        return rms_norm_forward

    FORWARD = Kernel(_forward, threads=256)
    FORWARD.launch(grid, x.dtype, (x, weight, y, rows), width=768)

`real` is the dtype it computes in; the others are closure constants, so loops over them unroll. Each combination is
compiled once, kept on disk, and launched on CuPy's current stream: about 6 microseconds where Numba's own launch of
CuPy arrays takes 150.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda import cache

log = logging.getLogger("npmamba")
KERNELS: list[Kernel] = []
_SCALARS: dict[str, Callable[[Any], Any]] = {"Size": np.uint32, "Stride": np.int64}


def wide_dtype(dtype: Any) -> np.dtype:
    """Return the dtype a kernel for `dtype` computes in: float64 for float64, else float32."""
    return np.dtype(np.float64) if np.dtype(dtype) == np.float64 else np.dtype(np.float32)


_interpreter: Callable[[Specialization, tuple[int, ...], tuple[Any, ...], int], None] | None = None


@contextlib.contextmanager
def interpreted_by(run: Callable[[Specialization, tuple[int, ...], tuple[Any, ...], int], None]) -> Iterator[None]:
    """Have all kernels run by `run` instead of a device: the twins then work on NumPy arrays."""
    global _interpreter
    before, _interpreter = _interpreter, run
    try:
        yield
    finally:
        _interpreter = before


class Specialization(NamedTuple):
    """One kernel for one dtype and one set of constants: what the compiler and the interpreter are given."""

    function: Callable[..., None]
    name: str
    dtype: np.dtype
    threads: int
    blocks: int


class Kernel:
    """A CUDA kernel, compiled for one dtype and one set of constants at a time.

    Parameters
    ----------
    build : callable
        ``build(real, **constants)`` returns the kernel as a Python function annotated with the words of
        `npmamba.cuda.device`. With a parameter ``data`` it is also given the dtype of the arrays.
    threads : int or callable
        Threads of a block, or a function of the constants that returns them.
    blocks : int
        Blocks that are to fit on one multiprocessor together; bounds the registers. 1 leaves them free.
    """

    def __init__(self, build: Callable[..., Any], threads: int | Callable[..., int], blocks: int = 1) -> None:
        self.build, self.threads, self.blocks = build, threads, blocks
        self.name = f"{build.__module__.rsplit('.', 1)[-1]}.{build.__name__.lstrip('_')}"
        self._wants_data = "data" in build.__code__.co_varnames[: build.__code__.co_argcount]
        self._loaded: dict[Any, Any] = {}
        KERNELS.append(self)

    def specialize(self, dtype: Any, **constants: Any) -> Specialization:
        """Return the kernel as a Python function for one dtype and one set of constants."""
        dtype = np.dtype(dtype)
        data = {"data": dtype} if self._wants_data else {}
        function = self.build(wide_dtype(dtype), **data, **constants)
        threads = self.threads if isinstance(self.threads, int) else self.threads(**constants)
        told = "".join(f"-{name}={value}" for name, value in sorted(constants.items()))
        return Specialization(function, f"{self.name}-{dtype}{told}", dtype, threads, self.blocks)

    def launch(
        self, grid: tuple[int, ...], dtype: Any, arguments: tuple[Any, ...], *, shared: int = 0, **constants: Any
    ) -> None:
        """Run the kernel on CuPy's current stream and device; returns at once.

        Parameters
        ----------
        grid : tuple of int
            Blocks along x, y and z. An empty grid launches nothing.
        dtype : dtype
            The dtype of the arrays annotated ``Data``.
        arguments : tuple
            CuPy arrays for pointers, numbers for the rest, None for a pointer that is not followed.
        shared : int
            Bytes of dynamic shared memory.
        """
        if 0 in grid:
            return
        if _interpreter is not None:
            return _interpreter(self.specialize(dtype, **constants), grid, arguments, shared)
        key = (dtype, current_device(), *constants.values())
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = _Loaded(self.specialize(dtype, **constants), shared)
        loaded.function(grid, loaded.threads, loaded.convert(arguments), shared_mem=shared)


def current_device() -> int:
    """Return the number of CuPy's current device."""
    return sys.modules["cupy"].cuda.runtime.getDevice()


class _Loaded:
    """Machine code on one device, and how to pass its arguments."""

    def __init__(self, specialization: Specialization, shared: int) -> None:
        entry, code = machine_code(specialization, _architecture(current_device()))
        module = sys.modules["cupy"].cuda.function.Module()
        module.load(code)
        self.module, self.function = module, module.get_function(entry)
        self.threads = (specialization.threads,)
        if shared > 48 * 1024:
            _allow_shared(self.function, shared)
        annotations = specialization.function.__annotations__.values()
        real = wide_dtype(specialization.dtype).type
        self.casts = [_SCALARS.get(str(a), real if str(a) == "Real" else _pointer) for a in annotations]

    def convert(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(arguments) != len(self.casts):
            raise TypeError(f"the kernel takes {len(self.casts)} arguments, got {len(arguments)}")
        return tuple([cast(x) for cast, x in zip(self.casts, arguments, strict=True)])


_NULL = np.uint64(0)


def _pointer(x: Any) -> Any:
    return _NULL if x is None else x


def _allow_shared(function: Any, size: int) -> None:
    driver = sys.modules["cupy"].cuda.driver
    driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)


@functools.cache
def _architecture(device: int) -> tuple[int, int]:
    capability = sys.modules["cupy"].cuda.Device(device).compute_capability
    return int(capability[:-1]), int(capability[-1])


def machine_code(specialization: Specialization, cc: tuple[int, int]) -> tuple[str, bytes]:
    """Return the entry point's name and the machine code for compute capability `cc`, compiled if it is not kept."""
    name = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in f"{specialization.name}-sm{cc[0]}{cc[1]}")
    found = cache.read(name)
    if found is None:
        _say_once(str(cache.folder()))
        machine = _compiler().compile_machine(*specialization, cc=cc)
        found = machine.name, machine.code
        cache.write(name, *found)
    return found


@functools.cache
def _say_once(folder: str) -> None:
    log.info("compiling CUDA kernels (once); they are kept in %s", folder)


def _compiler() -> Any:
    from npmamba.cuda import compile  # Numba's CUDA compiler loads here, at the first kernel that is not kept

    return compile
