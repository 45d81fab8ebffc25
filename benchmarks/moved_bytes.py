"""What the benchmarks of operations that memory bounds share: their options, their peers' arrays, and one table.

A share is the time that the bytes which must move would take in a copy, over the time taken. On a GPU the kernels are
timed alone, in a CUDA graph of calls on rotating buffers larger than the second-level cache, and the copies are
measured in the same run: the limit is that of a large one, and beside it stands one of just as many bytes, which the
goals are held against. On the CPU contenders alternate, and the copy is NumPy's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np

GOAL = 0.75
CPU_COPY = 1 << 28
Calls = Sequence[Callable[[], Any]]


def arguments(told: str) -> argparse.Namespace:
    """Read the options; restart with the threads that were asked for, on the CPU."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CuPy arrays")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    parser.add_argument("--shape", type=int, action="append", help="run only the shape of this number; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append", help="may be repeated")
    parser.add_argument("--without-peers", action="store_true", help="leave out PyTorch")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    asked = parser.parse_args()
    if not asked.gpu:
        harness.limit_threads(asked.threads)
    asked.dtype = asked.dtype or (["float32", "bfloat16"] if asked.gpu else ["float32"])
    return asked


def torch_module(asked: argparse.Namespace) -> Any:
    """Return PyTorch if it is there and can run where npmamba runs, else None."""
    try:
        import torch
    except ImportError:
        return None
    if not asked.gpu:
        torch.set_num_threads(asked.threads)
    usable = not asked.gpu or torch.cuda.is_available()
    return torch if usable and not asked.without_peers else None


def in_torch(torch: Any, x: Any) -> Any:
    """Return an array's own memory as a tensor."""
    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def check(name: str, found: Any, wanted: Any, tolerance: float) -> None:
    """Stop unless an array is the reference's."""
    found = found.get() if hasattr(found, "get") else found
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong by {error:.1e}: nothing to measure")


class Table:
    """Times as they are measured, printed and kept at the end."""

    def __init__(self, benchmark: str, asked: argparse.Namespace) -> None:
        self.asked, self.rows, self.goals = asked, [], []
        settings: dict[str, Any] = {"command": " ".join(sys.argv)}
        if asked.gpu:
            import gpu_timing

            self.xp, self.bandwidth = gpu_timing.cupy, gpu_timing.copy_bandwidth()
            settings |= gpu_timing.described()
        else:
            self.xp, self.bandwidth = np, _cpu_bandwidth()
        self.report = harness.Report(benchmark, asked.threads, **settings, copy_bandwidth=self.bandwidth)
        print("".join(f"{name}: {what}\n" for name, what in settings.items()), end="")
        print(f"a copy moves {self.bandwidth / 1e9:,.0f} GB/s\n")

    def shapes(self, on_gpu: Sequence[Any], on_cpu: Sequence[Any]) -> list[Any]:
        """Return the shapes that were asked for."""
        every = on_gpu if self.asked.gpu else on_cpu
        return [every[number] for number in self.asked.shape or range(len(every))]

    def sets(self, size: float) -> int:
        """Return how many sets of buffers of `size` bytes calls take by turns."""
        if not self.asked.gpu:
            return 1
        import gpu_graph

        return gpu_graph.buffers(size)

    def measure(self, what: str, moved: float, calls: Calls, peers: dict[str, Calls], *, goal: bool = True) -> None:
        """Time an operation that must move `moved` bytes: one call for each set of buffers."""
        ms, host, others = (self._on_gpu if self.asked.gpu else self._on_cpu)(calls, peers)
        limit = 1e3 * moved / self.bandwidth
        copy = self._copy(moved) if self.asked.gpu else None
        told = ", ".join(f"{name} {time / ms:.1f}x" for name, time in others.items())
        self.rows.append(
            (
                what, f"{moved / 1e6:.1f}", f"{ms:.4f}", f"{limit:.4f}", f"{100 * limit / ms:.0f} %",
                f"{100 * copy / ms:.0f} %" if copy else "", f"{host:.3f}", told,
            )
        )  # fmt: skip
        self.report.add(
            operation=what, bytes=moved, ms=ms, limit_ms=limit, share=limit / ms, copy_ms=copy, host_ms=host,
            peers_ms=others,
        )  # fmt: skip
        if goal and copy:
            self.goals.append((f"{what}: share of the bandwidth of a copy of as many bytes", copy / ms))

    def _copy(self, moved: float) -> float:
        import gpu_graph

        return gpu_graph.copy_milliseconds(int(moved))

    def _on_gpu(self, calls: Calls, peers: dict[str, Calls]) -> tuple[float, float, dict[str, float]]:
        import gpu_graph

        ms, host = gpu_graph.kernel_milliseconds(calls), gpu_graph.host_milliseconds(calls[0])
        return ms, host, {name: gpu_graph.torch_milliseconds(each) for name, each in peers.items()}

    def _on_cpu(self, calls: Calls, peers: dict[str, Calls]) -> tuple[float, float, dict[str, float]]:
        contenders = {"npmamba": calls[0], **{name: each[0] for name, each in peers.items()}}
        timings = harness.alternate(contenders, 9)
        times = {name: 1e3 * timing.seconds(self.asked.threads) for name, timing in timings.items()}
        own = times.pop("npmamba")
        return own, own, times

    def finish(self) -> None:
        """Print the table and the goals, and write the file that was asked for."""
        names = ("", "MB", "ms", "limit", "share", "of equal copy", "host ms", "peers' time over ours")
        harness.table(names, self.rows)
        self.report.add(goals=[harness.goal(name, share, GOAL) for name, share in self.goals])
        self.report.save(self.asked.json)


def _cpu_bandwidth() -> float:
    source, target = np.zeros(CPU_COPY, np.uint8), np.empty(CPU_COPY, np.uint8)
    return 2 * CPU_COPY / harness.best(lambda: np.copyto(target, source))
