"""The verdict: what is right passes and is told how hard it was tried; what is wrong is broken by a small case."""

from __future__ import annotations

import collections
import importlib
import inspect
import subprocess
import sys
import types
from dataclasses import replace
from typing import Any

import fake_cupy
import numpy as np
import pytest

import npmamba
from npmamba import cli
from npmamba.testing import fuzz
from npmamba.testing.adapters import adapted, as_numpy
from npmamba.testing.capabilities import Capabilities
from npmamba.testing.conv_tools import Conv
from npmamba.testing.step_laws import as_scan
from npmamba.testing.verdict import Counterexample, check_conv1d, check_scan, check_state_update

SMALL: dict[str, Any] = {"max_examples": 15, "seed": 0, "max_size": 500}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_our_operations_are_not_broken(dtype):
    scan = {"backward": npmamba.selective_scan_backward, "step": npmamba.selective_state_update}
    report = check_scan(npmamba.selective_scan, dtype=dtype, nonfinite=True, **scan, **SMALL)
    assert (report.examples, report.dtype) == (15, dtype)
    assert {"y", "last_state", "du", "ddelta", "dA"} <= report.worst.keys()
    assert report.held["a_scan_is_the_scan_of_its_parts"] > 0
    conv = check_conv1d(npmamba.causal_conv1d, backward=npmamba.causal_conv1d_backward, dtype=dtype, **SMALL)
    assert {"y", "last_state", "dx", "dweight"} <= conv.worst.keys()
    assert check_state_update(npmamba.selective_state_update, dtype=dtype, **SMALL).worst.keys() == {"y", "last_state"}


def test_the_same_seed_tries_the_same_cases():
    one, two = (check_conv1d(npmamba.causal_conv1d, **SMALL) for _ in range(2))
    assert one.worst == two.worst
    assert "seed 0" in str(one)


def forgetful(u, delta, A, B, C, D=None, *, return_last_state=False):
    """A scan that forgets its state after 64 steps."""
    now = (u[..., :64], delta[..., :64], A, B[..., :64], C[..., :64], D)
    y, last = npmamba.selective_scan(*now, return_last_state=True)
    if u.shape[2] > 64:
        rest, last = forgetful(u[..., 64:], delta[..., 64:], A, B[..., 64:], C[..., 64:], D, return_last_state=True)
        y = np.concatenate([y, rest], axis=2)
    return (y, last) if return_last_state else y


def test_a_lost_carry_is_found_at_the_first_step_that_shows_it():
    with pytest.raises(Counterexample) as found:
        check_scan(forgetful, seed=0, target="test_testing_verdict:forgetful", B="variable", C="variable")
    case = found.value.case
    assert (case.batch, case.dim, case.dstate) == (1, 1, 1)
    assert 60 < case.seqlen <= 65  # a law may add a few steps
    assert "test_testing_verdict import forgetful" in found.value.script
    assert repr(case) in str(found.value)


def test_what_a_kernel_raises_is_a_verdict_too():
    def falls(u, delta, A, B, C, **rest):
        if u.shape[1] == 3:
            raise IndexError("thread 3")
        return npmamba.selective_scan(u, delta, A, B, C, **rest)

    with pytest.raises(Counterexample, match="the call raised IndexError: thread 3") as found:
        check_scan(falls, seed=0)
    assert found.value.case.dim == 3
    with pytest.raises(Counterexample, match="has shape"):
        check_scan(lambda u, delta, A, B, C: u[..., :0], seed=0, **{"max_size": 500})


