"""The selective scan on the CPU, forward and forward + backward, against PyTorch, JAX and mambapy.

    python benchmarks/bench_selective_scan.py [--quick] [--json FILE]
    python benchmarks/bench_selective_scan.py --gpu [--quick] [--json FILE]        on a GPU: see selective_scan_gpu.py

Float32, one thread unless --threads says otherwise. "core" is u, delta, A, B, C, D; "full" adds z, delta_bias and the
softplus. npmamba runs twice: on channel-contiguous memory, (batch, seqlen, dim) arrays seen transposed as a model has
them, and on C-ordered (batch, dim, seqlen) arrays. Forward + backward is what a training step pays: one recorded
forward and its pullback; "pair" is `selective_scan` and then `selective_scan_backward`, which recomputes the states.
Below the table stand the parts: forward, forward that saves for the backward pass, backward from what was saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import harness

SHAPES = ((1, 1536, 1024, 16), (8, 1536, 512, 16), (1, 256, 65536, 16))
LONG = 2**27
"""Beyond this many states a peer's backward pass takes minutes or gigabytes."""
GOALS = {"forward": 15, "forward + backward": 8}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on a GPU: kernels, limits, memory, other models")
    quick = "3 rounds; no backward pass at the longest shape; on a GPU the shapes only, no peers"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, help="rounds of alternation (default 9; on a GPU 11, and no fewer)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender (default 1)")
    shape = "run only this shape, 0 to 2, on a GPU 0 to 4, and nothing else; may be repeated"
    parser.add_argument("--shape", type=int, action="append", help=shape)
    operation = "run only this operation; a GPU runs the full one"
    parser.add_argument("--operation", choices=("core", "full"), help=operation)
    parser.add_argument("--without", action="append", default=[], help="leave out peers whose name has this in it")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    options = parser.parse_args()
    if any(not 0 <= index < (5 if options.gpu else len(SHAPES)) for index in options.shape or ()):
        parser.error("there is no such shape")
    return options


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.gpu:
        import selective_scan_gpu

        selective_scan_gpu.main(OPTIONS)
        raise SystemExit
    harness.limit_threads(OPTIONS.threads)

import numpy as np  # noqa: E402
from limits import exp2_rate  # noqa: E402
from peers import GRADIENTS, PEERS, Peer, ScanCase  # noqa: E402

import npmamba  # noqa: E402
from npmamba.autodiff import pullback  # noqa: E402
from npmamba.cpu import selective_scan as twin  # noqa: E402


def own(case: ScanCase, *, c_order: bool = False, pair: bool = False) -> Peer:
    """Return npmamba as a contender, on one memory order, with the recorded or the recomputing backward."""

    def view(x: np.ndarray) -> np.ndarray:
        x = x.swapaxes(1, 2) if x.ndim == 3 else x
        return np.ascontiguousarray(x) if c_order else x

    names = [name for name in GRADIENTS if getattr(case, name) is not None]
    inputs, dout = [view(x) for x in case.inputs], view(case.dout)
    softplus = case.delta_bias is not None

    def scan(*arrays: Any) -> Any:
        return npmamba.selective_scan(**dict(zip(names, arrays, strict=True)), delta_softplus=softplus)

    def recorded() -> Any:
        y, pull = pullback(scan, *inputs)
        return y, pull(dout)

    def recomputed() -> Any:
        named = dict(zip(names, inputs, strict=True))
        gradients = npmamba.selective_scan_backward(dout, **named, delta_softplus=softplus)
        return scan(*inputs), [getattr(gradients, name) for name in names]

    forward_backward = recomputed if pair else recorded

    def values() -> list[np.ndarray]:
        y, gradients = forward_backward()
        return [x.swapaxes(1, 2) if x.ndim == 3 else x for x in (y, *gradients)]

    return Peer(lambda: scan(*inputs), forward_backward, values)


OWN: dict[str, Callable[[ScanCase], Peer]] = {
    "npmamba": own,
    "npmamba, C order": lambda case: own(case, c_order=True),
    "npmamba, pair": lambda case: own(case, pair=True),
}


def check_agreement(makers: dict[str, Callable[[ScanCase], Peer]]) -> None:
    """Stop unless all contenders give the same outputs and gradients on a small case."""
    for full in (False, True):
        case = ScanCase.draw(2, 48, 150, 16, full=full)
        reference = OWN["npmamba"](case).values()
        names = ["y", *(name for name in GRADIENTS if getattr(case, name) is not None)]
        for contender, make in makers.items():
            for name, x, y in zip(names, make(case).values(), reference, strict=True):
                error = np.abs(x - y).max() / np.abs(y).max()
                if not error < 2e-5:
                    raise SystemExit(f"{contender} and npmamba disagree on {name} by {error:.1e}: nothing to compare")


def directions(shape: tuple[int, ...], quick: bool) -> list[str]:
    """Return what is measured at a shape: in a quick run no backward pass at the longest."""
    return [name for name in GOALS if not (quick and name != "forward" and np.prod(shape) > LONG)]


