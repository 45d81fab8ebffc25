"""The kernel of the CUDA selective scan that hands states on from one segment of time to the next."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Size, Stride, Wide, cuda, load, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.scan_tile import THREADS, make_decay_rate
from npmamba.scalar import cast, decay_factor, exp2, select, state_step

uint32, int64 = np.uint32, np.int64
AHEAD = 16
"""Segments whose ends are asked for at once: a thread would wait for memory at each."""


def _carry(real, padded):
    def carry(
        A: Wide, initial: Wide, states: Wide, sums: Wide, entering: Wide, dstate: Size, dim: Size, segments: Size,
        total: Stride, given: Size,
    ):  # fmt: skip
        """Equation: entering_{s+1} = exp(A sum of delta in s) entering_s + state that s leaves from zero.
        Threads: one per (batch row, channel, state), segments one after the other.
        Owns: entering of its state.
        """
        elapsed = cuda.local.array(AHEAD, real)
        left = cuda.local.array(AHEAD, real)
        i = int64(cuda.blockIdx.x) * int64(THREADS) + int64(cuda.threadIdx.x)
        if i < total:
            n, row = i % int64(padded), i // int64(padded)
            d, b = row % int64(dim), row // int64(dim)
            zero = cast(0, load(A, 0))
            rate, h = zero, zero
            if n < int64(dstate):
                rate = decay_rate(load(A, d * int64(dstate) + n))
                if given:
                    h = load(initial, row * int64(dstate) + n)
            s = uint32(0)
            at = b * int64(segments) * int64(dim) + d
            while s < segments:
                for k in range(AHEAD):
                    elapsed[k], left[k] = zero, zero
                    if uint32(s + uint32(k + 1)) < segments:
                        there = at + int64(k) * int64(dim)
                        elapsed[k], left[k] = load(sums, there), load(states, there * int64(padded) + n)
                for k in range(AHEAD):
                    if uint32(s + uint32(k)) < segments:
                        store(entering, (at + int64(k) * int64(dim)) * int64(padded) + n, h)
                    x = elapsed[k] * rate
                    factor = decay_factor(select(elapsed[k] == cast(np.inf, zero), zero, exp2(x)), x)
                    h = state_step(factor, x, h, left[k])
                s = uint32(s + uint32(AHEAD))
                at += int64(AHEAD) * int64(dim)

    decay_rate = make_decay_rate(real)
    return carry


CARRY = Kernel(_carry, THREADS, shipped={"padded": (4, 16, 256)}, dtypes=("float32", "float64"), others=True)
