"""The causal convolution on CUDA: every family of kernels against the reference, and what memory must not change."""

from __future__ import annotations

import inspect
from typing import Any

import backends
import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, same_bits
from cases import conv_case, conv_specs, cotangents, parameter_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cpu import causal_conv1d as cpu
from npmamba.cuda import arrays, conv_any, conv_lines, conv_rows, conv_shares
from npmamba.cuda import causal_conv1d as twin
from npmamba.cuda.conv_parts import RESIDENT, RESIDENT_BACKWARD, UNIT, row_lanes
from npmamba.reference import causal_conv1d as reference

ON = {"bias": True, "activation": "silu", "initial_state": True}
FEW = settings(max_examples=6)
NAMES = ("y", "last_state", "x", "weight", "bias", "initial_state")


def prepared(case):
    """Give the weights the dtype of a state: both stay in float32 where x is shorter."""
    wide = parameter_dtype(case["x"].dtype)
    return {k: v.astype(wide) if k in ("weight", "bias") and v is not None else v for k, v in case.items()}


def drawn(seed, batch, dim, seqlen, width, dtype=np.float64, **options):
    """Return the arguments, and the gradients dout and dlast_state."""
    case = prepared(conv_case(np.random.default_rng(seed), batch, dim, seqlen, width, dtype=dtype, **options))
    return case, *cotangents(seed, case["x"], (batch, dim, width - 1))


def side_by_side(x):
    """Return the same values with channels side by side, as the half of a wider array that a model has."""
    wide = np.zeros((x.shape[0], x.shape[2], 2 * x.shape[1]), x.dtype)
    wide[..., x.shape[1] :] = x.swapaxes(1, 2)
    return wide[..., x.shape[1] :].swapaxes(1, 2)


def both(device, case, dout, dlast, seed=None):
    """Return everything: y, the last state, and the gradients."""

    def run(x, weight, bias, initial_state, dout, dlast, **options):
        y, last, saved = twin.forward(x, weight, bias, initial_state, **options, save=True)
        return y, last, *twin.backward(dout, dlast, saved)

    return device.call(run, **case, dout=dout, dlast=dlast, seed=seed)


def by_reference(case, dout, dlast):
    return *reference.forward(**case), *reference.backward(dout, **case, dlast_state=dlast)


def check(found, expected, tolerance=1e-12, dtypes=None, terms=0.0):
    for k, (name, a, b) in enumerate(zip(NAMES, found, expected, strict=True)):
        assert (a is None) == (b is None), name
        if a is not None:
            assert dtypes is None or a.dtype == dtypes[k], name
            limit = tolerance[k] if isinstance(tolerance, list) else tolerance
            assert error(a, b, terms if k in (3, 4) else 0.0) <= limit, name


def on_device(device, layout):
    """Tell whether arrays of this layout exist there: CuPy's are aligned and in native byte order."""
    return device.name == "interpreter" or layout not in ("byte-swapped", "unaligned")


def family(case, dout) -> Any:
    """Return the module whose kernels run the backward pass."""
    return twin._family(case["weight"].shape[1], case["seq_idx"] is not None, case["x"], dout)


def test_functions_are_those_of_the_cpu_twin():
    for name in ("forward", "backward", "update"):
        found, wanted = (list(inspect.signature(getattr(t, name)).parameters) for t in (twin, cpu))
        assert found == wanted


# Against the reference


@FEW
@given(conv_specs(batches=(1, 2), dims=(2, 12), lengths=(1, 3, 16, 21), widths=(2, 3, 4)))
def test_channels_side_by_side_are_the_reference(device_backend, spec):
    case = spec.arguments()
    dout, dlast = cotangents(spec.seed, case["x"], spec.state_shape)
    expected = by_reference(case, dout, dlast)
    case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    assert family(case, dout) is conv_rows
    check(both(device_backend, case, dout, dlast, spec.seed), expected)


@FEW
@given(conv_specs(batches=(1, 2), dims=(1, 5), lengths=(2, 4, 22), widths=(2, 3, 4)))
def test_time_side_by_side_is_the_reference(device_backend, spec):
    case = {**spec.arguments(), "seq_idx": None}
    dout, dlast = cotangents(spec.seed, case["x"], spec.state_shape)
    assert family(case, dout) is conv_lines
    check(both(device_backend, case, dout, dlast, spec.seed), by_reference(case, dout, dlast))


