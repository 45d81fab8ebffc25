"""Causal convolutions, and steps of a scan, that are wrong in the ways that people get them wrong.

Each is `RightConv` or `RightStep` with one method changed, and its docstring says what went wrong. `WRONG_CONVS` and
`WRONG_STEPS` list them by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from right_scan import sigmoid


class RightConv:
    """A right causal convolution in plain NumPy, with its backward and its step: a method for every part."""

    def silu(self, q: Any) -> Any:
        return q * sigmoid(q)

    def slope(self, q: Any) -> Any:
        return sigmoid(q) * (1 + q * sigmoid(-q))

    def read(self, x: Any) -> Any:
        return x

    def sequences(self, seq_idx: Any, x: Any) -> list[Any]:
        """Return the times of each sequence of one row."""
        kept = np.flatnonzero(seq_idx >= 0)
        return [part for part in np.split(kept, np.flatnonzero(np.diff(seq_idx[kept])) + 1) if part.size]

    def start(self, k: int, b: int, initial: Any) -> Any:
        return initial[b] if k == 0 else np.zeros_like(initial[b])

    def taps(self, inputs: Any, weight: Any) -> Any:
        """Return sum_k weight_k inputs_{t + k} for inputs (dim, width - 1 + steps)."""
        steps = inputs.shape[1] - weight.shape[1] + 1
        return sum(weight[:, k, None] * inputs[:, k : k + steps] for k in range(weight.shape[1]))

    def tail(self, inputs: Any, width: int) -> Any:
        return inputs[:, inputs.shape[1] - width + 1 :]

    def parts(self, x: Any, seq_idx: Any, initial: Any) -> Any:
        for b in range(x.shape[0]):
            for k, times in enumerate(self.sequences(seq_idx[b], x)):
                before = self.start(k, b, initial)
                yield b, k, times, np.concatenate([before, x[b][:, times].astype(before.dtype)], axis=1)

    def prepare(self, x: Any, weight: Any, initial: Any, seq_idx: Any, reverse: bool) -> tuple[Any, Any, Any]:
        batch, dim, seqlen = x.shape
        initial = np.zeros((batch, dim, weight.shape[1] - 1), weight.dtype) if initial is None else initial.copy()
        seq_idx = np.zeros((batch, seqlen), np.int64) if seq_idx is None else seq_idx
        return (x[..., ::-1], initial, seq_idx[:, ::-1]) if reverse else (x, initial, seq_idx)

    def biased(self, q: Any, bias: Any) -> Any:
        return q if bias is None else q + bias[:, None]

    def activated(self, q: Any, activation: Any) -> Any:
        return q if activation is None else self.silu(q)

    def forward(
        self, x: Any, weight: Any, bias: Any = None, *, activation: Any = None, initial_state: Any = None,
        return_last_state: bool = False, seq_idx: Any = None, reverse: bool = False,
    ) -> Any:  # fmt: skip
        turned, initial, seq_idx = self.prepare(self.read(x), weight, initial_state, seq_idx, reverse)
        y, last = np.zeros(turned.shape, x.dtype), initial
        for b, _, times, inputs in self.parts(turned, seq_idx, initial.copy()):
            y[b][:, times] = self.activated(self.biased(self.taps(inputs, weight), bias), activation)
            last[b] = self.tail(inputs, weight.shape[1])
        y = y[..., ::-1].copy() if reverse else y
        return (y, last) if return_last_state else y

    def dq(self, dout: Any, q: Any, activation: Any) -> Any:
        return dout if activation is None else dout * self.slope(q)

    def pulled(self, dq: Any, inputs: Any, weight: Any) -> tuple[Any, Any]:
        """Return the gradients of inputs and weight."""
        width, steps = weight.shape[1], dq.shape[1]
        dinputs = np.zeros_like(inputs)
        for k in range(width):
            dinputs[:, k : k + steps] += weight[:, k, None] * dq
        return dinputs, np.stack([(dq * inputs[:, k : k + steps]).sum(1) for k in range(width)], axis=1)

    def dbias(self, dq: Any) -> Any:
        return dq.sum(1)

    def into_tail(self, dinputs: Any, dlast: Any) -> None:
        dinputs[:, dinputs.shape[1] - dlast.shape[1] :] += dlast

    def backward(
        self, dout: Any, x: Any, weight: Any, bias: Any = None, *, activation: Any = None, initial_state: Any = None,
        dlast_state: Any = None, seq_idx: Any = None, reverse: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        turned, initial, seq_idx = self.prepare(self.read(x), weight, initial_state, seq_idx, reverse)
        dout = (dout[..., ::-1] if reverse else dout).astype(weight.dtype)
        dlast_state = np.zeros_like(initial) if dlast_state is None else dlast_state
        dx, dweight, dinitial = np.zeros(turned.shape, weight.dtype), np.zeros_like(weight), dlast_state.copy()
        dbias = np.zeros(weight.shape[0], weight.dtype)
        parts = list(self.parts(turned, seq_idx, initial))
        for i, (b, k, times, inputs) in enumerate(parts):
            last = i + 1 == len(parts) or parts[i + 1][0] != b
            q = self.biased(self.taps(inputs, weight), bias)
            dq = self.dq(dout[b][:, times], q, activation)
            dinputs, dw = self.pulled(dq, inputs, weight)
            if last:
                self.into_tail(dinputs, dlast_state[b])
            dweight, dbias = dweight + dw, dbias + self.dbias(dq)
            dx[b][:, times] = dinputs[:, weight.shape[1] - 1 :]
            if k == 0:
                dinitial[b] = dinputs[:, : weight.shape[1] - 1]
            elif last:
                dinitial[b] = dinitial[b] if self._first(parts, b) else 0
        dx = (dx[..., ::-1] if reverse else dx).astype(x.dtype)
        return {"x": dx, "weight": dweight, "bias": dbias, "initial_state": dinitial}

    def _first(self, parts: Any, b: int) -> bool:
        return any(row == b and k == 0 for row, k, *_ in parts)

    def step(self, state: Any, x: Any, weight: Any, bias: Any = None, *, activation: Any = None) -> Any:
        y, last = self.forward(
            x[..., None], weight, bias, activation=activation, initial_state=state, return_last_state=True
        )
        state[...] = last
        return y[..., 0]


class WeightsTheOtherWayRound(RightConv):
    """Multiplies the present by the first weight: a correlation for a convolution."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        return super().taps(inputs, weight[:, ::-1])


