"""The strategies of `npmamba.testing`: they draw everything, shrink to nothing, and obey restrictions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

import npmamba
from npmamba.testing.cases import CASE_LAYOUTS, ConvCase, ScanCase, ScanOptions, UpdateCase
from npmamba.testing.strategies import (
    DIMS,
    DSTATES,
    LENGTHS,
    SIZE_LIMIT,
    WIDTHS,
    conv_cases,
    scan_cases,
    update_cases,
)
from npmamba.testing.values import CONV_MAGNITUDES, MAGNITUDES

ALL = [scan_cases, conv_cases, update_cases]
PLAIN = {scan_cases: ScanCase(1, 1, 1, 1), conv_cases: ConvCase(1, 1, 1, 1), update_cases: UpdateCase(1, 1, 1)}
quietly = settings(max_examples=2000, deadline=None, derandomize=True, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


def drawn(strategy: Any, examples: int = 600) -> list[Any]:
    """Return as many examples as Hypothesis draws."""
    found: list[Any] = []

    @settings(quietly, max_examples=examples)
    @given(strategy)
    def collect(case):
        found.append(case)

    collect()
    return found


@pytest.mark.parametrize("strategy", ALL)
def test_a_case_that_fails_anyhow_shrinks_to_the_plainest_one(strategy):
    assert find(strategy(special=True), lambda case: True, settings=quietly) == PLAIN[strategy]


@pytest.mark.parametrize(
    ("fails", "smallest"),
    [
        (lambda c: c.seqlen > 32, ScanCase(1, 1, 33, 1)),
        (lambda c: c.dim * c.dstate >= 6, None),
        (lambda c: c.options.seq_idx == "padded", ScanCase(1, 1, 1, 1, ScanOptions(seq_idx="padded"))),
        (lambda c: isinstance(c.options.C, int) and c.options.C > 1, ScanCase(1, 2, 1, 1, ScanOptions(C=2))),
        (lambda c: c.options.reverse and c.options.z, ScanCase(1, 1, 1, 1, ScanOptions(z=True, reverse=True))),
        (lambda c: c.magnitude == "fast", ScanCase(1, 1, 1, 1, magnitude="fast")),
        (lambda c: c.layout == "unaligned", ScanCase(1, 1, 1, 1, layout="unaligned")),
        (lambda c: c.special == ("delta", "nan"), ScanCase(1, 1, 1, 1, special=("delta", "nan"))),
    ],
)
def test_what_a_failure_does_not_need_is_shrunk_away(fails, smallest):
    found = find(scan_cases(special=True), fails, settings=quietly)
    if smallest is None:
        assert found.dim * found.dstate in (6, 8)  # no listed sizes have the product 7
        assert found == ScanCase(1, found.dim, 1, found.dstate)
    else:
        assert found == smallest


def test_every_choice_is_drawn():
    cases = drawn(scan_cases(special=True), 1500)
    for name in ScanOptions.__dataclass_fields__:
        values = Counter(getattr(c.options, name) for c in cases)
        assert len(values) >= {"B": 5, "C": 5, "seq_idx": 4}.get(name, 2), name
        assert min(values[v] for v in values if name not in "BC" or isinstance(v, str)) > 30, name
    assert {c.magnitude for c in cases} == set(MAGNITUDES)
    assert {c.layout for c in cases} == set(CASE_LAYOUTS)
    assert {c.dim for c in cases} == set(DIMS)
    assert {c.dstate for c in cases} == set(DSTATES)
    assert {c.seqlen for c in cases} == set(LENGTHS)
    specials = {c.special for c in cases if c.special}
    assert {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"} == {name for name, _ in specials}
    assert {"nan", "inf", "-inf"} == {value for _, value in specials}
    convolutions = drawn(conv_cases())
    assert {c.width for c in convolutions} == set(WIDTHS)
    assert {c.magnitude for c in convolutions} == set(CONV_MAGNITUDES)
    assert any(c.width > c.seqlen for c in convolutions)


def test_lengths_stand_around_powers_of_two():
    for power in (8, 16, 32, 64, 128, 256, 512, 1024):
        assert {power - 1, power, power + 1} <= set(LENGTHS)


def test_long_and_wide_cases_are_drawn_within_the_limit():
    cases = drawn(scan_cases())
    sizes = [c.batch * c.dim * c.seqlen * c.dstate for c in cases]
    assert max(sizes) <= SIZE_LIMIT
    assert max(sizes) > SIZE_LIMIT / 4
    assert sum(c.seqlen > 1000 for c in cases) > 20
    assert sum(c.dim > 60 for c in cases) > 60
    assert sum(c.batch * c.dim * c.dstate > 200 and c.seqlen > 30 for c in cases) > 30


@given(scan_cases(dims=(0, 6), lengths=st.integers(0, 3), dstates=[2], batches=(0, 1), magnitudes=["slow"],
                  layouts=["F", "C"], special=["nan"], reverse=True, z=False, seq_idx=["runs", "padding"], B="grouped",
                  C=3, discretization="zoh"))  # fmt: skip
def test_restrictions_are_obeyed(case):
    o = case.options
    assert case.dim in (0, 6)
    assert case.seqlen <= 3
    assert (case.dstate, case.magnitude, o.reverse, o.z, o.C, o.discretization) == (2, "slow", True, False, 3, "zoh")
    assert case.layout in ("F", "C")
    assert o.seq_idx in ("runs", "padding")
    assert isinstance(o.B, int)
    assert case.special is None or case.special[1] == "nan"


@given(scan_cases(B=["grouped", "variable"], C="grouped"))
def test_where_both_maps_have_groups_they_have_as_many(case):
    assert case.dim % case.options.C == 0
    assert case.options.B in ("variable", case.options.C)


@pytest.mark.parametrize("strategy", ALL)
def test_an_unknown_option_is_refused(strategy):
    with pytest.raises(TypeError, match=r"unknown options \['gate'\]; known are \["):
        find(strategy(gate=True), lambda case: True, settings=quietly)


SMALL = {"special": True, "dims": (0, 1, 6), "batches": (0, 1, 2), "max_size": 3000}
anything = st.one_of(
    scan_cases(**SMALL, lengths=(0, 1, 5, 33)), conv_cases(**SMALL, lengths=(0, 1, 5, 33)), update_cases(**SMALL)
)


@given(anything, st.sampled_from([np.float16, np.float32, np.float64]))
def test_every_case_is_a_right_call_of_its_operation(case, dtype):
    operations = {ScanCase: npmamba.selective_scan, ConvCase: npmamba.causal_conv1d}
    operation = operations.get(type(case), npmamba.selective_state_update)
    arguments = case.arguments(dtype)
    y = operation(**arguments)
    assert y.shape == arguments["u" if isinstance(case, ScanCase) else "x"].shape
