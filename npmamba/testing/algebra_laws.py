"""Laws of one moment: what a call may touch, what adds up, and who may not notice whom."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.testing.law import Results, Scan, law, tolerance
from npmamba.testing.law_tools import (
    any_step,
    combined,
    compare,
    copied,
    drawn,
    gate_of,
    laid_out,
    normal,
    not_float64,
    results_of_their_own,
    starts_of,
    two_channels,
    two_rows,
    two_states,
    wide,
)
from npmamba.testing.parts import channels, rows, states, with_map_per_channel


@law(only=any_step)
def a_call_leaves_its_arguments_as_they_are(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """A scan is a function: it changes none of its arguments, its results are arrays of their own, of the dtypes of u
    (y) and A (the last state), and the same call has the same result again."""
    arguments = drawn(scan, arguments, rng, "D", "z", "initial_state")
    arguments = copied(arguments)
    first, kept = results_of_their_own(scan, arguments, ("u", "A"))
    compare(scan, scan(arguments), kept, arguments, bits=True)
    compare(scan, first, kept, arguments, bits=True)


@law("strides", only=any_step)
def memory_order_does_not_matter(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """An array is its shape and its values. Where they lie in memory (in which order, with which strides, whether one
    may write there) changes nothing."""
    laid, plain = laid_out(arguments, rng)
    compare(scan, scan(laid), scan(plain), laid, bits=True)


@law("D", only=any_step)
def the_direct_path_adds_D_u(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """D is a path beside the states: y = y(D = 0) + D u before the gate, so after it y = y(D = 0) + D u silu(z), and
    the state does not notice."""
    arguments = drawn(scan, arguments, rng, "D")
    without = scan({**arguments, "D": None})
    direct = wide(arguments["D"])[:, None] * wide(arguments["u"]) * gate_of(arguments)
    direct = np.where(starts_of(arguments)[0][:, None], direct, 0)
    compare(scan, scan(arguments), Results(wide(without.y) + direct, without.last_state), arguments)


@law("z", only=any_step)
def the_gate_is_the_last_factor(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """y with z is y without z, D u included, times silu(z) = z / (1 + exp(-z)), and the state does not notice."""
    arguments = drawn(scan, arguments, rng, "z", "D")
    without = scan({**arguments, "z": None})
    compare(scan, scan(arguments), Results(wide(without.y) * gate_of(arguments), without.last_state), arguments)


@law(only=two_states)
def states_add_up(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """The states of a channel never meet but in the sum over n: a scan of some states plus one of the others, without
    D and gate, is the scan of all."""
    arguments = {**arguments, "D": None, "z": None}
    order = rng.permutation(arguments["A"].shape[1])
    count = int(rng.integers(1, len(order)))
    one, two = (scan(states(arguments, part)) for part in (order[:count], order[count:]))
    last = None if one.last_state is None else np.concatenate([one.last_state, two.last_state], axis=2)
    expected = Results(wide(one.y) + wide(two.y), None if last is None else last[..., np.argsort(order)])
    compare(scan, scan(arguments), expected, arguments)


@law(only=two_states)
def the_order_of_states_does_not_matter(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """If A, B, C and the initial state are permuted along their states, the last state is permuted likewise, and y is
    the same: a sum does not know the order of its terms."""
    order = rng.permutation(arguments["A"].shape[1])
    whole, allowed = scan(arguments), tolerance(arguments)
    last = None if whole.last_state is None else whole.last_state[..., order]
    permuted = states(arguments, order)
    allowed = Results(allowed.y, allowed.last_state[..., order])
    compare(scan, scan(permuted), Results(whole.y, last), permuted, allowed=allowed)


@law(only=two_rows)
def a_batch_row_is_a_scan_of_its_own(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Rows of a batch share parameters and nothing else: a row alone gives what it gives among others."""
    b = int(rng.integers(arguments["u"].shape[0]))
    row, whole = rows(arguments, np.s_[b : b + 1]), scan(arguments)
    compare(scan, scan(row), Results(*(None if x is None else x[b : b + 1] for x in whole)), row, bits=True)


