"""Laws of growth and decay: what a state may become, and what the two input rules have to do with each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import discretize, exponent
from npmamba.testing.law import Broken, Results, Scan, law, tolerance
from npmamba.testing.law_tools import (
    amplification,
    any_step,
    compare,
    decaying,
    drawn,
    gate_of,
    long_decaying_steps,
    long_steps,
    normal,
    starts_of,
    wide,
)
from npmamba.testing.parts import map_per_channel, step_size, steps, with_step
from npmamba.testing.scales import scan_scale


@law(only=long_steps)
def units_of_time_do_not_matter(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Measured in units of 1/s, steps are s Delta, rates A / s and input maps B / s. Decays exp(Delta A) and inflows
    f B u stay, by either rule, and so do y and the state. (With s a power of two nothing is rounded.)"""
    s = 2.0 ** float(rng.choice([-3, -1, 2, 5]))
    arguments = with_step(arguments, step_size(arguments))
    scaled = {"delta": arguments["delta"] * s, **{name: arguments[name] / s for name in "AB"}}
    scaled = {name: x.astype(arguments[name].dtype) for name, x in scaled.items()}
    compare(scan, scan({**arguments, **scaled}), scan(arguments), {**arguments, **scaled})


@law("delta_softplus", only=long_steps)
def the_step_is_the_softplus_of_delta_plus_bias(
    scan: Scan, arguments: dict[str, Any], rng: np.random.Generator
) -> None:
    """Delta = log(1 + exp(delta + delta_bias)): about exp(x) for x far below 0 and x itself far above, and a scan
    given that as its delta, without bias and softplus, is the same. (The naive formula is 0 at -20 in float32, and
    inf at 90.)"""
    arguments = drawn(scan, {**arguments, "delta_softplus": True}, rng, "delta_bias")
    low, high = [(-3, 3), (-20, -8), (-5, 150)][rng.integers(3)]
    delta = rng.uniform(low, high, arguments["delta"].shape).astype(arguments["u"].dtype)
    arguments = {**arguments, "delta": delta}
    if scan.can("delta_bias"):
        arguments["delta_bias"] = normal(rng, arguments["delta_bias"])
    plain = with_step(arguments, step_size(arguments))
    compare(scan, scan(arguments), scan(plain), arguments, amplified=amplification(arguments))


