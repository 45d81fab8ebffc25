"""Test cases of `npmamba.testing`: one line makes them again, and a script shows what a function makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.testing.cases import (
    CASE_LAYOUTS,
    ConvCase,
    ConvOptions,
    ScanCase,
    ScanOptions,
    UpdateCase,
    UpdateOptions,
)
from npmamba.testing.cases import given as given_arguments
from npmamba.testing.layouts import LAYOUTS, copied, laid_out
from npmamba.testing.strategies import conv_cases, scan_cases, update_cases
from npmamba.testing.values import CONV_MAGNITUDES, MAGNITUDES, Numbers, finfo, parameter_dtype

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
cases = st.one_of(scan_cases(special=True), conv_cases(special=True), update_cases(special=True))
RECORDS = {r.__name__: r for r in (ScanCase, ScanOptions, ConvCase, ConvOptions, UpdateCase, UpdateOptions)}


def arrays(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}


def bits(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: (x.dtype, x.strides, x.tobytes()) for n, x in arrays(arguments).items()}


@given(cases)
def test_the_repr_of_a_case_is_one_line_that_makes_it_again(case):
    line = repr(case)
    assert "\n" not in line
    again = eval(line, RECORDS)
    assert again == case
    assert hash(again) == hash(case)
    assert bits(again.arguments(np.float32)) == bits(case.arguments(np.float32))


@given(cases, st.sampled_from(DTYPES))
def test_arguments_have_the_dtypes_of_the_operations(case, dtype):
    wide = ("A", "D", "delta_bias", "dt_bias", "initial_state", "state", "weight", "bias")
    for name, x in arrays(case.arguments(dtype)).items():
        expected = np.int32 if name == "seq_idx" else parameter_dtype(dtype) if name in wide else dtype
        assert x.dtype.newbyteorder("=") == np.dtype(expected), name
    dout, dlast_state = case.cotangents(dtype)
    assert dout.dtype.newbyteorder("=") == np.dtype(dtype)
    assert dlast_state.shape == case.state_shape
    assert dout.shape == case.arguments(dtype)["u" if isinstance(case, ScanCase) else "x"].shape


@given(st.one_of(scan_cases(), conv_cases(), update_cases()), st.sampled_from(DTYPES))
def test_numbers_of_every_magnitude_stay_in_the_range_of_their_dtype(case, dtype):
    for name, x in arrays(case.arguments(dtype)).items():
        assert np.isfinite(x.astype(np.float64)).all(), name


@given(scan_cases(magnitudes=["tame", "slow", "flat", "fast", "growing"]))
def test_shorter_floats_are_the_same_numbers_rounded(case):
    short, long = case.arguments(np.float32), case.arguments(np.float64)
    for name, x in arrays(long).items():
        np.testing.assert_array_equal(short[name], x.astype(short[name].dtype))


@given(st.one_of(scan_cases(special=True), conv_cases(special=True), update_cases(special=True)))
def test_a_special_value_stands_at_one_place_of_its_argument(case):
    arguments = case.arguments()
    wrong = {name: ~np.isfinite(x) for name, x in arrays(arguments).items()}
    places = {name: np.argwhere(x).tolist() for name, x in wrong.items() if x.any()}
    if case.special is None:
        assert places == {}
    else:
        name, value = case.special
        assert places == {name: [list(case.special_index(arguments))]}
        np.testing.assert_equal(arguments[name][case.special_index(arguments)], float(value))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [*DTYPES, np.int32])
def test_a_layout_changes_no_value(layout, shape, dtype):
    x = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    y = laid_out(x, layout)
    np.testing.assert_array_equal(y.astype(np.float64), x.astype(np.float64))
    assert not np.shares_memory(x, y)
    assert y.dtype.newbyteorder("=") == x.dtype


def test_a_layout_is_what_its_name_says():
    x = np.arange(24.0).reshape(2, 3, 4)
    made = {name: laid_out(x, name) for name in LAYOUTS}
    assert made["C"].flags.c_contiguous
    assert made["F"].flags.f_contiguous
    assert made["channels"].swapaxes(1, 2).flags.c_contiguous
    assert made["slice"].strides == (8 * 4 * 10, 8, 8 * 10)
    assert all(abs(stride) >= 16 for stride in made["strided"].strides)
    assert all(stride < 0 for stride in made["negative"].strides)
    assert [name for name in made if not made[name].flags.writeable] == ["readonly"]
    assert [name for name in made if not made[name].dtype.isnative] == ["swapped"]
    assert [name for name in made if not made[name].flags.aligned] == ["unaligned"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_lies_in_memory_as_the_array_does(layout, dtype):
    for shape in ((2, 3, 4), (1, 1), (0, 3)):
        x = laid_out(np.random.default_rng(0).standard_normal(shape).astype(dtype), layout)
        y = copied(x)
        assert not np.shares_memory(x, y)
        np.testing.assert_array_equal(y.astype(float), x.astype(float))
        assert (y.dtype, y.flags.writeable) == (x.dtype, x.flags.writeable) or not x.size
        assert (y.strides, y.flags.aligned) == (x.strides, x.flags.aligned) or not x.size


def test_a_mixed_case_has_a_layout_of_its_own_for_every_argument():
    case = ScanCase(2, 3, 4, 2, ScanOptions(D=True, z=True, initial_state=True), layout="mixed")
    plain = ScanCase(2, 3, 4, 2, ScanOptions(D=True, z=True, initial_state=True)).arguments()
    mixed = case.arguments()
    assert len({x.strides for x in arrays(mixed).values() if x.shape == (2, 3, 4)}) > 1
    for name, x in arrays(plain).items():
        np.testing.assert_array_equal(mixed[name], x)


@pytest.mark.parametrize("layout", CASE_LAYOUTS)
def test_the_state_of_an_update_can_be_written_in_every_layout(layout):
    for seed in range(10):
        assert UpdateCase(2, 3, 4, layout=layout, seed=seed).arguments()["state"].flags.writeable


def test_magnitudes_reach_the_borders():
    def drawn(magnitude, **options):
        return ScanCase(2, 20, 50, 8, ScanOptions(**options), magnitude=magnitude).arguments(np.float32)

    with np.errstate(over="ignore"):
        raw = drawn("saturated", delta_softplus=True)["delta"]
        assert np.isinf(np.exp(raw)).any()
        assert (np.exp(raw) == 0).any()
    assert drawn("slow")["delta"].max() <= 1.1e-5
    assert drawn("fast")["A"].min() < -3e4
    assert (drawn("flat")["A"] == 0).any()
    assert (drawn("growing")["A"] > 0).any()
    assert np.abs(drawn("huge")["u"]).max() > 1e19
    assert np.abs(drawn("tiny")["u"]).max() < 1e-18
    wide = np.abs(drawn("wide")["B"])
    assert wide.max() / wide.min() > 1e5
    assert set(CONV_MAGNITUDES) <= set(MAGNITUDES)
    tame = drawn("tame", delta_bias=True)
    step = tame["delta"] + tame["delta_bias"][:, None]
    assert 0.99e-3 < step.min()
    assert step.max() < 0.101


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_tiny_numbers_are_the_square_roots_of_the_range(dtype):
    largest = float(finfo(dtype).max)
    for magnitude, size in (("huge", largest**0.5), ("tiny", largest**-0.5)):
        x = np.abs(Numbers(np.random.default_rng(0), magnitude, dtype).signal(1000))
        assert 0.5 < np.median(x) / size < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScanCase(1, 1, 1, 0), "ScanCase: dstate=0 is too small"),
        (lambda: ScanCase(1, -1, 1, 1), "ScanCase: dim=-1 is too small"),
        (lambda: ConvCase(1, 1, 1, 0), "ConvCase: width=0 is too small"),
        (lambda: ScanCase(1, 3, 1, 1, ScanOptions(B=2)), "ScanCase: B=2 groups do not divide dim=3"),
        (lambda: ScanCase(1, 1, 1, 1, magnitude="big"), "ScanCase: magnitude must be one of 'tame', .* got 'big'"),
        (lambda: ConvCase(1, 1, 1, 1, magnitude="slow"), "ConvCase: magnitude must be one of .*, got 'slow'"),
        (lambda: ScanCase(1, 1, 1, 1, layout="G"), "ScanCase: layout must be one of 'C', .* got 'G'"),
        (lambda: ScanCase(1, 1, 1, 1, special=("u", "0")), "ScanCase: special must be"),
        (lambda: ScanOptions(B="groups"), "ScanOptions: B must be 'variable', 'constant' or a number of groups"),
        (lambda: ScanOptions(C=0), "ScanOptions: C must be"),
        (lambda: ScanOptions(seq_idx="some"), "ScanOptions: seq_idx must be one of None, 'runs'"),
        (lambda: UpdateOptions(discretization="rk4"), "UpdateOptions: discretization must be one of 'euler', 'zoh'"),
        (lambda: ConvOptions(activation="relu"), "ConvOptions: activation must be one of None, 'silu', got 'relu'"),
        (lambda: ScanCase(1, 1, 1, 1).script("scan"), "script: target must be 'module:function', got 'scan'"),
    ],
)
def test_a_case_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_off_need_not_be_known_to_a_function():
    off = given_arguments(ScanCase(1, 1, 1, 1).arguments())
    assert list(off) == ["u", "delta", "A", "B", "C"]
    on = ScanCase(1, 1, 1, 1, ScanOptions(D=True, seq_idx="runs", discretization="zoh", reverse=True)).arguments()
    assert {"D", "seq_idx", "discretization", "reverse"} == given_arguments(on).keys() - off.keys()


SCANS = """
import numpy as np

