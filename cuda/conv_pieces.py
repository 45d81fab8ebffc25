"""The parts of `npmamba.cuda.conv_lines`: pieces of 16 bytes of time, and what the backward pass does with one."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.conv_parts import REVERSE, SILU, activation_of, make_row_access
from npmamba.cuda.device import cuda, load, shift
from npmamba.scalar import fma, select

uint32, int64 = np.uint32, np.int64


def make_piece_access(real: Any, width: int, size: int) -> tuple[Any, ...]:
    """Build the four steps in which pieces of `size` steps come from memory and go there.

    First all loads, then what waits for them: they are on their way together.
    """
    lag, number = width - 1, real.type
    load_row, store_row = make_row_access(size)

    def turned(tile, row, back):
        for j in range(size // 2):
            low, high = tile[row * size + j], tile[row * size + size - 1 - j]
            tile[row * size + j] = select(back, high, low)
            tile[row * size + size - 1 - j] = select(back, low, high)

    def fetch(p, piece, before, pieces, options, tile, row):
        """Load the piece that lies `before` pieces back to a row of `tile`, as it lies in memory."""
        for j in range(size):
            tile[row * size + j] = number(0)
        if piece >= uint32(before):
            at = uint32(piece - uint32(before))
            if options & uint32(REVERSE):
                at = uint32(uint32(pieces - uint32(1)) - at)
            load_row(shift(p, int64(at) * int64(size)), uint32(0), tile, row)

    def arrive(options, tile, rows):
        """Bring the steps of loaded pieces into the order of the scan."""
        for row in range(rows):
            turned(tile, row, (options & uint32(REVERSE)) != uint32(0))

    def begin(initial_at, piece, before, options, tile):
        """Put the initial state before the first piece."""
        for i in range(before * size):
            n = uint32(uint32(piece * uint32(size)) + uint32(i + lag))  # of step n - lag - before size
            if n >= uint32(before * size) and n < uint32(before * size + lag):
                tile[i] = load(initial_at, uint32(n - uint32(before * size)))

    def store_piece(p, piece, pieces, options, tile):
        back = (options & uint32(REVERSE)) != uint32(0)
        turned(tile, 0, back)
        at = uint32(uint32(pieces - uint32(1)) - piece) if back else piece
        store_row(shift(p, int64(at) * int64(size)), uint32(0), tile, 0)

    return fetch, arrive, begin, store_piece


def make_gradients(real: Any, data: Any, width: int, size: int, skip: int) -> tuple[Any, Any, Any]:
    """Build the three parts of the backward pass of a piece."""
    lag, number, (_, silu_derivative) = width - 1, real.type, activation_of(data)

    def cotangents(weights, window, dq, options):
        """Turn dout of a piece's steps into dq."""
        if options & uint32(SILU):
            for i in range(size):
                q = weights[width]
                for k in range(width):
                    q = fma(weights[k], window[skip + i + k], q)
                dq[i] *= silu_derivative(q)

    def look_ahead(dq, piece, pieces):
        """Append dq of the `lag` steps behind a piece, which the next lanes have; zeros behind the last piece."""
        for n in range(lag):
            ahead = uint32(1 + n // size)
            later = cuda.shfl_down_sync(-1, dq[n % size], ahead)
            dq[size + n] = select(uint32(piece + ahead) < pieces, later, number(0))

    def input_gradient(weights, dq, n):
        """sum_k weight_k dq_(s + lag - k), from k = lag down, for s = n - lag; dq begins at step 0"""
        g = number(0)
        for j in range(width):
            if n + j >= lag:
                g = fma(weights[lag - j], dq[n + j - lag], g)
        return g

    return cotangents, look_ahead, input_gradient
