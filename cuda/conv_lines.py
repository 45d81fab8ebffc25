"""The causal convolution where time lies side by side (C order): a thread owns 16 bytes of steps of a channel.

It loads the 16 bytes before them too: its neighbour loads the same from memory, so these come from the first-level
cache. A row of time is walked by `near` threads in turns. With `reverse`, a piece is loaded from the other end of the
row and turned around in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.conv_parts import BIAS, DINITIAL, DLAST, SILU, THREADS, WIDTHS, activation_of, lanes_of
from npmamba.cuda.conv_pieces import make_gradients, make_piece_access
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import fma

uint32, int64 = np.uint32, np.int64


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
    size, lag, number = lanes_of(data), width - 1, real.type
    before = -(-lag // size)
    window_size, ahead_size, weights_size = (before + 1) * size, size + lag, width + 1
    skip = before * size - lag
    load_piece, load_inputs, store_piece = make_piece_access(real, width, size)
    cotangents, look_ahead, input_gradient = make_gradients(real, data, width, size, skip)
    load_weights = make_load_weights(real, width)

    def conv_lines_backward(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, dlast: Wide,
        dx: Data, dinitial: Wide, parts: Wide,
        dout_batch: Stride, dout_dim: Stride, x_batch: Stride, x_dim: Stride, dx_batch: Stride, dx_dim: Stride,
        dim: Size, pieces: Size, near: Size, owned: Size, turns: Size, groups: Size, tiles: Size, options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
        Threads: `near` neighbouring lanes take as many pieces of a row, `turns` times. A lane computes dq of its own
        piece and asks the next lanes for dq of the `lag` steps behind it; the last lanes are there to be asked.
        Owns: dx of the first `owned` lanes' pieces; who has the first piece of a row owns dinitial too. The sums of
        dweight and dbias over the turns are added up among the lanes by shuffles.
        Saved: nothing; q is computed again.
        """
        window, dq = cuda.local.array(window_size, real), cuda.local.array(ahead_size, real)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        g = cuda.local.array(size, real)
        thread = uint32(cuda.threadIdx.x)
        lane = uint32(thread % near)
        group = uint32(uint32(cuda.blockIdx.x) * (uint32(THREADS) // near) + thread // near)
        inside, b, d = group < groups, uint32(0), uint32(0)
        row = uint32(group // tiles)
        tile = uint32(group - row * tiles)
        for k in range(weights_size):
            sums[k], weights[k] = number(0), number(0)
        if inside:
            b = uint32(row // dim)
            d = uint32(row - b * dim)
            load_weights(weight, bias, options, d, weights)
        x_at = shift(x, int64(b) * x_batch + int64(d) * x_dim)
        dx_at = shift(dx, int64(b) * dx_batch + int64(d) * dx_dim)
        dout_at = shift(dout, int64(b) * dout_batch + int64(d) * dout_dim)
        state = int64(row) * int64(lag)
        turn = uint32(0)
        while turn < turns:
            piece = uint32(uint32(tile * turns + turn) * owned + lane)
            here = inside and piece < pieces
            for i in range(size):
                dq[i] = number(0)
            if here:
                for h in range(before + 1):
                    load_inputs(x_at, shift(initial, state), piece, before - h, pieces, options, window, h)
                load_piece(dout_at, piece, pieces, options, dq, 0)
                cotangents(weights, window, dq, options)
            look_ahead(dq, piece, pieces)
            if here and lane < owned:
                left = uint32(uint32(pieces - piece) * uint32(size))  # steps from the piece's first to the end
                for i in range(size):
                    g[i] = input_gradient(weights, dq, i + lag)
                    for k in range(width):
                        sums[k] = fma(dq[i], window[skip + i + k], sums[k])
                    sums[width] += dq[i]
                    if options & uint32(DLAST) and left <= uint32(lag + i):
                        g[i] += load(shift(dlast, state), uint32(uint32(lag + i) - left))
                store_piece(dx_at, piece, pieces, options, g)
                if options & uint32(DINITIAL) and piece == uint32(0):
                    for n in range(lag):
                        earlier = input_gradient(weights, dq, n)
                        if options & uint32(DLAST) and uint32(n) >= left:
                            earlier += load(shift(dlast, state), uint32(uint32(n) - left))
                        store(shift(dinitial, state), uint32(n), earlier)
            turn = uint32(turn + uint32(1))
        for k in range(weights_size):
            distance = uint32(1)
            while distance < near:
                sums[k] += cuda.shfl_xor_sync(-1, sums[k], distance)
                distance = uint32(distance * uint32(2))
        if inside and lane == uint32(0):
            to = (int64(b) * int64(tiles) + int64(tile)) * int64(weights_size)
            for k in range(weights_size):
                store(parts, (to + int64(k)) * int64(dim) + int64(d), sums[k])

    return conv_lines_backward


BACKWARD = Kernel(_backward, threads=THREADS, shipped={"width": WIDTHS})