def test_what_takes_nan_is_asked_whether_it_passes_it_on():
    options: dict[str, Any] = {"seed": 3, "max_size": 20, "nonfinite": True}

    def blind(u, delta, A, B, C, *, initial_state=None):
        return npmamba.selective_scan(u, delta, np.nan_to_num(A, neginf=-np.inf), B, C, initial_state=initial_state)

    with pytest.raises(Counterexample, match="y: WRONG") as found:
        check_scan(blind, initial_state=True, max_examples=1000, **options)
    assert found.value.case.special == ("A", "nan")
    without_state = check_scan(lambda u, delta, A, B, C: blind(u, delta, A, B, C), max_examples=30, **options)
    assert without_state.examples == 30, "NaN times nothing may be nothing"

    def afraid(x, weight, bias=None):
        if bias is not None and np.isnan(bias).any():
            raise FloatingPointError("NaN")
        return npmamba.causal_conv1d(x, weight, bias)

    with pytest.raises(Counterexample, match="^the call raised FloatingPointError: NaN"):
        check_conv1d(afraid, bias=True, max_examples=1000, **options)
    assert check_conv1d(afraid, bias=True, max_examples=10, **options | {"nonfinite": False}).examples == 10


def test_a_kernel_that_changes_its_mind_is_broken():
    rng = np.random.default_rng(0)

    def moody(u, delta, A, B, C):
        return npmamba.selective_scan(u, delta, A, B, C) + (rng.random() < 0.2)

    with pytest.raises(Counterexample):
        check_scan(moody, seed=0, max_size=500)


def test_wrong_gradients_are_named():
    def without_D(dout, **arguments):
        return npmamba.selective_scan_backward(dout, **arguments)._replace(D=None)

    with pytest.raises(Counterexample, match="gradient of D"):
        check_scan(npmamba.selective_scan, backward=without_D, seed=0, max_size=500)

    def halved(dout, x, weight, **rest):
        found = npmamba.causal_conv1d_backward(dout, x, weight, **rest)
        return found._replace(weight=found.weight / 2)

    with pytest.raises(Counterexample, match="<gradient, w> for weight and bias is off"):
        check_conv1d(npmamba.causal_conv1d, backward=halved, seed=0, max_size=500)


def test_a_gradient_that_is_missing_is_named():
    def of_x_alone(dout, x, weight, **rest):
        return {"x": npmamba.causal_conv1d_backward(dout, x, weight, **rest).x}

    message = "the gradient of weight is missing"
    with pytest.raises(Counterexample, match=message):
        check_conv1d(npmamba.causal_conv1d, backward=of_x_alone, seed=0, max_size=500)
    known = Conv.read_off(npmamba.causal_conv1d, backward=of_x_alone)
    with pytest.raises(Counterexample, match=message):
        check_conv1d(npmamba.causal_conv1d, capabilities=known, seed=0, max_size=500)


def in_c_order(fn):
    """Return a function of arrays that takes them in C order only."""

    def strict(*arrays, **named):
        if not all(x.flags.c_contiguous for x in (*arrays, *named.values()) if isinstance(x, np.ndarray)):
            raise ValueError("not in C order")
        return fn(*arrays, **named)

    strict.__signature__ = inspect.signature(fn)
    return strict


@pytest.mark.parametrize(
    ("check", "fn", "known"),
    [
        (check_scan, npmamba.selective_scan, Capabilities.of(npmamba.selective_scan)),
        (check_conv1d, npmamba.causal_conv1d, Conv.read_off(npmamba.causal_conv1d)),
        (check_state_update, npmamba.selective_state_update, as_scan(npmamba.selective_state_update)[1]),
    ],
    ids=["scan", "convolution", "step"],
)
def test_what_takes_c_order_only_is_asked_nothing_else(check, fn, known):
    """Neither by cases nor by laws, which take time apart and choose channels."""
    small: dict[str, Any] = {"seed": 0, "max_size": 50}
    for options in ({"capabilities": replace(known, strides=False)}, {"layouts": ("C",)}):
        report = check(in_c_order(fn), max_examples=10, **small, **options)
        assert report.examples == 10
        assert [why for why in report.skipped if why.endswith("has no strides")]
    with pytest.raises(Counterexample, match="not in C order"):
        check(in_c_order(fn), **small)


@pytest.mark.parametrize(
    ("check", "fn", "step"),
    [
        (check_scan, npmamba.selective_scan, npmamba.selective_state_update),
        (check_conv1d, npmamba.causal_conv1d, npmamba.causal_conv1d_update),
    ],
    ids=["scan", "convolution"],
)
def test_steps_are_asked_as_the_whole_is(check, fn, step):
    small: dict[str, Any] = {"seed": 0, "max_size": 50, "max_examples": 10, "step": in_c_order(step)}
    report = check(fn, layouts=("C", "readonly"), **small)
    assert [name for name in report.held if name.endswith("is_its_steps")]
    with pytest.raises(Counterexample, match="the call raised ValueError: not in C order"):
        check(fn, **small | {"max_examples": 200})


