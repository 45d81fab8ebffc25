"""One training step on a GPU: ``bench_train_step.py --gpu``.

Forward, backward, clipping and AdamW of two character models, float32, with a fresh batch uploaded for every step, as
the training loop does it: nobody waits for the device but at the end. "original" is the time of mamba_ssm in PyTorch,
its CUDA scan and Triton norm, measured on an H200.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
from gpu_timing import cupy, described, milliseconds

from npmamba import MambaConfig, backend, lm
from npmamba.autodiff import adamw, clip_factor, decay_mask, value_and_grad

CASES: dict[str, dict[str, Any]] = {
    "d_model 384, 6 layers, 64 x 256": {"d_model": 384, "n_layer": 6, "batch": 64, "original": 29.8, "goal": 30.0},
    "d_model 128, 4 layers, 16 x 256": {"d_model": 128, "n_layer": 4, "batch": 16, "original": 11.1, "goal": 11.1},
}
SEQLEN, STEPS = 256, 30


def make_step(config: MambaConfig, batch: int) -> Callable[[], Any]:
    """Return a training step, which returns its loss as an array on the device."""
    params = {key: cupy.asarray(x) for key, x in lm.init_params(config, seed=0).items()}
    optimizer, gradient = adamw(1e-3, mask=decay_mask(params)), value_and_grad(lm.loss)
    state, rng = optimizer.init(params), np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (8, batch, SEQLEN + 1)).astype(np.int32)
    count = 0

    def step() -> Any:
        nonlocal params, state, count
        window, count = tokens[count % len(tokens)], count + 1
        loss, gradients = gradient(params, config, cupy.asarray(window[:, :-1]), cupy.asarray(window[:, 1:]))
        factor, _ = clip_factor(gradients, 1.0)
        params, state = optimizer.update(gradients, state, params, factor, donate=True)
        return loss

    return step


def wall_milliseconds(step: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Return the time of a step when the device is waited for at the end, and until a step has been handed to it."""
    device = cupy.cuda.Device()
    device.synchronize()
    start = time.perf_counter()
    step()
    handed = time.perf_counter() - start
    for _ in range(steps - 1):
        step()
    device.synchronize()
    return 1e3 * (time.perf_counter() - start) / steps, 1e3 * handed


def matrix_products(config: MambaConfig, tokens: int) -> float:
    """Return the milliseconds of every matrix product of a step, and nothing else."""
    inner, model = config.d_inner, config.d_model
    layer = [(2 * inner, model), (config.dt_rank + 2 * config.d_state, inner), (inner, config.dt_rank), (model, inner)]
    total = 0.0
    for (n_out, n_in), times in [*((shape, config.n_layer) for shape in layer), ((config.vocab_size, model), 1)]:
        x, dy, weight = (cupy.zeros(s, cupy.float32) for s in ((tokens, n_in), (tokens, n_out), (n_out, n_in)))

        def three(x: Any = x, dy: Any = dy, weight: Any = weight) -> None:
            x @ weight.T, dy @ weight, dy.T @ x

        total += times * milliseconds(three)
    return total


@contextlib.contextmanager
def by_operation() -> Iterator[dict[str, list[Any]]]:
    """Put events around every call of a twin while a step runs; the times include gaps where the device is idle."""
    load, events = backend._load, defaultdict(list)

    class Timed:
        def __init__(self, op: str, module: Any) -> None:
            self.op, self.module = op, module

        def __getattr__(self, name: str) -> Any:
            function = getattr(self.module, name)
            if isinstance(function, type) or not callable(function):
                return function

            def timed(*args: Any, **options: Any) -> Any:
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                out = function(*args, **options)
                end.record()
                events[f"{self.op}.{name}"].append((start, end))
                return out

            return timed

    backend._load = lambda package, op: Timed(op, load(package, op))  # type: ignore[assignment]
    try:
        yield events
    finally:
        backend._load = load


def show_operations(report: harness.Report, name: str, step: Callable[[], Any], total: float) -> None:
    """Print and keep what each operation takes of a step; the rest are matrix products, sums and copies."""
    with by_operation() as events:
        step()
        cupy.cuda.Device().synchronize()
    times = {
        op: (len(pairs), sum(cupy.cuda.get_elapsed_time(*pair) for pair in pairs)) for op, pairs in events.items()
    }
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    rows = [(op, count, f"{ms:.3f}", f"{100 * ms / total:.0f} %") for op, (count, ms) in ordered]
    harness.table((f"in one step of {total:.2f} ms", "calls", "ms", "share"), rows)
    report.add(case=name, operations={op: {"calls": count, "ms": ms} for op, (count, ms) in times.items()})


def main(options: argparse.Namespace) -> None:
    report = harness.Report("training step on a GPU, character models", 1, **described())
    rows, goals = [], []
    for name, case in CASES.items():
        config = MambaConfig(vocab_size=65, d_model=case["d_model"], n_layer=case["n_layer"])
        step, tokens = make_step(config, case["batch"]), case["batch"] * SEQLEN
        losses = [float(backend.on_host(step())) for _ in range(3)]
        ms, handed = min(wall_milliseconds(step, STEPS) for _ in range(2 if options.quick else 5))
        products, memory = matrix_products(config, tokens), cupy.get_default_memory_pool().total_bytes()
        times = (f"{ms:.2f}", f"{handed:.2f}", f"{products:.2f}", f"{case['original']}")
        rows.append((name, *times, f"{1e3 * tokens / ms:,.0f}"))
        report.add(case=name, ms=ms, host_ms=handed, matrix_products_ms=products, losses=losses, memory=memory)
        goals.append((name, case["goal"] / ms))
        show_operations(report, name, step, ms)
    harness.table(("", "ms", "host", "matrix products", "original", "tokens/s"), rows)
    report.add(goals=[harness.goal(f"{name}, goal over time", ratio, 1.0) for name, ratio in goals])
    report.save(options.json)
