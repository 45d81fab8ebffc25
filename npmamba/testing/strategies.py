"""Hypothesis strategies that draw test cases: sizes, options and a seed, never arrays element by element.

A failing example shrinks towards the smallest shape, with all options off, tame numbers and plain memory, and prints
one line that makes it again::

    @given(scan_cases(dstates=(1, 16), reverse=False))
    def test_my_scan(case):
        arguments = case.arguments(np.float32)
        found = outputs(my_scan, arguments)
        for difference in compare(found, exact_scan(arguments), scan_tolerance(arguments)):
            assert difference.units <= 1, difference

Every strategy takes what it may choose from: sizes, magnitudes, layouts, special values, and each option by name,
as one value (``reverse=False``) or as a list of them (``seq_idx=[None, "runs"]``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

try:
    from hypothesis import strategies as st
except ImportError:
    raise ImportError(
        "npmamba.testing.strategies needs the package hypothesis, which the extra `fuzz` brings: "
        'pip install "npmamba[fuzz]"'
    ) from None

from npmamba.testing.cases import CASE_LAYOUTS, SPECIAL_VALUES, ConvCase, ScanCase, UpdateCase
from npmamba.testing.options import (
    ACTIVATIONS,
    DISCRETIZATIONS,
    SEQ_IDX_KINDS,
    ConvOptions,
    ScanOptions,
    UpdateOptions,
)
from npmamba.testing.values import CONV_MAGNITUDES, MAGNITUDES

_SMALL = (1, 2, 3, 4, 5, 7, 8, 9)
_BORDERS = (15, 16, 17, 31, 32, 33, 63, 64, 65)  # of vectors, warps and tiles
BATCHES = (1, 2, 3)
DIMS = (*_SMALL, *_BORDERS, 100, 128, 129)
LENGTHS = (*_SMALL, *_BORDERS, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025)
DSTATES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 64)
WIDTHS = (1, 2, 3, 4, 5, 7, 8)
MAPS = ("variable", "constant", "grouped")
SIZE_LIMIT = 100_000
"""States times steps of the largest case: the exact result takes a fraction of a second."""

seeds = st.integers(0, 2**32 - 1)

_CHOICES: dict[str, Sequence[Any]] = {
    "B": MAPS,
    "C": MAPS,
    "seq_idx": SEQ_IDX_KINDS,
    "discretization": DISCRETIZATIONS,
    "activation": ACTIVATIONS,
}
_ARRAYS = {
    "scan": ("u", "delta", "A", "B", "C"),
    "conv": ("x", "weight"),
    "update": ("state", "x", "dt", "A", "B", "C"),
}


def _choices(record: type, restrictions: dict[str, Any]) -> dict[str, Sequence[Any]]:
    """Return what each option may be, the dullest first."""
    names = list(record.__dataclass_fields__)  # type: ignore[attr-defined]
    unknown = sorted(restrictions.keys() - set(names))
    if unknown:
        raise TypeError(f"unknown options {unknown}; known are {names}")
    allowed = {name: _CHOICES.get(name, (False, True)) for name in names}
    for name, value in restrictions.items():
        allowed[name] = tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
    return allowed


def _draw_options(draw: st.DrawFn, choices: dict[str, Sequence[Any]], dim: int) -> dict[str, Any]:
    """Draw options; where B and C have groups both, they have as many."""
    drawn = {name: draw(st.sampled_from(values), label=name) for name, values in choices.items()}
    grouped = [name for name in ("B", "C") if drawn.get(name) == "grouped"]
    if grouped:
        groups = draw(st.sampled_from([g for g in range(1, max(dim, 1) + 1) if dim % g == 0]), label="groups")
        drawn |= dict.fromkeys(grouped, groups)
    return drawn


def _draw_size(draw: st.DrawFn, name: str, sizes: Any, limit: int) -> int:
    """Draw one of the sizes that are within the limit, or the smallest of all if none is.

    What is drawn is an index, whatever the limit: Hypothesis takes an example of fewer choices for the simpler one, so
    a size that leaves no choice to the next ones must not save one.
    """
    if isinstance(sizes, st.SearchStrategy):
        return draw(sizes, label=name)
    known = sorted(set(sizes))
    fitting = [n for n in known if n <= limit] or known[:1]
    return int(fitting[draw(st.integers(0, len(known) - 1)) % len(fitting)])


def _draw_sizes(draw: st.DrawFn, sizes: dict[str, Any], limit: int) -> dict[str, Any]:
    """Draw sizes whose product is within the limit; the first ones are free, the last ones take what is left."""
    drawn: dict[str, Any] = {}
    for name, values in sizes.items():
        drawn[name] = _draw_size(draw, name, values, limit)
        limit //= max(drawn[name], 1)
    return drawn


def _draw_rest(
    draw: st.DrawFn, magnitudes: Iterable[str], layouts: Iterable[str], special: Any, arrays: Sequence[str]
) -> dict[str, Any]:
    """Draw what all cases have: magnitude, layout, special value and seed."""
    kinds = SPECIAL_VALUES if special is True else tuple(special or ())
    places = [(name, kind) for name in arrays for kind in kinds]
    return {
        "magnitude": draw(st.sampled_from(tuple(magnitudes)), label="magnitude"),
        "layout": draw(st.sampled_from(tuple(layouts)), label="layout"),
        "special": draw(st.none() | st.sampled_from(places) if places else st.none(), label="special"),
        "seed": draw(seeds, label="seed"),
    }


def _present(arrays: Sequence[str], options: dict[str, Any]) -> list[str]:
    """List the arrays of floats that a case with these options has."""
    return [*arrays, *(name for name, value in options.items() if value is True and _is_array(name))]


def _is_array(option: str) -> bool:
    return option not in ("delta_softplus", "dt_softplus", "reverse")


@st.composite
def scan_cases(
    draw: st.DrawFn,
    *,
    batches: Any = BATCHES,
    dims: Any = DIMS,
    lengths: Any = LENGTHS,
    dstates: Any = DSTATES,
    magnitudes: Sequence[str] = tuple(MAGNITUDES),
    layouts: Sequence[str] = CASE_LAYOUTS,
    special: bool | Sequence[str] = False,
    max_size: int = SIZE_LIMIT,
    **options: Any,
) -> ScanCase:
    """Draw the arguments of a selective scan.

    Parameters
    ----------
    batches, dims, lengths, dstates : collection of int, or strategy
        Sizes to choose from. None is 0 unless asked for: ``lengths=(0, 1, 2)``.
    magnitudes, layouts : sequence of str
        Names to choose from, the simplest first.
    special : bool or sequence of str
        Whether to place a NaN or an infinity in some argument, sometimes; or which of "nan", "inf" and "-inf".
    max_size : int
        The most that batch * dim * seqlen * dstate may be, where sizes are collections.
    **options
        For each field of `ScanOptions` a value, or a list of values to choose from; B and C may be "variable",
        "constant", "grouped" (any number of groups that divides dim) or a number.

    Returns
    -------
    strategy of ScanCase

    Examples
    --------
    >>> from hypothesis import find
    >>> find(scan_cases(), lambda case: case.options.z and case.seqlen > 64)
    ScanCase(batch=1, dim=1, seqlen=65, dstate=1, options=ScanOptions(z=True))
    """
    sizes = _draw_sizes(draw, {"batch": batches, "seqlen": lengths, "dim": dims, "dstate": dstates}, max_size)
    drawn = _draw_options(draw, _choices(ScanOptions, options), sizes["dim"])
    rest = _draw_rest(draw, magnitudes, layouts, special, _present(_ARRAYS["scan"], drawn))
    return ScanCase(**sizes, options=ScanOptions(**drawn), **rest)


@st.composite
def conv_cases(
    draw: st.DrawFn,
    *,
    batches: Any = BATCHES,
    dims: Any = DIMS,
    lengths: Any = LENGTHS,
    widths: Any = WIDTHS,
    magnitudes: Sequence[str] = CONV_MAGNITUDES,
    layouts: Sequence[str] = CASE_LAYOUTS,
    special: bool | Sequence[str] = False,
    max_size: int = SIZE_LIMIT,
    **options: Any,
) -> ConvCase:
    """Draw the arguments of a causal convolution; parameters as those of `scan_cases`, options of `ConvOptions`.

    >>> from hypothesis import find
    >>> find(conv_cases(), lambda case: case.width > case.seqlen)
    ConvCase(batch=1, dim=1, seqlen=1, width=2)
    """
    sizes = _draw_sizes(draw, {"batch": batches, "seqlen": lengths, "dim": dims, "width": widths}, max_size)
    drawn = _draw_options(draw, _choices(ConvOptions, options), sizes["dim"])
    rest = _draw_rest(draw, magnitudes, layouts, special, _present(_ARRAYS["conv"], drawn))
    return ConvCase(**sizes, options=ConvOptions(**drawn), **rest)


@st.composite
def update_cases(
    draw: st.DrawFn,
    *,
    batches: Any = BATCHES,
    dims: Any = DIMS,
    dstates: Any = DSTATES,
    magnitudes: Sequence[str] = tuple(MAGNITUDES),
    layouts: Sequence[str] = CASE_LAYOUTS,
    special: bool | Sequence[str] = False,
    max_size: int = SIZE_LIMIT,
    **options: Any,
) -> UpdateCase:
    """Draw the arguments of one step of a scan; parameters as those of `scan_cases`, options of `UpdateOptions`.

    >>> from hypothesis import find
    >>> find(update_cases(), lambda case: case.layout == "negative")
    UpdateCase(batch=1, dim=1, dstate=1, layout='negative')
    """
    sizes = _draw_sizes(draw, {"batch": batches, "dim": dims, "dstate": dstates}, max_size)
    drawn = _draw_options(draw, _choices(UpdateOptions, options), sizes["dim"])
    rest = _draw_rest(draw, magnitudes, layouts, special, _present(_ARRAYS["update"], drawn))
    return UpdateCase(**sizes, options=UpdateOptions(**drawn), **rest)
