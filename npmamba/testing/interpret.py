"""The kernel interpreter: runs the Python source of a CUDA kernel on NumPy arrays, and finds its mistakes.

No device, no driver and no environment variable is needed: one process can compile kernels and interpret them. Every
CUDA thread is a greenlet. Blocks run one after another, warps and threads in an order that `seed` permutes.

What is found, whatever the order and the values are, is raised as a `npmamba.testing.findings.KernelError`: races in
a block and between blocks, barriers and shuffles that not all threads reach, wrong masks, reads of memory that nobody
wrote, accesses outside an array, unaligned vector accesses, and copies to shared memory that were not waited for.

Numbers are NumPy's: float32 stays float32, uint32 wraps around. Not found here: float64 arithmetic that the compiler
would make of a bare literal, and 64-bit arithmetic of a uint32 and a bare int; both show in the compiled text.
"""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

try:
    import greenlet  # noqa: F401
except ImportError:
    raise ImportError(
        "npmamba.testing.interpret needs the package greenlet, which the extra `fuzz` brings: "
        'pip install "npmamba[fuzz]"'
    ) from None

from npmamba.cuda import arrays, device, launch
from npmamba.testing import arithmetic, shadow, words
from npmamba.testing.shadow import memory_of
from npmamba.testing.threads import Block, Index, Launch
from npmamba.testing.views import Array, Null, Pointer

_MODULES = {"numba.cuda": words.CUDA, "numba.cuda.libdevice": arithmetic.LIBDEVICE, "math": arithmetic.MATH}
_OPAQUE = ("numpy", "numba", "npmamba.testing.")


def _replacement(x: Any, memo: dict[Any, Any]) -> Any:
    """Return what stands for the value `x` of a name inside an interpreted kernel."""
    if x is device.cuda:
        return words.CUDA
    if isinstance(x, types.ModuleType):
        return _MODULES.get(x.__name__, x)
    if isinstance(x, np.dtype):
        return x.type
    with contextlib.suppress(TypeError):  # what cannot be hashed
        if x in words.STAND_INS:
            return words.STAND_INS[x]
    home = str(getattr(x, "__module__", ""))
    if home.startswith("numba.cuda.libdevice"):
        return getattr(arithmetic.LIBDEVICE, x.__name__)
    if home.startswith(("numba.cuda.stubs", "numba.cuda.intrinsic")):  # of numba-cuda, and of Numba itself
        return words.word(getattr(x, "__qualname__", x.__name__))
    if hasattr(x, "py_func"):
        return rebind(x.py_func, memo)
    if isinstance(x, types.FunctionType) and not home.startswith(_OPAQUE):
        return rebind(x, memo)
    return x


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def rebind(function: Any, memo: dict[Any, Any]) -> Any:
    """Return a copy of a function in which `cuda`, intrinsics and device functions are the interpreter's."""
    if function in memo:
        return memo[function]
    scope = dict(function.__globals__)
    closure = function.__closure__ or ()
    cells = tuple(types.CellType() for _ in closure)
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    memo[function] = copy
    for cell, old in zip(cells, closure, strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            cell.cell_contents = _replacement(old.cell_contents, memo)
    for name in _names(function.__code__) & scope.keys():
        scope[name] = _replacement(scope[name], memo)
    return copy


def _run(
    function: Any, grid: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any, ...], shared: int,
    order: random.Random | None, check: Any,
) -> None:  # fmt: skip
    """Run a kernel on arguments that are pointers, arrays and numbers already."""
    blocks, size = Index(*map(int, grid)), Index(*map(int, threads))
    if size.total() > 1024 or blocks.x >= 2**31 or max(blocks.y, blocks.z) > 65535:
        raise ValueError(f"no device takes a grid of {tuple(blocks)} blocks of {tuple(size)} threads")
    places = tuple(size.at(k) for k in range(size.total()))
    copy = rebind(function, {})
    job = Launch(copy, arguments, blocks, size, shared, places, bool(check), check != "strict", order)
    time = 1
    with np.errstate(all="ignore"):
        for k in job.order(range(blocks.total())):
            time = Block(job, blocks.at(k), time).run()


_POINTERS = {"Double": np.float64, "Long": np.int64, "Flags": np.uint8}


def _argument(name: str, kind: str, dtype: np.dtype, x: Any, cells: Any) -> Any:
    """Return an argument of a launch as the kernel sees it."""
    real = device.wide_dtype(dtype)
    scalars: dict[str, Any] = {"Size": np.uint32, "Stride": np.int64, "Real": real.type}
    if kind in scalars:
        return scalars[kind](x)
    pointers: dict[str, Any] = {"Data": dtype, "Wide": real, **_POINTERS}
    expected = np.dtype(pointers[kind])
    if x is None:
        return Null(name, expected)
    x = x.view(np.uint8) if x.dtype == bool else x
    if x.dtype != expected:
        raise TypeError(f"{name} is annotated {kind}, which is {expected} here; got an array of {x.dtype}")
    memory = memory_of(name, x, cells)
    return Pointer(memory, memory.first)


