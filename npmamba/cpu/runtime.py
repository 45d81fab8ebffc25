"""How a CPU kernel is declared, compiled, kept and run on several threads.

A kernel is a plain function whose annotations say what it reads and writes::

    @kernel
    def _forward(start: Int, stop: Int, u: Read[3], A: Read[2], y: Write[3], softplus: Flag):
        for task in range(start, stop):
            ...

``_forward[np.float32]`` is its compiled form for float32, made at the first use. Arrays come with any strides, and what
is declared `Read` cannot be written. `launch` splits the tasks ``0 .. tasks - 1`` over threads that run without the
interpreter lock. Each output cell belongs to one task and the sums inside a task have a fixed order, so the bits of a
result do not depend on the number of threads.

The threads are Python's own and wait without spinning: they survive a fork, may be used by many callers at once, and
leave the cores to the matrix products' threads, none of which holds for all of Numba's threading layers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import config, from_dtype, njit, types

from npmamba.cpu.cache import KernelCache

Int = types.int64
Flag = types.boolean
Real = types.float64


class _Array:
    """An annotation: ``Read[3]`` is a read-only array of the kernel's dtype with three axes and any strides."""

    def __init__(self, readonly: bool, dtype: types.Type | None = None) -> None:
        self.readonly, self.dtype, self.ndim = readonly, dtype, 0

    def __getitem__(self, ndim: int) -> Any:
        copy = _Array(self.readonly, self.dtype)
        copy.ndim = ndim
        return copy

    def of(self, dtype: types.Type) -> types.Type:
        """Return the Numba type for a kernel of `dtype`."""
        return types.Array(self.dtype or dtype, self.ndim, "A", readonly=self.readonly)


Read = _Array(readonly=True)
Write = _Array(readonly=False)
ReadInt = _Array(readonly=True, dtype=types.int64)
WriteDouble = _Array(readonly=False, dtype=types.float64)

def told_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function that closes over constants or other functions a name that tells what these are.

    Numba names machine code after the function, and after its number in the order in which a process compiles. Two
    processes may give one name to code made of the same lines for different constants; where a third one loads both
    from the cache, the linker would take either for the other.
    """
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    if cells:
        known = [getattr(x, "__qualname__", None) or repr(x) for x in cells]
        digest = hashlib.sha256(repr(known).encode()).hexdigest()[:12]
        function.__qualname__ += f"_{digest}"
    return function


KERNELS: list[Kernel] = []


class Kernel:
    """A function over the tasks ``start .. stop - 1``, compiled for one dtype at a time.

    Parameters
    ----------
    function : callable
        Annotated as said above. It may close over constants and inner functions.
    name : str, optional
        What tells kernels apart that were made from the same function with other constants.
    """

    def __init__(self, function: Callable[..., None], name: str | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = f"{function.__module__}.{name or function.__qualname__}"
        told_apart(function)
        self._compiled: dict[np.dtype, Callable[..., None]] = {}
        KERNELS.append(self)

    def signature(self, dtype: Any) -> tuple[types.Type, ...]:
        """Return the Numba types of the arguments for a kernel of `dtype`."""
        declared = inspect.get_annotations(self.function, eval_str=True)
        number = from_dtype(np.dtype(dtype))
        return tuple(a.of(number) if isinstance(a, _Array) else a for a in declared.values())

    def __getitem__(self, dtype: Any) -> Callable[..., None]:
        dtype = np.dtype(dtype)
        if dtype not in self._compiled:
            plain = np.errstate(all="ignore")(self.function)  # NumPy would warn of what compiled code does silently
            self._compiled[dtype] = plain if config.DISABLE_JIT else self._compile(dtype)
        return self._compiled[dtype]

    def _compile(self, dtype: np.dtype) -> Callable[..., None]:
        dispatcher = njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(self.function)
        if self.name.startswith("npmamba."):  # the cache knows when our sources change, not when others do
            # a file for each dtype: two processes that compile one kernel for two dtypes write to different files
            dispatcher._cache = KernelCache(self.function, f"{self.name}-{dtype}")
        dispatcher.compile(self.signature(dtype))
        dispatcher.disable_compile()
        return dispatcher


def kernel(function: Callable[..., None]) -> Kernel:
    """Declare a kernel: a function ``(start, stop, ...)`` annotated with `Int`, `Flag`, `Real`, `Read[n]` ..."""
    return Kernel(function)


_inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
_tight = njit(
    nogil=True, error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
)


def inner(function: Callable[..., Any]) -> Any:
    """Declare a function that kernels call: compiled with them."""
    return _inner(told_apart(function))


def tight(function: Callable[..., Any]) -> Any:
    """Declare a function of a few lines, which is always put in place of its call."""
    return _tight(told_apart(function))


# --- threads ---

_pool: ThreadPoolExecutor | None = None
_threads: int | None = None


def num_threads() -> int:
    """Return how many threads kernels use: as set, as ``NPMAMBA_NUM_THREADS`` says, or the cores this process has."""
    if _threads is not None:
        return _threads
    if named := os.environ.get("NPMAMBA_NUM_THREADS"):
        if not named.isdecimal() or int(named) < 1:
            raise ValueError(f"NPMAMBA_NUM_THREADS must be a whole number from 1 up, got {named!r}")
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int | None) -> None:
    """Set how many threads kernels use; None returns to the default. Results do not depend on it."""
    global _threads
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"set_num_threads: threads must be a whole number from 1 up, or None, got {threads!r}")
    _threads = threads
    _forget_pool()


def _forget_pool() -> None:
    """Drop the pool; also what a forked child must do, for threads do not survive a fork."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)

