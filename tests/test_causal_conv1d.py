"""The causal convolution: against its reference, and the laws it obeys."""

from __future__ import annotations

import doctest
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, run_without_compiler, same_bits
from cases import WIDTHS, conv_case, conv_specs, cotangents, parameter_dtype, seeds
from hypothesis import given
from hypothesis import strategies as st

import npmamba.ops
from npmamba.autodiff.check import check_vjp
from npmamba.autodiff.tape import pullback
from npmamba.cpu import causal_conv1d as cpu
from npmamba.cpu import runtime
from npmamba.cpu.simd import LANES
from npmamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_backward, causal_conv1d_update
from npmamba.reference import causal_conv1d as reference

LENGTHS = (1, 2, 3, 7, 64, 65, 257, cpu.TILE, cpu.TILE + 1, cpu.CHUNK, cpu.CHUNK + 1)
ON = {"bias": True, "activation": "silu", "initial_state": True}
FLOATS = [np.float32, np.float64]
lengths, widths = st.sampled_from(LENGTHS), st.sampled_from(WIDTHS)


def prepared(case):
    """Give the weights the dtype of a state: both stay in float32 where x is shorter."""
    wide = parameter_dtype(case["x"].dtype)
    return {k: v.astype(wide) if k in ("weight", "bias") and v is not None else v for k, v in case.items()}


def drawn(seed, batch, dim, seqlen, width, dtype=np.float64, **options):
    """Return the arguments, and the gradients dout and dlast_state."""
    case = prepared(conv_case(np.random.default_rng(seed), batch, dim, seqlen, width, dtype=dtype, **options))
    return case, *cotangents(seed, case["x"], (batch, dim, width - 1))


def forward(case):
    return causal_conv1d(**case, return_last_state=True)


def both(case, dout, dlast):
    """Return everything: y, the last state, and the gradients."""
    return *forward(case), *causal_conv1d_backward(dout, **case, dlast_state=dlast)


def both_by_reference(case, dout, dlast):
    return *reference.forward(**case), *reference.backward(dout, **case, dlast_state=dlast)


def cut(case, part):
    """Return the arguments for a part of time, a slice."""
    return {**case, "x": case["x"][..., part]}


# Against the reference


@given(conv_specs(lengths=LENGTHS))
def test_float64_is_the_reference(spec):
    case = spec.arguments()
    grads = cotangents(spec.seed, case["x"], spec.state_shape)
    for k, (found, wanted) in enumerate(zip(both(case, *grads), both_by_reference(case, *grads), strict=True)):
        assert (found is None) == (wanted is None)
        assert found is None or error(found, wanted) <= (1e-12 if k < 2 else 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [(np.float32, (1e-6, 3e-6)), (np.float16, (1e-3, 1e-3)), (ml_dtypes.bfloat16, (8e-3, 8e-3))],
    ids=["float32", "float16", "bfloat16"],
)
@given(conv_specs(lengths=LENGTHS))
def test_shorter_types_are_computed_in_float32_and_rounded_once(dtype, tolerances, spec):
    case = prepared(spec.arguments(dtype))
    grads = cotangents(spec.seed, case["x"], spec.state_shape)
    types = [dtype, np.float32, dtype, np.float32, np.float32, np.float32]
    for k, (found, wanted) in enumerate(zip(both(case, *grads), both_by_reference(case, *grads), strict=True)):
        if found is not None:
            terms = grads[0].astype(np.float64) if k in (3, 4) else 0.0  # sums over time may cancel
            assert found.dtype == types[k]
            assert error(found, wanted, terms) <= (tolerances[k > 1] if types[k] == dtype else 3e-6)


@pytest.mark.parametrize("width", [cpu.TILE, cpu.TILE + 4, cpu.CHUNK + 9])
@pytest.mark.parametrize("seqlen", [5, 300])
@pytest.mark.parametrize("seq_idx", [None, "padded"])
def test_a_window_may_be_longer_than_a_tile_and_than_the_sequence(width, seqlen, seq_idx):
    arguments = drawn(1, 2, 3, seqlen, width, **ON, seq_idx=seq_idx)
    for found, wanted in zip(both(*arguments), both_by_reference(*arguments), strict=True):
        assert error(found, wanted) <= 1e-12


