"""Laws of time: the past alone acts on the future, and through the state alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.testing.capabilities import is_given
from npmamba.testing.law import Results, Scan, Unsuited, law, tolerance
from npmamba.testing.law_tools import (
    after,
    any_step,
    before,
    compare,
    decaying_in_two_steps,
    drawn,
    in_pieces,
    joined,
    some_edges,
    starts_of,
    two_steps,
)
from npmamba.testing.parts import TIMED, backwards, is_timed, rows, step_size, steps, with_map_per_channel, with_step


@law(only=two_steps)
def the_future_does_not_reach_the_past(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Causality: y_t depends on steps up to t alone. What comes later may be any number, another sequence, or NaN."""
    seqlen = arguments["u"].shape[2]
    now = int(rng.integers(1, seqlen))
    past, future = before(arguments, now), after(arguments, now)
    clean, changed, poisoned = scan(arguments), dict(arguments), dict(arguments)
    for name in filter(lambda name: is_timed(arguments, name), TIMED):
        changed[name], poisoned[name] = arguments[name].copy(), arguments[name].copy()
        changed[name][..., future] = rng.permutation(changed[name][..., future], axis=-1)
        changed[name][..., future] *= rng.uniform(0.5, 2)
        poisoned[name][..., future] = np.nan
    if arguments.get("seq_idx") is not None:
        changed["seq_idx"] = arguments["seq_idx"].copy()
        changed["seq_idx"][:, future] = rng.integers(-1, 3, arguments["seq_idx"][:, future].shape)
    for other in (changed, poisoned) if scan.can("nonfinite") else (changed,):
        allowed = tolerance(arguments).y[..., past]
        scan.same("y before the change", scan(other).y[..., past], clean.y[..., past], allowed, other)


