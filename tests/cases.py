"""Arguments to test with: realistic values, every option, and Hypothesis strategies that draw them.

A strategy draws a description (sizes, options and a seed), never array elements: a failing example prints one
line, and ``spec.arguments()`` makes the arrays from it. A test of a kernel against its reference is::

    @given(scan_specs())
    def test_forward_matches_the_reference(spec):
        case = spec.arguments(np.float32)
        y, last_state = selective_scan(**case, return_last_state=True)
        y_ref, last_state_ref = reference.forward(**case)

and of its gradients::

        dout, dlast_state = cotangents(spec.seed, case["u"], spec.state_shape)
        grads = selective_scan_backward(dout, **case, dlast_state=dlast_state)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

LENGTHS = (1, 2, 3, 7, 64, 65, 257)
DIMS = (1, 5, 48, 100)
DSTATES = (1, 3, 16, 64)
WIDTHS = (1, 2, 3, 4, 7)
DELTA_MIN, DELTA_MAX = 1e-3, 0.1
SEQ_IDX_KINDS = (None, None, None, "runs", "runs", "padded", "padded", "padding")  # the dull one seldom

SCAN_OPTIONS: dict[str, Any] = {
    "B": "variable",  # "constant", "variable", or the number of groups, which divides dim
    "C": "variable",
    "D": False,
    "z": False,
    "delta_bias": False,
    "delta_softplus": False,
    "initial_state": False,
    "seq_idx": None,  # None, "runs", "padded" (runs, and steps that are padding) or "padding" (nothing else)
    "discretization": "euler",
    "reverse": False,
}
CONV_OPTIONS: dict[str, Any] = {
    "bias": False,
    "activation": None,
    "initial_state": False,
    "seq_idx": None,
    "reverse": False,
}


def parameter_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of parameters and states that go with arrays of `dtype`."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def seq_idx_case(rng: np.random.Generator, batch: int, seqlen: int, kind: str | None) -> np.ndarray | None:
    """Draw a seq_idx (batch, seqlen) int32 of short runs; "padded" has padding in it, "padding" only that."""
    if kind is None:
        return None
    seq_idx = np.cumsum(rng.random((batch, seqlen)) < 0.3, axis=1) % 3
    padding = rng.random((batch, seqlen)) < {"runs": 0.0, "padded": 0.3, "padding": 1.0}[kind]
    return np.where(padding, -1 - rng.integers(0, 3, (batch, seqlen)), seq_idx).astype(np.int32)


def _deltas(rng: np.random.Generator, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Return delta and delta_bias for which the step size is log-uniform in [DELTA_MIN, DELTA_MAX]."""
    target = np.exp(rng.uniform(np.log(DELTA_MIN), np.log(DELTA_MAX), shape))
    bias = rng.uniform(0, DELTA_MIN / 2, shape[1])
    if options["delta_softplus"]:
        target = target + np.log(-np.expm1(-target))  # the inverse of softplus
        bias = rng.uniform(-7, -2, shape[1])
    return (target - bias[:, None], bias) if options["delta_bias"] else (target, None)


def _coefficients(rng: np.random.Generator, batch: int, dim: int, seqlen: int, dstate: int, kind: Any) -> Any:
    """Draw a B or C of one of its layouts."""
    if kind == "constant":
        return rng.standard_normal((dim, dstate))
    groups = () if kind == "variable" else (kind,)
    return rng.standard_normal((batch, *groups, dstate, seqlen))


def scan_case(
    rng: np.random.Generator, batch: int, dim: int, seqlen: int, dstate: int, *, dtype: Any = np.float64,
    **options: Any,
) -> dict[str, Any]:
    """Draw the arguments of a selective scan.

    The step size is log-uniform in [1e-3, 0.1] through delta, delta_bias and softplus, as the published
    initialization has it; A is -(1 ... dstate) with a jitter per channel; the rest is standard normal.

    Parameters
    ----------
    rng : numpy.random.Generator
    batch, dim, seqlen, dstate : int
    dtype : dtype of u, delta, z, B and C; the other arrays follow `parameter_dtype`
    **options
        What `SCAN_OPTIONS` lists; a missing one is off.

    Returns
    -------
    dict
        Keyword arguments of ``selective_scan`` and of its reference.
    """
    options = {**SCAN_OPTIONS, **_known(options, SCAN_OPTIONS)}
    shape = (batch, dim, seqlen)
    delta, delta_bias = _deltas(rng, shape, options)
    case = {
        "u": rng.standard_normal(shape),
        "delta": delta,
        "A": -np.arange(1.0, dstate + 1) * rng.uniform(0.5, 1.5, (dim, 1)),
        "B": _coefficients(rng, batch, dim, seqlen, dstate, options["B"]),
        "C": _coefficients(rng, batch, dim, seqlen, dstate, options["C"]),
        "D": rng.standard_normal(dim) if options["D"] else None,
        "z": rng.standard_normal(shape) if options["z"] else None,
        "delta_bias": delta_bias,
        "initial_state": rng.standard_normal((batch, dim, dstate)) if options["initial_state"] else None,
    }
    case = _cast(case, dtype, parameters=("A", "D", "delta_bias", "initial_state"))
    flags = {name: options[name] for name in ("delta_softplus", "discretization", "reverse")}
    return {**case, **flags, "seq_idx": seq_idx_case(rng, batch, seqlen, options["seq_idx"])}