def _sums(arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the sum of Delta up to every step, the number of its sequence, and which steps count."""
    flip = np.s_[..., ::-1] if arguments.get("reverse") else np.s_[...]
    valid, start = starts_of(arguments)
    run = np.cumsum(start[flip], axis=-1)[flip]
    Delta = np.where(valid[:, None], step_size(arguments), 0)
    passed = np.cumsum(Delta[flip], axis=-1, dtype=np.longdouble)[flip].astype(np.float64)
    return passed, run, valid


@law("initial_state", only=decaying)
def a_free_state_decays_by_the_time_passed(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Without input, h_t = exp(A (Delta_1 + ... + Delta_t)) h_0 while the first sequence lasts, and y_t = C_t h_t
    silu(z): in t steps or in one, the time that passed is all that matters."""
    arguments = {**drawn(scan, arguments, rng, "initial_state"), "u": np.zeros_like(arguments["u"])}
    passed, run, valid = _sums(arguments)
    alive = (run == 0) & valid
    h = np.exp(passed[:, :, None] * wide(arguments["A"])[..., None]) * wide(arguments["initial_state"])[..., None]
    y = np.where(alive[:, None], (map_per_channel(arguments, "C") * h).sum(2), 0) * gate_of(arguments)
    end = 0 if arguments.get("reverse") else -1
    last = np.where((run[:, end] == 0)[:, None, None], h[..., end], 0)
    compare(scan, scan(arguments), Results(y, last), arguments, amplified=amplification(arguments))


@law(only=decaying)
def an_impulse_leaves_a_decaying_trace(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """With u = 0 but at step s, and no initial state, h_t = exp(A (Delta_{s+1} + ... + Delta_t)) f_s B_s u_s from s
    on, while its sequence lasts: the impulse response. Every scan is a sum of these, by linearity."""
    batch, dim, seqlen = arguments["u"].shape
    passed, run, valid = _sums(arguments)
    s, u = int(rng.integers(seqlen)), np.zeros_like(arguments["u"])
    u[..., s] = normal(rng, u, (batch, dim))
    arguments = {**arguments, "u": u, "initial_state": None}
    B, C, A = map_per_channel(arguments, "B"), map_per_channel(arguments, "C"), wide(arguments["A"])
    rule = arguments.get("discretization", "euler")
    _, _, f = discretize(step_size(arguments)[..., None, s], A, rule)
    inflow = f * wide(B[..., s]) * wide(u[..., s])[..., None]
    later = np.arange(seqlen) <= s if arguments.get("reverse") else np.arange(seqlen) >= s
    reached = later & (run == run[:, [s]]) & valid & valid[:, [s]]
    since = np.where(reached[:, None], passed - passed[..., [s]], 0)[:, :, None]
    h = np.where(reached[:, None, None], np.exp(since * A[..., None]) * inflow[..., None], 0)
    direct = 0 if arguments.get("D") is None else wide(arguments["D"])[:, None] * np.where(valid[:, None], wide(u), 0)
    end = 0 if arguments.get("reverse") else -1
    same_run = (run[:, end] == run[:, s]) & valid[:, s]
    rest = np.exp((passed[..., end] - passed[..., s])[..., None] * A) * inflow
    expected = Results(((wide(C) * h).sum(2) + direct) * gate_of(arguments), np.where(same_run[:, None, None], rest, 0))
    compare(scan, scan(arguments), expected, arguments, amplified=amplification(arguments))


@law(only=any_step)
def without_decay_a_scan_is_a_cumulative_sum(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """With A = 0, a = 1, and f = Delta by either rule, for (exp(x) - 1) / x is 1 at 0: h_t = h_0 + sum of Delta B
    u."""
    arguments = {**arguments, "A": np.zeros_like(arguments["A"]), "seq_idx": None}
    flip = np.s_[..., ::-1] if arguments.get("reverse") else np.s_[...]
    inflow = step_size(arguments)[:, :, None] * map_per_channel(arguments, "B") * wide(arguments["u"])[:, :, None]
    start = arguments.get("initial_state")
    h = np.cumsum(inflow[flip], axis=-1)[flip] + (0 if start is None else wide(start)[..., None])
    direct = 0 if arguments.get("D") is None else wide(arguments["D"])[:, None] * wide(arguments["u"])
    y = ((map_per_channel(arguments, "C") * h).sum(2) + direct) * gate_of(arguments)
    compare(scan, scan(arguments), Results(y, h[flip][..., -1]), arguments)


@law("last_state", "zoh", only=decaying)
def the_exact_rule_keeps_states_between_their_bounds(
    scan: Scan, arguments: dict[str, Any], rng: np.random.Generator
) -> None:
    """By zoh a step is an average, h_t = a h_{t-1} + (1 - a) (B u / -A) with a between 0 and 1, so no state ever
    leaves the range of its start and of the values -B u / A at which it would come to rest."""
    arguments = {**drawn(scan, arguments, rng, "initial_state"), "discretization": "zoh", "seq_idx": None}
    rest = map_per_channel(arguments, "B") * wide(arguments["u"])[:, :, None] / -wide(arguments["A"])[..., None]
    start = arguments.get("initial_state")
    start = np.zeros(rest.shape[:3]) if start is None else wide(start)
    low, high = np.minimum(rest.min(-1), start), np.maximum(rest.max(-1), start)
    last = scan(arguments).last_state
    scan.close("last_state", last, np.clip(last, low, high), 4 * tolerance(arguments).last_state, arguments)


@law("last_state", "initial_state", only=long_decaying_steps)
def a_free_state_never_grows(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Without input and with A < 0, 0 <= a <= 1: the longer the wait, the nearer to 0, and never across it."""
    arguments = {**drawn(scan, arguments, rng, "initial_state"), "u": np.zeros_like(arguments["u"]), "seq_idx": None}
    start = arguments["initial_state"]
    last = scan(arguments).last_state
    kept = np.where(start == 0, 0, last / np.where(start == 0, 1, start))
    if not np.all((kept >= 0) & (kept <= 1 + 1e-3)):
        raise Broken("last_state is no part of the initial one", start, last, np.inf, arguments)
    slower = scan(with_step(arguments, step_size(arguments) / 2)).last_state
    if not np.all(np.abs(last) <= np.abs(slower) * (1 + 1e-3) + 1e-30):
        raise Broken("last_state is larger after twice the time", slower, last, np.inf, arguments)


def _refined(arguments: dict[str, Any], shares: Any) -> dict[str, Any]:
    """Cut every step into parts of it, through which u, B, C and z are held."""
    count = len(shares)
    index = np.repeat(np.arange(arguments["u"].shape[2]), count)
    Delta = step_size(arguments)[..., index] * np.tile(shares, arguments["u"].shape[2])
    return with_step(steps(arguments, index), Delta)


def _ends(arguments: dict[str, Any], count: int) -> Any:
    """Return the slice of the steps that end a step of the coarse scan."""
    return np.s_[..., ::count] if arguments.get("reverse") else np.s_[..., count - 1 :: count]


@law("zoh", only=long_steps)
def a_held_step_can_be_cut(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Zero-order hold is exact for an input that is constant over the step, so a step and its parts, one after the
    other with the same u, B and C, lead to the same state: the semigroup law."""
    arguments = steps({**with_step(arguments, step_size(arguments)), "discretization": "zoh"}, np.s_[:40])
    count = int(rng.integers(2, 4))
    fine = _refined(arguments, rng.dirichlet(np.full(count, 2.0)))
    got = scan(fine)
    compare(scan, Results(got.y[_ends(arguments, count)], got.last_state), scan(arguments), arguments, amplified=2)


@law("zoh", "euler", only=long_decaying_steps)
def euler_converges_to_the_exact_rule(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator) -> None:
    """Cut every step into m: the inflow that euler then sums up is that of zoh times r(v) = v / (exp(v) - 1) with v =
    Delta A / m, and r(v) = 1 - v/2 + v^2/12 - ...: first order. So |y_m - y_zoh| <= (|v|/2 + v^2/12) E with E the
    scan on absolute values; and as the error halves with the step, 2 y_2m - y_m is off by v^2/24 E at most."""
    m = int(rng.choice([1, 2, 4]))
    arguments = steps(with_step(arguments, step_size(arguments)), np.s_[:12])
    held, euler = {**arguments, "discretization": "zoh"}, {**arguments, "discretization": "euler"}
    one, two = _refined(euler, np.full(m, 1 / m)), _refined(euler, np.full(2 * m, 0.5 / m))
    exact, y_one, y_two = scan(held).y, scan(one).y[_ends(euler, m)], scan(two).y[_ends(euler, 2 * m)]
    v = float(np.max(np.abs(exponent(step_size(arguments)[:, :, None], arguments["A"][..., None])), initial=0)) / m
    E, allowed = scan_scale(held)[0], 4 * tolerance(euler).y
    scan.close("euler - zoh", y_one, exact, (v / 2 + v * v / 12) * E + allowed, one)
    scan.close("2 euler of half the step - euler", 2 * wide(y_two) - y_one, exact, v * v / 24 * E + allowed, two)
