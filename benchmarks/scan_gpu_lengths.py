"""The scan over one long sequence beside what would stand in its place: the left half of the paper's Figure 8.

Gu & Dao, arXiv 2312.00752, section 4.5: batch 1, 1,024 channels, 16 states, forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_peers
import gpu_timing
import harness
import numpy as np
from gpu_limits import hidden_milliseconds
from gpu_peers import PEERS, SCANS
from scan_gpu_case import OPTIONS, Case, draw, draw_enough, in_turn

from npmamba.backend import on_host
from npmamba.reference import selective_scan as reference

DIM, DSTATE = 1024, 16
LENGTHS = (512, 2048, 8192, 32768, 131072, 524288)
SLOW = 50.0
"""Milliseconds from which a peer gets 3 rounds, whose host time is part of them."""
Make = Callable[[Case], Callable[[], Any]]


# --- agreement ---


def _float64(x: Any) -> np.ndarray:
    return np.asarray(on_host(x), np.float64)


def _stop_unless(name: str, x: Any, y: Any, tolerance: float) -> None:
    error = np.abs(x - y).max() / np.abs(y).max()
    if not error < tolerance:
        raise SystemExit(f"{name} is off by {error:.1e}: nothing to compare")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def check_agreement(dtype: np.dtype, tolerance: float) -> None:
    """Stop unless output and gradients of a small case are those of the float64 reference."""
    case = draw((2, 64, 96), DSTATE, dtype)
    y, pull = case.recorded()
    gradients = pull(case.dout)
    arrays = {name: _float64(x) for name, x in case.arrays.items()}
    options = {name: value for name, value in OPTIONS.items() if name != "precise"}
    wanted = reference.backward(_float64(case.dout), **arrays, **options)
    _stop_unless(f"{dtype}: y", _float64(y), reference.forward(**arrays, **options)[0], tolerance)
    for name, x in zip(arrays, gradients, strict=True):
        _stop_unless(f"{dtype}: the gradient of {name}", _float64(x), getattr(wanted, name), tolerance)


def check_peers(peers: dict[str, Make]) -> dict[str, Make]:
    """Return the peers that can run here; stop if a scan among them computes something else."""
    case, found = draw((1, 128, 96), DSTATE, np.dtype(np.float32)), {}
    y = _float64(case.scan())
    for name, make in peers.items():
        try:
            out = make(case)()
        except Exception as error:  # whatever a library that is missing or does not fit this device raises
            print(f"left out: {name} ({_said(error)})")
            continue
        found[name] = make
        if name in SCANS:
            _stop_unless(name, out.cpu().numpy().swapaxes(1, 2), y, 1e-4)
    return found


# --- time ---


def _peer_milliseconds(make: Make, case: Case) -> float:
    call = make(case)
    first = gpu_timing.milliseconds(call, rounds=1, warm=1)
    return first if first > 20 * SLOW else _repeated(call, first)


def _repeated(call: Callable[[], Any], first: float) -> float:
    return gpu_timing.milliseconds(call, rounds=3, warm=0) if first > SLOW else hidden_milliseconds(call)


def _peers_milliseconds(peers: dict[str, Make], case: Case) -> dict[str, float | None]:
    """Return each peer's time, None where it is left out."""
    found: dict[str, float | None] = {}
    for name, make in peers.items():
        found[name] = None
        if case.shape[2] <= gpu_peers.LONGEST.get(name, case.shape[2]):
            try:
                found[name] = _peer_milliseconds(make, case)
            except Exception as error:  # mostly too little memory
                print(f"left out at {case.shape[2]:,} steps: {name} ({_said(error)})")
        gpu_peers.release()
    return found


def _own_milliseconds(seqlen: int, dtype: np.dtype, rounds: int) -> float:
    cases = draw_enough((1, DIM, seqlen), DSTATE, dtype)
    return hidden_milliseconds(in_turn([case.forward for case in cases]), rounds)


def _cell(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3f}" if ms < 100 else f"{ms:.0f}"


def _ratios(own: dict[str, float], peers: dict[str, float | None]) -> list[str]:
    """Return how many times longer each peer takes; attention computes in bfloat16, the others in float32."""
    against = {name: own["bfloat16" if name == "FlashAttention" else "float32"] for name in peers}
    return ["" if ms is None else f"{ms / against[name]:.1f}" for name, ms in peers.items()]


def measure_lengths(report: harness.Report, dtypes: tuple[np.dtype, ...], rounds: int, without: list[str]) -> None:
    """Print and keep the times over sequences of growing length."""
    peers = check_peers({n: make for n, make in PEERS.items() if not any(part in n for part in without)})
    times, ratios = [], []
    for seqlen in LENGTHS:
        own = {dtype.name: _own_milliseconds(seqlen, dtype, rounds) for dtype in dtypes}
        theirs = _peers_milliseconds(peers, draw((1, DIM, seqlen), DSTATE, dtypes[0]))
        times.append((f"{seqlen:,}", *map(_cell, [*own.values(), *theirs.values()])))
        ratios.append((f"{seqlen:,}", *_ratios(own, theirs)))
        report.add(section="lengths", shape=(1, DIM, seqlen), ms=own, peers_ms=theirs)
    print(f"forward, batch 1, {DIM:,} channels, {DSTATE} states, milliseconds")
    harness.table(("steps", *(f"npmamba {dtype}" for dtype in dtypes), *peers), times)
    if peers:
        print("times npmamba's, FlashAttention against bfloat16, the others against float32")
        harness.table(("steps", *peers), ratios)