def conv_case(
    rng: np.random.Generator, batch: int, dim: int, seqlen: int, width: int, *, dtype: Any = np.float64,
    **options: Any,
) -> dict[str, Any]:
    """Draw the arguments of a causal convolution, standard normal, like `scan_case`.

    `options` are those of `CONV_OPTIONS`; every array has `dtype`, except for the initial state.
    """
    options = {**CONV_OPTIONS, **_known(options, CONV_OPTIONS)}
    case = {
        "x": rng.standard_normal((batch, dim, seqlen)),
        "weight": rng.standard_normal((dim, width)),
        "bias": rng.standard_normal(dim) if options["bias"] else None,
        "initial_state": rng.standard_normal((batch, dim, width - 1)) if options["initial_state"] else None,
    }
    case = _cast(case, dtype, parameters=("initial_state",))
    flags = {name: options[name] for name in ("activation", "reverse")}
    return {**case, **flags, "seq_idx": seq_idx_case(rng, batch, seqlen, options["seq_idx"])}


def _known(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {sorted(defaults)}")
    return options


def _cast(case: dict[str, Any], dtype: Any, *, parameters: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: None if x is None else x.astype(parameter_dtype(dtype) if name in parameters else dtype)
        for name, x in case.items()
    }


def cotangents(seed: int, like: np.ndarray, state_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw dout like `like` (the shape and dtype of y) and dlast_state, both standard normal."""
    rng = np.random.default_rng((seed, 1))
    dout = rng.standard_normal(like.shape).astype(like.dtype)
    return dout, rng.standard_normal(state_shape).astype(parameter_dtype(like.dtype))


@dataclass(frozen=True)
class ScanSpec:
    """The sizes, options and seed that make the arguments of a scan."""

    batch: int
    dim: int
    seqlen: int
    dstate: int
    options: dict[str, Any]
    seed: int

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.batch, self.dim, self.dstate

    def arguments(self, dtype: Any = np.float64) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 0))
        return scan_case(rng, self.batch, self.dim, self.seqlen, self.dstate, dtype=dtype, **self.options)


@dataclass(frozen=True)
class ConvSpec:
    """The sizes, options and seed that make the arguments of a causal convolution."""

    batch: int
    dim: int
    seqlen: int
    width: int
    options: dict[str, Any]
    seed: int

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.batch, self.dim, self.width - 1

    def arguments(self, dtype: Any = np.float64) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 0))
        return conv_case(rng, self.batch, self.dim, self.seqlen, self.width, dtype=dtype, **self.options)


seeds = st.integers(0, 2**32 - 1)


def _group_counts(dim: int) -> list[int]:
    return [g for g in range(1, dim + 1) if dim % g == 0]


def scan_options(dim: int) -> st.SearchStrategy[dict[str, Any]]:
    """Draw options of `scan_case` for `dim` channels."""
    coefficients = st.sampled_from(["constant", "variable", *_group_counts(dim)])
    return st.fixed_dictionaries(
        {
            "B": coefficients,
            "C": coefficients,
            **{name: st.booleans() for name in SCAN_OPTIONS if SCAN_OPTIONS[name] is False},
            "seq_idx": st.sampled_from(SEQ_IDX_KINDS),
            "discretization": st.sampled_from(["euler", "zoh"]),
        }
    )


@st.composite
def scan_specs(
    draw: st.DrawFn, *, batches: Any = (1, 2, 3), dims: Any = DIMS, lengths: Any = LENGTHS,
    dstates: Any = DSTATES, max_elements: int = 500_000,
) -> ScanSpec:
    """Draw a `ScanSpec` with sizes from the given ones, of at most `max_elements` states times steps.

    Zero is no default size; pass it (``lengths=(0, 1)``) to test empty arrays.
    """
    batch, dim = draw(st.sampled_from(batches)), draw(st.sampled_from(dims))
    dstate = draw(st.sampled_from(dstates))
    states = batch * dim * dstate
    fitting = [length for length in lengths if states * length <= max_elements] or [min(lengths)]
    options = draw(scan_options(dim))
    return ScanSpec(batch, dim, draw(st.sampled_from(fitting)), dstate, options, draw(seeds))


@st.composite
def conv_specs(
    draw: st.DrawFn, *, batches: Any = (1, 2, 3), dims: Any = DIMS, lengths: Any = LENGTHS,
    widths: Any = WIDTHS,
) -> ConvSpec:
    """Draw a `ConvSpec` with sizes from the given ones."""
    options = st.fixed_dictionaries(
        {
            **{name: st.booleans() for name in CONV_OPTIONS if CONV_OPTIONS[name] is False},
            "activation": st.sampled_from([None, "silu"]),
            "seq_idx": st.sampled_from(SEQ_IDX_KINDS),
        }
    )
    sizes = (draw(st.sampled_from(q)) for q in (batches, dims, lengths, widths))
    return ConvSpec(*sizes, draw(options), draw(seeds))
