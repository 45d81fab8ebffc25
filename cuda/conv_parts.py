"""What the kernels of the causal convolution share: options, rows of 16 bytes, parts of `npmamba.cuda.conv_rows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.device import (
    cuda,
    fetch2,
    fetch4,
    load,
    load2,
    load4,
    load8,
    rcp,
    shift,
    store2,
    store4,
    store8,
    unpacked,
)  # fmt: skip
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import cast, exp2, fma, silu, silu_derivative

uint32, int32, int64 = np.uint32, np.int32, np.int64
THREADS = 128
WIDTHS = (2, 3, 4)
"""Widths with kernels of their own: those of published models and of the convolution they came with."""
STEPS = 4
"""Steps that come from memory together; more than a kernel looks back."""
UNIT = 2 * STEPS
"""Steps that a loop goes through at most: stretches are multiples of it, but for the last one of a row."""
COLUMNS = 32
"""Threads of a block along the channels, fewer where there are fewer channels."""
ROW_LANES = {2: 4, 4: 4, 8: 2}
"""Channels of a thread that walks through time, by the bytes of a number: more would leave room for too few threads."""
RESIDENT, RESIDENT_PACKED, RESIDENT_BACKWARD = {2: 5, 4: 5, 8: 4}, {2: 4, 4: 4, 8: 4}, {2: 3, 4: 2, 8: 2}
"""Blocks of `npmamba.cuda.conv_rows` on a multiprocessor, by the bytes of a number: as many as registers allow."""
PLACE, WORD = np.dtype(np.int64), np.dtype(np.uint32)
GROUP = 4
"""Stretches whose sums over time are added before they are written: ``THREADS / COLUMNS``."""
BIAS, SILU, INITIAL, DINITIAL, DLAST, PACKED, REVERSE = 1, 2, 4, 8, 16, 32, 64
"""Bits of `options`: an array is there, the activation is on, steps come as a list, time is turned around."""


LOG2E = 1.4426950408889634


def lanes_of(data: Any) -> int:
    """Return how many channels a 16-byte access holds."""
    return 16 // np.dtype(data).itemsize


def row_lanes(data: Any) -> int:
    """Return how many channels a thread of `npmamba.cuda.conv_rows` has: they take 8 or 16 bytes."""
    return ROW_LANES[np.dtype(data).itemsize]


def _silu_of_half(x):
    """x sigma(x), for results of 11 bits or fewer: sigma has a relative error of 2^-24 |x|, for a third of the work."""
    return x * rcp(cast(1, x) + exp2(x * cast(-LOG2E, x)))


def _silu_derivative_of_half(x):
    """sigma (1 + x (1 - sigma)) = sigma + sigma (x - x sigma), likewise"""
    s = rcp(cast(1, x) + exp2(x * cast(-LOG2E, x)))
    return fma(s, fma(-x, s, x), s)


def activation_of(data: Any) -> tuple[Any, Any]:
    """Return silu and its derivative for kernels that read and write `data`."""
    half = np.dtype(data).itemsize == 2
    return (_silu_of_half, _silu_derivative_of_half) if half else (silu, silu_derivative)


def make_row_access(lanes: int) -> tuple[Any, Any]:
    """Build the load of a row of `lanes` neighbours into an array, and its store."""
    read, write = {2: (load2, store2), 4: (load4, store4), 8: (load8, store8)}[lanes]
    pack = {
        2: lambda t, i: (t[i], t[i + 1]),
        4: lambda t, i: (t[i], t[i + 1], t[i + 2], t[i + 3]),
        8: lambda t, i: (t[i], t[i + 1], t[i + 2], t[i + 3], t[i + 4], t[i + 5], t[i + 6], t[i + 7]),
    }[lanes]

    def load_row(p, at, tile, row):
        values = read(p, at)
        for j in range(lanes):
            tile[row * lanes + j] = values[j]

    def store_row(p, at, tile, row):
        write(p, at, pack(tile, row * lanes))

    return load_row, store_row


def short(step: Any) -> Any:
    """Return a distance between rows as 64 bits of which 32 count: compilers multiply it by one instruction."""
    return int64(int32(step))


def make_place(lanes: int) -> Any:
    def place(column_bits, column_blocks):
        """Return a thread's first channel and its line: which stretch of which batch row it has, counted over all."""
        thread, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        row = uint32(block // column_blocks)
        column = uint32(thread & uint32((uint32(1) << column_bits) - uint32(1)))
        piece = uint32(uint32(uint32(block - row * column_blocks) << column_bits) + column)
        line = uint32(uint32(row * uint32(uint32(THREADS) >> column_bits)) + uint32(thread >> column_bits))
        return uint32(piece * uint32(lanes)), line

    return place


def make_take(real: Any, width: int, lanes: int) -> Any:
    """Build the load of the weights of a thread's channels, which lie side by side: a few accesses of 16 bytes.

    They wait for nothing and nobody, so that they travel together with a thread's first inputs.
    """
    number, count, size = real.type, 16 // np.dtype(real).itemsize, width * lanes
    load_piece, _ = make_row_access(count)

    def take(weight, bias, options, d, weights):
        """Fill `weights` with those of the channels from `d` on: a row per tap, and the bias in the last one."""
        flat = cuda.local.array(size, real)
        for i in range(size // count):
            load_piece(weight, uint32(uint32(d * uint32(width)) + uint32(i * count)), flat, i)
        for k in range(width):
            for j in range(lanes):
                weights[k * lanes + j] = flat[j * width + k]
        for j in range(lanes):
            weights[width * lanes + j] = number(0)
        if options & uint32(BIAS):
            for i in range(lanes // count):
                load_piece(bias, uint32(d + uint32(i * count)), weights, size // count + i)

    return take


def make_load_history(real: Any, width: int, lanes: int, packed: bool) -> Any:
    number, lag = real.type, width - 1
    load_row, _ = make_row_access(lanes)

    def load_history(x_at, x_step, entries_at, initial_at, options, s, window):
        """Fill the first rows of `window` with the inputs before step `s`, zeros where they are of another sequence.

        Returns how many are of the same sequence as the step before `s`; before step 0 lies the initial state.
        """
        for k in range(lag):
            for j in range(lanes):
                window[k * lanes + j] = number(0)
        for k in range(lag):
            t = uint32(s + uint32(k) - uint32(lag))
            if uint32(s + uint32(k)) >= uint32(lag):
                at = position(load(entries_at, t)) if packed else int64(t)
                load_row(shift(x_at, at * x_step), uint32(0), window, k)
        if options & uint32(INITIAL) and s < uint32(lag):
            for k in range(lag):
                n = uint32(s + uint32(k))
                if n < uint32(lag):
                    for j in range(lanes):
                        window[k * lanes + j] = load(initial_at, uint32(uint32(j * lag) + n))
        same = uint32(lag)
        if packed:
            for k in range(lag):
                n = uint32(s + uint32(k))
                if n >= uint32(lag):
                    if is_fresh(load(entries_at, uint32(n - uint32(lag)))):
                        same = uint32(0)
                        for j in range(k * lanes):
                            window[j] = number(0)
                    same = min(uint32(same + uint32(1)), uint32(lag))
        return same

    return load_history


def row_words(data: Any) -> int:
    """Return how many words of 32 bits a thread's channels of a step take."""
    return row_lanes(data) * np.dtype(data).itemsize // 4


def make_fetch(data: Any, packed: bool) -> tuple[Any, Any, Any]:
    """Build the three parts of bringing the rows of `STEPS` steps: where they lie, the loads, and their numbers.

    Without packing the first does nothing, and the loads walk along with their pointer.
    """
    lanes, size = row_lanes(data), row_words(data)
    read = {2: fetch2, 4: fetch4}[size]
    pack = {2: lambda t, i: (t[i], t[i + 1]), 4: lambda t, i: (t[i], t[i + 1], t[i + 2], t[i + 3])}[size]

    def find(entries_at, s, end, places):
        """Write where in time the steps from `s` on lie, before `end`."""
        if packed:
            for i in range(STEPS):
                t = uint32(s + uint32(i))
                places[i] = position(load(entries_at, t)) if t < end else int64(0)

    def fetch(p, step, s, end, places, words, slot):
        """Start the loads of the steps before `end`, zeros for the others; return the pointer to the row after them.

        Where all are before `end`, none is asked about.
        """
        if not packed and uint32(s + uint32(STEPS)) <= end:
            for i in range(STEPS):
                row = read(shift(p, int64(i) * step), uint32(0), True)
                for j in range(size):
                    words[(slot * STEPS + i) * size + j] = row[j]
        else:
            for i in range(STEPS):
                at = shift(p, (places[i] if packed else int64(i)) * step)
                row = read(at, uint32(0), uint32(s + uint32(i)) < end)
                for j in range(size):
                    words[(slot * STEPS + i) * size + j] = row[j]
        return p if packed else shift(p, int64(STEPS) * step)

    def arrive(p, words, slot, tile, first):
        """Write the numbers to rows of `tile`, from row `first` on."""
        for i in range(STEPS):
            row = unpacked(p, pack(words, (slot * STEPS + i) * size))
            for j in range(lanes):
                tile[(first + i) * lanes + j] = row[j]

    return find, fetch, arrive


def make_add_stretches(width: int, lanes: int) -> Any:
    load_row, store_row = make_row_access(lanes)

    def add_stretches(sums, total, shared, parts, d, line, dim, column_bits, here):
        """Write the sums of `GROUP` stretches, added from the first to the last, to their part."""
        thread = uint32(cuda.threadIdx.x)
        for k in range(width + 1):
            cuda.syncthreads()
            store_row(shared, uint32(thread * uint32(lanes)), sums, k)
            cuda.syncthreads()
            if here and line % uint32(GROUP) == uint32(0):
                for n in range(1, GROUP):
                    other = uint32(thread + uint32(uint32(n) << column_bits))
                    load_row(shared, uint32(other * uint32(lanes)), total, 0)
                    for j in range(lanes):
                        sums[k * lanes + j] += total[j]
                row = int64(line // uint32(GROUP)) * int64(width + 1) + int64(k)
                store_row(shift(parts, row * int64(dim) + int64(d)), uint32(0), sums, k)

    return add_stretches
