"""One training step of a small character model on the CPU: npmamba against JAX and mambapy.

    python benchmarks/bench_train_step.py [--threads 2] [--quick] [--json FILE]
    python benchmarks/bench_train_step.py --gpu [--quick] [--json FILE]        on a GPU: see train_step_gpu.py

d_model 128, 4 layers, d_state 16, batch 16 x 256, vocabulary 65, float32: forward, backward and AdamW. All contenders
start from the same parameters and must agree on the first losses. "matrix products" are NumPy's products of exactly
the shapes that a step needs (forward, gradient of the input, gradient of the weight), with the memory for the results
at hand: the part of a step that no scan kernel can shorten.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness

BATCH, SEQLEN = 16, 256
GOALS = {"JAX": 3.0, "mambapy": 9.0}
LEARNING_RATE = 1e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="two models on a GPU, without peers")
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternation (default 7)")
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--without", action="append", default=[], help="leave out peers whose name has this in it")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.gpu:
        import train_step_gpu

        train_step_gpu.main(OPTIONS)
        raise SystemExit
    harness.limit_threads(OPTIONS.threads)

import numpy as np  # noqa: E402
from peer_models import BETAS, EPS, Step, jax_step, mambapy_step  # noqa: E402
from peers import jax_selective_scan, jax_selective_scan_tuned  # noqa: E402

from npmamba import MambaConfig, cross_entropy, lm  # noqa: E402
from npmamba.autodiff import adamw, decay_mask, value_and_grad  # noqa: E402


def npmamba_step(params: dict[str, Any], config: MambaConfig, ids: np.ndarray, labels: np.ndarray, lr: float) -> Step:
    """Return an AdamW step of npmamba."""
    optimizer = adamw(lr, BETAS, EPS, mask=decay_mask(params))
    gradient = value_and_grad(lambda params: cross_entropy(lm.logits(params, config, ids), labels))
    state = optimizer.init(params)

    def step() -> float:
        nonlocal params, state
        loss, gradients = gradient(params)
        params, state = optimizer.update(gradients, state, params)
        return float(loss)

    return step


def matrix_products(config: MambaConfig) -> Callable[[], None]:
    """Return a call that does every matrix product of a step, and nothing else."""
    rng = np.random.default_rng(0)
    tokens, inner, model = BATCH * SEQLEN, config.d_inner, config.d_model
    maps = {"in_proj": (2 * inner, model), "x_proj": (config.dt_rank + 2 * config.d_state, inner)}
    maps |= {"dt_proj": (inner, config.dt_rank), "out_proj": (model, inner)}
    products = [_products(rng, tokens, *shape) for _ in range(config.n_layer) for shape in maps.values()]
    products.append(_products(rng, tokens, config.vocab_size, model))

    def run() -> None:
        for three in products:
            for a, b, out in three:
                np.matmul(a, b, out=out)

    return run


def _products(rng: np.random.Generator, tokens: int, n_out: int, n_in: int) -> list[tuple[np.ndarray, ...]]:
    x, dy, weight = (
        rng.standard_normal(shape, np.float32) for shape in ((tokens, n_in), (tokens, n_out), (n_out, n_in))
    )
    return [
        (x, weight.T, np.empty((tokens, n_out), np.float32)),
        (dy, weight, np.empty((tokens, n_in), np.float32)),
        (dy.T, x, np.empty((n_out, n_in), np.float32)),
    ]


def check_losses(steps: dict[str, Step], count: int = 3) -> list[float]:
    """Take `count` steps with every contender; stop unless all see the same losses, which also prove the gradients."""
    losses = {name: [step() for _ in range(count)] for name, step in steps.items()}
    for name, values in losses.items():
        if not np.allclose(values, losses["npmamba"], rtol=2e-4):
            raise SystemExit(f"{name} and npmamba disagree on the losses: {values} and {losses['npmamba']}")
    return losses["npmamba"]


def main(options: argparse.Namespace) -> None:
    config = MambaConfig(vocab_size=65, d_model=128, n_layer=4, d_state=16)
    rng = np.random.default_rng(0)
    ids, labels = (rng.integers(0, config.vocab_size, (BATCH, SEQLEN)) for _ in range(2))
    params = lm.init_params(config, seed=0)
    data = (params, config, ids, labels, LEARNING_RATE)
    steps = {
        "npmamba": npmamba_step(*data),
        "JAX": jax_step(*data, jax_selective_scan),
        "JAX, tuned": jax_step(*data, jax_selective_scan_tuned),
        "mambapy": mambapy_step(*data),
    }
    steps = {n: step for n, step in steps.items() if not any(part in n for part in options.without)}
    rounds = 2 if options.quick else options.rounds
    report = harness.Report("training step, character model", options.threads, rounds=rounds, quick=options.quick)
    losses = check_losses(steps)
    print(f"first losses, the same for all: {', '.join(f'{loss:.4f}' for loss in losses)}\n")
    calls: dict[str, Callable[[], Any]] = {**steps, "matrix products": matrix_products(config)}
    show(report, harness.alternate(calls, rounds, slow_rounds=rounds), losses)
    report.save(options.json)


def show(report: harness.Report, timings: dict[str, harness.Timing], losses: list[float]) -> None:
    """Print and keep the times, tokens per second, the share of the matrix products and the goals."""
    threads = report.data["threads"]
    seconds = {name: timing.seconds(threads) for name, timing in timings.items()}
    own, tokens = seconds["npmamba"], BATCH * SEQLEN
    rows = [
        (name, harness.ms(t), f"{tokens / t:,.0f}" if name != "matrix products" else "",
         f"{t / own:.2f}", len(timings[name].cpu))
        for name, t in seconds.items()
    ]  # fmt: skip
    harness.table(("", "ms", "tokens/s", "times npmamba's", "rounds"), rows)
    share = seconds["matrix products"] / own
    print(f"matrix products are {100 * share:.0f} % of npmamba's step")
    goals = [
        harness.goal(f"step against {name}", seconds[name] / own, least)
        for peer, least in GOALS.items()
        for name in seconds
        if name.startswith(peer)
    ]
    summaries = {name: timing.summary() for name, timing in timings.items()}
    report.add(losses=losses, timings=summaries, share_of_matrix_products=share, goals=goals)


if __name__ == "__main__":
    main(OPTIONS)
