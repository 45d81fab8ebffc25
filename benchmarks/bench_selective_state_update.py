"""One step of the scan: time of its kernel over the bytes that must move.

    python benchmarks/bench_selective_state_update.py --gpu [--json FILE]
    python benchmarks/bench_selective_state_update.py [--threads 2] [--json FILE]

dim 1536, dstate 16, everything on (D, z, bias, softplus), float32 and bfloat16 inputs with a float32 state. The state
is read and written: 8 bytes a number. "C order" is a state (batch, dim, dstate), "channels" the same with channels side
by side.

On a GPU the kernel is timed alone, in a CUDA graph of steps on rotating states. From batch 128 on these are larger than
the second-level cache; below it a step is mostly waiting, and the time itself is what counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness

BATCHES, CPU_BATCHES = (1, 16, 128, 1024), (1, 16)
DIM, DSTATE, GOAL = 1536, 16, 0.75


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CuPy arrays")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    parser.add_argument("--batch", type=int, action="append", help="run only this batch; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    ASKED = arguments()
    if not ASKED.gpu:
        harness.limit_threads(ASKED.threads)

import ml_dtypes  # noqa: E402, F401  NumPy learns bfloat16 from it
import numpy as np  # noqa: E402

from npmamba.backend import twin  # noqa: E402
from npmamba.reference import selective_state_update as reference  # noqa: E402

OPTIONS = {"dt_softplus": True, "discretization": "euler"}


def drawn(batch: int, dtype: Any, memory: str, xp: Any, seed: int = 0) -> dict[str, Any]:
    """Draw the arguments of a step; B and C are slices of wider rows, as a model has them."""
    rng = xp.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    maps = normal(batch, 48 + 2 * DSTATE).astype(dtype)
    state = normal(batch, DIM, DSTATE)
    if memory == "channels":
        state = xp.ascontiguousarray(state.swapaxes(1, 2)).swapaxes(1, 2)
    A = -xp.broadcast_to(xp.arange(1, DSTATE + 1, dtype=np.float32), (DIM, DSTATE)).copy()
    x, dt, z = (normal(batch, DIM).astype(dtype) for _ in range(3))
    return {
        "state": state, "x": x, "dt": dt, "A": A, "B": maps[:, 48 : 48 + DSTATE], "C": maps[:, 48 + DSTATE :],
        "D": normal(DIM), "z": z, "dt_bias": normal(DIM) - 4,
    }  # fmt: skip


def step(case: dict[str, Any]) -> Callable[[], Any]:
    kernels = twin("selective_state_update", case["x"])
    return lambda: kernels.forward(**case, **OPTIONS)


def moved(case: dict[str, Any]) -> int:
    """Return the bytes that a step must read and write."""
    return case["state"].nbytes + case["x"].nbytes + sum(x.nbytes for x in case.values())


def check(xp: Any) -> None:
    """Stop unless a small case agrees with the reference."""
    as_numpy = np.asarray if xp is np else xp.asnumpy
    for memory in ("C order", "channels"):
        case = drawn(3, "float32", memory, xp)
        y, state = reference.forward(**{name: as_numpy(x).copy() for name, x in case.items()}, **OPTIONS)
        for name, x, wanted in (("y", step(case)(), y), ("state", case["state"], state)):
            error = np.abs(as_numpy(x) - wanted).max() / np.abs(wanted).max()
            if not error < 2e-5:
                raise SystemExit(f"{name} of {memory} is wrong by {error:.1e}: nothing to measure")


def on_gpu(asked: argparse.Namespace) -> None:
    import gpu_graph
    import gpu_timing

    xp, bandwidth = gpu_timing.cupy, gpu_timing.copy_bandwidth()
    settings = {**gpu_timing.described(), "copy_bandwidth": bandwidth}
    report = harness.Report("one step of the scan", 1, **settings)
    print("".join(f"{name}: {what}\n" for name, what in settings.items()))
    check(xp)
    rows, goals = [], []
    for batch in asked.batch or BATCHES:
        for dtype in ("float32", "bfloat16"):
            for memory in ("C order", "channels"):
                size = moved(drawn(batch, dtype, memory, xp))
                cases = [drawn(batch, dtype, memory, xp, n) for n in range(gpu_graph.buffers(size))]
                calls = [step(case) for case in cases]
                ms, host = gpu_graph.kernel_milliseconds(calls), gpu_graph.host_milliseconds(calls[0])
                limit = 1e3 * size / bandwidth
                told = {"batch": batch, "dtype": dtype, "memory": memory}
                report.add(**told, bytes=size, ms=ms, limit_ms=limit, share=limit / ms, host_ms=host)
                what = f"batch {batch}, {dtype}, {memory}"
                shown = f"{size / 1e6:.1f}", f"{ms:.4f}", f"{limit:.4f}", f"{100 * limit / ms:.0f} %", f"{host:.3f}"
                rows.append((what, *shown))
                if batch >= 128:
                    goals.append((what, limit / ms))
    harness.table(("", "MB", "ms", "limit", "share", "host ms"), rows)
    report.add(goals=[harness.goal(name, share, GOAL) for name, share in goals])
    report.save(asked.json)


def on_cpu(asked: argparse.Namespace) -> None:
    report = harness.Report("one step of the scan", asked.threads)
    check(np)
    rows = []
    for batch in asked.batch or CPU_BATCHES:
        contenders = {memory: step(drawn(batch, "float32", memory, np)) for memory in ("C order", "channels")}
        for who, timing in harness.alternate(contenders, 9).items():
            report.add(batch=batch, memory=who, **timing.summary())
            rows.append((f"batch {batch}, {who}", harness.ms(timing.seconds(asked.threads))))
    harness.table(("", "ms"), rows)
    report.save(asked.json)


if __name__ == "__main__":
    on_gpu(ASKED) if ASKED.gpu else on_cpu(ASKED)
