"""The laws of the causal convolution: theorems that follow from its equation, each with a check that asks it alone.

With the inputs before the first step in the initial state, oldest first::

    y_t = activation(bias + sum_k weight_k x_(t - (width - 1) + k))

A convolution that obeys all of them is the convolution: an impulse gives the weights, and all else follows.

>>> import npmamba
>>> case = {"x": np.ones((1, 1, 5)), "weight": np.array([[1.0, 2.0, 3.0]])}
>>> [law.name for law in CONV_LAWS if law.check(npmamba.causal_conv1d, case, np.random.default_rng(0))]
[]
>>> def wrong(x, weight):  # the weights the other way round
...     return npmamba.causal_conv1d(x, weight[:, ::-1])
>>> [law.name for law in CONV_LAWS if law.check(wrong, case, np.random.default_rng(0))]
['an_impulse_gives_the_weights']
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import silu
from npmamba.testing.conv_tools import (
    Arrays,
    Conv,
    any_step,
    backwards,
    channels,
    compare,
    join,
    linear,
    long_numbers,
    not_float64,
    piece,
    rows,
    state_shape,
    steps,
    two_channels,
    two_rows,
    two_steps,
    with_bias,
    with_state,
)
from npmamba.testing.gradient_tools import longer
from npmamba.testing.law import Law, Results, law, same_dtype
from npmamba.testing.law_tools import combined, copied, laid_out, normal, results_of_their_own, some_edges, wide


def conv_law(*needs: str, only: Any = any_step) -> Any:
    """Make a law of a convolution."""
    return law(*needs, only=only, kind=Conv)


# --- what a function is ---


@conv_law()
def a_call_leaves_its_arguments_as_they_are(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """A convolution is a function: it changes none of its arguments, its results are arrays of their own, of the dtypes
    of x (y) and weight (the last state), and the same call has the same result again."""
    arguments = with_state(conv, with_bias(conv, arguments, rng), rng)
    arguments = copied(arguments)
    _, kept = results_of_their_own(conv, arguments, ("x", "weight"))
    compare(conv, conv(arguments), kept, arguments, bits=True)


@conv_law("strides")
def memory_order_does_not_matter(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """An array is its shape and its values, wherever they lie in memory."""
    laid, plain = laid_out(arguments, rng)
    compare(conv, conv(laid), conv(plain), arguments, bits=True)


@conv_law("float64", only=not_float64)
def a_short_type_is_the_long_one_rounded(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """The same numbers given as float64 have results that differ by rounding alone."""
    expected = conv({name: longer(x) for name, x in arguments.items()})
    compare(conv, conv(arguments), expected, arguments)


# --- what is linear ---


@conv_law(only=long_numbers)
def linear_in_input_and_initial_state(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Without bias and activation, 2 (p, s) - 3 (q, r) gives 2 conv(p, s) - 3 conv(q, r), and so do the last states."""
    one = with_state(conv, {**linear(arguments), "bias": None}, rng)
    two = with_state(conv, {**one, "x": normal(rng, one["x"])}, rng)
    moved = [name for name in ("x", "initial_state") if one.get(name) is not None]
    both = {**one, **{name: 2 * one[name] - 3 * two[name] for name in moved}}
    sized = {**one, **{name: 2 * np.abs(one[name]) + 3 * np.abs(two[name]) for name in moved}}
    sized["weight"] = np.abs(one["weight"])
    expected = combined(conv(one), conv(two), 2, -3)
    room = 8 * float(np.finfo(one["x"].dtype).eps)
    got, size = conv(both), conv(sized)
    for what, x, y, most in zip(("y", "last_state"), got, expected, size, strict=True):
        if x is not None:
            conv.close(what, x, y, room * (1 + one["weight"].shape[1]) * np.abs(wide(most)) + 1e-30, both)


