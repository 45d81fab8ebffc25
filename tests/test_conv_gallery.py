"""Every wrong convolution and step of the gallery is found, every law finds one of them, and the right ones pass."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conv_gallery import WRONG_CONVS, WRONG_STEPS, RightConv, RightStep

import npmamba
from npmamba import testing
from npmamba.testing.cases import ConvCase, ConvOptions
from npmamba.testing.conv_gradient_laws import CONV_GRADIENT_LAWS
from npmamba.testing.conv_laws import CONV_LAWS
from npmamba.testing.conv_tools import Conv
from npmamba.testing.step_laws import STEP_LAWS, as_scan, scan_case
from npmamba.testing.strategies import conv_cases, update_cases
from npmamba.testing.verdict import Counterexample, check_conv1d, check_state_update

SMALL: dict[str, Any] = {"seed": 0, "max_size": 300, "magnitudes": ("tame",)}
LAWS = (*CONV_LAWS, *CONV_GRADIENT_LAWS)


def check_this_conv(conv: RightConv, examples: int) -> testing.Report:
    return check_conv1d(
        conv.forward, backward=conv.backward, step=conv.step, nonfinite=True, max_examples=examples, **SMALL
    )


def test_the_right_ones_pass():
    assert set(check_this_conv(RightConv(), 40).held) == {law.name for law in LAWS}
    assert len(check_state_update(RightStep(), max_examples=40, **SMALL).held) > 20


@pytest.mark.parametrize("name", WRONG_CONVS)
def test_a_wrong_convolution_is_found(name):
    with pytest.raises(Counterexample):
        check_this_conv(WRONG_CONVS[name](), 200)


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_wrong_step_is_found(name):
    with pytest.raises(Counterexample):
        check_state_update(WRONG_STEPS[name](), max_examples=200, **SMALL)


def breaks(law: Any, candidate: Any, cases: list[Any]) -> bool:
    """Tell whether a candidate, with what it can be asked, breaks a law on some case; no oracle is asked."""
    fn, capabilities = candidate
    return any(law.check(fn, case, np.random.default_rng(i), capabilities) for i, case in enumerate(cases))


def unmatched(wrong: dict[str, type], laws: Any, cases: list[Any], asked: Any) -> tuple[list[str], list[str]]:
    """Return the wrong candidates that break no law, and the laws that no wrong candidate breaks."""
    known = {name: asked(kind()) for name, kind in wrong.items()}
    finders = {name: next((law for law in laws if breaks(law, one, cases)), None) for name, one in known.items()}
    others = [law for law in laws if law not in finders.values()]
    useless = [law.name for law in others if not any(breaks(law, one, cases) for one in known.values())]
    return [name for name, law in finders.items() if law is None], useless


def drawn(strategy: Any, count: int) -> list[Any]:
    from hypothesis import HealthCheck, Phase, given, settings

    cases: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def draw(case: Any) -> None:
        cases.append(case)

    draw()
    return cases


def test_every_law_finds_a_wrong_convolution_and_laws_alone_find_each():
    cases = [c.arguments(np.float32) for c in drawn(conv_cases(max_size=200, magnitudes=("tame",)), 40)]

    def asked(conv: RightConv) -> Any:
        return conv.forward, Conv.read_off(conv.forward, backward=conv.backward, step=conv.step)

    assert unmatched(WRONG_CONVS, LAWS, cases, asked) == ([], [])


def test_laws_alone_find_each_wrong_step():
    drawings = drawn(update_cases(max_size=60, magnitudes=("tame",)), 25)
    cases = [scan_case(case).arguments(np.float32) for case in drawings]
    found, useless = unmatched(WRONG_STEPS, STEP_LAWS, cases, as_scan)
    assert not found
    assert len(useless) <= len(STEP_LAWS) // 2  # what these say is of sequences; wrong scans break them


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_types_obey_every_law_and_a_wrong_activation_is_seen_in_them(dtype):
    conv, backward, step = npmamba.causal_conv1d, npmamba.causal_conv1d_backward, npmamba.causal_conv1d_update
    case = ConvCase(2, 3, 9, 4, ConvOptions(bias=True, activation="silu", initial_state=True)).arguments(dtype)
    known = Conv.read_off(conv, backward=backward, step=step)
    for i, law in enumerate(LAWS):
        assert law.check(conv, case, np.random.default_rng(i), known) is None, law.name

    def sigmoid(x, weight, bias=None, *, activation=None):
        q = conv(x, weight, bias).astype(np.float32)
        return (1 / (1 + np.exp(-q)) if activation else q).astype(x.dtype)

    silu = next(law for law in CONV_LAWS if law.name == "the_activation_is_silu_of_the_rest")
    case = {**case, "initial_state": None}
    assert silu.check(sigmoid, case, np.random.default_rng(0), Conv.read_off(sigmoid)) is not None


def test_a_convolution_without_options_is_not_asked_for_them():
    def bare(x, weight):
        return npmamba.causal_conv1d(x, weight)

    report = check_conv1d(bare, max_examples=20, **SMALL)
    assert report.skipped["the convolution has no bias"] > 0
    assert len(report.held) > 5
    law, case = CONV_LAWS[0], ConvCase(1, 2, 5, 3, ConvOptions(bias=True)).arguments(np.float32)
    assert law.why_skipped(case, Conv.read_off(bare)) == "the case has bias, which the convolution does not take"
    case["bias"] = None
    assert law.why_skipped(case, Conv.read_off(bare)) == ""


def test_a_step_of_another_shape_is_told():
    def first_channel(state, x, dt, A, B, C):
        return npmamba.selective_state_update(state, x, dt, A, B, C)[:, :1]

    with pytest.raises(Counterexample, match=r"y has shape \(1, 1\), not \(1, 2\)"):
        check_state_update(first_channel, max_examples=40, **SMALL)


def test_the_gallery_is_large_and_says_what_is_wrong():
    assert len(WRONG_CONVS) >= 25
    assert len(WRONG_STEPS) >= 10
    assert all(kind.__doc__ for kind in (*WRONG_CONVS.values(), *WRONG_STEPS.values()))


def test_what_is_public():
    assert testing.check_conv1d is check_conv1d
    assert testing.check_vjp.__module__.endswith("autodiff.check")
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match="no attribute 'check_all'"):
        _ = testing.check_all
    one = np.ones((1, 2, 4))
    testing.check_vjp(lambda x, w: npmamba.causal_conv1d(x, w, activation="silu"), one, one[0, :, :3])
