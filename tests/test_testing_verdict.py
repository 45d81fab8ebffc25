"""The verdict: what is right passes and is told how hard it was tried; what is wrong is broken by a small case."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import npmamba
from npmamba import cli
from npmamba.testing import fuzz
from npmamba.testing.adapters import adapted, as_numpy
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