SERIAL_WORK = 1 << 16
"""Below this many numbers (some 20 microseconds) waking threads costs more than it saves."""
PIECES_PER_THREAD = 4


def launch(declared: Kernel, dtype: Any, tasks: int, *arguments: Any, work: int) -> None:
    """Run a kernel over all its tasks, on several threads if there is enough to do.

    Parameters
    ----------
    declared : Kernel
        The kernel; it is called as ``(start, stop, *arguments)``.
    dtype : dtype
        The dtype it computes in.
    tasks : int
        Number of independent tasks.
    work : int
        About how many numbers all tasks touch together; decides whether threads are worth waking.
    """
    compiled, threads = declared[dtype], min(num_threads(), tasks)
    if threads <= 1 or work < SERIAL_WORK:
        compiled(0, tasks, *arguments)
    else:
        share(lambda start, stop: compiled(start, stop, *arguments), tasks, threads * PIECES_PER_THREAD)


def share(work: Callable[[int, int], None], tasks: int, pieces: int) -> None:
    """Call ``work(start, stop)`` for `pieces` pieces of ``0 .. tasks - 1``, each by the thread that is free first."""
    global _pool
    pieces = min(tasks, pieces)
    pool = _pool = _pool or ThreadPoolExecutor(num_threads(), "npmamba")
    ticket = itertools.count()

    def run() -> None:
        while (piece := next(ticket)) < pieces:
            work(piece * tasks // pieces, (piece + 1) * tasks // pieces)

    others = [pool.submit(run) for _ in range(min(num_threads(), pieces) - 1)]
    try:
        run()
    finally:
        for other in others:
            if not other.cancel():  # one that has not begun would find nothing left to do
                other.result()


# --- memory ---


LINE = 64
"""Bytes of a cache line: a vector that straddles two lines costs two reads."""


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate what a kernel will write completely, from the start of a cache line where it is large.

    Tests fill it with NaN, so that a forgotten cell shows.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < 64 * LINE:
        return np.empty(shape, dtype)
    buffer = np.empty(size + LINE, np.uint8)
    skip = -buffer.__array_interface__["data"][0] % LINE
    return buffer[skip : skip + size].view(dtype).reshape(shape)


def _aligned(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    size = 1
    for length in shape:
        size *= length
    buffer = np.empty(size + LINE // like.itemsize, like.dtype)
    skip = (-buffer.ctypes.data % LINE) // like.itemsize
    return buffer[skip : skip + size].reshape(shape)


scratch = inner(_aligned)
"""Inside a kernel: ``scratch(shape, like)`` allocates an array that begins on a cache line, of `like`'s dtype."""