class SameLength(RightConv):
    """Pads both ends, as "same" convolutions do: y looks ahead."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        ahead = (weight.shape[1] - 1) // 2
        padded = np.concatenate([inputs[:, ahead:], np.zeros_like(inputs[:, :ahead])], axis=1)
        return super().taps(padded, weight)


class Circular(RightConv):
    """Convolves by a Fourier transform that is too short: the end reaches the beginning."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        width = weight.shape[1]
        ends = inputs.copy()
        if width > 1 and inputs.shape[1] > 2 * width:
            ends[:, : width - 1] += inputs[:, inputs.shape[1] - width + 1 :]
        return super().taps(ends, weight)


class BiasAfterActivation(RightConv):
    """Adds the bias after silu."""

    def forward(self, x: Any, weight: Any, bias: Any = None, **rest: Any) -> Any:
        out = super().forward(x, weight, None, **rest)
        if bias is None:
            return out
        y = out[0] if isinstance(out, tuple) else out
        y += bias[:, None].astype(y.dtype)
        return out


class SigmoidForSilu(RightConv):
    """Applies the sigmoid where silu is asked for."""

    def silu(self, q: Any) -> Any:
        return sigmoid(q)


class LookingAcrossSequences(RightConv):
    """Forgets that packed sequences are others: a new one sees the inputs of the last."""

    def sequences(self, seq_idx: Any, x: Any) -> list[Any]:
        kept = np.flatnonzero(seq_idx >= 0)
        return [kept] if kept.size else []


class PaddingCounts(RightConv):
    """Takes padding for a sequence of its own, with outputs."""

    def sequences(self, seq_idx: Any, x: Any) -> list[Any]:
        return np.split(np.arange(seq_idx.size), np.flatnonzero(np.diff(seq_idx)) + 1)


class StateIntoEverySequence(RightConv):
    """Starts every packed sequence from the initial state."""

    def start(self, k: int, b: int, initial: Any) -> Any:
        return initial[b]


class StateOfTheFirstRow(RightConv):
    """Hands the initial state of the first row to every row."""

    def start(self, k: int, b: int, initial: Any) -> Any:
        return super().start(k, 0, initial)


class ShortLastState(RightConv):
    """Hands on zeros for the inputs before the first step, where a part is shorter than the window."""

    def tail(self, inputs: Any, width: int) -> Any:
        tail = super().tail(inputs, width).copy()
        tail[:, : max(0, 2 * (width - 1) - inputs.shape[1])] = 0
        return tail


class LastStateOneEarly(RightConv):
    """Hands on the inputs without the last one."""

    def tail(self, inputs: Any, width: int) -> Any:
        return np.concatenate([inputs[:, :1], inputs], axis=1)[:, inputs.shape[1] - width + 1 : -1 or None]


