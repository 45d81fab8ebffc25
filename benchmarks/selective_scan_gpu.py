"""The selective scan on a GPU: ``bench_selective_scan.py --gpu``.

Everything on (z, D, bias, softplus), channels side by side in memory unless said otherwise. "ms" is the time of all
kernels of a pass, without the host's; "wall" is the public call until the device is done. "floor" is the time no kernel
can beat here: arguments and results at the bandwidth of a copy, or one exponential for each state and step at the rate
of a kernel that does nothing else, whichever is longer. "copy" and "exp2" say how much of the two is reached.

"original" is the CUDA C++ kernel that was published with Mamba (state-spaces/mamba), built for sm_90 with its own
flags and timed on an H200; "goal" is what these kernels are to reach there.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gpu_limits
import harness
import ml_dtypes
import numpy as np
from gpu_timing import copy_bandwidth, cupy, described
from launches import compile_ahead
from scan_gpu_case import Case, calls, draw, draw_enough
from scan_gpu_costs import measure_host, memory, wall
from scan_gpu_goals import SAVING, SCRATCH, SHAPES, Shape, known
from scan_gpu_lengths import DIM, DSTATE, LENGTHS, check_agreement, measure_lengths

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
DTYPES = {FLOAT32: 1e-4, BFLOAT16: 3e-2}
"""With the largest error, in multiples of the largest number, at which there is something to compare."""
DIRECTIONS = ("forward", "forward, saving", "backward")
STATES = (8, 16, 64, 128)


@dataclass(frozen=True)
class Bench:
    """What all sections need: where figures go, how often to measure, and what the device allows."""

    report: harness.Report
    rounds: int
    bandwidth: float
    rate: float
    device: str

    def milliseconds(self, cases: list[Case], directions: tuple[str, ...]) -> dict[str, float]:
        """Return the time of the kernels of each pass."""
        found = calls(cases, directions)
        return {name: gpu_limits.hidden_milliseconds(call, self.rounds) for name, call in found.items()}

    def figures(self, case: Case, direction: str, ms: float) -> dict[str, float]:
        """Return what a time means beside the limits."""
        states, moved = case.elements * case.dstate / self.rate, case.moved(direction) / self.bandwidth
        shares = {"share_of_copy": 1e3 * moved / ms, "share_of_exp2": 1e3 * states / ms}
        return {"ms": ms, "floor_ms": 1e3 * max(states, moved), "elements_per_s": 1e3 * case.elements / ms, **shares}


# --- the shapes ---


def _row(label: str, found: dict[str, Any]) -> tuple[str, ...]:
    goal, original, ms = found["goal_ms"], found["original_ms"], found["ms"]
    beside = ("", "", "") if goal is None else (f"{goal:g}", f"{original:g}", f"{original / ms:.1f}")
    floor = (f"{found['floor_ms']:.3f}", f"{100 * found['floor_ms'] / ms:.0f} %")
    shares = (f"{100 * found['share_of_copy']:.0f} %", f"{100 * found['share_of_exp2']:.0f} %")
    rate, wall_ms = f"{found['elements_per_s'] / 1e9:.1f}", f"{found['wall_ms']:.3f}"
    return (label, f"{ms:.3f}", *beside, *floor, rate, *shares, wall_ms)


def measure_shape(bench: Bench, index: int, dtype: np.dtype) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the figures of all directions at a shape, and the memory they take."""
    cases = draw_enough(SHAPES[index], DSTATE, dtype)
    found = []
    for direction, ms in bench.milliseconds(cases, DIRECTIONS).items():
        one = {"direction": direction, **bench.figures(cases[0], direction, ms)}
        one["wall_ms"] = wall(cases[0], direction, bench.rounds)
        found.append(one | known(bench.device, direction, dtype.name, index))
    return found, memory(cases[0])


def measure_shapes(bench: Bench, shapes: list[int], dtype: np.dtype) -> None:
    """Print and keep times, memory and goals of one dtype."""
    rows, sizes, goals = [], [], []
    for index in shapes:
        shape = " x ".join(f"{n:,}" for n in SHAPES[index])
        found, used = measure_shape(bench, index, dtype)
        rows += [_row(f"{shape}, {one['direction']}", one) for one in found]
        sizes.append((shape, *(f"{size:.2f}" for size in used.values())))
        goals += [(f"{dtype} {shape}, {name}", *ratio) for name, *ratio in _ratios(dtype, found, used)]
        for one in found:
            bench.report.add(section="shapes", shape=SHAPES[index], dtype=dtype.name, dstate=DSTATE, **one)
        bench.report.add(section="memory", shape=SHAPES[index], dtype=dtype.name, in_multiples_of_u=used)
        cupy.get_default_memory_pool().free_all_blocks()
    print(f"{dtype}, dstate {DSTATE}")
    limits = ("floor", "floor/ms", "G/s", "copy", "exp2", "wall ms")
    harness.table(("batch x dim x seqlen", "ms", "goal", "original", "original/ms", *limits), rows)
    harness.table((f"{dtype}: memory beside results, in multiples of u", *used), sizes)
    bench.report.add(goals=[harness.goal(*goal) for goal in goals])
    print()


