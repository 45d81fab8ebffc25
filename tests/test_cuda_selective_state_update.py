"""One step of the scan on CUDA: against the reference, on any memory, in place."""

from __future__ import annotations

import inspect

import backends
import ml_dtypes
import numpy as np
import pytest
from arrays import error, layouts, same_bits
from cases import parameter_dtype, scan_case, scan_specs
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cpu import selective_state_update as cpu
from npmamba.cuda import arrays
from npmamba.cuda import selective_state_update as twin
from npmamba.reference import selective_state_update as reference

NAMES = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus"}
ON = {"D": True, "z": True, "delta_bias": True, "delta_softplus": True}


def as_step(case):
    """Return the state and the other arguments of an update, from those of a scan of one step."""
    case = {**case}
    state = case.pop("initial_state")
    moving = {"u", "delta", "z"} | {k for k in ("B", "C") if case[k].ndim > 2}
    step = {NAMES.get(k, k): v[..., 0] if k in moving and v is not None else v for k, v in case.items()}
    return state, {k: v for k, v in step.items() if k not in ("seq_idx", "reverse")}


def drawn(seed, batch, dim, dstate, dtype=np.float64, **options):
    options = {"initial_state": True, **options}
    return as_step(scan_case(np.random.default_rng(seed), batch, dim, 1, dstate, dtype=dtype, **options))


def update(device, state, step, seed=None):
    """Return y and the new state; `state` stays as it is."""

    return device.call(in_place, state.copy(order="K"), step, seed=seed)


def in_place(state, step):
    return twin.forward(state, **step), state


def by_reference(state, step):
    return reference.forward(state, **step)


def test_functions_are_those_of_the_cpu_twin():
    found, wanted = (list(inspect.signature(t.forward).parameters) for t in (twin, cpu))
    assert found == wanted


@settings(max_examples=12)
@given(scan_specs(batches=(2, 3), dims=(1, 5, 12), lengths=(1,), dstates=(1, 3, 16, 17)), st.booleans())
def test_float64_is_the_reference(device_backend, spec, channels_first):
    options = {**spec.options, "initial_state": True, "seq_idx": None}
    options["C"] = options["B"] if isinstance(options["B"], int) else options["C"]  # one number of groups
    state, step = drawn(spec.seed, spec.batch, spec.dim, spec.dstate, **options)
    state = state if channels_first else np.ascontiguousarray(state.swapaxes(1, 2)).swapaxes(1, 2)
    found, wanted = update(device_backend, state, step, spec.seed), by_reference(state, step)
    assert error(found[0], wanted[0]) <= 1e-12
    assert error(found[1], wanted[1]) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 2e-6), (np.float16, 1e-3), (ml_dtypes.bfloat16, 8e-3)],
    ids=["float32", "float16", "bfloat16"],
)  # fmt: skip
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_shorter_types_are_computed_in_float32_and_rounded_once(device_backend, dtype, tolerance, discretization):
    state, step = drawn(1, 2, 6, 16, dtype, **ON, discretization=discretization)
    found, wanted = update(device_backend, state, step), by_reference(state, step)
    assert (found[0].dtype, found[1].dtype) == (dtype, parameter_dtype(dtype))
    assert error(found[0], wanted[0]) <= tolerance
    assert error(found[1], wanted[1]) <= 2e-6


@pytest.mark.parametrize("dstate", [128, 132, 256])
def test_a_lane_takes_turns_where_states_are_many(device_backend, dstate):
    state, step = drawn(2, 1, 2, dstate, **ON)
    found, wanted = update(device_backend, state, step), by_reference(state, step)
    assert max(error(found[0], wanted[0]), error(found[1], wanted[1])) <= 1e-12


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
@pytest.mark.parametrize("C", ["constant", "variable", 3])
def test_any_memory_gives_the_same_bits(device_backend, name, C):
    """Rows of four states, also where they are aligned and where they are not."""
    state, step = drawn(3, 2, 6, 4, np.float32, C=C, **ON)
    expected = update(device_backend, state, step)
    others = layouts(step[name] if name in step else state)
    if name in ("state", "B"):
        x = state if name == "state" else step["B"]
        others["first axes exchanged"] = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
        others["last axes exchanged"] = np.ascontiguousarray(x.swapaxes(-2, -1)).swapaxes(-2, -1)
    for layout, x in others.items():
        device_has = device_backend.name == "interpreter" or layout not in ("byte-swapped", "unaligned")
        if device_has and (layout, name) != ("read-only", "state"):
            arguments = (x, step) if name == "state" else (state.copy(), {**step, name: x})
            y, new = device_backend.call(in_place, *arguments)
            assert same_bits((y, new.astype(np.float32)), expected), layout


