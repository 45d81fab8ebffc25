"""One step of the scan in place: it is the scan, to the bit."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, run_without_compiler, same_bits
from cases import DIMS, DSTATES, ScanSpec, parameter_dtype, scan_case, scan_specs
from hypothesis import given

import npmamba.ops
from npmamba.autodiff.tape import pullback
from npmamba.cpu import runtime
from npmamba.cpu import selective_state_update as cpu
from npmamba.ops.selective_scan import selective_scan
from npmamba.ops.selective_state_update import selective_state_update
from npmamba.reference import selective_state_update as reference

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus"}
ON = {"D": True, "z": True, "delta_bias": True, "delta_softplus": True}


def one_number_of_groups(spec: ScanSpec) -> ScanSpec:
    """Where both B and C have groups, they have as many."""
    B, C = spec.options["B"], spec.options["C"]
    return replace(spec, options={**spec.options, "C": B if isinstance(B, int) and isinstance(C, int) else C})


# No batch equals a dim: then a constant B would be read as (batch, dstate).
steps = scan_specs(batches=(2, 3), lengths=(1, 2, 5), dims=DIMS, dstates=DSTATES).map(one_number_of_groups)


def scan_and_state(spec: ScanSpec, dtype):
    """Return the arguments of a scan without packing, and a fresh state to begin with."""
    case = {**spec.arguments(dtype), "seq_idx": None, "reverse": False}
    if case["initial_state"] is None:
        case["initial_state"] = np.zeros(spec.state_shape, parameter_dtype(dtype))
    return case, case["initial_state"].copy()


def at(case, t):
    """Return the arguments of the update for step `t` of a scan, without the state."""
    moving = [k for k, v in case.items() if k in ("u", "delta", "z") and v is not None]
    moving += [k for k in ("B", "C") if case[k].ndim > 2]
    step = {k: v[..., t] if k in moving else v for k, v in case.items()}
    return {NAMES.get(k, k): v for k, v in step.items() if k not in ("initial_state", "seq_idx", "reverse")}


def drawn(seed, batch, dim, dstate, dtype=np.float64, **options):
    """Return the state and the other arguments of an update."""
    case = scan_case(np.random.default_rng(seed), batch, dim, 1, dstate, dtype=dtype, initial_state=True, **options)
    return case["initial_state"], at(case, 0)


def update(state, step):
    """Return y and the new state, and leave `state` alone."""
    state = state.copy(order="K")
    return selective_state_update(state, **step), state


@pytest.mark.parametrize("dtype", FLOATS)
@given(steps)
def test_step_by_step_is_the_scan(dtype, spec):
    case, state = scan_and_state(spec, dtype)
    y, last = selective_scan(**case, return_last_state=True)
    found = [selective_state_update(state, **at(case, t)) for t in range(spec.seqlen)]
    assert same_bits((np.stack(found, axis=-1), state), (y, last))


@given(steps)
def test_float64_is_the_reference(spec):
    case, state = scan_and_state(spec, np.float64)
    y, new = reference.forward(state, **at(case, 0))
    assert error(selective_state_update(state, **at(case, 0)), y) <= 1e-12
    assert error(state, new) <= 1e-12


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_output_has_the_dtype_of_x_and_the_state_keeps_its_own(dtype):
    state, step = drawn(0, 2, 5, 3, dtype, **ON)
    y, new = update(state, step)
    assert (y.dtype, new.dtype) == (dtype, parameter_dtype(dtype))


# Laws


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_batch_row_has_the_same_bits_alone(dtype):
    state, step = drawn(1, 3, 48, 16, dtype, B=4, C=4, **ON)
    y, new = update(state, step)
    for b in range(3):
        row = {k: v[b : b + 1] if k in ("x", "dt", "B", "C", "z") else v for k, v in step.items()}
        assert same_bits(update(state[b : b + 1], row), (y[b : b + 1], new[b : b + 1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)
    state, step = drawn(2, 3, 300, 5, dtype, C="constant", **ON)
    results = []
    try:
        for threads in (1, 2, 8):
            runtime.set_num_threads(threads)
            results.append(update(state, step))
    finally:
        runtime.set_num_threads(None)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
@pytest.mark.parametrize("C", ["constant", "variable", 3])
def test_any_memory_gives_the_same_bits(name, C):
    state, step = drawn(3, 2, 21, 4, np.float32, C=C, **ON)
    expected = update(state, step)
    arguments = {"state": state, **step}
    others = layouts(arguments[name])
    if arguments[name].ndim == 3:
        others["channels side by side"] = np.ascontiguousarray(arguments[name].swapaxes(1, 2)).swapaxes(1, 2)
    for layout, x in others.items():
        if (layout, name) != ("read-only", "state"):
            changed = {**arguments, "state": state.copy(), name: x}
            y = selective_state_update(**changed)
            assert same_bits((y, changed["state"].astype(np.float32)), expected), layout


def test_a_state_of_the_other_byte_order_is_changed_in_place():
    state, step = drawn(9, 2, 5, 3, **ON)
    swapped = state.astype(state.dtype.newbyteorder())
    y, new = update(state, step)
    assert same_bits(selective_state_update(swapped, **step), y)
    assert swapped.tolist() == new.tolist() != state.tolist()


def test_rows_of_a_step_are_copied_only_where_their_numbers_are_apart():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for row in (x, x[:, 0], x[:, :2, :1], x[..., ::4], x[..., 1:3]):
        assert np.shares_memory(cpu._row(row, row.shape, row.dtype), x)
    for row in (x[..., ::2], x.T, x[..., ::-1]):
        found = cpu._row(row, row.shape, row.dtype)
        assert found.strides[-1] == 4
        np.testing.assert_array_equal(found, row)
    assert cpu._row(None, (2, 3), np.dtype(np.float32)).tolist() == [[0.0] * 3] * 2


def test_there_are_at_most_256_states():
    for dstate in (256, 257):
        state, step = drawn(4, 1, 1, dstate)
        if dstate == 256:
            assert update(state, step)[0].shape == (1, 1)
        else:
            with pytest.raises(ValueError, match="A has dstate=257; dstate must be at most 256"):
                update(state, step)


def test_only_the_state_is_changed():
    state, step = drawn(4, 2, 5, 3, **ON)
    before = {k: v.copy() for k, v in step.items() if isinstance(v, np.ndarray)}
    y, _ = update(state, step)
    assert all(same_bits(step[k], v) for k, v in before.items())
    assert not any(np.shares_memory(y, step[k]) for k in before)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_a_step_of_zero_keeps_the_state_even_for_an_infinite_rate(discretization):
    state, step = drawn(5, 2, 5, 3, discretization=discretization)
    step["dt"][...] = 0
    step["A"][:, 0] = -np.inf
    y, new = update(state, step)
    assert same_bits(new, state)
    step["dt"][...] = 1
    assert np.isfinite(update(state, step)[1]).all()


def test_nan_stays_in_its_channel():
    state, step = drawn(6, 2, 5, 3, **ON)
    step["x"][1, 2] = np.nan
    y, new = update(state, step)
    expected = np.zeros((2, 5), bool)
    expected[1, 2] = True
    assert same_bits(np.isnan(y), expected)
    assert same_bits(np.isnan(new), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(("batch", "dim"), [(0, 3), (2, 0), (0, 0)])
def test_without_channels_or_rows_the_result_is_empty(batch, dim):
    state, step = drawn(7, batch, dim, 4, **ON)
    assert update(state, step)[0].shape == (batch, dim)


def test_two_axes_are_read_as_batch_and_dstate_where_batch_equals_dim():
    state, step = drawn(8, 4, 4, 3)
    expected = update(state, {**step, "B": step["B"][:, None]})
    assert same_bits(update(state, step), expected)


# Errors


STATE, X, A, M, D = np.zeros((2, 4, 3)), np.ones((2, 4)), -np.ones((4, 3)), np.ones((2, 3)), np.ones(4)
F32 = np.float32


def call(**changes):
    arguments = {"state": STATE, "x": X, "dt": X, "A": A, "B": M, "C": M, **changes}
    return selective_state_update(**arguments)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"state": None}, TypeError, "state must be a NumPy or CuPy array, got None"),
        ({"x": None}, TypeError, "x must be a NumPy or CuPy array, got None"),
        ({"B": [1.0]}, TypeError, "B must be a NumPy or CuPy array, got list"),
        ({"state": read_only(STATE)}, ValueError, "state is changed in place, but it is read-only"),
        ({"state": STATE.astype(F32)}, TypeError, "state must be float64 because x is float64, got float32"),
        ({"x": X.astype(int)}, TypeError, "x must be float16, bfloat16, float32 or float64, got int64"),
        ({"dt": X.astype(F32)}, TypeError, "dt must be float64 because x is float64, got float32"),
        ({"D": D.astype(F32)}, TypeError, "D must be float64 because x is float64, got float32"),
        (
            {"x": X[:, :3]},
            ValueError,
            "dt has dim=4, but x has dim=3; dt must be (batch, dim), got shape (2, 4)",
        ),
        (
            {"x": X[..., None]},
            ValueError,
            "x has 3 axes; x must be (batch, dim), got shape (2, 4, 1)",
        ),
        (
            {"state": STATE[:, :, :2]},
            ValueError,
            "state has dstate=2, but A has dstate=3; state must be (batch, dim, dstate), got shape (2, 4, 2)",
        ),
        (
            {"B": np.ones((3, 3))},
            ValueError,
            "B has batch=3, but x has batch=2; B must be (batch, dstate) or (dim, dstate) or (batch, groups, dstate), "
            "got shape (3, 3)",
        ),
        (
            {"C": np.ones((4, 2))},
            ValueError,
            "C has dstate=2, but A has dstate=3; C must be (dim, dstate) or (batch, groups, dstate), got shape (4, 2)",
        ),
        (
            {"B": np.ones((2, 3, 3))},
            ValueError,
            "B has groups=3, but x has dim=4; groups must divide dim",
        ),
        ({"A": A[:, :0]}, ValueError, "A has dstate=0; dstate must be at least 1"),
        ({"dt_softplus": 1}, TypeError, "dt_softplus must be True or False, got 1"),
        ({"discretization": "tustin"}, ValueError, "discretization must be one of 'euler', 'zoh', got 'tustin'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(changes, kind, message):
    if "A" in changes:
        changes = {**changes, "state": STATE[..., :0]}
    with pytest.raises(kind) as caught:
        call(**changes)
    assert str(caught.value) == f"selective_state_update: {message}"


def test_two_maps_must_agree_on_their_groups():
    with pytest.raises(ValueError, match="C has groups=4, but B has groups=2"):
        call(B=np.ones((2, 2, 3)), C=np.ones((2, 4, 3)))


def test_a_traced_value_is_sent_to_the_scan():
    with pytest.raises(TypeError, match="x is traced, but a step in place has no gradient; use selective_scan"):
        pullback(lambda x: call(x=x), X)


# The page, and the kernels without the compiler


def test_the_worked_example_of_the_page_holds():
    page = Path(npmamba.ops.__file__).with_name("selective_state_update.md")
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert (failed, attempted > 3) == (0, True)


def test_the_kernels_run_without_the_compiler():
    run_without_compiler("""
import numpy as np
from npmamba.ops.selective_state_update import selective_state_update
from npmamba.reference import selective_state_update as reference
rng = np.random.default_rng(0)
state, (x, dt, z) = rng.standard_normal((2, 19, 3)), rng.standard_normal((3, 2, 19))
A, B, (D, bias) = -np.exp(rng.standard_normal((19, 3))), rng.standard_normal((2, 3)), rng.standard_normal((2, 19))
for rule in ("euler", "zoh"):
    for C in (A, B, B[:, None]):
        y, new = reference.forward(state, x, dt, A, B, C, D, z, bias, True, discretization=rule)
        found = selective_state_update(state, x, dt, A, B, C, D, z, bias, True, discretization=rule)
        np.testing.assert_allclose(found, y, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state, new, rtol=1e-11, atol=1e-13)
""")