def _ratios(dtype: np.dtype, found: list[dict[str, Any]], used: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """Yield what is to reach at least a number: name, ratio, least."""
    for one in found:
        if one["goal_ms"] is not None:
            yield f"{one['direction']}, goal over time", one["goal_ms"] / one["ms"], 1.0
    ms = {one["direction"]: one["ms"] for one in found}
    yield "forward without saving over with", ms["forward"] / ms["forward, saving"], 1 / SAVING
    if dtype == FLOAT32:
        yield f"{SCRATCH:g} u over scratch memory", SCRATCH / used["saved and backward"], 1.0


# --- memory order and number of states ---


def measure_orders(bench: Bench, dtype: np.dtype) -> None:
    """Print and keep how much longer C-ordered arrays take."""
    ms = {}
    for c_order in (False, True):
        ms[c_order] = bench.milliseconds(draw_enough(SHAPES[0], DSTATE, dtype, c_order=c_order), DIRECTIONS)
    rows = [(n, f"{ms[False][n]:.3f}", f"{ms[True][n]:.3f}", f"{ms[True][n] / ms[False][n]:.2f}") for n in DIRECTIONS]
    print(f"memory order, {dtype}, {SHAPES[0]}")
    harness.table(("", "channels side by side, ms", "C order, ms", "ratio"), rows)
    bench.report.add(section="order", shape=SHAPES[0], dtype=dtype.name, ms=ms[False], c_order_ms=ms[True])


def measure_states(bench: Bench) -> None:
    """Print and keep the time of a state for several numbers of them, against 16."""
    directions, found = ("forward", "backward"), {}
    for dstate in STATES:
        found[dstate] = bench.milliseconds(draw_enough(SHAPES[0], dstate, FLOAT32), directions)
        cupy.get_default_memory_pool().free_all_blocks()
    rows = []
    for dstate, ms in found.items():
        ratios = {name: 16 * ms[name] / (dstate * found[16][name]) for name in directions}
        rows.append((dstate, *(text for n in directions for text in (f"{ms[n]:.3f}", f"{ratios[n]:.2f}"))))
        bench.report.add(section="states", shape=SHAPES[0], dstate=dstate, ms=ms, time_of_a_state_against_16=ratios)
    print(f"number of states, float32, {SHAPES[0]}")
    harness.table(("dstate", "forward ms", "of a state, against 16", "backward ms", "of a state, against 16"), rows)


# --- all of it ---


def _planned(shapes: list[int], full: bool) -> Iterator[tuple[Shape, int, np.dtype, bool]]:
    for dtype in DTYPES:
        yield from ((SHAPES[index], DSTATE, dtype, False) for index in shapes)
        if full:
            yield SHAPES[0], DSTATE, dtype, True
            yield from (((1, DIM, seqlen), DSTATE, dtype, False) for seqlen in LENGTHS)
    if full:
        yield from ((SHAPES[0], dstate, FLOAT32, False) for dstate in STATES)


def _prepare(shapes: list[int], full: bool) -> None:
    """Compile everything that will be launched, on all cores at once."""

    def passes(plan: tuple[Shape, int, np.dtype, bool]) -> None:
        case = draw(*plan[:3], c_order=plan[3], seed=None)
        case.forward()
        case.backward(case.forward(save=True)[2])

    wanted = [lambda plan=plan: passes(plan) for plan in [((2, 64, 96), DSTATE, d, False) for d in DTYPES]]
    wanted += [lambda plan=plan: passes(plan) for plan in _planned(shapes, full)]
    capability = cupy.cuda.Device().compute_capability
    try:
        compile_ahead([*wanted, lambda: gpu_limits.compute(1, 1)], (int(capability[:-1]), int(capability[-1])))
    except Exception as error:  # then each is compiled where it is launched, and what is wrong with one shows there
        print(f"kernels are compiled one by one ({type(error).__name__}: {error})")
    cupy.get_default_memory_pool().free_all_blocks()


def _start(rounds: int, quick: bool) -> harness.Report:
    report = harness.Report("selective scan on a GPU", 1, rounds=rounds, quick=quick, **described())
    report.data["clock"] = "CUDA events, without the host's time, but for wall and host times"
    report.data["command"] = f"python benchmarks/{pathlib.Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    return report


def main(options: argparse.Namespace) -> None:
    shapes, full = options.shape or list(range(len(SHAPES))), not (options.quick or options.shape)
    rounds = max(11, options.rounds or 0)
    report = _start(rounds, options.quick)
    _prepare(shapes, full)
    for dtype, tolerance in DTYPES.items():
        check_agreement(dtype, tolerance)
    device = report.data["settings"]["device"]
    bench = Bench(report, rounds, copy_bandwidth(1 << 30), gpu_limits.exp2_rate(), device)
    report.data |= {"copy_bandwidth": bench.bandwidth, "exp2_rate": bench.rate}
    print(f"{device}: a copy moves {bench.bandwidth / 1e9:,.0f} GB/s, ", end="")
    print(f"exp2 alone runs at {bench.rate / 1e9:,.0f} G/s\n")
    for dtype in DTYPES:
        measure_shapes(bench, shapes, dtype)
    if not options.shape:
        measure_host(report)
    if full:
        for dtype in DTYPES:
            measure_orders(bench, dtype)
        measure_states(bench)
        measure_lengths(report, tuple(DTYPES), rounds, options.without)
    report.save(options.json)