@FEW
@given(conv_specs(batches=(1, 2), dims=(1, 5), lengths=(1, 3, 17), widths=(1, 2, 4, 7)), st.booleans())
def test_other_memory_and_other_widths_are_the_reference(device_backend, spec, channels_first):
    case = spec.arguments()
    dout, dlast = cotangents(spec.seed, case["x"], spec.state_shape)
    expected = by_reference(case, dout, dlast)
    if not channels_first:
        case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    check(both(device_backend, case, dout, dlast, spec.seed), expected)


@pytest.mark.parametrize(
    ("dtype", "short", "long"),
    [(np.float32, 1e-6, 3e-6), (np.float16, 1e-3, 3e-6), (ml_dtypes.bfloat16, 8e-3, 3e-6)],
    ids=["float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("kind", ["rows", "packed rows", "lines", "any"])
def test_shorter_types_are_computed_in_float32_and_rounded_once(device_backend, kind, dtype, short, long):
    case, dout, dlast = drawn(1, 2, 8, 24, 3 if kind == "any" else 4, dtype, **ON)
    case["seq_idx"] = conv_case(np.random.default_rng(2), 2, 1, 24, 1, seq_idx="padded")["seq_idx"]
    case["seq_idx"] = case["seq_idx"] if kind == "packed rows" else None
    expected = by_reference(case, dout, dlast)
    if "rows" in kind:
        case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    if kind == "any":
        case, dout = {**case, "x": layouts(case["x"])["every second column"]}, layouts(dout)["fortran"]
    assert family(case, dout).__name__.endswith(kind.split()[-1])
    dtypes = [dtype, np.float32, dtype, np.float32, np.float32, np.float32]
    tolerances = [short if d == dtype else long for d in dtypes]
    check(both(device_backend, case, dout, dlast), expected, tolerances, dtypes, dout.astype(np.float64))


@pytest.mark.parametrize("kind", ["rows", "lines", "any"])
def test_what_a_short_row_leaves_of_its_initial_state_has_the_last_ones_gradient(device_backend, kind):
    """With fewer steps than taps before, the last state still holds numbers of the initial one."""
    case, dout, dlast = drawn(17, 1, 2, 2, 5 if kind == "any" else 4, **ON)
    expected = by_reference(case, dout, dlast)
    if kind == "rows":
        case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    assert family(case, dout).__name__.endswith(kind)
    found = both(device_backend, case, dout, dlast)
    check(found, expected)
    assert abs(found[5] - both(device_backend, case, dout, 0 * dlast)[5]).max() > 0.1


def test_steps_of_padding_give_zero_and_have_gradient_zero(device_backend):
    """Where a thread owns a number, by kernels for any memory."""
    case, dout, dlast = drawn(18, 2, 3, 4, 5, **ON, seq_idx="padded")
    case["seq_idx"][:] = [[0, -1, 0, 1], [-2, -1, -1, -3]]
    assert family(case, dout) is conv_any
    found = both(device_backend, case, dout, dlast)
    check(found, by_reference(case, dout, dlast))
    for x in (found[0], found[2]):
        assert ((x == 0).all(1) == (case["seq_idx"] < 0)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 768, 2048), (8, 1536, 2048), (64, 4096, 4096), (512, 8192, 65536)])
def test_of_all_stretches_those_are_taken_with_which_the_rounds_of_blocks_are_shortest(shape, dtype, monkeypatch):
    x, resident = np.broadcast_to(np.zeros((), dtype), shape), RESIDENT_BACKWARD[np.dtype(dtype).itemsize]

    def time(cut):
        rounds = -(-conv_shares.row_share(x, cut)[0][0] // (conv_shares.PROCESSORS * resident))
        return rounds * (cut.steps + conv_shares.BEGINNING_BACKWARD)

    cut = conv_shares.stretches(x)
    assert (cut.per_row - 1) * cut.steps < shape[2] <= cut.per_row * cut.steps
    assert cut.lines == shape[0] * cut.per_row
    assert conv_shares.SHORTEST <= cut.steps <= conv_shares.LONGEST
    assert cut.steps % UNIT == 0
    for steps in range(conv_shares.SHORTEST, conv_shares.LONGEST + 1, UNIT):
        monkeypatch.setattr(conv_shares, "SHORTEST", steps)
        monkeypatch.setattr(conv_shares, "LONGEST", steps)
        other = conv_shares.stretches(x)
        assert other.steps == steps
        assert (time(cut), -cut.steps) <= (time(other), -steps)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1536, 8192), (8, 1536, 2048), (8, 5120, 2048), (64, 256, 512)])
