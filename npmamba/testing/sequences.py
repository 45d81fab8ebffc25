"""The arguments of an operation, taken apart into plain sequences: no padding, no packing, no reversed time.

Oracles solve plain sequences, so what `seq_idx`, `reverse`, groups and layouts mean is said here once, with no
function of the kernels or of the references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any


class ScanSequence(NamedTuple):
    """A sequence of all channels of one batch row, in the order in which it is scanned; everything is float64."""

    u: Array  # (dim, seqlen), as delta and z
    delta: Array
    A: Array  # (dim, dstate)
    B: Array  # (dim, dstate, seqlen), as C
    C: Array
    D: Array  # (dim,), zero where there is none, as delta_bias
    z: Array | None
    delta_bias: Array
    softplus: bool
    zoh: bool
    initial_state: Array  # (dim, dstate)
    fresh: Array  # (seqlen,): where the state is zeroed first; nowhere, but for oracles that ask for whole rows

    def step_sizes(self) -> Array:
        """Return the step sizes after bias and softplus (dim, seqlen)."""
        raw = self.delta + self.delta_bias[:, None]
        return np.logaddexp(0, raw) if self.softplus else raw

    def output(self, Ch: Array) -> Array:
        """Add the direct path to what the states give (dim, seqlen), and apply the gate."""
        from scipy.special import expit

        y = Ch + self.D[:, None] * self.u
        return y if self.z is None else y * self.z * expit(self.z)


class ConvSequence(NamedTuple):
    """The sequences of one batch row, all channels; each has the width - 1 inputs before it. Everything is float64."""

    x: Array  # (dim, width - 1 + seqlen): the sequences one after the other, with zeros between them
    weight: Array  # (dim, width)
    bias: Array  # (dim,), zero where there is none
    silu: bool


def times_of_sequences(seq_idx: Any, seqlen: int, reverse: bool) -> list[Array]:
    """Return the steps of each sequence of one batch row, in the order of scanning.

    >>> [times.tolist() for times in times_of_sequences([4, 4, -1, 4, 2], 5, False)]
    [[0, 1, 3], [4]]
    """
    index = np.zeros(seqlen, np.int64) if seq_idx is None else np.asarray(seq_idx).astype(np.int64)
    kept = np.flatnonzero(index >= 0)[:: -1 if reverse else 1]
    return [times for times in np.split(kept, np.flatnonzero(np.diff(index[kept])) + 1) if times.size]


def _channel_maps(B: Array, b: int, times: Array, dim: int) -> Array:
    """Return B (or C) of one row as every channel sees it: (dim, dstate, times)."""
    if B.ndim == 2:
        return np.repeat(B[:, :, None], len(times), axis=2)
    grouped = B[b] if B.ndim == 4 else B[b][None]
    group_of_channel = np.arange(dim) * grouped.shape[0] // dim
    return grouped[group_of_channel][:, :, times]


def _scan_sequence(a: dict[str, Any], b: int, times: Array, state: Array, fresh: Array) -> ScanSequence:
    dim = a["u"].shape[1]
    B, C = (_channel_maps(a[name], b, times, dim) for name in ("B", "C"))
    z = None if a["z"] is None else a["z"][b][:, times]
    D, bias = (np.zeros(dim) if a[name] is None else a[name] for name in ("D", "delta_bias"))
    return ScanSequence(
        a["u"][b][:, times], a["delta"][b][:, times], a["A"], B, C, D, z, bias, bool(a["delta_softplus"]),
        a["discretization"] == "zoh", state, fresh,
    )  # fmt: skip


_SCAN_OFF: dict[str, Any] = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx")) | {
    "delta_softplus": False,
    "discretization": "euler",
    "reverse": False,
}
_CONV_OFF: dict[str, Any] = dict.fromkeys(("bias", "activation", "initial_state", "seq_idx")) | {"reverse": False}


def complete_scan(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a scan in float64, with the options that are not there.

    What asks for more results or better ones, and changes none, is left out.

    >>> one = np.ones((1, 1, 1), np.float32)
    >>> full = complete_scan(dict(u=one, delta=one, A=one[0], B=one, C=one, return_last_state=True))
    >>> full["u"].dtype, full["D"], full["reverse"], "return_last_state" in full
    (dtype('float64'), None, False, False)
    """
    return _complete(arguments, dict.fromkeys(("u", "delta", "A", "B", "C")) | _SCAN_OFF)