def test_a_missing_hypothesis_is_told_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "npmamba.testing.verdict")
    with pytest.raises(ImportError, match=r'hypothesis, which the extra `fuzz` brings: pip install "npmamba\[fuzz\]"'):
        importlib.import_module("npmamba.testing.verdict")


def test_a_step_that_keeps_its_state_is_broken():
    def frozen(state, x, dt, A, B, C):
        return npmamba.selective_state_update(state.copy(), x, dt, A, B, C)

    with pytest.raises(Counterexample, match="a long step forgets: y is off"):
        check_state_update(frozen, seed=0, max_size=500)


# --- other conventions ---


def turned(x, dt, A, B, C, D=None, *, gate=None):
    """Our scan as others write it: (batch, seqlen, dim), and names of its own."""
    swap = lambda a: a if a is None or a.ndim < 3 else a.swapaxes(-1, -2)  # noqa: E731
    return swap(npmamba.selective_scan(swap(x), swap(dt), A, swap(B), swap(C), D, swap(gate)))


def test_time_before_channels_and_other_names():
    scan = adapted(turned, order="batch seqlen dim", names={"u": "x", "delta": "dt", "z": "gate"})
    report = check_scan(scan, **SMALL)
    assert report.worst.keys() == {"y"}
    assert "z" in scan.__signature__.parameters  # type: ignore[attr-defined]


def test_adapters_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="library must be one of numpy, torch, jax, cupy, got 'tf'"):
        adapted(turned, "tf")
    with pytest.raises(ValueError, match="order must be"):
        adapted(turned, order="dim batch seqlen")
    assert as_numpy({"x": [np.ones(1), None]})["x"][1] is None


def test_a_step_changes_its_state_through_an_adapter():
    """Other libraries get a copy; what they leave in it is what was asked for."""

    def step(h, token, dt, A, B, C):
        copies = h.copy(), token.copy()
        y = npmamba.selective_state_update(copies[0], copies[1], dt, A, B, C)
        h[...] = copies[0]
        return y

    fn = adapted(step, names={"state": "h", "x": "token"})
    assert check_state_update(fn, B="variable", C="variable", **SMALL).examples == 15


@pytest.mark.parametrize("kind", [tuple, dict, collections.namedtuple("Gradients", "u A B z")])
def test_gradients_are_turned_back_in_whatever_they_come(kind):
    """A has no time; z was not given, and has no gradient."""
    u, A, B = np.arange(6.0).reshape(1, 2, 3), np.ones((2, 1)), np.arange(3.0).reshape(1, 1, 3)

    def backward(u, A, B):
        named = {"u": 2 * u, "A": A, "B": 2 * B, "z": None}
        return named if kind is dict else kind((2 * u, A)) if kind is tuple else kind(**named)

    found = adapted(backward, order="batch seqlen dim")(u=u, A=A, B=B)
    assert isinstance(found, kind)
    if kind is tuple:  # y first, and a state, which has no time
        found = {"u": found[0], "A": found[1], "B": 2 * B, "z": None}
    found = found if isinstance(found, dict) else found._asdict()
    assert found["z"] is None
    for name, wanted in {"u": 2 * u, "A": A, "B": 2 * B}.items():
        np.testing.assert_array_equal(found[name], wanted)


class Tensor:
    """Stands in for a tensor of PyTorch, with what adapters use of one; it takes the types that torch knows."""

    def __init__(self, array, device="cpu", dtype=None):
        self.array, self.device, self.dtype = array, device, dtype or f"torch.{array.dtype}"

    @classmethod
    def from_numpy(cls, x):
        assert x.dtype.isnative
        assert x.dtype.name in ("float16", "float32", "float64", "int16", "int32")
        return cls(x)

    def to(self, device):
        return Tensor(self.array, device, self.dtype)

    def view(self, dtype):
        return Tensor(self.array, self.device, dtype)

    def detach(self):
        return self

    def cpu(self):
        return self.to("cpu")

    def float(self):
        bits = self.array.view(np.uint16).astype(np.uint32) << 16
        return Tensor(bits.view(np.float32), self.device)

    def numpy(self):
        assert self.device == "cpu"
        assert self.dtype != "torch.bfloat16", "of which NumPy knows nothing"
        return self.array


