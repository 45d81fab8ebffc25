"""How a CUDA kernel is declared, compiled, kept and launched: Numba compiles, CuPy launches.

A kernel is declared by the function that builds it for given constants::

    def _forward(real, width):
        def rms_norm_forward(x: Data, weight: Wide, y: Data, rows: Size):
            ...
        return rms_norm_forward

    FORWARD = Kernel(_forward, threads=256, shipped={"width": (768, 1024)})
    FORWARD.launch(grid, x.dtype, (x, weight, y, rows), width=768)

`real` is the dtype it computes in; the others are closure constants, so loops over them unroll. Each combination is
compiled once, kept on disk, and launched on CuPy's current stream: a few microseconds where Numba's own launch of CuPy
arrays takes 150. A launch returns at once. What it does wrong in itself raises there; what the kernel does wrong, such
as an access outside its arrays, raises at the next call that waits for the device, and at every one after that.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by name once this is loaded)
import numpy as np

from npmamba.cuda.device import wide_dtype
from npmamba.cuda.machine import Loaded, current_device
from npmamba.cuda.stand_in import StandIn

KERNELS: list[Kernel] = []
FLOATS = ("float16", "bfloat16", "float32", "float64")
_COMPILER = ("compile", "intrinsics", "translate")
"""Modules that need Numba's CUDA compiler; none declares a kernel."""
_LIMITS = (2**31 - 1, 65_535, 65_535)
"""Blocks that a grid may have along x, y and z."""


class Specialization(NamedTuple):
    """One kernel for one dtype and one set of constants: what the compiler and the interpreter are given."""

    function: Callable[..., None]
    name: str
    dtype: np.dtype
    threads: int
    blocks: int


Groups = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Run = Callable[[Specialization, tuple[int, ...], tuple[Any, ...], int], None]
_interpreter: Run | None = None


@contextlib.contextmanager
def interpreted_by(run: Run) -> Iterator[None]:
    """Have all kernels run by `run` instead of a device: the twins then work on NumPy arrays."""
    global _interpreter
    before, _interpreter = _interpreter, run
    try:
        yield
    finally:
        _interpreter = before


def is_interpreting() -> bool:
    """Tell whether kernels run elsewhere than on a device."""
    return _interpreter is not None


class Kernel:
    """A CUDA kernel, compiled for one dtype and one set of constants at a time.

    Parameters
    ----------
    build : callable
        ``build(real, **constants)`` returns the kernel as a Python function annotated with the words of
        `npmamba.cuda.device`. With a parameter ``data`` it is also given the dtype of the arrays.
    threads : int or callable
        Threads of a block, or a function of the constants that returns them.
    blocks : int or callable
        Blocks that are to fit on one multiprocessor together, likewise; bounds the registers. 1 leaves them free.
    shipped : mapping or sequence of mappings, or a function of the dtype that returns such, optional
        The values of each constant that the package uses, in every combination; several mappings are used side by
        side. Others are refused, so that what runs is what the tests have compiled. Without it anything goes.
    dtypes : sequence of str
        The dtypes that the package uses.
    others : bool
        Whether other constants may be used too, and what is shipped are examples for the tests: where sizes and options
        of a call are constants of its kernel, there are too many to compile them all.
    """

    def __init__(
        self,
        build: Callable[..., Any],
        threads: int | Callable[..., int],
        blocks: int | Callable[..., int] = 1,
        *,
        shipped: Groups | Callable[[np.dtype], Groups] | None = None,
        dtypes: Sequence[str] = FLOATS,
        others: bool = False,
    ) -> None:
        self.build, self.threads, self.blocks, self.dtypes, self.others = build, threads, blocks, dtypes, others
        self.shipped: dict[str, list[dict[str, Any]]] | None = None
        if shipped is not None:
            groups = {name: shipped(np.dtype(name)) if callable(shipped) else shipped for name in dtypes}
            self.shipped = {name: _combinations(group) for name, group in groups.items()}
        self.name = f"{build.__module__.rsplit('.', 1)[-1]}.{build.__name__.lstrip('_')}"
        given = build.__code__.co_varnames[: build.__code__.co_argcount]
        self.constants = tuple(name for name in given if name not in ("real", "data"))
        self._wants_data = "data" in given
        self._loaded: dict[Any, Loaded] = {}
        KERNELS.append(self)

    def specialize(self, dtype: Any, **constants: Any) -> Specialization:
        """Return the kernel as a Python function for one dtype and one set of constants.

        Raises
        ------
        ValueError
            If the kernel says what it ships, and this is not of it.
        """
        dtype = np.dtype(dtype)
        told = "".join(f"-{name}={value}" for name, value in sorted(constants.items()))
        name = f"{self.name}-{dtype}{told}"
        if self.shipped is not None and not self.others and constants not in self.shipped.get(dtype.name, ()):
            raise ValueError(f"{name} is not among the kernels that are shipped; its declaration says which are")
        data = {"data": dtype} if self._wants_data else {}
        function = self.build(wide_dtype(dtype), **data, **constants)
        threads, blocks = (n if isinstance(n, int) else n(**constants) for n in (self.threads, self.blocks))
        return Specialization(function, name, dtype, threads, blocks)

    def specializations(self) -> list[Specialization]:
        """Return all that are shipped."""
        return [self.specialize(dtype, **chosen) for dtype, group in (self.shipped or {}).items() for chosen in group]

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

        Raises
        ------
        ValueError
            If the grid is larger than CUDA allows, or an array lies on another device than the current one.
        OverflowError
            If a number does not fit its argument.
        CudaUnavailableError
            If a piece of the CUDA installation is missing or does not fit.
        """
        if 0 in grid:
            return
        if max(grid) > _LIMITS[1] or min(grid) < 0:
            _check_grid(self.name, grid)
        if _interpreter is not None:
            return _interpreter(self.specialize(dtype, **constants), grid, arguments, shared)
        for x in arguments:
            if type(x) is StandIn:
                return x.library.launch(self, grid, dtype, arguments, shared, constants)
        loaded = self.loaded(dtype, shared, constants)
        loaded.function(grid, loaded.threads, loaded.convert(arguments), shared)

    def loaded(self, dtype: Any, shared: int, constants: dict[str, Any]) -> Loaded:
        """Return the kernel on the current device, allowed as many bytes of dynamic shared memory."""
        key = (dtype, current_device(), *constants.items())
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = Loaded(self.specialize(dtype, **constants))
        if shared > loaded.shared:
            loaded.allow(shared)
        return loaded


def declared() -> list[Kernel]:
    """Import every module of this folder that may declare kernels, and return all of this package's kernels."""
    package = importlib.import_module("npmamba.cuda")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _COMPILER:
            importlib.import_module(f"npmamba.cuda.{module.name}")
    return [kernel for kernel in KERNELS if kernel.build.__module__.startswith("npmamba.cuda.")]


def _combinations(shipped: Groups) -> list[dict[str, Any]]:
    found = []
    for group in [shipped] if isinstance(shipped, Mapping) else shipped:
        values = [choice if isinstance(choice, tuple) else (choice,) for choice in group.values()]
        found += [dict(zip(group, chosen, strict=True)) for chosen in itertools.product(*values)]
    return found


def _check_grid(name: str, grid: tuple[int, ...]) -> None:
    for axis, blocks, limit in zip("xyz", grid, _LIMITS, strict=False):
        if not 0 <= blocks <= limit:
            raise ValueError(f"{name}: a CUDA grid has at most {limit:,} blocks along {axis}, got {blocks:,}")