@law(only=two_steps)
def a_beginning_is_a_scan(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """The first k outputs are those of a scan that ends after k steps: what is not there yet cannot matter, nor how
    much of it there will be."""
    first = before(arguments, int(rng.integers(1, arguments["u"].shape[2])))
    beginning = steps(arguments, first)
    allowed = tolerance(beginning).y
    scan.same("y", scan(beginning).y, scan(arguments).y[..., first], allowed, beginning)


@law("initial_state", "last_state", only=two_steps)
def a_scan_is_the_scan_of_its_parts(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Markov property: all that the past means to the future is the state. Cut time anywhere, hand the last state of
    each part to the next as initial state (a zero one where a new packed sequence begins), and join the outputs."""
    pieces = in_pieces(arguments, some_edges(rng, arguments["u"].shape[2]))
    valid, start = starts_of(arguments)
    state, results = arguments.get("initial_state"), []
    for piece in pieces:
        if state is not None:
            in_order = np.s_[:, ::-1] if arguments.get("reverse") else np.s_[:, :]
            counts, begins = valid[:, piece][in_order], start[:, piece][in_order]
            fresh = np.take_along_axis(begins, counts.argmax(1)[:, None], 1)[:, 0] & counts.any(1)
            state = np.where(fresh[:, None, None], np.zeros_like(state), state)
        results.append(scan(steps(arguments, piece, initial_state=state)))
        state = results[-1].last_state
    compare(scan, joined(results, arguments), scan(arguments), arguments, bits=True)


@law(only=any_step)
def time_can_be_shifted(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Time invariance: steps before the first with u = 0, whatever their delta, B and C, leave an empty state empty.
    They give y = 0, and all that follows is what it was."""
    count, arguments = int(rng.integers(1, 5)), {**arguments, "initial_state": None}
    seqlen, reverse = arguments["u"].shape[2], arguments.get("reverse")
    more, old = rng.integers(0, seqlen, count), np.arange(seqlen)
    longer = steps(arguments, np.concatenate([old, more] if reverse else [more, old]))
    new, rest = before(longer, count), after(longer, count)
    longer["u"] = longer["u"].copy()
    longer["u"][..., new] = 0
    if arguments.get("seq_idx") is not None:
        longer["seq_idx"] = longer["seq_idx"].copy()
        longer["seq_idx"][:, new] = arguments["seq_idx"][:, before(arguments, 1)]
    got, allowed = scan(longer), tolerance(arguments)
    scan.close("y of the steps with u = 0", got.y[..., new], 0.0, np.finfo(np.float32).tiny, longer)
    compare(scan, Results(got.y[..., rest], got.last_state), scan(arguments), longer, allowed=allowed)


@law("reverse", only=any_step)
def reverse_is_a_flip_before_and_after(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """`reverse` flips time in u, delta, z, seq_idx and in the B and C that have time, scans, and flips y. The initial
    state enters at the end of time, and the last state is the one at its beginning."""
    arguments = {**arguments, "reverse": True}
    flipped = scan(backwards(arguments))
    compare(scan, scan(arguments), Results(flipped.y[..., ::-1], flipped.last_state), arguments, bits=True)


_STEP_NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus"}


def _one_step(arguments: dict[str, Any], t: int) -> dict[str, Any]:
    """Return what a step takes at time `t`, by its names; what is at its default is left out."""
    left_out = ("initial_state", "seq_idx", "reverse")
    asked = {name: x for name, x in arguments.items() if is_given(arguments, name) and name not in left_out}
    return {_STEP_NAMES.get(n, n): x[..., t] if is_timed(arguments, n) else x for n, x in asked.items()}


@law("step", only=any_step)
def a_scan_is_its_steps(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """One step after the other, with a state that is changed in place, is the scan: what generation does token by
    token is what training did at once."""
    arguments = drawn(scan, {**arguments, "seq_idx": None}, rng, "initial_state")
    if any(not is_timed(arguments, name) for name in "BC"):
        arguments = with_map_per_channel(arguments)
    batch, dim, seqlen = arguments["u"].shape
    state = arguments.get("initial_state")
    state = np.zeros((batch, *arguments["A"].shape), arguments["A"].dtype) if state is None else state.copy()
    y = np.empty_like(arguments["u"])
    for t in range(seqlen)[:: -1 if arguments.get("reverse") else 1]:
        y[..., t] = scan.step({"state": state, **_one_step(arguments, t)}, arguments)
    compare(scan, Results(y, state), scan(arguments), arguments, bits=True)


@law("seq_idx", only=two_steps)
def packed_sequences_are_sequences_of_their_own(
    scan: Scan, arguments: dict[str, Any], rng: np.random.Generator
) -> None:
    """Sequences packed into one row, told apart by `seq_idx`, give what each gives alone. The initial state enters the
    first, the last state is that of the last; a number may come again later and then names another sequence."""
    arguments = drawn(scan, arguments, rng, "initial_state")
    batch, _, seqlen = arguments["u"].shape
    numbers = np.empty((batch, seqlen), np.int32)
    edges = [some_edges(rng, seqlen) for _ in range(batch)]
    for row, ends in zip(numbers, edges, strict=True):
        names = np.cumsum(rng.integers(1, 3, len(ends) - 1)) % 3
        row[:] = np.repeat(names, np.diff(ends))
    packed, b = {**arguments, "seq_idx": numbers}, int(rng.integers(batch))
    alone, results = rows(arguments, np.s_[b : b + 1], seq_idx=None), []
    for piece in in_pieces(alone, edges[b]):
        results.append(scan(steps(alone, piece)))
        alone["initial_state"] = None
    got = Results(*(None if x is None else x[b : b + 1] for x in scan(packed)))
    allowed = Results(*(x[b : b + 1] for x in tolerance(packed)))
    compare(scan, got, joined(results, packed), packed, allowed=allowed, bits=True)


@law("seq_idx", only=any_step)
def padding_is_as_if_absent(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """A step whose `seq_idx` is negative gives y = 0 and leaves the state as it is, whatever stands there; steps
    before and after it are neighbours."""
    batch, _, seqlen = arguments["u"].shape
    numbers = np.cumsum(rng.random((batch, seqlen)) < 0.2, axis=1) % 3
    numbers[rng.random((batch, seqlen)) < rng.choice([0.3, 0.8])] = -1 - rng.integers(3)
    padded, b = {**arguments, "seq_idx": numbers.astype(np.int32)}, int(rng.integers(batch))
    row, kept = rows(padded, np.s_[b : b + 1]), numbers[b] >= 0
    for name in filter(lambda name: is_timed(row, name), TIMED):
        padded[name] = np.array(padded[name])
        padded[name][b, ..., ~kept] = np.nan if scan.can("nonfinite") else 1e6
    allowed = Results(*(x[b : b + 1] for x in tolerance({**arguments, "seq_idx": padded["seq_idx"]})))
    got = Results(*(None if x is None else x[b : b + 1] for x in scan(padded)))
    scan.close("y of padding", got.y[..., ~kept], 0.0, 1e-300, padded)
    if kept.any():
        expected = Results(np.zeros_like(got.y), None)
        without = scan(steps(row, kept))
        expected.y[..., kept] = without.y
        compare(scan, got, Results(expected.y, without.last_state), padded, allowed=allowed, bits=True)
    elif got.last_state is not None:
        start = row.get("initial_state")
        compare(scan, got, Results(got.y, np.zeros_like(got.last_state) if start is None else start), padded, bits=True,
                allowed=allowed)  # fmt: skip


@law(only=any_step)
def a_step_of_no_length_keeps_the_state(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Delta = 0 means that no time passes: a = exp(0) = 1 and no inflow, by either rule and at any rate, so the other
    steps are as if such a step were absent. With nothing but such steps, the last state is the initial one."""
    arguments = {**drawn(scan, with_step(arguments, step_size(arguments)), rng, "initial_state"), "seq_idx": None}
    A = arguments["A"].copy()
    if scan.can("nonfinite") and rng.random() < 0.3:
        A[rng.integers(A.shape[0]), rng.integers(A.shape[1])] = -np.inf
    seqlen, moving = arguments["u"].shape[2], arguments["u"].shape[2] > 1 and np.isfinite(A).all()
    still = rng.random(seqlen) < (0.5 if moving else 1.0)
    still[rng.integers(seqlen)] = not still.all() or not moving
    arguments = {**arguments, "delta": arguments["delta"].copy()}
    arguments["delta"][..., still] = 0
    allowed = tolerance(arguments)
    got = scan({**arguments, "A": A})
    if not still.all():
        without = scan(steps(arguments, ~still))
        rest = Results(allowed.y[..., ~still], allowed.last_state)
        compare(scan, Results(got.y[..., ~still], got.last_state), without, arguments, allowed=rest)
    elif got.last_state is not None and arguments.get("initial_state") is not None:
        start = arguments["initial_state"]
        scan.same("last_state", got.last_state, start, allowed.last_state, {**arguments, "A": A})


@law(only=decaying_in_two_steps)
def a_long_step_forgets(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """exp(Delta A) is 0 once Delta |A| is large enough, so that after such a step, with no input at it, a scan is one
    that starts with an empty state. (Schemes that divide by a product of decays divide by that 0.)"""
    arguments = {**with_step(arguments, step_size(arguments)), "seq_idx": None}
    count = int(rng.integers(1, arguments["u"].shape[2]))
    long = arguments["u"].shape[2] - count if arguments.get("reverse") else count - 1
    forgetful = {**arguments, **{name: arguments[name].copy() for name in ("u", "delta")}}
    forgetful["delta"][..., long] = 800 / np.abs(arguments["A"]).min()
    if not np.isfinite(forgetful["delta"]).all():
        raise Unsuited("the case has a rate for which no step is long")
    forgetful["u"][..., long] = 0
    rest, got = after(arguments, count), scan(forgetful)
    fresh = steps(arguments, rest, initial_state=None)
    compare(scan, Results(got.y[..., rest], got.last_state), scan(fresh), forgetful, allowed=tolerance(fresh))