@pytest.mark.parametrize("dstate", [12, 16, 20, 64])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_large_states_have_the_same_bits_with_channels_side_by_side(device_backend, monkeypatch, dstate, dtype):
    """There a lane has sixteen states instead of eight."""
    monkeypatch.setattr(twin, "_FEW", 0)
    monkeypatch.setattr(twin, "_MANY", 0)
    state, step = drawn(3, 3, 37, dstate, dtype, **ON)
    y, new = update(device_backend, np.ascontiguousarray(state), step)
    channels = np.ascontiguousarray(state.swapaxes(1, 2)).swapaxes(1, 2)
    found_y, found = update(device_backend, channels, step)
    assert same_bits(found_y, y)
    assert same_bits(np.ascontiguousarray(found), np.ascontiguousarray(new))


def test_a_view_with_gaps_is_changed_and_nothing_between(device_backend):
    state, step = drawn(4, 2, 5, 4, np.float32, **ON)
    wide = np.full((2, 5, 9), 7, np.float32)
    wide[..., 2:6] = state
    with device_backend.running():
        held = device_backend.array(wide)
        twin.forward(held[..., 2:6], **{k: device_backend.array(v) for k, v in step.items()})
    held = device_backend.numpy(held)
    assert same_bits(held[..., 2:6].copy(), update(device_backend, state, step)[1])
    held[..., 2:6] = 7
    assert (held == 7).all()


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_a_step_of_zero_keeps_the_state_even_for_an_infinite_rate(device_backend, discretization):
    state, step = drawn(5, 2, 5, 3, discretization=discretization)
    step["dt"][...] = 0
    step["A"][:, 0] = -np.inf
    assert same_bits(update(device_backend, state, step)[1], state)
    step["dt"][...] = 1
    assert np.isfinite(update(device_backend, state, step)[1]).all()


def test_nan_stays_in_its_channel(device_backend):
    state, step = drawn(6, 2, 5, 3, **ON)
    step["x"][1, 2] = np.nan
    y, new = update(device_backend, state, step)
    expected = np.zeros((2, 5), bool)
    expected[1, 2] = True
    assert same_bits(np.isnan(y), expected)
    assert same_bits(np.isnan(new), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count():
    """The last row of a huge batch is stepped like that row alone, up to the order in which a few rows are summed."""
    device, batch = backends.backend("gpu"), 2**20 + 1
    _, step = drawn(9, 2, 64, 33, np.float32, **ON)
    step = {k: device.array(v[:1] if k in ("x", "dt", "B", "C", "z") else v) for k, v in step.items()}
    state = arrays.zeros(step["x"], (1, 64, 33), np.float32)
    many = arrays.zeros(step["x"], (batch, 64, 33), np.float32)
    rows = {k: v.repeat(batch, axis=0) if k in ("x", "dt", "B", "C", "z") else v for k, v in step.items()}
    y, y_many = twin.forward(state, **step), twin.forward(many, **rows)
    for found, wanted in ((y_many[-1:].copy(), y), (many[-1:].copy(), state)):
        np.testing.assert_allclose(device.numpy(found), device.numpy(wanted), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("batch", "dim"), [(0, 3), (2, 0), (0, 0)])
def test_without_channels_or_rows_the_result_is_empty(device_backend, batch, dim):
    state, step = drawn(7, batch, dim, 4, **ON)
    assert device_backend.call(lambda s, step: twin.forward(s, **step), state, step).shape == (batch, dim)


def test_two_axes_are_read_as_batch_and_dstate_where_batch_equals_dim(device_backend):
    state, step = drawn(8, 4, 4, 3)
    expected = update(device_backend, state, {**step, "B": step["B"][:, None]})
    assert same_bits(update(device_backend, state, step), expected)
