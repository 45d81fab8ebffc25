"""The laws of the convolution's gradients: it is linear but for its activation, and the backward is the transpose."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.testing.conv_laws import conv_law
from npmamba.testing.conv_tools import (
    Arrays,
    Conv,
    backwards,
    compare_gradients,
    join,
    linear,
    piece,
    rows,
    state_shape,
    steps,
    two_rows,
    two_steps,
    with_bias,
    with_state,
)
from npmamba.testing.gradient_tools import dot, elsewhere, longer
from npmamba.testing.law import Law
from npmamba.testing.law_tools import copied, gradients_of_their_own, negative, normal, some_edges, wide
from npmamba.testing.tolerance import conv_gradient_tolerance, conv_scale

DIFFERENCE = 1e-3  # step of the differences, as a part of each array's values


def cotangents(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> tuple[Any, Any]:
    """Draw dout and, if the convolution returns a last state, dlast_state."""
    dlast = normal(rng, arguments["weight"], state_shape(arguments)) if conv.can("last_state") else None
    return normal(rng, arguments["x"]), dlast


@conv_law("backward")
def gradients_have_the_shape_of_their_arguments(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """A gradient has the shape and the dtype of its argument, in an array of its own, whatever lies where in memory;
    the arguments stay as they are; and no dlast_state is one of zeros."""
    case = with_state(conv, with_bias(conv, arguments, rng), rng)
    case = copied(case)
    dout, dlast = cotangents(conv, case, rng)
    gradients = gradients_of_their_own(conv, case, dout, dlast)
    if conv.can("strides"):
        laid = {name: elsewhere(x, rng) for name, x in case.items()}
        compare_gradients(conv, conv.gradients(laid, negative(dout), dlast), gradients, case, dout, dlast, gradients)
    if dlast is not None:
        zeros, none = conv.gradients(case, dout, np.zeros_like(dlast)), conv.gradients(case, dout)
        compare_gradients(conv, none, zeros, case, dout, dlast, gradients)


@conv_law("backward")
def the_backward_is_the_transpose(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Without activation, y and the last state are linear in (x, initial state) and y is linear in (weight, bias):
    <dout, J w> = <J^T dout, w> for every w."""
    case = with_state(conv, with_bias(conv, linear(arguments), rng), rng)
    dout, dlast = cotangents(conv, case, rng)
    for among in (("x", "initial_state"), ("weight", "bias")):
        bare = {**case, "bias": None} if "x" in among else case
        names = [name for name in among if bare.get(name) is not None]
        w = {name: normal(rng, bare[name]) for name in names}
        gradients, out = conv.gradients(bare, dout, dlast), conv({**bare, **w})
        forward = dot(dout, out.y) + (dot(dlast, out.last_state) if "x" in names else 0.0)
        allowed = conv_gradient_tolerance(dout, bare, dlast)._asdict()
        room = sum(dot(allowed[n].of(np.abs(wide(gradients[n]))), np.abs(wide(w[n]))) for n in names)
        short = dot(np.abs(wide(dout)), np.abs(wide(out.y))) * float(_eps(bare["x"]))  # y is rounded too
        backward = sum(dot(gradients[n], w[n]) for n in names)
        conv.close(f"<gradient, w> for {' and '.join(names)}", backward, forward, 8 * (room + short), {**bare, **w})


