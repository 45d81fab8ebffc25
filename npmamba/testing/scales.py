"""How large the terms are that a scan adds up: no computed result can be nearer to the truth than eps times that.

The functions run the scan, and its gradients, on absolute values, so that nothing cancels. Decays are positive anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import (
    as_float64,
    discretize,
    phi_derivative,
    runs,
    sigmoid,
    silu,
    softplus,
)
from npmamba.testing.parts import backwards, map_per_channel, raw_step


def _terms(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return decay, reset decay, weights and absolute inputs of every step, (batch, dim, dstate, seqlen) or fewer."""
    case = {n: as_float64(x) if isinstance(x, np.ndarray) and n != "seq_idx" else x for n, x in arguments.items()}
    raw, positive = raw_step(case)
    Delta = softplus(raw) if positive else np.abs(raw)
    rule = case.get("discretization", "euler")
    x, a, f = discretize(Delta[:, :, None], case["A"][..., None], rule)
    valid, start = (mask[:, None, None] for mask in runs(case.get("seq_idx"), Delta.shape[0], Delta.shape[2]))
    B, C = (np.abs(map_per_channel(case, name)) for name in ("B", "C"))
    gate = np.ones_like(Delta) if case.get("z") is None else np.abs(silu(case["z"]))
    return {
        "Delta": Delta, "slope": sigmoid(raw) if positive else np.ones_like(raw), "a": a, "f": np.abs(f),
        "reset": np.where(valid, np.where(start, 0, a), 1), "valid": valid, "B": np.where(valid, B, 0),
        "C": np.where(valid, C, 0), "u": np.where(valid[:, 0], np.abs(case["u"]), 0), "A": np.abs(case["A"]),
        "D": 0.0 if case.get("D") is None else np.abs(case["D"])[:, None], "gate": gate,
        "x": x,
        "h0": 0.0 if case.get("initial_state") is None else np.abs(case["initial_state"]),
    }  # fmt: skip


def _states(q: dict[str, Any]) -> tuple[Any, Any]:
    """Return the states before and after every step."""
    inflow = np.where(q["valid"], q["f"] * q["B"] * q["u"][:, :, None], 0)
    states = np.empty((inflow.shape[3] + 1, *inflow.shape[:3]))  # a time's numbers side by side: one loop is fast
    states[0], decays, inflows = q["h0"], _by_time(q["reset"], inflow), _by_time(inflow, inflow)
    for t in range(inflow.shape[3]):
        np.multiply(decays[t], states[t], out=states[t + 1])
        states[t + 1] += inflows[t]
    states = np.ascontiguousarray(np.moveaxis(states, 0, -1))
    return states[..., :-1], states[..., 1:]


def _by_time(x: Any, like: Any) -> Any:
    return np.ascontiguousarray(np.moveaxis(np.broadcast_to(x, like.shape), -1, 0))


@np.errstate(all="ignore")
def scan_scale(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Run the scan on absolute values.

    Parameters
    ----------
    arguments : dict
        Keyword arguments of ``selective_scan``.

    Returns
    -------
    E_y : (batch, dim, seqlen) float64
    E_state : (batch, dim, dstate) float64

    Examples
    --------
    Here y is 0 because 1 and -1 cancel, but a rounding error of either would show in it:

    >>> one = np.ones((1, 1, 2))
    >>> case = {"u": np.array([[[1.0, -1.0]]]), "delta": one, "A": np.zeros((1, 1)), "B": one, "C": one}
    >>> scan_scale(case)[0]
    array([[[1., 2.]]])
    """
    if arguments.get("reverse"):
        E_y, E_state = scan_scale(backwards(arguments))
        return E_y[..., ::-1], E_state
    q = _terms(arguments)
    _, after = _states(q)
    y = ((q["C"] * after).sum(2) + q["D"] * q["u"]) * q["gate"]
    last = after[..., -1] if after.shape[3] else np.zeros(after.shape[:3]) + q["h0"]
    return np.where(q["valid"][:, 0], y, 0), last


@np.errstate(all="ignore")
def gradient_scale(arguments: dict[str, Any], dout: Any, dlast_state: Any = None) -> dict[str, Any]:
    """Run the backward of the scan on absolute values.

    Returns
    -------
    dict
        float64 arrays by the arguments' names; B and C as every channel sees them, (batch, dim, dstate, seqlen).
    """
    if arguments.get("reverse"):
        scale = gradient_scale(backwards(arguments), np.asarray(dout)[..., ::-1], dlast_state)
        return {name: x[..., ::-1] if name in ("u", "delta", "z", "B", "C") else x for name, x in scale.items()}
    q = _terms(arguments)
    before, after = _states(q)
    dout, u = np.abs(as_float64(dout)), q["u"][:, :, None]
    dy = np.where(q["valid"][:, 0], dout * q["gate"], 0)
    g = np.zeros(before.shape[:3]) + (0.0 if dlast_state is None else np.abs(as_float64(dlast_state)))
    gs, decays = _by_time(q["C"] * dy[:, :, None], before).copy(), _by_time(q["reset"], before)
    for t in reversed(range(before.shape[3])):
        gs[t] += g
        g = gs[t] * decays[t]
    gs = np.ascontiguousarray(np.moveaxis(gs, 0, -1))
    inner = np.where(q["valid"], gs * q["B"] * u, 0)
    p, step = np.where(q["valid"], gs * q["reset"] * before, 0), q["Delta"][:, :, None]
    weight, dA = inner, p * step
    if arguments.get("discretization") == "zoh":
        weight = inner * q["a"]
        dA = dA + inner * step**2 * phi_derivative(q["x"])
    ddelta = np.where(q["valid"][:, 0], (p * q["A"][..., None] + weight).sum(2) * q["slope"], 0)
    y = (q["C"] * after).sum(2) + q["D"] * q["u"]
    z = np.zeros_like(dy) if arguments.get("z") is None else as_float64(arguments["z"])
    gate_slope = sigmoid(z) * (1 + np.abs(z) * sigmoid(-z))
    return {
        "u": q["D"] * dy + (gs * q["f"] * q["B"]).sum(2), "delta": ddelta, "A": dA.sum((0, 3)),
        "B": np.where(q["valid"], gs * q["f"] * u, 0), "C": dy[:, :, None] * after, "D": (dy * q["u"]).sum((0, 2)),
        "z": np.where(q["valid"][:, 0], dout * y * gate_slope, 0),
        "delta_bias": ddelta.sum((0, 2)), "initial_state": g,
    }  # fmt: skip
