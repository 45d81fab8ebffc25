"""Selective scans that are wrong in the ways that people get them wrong, to see that tests find them.

Each is `Right` with one method changed, and its docstring says what went wrong. `WRONG` lists them all by name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from right_scan import Right, sigmoid

# --- numbers ---


class NaiveSoftplus(Right):
    """Computes log(1 + exp(x)) as it stands: 0 for small x, infinite for large x."""

    def softplus(self, x: Any) -> Any:
        return np.log(1 + np.exp(x))


class SoftplusByLog2(Right):
    """Computes softplus with a base-2 logarithm of 1 + 2^x, as GPUs like: no relative accuracy for small steps."""

    def softplus(self, x: Any) -> Any:
        return np.where(x > 20, x, np.log2(1 + np.exp2(x / np.log(2).astype(x.dtype))) * np.log(2).astype(x.dtype))


class NaiveExpm1(Right):
    """Computes (exp(x) - 1) / x as it stands: 0 / 0 at 0, and noise near it."""

    def phi(self, x: Any) -> Any:
        return (np.exp(x) - 1) / x


class DivisionByRate(Right):
    """Divides by A instead of Delta A and adds a small number against zero, which bends the result."""

    def phi(self, x: Any) -> Any:
        return np.expm1(x) / (x - np.asarray(1e-6, x.dtype))


class NoisyPhiSlope(Right):
    """Uses (exp(x) - phi(x)) / x near 0 too, where it is a difference of equal numbers divided by a small one."""

    def phi_slope(self, x: Any) -> Any:
        safe = np.where(x == 0, 1, x)
        return np.where(x == 0, 0.5, (np.exp(safe) - np.expm1(safe) / safe) / safe)


class HalfPrecisionState(Right):
    """Keeps the state in float16 between steps."""

    def carry(self, h: Any) -> Any:
        return h.astype(np.float16).astype(h.dtype)


class Float32Constant(Right):
    """Computes exp(x) as 2^(x log2 e) with a constant that was rounded to float32."""

    def decay(self, x: Any) -> Any:
        return np.exp2(x * np.asarray(np.float32(1.4426950408889634), x.dtype))


class FastExponential(Right):
    """Computes exp(x) as (1 + x / 2^10)^(2^10), which four digits seemed enough to justify."""

    def decay(self, x: Any) -> Any:
        return np.maximum(1 + x / 1024, 0) ** 1024


class Float64Literal(Right):
    """Multiplies y by the float64 number 1.0 on its way out: results of float32 are float64."""

    def forward(self, **arguments: Any) -> tuple[Any, Any]:
        y, last_state = super().forward(**arguments)
        return y * np.ones(1, np.float64), last_state


class CumulativeSumTrick(Right):
    """Divides by the product of decays so that a cumulative sum does the scan: exp(-sum) overflows."""

    def states(self, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> tuple[Any, Any]:
        if start.any() or not valid.all():
            return super().states(a, x, valid, start, initial)
        product = np.cumprod(a, axis=3)
        after = product * (np.cumsum(x / product, axis=3) + initial[..., None])
        return np.concatenate([initial[..., None], after[..., :-1]], axis=3), after


class ClampedStep(Right):
    """Clamps Delta to [0.001, 0.1], as the initialization has it."""

    def step_size(self, delta: Any, bias: Any, softplus: bool) -> Any:
        return np.clip(super().step_size(delta, bias, softplus), 1e-3, 0.1).astype(delta.dtype)


class SwallowedNaN(Right):
    """Turns NaN into 0 by a minimum that prefers numbers."""

    def states(self, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> tuple[Any, Any]:
        return super().states(a, np.fmax(x, -1e30).astype(x.dtype), valid, start, initial)


class NaNFromInfiniteRate(Right):
    """Multiplies Delta = 0 by A = -inf."""

    def exponent(self, Delta: Any, A: Any) -> Any:
        return Delta[:, :, None] * A[..., None]


# --- equations ---


class BiasAfterSoftplus(Right):
    """Adds delta_bias after softplus."""

    def step_size(self, delta: Any, bias: Any, softplus: bool) -> Any:
        plain = self.softplus(delta) if softplus else delta
        return plain if bias is None else plain + bias[:, None]


class GateBeforeD(Right):
    """Gates the states only, and adds D u after."""

    def gated(self, states: Any, direct: Any, z: Any) -> Any:
        return states + direct if z is None else states * self.silu(z) + direct


class SigmoidGate(Right):
    """Multiplies by sigmoid(z) instead of silu(z) = z sigmoid(z)."""

    def silu(self, z: Any) -> Any:
        return sigmoid(z)


class EulerForZoh(Right):
    """Forgets that zoh has another input weight."""

    def weight(self, Delta: Any, x: Any, zoh: bool) -> Any:
        return super().weight(Delta, x, False)


class Tustin(Right):
    """Discretizes by the bilinear rule, a rational function that is near the exponential for small steps."""

    def decay(self, x: Any) -> Any:
        return (1 + x / 2) / (1 - x / 2)


class DecayedInflow(Right):
    """Lets the input of a step decay in that same step: h = a (h + x)."""

    def advance(self, h: Any, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> Any:
        return np.where(valid, (np.where(start, 0, h) + x) * a, h)


class ReadOutBeforeUpdate(Right):
    """Reads y_t from h_{t-1}."""

    def read_out(self, p: dict[str, Any]) -> Any:
        return (p["Cs"] * p["before"]).sum(2)


class RatesOfOneChannel(Right):
    """Uses the rates of the first channel for all, as A looks alike in every channel after initialization."""

    def exponent(self, Delta: Any, A: Any) -> Any:
        return super().exponent(Delta, np.broadcast_to(A[:1], A.shape))


# --- shapes ---


class GroupsByModulo(Right):
    """Lets channel d read group d % groups instead of d // (dim / groups)."""

    def groups_of(self, dim: int, groups: int) -> Any:
        return np.arange(dim) % groups