class SharedWeights(RightConv):
    """Uses the weights of the first channel for all."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        return super().taps(inputs, np.broadcast_to(weight[:1], weight.shape))


class HalfPrecisionSum(RightConv):
    """Sums in float16."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        return super().taps(inputs.astype(np.float16), weight.astype(np.float16)).astype(weight.dtype)


class ReadAsContiguous(RightConv):
    """Reads an array as if its rows were contiguous in memory."""

    def read(self, x: Any) -> Any:
        return x if x.flags.c_contiguous else np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape)


class InPlace(RightConv):
    """Writes the activation's argument over the input."""

    def forward(self, x: Any, *rest: Any, **options: Any) -> Any:
        out = super().forward(x, *rest, **options)
        if x.flags.writeable:
            x[...] = out[0] if isinstance(out, tuple) else out
        return out


class HiddenNaN(RightConv):
    """Takes NaN for zero."""

    def read(self, x: Any) -> Any:
        return np.nan_to_num(x)


class FutureTimesZero(RightConv):
    """Multiplies the future by 0, which NaN survives."""

    def taps(self, inputs: Any, weight: Any) -> Any:
        return super().taps(inputs, weight) + 0 * inputs.sum(1, keepdims=True)


class SlopeWithoutProduct(RightConv):
    """Takes silu' for the sigmoid."""

    def slope(self, q: Any) -> Any:
        return sigmoid(q)


class ForgottenSlope(RightConv):
    """Leaves the activation out of the backward."""

    def dq(self, dout: Any, q: Any, activation: Any) -> Any:
        return dout


class GradientUnflipped(RightConv):
    """Correlates dout with the weights, where the backward convolves."""

    def pulled(self, dq: Any, inputs: Any, weight: Any) -> tuple[Any, Any]:
        return super().pulled(dq, inputs, weight[:, ::-1])[0], super().pulled(dq, inputs, weight)[1]


class DroppedLastGradient(RightConv):
    """Leaves dlast_state out."""

    def into_tail(self, dinputs: Any, dlast: Any) -> None:
        pass


class MeanForBias(RightConv):
    """Averages the gradient of the bias over time."""

    def dbias(self, dq: Any) -> Any:
        return dq.mean(1)


class UnreversedGradient(RightConv):
    """Does not flip dout where time is reversed."""

    def backward(self, dout: Any, *rest: Any, reverse: bool = False, **options: Any) -> dict[str, Any]:
        return super().backward(dout[..., ::-1] if reverse else dout, *rest, reverse=reverse, **options)


class NotLinearInDout(RightConv):
    """Clips dout."""

    def dq(self, dout: Any, q: Any, activation: Any) -> Any:
        return super().dq(np.clip(dout, -1, 1), q, activation)


class StepForgets(RightConv):
    """Moves the state on by zeros instead of the input."""

    def step(self, state: Any, x: Any, weight: Any, bias: Any = None, *, activation: Any = None) -> Any:
        y = super().step(state, x, weight, bias, activation=activation)
        state[..., -1:] = 0
        return y


