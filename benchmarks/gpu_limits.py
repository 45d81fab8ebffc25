"""What a GPU does alone: times of kernels in which no host time shows, and the rate of its exponentials."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from npmamba.backend import on_host
from npmamba.cuda.device import Size, Wide, cuda, load, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import cast, exp2

uint32 = np.uint32
THREADS, CHAINS, UNROLLED = 256, 8, 8
FIXED_POINT = 0.6411857445049860
"""Where x = 2^-x: what the chains of the kernel below converge to."""
LONGEST_NAP = 32.0
"""Milliseconds; a call that takes the host longer is timed with its host time."""


def _exp2_chains(real: Any) -> Any:
    def exp2_chains(start: Wide, out: Wide, rounds: Size):
        """Equation: x = 2^-x, CHAINS numbers of a thread side by side, `rounds` times UNROLLED times. The minus keeps
        the numbers finite; it is issued while the special-function unit is busy.
        Threads: all do the same.
        Owns: the sum of its chains.
        Saved: nothing.
        """
        x = cuda.local.array(CHAINS, real)
        for c in range(CHAINS):
            x[c] = load(start, uint32(c))
        k = uint32(0)
        while k < rounds:
            for _ in range(UNROLLED):
                for c in range(CHAINS):
                    x[c] = exp2(-x[c])
            k = uint32(k + uint32(1))
        total = cast(0, x[0])
        for c in range(CHAINS):
            total += x[c]
        store(out, uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x), total)

    return exp2_chains


EXP2 = Kernel(_exp2_chains, THREADS, shipped={}, dtypes=("float32",))


@functools.cache
def _memory(blocks: int) -> tuple[Any, Any]:
    from gpu_timing import cupy

    return cupy.asarray(np.linspace(0, 1, CHAINS, dtype=np.float32)), cupy.empty(blocks * THREADS, np.float32)


def compute(blocks: int, rounds: int) -> Any:
    """Start `blocks` blocks that compute exponentials and return where the results will stand."""
    start, out = _memory(blocks)
    EXP2.launch((blocks,), np.dtype(np.float32), (start, out, rounds))
    return out


@functools.cache
def _rounds_of_a_millisecond() -> int:
    from gpu_timing import milliseconds

    return max(1, int(10_000 / milliseconds(lambda: compute(1, 10_000), rounds=3)))


def hidden_milliseconds(call: Callable[[], Any], rounds: int = 11, warm: int = 2) -> float:
    """Return the median time of all that a call starts on the device, without the time the host takes to start it.

    The device naps first, and for longer than the host takes to put the whole call into the queue: a round in which it
    woke up too early is repeated with a longer nap.
    """
    from gpu_timing import cupy

    for _ in range(warm):
        call()
    nap, times = 1.0, []
    while len(times) < rounds:
        before, start, end = (cupy.cuda.Event() for _ in range(3))
        began = time.perf_counter()
        before.record()
        compute(1, int(nap * _rounds_of_a_millisecond()))
        start.record()
        call()
        end.record()
        host = 1e3 * (time.perf_counter() - began)
        end.synchronize()
        if host > cupy.cuda.get_elapsed_time(before, start) and nap < LONGEST_NAP:
            nap *= 2
        else:
            times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def exp2_rate(rounds: int = 200) -> float:
    """Return how many float32 exponentials the device computes in a second with nothing else to do."""
    from gpu_timing import cupy

    blocks = 32 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    out = on_host(compute(blocks, rounds))
    if not np.allclose(out, CHAINS * FIXED_POINT, rtol=1e-5):
        raise AssertionError("exp2_rate: the kernel's results are wrong, so its rate means nothing")
    return out.size * CHAINS * UNROLLED * rounds / (1e-3 * hidden_milliseconds(lambda: compute(blocks, rounds)))