@pytest.mark.parametrize("dtype", [">f4", "float16", "float64", "bfloat16"])
def test_arrays_of_torch_are_copies_on_the_device_and_come_back(dtype, monkeypatch):
    torch = types.SimpleNamespace(from_numpy=Tensor.from_numpy, bfloat16="torch.bfloat16")
    monkeypatch.setitem(sys.modules, "torch", torch)
    x, seen = np.arange(12).reshape(1, 3, 4).astype(np.dtype(dtype)), []

    def same(u, A, reverse=False):
        seen.append(u)
        assert (A, reverse) == (None, True)
        return {"y": u, "last_state": None}

    found = adapted(same, "torch", device="cuda", order="batch seqlen dim")(u=x, A=None, reverse=True)
    assert found["last_state"] is None
    assert found["y"].dtype == x.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found["y"], x.swapaxes(1, 2))  # only what has a name of ours is turned
    assert (seen[0].device, seen[0].dtype) == ("cuda", f"torch.{x.dtype.newbyteorder('=')}")
    assert seen[0].array.flags.c_contiguous
    adapted(same, "torch")(u=x, A=None, reverse=True)
    assert seen[1].device == "cpu"
    assert not any(np.shares_memory(one.array, x) for one in seen)


@pytest.mark.parametrize("library", ["cupy", "jax"])
def test_arrays_of_cupy_and_jax_are_copies_and_come_back(library, monkeypatch):
    array = fake_cupy.array if library == "cupy" else np.array
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    monkeypatch.setitem(sys.modules, "jax.numpy", types.SimpleNamespace(array=lambda x: JaxArray(array(x))))
    x, seen = np.arange(3, dtype=">f4"), []

    def same(u):
        seen.append(u)
        return u

    found = adapted(same, library)(u=x)
    assert type(seen[0]) is (fake_cupy.Array if library == "cupy" else JaxArray)
    assert type(found) is np.ndarray
    assert found.dtype == np.dtype(np.float32)
    assert found.tolist() == [0, 1, 2]
    x[:] = 9
    assert as_numpy(seen[0]).tolist() == [0, 1, 2]


