"""The parts of the CUDA selective scan that forward and backward share: who owns what, and how a tile comes and goes.

A channel's states are split over `lanes` threads of a warp (`make_place` tells which), `states` to each, and so is the
work that belongs to a time step alone: by turns each lane prepares a step of the tile (softplus, delta u) and finishes
one (gate, store). A block owns ``THREADS / lanes`` channels and walks through time in tiles; the next tile is on its
way from memory while this one is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.device import copy_async, cuda, load, load2, load4, load8, shift, store
from npmamba.cuda.schedule import ABSENT
from npmamba.scalar import cast, select

uint32, int64 = np.uint32, np.int64
THREADS = 128
LINE = 16
"""Bytes of the widest access; rows of a tile in shared memory begin at multiples of it."""
LOG2E = 1.4426950408889634

SOFTPLUS, SKIP, BIAS, ENTERING = 1, 2, 4, 8
"""Bits of a kernel's `flags`: what is asked for, and which optional arguments are there."""


class Shape(NamedTuple):
    """How the states of a channel and the steps of a tile are divided."""

    dstate: int
    states: int
    """States of a lane."""
    lanes: int
    """Lanes of a channel."""
    steps: int
    """Steps of a tile."""

    @property
    def padded(self) -> int:
        """States of a channel with those that only fill up the last lane."""
        return self.states * self.lanes

    @property
    def owners(self) -> int:
        """Lanes of a channel that own steps."""
        return min(self.lanes, self.steps)

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return THREADS // self.lanes


