"""The kernel interpreter: runs a CUDA kernel's Python source on NumPy arrays, one greenlet per CUDA thread.

No device, no driver, no environment variable: the same process can compile kernels and interpret them. Blocks run one
after another; the threads of a block in an order that `seed` permutes.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

try:
    import greenlet
except ImportError:
    raise ImportError(
        'the kernel interpreter runs every CUDA thread as a greenlet, and the package greenlet is missing: pip install "npmamba[fuzz]"'
    ) from None

from npmamba.cuda import device, launch
from npmamba.testing import words
from npmamba.testing.findings import DivergentBarrierError, KernelError, ShuffleError
from npmamba.testing.memory import Array, Memory, Null, Pointer, contiguous, where


class Index:
    """Three numbers x, y, z."""

    __slots__ = ("x", "y", "z")

    def __init__(self, x: int = 1, y: int = 1, z: int = 1) -> None:
        self.x, self.y, self.z = x, y, z

    def __repr__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class Thread(greenlet.greenlet):
    """One CUDA thread. `request` is what it waits for: (kind, mask, value, source lane, place)."""

    def __init__(self, block: Block, number: int, function: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__(lambda: function(*arguments))
        self.block, self.number, self.lane = block, number, number & 31
        n = block.threads
        self.index = Index(number % n.x, number // n.x % n.y, number // (n.x * n.y))
        self.request: Any = None
        self.result: Any = None
        self.arrays = 0

    def meet(self, kind: str, mask: int = words.FULL, value: Any = None, source: int = 0) -> Any:
        self.request = (kind, mask, value, source, where())
        self.parent.switch()
        return self.result

    def __repr__(self) -> str:
        return f"thread {self.index} of block {self.block.index}"


class Block:
    """The threads of a block, and what they share."""

    def __init__(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        index: Index,
        grid: Index,
        threads: Index,
        dynamic: int,
        rng: Any,
    ) -> None:
        self.index, self.grid, self.threads, self.rng = index, grid, threads, rng
        self.shared: list[Array] = []
        self.dynamic = np.zeros(dynamic, np.uint8)
        count = threads.x * threads.y * threads.z
        self.lanes = [Thread(self, k, function, arguments) for k in range(count)]
        for t in self.lanes:
            t.gr_context = contextvars.copy_context()

    def shared_array(self, thread: Thread, shape: Any, dtype: np.dtype, alignment: int | None) -> Array:
        shape = tuple(int(n) for n in shape) if isinstance(shape, (tuple, list)) else (int(shape),)
        if shape == (0,):
            flat = self.dynamic[: len(self.dynamic) // dtype.itemsize * dtype.itemsize].view(dtype)
            return Array(Memory("dynamic shared memory", flat, 0), 0, flat.shape, (1,))
        k, thread.arrays = thread.arrays, thread.arrays + 1
        if k == len(self.shared):
            low = (alignment or dtype.itemsize) // dtype.itemsize  # aligned to no more than was asked for
            flat = np.full(math.prod(shape), np.nan if dtype.kind not in "iub" else 0).astype(dtype)
            self.shared.append(
                Array(Memory(f"shared array {k + 1}", flat, low), low, shape, contiguous(shape))
            )
        return self.shared[k]

    def run(self) -> None:
        warps = [self.lanes[k : k + 32] for k in range(0, len(self.lanes), 32)]
        while True:
            if self.rng is not None:
                self.rng.shuffle(warps)
            for warp in warps:
                self._advance(warp)
            waiting = [t for t in self.lanes if not t.dead]
            if not waiting:
                return
            if len(waiting) < len(self.lanes):
                gone = next(t for t in self.lanes if t.dead)
                raise DivergentBarrierError(
                    f"{waiting[0].request[4]}: {waiting[0]} waits at a barrier, but {gone} has ended"
                )
            places = {t.request[4]: t for t in waiting}
            if len(places) > 1:
                told = ", ".join(f"{t} at {place}" for place, t in places.items())
                raise DivergentBarrierError(f"threads of one block wait at different barriers: {told}")

    def _advance(self, warp: list[Thread]) -> None:
        ready = [t for t in warp if not t.dead]
        while ready:
            if self.rng is not None:
                self.rng.shuffle(ready)
            for t in ready:
                t.request = None
                self._switch(t)
            ready = self._meet(warp)

    def _switch(self, t: Thread) -> None:
        try:
            t.switch()
        except Exception as error:
            error.add_note(f"in {t}")
            raise

    def _meet(self, warp: list[Thread]) -> list[Thread]:
        """Serve the shuffles and warp barriers whose lanes have all come; return the lanes that go on."""
        asking = [t for t in warp if not t.dead and t.request[0] != "barrier"]
        if not asking:
            return []
        for mask in {t.request[1] for t in asking}:
            group = [t for t in asking if t.request[1] == mask]
            named = [t for t in warp if mask >> t.lane & 1]
            for t in group:
                if t not in named:
                    raise ShuffleError(
                        f"{t.request[4]}: {t} calls with mask {mask:#x}, which leaves out its own lane {t.lane}"
                    )
            if len(group) == len(named) and len({(t.request[0], t.request[4]) for t in group}) == 1:
                self._serve(group)
                return group
        first = asking[0]
        missing = [
            t for t in warp if first.request[1] >> t.lane & 1 and (t.dead or t.request[4] != first.request[4])
        ]
        told = ", ".join(f"{t} {'has ended' if t.dead else 'waits at ' + t.request[4]}" for t in missing[:4])
        raise DivergentBarrierError(
            f"{first.request[4]}: {first} waits for lanes {first.request[1]:#x}, but {told}"
        )

    def _serve(self, group: list[Thread]) -> None:
        lanes = {t.lane: t for t in group}
        kind = group[0].request[0]
        if kind == "vote":
            said = {lane: t.request[2] for lane, t in lanes.items()}
            for t in group:
                t.result = said
        elif kind == "shuffle":
            for t in group:
                source = lanes.get(t.request[3])
                if source is None:
                    raise ShuffleError(
                        f"{t.request[4]}: {t} reads from lane {t.request[3]}, which is not in the mask {t.request[1]:#x}"
                    )
                t.result = source.request[2]


def _replacement(x: Any, memo: dict[Any, Any]) -> Any:
    """Return what stands for the value `x` of a name inside an interpreted kernel."""
    if x is device.cuda:
        return words.CUDA
    if isinstance(x, types.ModuleType):
        known = {"numba.cuda": words.CUDA, "math": words.MATH, "numba.cuda.libdevice": words.LIBDEVICE}
        return known.get(x.__name__, x)
    with contextlib.suppress(TypeError):
        if x in words.STAND_INS:
            return words.STAND_INS[x]
    if isinstance(x, types.FunctionType) and x.__module__ == "numba.cuda.libdevice":
        return getattr(words.LIBDEVICE, x.__name__)
    if hasattr(x, "py_func"):
        return rebind(x.py_func, memo)
    if isinstance(x, types.FunctionType) and not x.__module__.startswith(
        ("numpy", "numba", "npmamba.testing")
    ):
        return rebind(x, memo)
    return x


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def rebind(function: Any, memo: dict[Any, Any] | None = None) -> Any:
    """Return a copy of a function in which `cuda`, intrinsics and device functions are the interpreter's."""
    memo = {} if memo is None else memo
    if function in memo:
        return memo[function]
    known = dict(function.__globals__)
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    copy = types.FunctionType(
        function.__code__, known, function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    memo[function] = copy
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            cell.cell_contents = _replacement(old.cell_contents, memo)
    for name in _names(function.__code__) & known.keys():
        known[name] = _replacement(known[name], memo)
    return copy


def run(
    function: Any,
    grid: tuple[int, ...],
    threads: tuple[int, ...],
    arguments: tuple[Any, ...],
    shared: int,
    rng: Any,
) -> None:
    """Run a kernel on arguments that are pointers, arrays and numbers already."""
    size, shape = Index(*map(int, threads)), Index(*map(int, grid))
    if size.x * size.y * size.z > 1024 or shape.x >= 2**31 or max(shape.y, shape.z) > 65535:
        raise ValueError(f"no device takes a grid of {shape} blocks of {size} threads")
    copy = rebind(function)
    order = np.arange(shape.x * shape.y * shape.z)
    if rng is not None:
        rng.shuffle(order)
    with np.errstate(all="ignore"):
        for k in order.tolist():
            at = Index(k % shape.x, k // shape.x % shape.y, k // (shape.x * shape.y))
            Block(copy, arguments, at, shape, size, shared, rng).run()


_POINTERS = {"Double": np.float64, "Long": np.int64, "Flags": np.uint8}


def _argument(name: str, kind: str, dtype: np.dtype, x: Any) -> Any:
    """Return an argument of a launch as the kernel sees it."""
    wide = launch.wide_dtype(dtype)
    numbers = {"Size": np.uint32, "Stride": np.int64, "Real": wide.type}
    if kind in numbers:
        return numbers[kind](x)
    expected = np.dtype({"Data": dtype, "Wide": wide, **_POINTERS}[kind])
    if x is None:
        return Null(name, expected)
    x = x.view(np.uint8) if x.dtype == bool else x
    if x.dtype != expected:
        raise KernelError(
            f"argument {name} is annotated {kind}: the kernel expects {expected}, got {x.dtype}"
        )
    return Pointer(*Memory.of(f"argument {name}", x))


@contextlib.contextmanager
def interpreted(seed: int | None = None) -> Iterator[None]:
    """Have CUDA kernels run on NumPy arrays inside a ``with`` block.

    Parameters
    ----------
    seed : int, optional
        Permutes the order of blocks, warps and threads.
    """
    rng = None if seed is None else np.random.default_rng(seed)

    def launched(
        spec: launch.Specialization, grid: tuple[int, ...], arguments: tuple[Any, ...], shared: int
    ) -> None:
        kinds = {name: str(a) for name, a in spec.function.__annotations__.items() if name != "return"}
        if len(kinds) != len(arguments):
            raise TypeError(f"{spec.name} takes {len(kinds)} arguments, got {len(arguments)}")
        seen = tuple(
            _argument(n, k, spec.dtype, x) for (n, k), x in zip(kinds.items(), arguments, strict=True)
        )
        try:
            run(spec.function, grid, (spec.threads,), seen, shared, rng)
        except Exception as error:
            error.add_note(f"in kernel {spec.name}")
            raise

    with launch.interpreted_by(launched):
        yield


def interpret(
    kernel: Callable[..., None],
    grid: Any,
    threads: Any,
    *arguments: Any,
    seed: int | None = None,
    shared: int = 0,
) -> None:
    """Run a Numba CUDA kernel, or a plain function in its words, on NumPy arrays."""
    function = getattr(kernel, "py_func", kernel)
    names = function.__code__.co_varnames
    seen = []
    for name, x in zip(names, arguments, strict=False):
        if isinstance(x, np.ndarray):
            memory, first = Memory.of(f"argument {name}", x)
            x = Array(memory, first, x.shape, tuple(s // x.itemsize for s in x.strides))
        seen.append(x)
    rng = None if seed is None else np.random.default_rng(seed)
    run(function, tuple(np.atleast_1d(grid)), tuple(np.atleast_1d(threads)), tuple(seen), shared, rng)
