"""A right selective scan in plain NumPy, with its backward, written to be got wrong: a method for every step of it.

`gallery` changes one method at a time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

OPTIONS = {
    "D": None, "z": None, "delta_bias": None, "delta_softplus": False, "initial_state": None, "dlast_state": None,
    "discretization": "euler", "seq_idx": None, "reverse": False,
}  # fmt: skip
ARRAYS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


class Right:
    """A right scan. Whatever has states is (batch, dim, dstate, seqlen), and inside `prepare` time runs forward."""

    CHUNK = 16

    # --- the parts of a step ---

    def softplus(self, x: Any) -> Any:
        return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))

    def step_size(self, delta: Any, bias: Any, softplus: bool) -> Any:
        raw = delta if bias is None else delta + bias[:, None]
        return self.softplus(raw) if softplus else raw

    def step_slope(self, delta: Any, bias: Any, softplus: bool) -> Any:
        raw = delta if bias is None else delta + bias[:, None]
        return sigmoid(raw) if softplus else np.ones_like(raw)

    def exponent(self, Delta: Any, A: Any) -> Any:
        Delta, A = Delta[:, :, None], A[..., None]
        return np.where(Delta == 0, Delta, Delta * np.where(Delta == 0, 0, A))

    def decay(self, x: Any) -> Any:
        return np.exp(x)

    def phi(self, x: Any) -> Any:
        return np.where(x == 0, 1, np.expm1(x) / np.where(x == 0, 1, x))

    def phi_slope(self, x: Any) -> Any:
        small = np.abs(x) < 1
        series, near = np.zeros_like(x), np.where(small, x, 0)
        for k in reversed(range(18)):
            series = series * near + (k + 1) / math.factorial(k + 2)
        far = np.where(small, 1, x)
        return np.where(small, series, (np.exp(far) - np.expm1(far) / far) / far)

    def weight(self, Delta: Any, x: Any, zoh: bool) -> Any:
        return Delta[:, :, None] * (self.phi(x) if zoh else np.ones_like(x))

    def silu(self, z: Any) -> Any:
        return z * sigmoid(z)

    def silu_slope(self, z: Any) -> Any:
        return sigmoid(z) * (1 + z * sigmoid(-z))

    def gated(self, states: Any, direct: Any, z: Any) -> Any:
        return (states + direct) if z is None else (states + direct) * self.silu(z)

    # --- maps, sequences, memory ---

    def groups_of(self, dim: int, groups: int) -> Any:
        return np.arange(dim) // (dim // groups)

    def per_channel(self, M: Any, u: Any) -> Any:
        batch, dim, seqlen = u.shape
        if M.ndim == 2:
            return np.broadcast_to(M[None, :, :, None], (batch, *M.shape, seqlen))
        M = M[:, None] if M.ndim == 3 else M
        return M[:, self.groups_of(dim, M.shape[1])]

    def map_sum(self, dM: Any, M: Any) -> Any:
        if M.ndim == 2:
            return dM.sum((0, 3))
        if M.ndim == 3:
            return dM.sum(1)
        batch, groups, dstate, seqlen = M.shape
        return dM.reshape(batch, groups, -1, dstate, seqlen).sum(2)

    def maps(self, B: Any, C: Any, u: Any) -> tuple[Any, Any]:
        return self.per_channel(B, u), self.per_channel(C, u)

    def sequences(self, seq_idx: Any, u: Any) -> tuple[Any, Any]:
        """Return which steps count and which start a new sequence, (batch, 1, 1, seqlen)."""
        batch, _, seqlen = u.shape
        valid, start = np.ones((batch, seqlen), bool), np.zeros((batch, seqlen), bool)
        if seq_idx is not None:
            valid = seq_idx >= 0
            last = np.maximum.accumulate(np.where(valid, np.arange(seqlen), -1), axis=1)
            before = np.concatenate([np.full((batch, 1), -1), last[:, :-1]], axis=1)
            previous = np.take_along_axis(seq_idx, np.maximum(before, 0), 1)
            start = valid & (before >= 0) & (previous != seq_idx)
        return valid[:, None, None], start[:, None, None]

    def read(self, x: Any) -> Any:
        return x

    def first_state(self, initial_state: Any, u: Any, A: Any) -> Any:
        return np.zeros((u.shape[0], *A.shape), A.dtype) if initial_state is None else initial_state.copy()

    # --- recurrences ---

    def advance(self, h: Any, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> Any:
        return np.where(valid, np.where(start, 0, h) * a + x, h)

    def carry(self, h: Any) -> Any:
        return h

    def states(self, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> tuple[Any, Any]:
        """Return the states before and after every step."""
        before, after = np.empty_like(x), np.empty_like(x)
        h = initial
        for t in range(x.shape[3]):
            h = self.carry(h) if t and t % self.CHUNK == 0 else h
            before[..., t] = np.where(start[..., t], 0, h)
            h = self.advance(h, a[..., t], x[..., t], valid[..., t], start[..., t], initial)
            after[..., t] = h
        return before, after

    def adjoints(self, a: Any, source: Any, valid: Any, start: Any, dlast: Any) -> tuple[Any, Any]:
        """Return the gradients of the states after every step, and of the initial one."""
        g, adjoint = dlast, np.empty_like(source)
        for t in reversed(range(source.shape[3])):
            adjoint[..., t] = g + np.where(valid[..., t], source[..., t], 0)
            g = self.retreat(adjoint, a, valid, start, g, t)
        return adjoint, g

    def retreat(self, adjoint: Any, a: Any, valid: Any, start: Any, g: Any, t: int) -> Any:
        back = np.where(start[..., t], 0, adjoint[..., t] * a[..., t])
        return np.where(valid[..., t], back, g)

    # --- forward ---

    def flip(self, q: dict[str, Any]) -> dict[str, Any]:
        """Flip time in all that has it, if the scan is reversed."""
        names = ("u", "delta", "z", "B", "C", "dout", "seq_idx") if q["reverse"] else ()
        timed = [n for n in names if q.get(n) is not None and (q[n].ndim > 2 or n == "seq_idx")]
        return {**q, **{n: q[n][..., ::-1] for n in timed}}

    def prepare(self, q: dict[str, Any]) -> dict[str, Any]:
        """Return, by name, what forward and backward have in common."""
        q = {**OPTIONS, **q}
        q = self.flip({n: self.read(x) if isinstance(x, np.ndarray) else x for n, x in q.items()})
        valid, start = self.sequences(q["seq_idx"], q["u"])
        q["u"] = np.where(valid[:, 0], q["u"], 0)
        Delta = self.step_size(q["delta"], q["delta_bias"], q["delta_softplus"])
        x = self.exponent(Delta, q["A"])
        a, f = self.decay(x), self.weight(Delta, x, q["discretization"] == "zoh")
        Bs, Cs = self.maps(q["B"], q["C"], q["u"])
        initial = self.first_state(q["initial_state"], q["u"], q["A"])
        before, after = self.states(a, f * Bs * q["u"][:, :, None], valid, start, initial)
        direct = 0 if q["D"] is None else q["D"][:, None] * q["u"]
        return q | {
            "x": x, "a": a, "f": f, "Bs": Bs, "Cs": Cs, "valid": valid, "start": start, "before": before,
            "after": after, "direct": direct, "Delta": Delta[:, :, None], "us": q["u"][:, :, None],
        }  # fmt: skip

    def read_out(self, p: dict[str, Any]) -> Any:
        return (p["Cs"] * p["after"]).sum(2)

    def last_state(self, p: dict[str, Any]) -> Any:
        return p["after"][..., -1].copy()

    @np.errstate(all="ignore")
    def forward(self, **arguments: Any) -> tuple[Any, Any]:
        """Return y and the last state; arguments are those of ``npmamba.selective_scan``."""
        p = self.prepare(arguments)
        y = self.gated(self.read_out(p), p["direct"], p["z"])
        y = np.where(p["valid"][:, 0], y, 0).astype(p["u"].dtype)
        return (y[..., ::-1] if p["reverse"] else y), self.last_state(p)

    # --- backward ---

    def before_gate(self, p: dict[str, Any]) -> Any:
        return p["dout"] if p["z"] is None else p["dout"] * self.silu(p["z"])

    def gate_gradient(self, p: dict[str, Any]) -> Any:
        return p["dout"] * (self.read_out(p) + p["direct"]) * self.silu_slope(p["z"])

    def into_B(self, p: dict[str, Any], g: Any) -> Any:
        return g * p["f"] * p["us"]

    def into_C(self, p: dict[str, Any], dy: Any) -> Any:
        return dy[:, :, None] * p["after"]

    def input_gradient(self, p: dict[str, Any], g: Any, dy: Any) -> Any:
        return (g * p["f"] * p["Bs"]).sum(2) + (0 if p["D"] is None else p["D"][:, None] * dy)

    def step_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        """Return dDelta, for ``da = g a h_before`` and ``df = g B u``."""
        by_weight = df * p["a"] if p["discretization"] == "zoh" else df
        return (da * p["A"][..., None] + by_weight).sum(2)

    def rate_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        dA = (da * p["Delta"]).sum((0, 3))
        if p["discretization"] == "zoh":
            dA = dA + (df * p["Delta"] ** 2 * self.phi_slope(p["x"])).sum((0, 3))
        return dA

    def bias_gradient(self, ddelta: Any) -> Any:
        return ddelta.sum((0, 2))

    def masked(self, x: Any, valid: Any) -> Any:
        return np.where(valid, x, 0)

    @np.errstate(all="ignore")
    def backward(self, **arguments: Any) -> dict[str, Any]:
        """Return the gradients by argument; arguments are those of ``npmamba.selective_scan_backward``."""
        p = self.prepare(arguments)
        valid, dlast = p["valid"], p["dlast_state"]
        dy = self.masked(self.before_gate(p), valid[:, 0])
        dlast = np.zeros(p["after"].shape[:3], p["A"].dtype) if dlast is None else dlast
        g, dinitial = self.adjoints(p["a"], p["Cs"] * dy[:, :, None], valid, p["start"], dlast)
        da, df = np.where(valid, g * p["a"] * p["before"], 0), np.where(valid, g * p["Bs"] * p["us"], 0)
        slope = self.step_slope(p["delta"], p["delta_bias"], p["delta_softplus"])
        ddelta = np.where(valid[:, 0], self.step_gradient(p, da, df) * slope, 0)
        gradients = {
            "u": self.masked(self.input_gradient(p, g, dy), valid[:, 0]), "delta": ddelta,
            "A": self.rate_gradient(p, da, df), "delta_bias": self.bias_gradient(ddelta), "initial_state": dinitial,
            "B": self.map_sum(np.where(valid, self.into_B(p, g), 0), p["B"]),
            "C": self.map_sum(np.where(valid, self.into_C(p, dy), 0), p["C"]), "D": (dy * p["u"]).sum((0, 2)),
            "z": None if p["z"] is None else self.masked(self.gate_gradient(p), valid[:, 0]),
        }  # fmt: skip
        given = [name for name in ARRAYS if arguments.get(name) is not None]
        return self.unflip({name: gradients[name].astype(arguments[name].dtype) for name in given}, p)

    def unflip(self, gradients: dict[str, Any], p: dict[str, Any]) -> dict[str, Any]:
        timed = [n for n in ("u", "delta", "z", "B", "C") if p["reverse"] and n in gradients and gradients[n].ndim > 2]
        return {**gradients, **{n: gradients[n][..., ::-1] for n in timed}}
