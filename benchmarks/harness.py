"""Measure contenders in alternation, print aligned tables, keep the figures as JSON.

A benchmark calls `limit_threads` before it imports any array library: the script restarts itself with the thread
counts in its environment, the only place where every library looks. Then it names its contenders and lets
`alternate` run them: a round gives every contender one turn, the order is turned round every other round, and the
medians over the rounds are compared. So a machine that slows down or is shared slows all contenders alike.

With one thread the figure to trust is the process CPU time, which other people's jobs do not lengthen; with more
threads it is the wall time. Both are kept.

Only the standard library is imported here.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PACKAGES = (
    "numpy", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "llvmlite", "scipy", "torch", "jax", "jaxlib",
    "mambapy", "transformers",
)  # fmt: skip


def limit_threads(threads: int) -> None:
    """Restart the running script with `threads` threads for every library; return if that was already done."""
    count = str(threads)
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA", "NPMAMBA")
    wanted = {f"{name}_NUM_THREADS": count for name in names}
    wanted["NPROC"] = count  # the size of XLA's own pool
    wanted["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if threads > 1:
        wanted["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=true"
        wanted["OMP_WAIT_POLICY"] = "passive"  # a pool that spins would slow down the contender after it
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


@dataclass
class Timing:
    """The turns of one contender: seconds a call, CPU and wall, one pair a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def seconds(self, threads: int) -> float:
        """Return the median: CPU time for one thread, wall time for more."""
        return statistics.median(self.cpu if threads == 1 else self.wall)

    def summary(self) -> dict[str, Any]:
        """Return medians and minima in milliseconds, and the number of rounds."""
        return {
            "cpu_ms_median": 1e3 * statistics.median(self.cpu),
            "cpu_ms_min": 1e3 * min(self.cpu),
            "wall_ms_median": 1e3 * statistics.median(self.wall),
            "wall_ms_min": 1e3 * min(self.wall),
            "rounds": len(self.cpu),
        }


def alternate(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    slow_rounds: int = 2,
    slow: float = 3.0,
    turn: float = 0.05,
) -> dict[str, Timing]:
    """Time `contenders` in alternation and return each one's `Timing`.

    Every contender is called once untimed (compilation, first touch of memory). A turn repeats the call until
    `turn` seconds have passed and takes the median call, so short calls do not pay for the cache that the contender
    before them emptied. One whose untimed second call would take longer than `slow` seconds gets `slow_rounds`
    rounds only.
    """
    timings = {name: Timing() for name in contenders}
    limit = {name: rounds for name in contenders}
    for call in contenders.values():
        call()
    for number in range(rounds):
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in order:
            if number >= limit[name]:
                continue
            cpu, wall = _turn(contenders[name], turn)
            timings[name].cpu.append(cpu)
            timings[name].wall.append(wall)
            if wall > slow:
                limit[name] = min(rounds, slow_rounds)
    return timings


def _turn(call: Callable[[], Any], least: float) -> tuple[float, float]:
    gc.collect()
    cpu, wall = [], []
    while not wall or sum(wall) < least:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        result = call()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
        del result
    return statistics.median(cpu), statistics.median(wall)


def best(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Return the shortest CPU time of a call within `seconds`: what the machine can do, for limits and rates."""
    call()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        call()
        shortest = min(shortest, time.process_time() - start)
    return shortest


def machine() -> dict[str, Any]:
    """Return the processor, the cores this process may use, the vector units and the system."""
    info: dict[str, Any] = {"system": platform.system(), "architecture": platform.machine()}
    info["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        found = {key.strip(): value.strip() for key, value in lines}
        flags = found.get("flags", "").split()
        info["processor"] = found.get("model name", platform.processor())
        info["processor_model"] = f"family {found.get('cpu family', '?')}, model {found.get('model', '?')}"
        info["vector_units"] = [unit for unit in ("avx2", "avx512f", "amx_tile") if unit in flags]
    if hasattr(os, "getloadavg"):
        info["load_at_start"] = round(os.getloadavg()[0], 2)
    return info


def versions() -> dict[str, str]:
    """Return the version of Python, npmamba and every installed package that takes part."""
    found = {"python": platform.python_version()}
    try:
        found["npmamba"] = __import__("npmamba").__version__
    except ImportError:
        pass
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Report:
    """What a benchmark prints, and the same figures for ``--json``."""

    def __init__(self, benchmark: str, threads: int, **settings: Any) -> None:
        on_gpu = "device" in settings
        clock = "CUDA events" if on_gpu else "process CPU time" if threads == 1 else "wall time"
        self.data: dict[str, Any] = {
            "benchmark": benchmark,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "threads": threads,
            "clock": clock,
            "settings": settings,
            "machine": machine(),
            "versions": versions(),
            "results": [],
        }
        where, what = self.data["machine"], self.data["versions"]
        cores = "" if on_gpu else f"{threads} thread{'s' * (threads > 1)}, "
        print(f"{benchmark}, {cores}median by {clock}")
        print(
            f"{where.get('processor', where['architecture'])} ({where.get('processor_model', '')}), "
            f"{where['cores']} cores, {' '.join(where.get('vector_units', []))}, "
            f"load {where.get('load_at_start', '?')}"
        )
        print(", ".join(f"{name} {version}" for name, version in what.items()))
        if threads > 1 and where.get("load_at_start", 0) > 0.5:
            print("The machine is busy: with more than one thread these wall times and ratios mean little.")
        print()

    def add(self, **result: Any) -> None:
        """Keep one result."""
        self.data["results"].append(result)

    def save(self, name: str | None) -> None:
        """Write the figures to `name`, inside benchmarks/results/ unless it has a folder; do nothing for None."""
        if name is None:
            return
        path = pathlib.Path(name)
        path = RESULTS / path if path.parent == pathlib.Path() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        # numbers and truth values that NumPy counted become Python's
        path.write_text(json.dumps(self.data, indent=1, default=lambda x: x.item()) + "\n")
        print(f"written: {path.name}")


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print `rows` under `header`: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        first = row[0].ljust(widths[0])
        print("  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
    print()


def ms(seconds: float) -> str:
    """Return `seconds` as milliseconds with three digits that matter."""
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def goal(name: str, ratio: float, least: float) -> dict[str, Any]:
    """Print whether `ratio` reaches `least`, and return the verdict for the JSON."""
    print(f"goal {name}: at least {least:g}, measured {ratio:.2f}: {'reached' if ratio >= least else 'MISSED'}")
    return {"goal": name, "least": least, "measured": ratio, "reached": ratio >= least}
