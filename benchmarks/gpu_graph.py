"""Times of kernels alone: calls on rotating buffers, recorded in a CUDA graph, so that nobody waits for the host."""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gpu_timing import cupy

CACHE = 60e6
"""Bytes of an H200's second-level cache."""


def buffers(size: float, most: int = 64) -> int:
    """Return over how many buffers of `size` bytes calls should rotate, so that none is found in the cache."""
    return max(2, min(most, -(-4 * int(CACHE) // max(int(size), 1))))


def kernel_milliseconds(calls: Sequence[Callable[[], Any]], rounds: int = 15, least: float = 1.0) -> float:
    """Return the median time of one of `calls` on the device; a round is all of them, as often as takes `least` ms."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        kept = [call() for call in calls]  # compiles, and fills the memory pool with what the recording takes
        del kept
        stream.synchronize()
        stream.begin_capture()
        kept = [call() for call in calls]  # all results live: none is written twice
        graph = stream.end_capture()
        once = _elapsed(lambda: graph.launch(stream), stream)
        repeats = max(1, int(least / max(once, 1e-3)))
        times = [_elapsed(lambda: [graph.launch(stream) for _ in range(repeats)], stream) for _ in range(rounds)]
        del kept
    return statistics.median(times) / repeats / len(calls)


@functools.cache
def copy_milliseconds(moved: int) -> float:
    """Return the least time in which a copy reads and writes `moved` bytes in all, measured as kernels are.

    A small copy is slower for each byte than a large one: the device must start it, and wait for the first bytes. It is
    CUDA's own or one of 16 bytes a thread, whichever is quicker.
    """
    count = max(1, moved // 32)
    pairs = [tuple(cupy.zeros(count, np.complex128) for _ in range(2)) for _ in range(buffers(moved))]
    by_threads = cupy.ElementwiseKernel("T x", "T y", "y = x", "copied")
    ways = (
        lambda x, y: y.data.copy_from_device_async(x.data, x.nbytes),
        lambda x, y: by_threads(x, y),
    )
    return min(kernel_milliseconds([functools.partial(way, *pair) for pair in pairs]) for way in ways)


def _elapsed(call: Callable[[], Any], stream: Any) -> float:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end)


def host_milliseconds(call: Callable[[], Any], repeats: int = 50) -> float:
    """Return the time until a call returns, which is before its work is done."""
    call()
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    kept = [call() for _ in range(repeats)]
    seconds = time.perf_counter() - start
    cupy.cuda.Device().synchronize()
    del kept
    return 1e3 * seconds / repeats


def torch_milliseconds(calls: Sequence[Callable[[], Any]], rounds: int = 15) -> float:
    """Return the same for calls of PyTorch: of a graph if it can be recorded, else with its launches."""
    torch = sys.modules["torch"]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.synchronize()
    run: Callable[[], Any] = lambda: [call() for call in calls]  # noqa: E731
    with contextlib.suppress(RuntimeError):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) / len(calls)