def assert_is_the_reference(case, dout, dlast):
    for found, wanted in zip(both(case, dout, dlast), both_by_reference(case, dout, dlast), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or error(found, wanted) <= 1e-12


@pytest.mark.parametrize("begins", range(cpu.TILE - 4, cpu.TILE + 5))
def test_a_sequence_may_begin_anywhere_about_the_border_of_a_tile(begins):
    """Width 4 has loops of its own for tiles where no step, nor any of the three that follow, lacks a tap."""
    case, dout, dlast = drawn(0, 1, 3, 3 * cpu.TILE, 4, **ON)
    assert_is_the_reference({**case, "seq_idx": (np.arange(3 * cpu.TILE) >= begins).astype(int)[None]}, dout, dlast)


@pytest.mark.parametrize("seqlen", [1, 4, cpu.TILE, cpu.TILE + 5])
def test_every_step_may_be_a_sequence_of_its_own(seqlen):
    case, dout, dlast = drawn(5, 1, 3, seqlen, 4, **ON)
    assert_is_the_reference({**case, "seq_idx": np.arange(seqlen)[None]}, dout, dlast)


@pytest.mark.parametrize("width", [3, 4])
def test_there_may_be_more_channels_than_one_block_has(width):
    dim = cpu.BLOCK_VECTORS * LANES[np.dtype(np.float64)] + 3
    assert_is_the_reference(*drawn(0, 1, dim, 5, width, **ON))


def test_the_primitive_passes_the_check_of_its_gradient():
    case, *_ = drawn(2, 2, 3, 9, 4, **ON)
    arrays = [case[name] for name in ("x", "weight", "bias", "initial_state")]
    check_vjp(
        lambda x, w, b, s: causal_conv1d(x, w, b, activation="silu", initial_state=s, return_last_state=True), *arrays
    )
    check_vjp(causal_conv1d, *arrays[:2])


def test_an_output_that_nobody_used_has_gradient_zero():
    case, dout, dlast = drawn(3, 2, 5, 9, 4)
    arrays = case["x"], case["weight"]
    f = lambda x, w: causal_conv1d(x, w, return_last_state=True)  # noqa: E731
    zero = np.zeros_like(dout)
    found = pullback(f, *arrays)[1]((None, dlast))
    assert same_bits(found, tuple(causal_conv1d_backward(zero, *arrays, dlast_state=dlast)[:2]))
    assert same_bits(found[0][..., -3:], dlast)
    found = pullback(f, *arrays)[1]((dout, None))
    assert same_bits(found, tuple(causal_conv1d_backward(dout, *arrays)[:2]))


# Laws


@given(seeds, lengths, widths)
def test_an_impulse_returns_the_weights(seed, seqlen, width):
    weight = np.random.default_rng(seed).standard_normal((3, width))
    x = np.zeros((1, 3, seqlen))
    x[..., 0] = 1
    expected = np.zeros((3, seqlen + width))
    expected[:, :width] = weight[:, ::-1]
    assert same_bits(causal_conv1d(x, weight), expected[None, :, :seqlen])


@pytest.mark.parametrize("dtype", FLOATS)
@given(seeds, lengths, widths, st.data())
def test_time_may_be_cut_anywhere(dtype, seed, seqlen, width, data):
    """The last state of the first part enters the second; the gradient of that state goes the other way."""
    case, dout, dlast = drawn(seed, 2, 5, seqlen, width, dtype, **ON)
    whole = both(case, dout, dlast)
    at = data.draw(st.integers(0, seqlen), "cut")
    first, second = cut(case, slice(at)), cut(case, slice(at, None))
    y1, middle = forward(first)
    second["initial_state"] = middle
    y2, last = forward(second)
    back2 = causal_conv1d_backward(dout[..., at:], **second, dlast_state=dlast)
    back1 = causal_conv1d_backward(dout[..., :at], **first, dlast_state=back2.initial_state)
    dx = np.concatenate([back1.x, back2.x], axis=-1)
    assert same_bits((np.concatenate([y1, y2], axis=-1), last), whole[:2])
    assert same_bits((dx, back1.initial_state), (whole[2], whole[5]))
    if dtype is np.float64:
        assert error(back1.weight + back2.weight, whole[3]) <= 1e-12
        assert error(back1.bias + back2.bias, whole[4]) <= 1e-12


@pytest.mark.parametrize("dtype", FLOATS)
@given(conv_specs(lengths=LENGTHS, dims=(5, 48)))
def test_a_batch_row_has_the_same_bits_alone(dtype, spec):
    case, dout, dlast = spec.arguments(dtype), *cotangents(spec.seed, spec.arguments(dtype)["x"], spec.state_shape)
    whole = both(case, dout, dlast)
    for b in range(spec.batch):
        of_row = {k: v[b : b + 1] for k, v in case.items() if k in ("x", "initial_state", "seq_idx") and v is not None}
        alone = both({**case, **of_row}, dout[b : b + 1], dlast[b : b + 1])
        for k in (0, 1, 2, 5):
            assert same_bits(alone[k], None if whole[k] is None else whole[k][b : b + 1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seq_idx", [None, "padded"])
def test_any_number_of_threads_gives_the_same_bits(dtype, seq_idx, monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    arguments = drawn(4, 3, 100, 300, 4, dtype, **ON, seq_idx=seq_idx)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(both(*arguments))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@given(conv_specs(lengths=LENGTHS))
def test_reverse_is_flip_run_flip(spec):
    case = {**spec.arguments(np.float32), "reverse": True}
    dout, dlast = cotangents(spec.seed, case["x"], spec.state_shape)
    y, last, dx, *others = both(case, dout, dlast)
    flip = lambda a: None if a is None else a[..., ::-1].copy()  # noqa: E731
    flipped = {**case, "x": flip(case["x"]), "seq_idx": flip(case["seq_idx"]), "reverse": False}
    y_, last_, dx_, *others_ = both(flipped, flip(dout), dlast)
    assert same_bits((y, last, dx, *others), (flip(y_), last_, flip(dx_), *others_))


@pytest.mark.parametrize("dtype", FLOATS)
@given(seeds, st.lists(st.sampled_from((1, 2, 3, 7, 40, 150)), min_size=1, max_size=4), widths)
def test_packed_sequences_are_sequences_of_their_own(dtype, seed, sizes, width):
    """To the bit, with padding anywhere; the first one has the initial state, the last one leaves the last state."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(len(sizes)) % 2 + 3, sizes)  # a number may return: only changes count
    places = np.sort(rng.choice(len(index) + 20, len(index), replace=False))
    seq_idx = np.full((1, len(index) + 20), -1)
    seq_idx[0, places] = index
    case, dout, dlast = drawn(seed, 1, 5, len(index) + 20, width, dtype, **ON)
    packed = both({**case, "seq_idx": seq_idx}, dout, dlast)
    padding = seq_idx[0] < 0
    assert not packed[0][..., padding].any()
    assert not packed[2][..., padding].any()
    for k, part in enumerate(np.split(places, np.cumsum(sizes)[:-1])):
        is_first, is_last = k == 0, k == len(sizes) - 1
        own = cut(case, part) | ({} if is_first else {"initial_state": np.zeros_like(case["initial_state"])})
        y, last, dx, _, _, dinitial = both(own, dout[..., part], dlast if is_last else np.zeros_like(dlast))
        assert same_bits((packed[0][..., part], packed[2][..., part]), (y, dx))
        assert not is_last or same_bits(packed[1], last)
        assert not is_first or same_bits(packed[5], dinitial)


@pytest.mark.parametrize("dtype", FLOATS)
@given(conv_specs(lengths=LENGTHS, dims=(5, 48)))
def test_a_first_weight_of_zero_is_no_weight(dtype, spec):
    """Width 4 has loops of its own; their bits are those of the loops for any width."""
    case = spec.arguments(dtype)
    dout, dlast = cotangents(spec.seed, case["x"], spec.state_shape)
    wider = {**case, "weight": np.pad(case["weight"], ((0, 0), (1, 0)))}
    if case["initial_state"] is not None:
        wider["initial_state"] = np.pad(case["initial_state"], ((0, 0), (0, 0), (1, 0)), constant_values=9)
    y, last, dx, dweight, dbias, dinitial = both(case, dout, dlast)
    y_, last_, dx_, dweight_, dbias_, dinitial_ = both(wider, dout, np.pad(dlast, ((0, 0), (0, 0), (1, 0))))
    assert same_bits((y, last, dx), (y_, last_[..., 1:], dx_))
    assert same_bits((dweight, dbias), (dweight_[:, 1:], dbias_))
    assert dinitial is None or same_bits(dinitial, dinitial_[..., 1:])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@given(conv_specs(lengths=(1, 2, 3, 7, 33)))
def test_step_by_step_is_the_convolution(dtype, spec):
    case = {**prepared(spec.arguments(dtype)), "seq_idx": None, "reverse": False}
    y, last = forward(case)
    state = np.zeros(spec.state_shape, case["weight"].dtype) if case["initial_state"] is None else case["initial_state"]
    options = {"bias": case["bias"], "activation": case["activation"]}
    steps = [causal_conv1d_update(state, case["x"][..., t], case["weight"], **options) for t in range(spec.seqlen)]
    assert same_bits((np.stack(steps, axis=-1), state), (y, last))


# Memory


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state", "seq_idx", "dout", "dlast_state"])
def test_any_memory_gives_the_same_bits(name):
    case, dout, dlast = drawn(5, 2, 21, 40, 4, np.float32, **ON, seq_idx="padded")
    arguments = {**case, "dout": dout, "dlast_state": dlast}

    def run(arguments):
        case = {k: v for k, v in arguments.items() if k not in ("dout", "dlast_state")}
        return both(case, arguments["dout"], arguments["dlast_state"])

    expected = run(arguments)
    for layout, x in layouts(arguments[name]).items():
        assert same_bits(run({**arguments, name: x}), expected), layout


@pytest.mark.parametrize("name", ["state", "x", "weight", "bias"])
@pytest.mark.parametrize("width", [1, 4])
def test_any_memory_of_a_step_gives_the_same_bits(name, width):
    case, *_ = drawn(6, 3, 21, 1, width, np.float32, **ON)
    arguments = {"state": case["initial_state"], "x": case["x"][..., 0], "weight": case["weight"], "bias": case["bias"]}
    before = arguments["state"].copy()
    expected = causal_conv1d_update(**arguments, activation="silu"), arguments["state"].copy()
    arguments["state"][...] = before
    for layout, x in layouts(arguments[name]).items():
        if (layout, name) != ("read-only", "state"):
            changed = {**arguments, "state": before.copy(), name: x}
            y = causal_conv1d_update(**changed, activation="silu")
            assert same_bits((y, changed["state"].astype(np.float32)), expected), layout


def test_results_follow_the_memory_order_of_x():
    case, dout, _ = drawn(7, 2, 5, 9, 4)
    side_by_side = np.ascontiguousarray(case["x"].swapaxes(1, 2)).swapaxes(1, 2)
    for x, axis in ((case["x"], 2), (side_by_side, 1)):
        y, dx = causal_conv1d(x, case["weight"]), causal_conv1d_backward(dout, x, case["weight"]).x
        assert y.strides[axis] == dx.strides[axis] == 8


def test_half_of_a_wider_array_is_read_where_it_lies():
    wide = np.random.default_rng(8).standard_normal((2, 9, 10))
    x = wide[..., 5:].swapaxes(1, 2)
    options = {"activation": None, "seq_idx": None, "reverse": False, "save": True}
    saved = cpu.forward(x, np.ones((5, 4)), None, None, **options)[2]
    assert np.shares_memory(saved.prepared[0], wide)


def test_inputs_are_left_as_they_are_and_results_are_fresh():
    case, dout, dlast = drawn(9, 2, 5, 9, 4, **ON, seq_idx="padded")
    inputs = [a for a in (*case.values(), dout, dlast) if isinstance(a, np.ndarray)]
    copies = [a.copy() for a in inputs]
    results = both(case, dout, dlast)
    assert all(same_bits(a, copy) for a, copy in zip(inputs, copies, strict=True))
    assert not any(np.shares_memory(a, b) for a in results for b in inputs)


def test_nan_reaches_the_next_steps_of_its_channel_and_no_more():
    x = np.zeros((2, 3, 9))
    x[1, 2, 4] = np.nan
    y = causal_conv1d(x, np.ones((3, 4)), activation="silu")
    expected = np.zeros(x.shape, bool)
    expected[1, 2, 4:8] = True
    assert same_bits(np.isnan(y), expected)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 9), (2, 0, 9), (0, 0, 0)])
@pytest.mark.parametrize("width", [1, 4])
def test_without_steps_the_state_stays_and_the_weights_have_gradient_zero(shape, width):
    case, dout, dlast = drawn(10, *shape, width, **ON)
    y, last, dx, dweight, dbias, dinitial = both(case, dout, dlast)
    assert (y.shape, dx.shape) == (shape, shape)
    assert shape[2] or same_bits((last, dinitial), (case["initial_state"], dlast))
    assert not np.shares_memory(last, case["initial_state"])
    assert same_bits((dweight, dbias), (np.zeros_like(case["weight"]), np.zeros_like(case["bias"])))


# Errors


X, W, B, S = np.zeros((2, 3, 5)), np.ones((3, 4)), np.ones(3), np.zeros((2, 3, 3))
F32 = np.float32


def conv(x=X, weight=W, **options):
    return causal_conv1d(x, weight, **options)


def update(state=S, x=X[..., 0], weight=W, **options):
    return causal_conv1d_update(state, x, weight, **options)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: conv([1.0]), TypeError, "x must be a NumPy or CuPy array, got list"),
        (lambda: conv(None), TypeError, "x must be a NumPy or CuPy array, got None"),
        (lambda: conv(weight=None), TypeError, "weight must be a NumPy or CuPy array, got None"),
        (lambda: conv(bias=0.0), TypeError, "bias must be a NumPy or CuPy array, got float"),
        (lambda: conv(X[0]), ValueError, "x has 2 axes; x must be (batch, dim, seqlen), got shape (3, 5)"),
        (
            lambda: conv(weight=W[:2]),
            ValueError,
            "weight has dim=2, but x has dim=3; weight must be (dim, width), got shape (2, 4)",
        ),
        (
            lambda: conv(weight=W[:, None]),
            ValueError,
            "weight has 3 axes; weight must be (dim, width), got shape (3, 1, 4)",
        ),
        (lambda: conv(weight=W[:, :0]), ValueError, "weight has width=0; width must be at least 1"),
        (
            lambda: conv(bias=B[:2]),
            ValueError,
            "bias has dim=2, but x has dim=3; bias must be (dim,), got shape (2,)",
        ),
        (
            lambda: conv(initial_state=S[..., 1:]),
            ValueError,
            "initial_state has width-1=2, but weight has width-1=3; initial_state must be (batch, dim, width-1), "
            "got shape (2, 3, 2)",
        ),
        (
            lambda: conv(seq_idx=np.zeros((2, 4), int)),
            ValueError,
            "seq_idx has seqlen=4, but x has seqlen=5; seq_idx must be (batch, seqlen), got shape (2, 4)",
        ),
        (lambda: conv(seq_idx=X[:, 0]), TypeError, "seq_idx must be an array of integers, got float64"),
        (
            lambda: conv(X.astype(int)),
            TypeError,
            "x must be float16, bfloat16, float32 or float64, got int64",
        ),
        (lambda: conv(X.astype(F32)), TypeError, "weight must be float32 because x is float32, got float64"),
        (
            lambda: conv(X.astype(np.float16), W.astype(np.float16)),
            TypeError,
            "weight must be float32 because x is float16, got float16",
        ),
        (lambda: conv(bias=B.astype(F32)), TypeError, "bias must be float64 because x is float64, got float32"),
        (
            lambda: conv(initial_state=S.astype(F32)),
            TypeError,
            "initial_state must be float64 because x is float64, got float32",
        ),
        (lambda: conv(activation="relu"), ValueError, "activation must be one of None, 'silu', got 'relu'"),
        (lambda: conv(activation=True), ValueError, "activation must be one of None, 'silu', got True"),
        (lambda: conv(reverse=1), TypeError, "reverse must be True or False, got 1"),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == f"causal_conv1d: {message}"


@pytest.mark.parametrize(
    ("dout", "dlast", "kind", "message"),
    [
        (None, None, TypeError, "dout must be a NumPy or CuPy array, got None"),
        (
            X[..., 1:],
            None,
            ValueError,
            "dout has seqlen=4, but x has seqlen=5; dout must be (batch, dim, seqlen), got shape (2, 3, 4)",
        ),
        (X.astype(F32), None, TypeError, "dout must be float64 because x is float64, got float32"),
        (
            X,
            S[:1],
            ValueError,
            "dlast_state has batch=1, but x has batch=2; dlast_state must be (batch, dim, width-1), "
            "got shape (1, 3, 3)",
        ),
        (X, S.astype(F32), TypeError, "dlast_state must be float64 because x is float64, got float32"),
    ],
)
def test_a_wrong_gradient_is_named_too(dout, dlast, kind, message):
    with pytest.raises(kind) as caught:
        causal_conv1d_backward(dout, X, W, dlast_state=dlast)
    assert str(caught.value) == f"causal_conv1d_backward: {message}"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: update(None), TypeError, "state must be a NumPy or CuPy array, got None"),
        (lambda: update(read_only(S)), ValueError, "state is changed in place, but it is read-only"),
        (lambda: update(x=X), ValueError, "x has 3 axes; x must be (batch, dim), got shape (2, 3, 5)"),
        (
            lambda: update(S[..., :2]),
            ValueError,
            "state has width-1=2, but weight has width-1=3; state must be (batch, dim, width-1), got shape (2, 3, 2)",
        ),
        (lambda: update(S.astype(F32)), TypeError, "state must be float64 because x is float64, got float32"),
        (
            lambda: update(S, X[..., 0].astype(np.float16), W.astype(F32)),
            TypeError,
            "state must be float32 because x is float16, got float64",
        ),
        (lambda: update(S.astype(int)), TypeError, "state must be float16, bfloat16, float32 or float64, got int64"),
        (lambda: update(activation="gelu"), ValueError, "activation must be one of None, 'silu', got 'gelu'"),
        (
            lambda: pullback(lambda x: update(x=x), X[..., 0]),
            TypeError,
            "x is traced, but a step in place has no gradient; use causal_conv1d",
        ),
    ],
)
def test_a_wrong_argument_of_a_step_is_named(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == f"causal_conv1d_update: {message}"


# The page, and the kernels without the compiler


def test_the_worked_example_of_the_page_holds():
    page = Path(npmamba.ops.__file__).with_name("causal_conv1d.md")
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert (failed, attempted > 3) == (0, True)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_backward, causal_conv1d_update
from npmamba.reference import causal_conv1d as reference
rng = np.random.default_rng(0)
x, dout = rng.standard_normal((2, 2, 19, 30))
weight, bias, (state, dlast) = rng.standard_normal((19, 4)), x[0, :, 0], rng.standard_normal((2, 2, 19, 3))
seq_idx = np.repeat([[0, 1], [2, -1]], 15, axis=1)
options = {"activation": "silu", "initial_state": state}
for seq_idx in (None, seq_idx):
    options["seq_idx"] = seq_idx
    found = *causal_conv1d(x, weight, bias, **options, return_last_state=True), *causal_conv1d_backward(
        dout, x, weight, bias, **options, dlast_state=dlast)
    expected = *reference.forward(x, weight, bias, **options), *reference.backward(
        dout, x, weight, bias, **options, dlast_state=dlast)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
y = reference.forward(x, weight, bias, activation="silu", initial_state=state)[0][..., 0]
np.testing.assert_allclose(causal_conv1d_update(state, x[..., 0], weight, bias, activation="silu"), y, rtol=1e-12)
np.testing.assert_array_equal(state[..., -1], x[..., 0])
""")
