"""The options of test cases, one record per operation; everything is off by default."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

SEQ_IDX_KINDS = (None, "runs", "padded", "padding")
DISCRETIZATIONS = ("euler", "zoh")
ACTIVATIONS = (None, "silu")


class Compact:
    """A repr of one line that evaluates back: what must be given comes first, and defaults are left out."""

    def __repr__(self) -> str:
        ordered = sorted(fields(self), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in ordered if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"


def refuse_unless(case: Any, name: str, known: Any) -> None:
    """Raise a ValueError if an attribute of a case is not one of the known values.

    >>> refuse_unless(ScanOptions(), "discretization", ("tustin",))
    Traceback (most recent call last):
        ...
    ValueError: ScanOptions: discretization must be one of 'tustin', got 'euler'
    """
    value = getattr(case, name)
    if value not in known:
        raise ValueError(f"{type(case).__name__}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_maps(options: Any) -> None:
    for name in ("B", "C"):
        kind = getattr(options, name)
        if not (kind in ("variable", "constant") if isinstance(kind, str) else kind >= 1):
            raise ValueError(
                f"{type(options).__name__}: {name} must be 'variable', 'constant' or a number of groups, got {kind!r}"
            )


@dataclass(frozen=True, repr=False)
class ScanOptions(Compact):
    """The options of a scan; all off by default.

    B and C are "variable", "constant" or a number of groups that divides dim; `seq_idx` is None, "runs" (short packed
    sequences), "padded" (runs, and steps that are padding) or "padding" (nothing else).

    >>> ScanOptions(B=2, z=True)
    ScanOptions(B=2, z=True)
    """

    B: str | int = "variable"
    C: str | int = "variable"
    D: bool = False
    z: bool = False
    delta_bias: bool = False
    delta_softplus: bool = False
    initial_state: bool = False
    seq_idx: str | None = None
    discretization: str = "euler"
    reverse: bool = False

    def __post_init__(self) -> None:
        _check_maps(self)
        refuse_unless(self, "seq_idx", SEQ_IDX_KINDS)
        refuse_unless(self, "discretization", DISCRETIZATIONS)


@dataclass(frozen=True, repr=False)
class ConvOptions(Compact):
    """The options of a causal convolution; all off by default.

    >>> ConvOptions(activation="silu")
    ConvOptions(activation='silu')
    """

    bias: bool = False
    activation: str | None = None
    initial_state: bool = False
    seq_idx: str | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        refuse_unless(self, "seq_idx", SEQ_IDX_KINDS)
        refuse_unless(self, "activation", ACTIVATIONS)


@dataclass(frozen=True, repr=False)
class UpdateOptions(Compact):
    """The options of one step of a scan; all off by default.

    >>> UpdateOptions(dt_softplus=True)
    UpdateOptions(dt_softplus=True)
    """

    B: str | int = "variable"
    C: str | int = "variable"
    D: bool = False
    z: bool = False
    dt_bias: bool = False
    dt_softplus: bool = False
    discretization: str = "euler"

    def __post_init__(self) -> None:
        _check_maps(self)
        refuse_unless(self, "discretization", DISCRETIZATIONS)
