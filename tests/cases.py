"""What the tests of the kernels draw: realistic values, every option, in plain memory.

The values are those of `npmamba.testing.values`; a description here has its options as a dict, which tests change
freely. A test of a kernel against its reference is::

    @given(scan_specs())
    def test_forward_matches_the_reference(spec):
        case = spec.arguments(np.float32)
        y, last_state = selective_scan(**case, return_last_state=True)
        y_ref, last_state_ref = reference.forward(**case)

and of its gradients::

        dout, dlast_state = cotangents(spec.seed, case["u"], spec.state_shape)
        grads = selective_scan_backward(dout, **case, dlast_state=dlast_state)

`npmamba.testing.strategies` draws more: other magnitudes, memory layouts, NaN and infinities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from npmamba.testing.options import ConvOptions, ScanOptions
from npmamba.testing.strategies import seeds
from npmamba.testing.values import DELTA_MAX, DELTA_MIN, Numbers, draw_conv, draw_scan, parameter_dtype

__all__ = ["DELTA_MAX", "DELTA_MIN", "parameter_dtype", "seeds"]

LENGTHS = (1, 2, 3, 7, 64, 65, 257)
DIMS = (1, 5, 48, 100)
DSTATES = (1, 3, 16, 64)
WIDTHS = (1, 2, 3, 4, 7)
SEQ_IDX_KINDS = (None, None, None, "runs", "runs", "padded", "padded", "padding")  # the dull one seldom

SCAN_OPTIONS: dict[str, Any] = asdict(ScanOptions())
CONV_OPTIONS: dict[str, Any] = asdict(ConvOptions())


def seq_idx_case(rng: np.random.Generator, batch: int, seqlen: int, kind: str | None) -> np.ndarray | None:
    """Draw a seq_idx (batch, seqlen) int32 of short runs; "padded" has padding in it, "padding" only that."""
    return Numbers(rng, "tame", np.float64).seq_idx(batch, seqlen, kind)


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
    drawn = ScanOptions(**_known(options, SCAN_OPTIONS))
    case = draw_scan(Numbers(rng, "tame", dtype), (batch, dim, seqlen, dstate), drawn)
    return _cast(case, dtype, parameters=("A", "D", "delta_bias", "initial_state"))


def conv_case(
    rng: np.random.Generator, batch: int, dim: int, seqlen: int, width: int, *, dtype: Any = np.float64,
    **options: Any,
) -> dict[str, Any]:
    """Draw the arguments of a causal convolution, standard normal, like `scan_case`.

    `options` are those of `CONV_OPTIONS`; every array has `dtype`, except for the initial state.
    """
    drawn = ConvOptions(**_known(options, CONV_OPTIONS))
    case = draw_conv(Numbers(rng, "tame", dtype), (batch, dim, seqlen, width), drawn)
    return _cast(case, dtype, parameters=("initial_state",))


def _known(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {sorted(defaults)}")
    return options


def _cast(case: dict[str, Any], dtype: Any, *, parameters: tuple[str, ...]) -> dict[str, Any]:
    floats = {n: x for n, x in case.items() if getattr(x, "dtype", None) == np.float64}
    return case | {n: x.astype(parameter_dtype(dtype) if n in parameters else dtype) for n, x in floats.items()}


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