@conv_law("backward", "float64")
def a_gradient_foretells_every_small_change(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """L(x + e w) - L(x) = e <gradient, w> + O(e^2) for every direction w, by a difference of fourth order in float64,
    with all arguments moving at once."""
    case = with_state(conv, with_bias(conv, {n: longer(x) for n, x in arguments.items()}, rng), rng)
    dout, dlast = cotangents(conv, case, rng)
    gradients = conv.gradients(case, dout, dlast)
    w = {n: normal(rng, x) / (1 + np.abs(x).max()) for n in gradients for x in (case[n],) if x.size}
    moved = {**case, **{name: np.abs(case[name]) + np.abs(w[name]) for name in w}}
    step, values = DIFFERENCE / (1 + float(conv_scale(moved).max())), []  # the activation's argument moves by less
    for e in (1, -1, 2, -2):
        out = conv({**case, **{name: case[name] + e * step * w[name] for name in w}})
        values.append((dout * out.y).sum() + (0 if dlast is None else (dlast * out.last_state).sum()))
    along = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
    terms = dot(np.abs(dout), np.abs(out.y)) + dot(*(None if x is None else np.abs(x) for x in (dlast, out.last_state)))
    sizes = conv_gradient_tolerance(np.abs(dout), _absolute(case), None if dlast is None else np.abs(dlast))._asdict()
    scale = sum(dot(sizes[n].absolute, np.abs(w[n])) for n in w) / (4 * np.finfo(np.float64).eps)
    room = 1e-8 * scale + 64 * np.finfo(np.float64).eps * (terms + scale) / step
    conv.close("<gradient, w>", sum(dot(gradients[n], w[n]) for n in w), along, room, case)


@conv_law("backward")
def gradients_are_linear_in_their_cotangents(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """The backward is a matrix times (dout, dlast): that of p + q is that of p plus that of q."""
    (p, p_last), (q, q_last) = cotangents(conv, arguments, rng), cotangents(conv, arguments, rng)
    both, last = p + q, None if p_last is None else p_last + q_last
    one, two = conv.gradients(arguments, p, p_last), conv.gradients(arguments, q, q_last)
    size = np.abs(p) + np.abs(q), None if last is None else np.abs(p_last) + np.abs(q_last)
    expected = {name: wide(one[name]) + wide(two[name]) for name in one}
    got = conv.gradients(arguments, both, last)
    allowed = conv_gradient_tolerance(size[0], _absolute(arguments), size[1])._asdict()
    for name in expected:
        # dout is rounded where p + q is: by eps of the short type, of all terms
        terms = allowed[name].absolute / float(np.finfo(np.float64 if p.dtype == np.float64 else np.float32).eps)
        most = np.maximum(np.abs(wide(one[name])), np.abs(wide(two[name])))
        room = 4 * allowed[name].of(np.maximum(most, np.abs(expected[name]))) + float(_eps(p)) * terms
        conv.close(f"the gradient of {name}", got[name], expected[name], room, arguments)


@conv_law("backward", only=two_steps)
def what_comes_later_has_no_gradient_from_before(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Causality, transposed: y of past steps does not depend on later x, so the gradients of those are the same
    whatever dout was before, NaN among it."""
    dout, dlast = cotangents(conv, arguments, rng)
    seqlen = arguments["x"].shape[2]
    now = int(rng.integers(1, seqlen))
    other = dout.copy()
    other[..., piece(arguments, 0, now)] = np.nan if conv.can("nonfinite") else 3
    future = piece(arguments, now, seqlen)
    got, expected = (conv.gradients(arguments, d, dlast)["x"][..., future] for d in (other, dout))
    allowed = conv_gradient_tolerance(dout, arguments, dlast).x
    room = allowed._replace(absolute=allowed.absolute[..., future]).of(np.abs(wide(expected)))
    conv.same("the gradient of x", got, expected, 2 * room, arguments)


@conv_law("backward", "initial_state", "last_state", only=two_steps)
def gradients_are_handed_back_through_the_state(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """The gradient by the initial state of a part is the dlast_state of the part before; gradients of x are then those
    of the whole, and gradients of weight and bias are the sums over the parts."""
    case = {**with_state(conv, with_bias(conv, arguments, rng), rng), "seq_idx": None}
    (dout, dlast), seqlen = cotangents(conv, case, rng), case["x"].shape[2]
    edges, states = some_edges(rng, seqlen), [case["initial_state"]]
    places = [piece(case, i, j) for i, j in zip(edges[:-1], edges[1:], strict=True)]
    for place in places[:-1]:
        states.append(conv(steps(case, place, initial_state=states[-1])).last_state)
    found, dstate = [], dlast
    for place, state in reversed(list(zip(places, states, strict=True))):
        found.append(conv.gradients(steps(case, place, initial_state=state), dout[..., place], dstate))
        dstate = found[-1]["initial_state"]
    expected: Arrays = {name: sum(wide(f[name]) for f in found) for name in ("weight", "bias") if name in found[0]}
    expected |= {"x": join([f["x"] for f in reversed(found)], case), "initial_state": dstate}
    compare_gradients(conv, conv.gradients(case, dout, dlast), expected, case, dout, dlast, times=8)


@conv_law("backward", only=two_rows)
def rows_of_a_batch_add_up_in_the_gradients_of_weights(
    conv: Conv, arguments: Arrays, rng: np.random.Generator
) -> None:
    """Rows share weight and bias, whose gradients are sums over the rows; all else belongs to one row."""
    case = with_state(conv, with_bias(conv, arguments, rng), rng)
    (dout, dlast), found = cotangents(conv, case, rng), []
    for b in range(case["x"].shape[0]):
        row = np.s_[b : b + 1]
        found.append(conv.gradients(rows(case, row), dout[row], None if dlast is None else dlast[row]))
    own = ("x", "initial_state")
    expected = {
        name: np.concatenate([f[name] for f in found]) if name in own else sum(wide(f[name]) for f in found)
        for name in found[0]
    }
    compare_gradients(conv, conv.gradients(case, dout, dlast), expected, case, dout, dlast, bits=own)


@conv_law("backward", "reverse")
def the_backward_of_reverse_is_a_flip_before_and_after(
    conv: Conv, arguments: Arrays, rng: np.random.Generator
) -> None:
    """A flip of time is its own transpose: flip x, seq_idx and dout, run the backward, flip the gradient of x."""
    case = with_state(conv, arguments, rng)
    dout, dlast = cotangents(conv, case, rng)
    flipped = conv.gradients(backwards(case), dout[..., ::-1], dlast)
    expected = {**flipped, "x": flipped["x"][..., ::-1]}
    compare_gradients(conv, conv.gradients(case, dout, dlast), expected, case, dout, dlast, ("x", "initial_state"))


@conv_law("backward", "seq_idx", only=two_steps)
def no_gradient_crosses_from_one_packed_sequence_to_another(
    conv: Conv, arguments: Arrays, rng: np.random.Generator
) -> None:
    """Of sequences packed into one row, each has the gradients that it has alone; padding has none."""
    case = rows(with_state(conv, arguments, rng), np.s_[:1])
    (dout, dlast), seqlen = cotangents(conv, case, rng), arguments["x"].shape[2]
    edges = some_edges(rng, seqlen)
    numbers = np.repeat(np.arange(len(edges) - 1), np.diff(edges)).astype(np.int32)
    packed = {**case, "seq_idx": numbers[:: -1 if case.get("reverse") else 1][None]}
    got, found, state = conv.gradients(packed, dout, dlast), [], case.get("initial_state")
    for i, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        place = piece(case, first, end)
        part = steps(case, place, initial_state=state, seq_idx=None)
        found.append(conv.gradients(part, dout[..., place], dlast if i == len(edges) - 2 else None))
        state = None
    expected = {"x": join([f["x"] for f in found], case), "weight": sum(wide(f["weight"]) for f in found)}
    if "initial_state" in got:
        expected["initial_state"] = found[0]["initial_state"]
    compare_gradients(conv, got, expected, packed, dout, dlast, ("x", "initial_state"), times=8)


def _absolute(case: Arrays) -> Arrays:
    return {n: np.abs(x) if isinstance(x, np.ndarray) and n != "seq_idx" else x for n, x in case.items()}


def _eps(x: Any) -> float:
    return float(2.0**-7 if x.dtype.itemsize == 2 and x.dtype != np.float16 else np.finfo(x.dtype).eps)


CONV_GRADIENT_LAWS: tuple[Law, ...] = tuple(x for x in list(globals().values()) if isinstance(x, Law))
