"""One step of the causal convolution: a thread owns a channel of a batch row and moves its taps on."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.conv_parts import BIAS, SILU, THREADS, activation_of
from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import fma

uint32, int64 = np.uint32, np.int64
TAPS = 4
"""Taps that are loaded before the first is used."""


def _update(real, data):
    number, (silu, _) = real.type, activation_of(data)

    def conv_update(
        state: Wide, x: Data, weight: Wide, bias: Wide, y: Data,
        state_batch: Stride, state_dim: Stride, state_tap: Stride, x_batch: Stride, x_dim: Stride,
        dim: Size, lag: Size, blocks: Size, options: Size,
    ):  # fmt: skip
        """Equation: q = bias + sum_k weight_k tap_k, with x as the last tap; y = silu(q) or q; the taps move on by one.
        Threads: one for every channel of every batch row; a loop over `TAPS` taps at a time.
        Owns: y and the state of its channel.
        Saved: nothing.
        """
        taps, weights = cuda.local.array(TAPS, real), cuda.local.array(TAPS, real)
        block = uint32(cuda.blockIdx.x)
        b = uint32(block // blocks)
        d = uint32(uint32(block - b * blocks) * uint32(THREADS) + uint32(cuda.threadIdx.x))
        if d >= dim:
            return
        state_at = shift(state, int64(b) * state_batch + int64(d) * state_dim)
        weight_at = shift(weight, int64(d) * int64(uint32(lag + uint32(1))))
        newest, last_weight, q, k = number(0), number(0), number(0), uint32(0)
        while k == uint32(0) or k < lag:
            # All loads in one block: before the loop, their first use would be there too, and wait for them alone.
            newest = load(shift(x, int64(b) * x_batch + int64(d) * x_dim), uint32(0))
            last_weight = load(weight_at, lag)
            first = load(bias, d) if options & uint32(BIAS) else number(0)
            for i in range(TAPS):
                j = uint32(k + uint32(i))
                if j < lag:
                    taps[i] = load(shift(state_at, int64(j) * state_tap), uint32(0))
                    weights[i] = load(weight_at, j)
            q = first if k == uint32(0) else q
            for i in range(TAPS):
                j = uint32(k + uint32(i))
                if j < lag:
                    q = fma(weights[i], taps[i], q)
                    if j > uint32(0):
                        store(shift(state_at, int64(uint32(j - uint32(1))) * state_tap), uint32(0), taps[i])
            k = uint32(k + uint32(TAPS))
        if lag > uint32(0):
            store(shift(state_at, int64(uint32(lag - uint32(1))) * state_tap), uint32(0), newest)
        q = fma(last_weight, newest, q)
        store(shift(y, int64(b) * int64(dim)), d, silu(q) if options & uint32(SILU) else q)

    return conv_update


UPDATE = Kernel(_update, threads=THREADS, shipped={})