def test_forward_stretches_of_half_types_are_short_and_fill_their_rounds(shape):
    x = np.broadcast_to(np.float16(0), shape)
    room = conv_shares.PROCESSORS * RESIDENT[2]

    def time(steps):
        blocks = conv_shares.row_share(x, conv_shares._cut(x, steps))[0][0]
        return -(-blocks // room) * (steps + conv_shares.BEGINNING), -steps

    choices = range(conv_shares.SHORTEST, conv_shares.LONGEST_AHEAD + 1, UNIT)
    assert conv_shares.stretches_ahead(x, RESIDENT[2]).steps == min(choices, key=time)
    assert conv_shares.stretches_ahead(x.astype(np.float32), RESIDENT[4]).steps == conv_shares.AHEAD[4]


@pytest.mark.parametrize(("dtype", "short", "long"), [(np.float64, 3e-15, 3e-15), (np.float16, 1e-3, 3e-6)])
@pytest.mark.parametrize("seq_idx", [None, "padded"])
@pytest.mark.parametrize("reverse", [False, True])
def test_stretches_of_time_are_joined(device_backend, monkeypatch, seq_idx, reverse, dtype, short, long):
    """More of them than a block has, of two batch rows, the last one short."""
    monkeypatch.setattr(conv_shares, "SHORTEST", UNIT)
    monkeypatch.setattr(conv_shares, "LONGEST", UNIT)
    monkeypatch.setattr(conv_shares, "AHEAD", dict.fromkeys(conv_shares.AHEAD, UNIT))
    pieces, per_row = 8 // row_lanes(dtype), 33
    case, dout, dlast = drawn(3, 2, 8, UNIT * per_row - 3, 4, dtype, **ON, seq_idx=seq_idx, reverse=reverse)
    assert conv_shares.stretches(case["x"]).lines == 2 * per_row > conv_rows.THREADS // pieces
    expected = by_reference(case, dout, dlast)
    case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    tolerances = [short, long, short, long, long, long]
    check(both(device_backend, case, dout, dlast), expected, tolerances, terms=dout.astype(np.float64))


def test_tiles_of_a_row_are_joined(device_backend):
    """More pieces than a tile has: two tiles a row, and threads of four warps to a sum."""
    case, dout, dlast = drawn(4, 1, 1, 2 * 2 * conv_lines.THREADS - 6, 4, **ON)
    assert conv_shares.line_share(case["x"])[1][2:] == (7, conv_lines.THREADS, 1, 2)
    assert conv_shares.line_share_backward(case["x"], 4)[1][2:] == (5, 29, 1, 1, 9)
    check(both(device_backend, case, dout, dlast), by_reference(case, dout, dlast))


# Laws


@pytest.mark.parametrize(("width", "seq_idx"), [(4, None), (3, "padded")])
def test_every_family_gives_the_same_bits(device_backend, width, seq_idx):
    """All but dweight and dbias, whose sums over time follow the memory order, and the compiler."""
    case, dout, dlast = drawn(5, 1, 4, 24, width, np.float32, **ON, seq_idx=seq_idx)
    rows = both(device_backend, {**case, "x": side_by_side(case["x"])}, side_by_side(dout), dlast)
    others = [both(device_backend, case, dout, dlast)]
    unaligned = side_by_side(np.pad(case["x"], ((0, 0), (0, 1), (0, 0))))[:, :-1]
    assert family({**case, "x": unaligned}, dout) is conv_any
    others.append(both(device_backend, {**case, "x": unaligned}, side_by_side(dout), dlast))
    for found in others:
        assert all(same_bits(found[k], rows[k]) for k in (0, 1, 2, 5))
        assert all(error(found[k], rows[k]) <= 3e-6 for k in (3, 4))


@pytest.mark.parametrize("kind", ["rows", "lines", "any"])
def test_run_after_run_and_in_any_schedule_the_bits_are_the_same(device_backend, kind):
    case, dout, dlast = drawn(6, 1, 4, 40, 5 if kind == "any" else 4, np.float32, **ON)
    if kind == "rows":
        case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)
    assert family(case, dout).__name__.endswith(kind)
    first = both(device_backend, case, dout, dlast)
    assert same_bits(both(device_backend, case, dout, dlast, seed=1), first)