class SwappedGroups(Right):
    """Counts groups from the last."""

    def groups_of(self, dim: int, groups: int) -> Any:
        return super().groups_of(dim, groups)[::-1]


class SwappedConstantMaps(Right):
    """Swaps B and C where both are constant."""

    def maps(self, B: Any, C: Any, u: Any) -> tuple[Any, Any]:
        return super().maps(C, B, u) if B.ndim == C.ndim == 2 else super().maps(B, C, u)


class LostTail(Right):
    """Works in blocks of four steps, and leaves out what is left over."""

    def gated(self, states: Any, direct: Any, z: Any) -> Any:
        y = super().gated(states, direct, z)
        tail = y.shape[2] % 4 if y.shape[2] > 4 else 0
        return np.where(np.arange(y.shape[2]) < y.shape[2] - tail, y, 0)


class OddStateLost(Right):
    """Adds states two at a time, and leaves out an odd one."""

    def read_out(self, p: dict[str, Any]) -> Any:
        even = p["A"].shape[1] // 2 * 2 or 1
        return (p["Cs"] * p["after"])[:, :, :even].sum(2)


class LostCarry(Right):
    """Starts every chunk of time with an empty state."""

    def carry(self, h: Any) -> Any:
        return np.zeros_like(h)


class StateOfTheRowBefore(Right):
    """Starts a batch row with the state that the row before it ended with."""

    def states(self, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> tuple[Any, Any]:
        found, h = [], initial[:1]
        for b in range(len(x)):
            row = np.s_[b : b + 1]
            first = h if b and not initial[row].any() else initial[row]
            found.append(super().states(a[row], x[row], valid[row], start[row], first))
            h = found[-1][1][..., -1]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


class InitialStateOfOneRow(Right):
    """Gives every batch row the initial state of the first."""

    def first_state(self, initial_state: Any, u: Any, A: Any) -> Any:
        first = super().first_state(initial_state, u, A)
        return np.broadcast_to(first[:1], first.shape).copy()


class LastStateTooEarly(Right):
    """Returns the state before the last step."""

    def last_state(self, p: dict[str, Any]) -> Any:
        return p["before"][..., -1].copy()


# --- sequences and directions ---


class StateNotReset(Right):
    """Runs on through the borders of packed sequences."""

    def advance(self, h: Any, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> Any:
        return np.where(valid, h * a + x, h)


class InitialStateInEverySequence(Right):
    """Gives every packed sequence the initial state, not only the first."""

    def advance(self, h: Any, a: Any, x: Any, valid: Any, start: Any, initial: Any) -> Any:
        return np.where(valid, np.where(start, initial, h) * a + x, h)


class WrongNeighbour(Right):
    """Compares seq_idx with the step after, so that a state is emptied one step early."""

    def sequences(self, seq_idx: Any, u: Any) -> tuple[Any, Any]:
        valid, start = super().sequences(seq_idx, u)
        if seq_idx is None:
            return valid, start
        return valid, valid & np.concatenate([start[..., 1:], start[..., :1] & False], axis=3)


class PaddingAsNeighbour(Right):
    """Compares seq_idx with the step before even if that is padding, so that padding empties the state."""

    def sequences(self, seq_idx: Any, u: Any) -> tuple[Any, Any]:
        valid, start = super().sequences(seq_idx, u)
        if seq_idx is not None:
            start = start.copy()
            start[:, 0, 0, 1:] = valid[:, 0, 0, 1:] & (seq_idx[:, 1:] != seq_idx[:, :-1])
        return valid, start


class PaddingCounts(Right):
    """Takes negative numbers of sequences for numbers of sequences."""

    def sequences(self, seq_idx: Any, u: Any) -> tuple[Any, Any]:
        return super().sequences(None if seq_idx is None else seq_idx - min(0, seq_idx.min(initial=0)), u)


class OneMapNotReversed(Right):
    """Reverses B but not C."""

    def flip(self, q: dict[str, Any]) -> dict[str, Any]:
        return {**super().flip(q), "C": q["C"]}


class SequencesNotReversed(Right):
    """Does not reverse seq_idx."""

    def flip(self, q: dict[str, Any]) -> dict[str, Any]:
        return {**super().flip(q), "seq_idx": q["seq_idx"]}


class UnwrittenOrder(Right):
    """Reads arrays in the order in which they lie in memory."""

    def read(self, x: Any) -> Any:
        return x.ravel(order="K").reshape(x.shape)


# --- memory ---


class BiasAddedInPlace(Right):
    """Adds the bias to the caller's delta."""

    def step_size(self, delta: Any, bias: Any, softplus: bool) -> Any:
        if bias is not None and delta.flags.writeable:
            delta += bias[:, None]
            bias = None
        return super().step_size(delta, bias, softplus)


class StateOfTheCaller(Right):
    """Writes the last state into the caller's initial state, and returns that."""

    def forward(self, **arguments: Any) -> tuple[Any, Any]:
        y, last_state = super().forward(**arguments)
        state = arguments.get("initial_state")
        if state is not None and state.flags.writeable:
            state[...] = last_state
            last_state = state
        return y, last_state


class OutputInTheGate(Right):
    """Returns y in the memory of z."""

    def forward(self, **arguments: Any) -> tuple[Any, Any]:
        y, last_state = super().forward(**arguments)
        if arguments.get("z") is not None and arguments["z"].flags.writeable:
            arguments["z"][...] = y
            y = arguments["z"]
        return y, last_state


# --- gradients ---


class NoSoftplusSlope(Right):
    """Leaves the derivative of softplus out of the gradient of delta."""

    def step_slope(self, delta: Any, bias: Any, softplus: bool) -> Any:
        return np.ones_like(delta)


class SlopeWithoutBias(Right):
    """Takes the derivative of softplus at delta instead of delta + delta_bias."""

    def step_slope(self, delta: Any, bias: Any, softplus: bool) -> Any:
        return super().step_slope(delta, None, softplus)


class NoDirectGradient(Right):
    """Leaves D dy out of the gradient of u."""

    def input_gradient(self, p: dict[str, Any], g: Any, dy: Any) -> Any:
        return (g * p["f"] * p["Bs"]).sum(2)


class GateGradientWithoutD(Right):
    """Leaves D u out of the y that the gradient of z is made of."""

    def gate_gradient(self, p: dict[str, Any]) -> Any:
        return p["dout"] * self.read_out(p) * self.silu_slope(p["z"])


class SigmoidForSiluSlope(Right):
    """Takes sigmoid for the derivative of silu."""

    def silu_slope(self, z: Any) -> Any:
        return sigmoid(z)


class UngatedGradient(Right):
    """Forgets to multiply dout by silu(z)."""

    def before_gate(self, p: dict[str, Any]) -> Any:
        return p["dout"]


class DecayOfTheWrongStep(Right):
    """Takes gradients of states back by a_t instead of a_{t+1}."""

    def retreat(self, adjoint: Any, a: Any, valid: Any, start: Any, g: Any, t: int) -> Any:
        return super().retreat(adjoint, np.roll(a, 1, axis=3) if t else a, valid, start, g, t)


class GradientAcrossSequences(Right):
    """Runs the backward on through the borders of packed sequences."""

    def retreat(self, adjoint: Any, a: Any, valid: Any, start: Any, g: Any, t: int) -> Any:
        return super().retreat(adjoint, a, valid, start & False, g, t)


class LostCarryBack(Right):
    """Starts every chunk of time with an empty gradient of the state, going back."""

    def retreat(self, adjoint: Any, a: Any, valid: Any, start: Any, g: Any, t: int) -> Any:
        back = super().retreat(adjoint, a, valid, start, g, t)
        return np.zeros_like(back) if t and t % self.CHUNK == 0 else back


class NoGradientOfLastState(Right):
    """Ignores dlast_state."""

    def adjoints(self, a: Any, source: Any, valid: Any, start: Any, dlast: Any) -> tuple[Any, Any]:
        return super().adjoints(a, source, valid, start, np.zeros_like(dlast))


class InitialGradientUndecayed(Right):
    """Returns g_1 as gradient of the initial state, without the decay of the first step."""

    def adjoints(self, a: Any, source: Any, valid: Any, start: Any, dlast: Any) -> tuple[Any, Any]:
        adjoint, _ = super().adjoints(a, source, valid, start, dlast)
        return adjoint, adjoint[..., 0]


class StateAfterForBefore(Right):
    """Uses h_t where the gradient of the decay needs h_{t-1}."""

    def rate_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        shifted = np.where(p["before"] == 0, 0, da * p["after"] / np.where(p["before"] == 0, 1, p["before"]))
        return super().rate_gradient(p, shifted, df)


class RateGradientOfOneRow(Right):
    """Writes the gradient of A for every batch row to the same place, instead of adding."""

    def rate_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        last = {**p, "Delta": p["Delta"][-1:], "x": p["x"][-1:]}
        return super().rate_gradient(last, da[-1:], df[-1:])


class RateGradientWithoutWeight(Right):
    """Leaves out that by zoh the input weight depends on A too."""

    def rate_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        return super().rate_gradient({**p, "discretization": "euler"}, da, df)


class EulerStepGradientForZoh(Right):
    """Takes the derivative of the input weight by Delta to be 1 by either rule."""

    def step_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        return super().step_gradient({**p, "discretization": "euler"}, da, df)


class RateGradientOfTheLogarithm(Right):
    """Returns the gradient by log(-A), which models train, as that by A."""

    def rate_gradient(self, p: dict[str, Any], da: Any, df: Any) -> Any:
        return super().rate_gradient(p, da, df) * p["A"]


class BiasGradientOfOneRow(Right):
    """Adds the gradient of the bias up over time only."""

    def bias_gradient(self, ddelta: Any) -> Any:
        return ddelta.sum(2)[0]


class MapGradientOfOneChannel(Right):
    """Keeps the gradient of the last channel of a group for B and C, as threads do that overwrite each other."""

    def map_sum(self, dM: Any, M: Any) -> Any:
        if M.ndim < 4:
            return super().map_sum(dM, M)
        return dM.reshape(len(dM), M.shape[1], -1, *dM.shape[2:])[:, :, -1]


class MapGradientMeanOfChannels(Right):
    """Takes the mean over a group's channels instead of the sum."""

    def map_sum(self, dM: Any, M: Any) -> Any:
        return super().map_sum(dM, M) / (1 if M.ndim < 4 else dM.shape[1] // M.shape[1])


class MapGradientWithoutStep(Right):
    """Leaves the input weight out of the gradient of B."""

    def into_B(self, p: dict[str, Any], g: Any) -> Any:
        return g * p["us"]


class MapGradientOfTheStateBefore(Right):
    """Makes the gradient of C of the state before the step."""

    def into_C(self, p: dict[str, Any], dy: Any) -> Any:
        return dy[:, :, None] * p["before"]


class TailNotMasked(Right):
    """Leaves what lies in padding in the gradients of u and z."""

    def masked(self, x: Any, valid: Any) -> Any:
        return x


class StepGradientNotReversed(Right):
    """Forgets to flip the gradient of delta back."""

    def unflip(self, gradients: dict[str, Any], p: dict[str, Any]) -> dict[str, Any]:
        return {**super().unflip(gradients, p), "delta": gradients["delta"]}


class CotangentGatedInPlace(Right):
    """Multiplies the caller's dout by the gate."""

    def before_gate(self, p: dict[str, Any]) -> Any:
        if p["z"] is None or not p["dout"].flags.writeable:
            return super().before_gate(p)
        p["dout"] *= self.silu(p["z"])
        return p["dout"]

    def gate_gradient(self, p: dict[str, Any]) -> Any:
        original = p["dout"] / self.silu(p["z"])
        return super().gate_gradient({**p, "dout": original})


def spoken(name: str) -> str:
    """Turn the name of a class into words.

    >>> spoken("NaNFromInfiniteRate")
    'NaN from infinite rate'
    """
    words = re.findall(r"NaN|[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    return " ".join(w if i == 0 or w.isupper() or w == "NaN" else w.lower() for i, w in enumerate(words))


WRONG: dict[str, type[Right]] = {spoken(wrong.__name__): wrong for wrong in Right.__subclasses__()}
