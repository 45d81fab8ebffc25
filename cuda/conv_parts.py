"""What the kernels of the causal convolution share: options, rows of 16 bytes, parts of `npmamba.cuda.conv_rows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.device import (
    copy_async,
    cuda,
    load,
    load2,
    load4,
    load8,
    rcp,
    shift,
    store,
    store2,
    store4,
    store8,
)  # fmt: skip
from npmamba.cuda.schedule import is_fresh, position
from npmamba.scalar import cast, exp2, fma, silu, silu_derivative

uint32, int64 = np.uint32, np.int64
THREADS = 128
WIDTHS = (2, 3, 4)
"""Widths with kernels of their own: those of published models and of the convolution they came with."""
STEPS = 4
"""Steps that come from memory together."""
COLUMNS = 32
"""Threads of a block along the channels, fewer where there are fewer channels."""
PLACE = np.dtype(np.int64)
GROUP = 4
"""Stretches whose sums over time are added before they are written: ``THREADS / COLUMNS``."""
BIAS, SILU, INITIAL, DINITIAL, DLAST, PACKED, REVERSE = 1, 2, 4, 8, 16, 32, 64
"""Bits of `options`: an array is there, the activation is on, steps come as a list, time is turned around."""


LOG2E = 1.4426950408889634


def lanes_of(data: Any) -> int:
    """Return how many channels a 16-byte access holds."""
    return 16 // np.dtype(data).itemsize


def _silu_of_half(x):
    """x sigma(x), for results of 11 bits or fewer: sigma has a relative error of 2^-24 |x|, for a third of the work."""
    return x * rcp(cast(1, x) + exp2(x * cast(-LOG2E, x)))


def _silu_derivative_of_half(x):
    """sigma (1 + x (1 - sigma)), likewise"""
    s = rcp(cast(1, x) + exp2(x * cast(-LOG2E, x)))
    return s * fma(x, cast(1, x) - s, cast(1, x))


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


def make_place(lanes: int) -> Any:
    def place(dim, columns, column_blocks):
        """Return a thread's first channel and its line: which stretch of which batch row, counted over all."""
        thread, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        row = uint32(block // column_blocks)
        d = uint32(uint32(uint32(block - row * column_blocks) * columns + thread % columns) * uint32(lanes))
        return d, uint32(row * (uint32(THREADS) // columns) + thread // columns)

    return place


def make_load_weights(real: Any, width: int, lanes: int) -> Any:
    number = real.type

    def load_weights(weight, bias, options, d, weights):
        """Fill `weights`: a row per tap, and the bias in the last one."""
        for j in range(lanes):
            channel = uint32(d + uint32(j))
            for k in range(width):
                weights[k * lanes + j] = load(weight, uint32(channel * uint32(width) + uint32(k)))
            weights[width * lanes + j] = load(bias, channel) if options & uint32(BIAS) else number(0)

    return load_weights


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


def make_fetch(lanes: int, packed: bool) -> tuple[Any, Any]:
    """Build the two halves of bringing `STEPS` rows: where they lie, and their way into shared memory."""

    def find(entries_at, s, end, places):
        """Write where in time the steps from `s` on lie, before `end`."""
        for i in range(STEPS):
            t = uint32(s + uint32(i))
            places[i] = int64(t)
            if packed:
                places[i] = position(load(entries_at, t)) if t < end else int64(0)

    def fetch(ring, slot, s, end, places, p, step):
        """Start the way of the rows into this thread's places of a slot; zeros from `end` on."""
        to = uint32((slot * uint32(STEPS * THREADS) + uint32(cuda.threadIdx.x)) * uint32(lanes))
        for i in range(STEPS):
            here = uint32(s + uint32(i)) < end
            copy_async(ring, uint32(to + uint32(i * THREADS * lanes)), shift(p, places[i] * step), uint32(0), here)

    return find, fetch


def make_add_stretches(width: int, lanes: int) -> Any:
    def add_stretches(sums, shared, parts, d, line, dim, lines, columns):
        """Write the sums of `GROUP` stretches, added from the first to the last, to their part."""
        thread = uint32(cuda.threadIdx.x)
        for k in range(width + 1):
            cuda.syncthreads()
            for j in range(lanes):
                shared[thread * uint32(lanes) + uint32(j)] = sums[k * lanes + j]
            cuda.syncthreads()
            if d < dim and line < lines and line % uint32(GROUP) == uint32(0):
                row = int64(line // uint32(GROUP)) * int64(width + 1) + int64(k)
                to = shift(parts, row * int64(dim) + int64(d))
                for j in range(lanes):
                    total = sums[k * lanes + j]
                    for n in range(1, GROUP):
                        total += shared[(thread + uint32(n) * columns) * uint32(lanes) + uint32(j)]
                    store(to, uint32(j), total)

    return add_stretches
