"""The selective scan and its gradients in the arithmetic of rounding errors: see `npmamba.testing.tolerance`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.reference.functions import flip_time, runs
from npmamba.reference.selective_scan import SelectiveScanGradients
from npmamba.testing.rounding import Rounded, Step, gate, step
from npmamba.testing.sequences import complete_scan
from npmamba.testing.values import parameter_dtype

Array = Any


class _Scan(NamedTuple):
    """A scan in numbers with errors, in the order of scanning; all (batch, dim, dstate or 1, seqlen)."""

    u: Rounded
    B: Rounded
    C: Rounded
    D: Rounded
    step: Step
    kept: Array  # (batch, 1, 1, seqlen): steps that are no padding
    decay: Rounded  # as it acts: zero where a run starts, one where nothing happens
    first: Rounded
    h: Rounded
    y: Rounded


def _along_time(decay: Rounded, inflow: Rounded, state: Rounded, kept: Array) -> Rounded:
    """Compute h[t] = decay[t] h[t-1] + inflow[t] from `state`; a step that is not kept adds no rounding."""
    h = Rounded(np.empty(inflow.size.shape), np.empty(inflow.size.shape))
    for t in range(inflow.size.shape[-1]):
        a, w = decay.at(np.s_[..., t]), inflow.at(np.s_[..., t])
        size = a.size * state.size + w.size
        carried = a.size * state.error + a.error * state.size
        state = Rounded(size, carried + w.error + 2 * size * kept[..., t])
        h.size[..., t], h.error[..., t] = state
    return h


def _maps(B: Array, batch: int, dim: int, seqlen: int) -> Rounded:
    """Return B or C as every channel sees it: (batch, dim, dstate, seqlen)."""
    if B.ndim == 2:
        return Rounded.exact(np.broadcast_to(B[:, :, None], (batch, *B.shape, seqlen)))
    groups = B if B.ndim == 4 else B[:, None]
    return Rounded.exact(np.repeat(groups, dim // max(groups.shape[1], 1), axis=1))


def _scan(a: dict[str, Any], compute: np.dtype) -> _Scan:
    batch, dim, seqlen = a["u"].shape
    smallest = float(np.finfo(compute).tiny / np.finfo(compute).eps)
    s = step(a["delta"], a["delta_bias"], a["delta_softplus"], a["A"], a["discretization"], smallest)
    kept, start = (x[:, None, None] for x in runs(a["seq_idx"], batch, seqlen))
    u, B, C = Rounded.exact(a["u"][:, :, None]), *(_maps(a[name], batch, dim, seqlen) for name in ("B", "C"))
    D = Rounded.exact(np.zeros((dim, 1)) if a["D"] is None else a["D"][:, None])
    decay = s.decay.where(kept & ~start)
    decay = Rounded(decay.size + ~kept, decay.error)
    zeros = np.zeros((batch, *a["A"].shape))
    first = Rounded.exact(zeros if a["initial_state"] is None else a["initial_state"])
    h = _along_time(decay, (s.weight * B * u).where(kept), first, kept)
    y = _joined(C * h, D * u.at(np.s_[:, :, 0]))
    return _Scan(u, B, C, D, s, kept, decay, first, h, y)


def _joined(states: Rounded, direct: Rounded) -> Rounded:
    """Add up over the states, and the direct path: it may be what the sum begins with, and is rounded at every term."""
    total = states.sum(2) + direct
    return total._replace(error=total.error + 2 * np.sqrt(states.size.shape[2]) * direct.size)


def _in_order(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a scan's arguments in float64, in the order of scanning."""
    a = complete_scan(arguments)
    if not a["reverse"]:
        return a
    timed = {name: flip_time(a[name], keep_ndim=2) for name in ("u", "delta", "z", "B", "C")}
    return {**a, **timed, "seq_idx": flip_time(a["seq_idx"])}


def _flipped(x: Rounded, reverse: bool) -> Rounded:
    return x.at(np.s_[..., ::-1]) if reverse else x


def forward(arguments: dict[str, Any]) -> tuple[Rounded, Rounded]:
    """Return y and last_state of a scan, with the errors they may have.

    >>> one = np.ones((1, 1, 2))
    >>> y, _ = forward(dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one))
    >>> y.size
    array([[[1., 2.]]])
    """
    a = _in_order(arguments)
    with np.errstate(all="ignore"):
        s = _scan(a, parameter_dtype(arguments["u"].dtype))
        y = s.y if a["z"] is None else s.y * gate(a["z"])[0]
        y = _flipped(y.where(s.kept[:, 0]), a["reverse"])
    return y, s.h.at(np.s_[..., -1]) if a["u"].shape[-1] else s.first


