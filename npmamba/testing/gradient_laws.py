"""The laws of the scan's gradients: what follows from being the transpose of a derivative, and from the scan's own
laws.

For given cotangents, dout of y and dlast of the last state, the backward returns the gradients of the number
``L = <dout, y> + <dlast, h_L>`` by every argument, where <p, q> is the sum of all products.
"""

from __future__ import annotations

import numpy as np

from npmamba.reference.functions import sigmoid, silu, silu_derivative
from npmamba.testing.gradient_tools import (
    Arrays,
    compare,
    cotangents,
    dot,
    elsewhere,
    longer,
    of_maps,
    summed_map,
    timed,
)
from npmamba.testing.law import Broken, Law, Scan, Unsuited, gradient_tolerance, law, tolerance
from npmamba.testing.law_tools import (
    after,
    amplification,
    any_step,
    before,
    copied,
    drawn,
    gradients_of_their_own,
    in_pieces,
    long_steps,
    negative,
    normal,
    not_float64,
    some_edges,
    two_rows,
    two_steps,
    wide,
)
from npmamba.testing.parts import (
    backwards,
    is_timed,
    raw_step,
    rows,
    step_size,
    steps,
    with_map_per_channel,
    with_step,
)
from npmamba.testing.scales import gradient_scale

DIFFERENCE = 1e-4  # step of the differences, as a part of each array's values; shorter where decays are fast


