"""The laws hold for the scans of this package, to the last bit where that is promised, and every law can be broken."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import scan_case, scan_specs
from gallery import WRONG
from hypothesis import given, settings
from test_gallery import SPECS, capabilities_of, one_number_of_groups

from npmamba import selective_scan, selective_scan_backward, selective_state_update
from npmamba.reference import selective_scan as reference
from npmamba.testing import parts
from npmamba.testing.cases import ScanCase, ScanOptions
from npmamba.testing.gradient_laws import GRADIENT_LAWS
from npmamba.testing.gradient_tools import of_maps
from npmamba.testing.law import Broken, Law, law, tolerance
from npmamba.testing.laws import LAWS, Capabilities
from npmamba.testing.scales import gradient_scale, scan_scale

EVERY = {q.name: q for q in (*LAWS, *GRADIENT_LAWS)}
OURS = Capabilities.of(selective_scan, same_bits=True, backward=selective_scan_backward, step=selective_state_update)
REFERENCE = Capabilities.of(reference.forward, backward=reference.backward)
SMALL = scan_specs(dims=(1, 2, 6, 20), lengths=(1, 2, 7, 70), dstates=(1, 2, 3, 16), max_elements=20_000)


def plain(seqlen: int = 7, *, dtype: Any = np.float64, **options: Any) -> dict[str, Any]:
    return scan_case(np.random.default_rng(0), 2, 4, seqlen, 3, dtype=dtype, **options)


# --- the laws hold ---


def obeys_every_law(fn: Any, spec: Any, dtype: Any, capabilities: Capabilities) -> None:
    case = spec.arguments(dtype)
    for number, one in enumerate(EVERY.values()):
        violation = one.check(fn, case, np.random.default_rng((spec.seed, number)), capabilities)
        assert violation is None, f"{violation}\n{spec}"


@settings(max_examples=25)
@given(SMALL.map(one_number_of_groups))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_our_scan_obeys_every_law(dtype, spec):
    obeys_every_law(selective_scan, spec, dtype, OURS)


@settings(max_examples=10)
@given(SPECS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_our_scan_obeys_every_law_in_short_types(dtype, spec):
    obeys_every_law(selective_scan, spec, dtype, OURS)


@settings(max_examples=10)
@given(SPECS)
def test_the_reference_obeys_every_law(spec):
    obeys_every_law(reference.forward, spec, np.float64, REFERENCE)


@pytest.mark.parametrize("number", range(4))
def test_a_gradient_is_not_blamed_for_what_a_difference_cuts_off(number):
    """States grow a millionfold along some directions here: the change of L is no polynomial of fourth order."""
    options = ScanOptions(C=1, delta_softplus=True, initial_state=True)
    case = ScanCase(batch=2, dim=3, seqlen=1024, dstate=3, options=options, magnitude="wide", seed=1606)
    law = EVERY["a_gradient_foretells_every_small_change"]
    rng = np.random.default_rng((1606, number))
    assert law.check(selective_scan, case.arguments(np.float64), rng, OURS) is None


# --- the laws can be broken ---

BREAKERS = {
    "a_call_leaves_its_arguments_as_they_are": "State of the caller",
    "memory_order_does_not_matter": "Unwritten order",
    "the_direct_path_adds_D_u": "Gate before D",
    "the_gate_is_the_last_factor": "Sigmoid gate",
    "states_add_up": "Odd state lost",
    "the_order_of_states_does_not_matter": "Odd state lost",
    "a_batch_row_is_a_scan_of_its_own": "State of the row before",
    "a_channel_does_not_notice_the_others": "Rates of one channel",
    "channels_can_be_chosen": "Groups by modulo",
    "a_shared_map_is_a_map_of_every_channel": "Swapped constant maps",
    "linear_in_input_and_initial_state": "Half precision state",
    "not_a_number_is_not_hidden": "Swallowed NaN",
    "a_short_type_is_the_long_one_rounded": "Naive expm1",
    "the_future_does_not_reach_the_past": "One map not reversed",
    "a_beginning_is_a_scan": "Lost tail",
    "a_scan_is_the_scan_of_its_parts": "Lost carry",
    "time_can_be_shifted": "Lost carry",
    "reverse_is_a_flip_before_and_after": "Sequences not reversed",
    "packed_sequences_are_sequences_of_their_own": "State not reset",
    "padding_is_as_if_absent": "Padding as neighbour",
    "a_step_of_no_length_keeps_the_state": "Clamped step",
    "a_long_step_forgets": "Cumulative sum trick",
    "units_of_time_do_not_matter": "Clamped step",
    "the_step_is_the_softplus_of_delta_plus_bias": "Naive softplus",
    "a_free_state_decays_by_the_time_passed": "Tustin",
    "an_impulse_leaves_a_decaying_trace": "Decayed inflow",
    "without_decay_a_scan_is_a_cumulative_sum": "Division by rate",
    "the_exact_rule_keeps_states_between_their_bounds": "Initial state of one row",
    "a_free_state_never_grows": "Initial state of one row",
    "a_held_step_can_be_cut": "Euler for zoh",
    "euler_converges_to_the_exact_rule": "Euler for zoh",
    "gradients_have_the_shape_of_their_arguments": "Cotangent gated in place",
    "gradients_are_linear_in_their_cotangents": "Gradient across sequences",
    "the_backward_is_the_transpose_of_the_scan": "Decay of the wrong step",
    "a_gradient_foretells_every_small_change": "Rate gradient without weight",
    "short_gradients_are_the_long_ones_rounded": "Naive softplus",
    "gradients_are_smooth_where_a_rate_is_zero": "Noisy phi slope",
    "what_comes_later_has_no_gradient_from_before": "Step gradient not reversed",
    "gradients_are_handed_back_through_the_state": "Lost carry back",
    "rows_of_a_batch_add_up_in_the_gradients_of_parameters": "Rate gradient of one row",
    "the_backward_of_reverse_is_a_flip_before_and_after": "Step gradient not reversed",
    "no_gradient_crosses_from_one_packed_sequence_to_another": "Gradient across sequences",
    "a_shared_map_has_the_sum_of_its_channels_gradients": "Map gradient of one channel",
    "the_step_has_the_slope_of_softplus": "Slope without bias",
    "the_gate_passes_gradients_on": "Sigmoid for silu slope",
    "the_direct_path_has_gradients_of_its_own": "No direct gradient",
    "units_of_time_have_no_gradient": "Rate gradient of the logarithm",
}


FLAGS = ("D", "z", "delta_bias", "delta_softplus", "initial_state", "reverse")


def wrong_step(state: Any, x: Any, *others: Any, **options: Any) -> Any:
    """Forget to write the new state back."""
    return selective_state_update(state.copy(), x, *others, **options)


def breaks(one: Law, fn: Any, capabilities: Capabilities) -> bool:
    """Tell whether a law is broken on one of a few cases that have everything."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {name: bool(rng.integers(2)) for name in FLAGS}
        options |= {"seq_idx": [None, "padded"][rng.integers(2)], "discretization": ["euler", "zoh"][rng.integers(2)]}
        options |= [{}, {"B": 2, "C": 2}, {"B": "constant", "C": "constant"}][rng.integers(3)]
        case = scan_case(rng, 2, 4, 34, 3, dtype=[np.float32, np.float64][rng.integers(2)], **options)
        if one.check(fn, case, rng, capabilities):
            return True
    return False


