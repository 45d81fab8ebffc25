"""Memory with a shadow: for every element, who wrote it last, who has read it since, and where in the kernel.

Two accesses of one element, at least one of them a write, must be ordered: by a barrier of the block, or within a warp
by a warp barrier. Every thread has a `time`, the number of the last barrier or shuffle it took part in; an access is
recorded with the time of its thread. For a thread that comes later, what was done in its block before its last barrier
has a time from `start` up to, not including, its `floor`; accesses of other blocks have a time before `start`.
"""

from __future__ import annotations

import math
import sys
import weakref
from typing import Any, NoReturn

import numpy as np
from greenlet import getcurrent
from numpy.lib.stride_tricks import as_strided

from npmamba.testing.findings import KernelError, OutOfRangeError, RaceError, UninitializedReadError, party

_getframe = sys._getframe
_FILL = {
    1: 0xA5,
    2: 0x7FDA,
    4: 0x7FE1DEAD,
    8: 0x7FFC1EADDEADBEEF,
}  # NaN as a float, unlikely as anything else
_UNWRITTEN: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()


class Copy:
    """Sixteen bytes on their way to shared memory: until they are waited for, nobody may touch their elements."""

    __slots__ = ("first", "memory", "site", "thread", "values")

    def __init__(self, thread: Any, memory: Memory, first: int, values: list[Any], frame: Any) -> None:
        self.thread, self.memory, self.first, self.values = thread, memory, first, values
        self.site = frame.f_code, frame.f_lasti

    def start(self) -> None:
        for k in range(self.first, self.first + len(self.values)):
            self.memory.record_write(k, self.thread, self.site, (self, math.inf, *self.site))

    def land(self) -> None:
        for k, value in enumerate(self.values, self.first):
            self.memory.flat[k - self.memory.low] = value
            if self.memory.cells is not None:
                self.memory.cells[k] = [(self.thread, self.thread.time, *self.site), None, None]


class Memory:
    """Elements of one dtype that lie one behind the other.

    Elements are numbered by their address over their size: `low` is the number of the first. `valid` tells which ones
    belong to the argument, where it is a view with gaps. An entry of `cells`, the shadow, holds the last write, the
    last read, and a second read that is of another block, warp or thread if there was one: (thread, time, code,
    instruction) each. These two stand for all: a write that is ordered after both is ordered after every read.
    """

    def __init__(
        self, name: str, flat: np.ndarray, low: int, cells: dict[int, Any] | None, fresh: bool
    ) -> None:
        self.name, self.flat, self.low, self.cells, self.fresh = name, flat, low, cells, fresh
        self.count, self.dtype = len(flat), flat.dtype
        self.first = low
        self.shape: tuple[int, ...] = (self.count,)
        self.strides: tuple[int, ...] = (1,)
        self.valid: bytes | None = None
        self.fill: bytes | None = None

    def read(self, k: int) -> Any:
        """Return element `k` for the running thread; called by a function that the kernel called."""
        n = k - self.low
        if not 0 <= n < self.count or (self.valid is not None and not self.valid[n]):
            self.outside(k)
        if self.cells is not None:
            thread: Any = getcurrent()
            cell = self.cells.get(k)
            if cell is None:
                if self.fresh:
                    self._unwritten(k, thread)
                frame = _getframe(2)
                self.cells[k] = [None, (thread, thread.time, frame.f_code, frame.f_lasti), None]
            else:
                write, read, _ = cell
                if (
                    write is not None
                    and write[0] is not thread
                    and not thread.start <= write[1] < thread.floor
                ):
                    self._must_be_ordered(k, write, thread, "read", "written")
                if read is None or read[0] is not thread or read[1] != thread.time:
                    frame = _getframe(2)
                    self._record_read(cell, thread, (thread, thread.time, frame.f_code, frame.f_lasti))
        x = self.flat[n]
        if self.fill is not None and x.tobytes() == self.fill:
            self._unwritten(k, getcurrent())
        return x

    def write(self, k: int, value: Any) -> None:
        """Set element `k` for the running thread; called by a function that the kernel called."""
        n = k - self.low
        if not 0 <= n < self.count or (self.valid is not None and not self.valid[n]):
            self.outside(k)
        if self.cells is not None:
            thread: Any = getcurrent()
            frame = _getframe(2)
            site = frame.f_code, frame.f_lasti
            self.record_write(k, thread, site, (thread, thread.time, *site))
        self.flat[n] = value

    def record_write(self, k: int, thread: Any, site: Any, access: Any) -> None:
        """Check that a write is ordered after all earlier accesses, and remember it as `access`."""
        if self.cells is None:
            return
        cell = self.cells.get(k)
        if cell is None:
            self.cells[k] = [access, None, None]
            return
        for before, verb in zip(cell, ("written", "read", "read"), strict=True):
            if (
                before is not None
                and before[0] is not thread
                and not thread.start <= before[1] < thread.floor
            ):
                self._must_be_ordered(k, before, thread, "written", verb, site)
        cell[0], cell[1], cell[2] = access, None, None

    @staticmethod
    def _record_read(cell: list[Any], thread: Any, access: Any) -> None:
        _, read, other = cell
        if read is not None and read[0] is not thread:
            elsewhere = other is not None and (
                other[1] < thread.start or (other[1] >= thread.floor and other[0].warp is not thread.warp)
            )
            if not elsewhere:
                cell[2] = read
        cell[1] = access

    def _must_be_ordered(self, k: int, before: Any, thread: Any, now: str, then: str, site: Any = ()) -> None:
        other, time, *there = before[:4]
        copied = isinstance(other, Copy)
        if copied:
            other = other.thread
        elif other.block is thread.block and other.warp is thread.warp:
            if time < thread.warp_floor or time < thread.seen.get(other.lane, 0):
                return
        elif other.block in thread.block.after:
            return
        if copied:
            why = "and that copy_async was not waited for by its thread"
        elif other.block is thread.block:
            why = "with no barrier between the two"
        else:
            why = "and nothing orders blocks"
        here, there_party = party(thread, *site), party(other, *there)
        message = f"{self.describe(k)} is {now} by {here}, {then} by {there_party}, {why}"
        raise RaceError(message, self.name, k - self.first, (here, there_party))

    def _unwritten(self, k: int, thread: Any) -> NoReturn:
        here = party(thread)
        message = f"{self.describe(k)} is read by {here}, but nobody wrote it"
        raise UninitializedReadError(message, self.name, k - self.first, (here,))

    def exchange(self, k: int, change: Any) -> Any:
        """Replace element `k` in one step and return what it was.

        Such steps do not race with each other, and a block that takes one comes after the blocks that took one before:
        it may read what they wrote. (That they called ``threadfence`` in between is not checked.)
        """
        n = k - self.low
        if not 0 <= n < self.count or (self.valid is not None and not self.valid[n]):
            self.outside(k)
        old = self.flat[n]
        if self.cells is not None:
            thread: Any = getcurrent()
            frame = _getframe(2)
            site = frame.f_code, frame.f_lasti
            cell, earlier = self.cells.get(k), set()
            if cell is not None and cell[0] is not None and len(cell[0]) == 5:
                earlier, cell[0] = cell[0][4], None
            thread.block.after |= earlier
            self.record_write(k, thread, site, (thread, thread.time, *site, thread.block.after | {thread.block}))
        self.flat[n] = change(old)
        return old

    def within(self, k: int, count: int) -> None:
        """Check that `count` elements from `k` on are there."""
        if not self.low <= k <= self.low + self.count - count:
            self.outside(k + count - 1)

    def outside(self, k: int) -> NoReturn:
        """Raise the error of an access to element `k`, which is not there."""
        here = party(getcurrent())
        inside = self.low <= k < self.low + self.count
        why = "lies between the rows of the array" if inside else f"is outside its {self.count} elements"
        if k - self.first >= 2**31:
            why += f" (it is {k - self.first - 2**32} as a signed number)"
        raise OutOfRangeError(f"{self.name}[{k - self.first}] {why}: {here}", self.name, k - self.first, (here,))

    def describe(self, k: int) -> str:
        """Return what a message calls element `k`: its offset, and its place where the array has several axes."""
        told, rest, place = f"{self.name}[{k - self.first}]", k - self.first, [0] * len(self.shape)
        if len(self.shape) < 2 or min(self.strides) <= 0:
            return told
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            place[axis], rest = divmod(rest, self.strides[axis])
        return f"{told}, element {tuple(place)},"