class GradientOfTheMean(RightConv):
    """Averages the gradients of rows."""

    def backward(self, dout: Any, x: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        found = super().backward(dout, x, *rest, **options)
        return {**found, "weight": found["weight"] / x.shape[0], "bias": found["bias"] / x.shape[0]}


class DoubleGradient(RightConv):
    """Returns gradients in float64, whatever the arguments were."""

    def backward(self, *given: Any, **options: Any) -> dict[str, Any]:
        return {name: x.astype(np.float64) for name, x in super().backward(*given, **options).items()}


class GradientAcrossSequences(LookingAcrossSequences):
    """Forgets in the backward alone that packed sequences are others."""

    def forward(self, *given: Any, **options: Any) -> Any:
        return RightConv().forward(*given, **options)


class GradientOfTheFuture(RightConv):
    """Multiplies by a mask, which NaN in what is masked survives."""

    def pulled(self, dq: Any, inputs: Any, weight: Any) -> tuple[Any, Any]:
        dinputs, dweight = super().pulled(dq, inputs, weight)
        return dinputs + 0 * dq.sum(1, keepdims=True), dweight


# --- steps of a scan ---


class RightStep:
    """A right step of a selective scan in plain NumPy."""

    def softplus(self, x: Any) -> Any:
        return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))

    def step_size(self, dt: Any, bias: Any, softplus: bool) -> Any:
        raw = dt if bias is None else dt + bias
        return self.softplus(raw) if softplus else raw

    def exponent(self, dt: Any, A: Any) -> Any:
        return np.where(dt[..., None] == 0, 0, dt[..., None] * np.where(dt[..., None] == 0, 0, A))

    def weight(self, dt: Any, x: Any, zoh: bool) -> Any:
        return dt[..., None] * (np.where(x == 0, 1, np.expm1(x) / np.where(x == 0, 1, x)) if zoh else 1)

    def per_channel(self, M: Any, batch: int, dim: int) -> Any:
        if M.ndim == 2 and M.shape[0] != batch:
            return M
        M = M if M.ndim == 3 else M[:, None]
        return np.repeat(M, dim // M.shape[1], axis=1)

    def put(self, state: Any, new: Any) -> None:
        state[...] = new

    def output(self, C: Any, new: Any, old: Any, D: Any, x: Any, z: Any) -> Any:
        y = (C * new).sum(-1)
        y = y if D is None else y + D * x
        return y if z is None else y * z * sigmoid(z)

    def __call__(
        self, state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
        dt_softplus: bool = False, *, discretization: str = "euler",
    ) -> Any:  # fmt: skip
        short, wide = x.dtype, state.dtype.newbyteorder("=")
        x, dt, B, C, z = (None if q is None else q.astype(wide) for q in (x, dt, B, C, z))
        B, C = (self.per_channel(M, *x.shape) for M in (B, C))
        Delta = self.step_size(dt, dt_bias, dt_softplus)
        exponent = self.exponent(Delta, A)
        inflow = self.weight(Delta, exponent, discretization == "zoh") * B * x[..., None]
        old = state.copy()
        new = np.exp(exponent) * old + inflow
        self.put(state, new)
        return self.output(C, new, old, D, x, z).astype(short.newbyteorder("="))


class StateNotKept(RightStep):
    """Computes a new state and leaves the old one in place."""

    def put(self, state: Any, new: Any) -> None:
        pass


class OutputOfTheOldState(RightStep):
    """Reads y off the state before the step."""

    def output(self, C: Any, new: Any, old: Any, D: Any, x: Any, z: Any) -> Any:
        return super().output(C, old, old, D, x, z)


class GateBeforeD(RightStep):
    """Applies the gate before D x is added."""

    def output(self, C: Any, new: Any, old: Any, D: Any, x: Any, z: Any) -> Any:
        return super().output(C, new, old, None, x, z) + (0 if D is None else D * x)


class BiasAfterSoftplus(RightStep):
    """Adds dt_bias after softplus."""

    def step_size(self, dt: Any, bias: Any, softplus: bool) -> Any:
        return super().step_size(dt, None, softplus) + (0 if bias is None else bias)


class ThresholdSoftplus(RightStep):
    """Takes softplus for x above 2, as others do above 20."""

    def softplus(self, x: Any) -> Any:
        return np.where(x > 2, x, super().softplus(x))


class NaNFromInfiniteRate(RightStep):
    """Computes (exp(dt A) - 1) / A as it stands, which is 0 / 0 at A = 0 and noise near it."""

    def weight(self, dt: Any, x: Any, zoh: bool) -> Any:
        return dt[..., None] * (np.expm1(x) / (x + np.asarray(1e-7, x.dtype)) if zoh else 1)


class GroupByModulo(RightStep):
    """Gives channel d the group d modulo groups."""

    def per_channel(self, M: Any, batch: int, dim: int) -> Any:
        return np.tile(M, (1, dim // M.shape[1], 1)) if M.ndim == 3 else super().per_channel(M, batch, dim)


class HalfPrecisionState(RightStep):
    """Keeps the state in float16."""

    def put(self, state: Any, new: Any) -> None:
        state[...] = new.astype(np.float16)


class MapOfTheFirstRow(RightStep):
    """Uses the first row's B and C for all."""

    def per_channel(self, M: Any, batch: int, dim: int) -> Any:
        found = super().per_channel(M, batch, dim)
        return found if found.ndim == 2 else np.broadcast_to(found[:1], found.shape)


class RateOfTheFirstState(RightStep):
    """Lets all states decay at the rate of the first."""

    def exponent(self, dt: Any, A: Any) -> Any:
        return super().exponent(dt, np.broadcast_to(A[:, :1], A.shape))


def _below(right: type) -> dict[str, type]:
    kinds = [x for x in globals().values() if isinstance(x, type) and issubclass(x, right) and x is not right]
    return {kind.__name__: kind for kind in kinds}


WRONG_CONVS, WRONG_STEPS = _below(RightConv), _below(RightStep)