@conv_law(only=long_numbers)
def linear_in_weight_and_bias(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Without activation, weights v + w and biases a + b give the sum of what v, a and w, b give."""
    one = with_bias(conv, linear(arguments), rng)
    moved = [name for name in ("weight", "bias") if one.get(name) is not None]
    two = {**one, **{name: normal(rng, one[name]) for name in moved}}
    both = {**one, **{name: one[name] + two[name] for name in moved}}
    sized = {**one, **{name: np.abs(one[name]) + np.abs(two[name]) for name in moved}}
    expected = combined(conv(one), conv(two))._replace(last_state=None)
    compare(conv, conv(both), expected, both, sized=sized, times=8)


@conv_law("bias", only=long_numbers)
def the_bias_is_added_before_the_activation(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Without activation, y with a bias is y without it plus the bias of each channel; padding stays 0."""
    case = linear(with_bias(conv, arguments, rng))
    without, there = conv({**case, "bias": None}), _there(case)
    expected = wide(without.y) + np.where(there[:, None], wide(case["bias"])[:, None], 0)
    compare(conv, conv(case), Results(expected, without.last_state), case, times=4)


@conv_law("activation")
def the_activation_is_silu_of_the_rest(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """y with activation "silu" is q / (1 + exp(-q)), where q is y without; the last state is the same."""
    arguments = with_bias(conv, {**arguments, "activation": "silu"}, rng)
    q = conv(linear(arguments))
    eps = float(np.finfo(np.float32).eps) if arguments["x"].dtype.itemsize == 4 else 0.0
    got, expected = conv(arguments), Results(silu(wide(q.y)), q.last_state)
    if arguments["x"].dtype.itemsize >= 4:
        compare(conv, got, expected, arguments, sized=linear(arguments), times=4)
    else:  # q has been rounded
        short = 16 * float(np.finfo(np.float16).eps if arguments["x"].dtype == np.float16 else 2.0**-7) + eps
        conv.close("y", got.y, expected.y, short * (np.abs(wide(q.y)) + 1e-3), arguments)


@conv_law()
def an_impulse_gives_the_weights(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Of x = 1 at one step and 0 elsewhere, y is there the last weight, a step later the last but one, and so on."""
    seqlen, width = arguments["x"].shape[2], arguments["weight"].shape[1]
    case = {**linear(arguments), "bias": None, "initial_state": None, "seq_idx": None, "reverse": False}
    at = int(rng.integers(seqlen))
    case["x"] = np.zeros(arguments["x"].shape, same_dtype(arguments["x"]))
    case["x"][..., at] = 1
    expected = np.zeros(arguments["x"].shape)
    for k in range(min(width, seqlen - at)):
        expected[..., at + k] = wide(arguments["weight"])[:, width - 1 - k]
    compare(conv, conv(case)._replace(last_state=None), Results(expected), case)


# --- who meets whom ---


@conv_law(only=two_rows)
def a_batch_row_is_a_convolution_of_its_own(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Rows do not meet: one row alone gives what it gives among others."""
    arguments, b = with_state(conv, arguments, rng), int(rng.integers(arguments["x"].shape[0]))
    one = rows(arguments, np.s_[b : b + 1])
    compare(conv, conv(one), Results(*(None if x is None else x[b : b + 1] for x in conv(arguments))), one, bits=True)


@conv_law(only=two_channels)
def channels_can_be_chosen(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Channels do not meet: some of them, in any order, give what they give among the others."""
    arguments = with_state(conv, with_bias(conv, arguments, rng), rng)
    dim = arguments["x"].shape[1]
    chosen = rng.permutation(dim)[: int(rng.integers(1, dim + 1))]
    some, whole = channels(arguments, chosen), conv(arguments)
    expected = Results(*(None if x is None else x[:, chosen] for x in whole))
    compare(conv, conv(some), expected, some, bits=True)


@conv_law("nonfinite")
def not_a_number_is_not_hidden(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """NaN at one step of one channel is in y there and at the width - 1 steps after it, in no other channel or row, and
    at no other step."""
    arguments = {**arguments, "seq_idx": None, "initial_state": None}
    expected, x = conv(arguments), arguments["x"].copy()
    place = tuple(int(rng.integers(n)) for n in x.shape)
    x[place] = np.nan
    got = conv({**arguments, "x": x})
    reach = arguments["weight"].shape[1]
    first = place[2] if not arguments.get("reverse") else max(0, place[2] - reach + 1)
    last = place[2] + 1 if arguments.get("reverse") else min(x.shape[2], place[2] + reach)
    hit = expected.y.copy()
    hit[place[0], place[1], first:last] = np.nan
    compare(conv, got._replace(last_state=None), Results(hit), arguments)


# --- time ---


@conv_law(only=two_steps)
def the_future_does_not_reach_the_past(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """y at a step does not depend on x after it: not even NaN there changes a bit of it."""
    arguments, seqlen = with_state(conv, arguments, rng), arguments["x"].shape[2]
    now = int(rng.integers(1, seqlen))
    x = arguments["x"].copy()
    x[..., piece(arguments, now, seqlen)] = np.nan if conv.can("nonfinite") else 3
    past = piece(arguments, 0, now)
    got, expected = (Results(conv(case).y[..., past]) for case in ({**arguments, "x": x}, arguments))
    compare(conv, got, expected, arguments, bits=True, places=np.s_[..., past])


@conv_law(only=two_steps)
def the_far_past_is_forgotten(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """y at a step does not depend on x more than width - 1 steps before it: not even NaN there changes a bit of it."""
    seqlen, width = arguments["x"].shape[2], arguments["weight"].shape[1]
    if seqlen <= width:
        return
    arguments = {**with_state(conv, arguments, rng), "seq_idx": None}
    now = int(rng.integers(1, seqlen - width + 1))
    x = arguments["x"].copy()
    x[..., piece(arguments, 0, now)] = np.nan if conv.can("nonfinite") else 3
    later = piece(arguments, now + width - 1, seqlen)
    got, expected = (Results(conv(case).y[..., later]) for case in ({**arguments, "x": x}, arguments))
    compare(conv, got, expected, arguments, bits=True, places=np.s_[..., later])


@conv_law(only=two_steps)
def a_beginning_is_a_convolution(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """The convolution of the first steps is the beginning of the whole."""
    arguments = with_state(conv, arguments, rng)
    past = piece(arguments, 0, int(rng.integers(1, arguments["x"].shape[2])))
    short = steps(arguments, past)
    compare(conv, Results(conv(short).y), Results(conv(arguments).y[..., past]), short, bits=True)


@conv_law()
def time_can_be_shifted(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Zeros before the first step delay y and change nothing else."""
    count = int(rng.integers(1, 9))
    case = {**arguments, "seq_idx": None, "initial_state": None}
    zeros = np.zeros((*case["x"].shape[:2], count), same_dtype(case["x"]))
    late = {**case, "x": join([zeros, case["x"]], case)}
    got, after = conv(late), piece(late, count, late["x"].shape[2])
    compare(conv, Results(got.y[..., after], got.last_state), conv(case), case, bits=True)


@conv_law("initial_state", "last_state", only=two_steps)
def a_convolution_is_that_of_its_parts(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Cut anywhere in time, with the last state of a part as the initial state of the next, the parts are the whole."""
    whole = {**with_state(conv, arguments, rng), "seq_idx": None}
    edges, state, found = some_edges(rng, whole["x"].shape[2]), whole["initial_state"], []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = conv(steps(whole, piece(whole, first, last), initial_state=state))
        found.append(part.y)
        state = part.last_state
    compare(conv, Results(join(found, whole), state), conv(whole), whole, bits=True)


@conv_law("last_state")
def the_last_state_is_the_last_inputs(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """What is handed on are the last width - 1 inputs, oldest first, those before the first step among them."""
    case = {**with_state(conv, arguments, rng), "seq_idx": None}
    state = case.get("initial_state")
    state = np.zeros(state_shape(case), case["weight"].dtype) if state is None else state
    x = case["x"][..., ::-1] if case.get("reverse") else case["x"]
    inputs = np.concatenate([wide(state), wide(x)], axis=2)
    got = conv(case)
    expected = inputs[..., inputs.shape[2] - state.shape[2] :]
    compare(conv, got, Results(got.y, expected.astype(got.last_state.dtype)), case, bits=True)


@conv_law("initial_state")
def the_initial_state_is_what_came_before(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Inputs before the first step may stand in the initial state, or before x with the first y thrown away."""
    case = {**with_state(conv, arguments, rng), "seq_idx": None}
    before = case["initial_state"].astype(same_dtype(case["x"]))
    order = np.s_[..., :: -1 if case.get("reverse") else 1]
    long = {**case, "initial_state": None, "x": join([before[order], case["x"]], case)}
    got, after = conv(long), piece(long, before.shape[2], long["x"].shape[2])
    compare(conv, conv(case), Results(got.y[..., after], got.last_state), case, bits=True)


@conv_law("reverse")
def reverse_is_a_flip_before_and_after(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """`reverse` flips x and seq_idx in time, convolves, and flips y; the states are those of the flipped one."""
    case = with_state(conv, arguments, rng)
    flipped = conv(backwards(case))
    compare(conv, conv(case), flipped._replace(y=flipped.y[..., ::-1]), case, bits=True)


@conv_law("step")
def a_convolution_is_its_steps(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """One step after the other, with a state that is changed in place, is the convolution."""
    case = {**with_state(conv, arguments, rng), "seq_idx": None}
    state = case.get("initial_state")
    state = np.zeros(state_shape(case), same_dtype(case["weight"])) if state is None else state.copy()
    fixed = {name: case[name] for name in ("weight", "bias", "activation") if case.get(name) is not None}
    y, seqlen = np.empty_like(case["x"]), case["x"].shape[2]
    for t in range(seqlen)[:: -1 if case.get("reverse") else 1]:
        y[..., t] = conv.step({"state": state, "x": case["x"][..., t], **fixed}, case)
    compare(conv, Results(y, state), conv(case), case, bits=True)


# --- packing ---


@conv_law("seq_idx", only=two_steps)
def packed_sequences_are_sequences_of_their_own(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """Sequences packed into one row, told apart by `seq_idx`, give what each gives alone. The initial state enters the
    first, the last state is that of the last."""
    case, seqlen = rows(with_state(conv, arguments, rng), np.s_[:1]), arguments["x"].shape[2]
    edges = some_edges(rng, seqlen)
    numbers = np.repeat(np.arange(len(edges) - 1) * 2 % 3, np.diff(edges)).astype(np.int32)
    numbers = numbers[:: -1 if case.get("reverse") else 1][None]
    found, state, last = [], case.get("initial_state"), None
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        part = conv(steps(case, piece(case, first, end), initial_state=state, seq_idx=None))
        found.append(part.y)
        state, last = None, part.last_state
    got = conv({**case, "seq_idx": numbers})
    compare(conv, got, Results(join(found, case), last), {**case, "seq_idx": numbers}, bits=True)


@conv_law("seq_idx")
def padding_is_as_if_absent(conv: Conv, arguments: Arrays, rng: np.random.Generator) -> None:
    """A step whose `seq_idx` is negative gives y = 0, whatever stands there, and the others look past it."""
    case = rows(with_state(conv, arguments, rng), np.s_[:1])
    kept = rng.random(case["x"].shape[2]) < 0.7
    x = case["x"].copy()
    x[..., ~kept] = np.nan if conv.can("nonfinite") else 5
    padded = {**case, "x": x, "seq_idx": np.where(kept, 0, -2).astype(np.int32)[None]}
    short, got = conv(steps(case, kept, seq_idx=None)), conv(padded)
    expected = np.zeros_like(got.y)
    expected[..., kept] = short.y
    compare(conv, got, Results(expected, short.last_state), {**padded, "x": case["x"]}, bits=True)


def _there(case: Arrays) -> Any:
    seq_idx = case.get("seq_idx")
    return np.ones((case["x"].shape[0], case["x"].shape[2]), bool) if seq_idx is None else seq_idx >= 0


CONV_LAWS: tuple[Law, ...] = tuple(x for x in list(globals().values()) if isinstance(x, Law))
