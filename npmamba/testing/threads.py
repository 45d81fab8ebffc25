"""Threads, warps and blocks: who runs when, who waits for whom, and what a barrier orders."""

from __future__ import annotations

import contextvars
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import greenlet
import numpy as np

from npmamba.testing.findings import DivergentBarrierError, KernelError, ShuffleError, called, line_of, party
from npmamba.testing.shadow import Memory
from npmamba.testing.views import Array, strides_of, variable

T = TypeVar("T")


class Index(NamedTuple):
    """Three numbers x, y, z."""

    x: int = 1
    y: int = 1
    z: int = 1

    def total(self) -> int:
        return self.x * self.y * self.z

    def at(self, k: int) -> Index:
        """Return the k-th place of a grid of this size, x first."""
        return Index(k % self.x, k // self.x % self.y, k // (self.x * self.y))


class Launch(NamedTuple):
    """What all blocks of one launch share."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    grid: Index
    threads: Index
    shared: int
    places: tuple[Index, ...]
    check: bool
    shuffles_order: bool
    random: random.Random | None

    def order(self, items: Sequence[T]) -> Sequence[T]:
        """Return a few things in the order of this schedule."""
        return items if self.random is None else self.random.sample(items, len(items))


class Thread(greenlet.greenlet):
    """One CUDA thread.

    While it waits, `request` says for what, (kind, mask, code, instruction, calls that led there), with its `value`,
    and the lane that it reads from in `source`; without a request it has ended. For `time`, `start` and the floors see
    `npmamba.testing.shadow`; `seen` has later floors for some lanes, from barriers of a part of the warp.
    """

    def __init__(self, block: Block, warp: Warp, number: int, time: int) -> None:
        super().__init__()
        self.block, self.warp, self.lane, self.index = block, warp, number & 31, block.launch.places[number]
        self.time = self.start = self.floor = self.warp_floor = time
        self.seen: dict[int, int] = {}
        self.request: Any = None
        self.value: Any = None
        self.source, self.result = 0, None  # type: int, Any
        self.copies: list[Any] = []
        self.groups: list[list[Any]] = []
        self.gr_context = contextvars.copy_context()  # NumPy keeps there whether it warns of overflow

    def run(self) -> None:
        self.block.launch.function(*self.block.launch.arguments)

    def at(self) -> str:
        """Say which thread it is and where it waits."""
        if self.request is None:
            return f"{called(self.index, self.block.index)}, which has ended"
        return str(party(self, *self.request[2:4]))


class Warp:
    """Up to 32 threads that exchange numbers."""

    def __init__(self, block: Block, numbers: range) -> None:
        self.block = block
        self.threads = [Thread(block, self, k, block.time) for k in numbers]
        self.lanes = (1 << len(self.threads)) - 1

    def advance(self) -> None:
        """Run all threads until they have ended or wait at a barrier of the block."""
        ready = self.threads
        while ready:
            for thread in self.block.launch.order(ready):
                thread.request = None
                try:
                    thread.switch()
                except Exception as error:
                    if not isinstance(error, KernelError):
                        error.add_note(f"in {called(thread.index, self.block.index)}")
                    raise
            ready = self._meet()

    def _meet(self) -> list[Thread]:
        """Serve those whose partners have all come, and return them."""
        first = self.threads[0].request
        uniform = all([t.request == first for t in self.threads])
        if uniform and (first is None or first[0] == "barrier"):
            return []
        if uniform and first[1] & self.lanes == self.lanes:
            return self._serve(first[0], self.threads, whole=True)
        waiting = [t for t in self.threads if t.request is not None and t.request[0] != "barrier"]
        for request in [t.request for t in waiting]:
            group = [t for t in waiting if t.request == request]
            for thread in group:
                if not request[1] >> thread.lane & 1:
                    here = party(thread, *request[2:4])
                    raise ShuffleError(
                        f"mask {request[1]:#x} leaves out the calling lane: {here}", parties=(here,)
                    )
            if sum(1 << t.lane for t in group) == request[1] & self.lanes:
                return self._serve(request[0], group, whole=len(group) == len(self.threads))
        if waiting:
            self._diverged(waiting[0])
        return []

    def _diverged(self, thread: Thread) -> NoReturn:
        request = thread.request
        others = [t for t in self.threads if request[1] >> t.lane & 1 and t.request != request]
        parties = tuple(party(t, *t.request[2:4]) for t in (thread, others[0]) if t.request is not None)
        message = f"{thread.at()} waits for lanes {request[1]:#x}; it misses {others[0].at()}"
        raise DivergentBarrierError(message, parties=parties)

    def _serve(self, kind: str, group: list[Thread], whole: bool) -> list[Thread]:
        if kind == "shuffle":
            values = {t.lane: t.value for t in group}
            for t in group:
                if t.source not in values:
                    self._foreign(t)
                t.result = values[t.source]
        elif kind == "vote":
            said = {t.lane: t.value for t in group}
            for t in group:
                t.result = said
        if kind != "shuffle" or self.block.launch.shuffles_order:
            self._order(group, whole)
        return group

    def _foreign(self, thread: Thread) -> NoReturn:
        here = party(thread, *thread.request[2:4])
        mask = thread.request[1] & self.lanes
        message = f"a shuffle reads from lane {thread.source}, which is not among the lanes {mask:#x}: {here}"
        raise ShuffleError(message, parties=(here,))

    def _order(self, group: list[Thread], whole: bool) -> None:
        """What the group did so far comes before what any of it does from now on."""
        self.block.time += 1
        time = self.block.time
        seen: dict[int, int] = {}
        if not whole:
            for t in group:
                seen |= {lane: max(then, seen.get(lane, 0)) for lane, then in t.seen.items()}
            seen |= {t.lane: time for t in group}
        for t in group:
            t.time, t.seen = time, seen
            if whole:
                t.warp_floor = time


class Block:
    """A block of threads, its shared memory and its clock."""

    def __init__(self, launch: Launch, index: Index, time: int) -> None:
        self.launch, self.index, self.time = launch, index, time
        self.after: set[Block] = set()  # blocks that came before, as atomic operations on one element tell
        self._arrays: dict[Any, Array] = {}
        self._dynamic = np.zeros(launch.shared, np.uint8)
        self._cells: dict[int, dict[int, Any]] = {}
        count = launch.threads.total()
        self.warps = [Warp(self, range(k, min(k + 32, count))) for k in range(0, count, 32)]

    def run(self) -> int:
        """Run all threads to their ends and return the time."""
        while True:
            for warp in self.launch.order(self.warps):
                warp.advance()
            threads = [t for warp in self.warps for t in warp.threads]
            first = threads[0]
            other = next((t for t in threads if t.request != first.request), None)
            if other is not None:
                self._diverged(*((first, other) if first.request else (other, first)))
            if first.request is None:
                return self.time + 1
            self._barrier(threads)

    def _barrier(self, threads: list[Thread]) -> None:
        self.time += 1
        said = [t.value for t in threads]
        for t in threads:
            t.time = t.floor = t.warp_floor = self.time
            t.seen, t.result = {}, said

    def _diverged(self, thread: Thread, other: Thread) -> NoReturn:
        parties = tuple(party(t, *t.request[2:4]) for t in (thread, other) if t.request is not None)
        message = f"{thread.at()} waits at a barrier for all threads; it misses {other.at()}"
        raise DivergentBarrierError(message, parties=parties)

    def shared_array(
        self, frame: Any, shape: tuple[int, ...], dtype: np.dtype, alignment: int | None
    ) -> Array:
        """Return the shared array of a call of ``cuda.shared.array``, the same one for all threads."""
        key = id(frame.f_globals), frame.f_code, frame.f_lasti, shape, dtype
        if key not in self._arrays:
            self._arrays[key] = self._new_array(key, alignment or dtype.itemsize)
        return self._arrays[key]

    def _new_array(self, key: Any, alignment: int) -> Array:
        *_, code, instruction, shape, dtype = key
        name = f"shared array {variable(code, instruction)}"
        # an odd multiple of the alignment that was asked for: nothing is aligned better by luck
        low, cells = max(1, alignment // dtype.itemsize), dict[int, Any]()
        if shape == (0,):
            count = len(self._dynamic) // dtype.itemsize
            shape, flat, low = (count,), self._dynamic[: count * dtype.itemsize].view(dtype), 16
            cells = self._cells.setdefault(dtype.itemsize, cells)
        else:
            if any(k[1:3] == (code, instruction) and k[0] == key[0] for k in self._arrays):
                line = line_of(code, instruction)
                raise KernelError(f"{name} (line {line}) has another shape or dtype in another thread", name)
            flat = np.full(shape, np.nan if dtype.kind not in "iub" else 0, dtype).reshape(-1)
        memory = Memory(name, flat, low, cells if self.launch.check else None, fresh=True)
        return Array(memory, low, shape, strides_of(shape))
