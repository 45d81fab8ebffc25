"""The second stage of dweight and dbias: the parts that stretches of time have left are added in a fixed order."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Size, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel

uint32, int64 = np.uint32, np.int64
COLUMNS, ROWS = 32, 16
THREADS = COLUMNS * ROWS
AHEAD = 16
"""Parts that a thread loads before it adds the first."""


def _sum(real):
    number = real.type

    def conv_sum(parts: Wide, dweight: Wide, dbias: Wide, count: Size, dim: Size, width: Size, with_bias: Size):
        """Equation: dweight[d, k] = sum_i parts[i, k, d], dbias[d] = sum_i parts[i, width, d].
        Threads: a block owns 32 neighbours of a part; of 16 threads for one of them, thread r adds every 16th part
        from the r-th on, and the first adds their sums.
        Owns: its numbers of dweight and dbias.
        Saved: nothing.
        """
        shared = cuda.shared.array(THREADS, real)
        thread = uint32(cuda.threadIdx.x)
        column, row = uint32(thread % uint32(COLUMNS)), uint32(thread // uint32(COLUMNS))
        length = int64(dim) * int64(width + uint32(1))
        n = int64(cuda.blockIdx.x) * int64(COLUMNS) + int64(column)
        total = number(0)
        ahead = cuda.local.array(AHEAD, real)
        i = row
        while n < length and i < count:
            for j in range(AHEAD):
                at = int64(i) + int64(j * ROWS)
                ahead[j] = load(shift(parts, at * length + n), uint32(0)) if at < int64(count) else number(0)
            for j in range(AHEAD):
                total += ahead[j]
            i = uint32(i + uint32(AHEAD * ROWS))
        shared[thread] = total
        cuda.syncthreads()
        if row == uint32(0) and n < length:
            for r in range(1, ROWS):
                total += shared[uint32(r * COLUMNS) + column]
            k = n // int64(dim)
            d = n - k * int64(dim)
            if k < int64(width):
                store(dweight, d * int64(width) + k, total)
            elif with_bias:
                store(dbias, d, total)

    return conv_sum


SUM = Kernel(_sum, threads=THREADS, shipped={}, dtypes=("float32", "float64"))
