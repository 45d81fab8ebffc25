"""The host side of a CUDA twin, run once for each kind of call and replayed for all others.

What a twin does on the host (which kernels, on what grid, where each result lies) follows from the shapes, strides and
dtypes of its arguments, never from the numbers in them. It takes Python a hundred microseconds, longer than a GPU needs
for a small scan. So `replayed` runs a twin once on stand-ins, which have a shape and a place but no memory, and writes
down its allocations and launches. A later call of that kind allocates, fills in addresses and launches::

    @replayed
    def forward(x, weight, *, eps, save):
        y = empty(x, x.shape, x.dtype)
        FORWARD.launch(grid, x.dtype, (x, weight, y, *x.shape, eps))
        return y, (x, weight) if save else None

A twin that asks an array for more than views and places, such as its numbers or a copy, is not replayed: then its host
code runs at every call. So it does under the kernel interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda import launch
from npmamba.cuda.machine import current_device
from npmamba.cuda.stand_in import ALIGNMENT, NotReplayable, StandIn

LIMIT = 1024
"""Kinds of calls that are remembered for one twin: lengths that vary for ever must not fill the memory."""
_REMEMBERED: list[dict[Any, Any]] = []
_off = False


class Launch(NamedTuple):
    """A launch with holes where addresses belong."""

    function: Any
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared: int
    arguments: list[Any]
    holes: list[tuple[int, int, int]]
    """(number of the argument, number of its source, bytes from where the source begins)"""


class Plan(NamedTuple):
    """What a twin does for one kind of call. Sources are the arrays among its arguments, then its allocations."""

    launches: list[Launch]
    allocations: list[int]
    """Bytes of each."""
    build: Callable[[Any, Any], Any]
    """Maps (arrays among the arguments, memory allocated) to what the twin returns."""

    def run(self, cupy: Any, arrays: list[Any]) -> Any:
        """Allocate, launch, and return what the twin returns."""
        alloc = cupy.cuda.alloc
        memory = [alloc(size) if size else None for size in self.allocations]
        places = [x.data.ptr for x in arrays] + [m.ptr if m else 0 for m in memory]
        for function, grid, threads, shared, template, holes in self.launches:
            arguments = template.copy()
            for i, source, offset in holes:
                arguments[i] = places[source] + offset
            function(grid, threads, arguments, shared)
        return self.build(arrays, memory)


class Trace:
    """The library of stand-ins: takes down what is allocated and launched."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.sources, self.given = cupy, 0, 0
        self.launches: list[Launch] = []
        self.allocations: list[int] = []

    def stand_in(self, x: Any) -> StandIn:
        """Return what stands for the next array among the arguments."""
        self.sources, self.given = self.sources + 1, self.given + 1
        return StandIn(self, self.given - 1, x.shape, x.strides, x.dtype, x.data.ptr, x.data.device_id)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> StandIn:
        strides, size = [], np.dtype(dtype).itemsize
        for n in reversed(shape):
            strides.append(size)
            size *= n
        self.allocations.append(size)
        self.sources += 1
        return StandIn(self, self.sources - 1, shape, tuple(reversed(strides)), dtype, 0, current_device())

    def ascontiguousarray(self, x: StandIn) -> StandIn:
        if not x.flags.c_contiguous:
            raise NotReplayable("a copy")
        return x

    def __getattr__(self, name: str) -> Any:
        raise NotReplayable(name)

    def launch(
        self, kernel: launch.Kernel, grid: tuple[int, ...], dtype: Any, arguments: tuple[Any, ...], shared: int,
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        loaded = kernel.loaded(dtype, shared, constants)
        template = list(loaded.convert(arguments))
        holes = []
        for i in loaded.pointers:
            x = arguments[i]
            if isinstance(x, StandIn):
                template[i] = None
                holes.append((i, x.source, x.offset))
            elif x is not None:
                raise NotReplayable("an array of the host code's own")
        self.launches.append(Launch(loaded.function, grid, loaded.threads, shared, template, holes))


def _kind(parts: Any, arrays: list[Any], array: type) -> tuple[Any, ...]:
    """Return what of some arguments decides what the host code does; append the arrays among them."""
    found: list[Any] = []
    for x in parts:
        if type(x) is array:
            arrays.append(x)
            data = x.data
            found.append((x.shape, x.strides, x.dtype, data.ptr % ALIGNMENT, data.device_id))
        elif isinstance(x, tuple):
            found.append((type(x), _kind(x, arrays, array)))
        elif isinstance(x, dict):
            found.append((*x, _kind(x.values(), arrays, array)))
        else:
            found.append(x)
    return tuple(found)


def _call(arguments: tuple[Any, ...], options: dict[str, Any], arrays: list[Any], array: type) -> tuple[Any, ...]:
    """Return what a call is known by. Options count with their types: a check tells 1 from True."""
    chosen = options.values()
    return current_device(), *options, *map(type, chosen), _kind((*arguments, *chosen), arrays, array)


def _replace(x: Any, trace: Trace, array: type) -> Any:
    """Return an argument with stand-ins for its arrays, which are met in the order of `_kind`."""
    if type(x) is array:
        return trace.stand_in(x)
    if isinstance(x, tuple):
        return _tuple(type(x), [_replace(part, trace, array) for part in x])
    if isinstance(x, dict):
        return {name: _replace(part, trace, array) for name, part in x.items()}
    return x


def _tuple(kind: Any, parts: list[Any]) -> Any:
    return kind._make(parts) if hasattr(kind, "_make") else kind(parts)


def _builder(x: Any, trace: Trace) -> Callable[[Any, Any], Any]:
    """Return the function that makes a result like `x`, a tree with stand-ins, from arrays and memory."""
    if isinstance(x, StandIn):
        return _array_builder(x, trace)
    if isinstance(x, tuple):
        kind, parts = type(x), [_builder(part, trace) for part in x]
        make = getattr(kind, "_make", kind)
        return lambda arrays, memory: make([part(arrays, memory) for part in parts])
    if isinstance(x, dict):
        named = [(name, _builder(part, trace)) for name, part in x.items()]
        return lambda arrays, memory: {name: part(arrays, memory) for name, part in named}
    return lambda arrays, memory: x


def _array_builder(x: StandIn, trace: Trace) -> Callable[[Any, Any], Any]:
    array, shape, strides, dtype, offset = trace.cupy.ndarray, x.shape, x.strides, x.dtype, x.offset
    source, own = x.source, x.source - trace.given
    if own >= 0 and x.nbytes == 0:
        return lambda arrays, memory: trace.cupy.empty(shape, dtype)
    if own >= 0:
        return lambda arrays, memory: array(shape, dtype, memory[own] + offset, strides)

    def of_argument(arrays, memory):
        given = arrays[source]
        same = offset == 0 and given.shape == shape and given.strides == strides and given.dtype == dtype
        return given if same else array(shape, dtype, given.data + offset, strides)

    return of_argument


def trace(function: Callable[..., Any], arguments: Any, options: Any, cupy: Any) -> Plan | None:
    """Return what the host code of a twin does for arguments like these, or None if it cannot be replayed."""
    tracing = Trace(cupy)
    stand_ins, chosen = (_replace(x, tracing, cupy.ndarray) for x in (arguments, options))
    try:
        result = function(*stand_ins, **chosen)
        return Plan(tracing.launches, tracing.allocations, _builder(result, tracing))
    except (NotReplayable, TypeError):  # TypeError: an operator that stand-ins lack, or a mistake that will show again
        return None


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a twin: its host code runs once for every kind of call, unless it needs more than views of its arrays.

    What it does must follow from shapes, strides, dtypes and options. Options are numbers and strings that few calls
    differ in, as every combination is remembered.

    ``again(arguments, options)`` of the decorated twin returns its results if it was called so before, else None: what
    was found right once needs no second check.
    """
    plans: dict[Any, Plan | None] = {}
    _REMEMBERED.append(plans)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        cupy = sys.modules.get("cupy")
        if _off or cupy is None or launch.is_interpreting():
            return function(*arguments, **options)
        arrays: list[Any] = []
        kind = _call(arguments, options, arrays, cupy.ndarray)
        try:
            plan = plans[kind]
        except KeyError:
            if len(plans) >= LIMIT:
                plans.clear()
            plan = plans[kind] = trace(function, arguments, options, cupy)
        return plan.run(cupy, arrays) if plan else function(*arguments, **options)

    def again(arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if _off:
            return None
        arrays: list[Any] = []
        cupy = sys.modules["cupy"]
        try:
            plan = plans.get(_call(arguments, options, arrays, cupy.ndarray))
        except TypeError:  # what cannot be hashed is no argument of any twin
            return None
        return plan.run(cupy, arrays) if plan else None

    call.again = again  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Run all host code at every call, for one who watches or replaces what it calls; no plan is made of that."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def forget() -> None:
    """Forget all plans, as a test must that changes what the host code does."""
    for plans in _REMEMBERED:
        plans.clear()
