"""What all threads of a block find out together, of whole numbers below 2^31."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.device import cuda

uint32, int32 = np.uint32, np.int32


def largest(x, y):
    return x if x > y else y


def total(x, y):
    return uint32(x + y)


def make_block(join: Any, threads: int) -> tuple[Any, Any]:
    """Build two functions: `join` over the numbers of all threads, and over those of the threads before one's own.

    Both are called as ``f(mine, shared, thread)`` by all threads of a block with a shared array of one uint32 a warp.
    The empty `join` is 0.
    """
    warps = threads // 32

    def over_all(mine, shared, tid):
        for power in range(5):
            mine = join(mine, uint32(cuda.shfl_xor_sync(-1, int32(mine), 1 << power)))
        cuda.syncthreads()
        if tid % uint32(32) == uint32(0):
            shared[tid // uint32(32)] = mine
        cuda.syncthreads()
        joined = uint32(0)
        for warp in range(warps):
            joined = join(joined, shared[warp])
        return joined

    def over_earlier(mine, shared, tid):
        lane = tid % uint32(32)
        for power in range(5):
            lower = uint32(cuda.shfl_up_sync(-1, int32(mine), 1 << power))
            if lane >= uint32(1 << power):
                mine = join(mine, lower)
        cuda.syncthreads()
        if lane == uint32(31):
            shared[tid // uint32(32)] = mine
        before = uint32(cuda.shfl_up_sync(-1, int32(mine), 1))
        if lane == uint32(0):
            before = uint32(0)
        cuda.syncthreads()
        for warp in range(warps):
            if uint32(warp) < tid // uint32(32):
                before = join(before, shared[warp])
        return before

    return over_all, over_earlier
