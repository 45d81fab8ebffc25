"""What a scan on a GPU costs beside its kernels: memory, the time until a call is done, and the host's own time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
from gpu_timing import cupy
from launches import bare, watched
from scan_gpu_case import Case, draw

CALLS, IN_A_ROW = 1000, 100
"""Calls whose host time is taken, and how many before the device is waited for: its queue must never be full."""


# --- memory ---


class Live(cupy.cuda.MemoryHook):
    """Inside a ``with`` block: the bytes that were allocated and are not free again, now and at most."""

    name = "live"

    def __init__(self) -> None:
        self.now = self.peak = 0

    def malloc_postprocess(self, **what: Any) -> None:
        self.now += what["mem_size"]
        self.peak = max(self.peak, self.now)

    def free_postprocess(self, **what: Any) -> None:
        self.now -= what["mem_size"]


def memory(case: Case) -> dict[str, float]:
    """Return what is allocated beside the results, in multiples of u: for a pass, and from one to the other."""
    with Live() as plain:
        y, last, _ = case.forward()
    results = y.nbytes + last.nbytes
    del y, last
    with Live() as saving:
        kept = case.forward(save=True)
    with Live() as back:
        gradients = case.backward(kept[2])
    found = sum(x.nbytes for x in gradients if x is not None)
    sizes = {"forward": plain.peak - results, "forward, saving": saving.peak - results}
    sizes |= {"saved": saving.now - results, "backward": back.peak - found}
    sizes["saved and backward"] = sizes["saved"] + sizes["backward"]
    return {name: size / (case.elements * case.dout.itemsize) for name, size in sizes.items()}


# --- time until a call is done ---


def wall_milliseconds(call: Callable[..., Any], rounds: int, prepare: Callable[[], tuple[Any, ...]] = tuple) -> float:
    """Return the median time of ``call(*prepare())`` until the device is done; preparing is not timed."""
    device, times = cupy.cuda.Device(), []
    for _ in range(rounds + 1):
        arguments = prepare()
        device.synchronize()
        start = time.perf_counter()
        call(*arguments)
        device.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def wall(case: Case, direction: str, rounds: int) -> float:
    """Return the milliseconds of a pass as it is called from Python: checks, tape, kernels."""
    if direction == "forward":
        return wall_milliseconds(case.scan, rounds)
    if direction == "forward, saving":
        return wall_milliseconds(case.recorded, rounds)
    return wall_milliseconds(lambda pull: pull(case.dout), rounds, lambda: (case.recorded()[1],))


# --- the host's time ---


def host_microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time until each call returns, in alternation."""
    device, times = cupy.cuda.Device(), {name: [] for name in calls}
    for _ in range(CALLS // IN_A_ROW):
        for name, call in calls.items():
            device.synchronize()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / IN_A_ROW)
    device.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def measure_host(report: harness.Report) -> None:
    """Print and keep what Python adds to the launches of a small scan."""
    case = draw((2, 64, 64), 16, np.dtype(np.float32))
    saved = case.forward(save=True)[2]
    calls: dict[str, Callable[[], Any]] = {
        "selective_scan": case.scan,
        "its kernels' host code": case.forward,
        "selective_scan and gradients": lambda: case.recorded()[1](case.dout),
        "the backward kernels' host code": lambda: case.backward(saved),
    }
    rows = []
    for name, call in calls.items():
        with watched(run=True) as seen:
            call()
        us = host_microseconds({"call": call, "bare": bare(seen)})
        rows.append((name, len(seen), f"{us['call']:.1f}", f"{us['bare']:.1f}", f"{us['call'] - us['bare']:.1f}"))
        report.add(section="host", call=name, launches=len(seen), call_us=us["call"], bare_us=us["bare"])
    print(f"host time of one of {CALLS:,} calls that nobody waits for, batch 2, dim 64, seqlen 64, dstate 16, float32")
    harness.table(("", "launches", "us", "bare launches us", "more us"), rows)