@pytest.mark.parametrize("kind", ["rows", "lines", "any"])
def test_reverse_is_flip_run_flip(device_backend, kind):
    case, dout, dlast = drawn(7, 1, 4, 12, 5 if kind == "any" else 4, np.float32, **ON)
    place = side_by_side if kind == "rows" else np.ascontiguousarray
    y, last, dx, *others = both(device_backend, {**case, "x": place(case["x"]), "reverse": True}, place(dout), dlast)
    x, dout = place(case["x"][..., ::-1]), place(dout[..., ::-1])
    y_, last_, dx_, *others_ = both(device_backend, {**case, "x": x}, dout, dlast)
    assert same_bits((y, last, dx, *others), (y_[..., ::-1], last_, dx_[..., ::-1], *others_))


@pytest.mark.parametrize("kind", ["rows", "lines", "any"])
def test_nan_reaches_the_next_steps_of_its_channel_and_no_more(device_backend, kind):
    x = np.zeros((2, 4, 12), np.float32)
    x[1, 2, 4] = np.nan
    weight = np.ones((4, 5 if kind == "any" else 4), np.float32)
    x_ = side_by_side(x) if kind == "rows" else x
    y = device_backend.call(
        twin.forward, x_, weight, None, None, activation="silu", seq_idx=None, reverse=False, save=False
    )[0]
    expected = np.zeros(x.shape, bool)
    expected[1, 2, 4 : 4 + weight.shape[1]] = True
    assert same_bits(np.isnan(y), expected)


def test_without_an_option_nothing_is_read_for_it(device_backend):
    case, *_ = drawn(8, 1, 4, 8, 4)
    case = {**case, "x": side_by_side(case["x"])}
    found = both(device_backend, case, None, None)
    check(found, (*reference.forward(**case), 0 * case["x"], 0 * case["weight"], None, None))


# Memory


def test_half_of_a_wider_array_is_read_where_it_lies(device_backend):
    case, *_ = drawn(9, 2, 4, 6, 4)
    with device_backend.running():
        x = device_backend.array(side_by_side(case["x"]))
        options = {"activation": None, "seq_idx": None, "reverse": True, "save": True}
        y, _, saved = twin.forward(x, device_backend.array(case["weight"]), None, None, **options)
        assert saved.prepared[0] is x or saved.prepared[0].base is x.base
    assert y.strides[1] == y.itemsize


def test_weights_may_begin_at_any_number_of_an_array(device_backend):
    """As a model's do whose parameters lie in one array; where a thread reads them by 16 bytes, they are copied."""
    case, dout, dlast = drawn(19, 1, 8, 9, 3, np.float32, **ON)
    case, dout = {**case, "x": side_by_side(case["x"])}, side_by_side(dout)

    def run(weight, bias, x, initial_state, dout, dlast, **options):
        apart = [arrays.empty(x, (p.size + 1,), p.dtype)[1:].reshape(p.shape) for p in (weight, bias)]
        apart[0][...], apart[1][...] = weight, bias
        y, last, saved = twin.forward(x, *apart, initial_state, **options, save=True)
        return y, last, *twin.backward(dout, dlast, saved)

    found = device_backend.call(run, **case, dout=dout, dlast=dlast)
    assert all(same_bits(a, b) for a, b in zip(found, both(device_backend, case, dout, dlast), strict=True))


def test_rows_too_far_apart_for_32_bits_are_served_by_other_kernels():
    for step, kernels in ((2**31 - 4, conv_rows), (2**31, conv_any), (-(2**31), conv_any)):
        x = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (1, 8, 2), (4 * step, 4, 4 * step))
        found = twin._family(4, False, x, x)  # not in the assertion, which would print x
        assert found is kernels


@pytest.mark.parametrize("layout", layouts(np.zeros(1)))
@pytest.mark.parametrize("seq_idx", [None, "padded"])
def test_arguments_may_lie_in_any_memory(device_backend, layout, seq_idx):
    if not on_device(device_backend, layout):
        pytest.skip("CuPy has no such arrays")
    case, dout, dlast = drawn(10, 1, 2, 5, 4, **ON, seq_idx=seq_idx)
    expected = by_reference(case, dout, dlast)
    case = {k: layouts(x)[layout] if isinstance(x, np.ndarray) else x for k, x in case.items()}
    check(both(device_backend, case, layouts(dout)[layout], layouts(dlast)[layout]), expected)


