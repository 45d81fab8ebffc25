"""The causal convolution where time lies side by side (C order): a thread owns 16 bytes of steps of a channel.

It loads the 16 bytes before them too: its neighbour loads the same from memory, so these come from the first-level
cache. A row of time is walked by `near` threads in turns. With `reverse`, a piece is loaded from the other end of the
row and turned around in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.conv_parts import BIAS, DINITIAL, DLAST, INITIAL, SILU, THREADS, WIDTHS, activation_of, lanes_of
from npmamba.cuda.conv_pieces import make_gradients, make_piece_access
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import fma

uint32, int64 = np.uint32, np.int64


def place(near_bits, tiles):
    """Return a thread's row, tile of the row, and number among the 2^near_bits threads that share them."""
    thread = uint32(cuda.threadIdx.x)
    group = uint32(uint32(cuda.blockIdx.x) * (uint32(THREADS) >> near_bits) + (thread >> near_bits))
    row = uint32(group // tiles)
    return row, uint32(group - row * tiles), uint32(thread & uint32(uint32(uint32(1) << near_bits) - uint32(1)))


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
    fetch, arrive, begin, store_piece = make_piece_access(real, width, size)
    load_weights, (silu, _) = make_load_weights(real, width), activation_of(data)

    def conv_lines_forward(
        x: Data, weight: Wide, bias: Wide, initial: Wide, y: Data, last: Wide,
        x_batch: Stride, x_dim: Stride, y_batch: Stride, y_dim: Stride,
        dim: Size, pieces: Size, near_bits: Size, span: Size, rows: Size, tiles: Size, options: Size,
    ):  # fmt: skip
        """Equation: q_s = bias + sum_k weight_k x_(s - lag + k), y = silu(q) or q, lag = width - 1.
        Threads: near = 2^near_bits of them share a tile of a row of time; each takes every near-th piece of it.
        Owns: y of its pieces; who has the last piece of a row owns `last` too.
        Saved: nothing.
        """
        window, weights = cuda.local.array(window_size, real), cuda.local.array(weights_size, real)
        q = cuda.local.array(size, real)
        row, tile, number = place(near_bits, tiles)
        if row >= rows:
            return
        piece, end = uint32(tile * span + number), min(uint32(uint32(tile + uint32(1)) * span), pieces)
        b = uint32(row // dim)
        d = uint32(row - b * dim)
        x_at, y_at = shift(x, int64(b) * x_batch + int64(d) * x_dim), shift(y, int64(b) * y_batch + int64(d) * y_dim)
        initial_at, last_at = shift(initial, int64(row) * int64(lag)), shift(last, int64(row) * int64(lag))
        load_weights(weight, bias, options, d, weights)
        while piece < end:
            for h in range(before + 1):
                fetch(x_at, piece, before - h, pieces, options, window, h)
            arrive(options, window, before + 1)
            if options & uint32(INITIAL) and piece < uint32(before):
                begin(initial_at, piece, before, options, window)
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
            piece = uint32(piece + (uint32(1) << near_bits))

    return conv_lines_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={"width": WIDTHS})


def _backward(real, data, width):
    size, lag, number = lanes_of(data), width - 1, real.type
    before = -(-lag // size)
    window_size, ahead_size, weights_size = (before + 1) * size, size + lag, width + 1
    skip = before * size - lag
    fetch, arrive, begin, store_piece = make_piece_access(real, width, size)
    cotangents, look_ahead, input_gradient = make_gradients(real, data, width, size, skip)
    load_weights = make_load_weights(real, width)

    def conv_lines_backward(
        dout: Data, x: Data, weight: Wide, bias: Wide, initial: Wide, dlast: Wide,
        dx: Data, dinitial: Wide, parts: Wide,
        dout_batch: Stride, dout_dim: Stride, x_batch: Stride, x_dim: Stride, dx_batch: Stride, dx_dim: Stride,
        dim: Size, pieces: Size, near_bits: Size, owned: Size, turns: Size, rows: Size, tiles: Size, options: Size,
    ):  # fmt: skip
        """Equation: dq = dout silu'(q), dx_s = sum_k weight_k dq_(s + lag - k), dweight_k = sum_s dq_s x_(s - lag + k).
        Threads: 2^near_bits neighbouring lanes take as many pieces of a row, `turns` times. A lane computes dq of its
        own piece and asks the next lanes for dq of the `lag` steps behind it; the last lanes are there to be asked.
        Owns: dx of the first `owned` lanes' pieces; who has the first piece of a row owns dinitial too. The sums of
        dweight and dbias over the turns are added up among the lanes by shuffles.
        Saved: nothing; q is computed again.
        """
        window, dq = cuda.local.array(window_size, real), cuda.local.array(ahead_size, real)
        weights, sums = cuda.local.array(weights_size, real), cuda.local.array(weights_size, real)
        g = cuda.local.array(size, real)
        row, tile, lane = place(near_bits, tiles)
        inside, b, d = row < rows, uint32(0), uint32(0)
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
                    fetch(x_at, piece, before - h, pieces, options, window, h)
                fetch(dout_at, piece, 0, pieces, options, dq, 0)
                arrive(options, window, before + 1)
                arrive(options, dq, 1)
                if options & uint32(INITIAL) and piece < uint32(before):
                    begin(shift(initial, state), piece, before, options, window)
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
            while distance < uint32(uint32(1) << near_bits):
                sums[k] += cuda.shfl_xor_sync(-1, sums[k], distance)
                distance = uint32(distance * uint32(2))
        if inside and lane == uint32(0):
            to = (int64(b) * int64(tiles) + int64(tile)) * int64(weights_size)
            for k in range(weights_size):
                store(parts, (to + int64(k)) * int64(dim) + int64(d), sums[k])

    return conv_lines_backward


BACKWARD = Kernel(_backward, threads=THREADS, shipped={"width": WIDTHS})