def skipped(name: str, direction: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a contender is left out: the pair in forward, and what needs too much memory."""
    if direction == "forward":
        return name == "npmamba, pair"
    return np.prod(shape) > LONG and "mambapy" in name


def measure(
    makers: dict[str, Callable[[ScanCase], Peer]], case: ScanCase, direction: str, keep: Iterable[str], rounds: int
) -> dict[str, harness.Timing]:
    peers = {name: makers[name](case) for name in keep}
    calls = {n: p.forward if direction == "forward" else p.forward_backward for n, p in peers.items()}
    return harness.alternate(calls, rounds, slow_rounds=1 if rounds <= 3 else 2)


def measure_parts(case: ScanCase, rounds: int) -> dict[str, harness.Timing]:
    """Time the CPU kernels alone, as the tape calls them: no argument checks, no tape."""
    arrays = {name: getattr(case, name) for name in GRADIENTS} | {"initial_state": None}
    arrays |= {n: x.swapaxes(1, 2) for n, x in arrays.items() if x is not None and x.ndim == 3}
    options = {"delta_softplus": case.delta_bias is not None, "discretization": "euler", "seq_idx": None}
    options |= {"reverse": False, "precise": False}
    dout = case.dout.swapaxes(1, 2)
    saved = twin.forward(**arrays, **options, save=True)[2]
    calls = {
        "forward": lambda: twin.forward(**arrays, **options, save=False),
        "forward, saving": lambda: twin.forward(**arrays, **options, save=True),
        "backward": lambda: twin.backward(dout, None, saved),
    }
    return harness.alternate(calls, rounds)


def show(report: harness.Report, timings: dict[str, harness.Timing], case: ScanCase, rate: float, **what: Any) -> None:
    """Print and keep one comparison: times, ratios, the share of the exponentials' rate, and the goals."""
    threads, direction = report.data["threads"], what["direction"]
    first = timings["npmamba"].seconds(threads)
    rows = []
    for name, timing in timings.items():
        seconds = timing.seconds(threads)
        spread = f"{1e3 * min(timing.cpu):.1f}" if threads == 1 else f"{1e3 * min(timing.wall):.1f}"
        rows.append((name, harness.ms(seconds), spread, f"{seconds / first:.1f}", len(timing.cpu)))
    batch, dim, seqlen, dstate = what["shape"]
    print(f"{what['operation']}, {direction}, batch {batch}, dim {dim}, seqlen {seqlen}, dstate {dstate}")
    harness.table(("", "ms", "fastest", "times npmamba's", "rounds"), rows)
    result = {**what, "timings": {name: timing.summary() for name, timing in timings.items()}}
    if direction == "forward":
        share = case.states / first / (rate * threads)
        print(f"share of the exp2 rate: {100 * share:.0f} % ({case.states / first / 1e9:.2f} G states/s)")
        result["share_of_exp2_rate"] = share
    least = GOALS[direction]
    result["goals"] = [
        harness.goal(f"{direction} against {name}", timings[name].seconds(threads) / first, least)
        for name in timings
        if name.startswith("torch loop")
    ]
    report.add(**result)
    print()


def show_parts(report: harness.Report, timings: dict[str, harness.Timing], **what: Any) -> None:
    """Print and keep the kernels' own times."""
    seconds = {name: timing.seconds(report.data["threads"]) for name, timing in timings.items()}
    parts = ", ".join(f"{name} {harness.ms(value)} ms" for name, value in seconds.items())
    saving = seconds["forward, saving"] / seconds["forward"] - 1
    print(
        f"kernels alone: {parts}; saving costs {100 * saving:+.0f} %, backward is "
        f"{seconds['backward'] / seconds['forward']:.2f} forwards\n"
    )
    report.add(**what, direction="kernels alone", timings={name: t.summary() for name, t in timings.items()})


def main(options: argparse.Namespace) -> None:
    peers = {n: p for n, p in PEERS.items() if not any(part in n for part in options.without)}
    makers = OWN | peers
    check_agreement(makers)
    rounds = 3 if options.quick else options.rounds or 9
    report = harness.Report("selective scan, float32", options.threads, rounds=rounds, quick=options.quick)
    rate = exp2_rate()
    report.data["exp2_rate"] = rate
    print(f"polynomial exp2, one core, data in the L1 cache: {rate / 1e9:.2f} G/s\n")
    for index in options.shape or range(len(SHAPES)):
        for operation in [options.operation] if options.operation else ["core", "full"]:
            case = ScanCase.draw(*SHAPES[index], full=operation == "full")
            for direction in directions(SHAPES[index], options.quick):
                keep = [n for n in makers if not skipped(n, direction, SHAPES[index])]
                timings = measure(makers, case, direction, keep, rounds)
                show(report, timings, case, rate, operation=operation, direction=direction, shape=SHAPES[index])
            show_parts(report, measure_parts(case, rounds), operation=operation, shape=SHAPES[index])
    report.save(options.json)


if __name__ == "__main__":
    main(OPTIONS)