@functools.cache
def division(dstate: int, itemsize: int, *, backward: bool = False) -> Shape:
    """Return how a channel's states are divided over lanes, and the longest tile whose parts fit shared memory."""
    if dstate > 128:
        states, lanes = 8, 32
    elif dstate > 8:
        states, lanes = 4, 1 << (-(-dstate // 4) - 1).bit_length()
    elif dstate > 4:  # what belongs to a step alone is divided by four lanes as well: that is half of the work
        states, lanes = 2, 4
    else:
        states, lanes = 1 << (dstate - 1).bit_length(), 1
    wide = max(4, itemsize)
    padded, channels, steps = states * lanes, THREADS // lanes, 16 if backward else 32
    while True:
        rows = 2 * (4 if backward else 3) * steps * (channels + 8) * itemsize
        maps = 4 * steps * padded * (itemsize if itemsize > 2 else itemsize + 4)
        own = channels * (4 if backward else 2) * (steps + 2) * wide
        parts = steps * 8 * padded * wide if backward else 0
        if steps == 1 or rows + maps + own + parts <= 47 * 1024:
            return Shape(dstate, states, lanes, steps)
        steps //= 2


USUAL = {
    "gated": True, "zoh": False, "packed": False, "constant_B": False, "constant_C": False,
    "by_channel": False, "wide": True, "wide_maps": True,
}  # fmt: skip
"""Constants of the kernels in a layer of a language model; rows in memory are steps, read 16 bytes at a time."""


def resident_of(*, resident: int, **constants: Any) -> int:
    """Return how many blocks of a kernel are to fit on one multiprocessor together."""
    return resident


class Tile(NamedTuple):
    """How a tile of one array lies in shared memory, and how it is copied there."""

    rows: int
    length: int
    pitch: int
    step: int
    """Elements from one step to the next."""
    channel: int
    """Elements from one channel to the next."""
    size: int
    """Elements of the whole tile."""


def tile_of(shape: Shape, itemsize: int, by_channel: bool) -> Tile:
    """Return the tile for arrays whose rows in memory are steps, or, with `by_channel`, channels."""
    rows, length = (shape.channels, shape.steps) if by_channel else (shape.steps, shape.channels)
    pitch = _pitch(length, shape.owners, itemsize, by_channel)
    return Tile(rows, length, pitch, *((1, pitch) if by_channel else (pitch, 1)), rows * pitch)


def _collisions(pitch: int, lanes: int, size: int, by_channel: bool) -> int:
    """Return how many passes a warp needs to read a step of each lane and a channel of each group of lanes."""
    banks: dict[int, set[int]] = {}
    for lane in range(32):
        step, channel = lane % lanes, lane // lanes
        word = (channel * pitch + step if by_channel else step * pitch + channel) * size // 4
        banks.setdefault(word % 32, set()).add(word)
    return max(len(words) for words in banks.values())


@functools.cache
def _pitch(length: int, lanes: int, size: int, by_channel: bool) -> int:
    """Return the elements from one row of `length` to the next, so that few threads meet at a bank."""
    unit = LINE // size
    first = -(-length // unit) * unit
    return min(range(first, first + 4 * LINE, unit), key=lambda p: (_collisions(p, lanes, size, by_channel), p))


# --- the threads of a warp ---


def _is_interleaved(lanes: int) -> bool:
    """Tell whether two channels take turns in a warp.

    A load of 8 or 16 bytes a thread takes half as long where every thread reads what the next one or the one after it
    reads. So neighbours share a channel, and what belongs to it; the one after is of another channel, with the same
    states, and shares what belongs to them.
    """
    return 4 <= lanes <= 16


def make_place(lanes: int) -> Any:
    """Build ``place(thread)``: which lane of its channel a thread is, and which channel of the block it serves."""
    if _is_interleaved(lanes):
        pairs = lanes // 2

        def place(thread):
            rest = uint32(thread // uint32(4))
            lane = uint32(rest % uint32(pairs) * uint32(2) + thread % uint32(2))
            channel = uint32(rest // uint32(pairs) * uint32(2) + thread // uint32(2) % uint32(2))
            return lane, channel

        return place

    def place_in_order(thread):
        return uint32(thread % uint32(lanes)), uint32(thread // uint32(lanes))

    return place_in_order


def lane_distances(lanes: int) -> tuple[int, ...]:
    """Return how many threads lie between lanes of a channel that are 1, 2, 4, … apart."""
    apart = [1 << k for k in range(lanes.bit_length() - 1)]
    return tuple(d if d == 1 or not _is_interleaved(lanes) else 2 * d for d in apart)


def channel_distances(lanes: int) -> tuple[int, ...]:
    """Return how many threads lie between channels of a warp that are …, 4, 2, 1 apart."""
    apart = [lanes << k for k in reversed(range((32 // lanes).bit_length() - 1))]
    return tuple(2 if d == lanes and _is_interleaved(lanes) else d for d in apart)


# --- numbers of a lane and of a channel ---


def unrolled(body: Callable[..., None], count: int, *, backwards: bool = False) -> Callable[..., None]:
    """Return ``f(registers, context, first)`` that calls ``body(registers, context, first + i)`` for every i < `count`.

    There is no loop, so that what is indexed by i stays in registers. `count` is a power of two: Numba compiles one
    small function for each doubling.
    """
    if count == 1:
        return body
    half = count // 2
    part = unrolled(body, half, backwards=backwards)
    near, far = (half, 0) if backwards else (0, half)

    def twice(registers, context, first):
        part(registers, context, first + near)
        part(registers, context, first + far)

    return twice


def make_decay_rate(real: np.dtype) -> Any:
    """Build A log2(e), without minus infinity: its product with delta = 0 must be 0."""
    lowest = float(np.finfo(real).min)

    def decay_rate(a):
        rate = a * cast(LOG2E, a)
        return select(rate < cast(lowest, rate), cast(lowest, rate), rate)

    return decay_rate


def make_scatter_sum(lanes: int, owners: int) -> Any:
    """Build the sum over the lanes of a channel of `owners` numbers each; lane i receives the sum of the i-th."""
    return _scatter(lane_distances(lanes), owners)


def _scatter(distances: tuple[int, ...], owners: int) -> Any:
    lanes = 1 << len(distances)
    if lanes == 1:
        return _only
    distance, half = distances[-1], lanes // 2
    rest = _scatter(distances[:-1], min(owners, half))
    if lanes > owners:

        def fold(numbers, thread):
            for i in range(owners):
                numbers[i] += cuda.shfl_xor_sync(-1, numbers[i], distance)
            return rest(numbers, thread)

        return fold

    def halve(numbers, thread):
        upper = (thread & uint32(distance)) != uint32(0)
        for i in range(half):
            low, high = numbers[i], numbers[i + half]
            kept = select(upper, high, low)
            numbers[i] = kept + cuda.shfl_xor_sync(-1, select(upper, low, high), distance)
        return rest(numbers, thread)

    return halve


def _only(numbers, thread):
    return numbers[0]


def make_lane_sum(lanes: int, owners: int) -> Any:
    """Build the sum of one number over the first `owners` lanes of a channel, to all of them."""
    return _summed(lane_distances(lanes)[: owners.bit_length() - 1])


def _summed(distances: tuple[int, ...]) -> Any:
    if not distances:
        return _unchanged
    distance, rest = distances[0], _summed(distances[1:])

    def lane_sum(x):
        return rest(x + cuda.shfl_xor_sync(-1, x, distance))

    return lane_sum


def _unchanged(x):
    return x


def load1(p, i):
    return (load(p, i),)


LOAD_STATES = {1: load1, 2: load2, 4: load4, 8: load8}
"""A lane's states, neighbours in memory, as a tuple."""


# --- tiles ---


def is_within(row, rows_left):
    """Tell whether a row of a tile is among those that are left."""
    return row < rows_left


def is_present(row, steps):
    """Tell whether a row is among the steps that are left, and no padding: what stands there may be no number."""
    left, marks, marks_step = steps
    return row < left and load(marks, int64(row) * marks_step) != ABSENT


def make_copy(
    rows: int, length: int, pitch: int, size: int, wide: bool, is_there: Any = is_within
) -> tuple[Any, Any]:
    """Build the copy of `rows` rows of `length` neighbours from global memory to rows `pitch` apart in shared memory.

    With `wide` the copies are asynchronous and 16 bytes each, which needs aligned rows whose length is a multiple of
    that; else neighbours may lie `stride` apart. ``begin(p, row_stride, stride, thread)`` returns the pointer to a
    thread's own first piece, which moves with the tile; ``copy(shared, at, p, row_stride, stride, rows_left, left,
    thread, zero)`` brings the tile, with zeros for what lies beyond the rows and places that are left; ``is_there(row,
    rows_left)`` tells of a row.
    """
    unit = LINE // size if wide else 1
    pieces = length // unit
    rounds = -(-rows * pieces // THREADS)
    exact = rounds * THREADS == rows * pieces
    even = THREADS % pieces == 0  # not where a row has more numbers than there are threads, and is not `wide`

    def begin(p, row_stride, stride, thread):
        row, place = thread // uint32(pieces), thread % uint32(pieces)
        if wide:
            return shift(p, int64(row) * row_stride + int64(uint32(place * uint32(unit))))
        return shift(p, int64(row) * row_stride + int64(place) * stride)

    def copy(shared, at, p, row_stride, stride, rows_left, left, thread, zero):
        own_row, own_place = thread // uint32(pieces), thread % uint32(pieces)
        for r in range(rounds):
            i = uint32(thread + uint32(r * THREADS))
            row, place = i // uint32(pieces), i % uint32(pieces)
            if even:  # the same place of a row that is a constant number of rows further
                offset = int64(r * THREADS // pieces) * row_stride
            else:
                offset = (int64(row) - int64(own_row)) * row_stride + (int64(place) - int64(own_place)) * stride
            if exact or i < uint32(rows * pieces):
                there = is_there(row, rows_left) and uint32(place * uint32(unit)) < left
                to = at + row * uint32(pitch) + place * uint32(unit)
                if wide:
                    copy_async(shared, to, p, offset, there)
                elif there:
                    store(shared, to, load(p, offset))
                else:
                    store(shared, to, zero)

    return begin, copy
