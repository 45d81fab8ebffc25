"""AdamW's update and the gradient's norm: bytes that must move, over the bandwidth of a copy.

    python benchmarks/bench_optimizer_update.py --gpu [--json FILE]
    python benchmarks/bench_optimizer_update.py [--threads 2] [--json FILE]

Two lists of arrays: those of a character model (d_model 384, 6 layers, 5.7 million numbers) and of the 130m model. An
update of float32 parameters reads four numbers and writes three, 28 bytes each; the norm reads one. On a GPU the time
is that of the kernels alone, launched many times with arguments that are ready; the host's time is that until a call
returns, in a loop as of training: each update takes the results of the last one, and gradients that lie elsewhere.
"donated": the results take the memory of the arguments.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness

OPTIONS = {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
GOAL = 0.75


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CuPy arrays")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    ASKED = arguments()
    if not ASKED.gpu:
        harness.limit_threads(ASKED.threads)

import numpy as np  # noqa: E402

from npmamba import MambaConfig  # noqa: E402
from npmamba.backend import twin  # noqa: E402

MODELS = {
    "character model": MambaConfig(vocab_size=65, d_model=384, n_layer=6),
    "130m": MambaConfig(vocab_size=50280, d_model=768, n_layer=24),
}


def lists(config: MambaConfig, xp: Any) -> list[list[Any]]:
    """Return params, grads, m and v."""
    shapes = config.parameter_shapes().values()
    return [[xp.full(shape, value, np.float32) for shape in shapes] for value in (0.5, 1e-3, 1e-4, 1e-6)]


def calls(columns: list[list[Any]]) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return what is measured: a call, and the bytes it must move for each number."""
    params, grads, m, v = columns
    kernels, decays = twin("optimizer_update", params[0]), [x.ndim > 1 for x in params]
    _, factor = kernels.global_norm(grads, 1.0)
    others = 0 if isinstance(params[0], np.ndarray) else 2
    turns = itertools.cycle([grads, *([x.copy() for x in grads] for _ in range(others))])
    held = {False: (params, m, v), True: [[x.copy() for x in column] for column in (params, m, v)]}

    def update(donate: bool) -> None:
        p, m, v = held[donate]
        held[donate] = kernels.adamw_update(p, next(turns), m, v, decays, **OPTIONS, grad_scale=factor, donate=donate)

    return {
        "update": (lambda: update(False), 28),
        "update, donated": (lambda: update(True), 28),
        "norm": (lambda: kernels.global_norm(next(turns), 1.0), 4),
    }


def kernel_milliseconds(call: Callable[[], Any]) -> float:
    """Return the time of a call's kernels on the device."""
    import gpu_timing
    import launches

    call()
    with launches.watched(run=True) as seen:
        call()
    return gpu_timing.milliseconds(launches.bare(seen), per_round=10)


def host_milliseconds(call: Callable[[], Any], wait: Callable[[], Any], rounds: int = 20) -> float:
    """Return the median time until a call returns, which on a GPU is before its work is done."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        wait()
    return 1e3 * statistics.median(times[2:])


def main(asked: argparse.Namespace) -> None:
    settings: dict[str, Any] = {}
    if asked.gpu:
        import gpu_timing

        xp, bandwidth, settings = gpu_timing.cupy, gpu_timing.copy_bandwidth(), gpu_timing.described()
    else:
        xp, bandwidth = np, _host_copy_bandwidth()
    report = harness.Report("optimizer update", asked.threads, **settings)
    print("".join(f"{name}: {what}\n" for name, what in settings.items()), end="")
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s\n")
    rows, goals = [], []
    for model, config in MODELS.items():
        for name, (call, size) in calls(lists(config, xp)).items():
            host = host_milliseconds(call, xp.cuda.Device().synchronize if asked.gpu else lambda: None)
            ms = kernel_milliseconds(call) if asked.gpu else 1e3 * harness.best(call)
            limit = 1e3 * size * config.parameter_count() / bandwidth
            moved = size * config.parameter_count()
            shown = f"{moved / 1e6:.1f}", f"{ms:.3f}", f"{limit:.3f}", f"{100 * limit / ms:.0f} %", f"{host:.3f}"
            rows.append((f"{model}, {name}", *shown))
            report.add(model=model, operation=name, bytes=moved, ms=ms, limit_ms=limit, share=limit / ms, host_ms=host)
            if asked.gpu and model == "130m":
                goals.append((f"{name}, share of the copy bandwidth", limit / ms))
    harness.table(("", "MB", "ms", "limit", "share", "host ms"), rows)
    report.add(bandwidth=bandwidth, goals=[harness.goal(name, share, GOAL) for name, share in goals])
    report.save(asked.json)


def _host_copy_bandwidth(size: int = 1 << 28) -> float:
    source, target = np.zeros(size, np.uint8), np.empty(size, np.uint8)
    return 2 * size / harness.best(lambda: np.copyto(target, source))


if __name__ == "__main__":
    main(ASKED)