def right(u, delta, A, B, C, return_last_state=False):
    h, y = np.zeros((u.shape[0], *A.shape), A.dtype), np.zeros_like(u)
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = np.exp(step * A) * h + step * B[:, None, :, t] * u[:, :, t, None]
        y[:, :, t] = (h * C[:, None, :, t]).sum(-1)
    return (y, h) if return_last_state else y

def late(u, delta, A, B, C):
    return right(u, delta, A, B, np.roll(C, 1, -1))

class Namespace:
    late = staticmethod(late)
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "failure.py"
    file.write_text(script, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(file)]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("function", "status", "dtype"),
    [("right", 0, np.float32), ("late", 1, np.float64), ("Namespace.late", 1, ml_dtypes.bfloat16)],
)
def test_the_script_of_a_case_shows_a_difference_where_there_is_one(function, status, dtype, tmp_path):
    (tmp_path / "kernels.py").write_text(SCANS, encoding="utf-8")
    script = ScanCase(1, 2, 3, 2, magnitude="flat", layout="negative", seed=3).script(f"kernels:{function}", dtype)
    done = run(script, tmp_path)
    assert done.stderr == ""
    assert done.returncode == status
    assert "u = array([[[" in done.stdout
    assert ("WRONG" in done.stdout) == bool(status)
    assert ("last_state: ok" in done.stdout) == (function == "right")


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (ConvCase(1, 2, 3, 2, ConvOptions(bias=True, activation="silu")), "npmamba:causal_conv1d"),
        (UpdateCase(1, 2, 3, UpdateOptions(z=True)), "npmamba:selective_state_update"),
    ],
)
def test_the_other_operations_have_scripts_too(case, target, tmp_path):
    done = run(case.script(target, np.float32), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "y: ok" in done.stdout
    assert "last_state: ok" in done.stdout


@pytest.mark.parametrize(
    ("package", "program"),
    [
        ("hypothesis", "import npmamba.testing.strategies"),
        ("mpmath", "from npmamba.testing import cases, oracles\n"
                   "oracles.multiprecision(cases.ScanCase(1, 1, 1, 1).arguments())"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, program):
    program = f"import sys\nsys.modules['{package}'] = None\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: npmamba.testing.")
    assert f"needs the package {package}, which the extra `fuzz` brings" in said
    assert 'pip install "npmamba[fuzz]"' in said


def test_cases_and_oracles_need_no_extra_and_compile_no_kernel():
    program = (
        "import sys; from npmamba.testing import cases, oracles, tolerance, comparison\n"
        "oracles.exact_scan(cases.ScanCase(1, 1, 2, 1).arguments())\n"
        "print([m for m in ('hypothesis', 'mpmath', 'greenlet', 'numba', 'scipy.signal') if m in sys.modules])"
    )
    uncounted = {name: x for name, x in os.environ.items() if not name.startswith("COV")}  # coverage loads greenlet
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=uncounted
    )
    assert done.stdout == "[]\n"