def backward(dout: Array, arguments: dict[str, Any], dlast_state: Array = None) -> SelectiveScanGradients:
    """Return the gradients of a scan, with the errors they may have.

    >>> one = np.ones((1, 1, 2))
    >>> backward(one, dict(u=one, delta=one, A=0 * one[0, :, :1], B=one, C=one)).u.size
    array([[[2., 1.]]])
    """
    a = _in_order(arguments)
    dout = flip_time(dout) if a["reverse"] else dout
    with np.errstate(all="ignore"):
        s = _scan(a, parameter_dtype(arguments["u"].dtype))
        g = _gradients(s, a, np.asarray(dout, np.float64), dlast_state)
    timed = {name: _flipped(getattr(g, name), a["reverse"]) for name in ("u", "delta")}
    timed |= {name: _flipped(x, a["reverse"] and a[name].ndim > 2) for name in ("B", "C") if (x := getattr(g, name))}
    return g._replace(**timed, z=None if g.z is None else _flipped(g.z, a["reverse"]))


def _state_gradients(s: _Scan, dy: Rounded, dlast_state: Array) -> tuple[Rounded, Rounded]:
    """Return the gradients of the state after every step, and of the initial state."""
    last = Rounded.exact(np.zeros_like(s.first.size) if dlast_state is None else np.asarray(dlast_state, np.float64))
    back = np.s_[..., ::-1]
    ones = Rounded.exact(np.ones_like(last.size[..., None]))
    after = Rounded(*(np.concatenate([x[..., 1:], one], -1) for x, one in zip(s.decay, ones, strict=True)))
    g = _along_time(after.at(back), (s.C * dy).where(s.kept).at(back), last, s.kept[back]).at(back)
    return g, s.decay.at(np.s_[..., 0]) * g.at(np.s_[..., 0]) if g.size.shape[-1] else last


def _gradients(s: _Scan, a: dict[str, Any], dout: Array, dlast_state: Array) -> SelectiveScanGradients:
    """Return the gradients in numbers with errors; the equations are those of `reference.selective_scan.backward`."""
    dy, dz, kept = Rounded.exact(dout), None, s.kept[:, 0]
    if a["z"] is not None:
        silu, slope = gate(a["z"])
        dz, dy = (dy * s.y * slope).where(kept), dy * silu
    dy = dy.where(kept)
    wide = Rounded(dy.size[:, :, None], dy.error[:, :, None])
    g, dinitial = _state_gradients(s, wide, dlast_state)
    before = Rounded(*(np.concatenate([x[..., None], h[..., :-1]], -1) for x, h in zip(s.first, s.h, strict=True)))
    before = before.at(np.s_[..., : g.size.shape[-1]])
    p, df = (g * s.decay * before).where(s.kept), (g * s.B * s.u).where(s.kept)
    dA = (p * s.step.Delta).sum((0, 3)) + (df * s.step.dweight_dA).sum((0, 3))
    dDelta = (p * s.step.A).sum(2) + (df * s.step.dweight_dDelta).sum(2)
    ddelta = dDelta * s.step.slope.at(np.s_[:, :, 0])
    inflow = (g * s.step.weight).where(s.kept)
    u = s.u.at(np.s_[:, :, 0])
    return SelectiveScanGradients(
        _joined(inflow * s.B, s.D * dy), ddelta, dA, _of_maps(inflow * s.u, a["B"]), _of_maps(wide * s.h, a["C"]),
        None if a["D"] is None else (dy * u).sum((0, 2)), dz,
        None if a["delta_bias"] is None else ddelta.sum((0, 2)), None if a["initial_state"] is None else dinitial,
    )  # fmt: skip


def _of_maps(terms: Rounded, B: Array) -> Rounded:
    """Add up what each channel and step contributes to the gradient of B or C."""
    if B.ndim == 2:
        return terms.sum((0, 3))
    batch, dim, dstate, seqlen = terms.size.shape
    groups = B.shape[1] if B.ndim == 4 else 1
    grouped = terms.grouped((batch, groups, dim // groups, dstate, seqlen), (2,))
    return grouped if B.ndim == 4 else grouped.at(np.s_[:, 0])
