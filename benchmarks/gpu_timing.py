"""What benchmarks on a GPU share: times by CUDA events, and the copy bandwidth that bytes are measured by."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from npmamba.cuda import requirements

cupy = requirements.require_device()


def milliseconds(call: Callable[[], Any], rounds: int = 15, warm: int = 3, per_round: int = 1) -> float:
    """Return the median time of a call on the device, between events around `per_round` calls in a row."""
    for _ in range(warm):
        call()
    start, end, times = cupy.cuda.Event(), cupy.cuda.Event(), []
    for _ in range(rounds):
        start.record()
        for _ in range(per_round):
            call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / per_round)
    return statistics.median(times)


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Return bytes a second, read and written, of a copy of `size` bytes inside the device's memory."""
    source, target = cupy.zeros(size, cupy.uint8), cupy.empty(size, cupy.uint8)
    ms = milliseconds(lambda: target.data.copy_from_device_async(source.data, size))
    return 2 * size / (1e-3 * ms)


def described() -> dict[str, Any]:
    """Return the device and the versions of what compiles and launches, for a report's settings."""
    names = ("cupy-cuda13x", "cupy-cuda12x", "numba-cuda")
    found = {name: version for name in names if (version := requirements.version(name))}
    return {"device": requirements.device(), "driver": requirements.driver(), **found}
