"""The argument checks: each accepts what the documentation allows, and names the culprit otherwise."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.shapes import FLOATS, Arguments, compute_dtype

LENGTHS = st.integers(0, 9)


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_compute_dtype_is_float64_only_for_float64():
    assert compute_dtype(np.float64) == np.float64
    for short in (np.float16, np.float32, ml_dtypes.bfloat16):
        assert compute_dtype(short) == np.float32


@given(LENGTHS, LENGTHS, LENGTHS)
def test_axes_are_bound_by_the_first_argument_that_shows_them(batch, dim, seqlen):
    arguments = Arguments("scan")
    assert arguments.shape("u", np.empty((batch, dim, seqlen)), "batch dim seqlen") == "batch dim seqlen"
    assert [arguments[axis] for axis in ("batch", "dim", "seqlen")] == [batch, dim, seqlen]
    arguments.shape("z", np.empty((dim, batch)), "dim batch")


@given(LENGTHS, LENGTHS)
def test_another_length_is_refused_exactly_when_it_differs(bound, other):
    arguments = Arguments("scan")
    arguments.shape("u", np.empty((1, bound)), "batch dim")
    if other == bound:
        arguments.shape("z", np.empty((1, other)), "batch dim")
        return
    message = (
        f"scan: z has dim={other}, but u has dim={bound}; z must be (batch, dim), got shape (1, {other})"
    )
    with pytest.raises(ValueError, match=says(message)):
        arguments.shape("z", np.empty((1, other)), "batch dim")


def test_the_layout_with_as_many_axes_is_chosen():
    layouts = ("dim dstate", "batch dstate seqlen", "batch groups dstate seqlen")
    for layout in layouts:
        ndim = len(layout.split())
        assert Arguments("scan").shape("B", np.empty((1,) * ndim), *layouts) == layout


def test_a_wrong_number_of_axes_lists_every_layout():
    message = "scan: D has 2 axes; D must be (dim,) or (batch, dim, seqlen), got shape (3, 1)"
    with pytest.raises(ValueError, match=says(message)):
        Arguments("scan").shape("D", np.empty((3, 1)), "dim", "batch dim seqlen")


def test_one_axis_named_twice_in_a_layout_must_agree_with_itself():
    message = "solve: A has dim=3, but A has dim=2; A must be (dim, dim), got shape (2, 3)"
    with pytest.raises(ValueError, match=says(message)):
        Arguments("solve").shape("A", np.empty((2, 3)), "dim dim")


@given(LENGTHS, LENGTHS)
def test_a_minimum_length_holds(length, minimum):
    arguments = Arguments("scan")
    arguments.shape("A", np.empty((1, length)), "dim dstate")
    if length >= minimum:
        arguments.at_least("dstate", minimum)
        return
    message = f"scan: A has dstate={length}; dstate must be at least {minimum}"
    with pytest.raises(ValueError, match=says(message)):
        arguments.at_least("dstate", minimum)


@given(LENGTHS, LENGTHS)
def test_a_maximum_length_holds(length, maximum):
    arguments = Arguments("scan")
    arguments.shape("A", np.empty((1, length)), "dim dstate")
    if length <= maximum:
        arguments.at_most("dstate", maximum)
        return
    message = f"scan: A has dstate={length}; dstate must be at most {maximum}"
    with pytest.raises(ValueError, match=says(message)):
        arguments.at_most("dstate", maximum)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_is_accepted_in_either_byte_order(dtype):
    native = np.dtype(dtype)
    assert Arguments("scan").dtype("u", np.zeros(1, dtype)) == native
    assert native.name in FLOATS
    if native.kind == "f":
        swapped = np.zeros(1, native.newbyteorder())
        assert Arguments("scan").dtype("u", swapped, native) == native


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, np.longdouble, object, "S1"])
def test_anything_else_is_no_float(dtype):
    with pytest.raises(TypeError, match=r"^scan: u must be float16, bfloat16, float32 or float64, got "):
        Arguments("scan").dtype("u", np.zeros(1, dtype))


def test_a_wrong_float_names_what_is_expected_and_who_asks():
    x = np.zeros(1, np.float32)
    with pytest.raises(TypeError, match=says("scan: A must be float64, got float32")):
        Arguments("scan").dtype("A", x, np.float64)
    message = "scan: A must be float64 because u is float64, got float32"
    with pytest.raises(TypeError, match=says(message)):
        Arguments("scan").dtype("A", x, np.float64, like="u is float64")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16])
def test_integers_are_integers(dtype):
    Arguments("scan").integers("seq_idx", np.zeros(1, dtype))


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, object])
def test_anything_else_is_no_integer(dtype):
    with pytest.raises(TypeError, match=r"^scan: seq_idx must be an array of integers, got "):
        Arguments("scan").integers("seq_idx", np.zeros(1, dtype))


def test_a_choice_is_one_of_those_listed():
    arguments = Arguments("conv")
    for allowed in (None, "silu", "".join(["si", "lu"])):
        arguments.choice("activation", allowed, (None, "silu"))
    for refused in ("relu", False, 0, ["silu"]):
        message = f"conv: activation must be one of None, 'silu', got {refused!r}"
        with pytest.raises(ValueError, match=says(message)):
            arguments.choice("activation", refused, (None, "silu"))


def test_a_flag_is_true_or_false():
    arguments = Arguments("scan")
    for allowed in (True, False, np.True_):
        arguments.flag("reverse", allowed)
    for refused in (None, 1, "yes"):
        with pytest.raises(TypeError, match=says(f"scan: reverse must be True or False, got {refused!r}")):
            arguments.flag("reverse", refused)


@given(st.integers(-9, 9), st.integers(-9, 9))
def test_an_integer_is_one_within_its_bounds(value, low):
    arguments = Arguments("embedding")
    for number in (value, np.int64(value), np.int8(value)):
        if low <= value <= 5:
            found = arguments.integer("vocab_size", number, low, 5)
            assert (found, type(found)) == (value, int)
        else:
            bound = f"at least {low}" if value < low else "at most 5"
            with pytest.raises(ValueError, match=f"^embedding: vocab_size must be {bound}, got "):
                arguments.integer("vocab_size", number, low, 5)


@pytest.mark.parametrize("value", [None, "1", 1.0, True, np.True_, np.zeros((), int), [1]])
def test_anything_else_is_no_number_of_things(value):
    message = f"scan: steps must be an integer, got {type(value).__name__}"
    with pytest.raises(TypeError, match=says(message)):
        Arguments("scan").integer("steps", value)


@pytest.mark.parametrize("value", [2, 0.5, np.float32(0.5), np.longdouble(0.5), np.int8(1), 10**300], ids=str)
def test_a_number_is_any_of_python_s_and_numpy_s(value):
    found = Arguments("norm").number("eps", value, lambda x: x > 0, "above 0")
    assert (found, type(found)) == (float(value), float)


@pytest.mark.parametrize("value", [-1, np.nan, 10**400, -(10**5000)], ids=["negative", "nan", "long", "longer"])
def test_a_number_out_of_range_is_shown_as_far_as_it_can_be(value):
    message = r"^norm: eps must be finite and above 0, got (-1|nan|1000\d+\.\.\.|a value of int that cannot be shown)$"
    with pytest.raises(ValueError, match=message):
        Arguments("norm").number("eps", value, lambda x: 0 < x < np.inf, "finite and above 0")


@pytest.mark.parametrize("value", [None, "1", 1j, True, np.zeros(())])
def test_anything_else_is_no_number(value):
    with pytest.raises(TypeError, match=says(f"norm: eps must be a number, got {type(value).__name__}")):
        Arguments("norm").number("eps", value, lambda x: True, "")


def test_what_cannot_be_shown_is_named_by_its_type():
    class Sulky:
        def __repr__(self):
            raise RuntimeError("no")

    message = "scan: reverse must be True or False, got a value of Sulky that cannot be shown"
    with pytest.raises(TypeError, match=says(message)):
        Arguments("scan").flag("reverse", Sulky())