@law(only=two_channels)
def a_channel_does_not_notice_the_others(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Channels meet nowhere: y of one is the same whatever u, delta, A, z and initial state the others have, NaN among
    them, and whatever B and C the groups have that it is no part of."""
    arguments = drawn(scan, arguments, rng, "initial_state")
    dim = arguments["u"].shape[1]
    d = int(rng.integers(dim))
    changed = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    for name in ("u", "delta", "z", "initial_state", "A", "D", "delta_bias", "B", "C"):
        x = changed.get(name)
        if x is None or (name in "BC" and x.ndim == 3):
            continue
        axis = 0 if name in ("A", "D", "delta_bias") or x.ndim == 2 else 1
        others = np.arange(x.shape[axis]) != d // (dim // x.shape[axis])
        of_others = (slice(None),) * axis + (others,)
        x[of_others] = np.nan if scan.can("nonfinite") else x[of_others] * rng.uniform(0.5, 2)
    got, clean, allowed = scan(changed), scan(arguments), tolerance(arguments)
    one = Results(*(None if x is None else x[:, d] for x in got))
    expected = Results(*(None if x is None else x[:, d] for x in clean))
    allowed = Results(*(x[:, d] for x in allowed))
    compare(scan, one, expected, changed, allowed=allowed, bits=True)


@law(only=two_channels)
def channels_can_be_chosen(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Some of the channels, in any order, each with the B and C of its group, give what they give among all."""
    dim = arguments["u"].shape[1]
    index = rng.permutation(dim)[: int(rng.integers(1, dim + 1))]
    some, whole = channels(arguments, index), scan(arguments)
    compare(scan, scan(some), Results(*(None if x is None else x[:, index] for x in whole)), some)


@law("groups", only=any_step)
def a_shared_map_is_a_map_of_every_channel(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """A constant B (dim, dstate) is one that varies with time and does not change; a B without groups belongs to all
    channels; with groups, channel d reads group d // (dim / groups), so neighbours share one. The same for C."""
    compare(scan, scan(arguments), scan(with_map_per_channel(arguments)), arguments)


@law(only=any_step)
def linear_in_input_and_initial_state(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """All else fixed, (u, h_0) -> (y, h_L) is a linear map: h_t = a_t h_{t-1} + f_t B_t u_t is linear in both, y_t in
    h_t and u_t. So scan(2 p - 3 q) = 2 scan(p) - 3 scan(q)."""
    one = drawn(scan, arguments, rng, "initial_state")
    names = [name for name in ("u", "initial_state") if one.get(name) is not None]
    two = {**one, **{name: normal(rng, one[name]) for name in names}}
    both = {**one, **{name: 2 * one[name] - 3 * two[name] for name in names}}
    size = {**one, **{name: np.abs(2 * one[name]) + np.abs(3 * two[name]) for name in names}}
    compare(scan, scan(both), combined(scan(one), scan(two), 2, -3), both, allowed=tolerance(size))


@law("nonfinite", only=any_step)
def not_a_number_is_not_hidden(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """A NaN in u makes NaN of all that depends on it, which is y of its row and channel from its step on and the last
    state, and of nothing else."""
    arguments = {**arguments, "seq_idx": None}
    b, d, t = (int(rng.integers(n)) for n in arguments["u"].shape)
    poisoned = {**arguments, "u": arguments["u"].copy()}
    poisoned["u"][b, d, t] = np.nan
    clean, allowed = scan(arguments), tolerance(arguments)
    expected = Results(*(None if x is None else x.copy() for x in clean))
    expected.y[b, d, np.s_[: t + 1] if arguments.get("reverse") else np.s_[t:]] = np.nan
    if expected.last_state is not None:
        expected.last_state[b, d] = np.nan
    compare(scan, scan(poisoned), expected, poisoned, allowed=allowed)


@law("float64", only=not_float64)
def a_short_type_is_the_long_one_rounded(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """The same numbers given as float64 differ in y by rounding alone: by some eps of the type times the size of the
    terms that y adds up, however much of them cancels."""
    long = {name: wide(x) if getattr(x, "dtype", None) is not None and x.dtype.kind not in "iu" else x
            for name, x in arguments.items()}  # fmt: skip
    compare(scan, scan(arguments), scan(long), arguments)
