"""The launches of a call: compiled ahead of time by all cores, or repeated bare, to see what the host adds to them.

A call is run with `Kernel.launch` watched, so nothing here knows which kernels an operation launches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from npmamba.cuda import launch, machine, replay


class Launch(NamedTuple):
    """One launch, as `Kernel.launch` was asked for it."""

    kernel: launch.Kernel
    grid: tuple[int, ...]
    dtype: Any
    arguments: tuple[Any, ...]
    shared: int
    constants: dict[str, Any]


@contextlib.contextmanager
def watched(*, run: bool) -> Iterator[list[Launch]]:
    """Collect the launches inside a ``with`` block; without `run` nothing is launched."""
    original, seen = launch.Kernel.launch, []

    def watch(kernel: Any, grid: Any, dtype: Any, arguments: Any, *, shared: int = 0, **constants: Any) -> None:
        seen.append(Launch(kernel, grid, dtype, arguments, shared, constants))
        if run:
            original(kernel, grid, dtype, arguments, shared=shared, **constants)

    with replay.switched_off(), mock.patch.object(launch.Kernel, "launch", watch):
        yield seen


# --- bare ---


def bare(seen: Iterable[Launch]) -> Callable[[], None]:
    """Return a call that repeats launches with arguments that are ready to pass: what CuPy takes, and nothing else."""
    ready = []
    for kernel, grid, dtype, arguments, shared, constants in seen:
        loaded = machine.Loaded(kernel.specialize(dtype, **constants))
        ready.append(functools.partial(loaded.function, grid, loaded.threads, loaded.convert(arguments), shared))

    def run() -> None:
        for function in ready:
            function()

    return run


# --- compiled ahead ---


def compile_one(module: str, name: str, dtype: str, constants: tuple[Any, ...], cc: tuple[int, int]) -> None:
    """Compile one kernel and keep it on disk, if it is not there."""
    importlib.import_module(module)
    kernel = next(k for k in launch.KERNELS if (k.build.__module__, k.name) == (module, name))
    machine.machine_code(kernel.specialize(dtype, **dict(constants)), cc)


def _job(seen: Launch) -> tuple[Any, ...]:
    kernel = seen.kernel
    return kernel.build.__module__, kernel.name, np.dtype(seen.dtype).name, tuple(sorted(seen.constants.items()))


def compile_ahead(calls: Iterable[Callable[[], Any]], cc: tuple[int, int]) -> int:
    """Compile all kernels that `calls` would launch, in one process for each core, and return how many there are."""
    with watched(run=False) as seen:
        for call in calls:
            call()
    jobs = sorted({_job(one) for one in seen}, key=repr)
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_one, *job, cc) for job in jobs]:
            future.result()
    return len(jobs)
