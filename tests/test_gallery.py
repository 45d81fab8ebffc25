"""Every wrong scan of the gallery is found, by a law or by comparison with the reference; the right one is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import ScanSpec, cotangents, scan_specs
from gallery import WRONG
from hypothesis import HealthCheck, Phase, given, settings
from right_scan import Right

from npmamba.reference import selective_scan as reference
from npmamba.testing.gradient_laws import GRADIENT_LAWS
from npmamba.testing.gradient_tools import of_maps
from npmamba.testing.law import gradient_tolerance, tolerance
from npmamba.testing.laws import LAWS, Capabilities

EXAMPLES = 200


class Find(NamedTuple):
    """What found a wrong scan, in which words, and after how many examples."""

    by: str
    words: str
    examples: int = 0


def capabilities_of(scan: Right) -> Capabilities:
    keywords = Capabilities.keywords - {"return_last_state"}
    return Capabilities(keywords=keywords, backward=scan.backward)


def one_number_of_groups(spec: ScanSpec) -> ScanSpec:
    B, C = spec.options["B"], spec.options["C"]
    same = isinstance(B, int) and isinstance(C, int)
    return replace(spec, options={**spec.options, "C": B}) if same else spec


SPECS = scan_specs(dims=(1, 2, 4, 6), lengths=(1, 2, 7, 18, 37), dstates=(1, 2, 3)).map(one_number_of_groups)


def differs_from_the_reference(scan: Right, spec: ScanSpec, dtype: Any) -> str:
    """Return which result is off, or ""."""
    case = spec.arguments(dtype)
    dout, dlast_state = cotangents(spec.seed, case["u"], spec.state_shape)
    wanted = dict(zip(("y", "last_state"), reference.forward(**case), strict=True))
    got = dict(zip(("y", "last_state"), scan.forward(**case), strict=True))
    allowed = tolerance(case)._asdict()
    gradients = reference.backward(dout, **case, dlast_state=dlast_state)._asdict()
    found = scan.backward(dout=dout, **case, dlast_state=dlast_state)
    room = of_maps(gradient_tolerance(case, dout, dlast_state), case)
    for name, x in found.items():
        got[f"d{name}"], wanted[f"d{name}"], allowed[f"d{name}"] = x, gradients[name], room[name]
    for name, x in got.items():
        if not np.all(np.abs(x - wanted[name]) <= allowed[name]):
            return name
    return ""


def violations(scan: Right, spec: ScanSpec) -> Iterator[Find]:
    """Yield what finds the scan wrong on a case: the laws in their order, then the comparison with the reference."""
    capabilities = capabilities_of(scan)
    for dtype in (np.float32, np.float64):
        case = spec.arguments(dtype)
        for number, law in enumerate((*LAWS, *GRADIENT_LAWS)):
            rng = np.random.default_rng((spec.seed, number))
            violation = law.check(scan.forward, case, rng, capabilities)
            if violation is not None:
                yield Find(law.name, str(violation))
    for dtype in (np.float32, np.float64):
        result = differs_from_the_reference(scan, spec, dtype)
        if result:
            yield Find("reference", f"{result} differs from the reference's")


class Stop(Exception):
    """Ends a search."""


def search(scan: Right, examples: int) -> Find | None:
    """Draw cases until something finds the scan wrong; return that, or None."""
    find, tried = None, 0

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(SPECS)
    def draw(spec: ScanSpec) -> None:
        nonlocal find, tried
        if find is None:  # else the case that found it is shown again
            tried += 1
            find = next(violations(scan, spec), None)
        if find is not None:
            raise Stop

    with contextlib.suppress(Stop):
        draw()
    return find and find._replace(examples=tried)


def test_the_right_scan_obeys_every_law_and_is_the_reference():
    assert search(Right(), 50) is None


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_scan_is_found(name, record_property):
    find = search(WRONG[name](), EXAMPLES)
    assert find is not None, f"nothing finds this scan wrong: {WRONG[name].__doc__}"
    record_property("found by", find.by)
    record_property("examples", find.examples)


def test_the_gallery_is_large_and_says_what_is_wrong():
    assert len(WRONG) >= 25
    assert all(wrong.__doc__ for wrong in WRONG.values())


if __name__ == "__main__":  # the table of who was found by what
    for name in WRONG:
        find = search(WRONG[name](), EXAMPLES)
        by, examples = (find.by.replace("_", " "), find.examples) if find else ("nothing", EXAMPLES)
        print(f"| {name} | {by} | {examples} |")  # noqa: T201