@pytest.mark.parametrize("name", EVERY)
def test_every_law_is_broken_by_a_scan_that_is_wrong_in_its_way(name):
    if name == "a_scan_is_its_steps":
        assert breaks(EVERY[name], selective_scan, Capabilities.of(selective_scan, step=wrong_step))
    else:
        wrong = WRONG[BREAKERS[name]]()
        assert breaks(EVERY[name], wrong.forward, capabilities_of(wrong))


def test_every_law_says_its_theorem():
    assert len(EVERY) == len(LAWS) + len(GRADIENT_LAWS) == 1 + len(BREAKERS)
    assert all(len(q.statement) > 80 for q in EVERY.values())


def test_a_violation_says_what_and_where_and_can_be_seen_again():
    wrong = WRONG["Gate before D"]()
    case = plain(z=True, D=True)
    violation = EVERY["the_gate_is_the_last_factor"].check(
        wrong.forward, case, np.random.default_rng(1), capabilities_of(wrong)
    )
    assert violation is not None
    assert str(violation).startswith("the gate is the last factor: y is off, ")
    np.testing.assert_array_equal(wrong.forward(**violation.arguments)[0], violation.got)
    place = violation.where
    assert f"got {violation.got[place]:.9g} at {place}, expected {violation.expected[place]:.9g}" in str(violation)
    assert violation.error > 1e6


def test_other_bits_are_a_violation_where_bits_are_promised_and_only_there():
    def rounded(**arguments):
        y, last_state = selective_scan(**arguments, return_last_state=True)
        return y * (1 + 2e-16 * (y.shape[0] == 1)), last_state

    row, case = EVERY["a_batch_row_is_a_scan_of_its_own"], plain()
    keywords = OURS.keywords - {"return_last_state"}
    assert row.check(rounded, case, np.random.default_rng(0), Capabilities(keywords=keywords)) is None
    violation = row.check(rounded, case, np.random.default_rng(0), Capabilities(keywords=keywords, same_bits=True))
    assert violation is not None
    assert "other bits" in str(violation)
    assert violation.error < 1


