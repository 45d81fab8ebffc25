"""The causal convolution where time lies side by side (C order): a thread owns 16 bytes of steps of a channel.

It loads the 16 bytes before them too, and, backwards, those behind: its neighbours load the same from memory, so these
come from the first-level cache. A row of time is walked by `near` threads in turns. With `reverse`, a piece is loaded
from the other end of the row and turned around in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.conv_parts import (
    BIAS,
    DINITIAL,
    DLAST,
    INITIAL,
    REVERSE,
    SILU,
    THREADS,
    WIDTHS,
    activation_of,
    lanes_of,
    make_row_access,
)  # fmt: skip
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import fma, select

uint32, int64 = np.uint32, np.int64


def make_piece_access(real: Any, width: int, size: int) -> tuple[Any, Any, Any]:
    """Build the load of a piece of `size` steps, the load of a piece of inputs, and the store of a piece."""
    lag, number = width - 1, real.type
    load_row, store_row = make_row_access(size)

    def load_piece(p, piece, pieces, options, tile, row):
        """Fill a row of `tile` with a piece, zeros behind the last one."""
        if piece < pieces:
            back = (options & uint32(REVERSE)) != uint32(0)
            at = uint32(uint32(pieces - uint32(1)) - piece) if back else piece
            load_row(shift(p, int64(at) * int64(size)), uint32(0), tile, row)
            for j in range(size // 2):
                low, high = tile[row * size + j], tile[row * size + size - 1 - j]
                tile[row * size + j] = select(back, high, low)
                tile[row * size + size - 1 - j] = select(back, low, high)
        else:
            for j in range(size):
                tile[row * size + j] = number(0)

    def load_inputs(p, initial_at, piece, before, pieces, options, tile, row):
        """Fill a row of `tile` with the piece that lies `before` pieces back; before step 0 lies the initial state."""
        if piece >= uint32(before):
            load_piece(p, uint32(piece - uint32(before)), pieces, options, tile, row)
        else:
            for j in range(size):
                tile[row * size + j] = number(0)
                n = uint32(uint32(piece * uint32(size)) + uint32(j + lag))
                if options & uint32(INITIAL) and n >= uint32(before * size):
                    tile[row * size + j] = load(initial_at, uint32(n - uint32(before * size)))

    def store_piece(p, piece, pieces, options, tile):
        back = (options & uint32(REVERSE)) != uint32(0)
        at = uint32(uint32(pieces - uint32(1)) - piece) if back else piece
        for j in range(size // 2):
            low, high = tile[j], tile[size - 1 - j]
            tile[j] = select(back, high, low)
            tile[size - 1 - j] = select(back, low, high)
        store_row(shift(p, int64(at) * int64(size)), uint32(0), tile, 0)

    return load_piece, load_inputs, store_piece


def place(near, tiles, span, pieces):
    """Return a thread's row, its tile of the row, its first piece and the end of its tile."""
    thread, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
    group = uint32(block // tiles)
    tile = uint32(block - group * tiles)
    row = uint32(group * (uint32(THREADS) // near) + thread // near)
    first = uint32(tile * span)
    return row, tile, uint32(first + thread % near), min(uint32(first + span), pieces)


def make_load_weights(real: Any, width: int) -> Any:
    number = real.type

    def load_weights(weight, bias, options, d, weights):
        for k in range(width):
            weights[k] = load(weight, uint32(d * uint32(width) + uint32(k)))
        weights[width] = load(bias, d) if options & uint32(BIAS) else number(0)

    return load_weights


def _forward(real, data, width):
    size, lag = lanes_of(data), width - 1
    before = -(-lag // size)
    window_size, weights_size, skip = (before + 1) * size, width + 1, before * size - lag
    _, load_inputs, store_piece = make_piece_access(real, width, size)
    load_weights, (silu, _) = make_load_weights(real, width), activation_of(data)

    def conv_lines_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, y: Data, last: Wide,
        x_batch: Stride, x_dim: Stride, y_batch: Stride, y_dim: Stride,
        dim: Size, pieces: Size, rows: Size, near: Size, span: Size, tiles: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: a block is a tile of ``THREADS / near`` rows of time; a thread takes every `near`-th piece of its tile.
        Owns: y of its pieces; who has the last piece of a row owns `last` too.
        Saved: nothing.
        """
        window, weights = cuda.local.array(window_size, real), cuda.local.array(weights_size, real)
        q = cuda.local.array(size, real)
        row, tile, piece, end = place(near, tiles, span, pieces)
        if row >= rows:
            return
        b = uint32(row // dim)
        d = uint32(row - b * dim)
        x_at, y_at = shift(x, int64(b) * x_batch + int64(d) * x_dim), shift(y, int64(b) * y_batch + int64(d) * y_dim)
        initial_at, last_at = shift(initial, int64(row) * int64(lag)), shift(last, int64(row) * int64(lag))
        load_weights(weight, bias, options, d, weights)
        while piece < end:
            for h in range(before + 1):
                load_inputs(x_at, initial_at, piece, before - h, pieces, options, window, h)
            for i in range(size):
                q[i] = weights[width]
                for k in range(width):
                    q[i] = fma(weights[k], window[skip + i + k], q[i])
            if options & uint32(SILU):
                for i in range(size):
                    q[i] = silu(q[i])
            store_piece(y_at, piece, pieces, options, q)
            if piece == uint32(pieces - uint32(1)):
                for k in range(lag):
                    store(last_at, uint32(k), window[window_size - lag + k])
            piece = uint32(piece + near)

    return conv_lines_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={"width": WIDTHS})


def _backward(real, data, width):
    size, lag = lanes_of(data), width - 1
    before = -(-lag // size)
    window_size, ahead_size, weights_size = (2 * before + 1) * size, (before + 1) * size, width + 1
    skip, steps, sums_size = before * size - lag, size + lag, weights_size * THREADS // 32
    load_piece, load_inputs, store_piece = make_piece_access(real, width, size)
    load_weights, number, (_, silu_derivative) = make_load_weights(real, width), real.type, activation_of(data)

    def cotangents(weights, window, dq, options):
        """Turn dout of the steps of a piece and of `lag` steps behind it into dq."""
        if options & uint32(SILU):
            for i in range(steps):
                q = weights[width]
                for k in range(width):
                    q = fma(weights[k], window[skip + i + k], q)
                dq[i] *= silu_derivative(q)

    def input_gradient(weights, dq, n, low):
        """sum_k weight_k dq_(s + lag - k), from k = lag down, for s = n - lag; dq is 0 before step `low`"""
        g = number(0)
        for j in range(width):
            if n + j >= low + lag:
                g = fma(weights[lag - j], dq[n + j - lag], g)
        return g

    def conv_lines_backward(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, dlast: Wide,
        dx: Data, dinitial: Wide, parts: Wide,
        dout_batch: Stride, dout_dim: Stride, x_batch: Stride, x_dim: Stride, dx_batch: Stride, dx_dim: Stride,
        dim: Size, pieces: Size, rows: Size, near: Size, span: Size, tiles: Size, options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
        Threads: as `conv_lines_forward`; dq of the `lag` steps behind a piece is computed here and by their owner.
        Owns: dx of its pieces; who has the first piece of a row owns dinitial too. The sums of dweight and dbias over
        the tile are added up among its threads.
        Saved: nothing; q is computed again.
        """
        shared = cuda.shared.array(sums_size, real)
        window, dq = cuda.local.array(window_size, real), cuda.local.array(ahead_size, real)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        g = cuda.local.array(size, real)
        row, tile, piece, end = place(near, tiles, span, pieces)
        b = uint32(row // dim)
        d = uint32(row - b * dim)
        for k in range(weights_size):
            sums[k] = number(0)
        if row < rows:
            x_at = shift(x, int64(b) * x_batch + int64(d) * x_dim)
            dx_at = shift(dx, int64(b) * dx_batch + int64(d) * dx_dim)
            dout_at = shift(dout, int64(b) * dout_batch + int64(d) * dout_dim)
            state = int64(row) * int64(lag)
            load_weights(weight, bias, options, d, weights)
        while row < rows and piece < end:
            for h in range(before + 1):
                load_inputs(x_at, shift(initial, state), piece, before - h, pieces, options, window, h)
                load_piece(dout_at, uint32(piece + uint32(h)), pieces, options, dq, h)
            for h in range(before):
                load_piece(x_at, uint32(piece + uint32(h + 1)), pieces, options, window, before + 1 + h)
            cotangents(weights, window, dq, options)
            for i in range(size):
                g[i] = input_gradient(weights, dq, i + lag, 0)
                for k in range(width):
                    sums[k] = fma(dq[i], window[skip + i + k], sums[k])
                sums[width] += dq[i]
                left = uint32(uint32(pieces - piece) * uint32(size) - uint32(i))  # steps from this one to the end
                if options & uint32(DLAST) and left <= uint32(lag):
                    g[i] += load(shift(dlast, state), uint32(uint32(lag) - left))
            store_piece(dx_at, piece, pieces, options, g)
            if options & uint32(DINITIAL) and piece == uint32(0):
                for n in range(lag):
                    earlier = input_gradient(weights, dq, n, 0)
                    if options & uint32(DLAST) and uint32(n) >= uint32(pieces * uint32(size)):
                        earlier += load(shift(dlast, state), uint32(uint32(n) - pieces * uint32(size)))
                    store(shift(dinitial, state), uint32(n), earlier)
            piece = uint32(piece + near)
        add_threads(sums, shared, near)
        if row < rows and uint32(cuda.threadIdx.x) % near == uint32(0):
            to = (int64(b) * int64(tiles) + int64(tile)) * int64(weights_size)
            for k in range(weights_size):
                store(parts, (to + int64(k)) * int64(dim) + int64(d), sums[k])

    def add_threads(sums, shared, near):
        """Add the sums of the `near` threads of a row; the first of them receives the result."""
        thread = uint32(cuda.threadIdx.x)
        for k in range(weights_size):
            distance = uint32(1)
            while distance < near and distance < uint32(32):
                sums[k] += cuda.shfl_xor_sync(-1, sums[k], distance)
                distance = uint32(distance * uint32(2))
            if thread % uint32(32) == uint32(0):
                shared[uint32(k * (THREADS // 32)) + thread // uint32(32)] = sums[k]
        cuda.syncthreads()
        if near > uint32(32):
            for k in range(weights_size):
                warp = uint32(1)
                while warp < near // uint32(32):
                    at = uint32(thread // uint32(32) + warp) % uint32(THREADS // 32)
                    sums[k] += shared[uint32(k * (THREADS // 32)) + at]
                    warp = uint32(warp + uint32(1))

    return conv_lines_backward


BACKWARD = Kernel(_backward, threads=THREADS, shipped={"width": WIDTHS})