def test_results_follow_the_memory_order_of_x(device_backend):
    case, dout, _ = drawn(11, 2, 5, 9, 4)
    for x, axis in ((case["x"], 2), (side_by_side(case["x"]), 1)):
        y, _, dx, *_ = both(device_backend, {**case, "x": x}, dout, None)
        assert y.strides[axis] == dx.strides[axis] == 8


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count():
    """The last steps of a long row are those of a short one, in both orders of memory."""
    device, seqlen = backends.backend("gpu"), 2**25 + 64
    case, *_ = drawn(15, 1, 64, 64, 4, ml_dtypes.bfloat16, bias=True, activation="silu")
    options = {"activation": "silu", "seq_idx": None, "reverse": False, "save": False}
    weight, bias, tail = (device.array(case[name]) for name in ("weight", "bias", "x"))
    wanted = twin.forward(tail, weight, bias, None, **options)[0]
    for shape, axes in (((1, 64, seqlen), (0, 1, 2)), ((1, seqlen, 64), (0, 2, 1))):
        x = arrays.zeros(tail, shape, tail.dtype).transpose(axes)
        x[..., -64:] = tail
        with device.running():
            y, last, _ = twin.forward(x, weight, bias, None, **options)
        assert same_bits(device.numpy(y[..., -61:].copy()), device.numpy(wanted[..., 3:].copy()))
        assert same_bits(device.numpy(last), case["x"][..., -3:].astype(np.float32))


@pytest.mark.gpu
def test_more_batch_rows_than_a_grid_has_along_y():
    case, dout, dlast = drawn(16, 70_000, 4, 4, 4, np.float32, **ON)
    found = both(backends.backend("gpu"), case, dout, dlast)
    check(found, by_reference(case, dout, dlast), 3e-6, terms=dout)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 9), (2, 0, 9), (0, 0, 0)])
@pytest.mark.parametrize("width", [1, 4])
def test_without_steps_the_state_stays_and_the_weights_have_gradient_zero(device_backend, shape, width):
    case, dout, dlast = drawn(12, *shape, width, **ON)
    y, last, dx, dweight, dbias, dinitial = both(device_backend, case, dout, dlast)
    assert (y.shape, dx.shape) == (shape, shape)
    assert shape[2] or same_bits((last, dinitial), (case["initial_state"], dlast))
    assert same_bits((dweight, dbias), (np.zeros_like(case["weight"]), np.zeros_like(case["bias"])))
    *_, dbias, _ = both(device_backend, {**case, "bias": None}, dout, dlast)
    assert dbias is None


# One step


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_step_by_step_is_the_convolution(device_backend, dtype, width):
    case, *_ = drawn(13, 2, 5, 4, width, dtype, **ON)
    y, last, *_ = device_backend.call(twin.forward, **{**case, "seq_idx": None, "reverse": False}, save=False)

    def steps(state, xs, weight, bias):
        return [twin.update(state, x, weight, bias, activation="silu") for x in xs], state

    xs = [case["x"][..., t] for t in range(4)]
    found, state = device_backend.call(steps, case["initial_state"], xs, case["weight"], case["bias"])
    assert same_bits((np.stack(found, axis=-1), state), (y, last))


@pytest.mark.parametrize("name", ["state", "x", "weight", "bias"])
def test_any_memory_of_a_step_gives_the_same_bits(device_backend, name):
    case, *_ = drawn(14, 3, 5, 1, 4, np.float32, **ON)
    arguments = {"state": case["initial_state"], "x": case["x"][..., 0], "weight": case["weight"], "bias": case["bias"]}

    def run(state, x, weight, bias):
        return twin.update(state, x, weight, bias, activation="silu"), state

    def fresh(x):
        return arguments | {"state": arguments["state"].copy(), name: x}

    expected = device_backend.call(run, **fresh(arguments[name].copy()))
    for layout, x in layouts(arguments[name]).items():
        if layout != "read-only" and on_device(device_backend, layout):
            y, state = device_backend.call(run, **fresh(x))
            assert same_bits((y, state.astype(np.float32)), expected), layout