def complete_conv(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a convolution in float64, with the options that are not there.

    >>> complete_conv(dict(x=np.ones((1, 1, 1)), weight=np.ones((1, 1))))["bias"] is None
    True
    """
    return _complete(arguments, dict.fromkeys(("x", "weight")) | _CONV_OFF)


def _complete(arguments: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    given = {name: x for name, x in arguments.items() if name not in ("return_last_state", "precise")}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; known are {list(known)}")
    full = {**known, **given}
    arrays = [name for name, x in full.items() if isinstance(x, np.ndarray) and name != "seq_idx"]
    return full | {name: full[name].astype(np.float64) for name in arrays}


def is_finite(arguments: dict[str, Any]) -> bool:
    """Tell whether no array has an infinity or a NaN in it.

    >>> is_finite(dict(u=np.ones(3), z=None)), is_finite(dict(u=np.array([np.nan])))
    (True, False)
    """
    arrays = (x for x in arguments.values() if isinstance(x, np.ndarray))
    return all(np.isfinite(x.astype(np.float64)).all() for x in arrays)


def refuse_nonfinite(oracle: str, arguments: dict[str, Any]) -> None:
    """Raise a ValueError that names the oracle and the argument with an infinity or a NaN in it."""
    for name, x in arguments.items():
        if not is_finite({name: x}):
            raise ValueError(f"{oracle}: {name} must be finite; exact_scan and exact_conv take NaN and infinities too")


def scan_by(
    solve: Callable[[ScanSequence], tuple[Array, Array]], arguments: dict[str, Any], *, whole_rows: bool = False
) -> tuple[Array, Array]:
    """Compute a selective scan by an oracle for plain sequences.

    Parameters
    ----------
    solve : callable
        Takes a `ScanSequence` of at least one step; returns y (dim, seqlen) and the last state (dim, dstate).
    arguments : dict
        Keyword arguments of ``selective_scan``; options may be left out.
    whole_rows : bool
        Whether `solve` takes the sequences of one batch row together, and zeroes the state where they begin.

    Returns
    -------
    y : (batch, dim, seqlen) float64
    last_state : (batch, dim, dstate) float64

    Examples
    --------
    >>> one = np.ones((1, 1, 2))
    >>> scan_by(lambda s: (s.u, s.initial_state), dict(u=one, delta=one, A=one[0, :, :1], B=one, C=one))
    (array([[[1., 1.]]]), array([[[0.]]]))
    """
    a = complete_scan(arguments)
    batch, dim, seqlen = a["u"].shape
    start = a["initial_state"]
    last = np.zeros((batch, *a["A"].shape)) if start is None else start.copy()
    y = np.zeros((batch, dim, seqlen))
    for b in range(batch):
        rows = _parts(a, b, seqlen)
        for k, times in enumerate([np.concatenate(rows)] if whole_rows and rows else rows):
            fresh = np.isin(times, [part[0] for part in rows[1:]]) if whole_rows else np.zeros(times.shape, bool)
            if dim:
                state = last[b] if k == 0 else np.zeros_like(last[b])
                y[b][:, times], last[b] = solve(_scan_sequence(a, b, times, state, fresh))
    return y, last


def _parts(a: dict[str, Any], b: int, seqlen: int) -> list[Array]:
    """Return the times of each sequence of a batch row."""
    return times_of_sequences(None if a["seq_idx"] is None else a["seq_idx"][b], seqlen, a["reverse"])


def _outside_gaps(parts: list[Array], taps: int) -> Array:
    """Return which outputs of sequences with gaps of `taps` between them are those of the sequences."""
    gap = np.zeros(taps, bool)
    return np.concatenate([np.concatenate([gap[: taps * (k > 0)], parts[k] >= 0]) for k in range(len(parts))])


def conv_by(solve: Callable[[ConvSequence], Array], arguments: dict[str, Any]) -> tuple[Array, Array]:
    """Compute a causal convolution by an oracle for plain sequences; the like of `scan_by`.

    >>> one = np.ones((1, 1, 2))
    >>> conv_by(lambda s: s.x, dict(x=one, weight=one[0, :, :1]))
    (array([[[1., 1.]]]), array([], shape=(1, 1, 0), dtype=float64))
    """
    a = complete_conv(arguments)
    batch, dim, seqlen = a["x"].shape
    taps = a["weight"].shape[1] - 1
    last = np.zeros((batch, dim, taps)) if a["initial_state"] is None else a["initial_state"].copy()
    bias = np.zeros(dim) if a["bias"] is None else a["bias"]
    y = np.zeros((batch, dim, seqlen))
    for b in range(batch):
        parts = _parts(a, b, seqlen)
        if not (parts and dim):
            continue
        gaps = [last[b], *(np.zeros((dim, taps)) for _ in parts[1:])]
        x = [np.concatenate([gap, a["x"][b][:, times]], axis=1) for gap, times in zip(gaps, parts, strict=True)]
        found = solve(ConvSequence(np.concatenate(x, axis=1), a["weight"], bias, a["activation"] == "silu"))
        y[b][:, np.concatenate(parts)] = found[:, _outside_gaps(parts, taps)]
        last[b] = x[-1][:, len(parts[-1]) :]
    return y, last