@contextlib.contextmanager
def _unwritten_outputs() -> Iterator[None]:
    """Have `npmamba.cuda.arrays.empty` allocate arrays in which a read of what nobody wrote is found.

    The code is replaced inside the function, as modules hold the function itself under a name of their own.
    """
    before, arrays.empty.__code__ = arrays.empty.__code__, shadow.empty.__code__
    try:
        yield
    finally:
        arrays.empty.__code__ = before


@contextlib.contextmanager
def interpreted(seed: int | None = None, *, check: bool | str = "races") -> Iterator[None]:
    """Run CUDA kernels on NumPy arrays inside a ``with`` block: the twins in `npmamba.cuda` then take NumPy arrays.

    Parameters
    ----------
    seed : int, optional
        Permutes the order of blocks, warps and threads.
    check : "races", "strict" or False
        "races" takes a shuffle to order the memory accesses of its warp, as compilers do; "strict" does not, as the
        programming guide does not promise it. False leaves out the findings that need a record of every access
        (races, and reads of shared memory that nobody wrote), and takes about two thirds of the time.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.cuda.device import Data, Size, cuda, load, store
    >>> from npmamba.cuda.launch import Kernel
    >>> def doubled(real):
    ...     def kernel(x: Data, y: Data, n: Size):
    ...         t = np.uint32(cuda.threadIdx.x)
    ...         if t < n:
    ...             store(y, t, real(2) * load(x, t))
    ...
    ...     return kernel
    >>> x, y = np.arange(3, dtype=np.float32), np.zeros(3, np.float32)
    >>> with interpreted(seed=1):
    ...     Kernel(doubled, threads=32).launch((1,), x.dtype, (x, y, x.size))
    >>> y.tolist()
    [0.0, 2.0, 4.0]
    """
    order = None if seed is None else random.Random(seed)

    def run(
        spec: launch.Specialization, grid: tuple[int, ...], arguments: tuple[Any, ...], shared: int
    ) -> None:
        kinds = device.arguments_of(spec.function)
        if len(kinds) != len(arguments):
            raise TypeError(f"{spec.name} takes {len(kinds)} arguments, got {len(arguments)}")
        cells: Any = {} if check else None
        given = zip(kinds.items(), arguments, strict=True)
        try:
            seen = tuple(_argument(name, kind, spec.dtype, x, cells) for (name, kind), x in given)
            _run(spec.function, grid, (spec.threads,), seen, shared, order, check)
        except Exception as error:
            error.add_note(f"in kernel {spec.name}")
            raise

    with launch.interpreted_by(run), _unwritten_outputs():
        yield


def interpret(
    kernel: Callable[..., None], grid: Any, threads: Any, *arguments: Any, seed: int | None = None, shared: int = 0,
    check: bool | str = "races",
) -> None:  # fmt: skip
    """Run one CUDA kernel on NumPy arrays.

    Parameters
    ----------
    kernel : callable
        A kernel or device function of Numba CUDA (``@cuda.jit``), or a plain function in the words of one.
    grid, threads : int or tuple of int
        Blocks of the grid and threads of a block.
    *arguments
        Arrays and numbers. A parameter annotated with a pointer of `npmamba.cuda.device` is a flat pointer, a number
        annotated ``Size`` a uint32; any other array is one of Numba's.
    seed : int, optional
        Permutes the order of blocks, warps and threads.
    shared : int
        Bytes of dynamic shared memory.
    check : "races", "strict" or False
        As for `interpreted`.

    Raises
    ------
    npmamba.testing.findings.KernelError
        At the first mistake, of the class that fits it.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.cuda.device import cuda
    >>> from npmamba.testing.interpret import interpret
    >>> def reverse(x, y):
    ...     tile = cuda.shared.array(64, np.float32)
    ...     t = cuda.threadIdx.x
    ...     tile[t] = x[t]
    ...     cuda.syncthreads()
    ...     y[t] = tile[63 - t]
    >>> x, y = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
    >>> interpret(reverse, 1, 64, x, y)
    >>> y[:3].tolist()
    [63.0, 62.0, 61.0]
    """
    function = getattr(kernel, "py_func", kernel)
    cells: Any = {} if check else None
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    if len(names) != len(arguments):
        raise TypeError(f"{function.__name__} takes {len(names)} arguments, got {len(arguments)}")
    seen = tuple(
        _numba_argument(name, str(function.__annotations__.get(name)), x, cells)
        for name, x in zip(names, arguments, strict=True)
    )
    order = None if seed is None else random.Random(seed)
    grid, threads = (tuple(np.atleast_1d(n).tolist()) for n in (grid, threads))
    _run(function, grid, threads, seen, shared, order, check)


def _numba_argument(name: str, kind: str, x: Any, cells: Any) -> Any:
    if kind in ("Data", "Wide", *_POINTERS, "Size", "Stride", "Real"):
        dtype = np.dtype(np.float32) if x is None or kind not in ("Data", "Wide") else x.dtype
        return _argument(name, "Data" if kind == "Wide" else kind, dtype, x, cells)
    if not isinstance(x, np.ndarray):
        return x
    memory = memory_of(name, x, cells)
    return Array(memory, memory.first, x.shape, tuple(s // x.itemsize for s in x.strides))