def test_an_error_of_the_scan_is_a_violation_and_what_it_does_not_implement_is_not():
    def failing(**arguments):
        raise ZeroDivisionError("no steps left")

    def partial(**arguments):
        raise NotImplementedError("zoh")

    beginning = EVERY["a_beginning_is_a_scan"]
    violation = beginning.check(failing, plain(), np.random.default_rng(0), OURS)
    assert violation is not None
    assert "raised ZeroDivisionError: no steps left" in str(violation)
    with pytest.raises(NotImplementedError):
        beginning.check(partial, plain(), np.random.default_rng(0), OURS)


def test_a_result_of_another_shape_or_dtype_is_a_violation():
    call = EVERY["a_call_leaves_its_arguments_as_they_are"]
    changes = {"shape (2, 4, 6)": lambda y: y[..., :-1], "dtype float32": lambda y: y.astype(np.float32)}
    for words, change in changes.items():
        fn = lambda change=change, **arguments: change(selective_scan(**arguments))  # noqa: E731
        violation = call.check(fn, plain(), np.random.default_rng(0), Capabilities.of(fn, last_state=False))
        assert words in str(violation)


def test_a_result_in_the_memory_of_an_argument_is_a_violation():
    call = EVERY["a_call_leaves_its_arguments_as_they_are"]
    fn = lambda u, delta, A, B, C: u  # noqa: E731
    violation = call.check(fn, plain(), np.random.default_rng(0), Capabilities.of(fn, last_state=False))
    assert "a result lies in the memory of u" in str(violation)


def test_a_state_that_grows_while_it_waits_is_a_violation():
    def filling(u, delta, A, B, C, initial_state=None, *, return_last_state=True):
        y, last = selective_scan(u, delta, A, B, C, initial_state=initial_state, return_last_state=True)
        return y, (0 if initial_state is None else initial_state) - last

    never_grows = EVERY["a_free_state_never_grows"]
    violation = never_grows.check(filling, plain(), np.random.default_rng(0), Capabilities.of(filling))
    assert "last_state is larger after twice the time" in str(violation)


def test_a_slope_that_no_gradient_alone_gets_wrong_is_told_of_them_all():
    """A kink where u and B move together; along either of them the scan is as smooth as its gradient says."""
    case = plain()

    def kinked(u, delta, A, B, C, **options):
        y, last = selective_scan(u, delta, A, B, C, **options)
        moved = [float((x - x0).flat[0]) for x, x0 in ((u, case["u"]), (B, case["B"]))]
        return y + np.sign(moved[0]) * np.sqrt(np.abs(np.prod(moved))), last

    known = Capabilities.of(selective_scan, backward=selective_scan_backward)
    foretells = EVERY["a_gradient_foretells_every_small_change"]
    violation = foretells.check(kinked, case, np.random.default_rng(0), known)
    assert "<gradient, w> for all arguments is off" in str(violation)
    bent = lambda u, **rest: selective_scan(u - 1e-3 * u**2, **rest)  # noqa: E731
    assert "<gradient, w> for u is off" in str(foretells.check(bent, case, np.random.default_rng(0), known))


# --- what is not asked ---


def test_what_a_scan_cannot_be_asked_is_skipped_and_said():
    def bare(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C)

    capabilities = Capabilities.of(bare, last_state=False)
    assert capabilities.keywords == frozenset()
    case, rng, checked = plain(), np.random.default_rng(0), 0
    for one in EVERY.values():
        outcome = one.examine(bare, case, rng, capabilities)
        assert outcome.violation is None
        checked += not outcome.skipped
    assert checked >= 12
    skipped = {name: one.why_skipped(case, capabilities) for name, one in EVERY.items()}
    assert skipped["the_gate_is_the_last_factor"] == "the scan has no z"
    assert skipped["a_held_step_can_be_cut"] == "the scan has no zoh"
    assert skipped["a_scan_is_the_scan_of_its_parts"] == "the scan has no initial_state"
    assert skipped["units_of_time_have_no_gradient"] == "the scan has no backward"
    shift = EVERY["time_can_be_shifted"]
    assert shift.why_skipped(plain(z=True), capabilities) == "the case has z, which the scan does not take"
    assert shift.why_skipped(plain(discretization="zoh"), capabilities) == (
        "the case has zoh, which the scan does not know"
    )
    assert EVERY["a_beginning_is_a_scan"].why_skipped(plain(1), OURS) == "the case has fewer than two steps"
    lost = {**plain(), "u": np.full((2, 4, 7), np.nan)}
    assert EVERY["a_beginning_is_a_scan"].why_skipped(lost, OURS) == "the case has a u that is not finite"
    large = {**plain(), "u": np.full((2, 4, 7), 1e308)}
    outcome = EVERY["a_beginning_is_a_scan"].examine(selective_scan, large, np.random.default_rng(0), OURS)
    assert outcome.skipped == "the case has results that are no numbers in float64, or too large"
    assert EVERY["a_short_type_is_the_long_one_rounded"].why_skipped(plain(), OURS)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("gradients_are_smooth_where_a_rate_is_zero", {"delta": np.full((2, 4, 7), 3.0), "discretization": "zoh"},
         "the case has so long steps that no rate is small"),
        ("a_long_step_forgets", {"A": np.full((4, 3), -1e-306)}, "the case has a rate for which no step is long"),
    ],
)  # fmt: skip
def test_a_case_that_does_not_suit_a_law_is_skipped_and_said(name, changes, why):
    outcome = EVERY[name].examine(selective_scan, plain() | changes, np.random.default_rng(0), OURS)
    assert (outcome.violation, outcome.skipped) == (None, why)