@law("backward", only=any_step)
def gradients_have_the_shape_of_their_arguments(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """A gradient has the shape and the dtype of its argument, in an array of its own, whatever lies where in memory;
    the arguments stay as they are; and no dlast_state is one of zeros."""
    arguments = drawn(scan, arguments, rng, "D", "z", "delta_bias", "initial_state")
    arguments = copied(arguments)
    dout, dlast = cotangents(scan, arguments, rng)
    gradients = gradients_of_their_own(scan, arguments, dout, dlast)
    allowed, zeros = of_maps(gradient_tolerance(arguments, dout, dlast), arguments), None
    if scan.can("strides"):
        laid = {name: elsewhere(x, rng) for name, x in arguments.items()}
        compare(scan, scan.gradients(laid, negative(dout), dlast), gradients, allowed, laid, bits=gradients)
    if dlast is not None:
        zeros = scan.gradients(arguments, dout, np.zeros_like(dlast))
        compare(scan, scan.gradients(arguments, dout), zeros, allowed, arguments, bits=gradients)


@law("backward", only=two_steps)
def what_comes_later_has_no_gradient_from_before(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """Causality, transposed: L's terms of past steps do not depend on later u, delta, z, B and C, so gradients of
    those are the same whatever dout was before, NaN among them."""
    now, (dout, dlast) = int(rng.integers(1, arguments["u"].shape[2])), cotangents(scan, arguments, rng)
    past, future = before(arguments, now), after(arguments, now)
    other = dout.copy()
    other[..., past] = np.nan if scan.can("nonfinite") else 3 * dout[..., past]
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    got, expected = scan.gradients(arguments, other, dlast), scan.gradients(arguments, dout, dlast)
    got, expected, allowed = ({n: x[n][..., future] for n in timed(arguments)} for x in (got, expected, allowed))
    compare(scan, got, expected, allowed, arguments, bits=expected)


@law("backward", "initial_state", "last_state", only=two_steps)
def gradients_are_handed_back_through_the_state(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """The chain rule across a cut in time: the gradient by the initial state of a part is the dlast_state of the part
    before it. Gradients of steps are then those of the whole, and gradients of parameters are the sums over the
    parts."""
    arguments = {**drawn(scan, arguments, rng, "initial_state"), "seq_idx": None}
    dout, dlast = cotangents(scan, arguments, rng)
    pieces = in_pieces(arguments, some_edges(rng, arguments["u"].shape[2]))
    states = [arguments["initial_state"]]
    for piece in pieces[:-1]:
        states.append(scan(steps(arguments, piece, initial_state=states[-1])).last_state)
    found, dstate = {}, dlast
    for i, piece in reversed(list(enumerate(pieces))):
        found[i] = scan.gradients(steps(arguments, piece, initial_state=states[i]), dout[..., piece], dstate)
        dstate = found[i]["initial_state"]
    whole, of_steps = scan.gradients(arguments, dout, dlast), timed(arguments)
    in_time = sorted(found, reverse=bool(arguments.get("reverse")))
    parts = {name: np.concatenate([found[i][name] for i in in_time], axis=-1) for name in of_steps}
    sums = {name: sum(wide(found[i][name]) for i in found) for name in whole if name not in of_steps}
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    bits = (*of_steps, "initial_state")
    compare(scan, whole, {**sums, **parts, "initial_state": dstate}, allowed, arguments, bits=bits)


@law("backward", only=two_rows)
def rows_of_a_batch_add_up_in_the_gradients_of_parameters(
    scan: Scan, arguments: Arrays, rng: np.random.Generator
) -> None:
    """Rows share A, D, delta_bias and constant maps: their gradients are sums over the rows. All else belongs to one
    row."""
    arguments = drawn(scan, arguments, rng, "D", "delta_bias", "initial_state")
    dout, dlast = cotangents(scan, arguments, rng)
    found = []
    for b in range(arguments["u"].shape[0]):
        row = np.s_[b : b + 1]
        found.append(scan.gradients(rows(arguments, row), dout[row], None if dlast is None else dlast[row]))
    whole, own = scan.gradients(arguments, dout, dlast), [*timed(arguments), "initial_state"]
    expected = {n: np.concatenate([f[n] for f in found]) if n in own else sum(wide(f[n]) for f in found) for n in whole}
    compare(scan, whole, expected, of_maps(gradient_tolerance(arguments, dout, dlast), arguments), arguments, bits=own)


@law("backward", "reverse", only=any_step)
def the_backward_of_reverse_is_a_flip_before_and_after(
    scan: Scan, arguments: Arrays, rng: np.random.Generator
) -> None:
    """A flip of time is its own transpose: flip all that has time, dout too, run the backward, flip its results."""
    arguments = {**arguments, "reverse": True}
    dout, dlast = cotangents(scan, arguments, rng)
    flipped, flip = scan.gradients(backwards(arguments), dout[..., ::-1], dlast), timed(arguments)
    expected = {name: x[..., ::-1] if name in flip else x for name, x in flipped.items()}
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    compare(scan, scan.gradients(arguments, dout, dlast), expected, allowed, arguments, bits=[*flip, "initial_state"])


@law("backward", "seq_idx", only=two_steps)
def no_gradient_crosses_from_one_packed_sequence_to_another(
    scan: Scan, arguments: Arrays, rng: np.random.Generator
) -> None:
    """Of sequences packed into one row, each has the gradients that it has alone; dlast_state enters the last, the
    gradient of the initial state leaves the first; padding has none, whatever stands there."""
    arguments = rows(drawn(scan, arguments, rng, "initial_state", "z", "D"), np.s_[:1], seq_idx=None)
    dout, dlast = cotangents(scan, arguments, rng)
    seqlen = arguments["u"].shape[2]
    kept = rng.random(seqlen) < rng.choice([0.7, 1.0])
    kept[rng.integers(seqlen)] = True
    count, short = int(kept.sum()), steps(arguments, kept)
    edges = some_edges(rng, count) if count > 1 else [0, 1]
    numbers = np.full((1, seqlen), -1, np.int32)
    numbers[0, kept] = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    packed = {**arguments, "seq_idx": numbers}
    got, found = scan.gradients(packed, dout, dlast), []
    pieces = in_pieces(short, edges)
    for i, piece in enumerate(pieces):
        case = steps(short, piece, **({} if i == 0 else {"initial_state": None}))
        found.append(scan.gradients(case, dout[..., kept][..., piece], dlast if i == len(pieces) - 1 else None))
    expected, in_time = {}, found[:: -1 if arguments.get("reverse") else 1]
    for name in got:
        if is_timed(arguments, name):
            expected[name] = np.zeros_like(got[name])
            expected[name][..., kept] = np.concatenate([f[name] for f in in_time], axis=-1)
        else:
            expected[name] = sum(wide(f[name]) for f in found if name in f)
    own = [name for name in got if is_timed(arguments, name)]
    compare(scan, got, expected, of_maps(gradient_tolerance(packed, dout, dlast), packed), packed, bits=own)


@law("backward", "groups", only=any_step)
def a_shared_map_has_the_sum_of_its_channels_gradients(
    scan: Scan, arguments: Arrays, rng: np.random.Generator
) -> None:
    """A copy, transposed, is a sum: the gradient of a B or C that channels, rows or steps share is the sum of those
    that it would have if each had its own."""
    dout, dlast = cotangents(scan, arguments, rng)
    apart = scan.gradients(with_map_per_channel(arguments), dout, dlast)
    expected = {**apart, **{name: summed_map(wide(apart[name]), arguments[name]) for name in ("B", "C")}}
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    compare(scan, scan.gradients(arguments, dout, dlast), expected, allowed, arguments)


@law("backward", "delta_softplus", only=long_steps)
def the_step_has_the_slope_of_softplus(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """The chain rule: softplus'(x) = sigmoid(x), so ddelta = dDelta sigmoid(delta + delta_bias), where dDelta is what
    a scan without bias and softplus says that is given the step itself. The bias enters every row and step, so its
    gradient is the sum of ddelta over both."""
    arguments = drawn(scan, {**arguments, "delta_softplus": True}, rng, "delta_bias")
    dout, dlast = cotangents(scan, arguments, rng)
    plain = scan.gradients(with_step(arguments, step_size(arguments)), dout, dlast)
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    got = scan.gradients(arguments, dout, dlast)
    expected = {**plain, "delta": wide(plain["delta"]) * sigmoid(raw_step(arguments)[0])}
    if "delta_bias" in got:
        expected["delta_bias"] = wide(got["delta"]).sum((0, 2))
    allowed = {name: amplification(arguments) * x for name, x in allowed.items()}
    compare(scan, got, expected, allowed, arguments)


@law("backward", "z", "D", only=any_step)
def the_gate_passes_gradients_on(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """The product rule for y silu(z), with y the output before the gate, D u included: dz = dout y silu'(z) where
    silu'(z) = s (1 + z (1 - s)), s = sigmoid(z); all else has the gradients of a scan without gate for dout
    silu(z)."""
    arguments = drawn(scan, arguments, rng, "z", "D")
    dout, dlast = cotangents(scan, arguments, rng)
    open_gate, z = {**arguments, "z": None}, wide(arguments["z"])
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    expected = scan.gradients(open_gate, (wide(dout) * silu(z)).astype(dout.dtype), dlast)
    expected["z"] = wide(dout) * wide(scan(open_gate).y) * silu_derivative(z)
    compare(scan, scan.gradients(arguments, dout, dlast), expected, allowed, arguments)


@law("backward", "D", only=any_step)
def the_direct_path_has_gradients_of_its_own(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """D u adds D dy to the gradient of u, and dD is the sum of dy u over rows and steps, with dy = dout silu(z); the
    states do not notice."""
    arguments = drawn(scan, {**arguments, "seq_idx": None}, rng, "D")
    dout, dlast = cotangents(scan, arguments, rng)
    dy = wide(dout) * (1.0 if arguments.get("z") is None else silu(wide(arguments["z"])))
    expected = scan.gradients({**arguments, "D": None}, dout, dlast)
    expected["u"] = wide(expected["u"]) + wide(arguments["D"])[:, None] * dy
    expected["D"] = (dy * wide(arguments["u"])).sum((0, 2))
    expected.pop("z", None)
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    compare(scan, scan.gradients(arguments, dout, dlast), expected, allowed, arguments)


@law("backward", "groups", only=any_step)
def units_of_time_have_no_gradient(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """As s Delta, A / s and B / s give the same y for every s, the derivative by s is 0 at s = 1, in every channel by
    itself: sum of Delta dDelta = sum of A dA + sum of B dB. (Noether: to every symmetry an identity of the
    gradients.)"""
    arguments = with_map_per_channel(with_step(arguments, step_size(arguments)))
    dout, dlast = cotangents(scan, arguments, rng)
    gradients, allowed = scan.gradients(arguments, dout, dlast), gradient_tolerance(arguments, dout, dlast)
    axes = {"delta": (0, 2), "A": (1,), "B": (0, 2, 3)}
    terms = {n: (wide(gradients[n]) * wide(arguments[n])).sum(over) for n, over in axes.items()}
    room = sum((allowed[n] * np.abs(wide(arguments[n]))).sum(over) for n, over in axes.items())
    scan.close("sum of Delta dDelta", terms["delta"], terms["A"] + terms["B"], room, arguments)


@law("backward", "zoh", only=any_step)
def gradients_are_smooth_where_a_rate_is_zero(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """(exp(x) - 1) / x and its slope (exp(x) - phi(x)) / x are analytic at 0, with values 1 and 1/2 there, though
    neither can be computed as it stands. So gradients at a tiny A are those at A = 0, but for a part of them as small
    as A times the time that passes."""
    wide_eps = np.finfo(arguments["A"].dtype).eps
    tiny = (rng.choice([-1.0, 1.0], arguments["A"].shape) * wide_eps ** (2 / 3)).astype(arguments["A"].dtype)
    near = {**arguments, "A": tiny, "discretization": "zoh"}
    at_zero, (dout, dlast) = {**near, "A": np.zeros_like(tiny)}, cotangents(scan, arguments, rng)
    allowed, time = gradient_tolerance(near, dout, dlast), 1 + float(step_size(near).sum(-1).max())
    if time > 20:
        raise Unsuited("the case has so long steps that no rate is small")
    bend = gradient_scale({**near, "A": np.ones_like(tiny)}, dout, dlast)
    allowed = {name: allowed[name] + 4 * float(np.abs(tiny).max()) * time * bend[name] for name in allowed}
    got, expected = scan.gradients(near, dout, dlast), scan.gradients(at_zero, dout, dlast)
    compare(scan, got, expected, of_maps(allowed, near), near)


@law("backward", only=any_step)
def the_backward_is_the_transpose_of_the_scan(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """y and h_L are linear in (u, h_0), in (C, D), and in B where h_0 = 0 and D = 0. A linear map J and its transpose
    obey <dout, J w> = <J^T dout, w> for every w: no difference quotient is needed, so this holds in every dtype to
    rounding. The gradient by u does not depend on u, and so on."""
    dout, dlast = cotangents(scan, arguments, rng)
    arguments = drawn(scan, arguments, rng, "initial_state", "D")
    bare = {**arguments, "initial_state": None, "D": None}
    linear = [(arguments, ["u", "initial_state"]), (arguments, ["C", "D"]), (bare, ["B"])]
    for case, among in linear:
        names = [name for name in among if case.get(name) is not None]
        w = {**case, **{name: normal(rng, case[name]) for name in names}}
        gradients, allowed = scan.gradients(case, dout, dlast), of_maps(gradient_tolerance(case, dout, dlast), case)
        out = scan(w)
        forward = dot(dout, out.y) + (0 if "C" in names else dot(dlast, out.last_state))
        backward = sum(dot(gradients[name], w[name]) for name in names)
        room = sum(dot(allowed[name], np.abs(w[name])) for name in names)
        scan.close(f"<gradient, w> for {' and '.join(names)}", backward, forward, room, w)


@law("backward", "float64", only=not_float64)
def short_gradients_are_the_long_ones_rounded(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """The same numbers given as float64 have gradients that differ by rounding alone: by some eps of the type times
    the size of the terms that they add up. (A difference of equal numbers over a small one, as in the slope of
    (exp(x) - 1) / x near 0, is off by far more.)"""
    dout, dlast = cotangents(scan, arguments, rng)
    expected = scan.gradients({name: longer(x) for name, x in arguments.items()}, longer(dout), longer(dlast))
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    compare(scan, scan.gradients(arguments, dout, dlast), expected, allowed, arguments)


@law("backward", only=any_step)
def gradients_are_linear_in_their_cotangents(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """The backward is a matrix, the transpose of the derivative, times (dout, dlast): that of 2 p - 3 q is 2 times
    that of p minus 3 times that of q."""
    (p, p_last), (q, q_last) = cotangents(scan, arguments, rng), cotangents(scan, arguments, rng)
    both, last = 2 * p - 3 * q, None if p_last is None else 2 * p_last - 3 * q_last
    one, two = scan.gradients(arguments, p, p_last), scan.gradients(arguments, q, q_last)
    size = 2 * np.abs(p) + 3 * np.abs(q), None if last is None else 2 * np.abs(p_last) + 3 * np.abs(q_last)
    allowed = of_maps(gradient_tolerance(arguments, *size), arguments)
    expected = {name: 2 * wide(one[name]) - 3 * wide(two[name]) for name in one}
    compare(scan, scan.gradients(arguments, both, last), expected, allowed, arguments)


@law("backward", "float64", only=any_step)
def a_gradient_foretells_every_small_change(scan: Scan, arguments: Arrays, rng: np.random.Generator) -> None:
    """L(x + e w) - L(x) = e <gradient, w> + O(e^2) for every direction w. The derivative along w is taken by a
    difference of fourth order, (8 (L(e) - L(-e)) - (L(2e) - L(-2e))) / 12e, with all arguments moving at once, in
    float64. If it is off, half the e decides: that leaves a sixteenth of what the difference has cut off."""
    arguments = drawn(scan, {n: longer(x) for n, x in arguments.items()}, rng, "D", "z", "initial_state")
    dout, dlast = cotangents(scan, arguments, rng)
    gradients = scan.gradients(arguments, dout, dlast)
    allowed = of_maps(gradient_tolerance(arguments, dout, dlast), arguments)
    w = {n: normal(rng, x) * (np.abs(x) + 0.1 * np.abs(x).mean()) for n in gradients for x in (arguments[n],)}
    fastest = float(np.max(np.abs(step_size(arguments)[:, :, None] * arguments["A"][..., None])))
    step = DIFFERENCE / (1 + min(fastest, 30))
    result = tolerance(arguments)  # what L is rounded by; the moved arguments are rounded too
    rounding = dot(np.abs(dout), result.y) + dot(None if dlast is None else np.abs(dlast), result.last_state)
    rounding += sum(dot(allowed[n], np.abs(arguments[n])) for n in gradients) / 4

    def derivative(names: list[str], step: float) -> float:
        values = []
        for e in (1, -1, 2, -2):
            out = scan({**arguments, **{name: arguments[name] + e * step * w[name] for name in names}})
            values.append(dot(dout, out.y) + dot(dlast, out.last_state))
        return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)

    def check(what: str, names: list[str]) -> None:
        got, along = sum(dot(gradients[n], w[n]) for n in names), derivative(names, step)
        steady = sum(dot(allowed[name], np.abs(w[name])) for name in names) * 1e-8 / (256 * np.finfo(np.float64).eps)
        room = steady + rounding / (8 * step)
        if abs(got - along) > room:
            halved = derivative(names, step / 2)
            along, room = halved, steady + rounding / (4 * step) + abs(along - halved) / 8
        scan.close(f"<gradient, w> for {what}", got, along, room, arguments)

    try:
        check("all arguments", list(gradients))
    except Broken:
        for name in gradients:
            check(name, [name])
        raise


GRADIENT_LAWS: tuple[Law, ...] = tuple(x for x in list(globals().values()) if isinstance(x, Law))