class JaxArray:
    """Stands in for an array of JAX: NumPy can read it."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


def test_a_scan_that_computes_in_float32_only_says_so():
    def scan(u, delta, A, B, C):
        short = (x.astype(np.float32) for x in (u, delta, A, B, C))
        return npmamba.selective_scan(*short).astype(u.dtype)

    def backward(dout, u, delta, A, B, C):
        short = (x.astype(np.float32) for x in (dout, u, delta, A, B, C))
        gradients = npmamba.selective_scan_backward(*short)._asdict()
        given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
        return {name: gradients[name].astype(x.dtype) for name, x in given.items()}

    with pytest.raises(Counterexample, match="float64|foretells"):
        check_scan(scan, backward=backward, **SMALL)
    report = check_scan(scan, backward=backward, float64=False, **SMALL)
    assert "a_gradient_foretells_every_small_change" not in report.held
    assert report.skipped["the scan has no float64"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scan_of_torch(dtype):
    torch = pytest.importorskip("torch")

    def scan(u, delta, A, B, C):
        h, out = torch.zeros(*u.shape[:2], A.shape[1]), []
        B, C = (M if M.ndim == 3 else M[..., None].expand(*M.shape, u.shape[2])[None] for M in (B, C))
        for t in range(u.shape[2]):
            step, x = delta[..., t, None].float(), u[..., t, None].float()
            h = torch.exp(step * A) * h + step * B[..., t][:, None].float() * x
            out.append((h * C[..., t][:, None].float()).sum(-1))
        return torch.stack(out, 2).to(u.dtype)

    check_scan(adapted(scan, "torch"), dtype=dtype, B="variable", C="variable", **SMALL)


# --- the command ---


def test_the_command_says_what_was_tried(capsys):
    assert cli.main(["fuzz", "npmamba:causal_conv1d", "--operation", "conv1d", "--examples", "5", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("causal_conv1d, float32: not broken by 5 cases in ")
    assert "the same cases again: seed 3" in out


def test_the_command_narrows_sizes_and_takes_a_step(capsys):
    small = ["--lengths", "3", "--dims", "2", "--dstates", "1", "2", "--batches", "1", "--magnitudes", "tame"]
    small += ["--step", "npmamba:selective_state_update", "--max-size", "50", "--without", "float64"]
    assert cli.main(["fuzz", "npmamba:selective_scan", "--examples", "4", *small]) == 0
    out = capsys.readouterr().out
    assert "seqlen=3" in out
    assert "the scan has no float64" in out
    assert cli.main(["fuzz", "npmamba:causal_conv1d", "--operation", "conv1d", "--examples", "2", "--widths", "3"]) == 0
    assert "width=3" in capsys.readouterr().out


def test_the_command_takes_names_and_an_order_of_axes(capsys):
    small = ["--examples", "3", "--seed", "0", "--max-size", "50", "--dims", "2", "--lengths", "3"]
    named = ["--name", "u=x", "--name", "delta=dt", "--name", "z=gate", "--order", "batch seqlen dim"]
    assert cli.main(["fuzz", "test_testing_verdict:turned", *small, *named]) == 0
    assert capsys.readouterr().out.startswith("selective_scan, float32: not broken by 3 cases")
    assert cli.main(["fuzz", "test_testing_verdict:turned", *small]) == 1
    out = capsys.readouterr().out
    assert "turned is wrong" in out
    assert "to see it: python" not in out, "nobody asked for a program"


def only_zoh(u, delta, A, B, C):
    """A scan of one rule and one shape of maps."""
    if (B.ndim, C.ndim) != (2, 2):
        raise ValueError("B and C must be (dim, dstate)")
    return npmamba.selective_scan(u, delta, A, B, C, discretization="zoh")


def test_the_command_narrows_the_rule_and_the_maps(capsys):
    def told(*options):
        small = ["--examples", "5", "--seed", "0", "--max-size", "50"]
        code = cli.main(["fuzz", "test_testing_verdict:only_zoh", *small, *options])
        return code, capsys.readouterr().out

    assert told("--discretization", "zoh", "--maps", "constant")[0] == 0
    assert "must be (dim, dstate)" in told("--discretization", "zoh")[1]
    assert told("--maps", "constant")[0] == 1, "by the other rule it is wrong"


def test_the_command_writes_a_program_that_shows_the_failure(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import npmamba\ndef scan(u, delta, A, B, C):\n    return npmamba.selective_scan(u, delta, A, C, B)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["fuzz", "mine:scan", "--seed", "0", "--script", "show.py", "--without", "layouts"]) == 1
    out = capsys.readouterr().out
    assert "mine:scan is wrong" in out
    assert "python show.py" in out
    root = str(npmamba.__path__[0]).removesuffix("npmamba")
    shown = subprocess.run([sys.executable, "show.py"], capture_output=True, text=True, env={"PYTHONPATH": f"{root}:."})
    assert shown.returncode == 1, shown.stderr
    assert "y: WRONG" in shown.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("npmamba", "TARGET must be module:function, got 'npmamba'"),
        ("nowhere_at_all:f", "TARGET: there is no module 'nowhere_at_all'"),
        ("npmamba:nothing", "TARGET: npmamba has no nothing"),
        ("npmamba:__name__", "TARGET: npmamba:__name__ is no function but str"),
    ],
)
def test_a_target_that_is_none_is_named(target, message, capsys):
    assert cli.main(["fuzz", target]) == 2
    assert capsys.readouterr().err.strip() == f"npmamba fuzz: {message}"
    with pytest.raises((ValueError, TypeError, ImportError), match="TARGET"):
        fuzz.named(target)