@pytest.mark.parametrize("sizes", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)])
def test_laws_say_nothing_about_empty_arrays(sizes):
    case = scan_case(np.random.default_rng(0), *sizes)
    assert all(one.why_skipped(case, OURS) for one in EVERY.values())


def test_a_scan_by_the_exact_rule_alone_need_not_say_so():
    def exact(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, discretization="zoh")

    capabilities, case = Capabilities.of(exact, rules=("zoh",), last_state=False), plain(discretization="zoh")
    for name in ("a_held_step_can_be_cut", "an_impulse_leaves_a_decaying_trace"):
        assert EVERY[name].examine(exact, case, np.random.default_rng(0), capabilities)[:2] == (None, "")


def test_the_worst_error_is_told_of_a_law_that_holds():
    linear, rng = EVERY["linear_in_input_and_initial_state"], np.random.default_rng(0)
    outcome = linear.examine(selective_scan, plain(70), rng, OURS)
    assert outcome.violation is None
    assert 0 < outcome.worst < 0.5


def test_a_law_of_ones_own_takes_three_lines():
    @law()
    def zero_in_zero_out(scan, arguments, rng):
        """Nothing comes of nothing."""
        silent = {**arguments, "u": np.zeros_like(arguments["u"]), "initial_state": None}
        scan.close("y", scan(silent).y, 0.0, tolerance(silent).y, silent)

    assert zero_in_zero_out.statement == "Nothing comes of nothing."
    assert zero_in_zero_out.check(selective_scan, plain(z=True), np.random.default_rng(0)) is None
    assert zero_in_zero_out.check(lambda u, **others: u + 1, plain(), np.random.default_rng(0)) is not None
    assert issubclass(Broken, Exception)


# --- scales and parts ---


@settings(max_examples=15)
@given(SPECS)
def test_scales_are_the_results_where_nothing_cancels_and_bound_them_elsewhere(spec):
    case, rng = spec.arguments(), np.random.default_rng(spec.seed)
    names = ("u", "B", "C", "D", "z", "initial_state")
    dout, dlast = rng.standard_normal(case["u"].shape), rng.standard_normal(spec.state_shape)
    positive = {**case, **{name: np.abs(case[name]) for name in names if case[name] is not None}}
    scale = scan_scale(positive)
    for got, wanted in zip(scale, reference.forward(**positive), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
    bounds = of_maps(gradient_scale(positive, np.abs(dout), np.abs(dlast)), case)
    gradients = reference.backward(np.abs(dout), **positive, dlast_state=np.abs(dlast))._asdict()
    for name in ("u", "B", "C", "D", "initial_state"):
        if gradients[name] is not None:
            np.testing.assert_allclose(bounds[name], gradients[name], rtol=1e-12, atol=1e-300)
    bounds = of_maps(gradient_scale(case, dout, dlast), case)
    gradients = reference.backward(dout, **case, dlast_state=dlast)._asdict()
    for name, gradient in gradients.items():
        if gradient is not None:
            assert np.all(np.abs(gradient) <= bounds[name] * (1 + 1e-12)), name


def test_a_part_of_channels_keeps_the_group_of_each():
    case = plain(B=2, C=2)
    part = parts.channels(case, [3, 0])
    np.testing.assert_array_equal(part["B"], case["B"][:, [1, 0]])
    np.testing.assert_array_equal(part["A"], case["A"][[3, 0]])
    np.testing.assert_array_equal(parts.map_per_channel(case, "C"), np.repeat(case["C"], 2, axis=1))