def memory_of(name: str, x: np.ndarray, cells: dict[int, dict[int, Any]] | None) -> Memory:
    """Return the memory of an argument; its `first` is the number of the view's first element.

    Parameters
    ----------
    name : str
    x : ndarray, any strides that are multiples of its element size
    cells : dict or None
        The launch's shadow by element size; arguments that overlap share it. None records nothing.
    """
    size = x.itemsize
    if any(s % size for s in x.strides) or x.ctypes.data % size:
        raise KernelError(
            f"{name}: its strides {x.strides} or its address are no multiples of {size} bytes", name
        )
    first = x.ctypes.data // size
    steps = [(n - 1) * (s // size) for n, s in zip(x.shape, x.strides, strict=True)] if x.size else []
    below, span = -sum(s for s in steps if s < 0), 1 + sum(abs(s) for s in steps)
    lowest = x[(..., *(slice(-1, None) if s < 0 else slice(0, 1) for s in steps))]
    flat = as_strided(lowest, (span,), (size,)) if x.size else x.reshape(-1)
    own = None if cells is None else cells.setdefault(size, {})
    memory = Memory(name, flat, first - below, own, fresh=False)
    memory.first, memory.shape, memory.strides = first, x.shape, tuple(s // size for s in x.strides)
    if x.size and span != x.size:
        memory.valid = _members(x, span, below)
    root = x
    while isinstance(root.base, np.ndarray):
        root = root.base
    if size > 1 and _UNWRITTEN.get(id(root)) is root:
        memory.fill = _FILL[size].to_bytes(size, sys.byteorder)
    return memory


def _members(x: np.ndarray, span: int, below: int) -> bytes:
    """Return one byte per element of the span of memory of `x`: whether it belongs to `x`."""
    member = np.zeros(span, np.uint8)
    as_strided(member[below:], x.shape, tuple(s // x.itemsize for s in x.strides))[...] = 1
    return member.tobytes()


def unwritten(shape: Any, dtype: Any) -> np.ndarray:
    """Return an array in which a kernel that reads an element before it is written is found out; floats are NaN."""
    dtype = np.dtype(dtype)
    if dtype.itemsize not in _FILL:
        return np.zeros(shape, dtype)
    root = np.full(shape, _FILL[dtype.itemsize], f"u{dtype.itemsize}")
    _UNWRITTEN[id(root)] = root
    return root.view(dtype)


def empty(like: Any, shape: Any, dtype: Any) -> Any:
    """Stand in for `npmamba.cuda.arrays.empty`: its code is put into that function, where `sys` is known."""
    return sys.modules["npmamba.testing.shadow"].unwritten(shape, dtype)
