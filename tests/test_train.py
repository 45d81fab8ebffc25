"""Training: the same bits after any interruption, budgets settled once, mistakes named in one sentence."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from npmamba import arguments, cli, lm, runs, summary
from npmamba import train as train_module
from npmamba.checkpoint import load_model, load_training
from npmamba.config import MambaConfig
from npmamba.cuda import requirements
from npmamba.data import IGNORE_INDEX
from npmamba.inspect import selectivity, step_sizes, time_constants
from npmamba.lm import MambaLM, logits
from npmamba.plan import LEAST, Plan, given_plan, learning_rate, settle
from npmamba.progress import Silent
from npmamba.settings import TrainConfig
from npmamba.streaming import Tokenizer, pieces
from npmamba.train import Interrupted, Loop, evaluate, train
from npmamba.vocabulary import Vocabulary

TEXT = "the quick brown fox jumps over the lazy dog.\nwhat a day for a fox!\n" * 40
SIZES = {"d_model": 8, "layers": 2, "d_state": 4, "context": 16, "batch": 2, "sample_length": 12}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
TIMES = ("tokens_per_second", "seconds")


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return str(path)


def config(text: str, out: Path, **changes) -> TrainConfig:
    options = {**SIZES, "steps": 12, "warmup": 3, "eval_every": 5, "checkpoint_every": 4, "lr": 0.01}
    return TrainConfig(source=text, out=str(out), **{**options, **changes})


def finished(text: str, out: Path, **changes) -> runs.Run:
    return train(runs.create(config(text, out, **changes)))


class StopAfter(Silent):
    """Presses Ctrl-C when a step is reported."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, metrics):
        if metrics["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def bits(tree) -> dict:
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tree.items()}


def figures(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    one, other = load_training(a), load_training(b)
    assert one.step == other.step
    for tree in ("params", "opt_state"):
        x, y = getattr(one, tree), getattr(other, tree)
        if tree == "params":
            assert bits(x) == bits(y)
        else:
            assert x["step"] == y["step"]
            assert bits(x["m"]) == bits(y["m"])
            assert bits(x["v"]) == bits(y["v"])
    assert figures(a) == figures(b)


# --- what training does ---


def test_training_lowers_the_loss_and_leaves_a_whole_folder(text, tmp_path):
    run = finished(text, tmp_path / "run", steps=60, d_model=16, lr=0.02)
    losses = [m["loss"] for m in run.history if "loss" in m]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    names = {"checkpoint.safetensors", "config.json", "model.safetensors", "metrics.jsonl", "vocabulary.json"}
    assert {p.name for p in run.folder.iterdir()} == names
    assert bits(load_model(run.folder)[1]) == bits(run.params)
    final = figures(run.folder)[-1]
    loss, count = evaluate(run)
    assert final == {"step": 60, "validation_loss": loss, "tokens": count, "final": True}
    assert count == len(run.corpus.validation) - 1


def test_dropout_acts_in_training_only(text, tmp_path):
    run = finished(text, tmp_path / "a", dropout=0.5)
    plain = finished(text, tmp_path / "b")
    assert bits(run.params) != bits(plain.params)
    assert evaluate(run) == evaluate(run)


def test_float64_is_trained_in_float64(text, tmp_path):
    run = finished(text, tmp_path / "run", dtype="float64", steps=2)
    assert {x.dtype for x in run.params.values()} == {np.dtype("float64")}


def test_evaluation_is_the_mean_over_every_token_but_the_first(text, tmp_path):
    run = runs.create(config(text, tmp_path / "run"))
    tokens = run.corpus.validation[:60]
    run.corpus = replace(run.corpus, validation=tokens)
    total = 0.0
    for start in range(0, 59, 16):
        x, y = tokens[start : start + 16][None], tokens[start + 1 : start + 17]
        scores = logits(run.params, run.model, x[:, : len(y)])[0].astype(np.float64)
        total -= (scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))[range(len(y)), y].sum()
    assert evaluate(run) == (pytest.approx(total / 59, rel=1e-5), 59)


@given(st.integers(20, 2000), st.integers(1, 500))
def test_a_part_of_a_long_validation_text_is_spread_over_all_of_it(size, most):
    asked = []

    def loss(params, model, x, y):
        asked.extend(y[y != IGNORE_INDEX].tolist())
        return 1.0

    corpus = types.SimpleNamespace(validation=np.arange(size, dtype=np.int32))
    run = types.SimpleNamespace(
        config=TrainConfig(context=16, batch=3), corpus=corpus, params=None, model=None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "loss", loss)
        assert evaluate(run, most) == (1.0, len(asked))
    assert len(asked) <= max(most, 16)
    assert asked[0] == 1
    gap = max(np.diff([*asked, size]), default=1)
    assert gap <= 2 * 16 * max(1, size / max(most, 16)) + 16


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(text, tmp_path):
    run = runs.create(config(text, tmp_path / "run"))
    run.params["backbone.norm_f.weight"][:] = np.nan
    with pytest.raises(ValueError, match="the loss became nan at step 1; try a smaller --lr than 0.01"):
        train(run)


# --- interruption ---


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_an_interrupted_run_goes_on_with_the_same_bits(text, tmp_path, stop):
    changes = {"dropout": 0.2}
    whole, broken = finished(text, tmp_path / "whole", **changes), tmp_path / "broken"
    with pytest.raises(Interrupted, match=f"stopped after step {stop}; go on with: .*--resume {broken}"):
        train(runs.create(config(text, broken, **changes)), StopAfter(stop))
    train(runs.resume(broken, {}))
    assert_same_run(whole.folder, broken)


def test_a_finished_run_resumes_to_itself(text, tmp_path):
    run = finished(text, tmp_path / "run")
    before, lines = bits(run.params), figures(run.folder)
    again = train(runs.resume(run.folder, {}))
    assert bits(again.params) == before
    assert figures(run.folder) == lines


def test_a_torn_line_of_figures_is_dropped(text, tmp_path):
    run = finished(text, tmp_path / "run")
    lines = figures(run.folder)
    with open(run.folder / runs.METRICS, "a") as file:
        file.write('{"step": 13, "lo')
    train(runs.resume(run.folder, {}))
    assert figures(run.folder) == lines


def test_a_line_that_a_crash_tore_is_written_again(text, tmp_path):
    whole, broken = finished(text, tmp_path / "whole"), tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(runs.create(config(text, broken)), StopAfter(7))
    with open(broken / runs.METRICS, "a") as file:
        file.write('{"step": 8, "lo')
    train(runs.resume(broken, {}))
    assert_same_run(whole.folder, broken)


def test_a_run_in_another_thread_leaves_signals_alone(text, tmp_path):
    """Python lets the main thread alone say what a signal does."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(finished, text, tmp_path / "thread").result()
    assert_same_run(finished(text, tmp_path / "main").folder, run.folder)


def start(text: str, out: Path, *options: str) -> subprocess.Popen:
    args = [
        sys.executable,
        "-m",
        "npmamba",
        "train",
        text,
        "--out",
        str(out),
        *OPTIONS,
        "--no-report",
        *options,
    ]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(folder: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if (folder / runs.METRICS).read_text().count("\n") >= count:
                return
        time.sleep(0.005)
    raise AssertionError(f"no {count} steps: {process.communicate()}")


def test_after_kill_9_a_run_goes_on_with_the_same_bits(text, tmp_path):
    options = ["--steps", "300", "--checkpoint-every", "7", "--eval-every", "40"]
    broken = tmp_path / "broken"
    process = start(text, broken, *options)
    wait_for_lines(broken, 30, process)
    process.kill()
    process.communicate()
    assert 0 < load_training(broken).step < 300
    assert cli.main(["train", "--resume", str(broken), "--quiet", "--no-report"]) == 0
    args = ["train", text, "--out", str(tmp_path / "whole"), *OPTIONS, *options, "--quiet", "--no-report"]
    assert cli.main(args) == 0
    assert_same_run(tmp_path / "whole", broken)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(text, tmp_path):
    out = tmp_path / "run"
    process = start(text, out, "--steps", "100000", "--checkpoint-every", "0")
    wait_for_lines(out, 5, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = load_training(out).step
    assert errors.splitlines()[-1] == (
        f"npmamba train: stopped after step {step}; go on with: npmamba train --resume {out}"
    )
    assert "Traceback" not in errors
    assert figures(out)[-1]["step"] == step


# --- steps that are waited for together, as on a GPU ---


@pytest.fixture
def host_as_gpu(monkeypatch):
    """Let ``backend="cupy"`` run on the host: everything that is particular to a GPU but its arrays."""
    cupy = types.SimpleNamespace(asarray=np.asarray, ndarray=type("ndarray", (), {}))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(runs, "require", lambda name: None)
    monkeypatch.setattr(train_module, "PATIENCE", 60.0)


class Steps(Silent):
    """Notes which steps are reported, and how many were done by then."""

    def __init__(self, run: runs.Run) -> None:
        self.run, self.seen = run, []

    def step(self, metrics):
        self.seen.append((metrics["step"], self.run.step))


def test_steps_on_a_gpu_are_collected_together_with_the_same_figures(text, tmp_path, host_as_gpu):
    changes = {"steps": 23, "eval_every": 10, "checkpoint_every": 7, "dropout": 0.2}
    alone = finished(text, tmp_path / "numpy", **changes)
    run = runs.create(config(text, tmp_path / "cupy", backend="cupy", **changes))
    display = Steps(run)
    train(run, display)
    assert [step for step, _ in display.seen] == list(range(1, 24))
    assert sorted({done for _, done in display.seen}) == [1, 2, 3, 7, 10, 14, 20, 21, 23]
    assert_same_run(alone.folder, run.folder)
    assert run.seconds == pytest.approx(run.history[-2]["seconds"], abs=1e-3)


def test_steps_on_a_gpu_are_not_left_alone_for_long(text, tmp_path, host_as_gpu, monkeypatch):
    monkeypatch.setattr(train_module, "PATIENCE", 0.0)
    run = runs.create(config(text, tmp_path / "run", backend="cupy"))
    display = Steps(run)
    train(run, display)
    assert display.seen == [(step, step) for step in range(1, 13)]


def test_an_interrupted_run_on_a_gpu_goes_on_with_the_same_bits_on_either_backend(text, tmp_path, host_as_gpu):
    changes = {"steps": 20, "eval_every": 0, "checkpoint_every": 0}
    whole = finished(text, tmp_path / "whole", **changes)
    for backend in ("numpy", "cupy"):
        broken = tmp_path / backend
        with pytest.raises(Interrupted, match="stopped after step 3; go on"):
            train(runs.create(config(text, broken, backend="cupy", **changes)), StopAfter(3))
        assert load_training(broken).extra["settings"]["backend"] == "cupy"
        assert runs.resume(broken, {}).config.backend == "cupy"
        run = train(runs.resume(broken, {"backend": backend}))
        assert load_training(broken).extra["settings"]["backend"] == run.config.backend == backend
        assert_same_run(whole.folder, broken)


def test_a_loss_that_is_not_finite_is_found_before_anything_is_saved(text, tmp_path, host_as_gpu):
    run = runs.create(config(text, tmp_path / "run", backend="cupy", checkpoint_every=8, steps=40))
    loop = Loop(run, Silent(), begin=time.perf_counter())
    for _ in range(5):
        loop.step()
    run.params["backbone.norm_f.weight"][:] = np.nan
    with pytest.raises(ValueError, match="the loss became nan at step 6; try a smaller --lr"):
        loop.step(), loop.step(), loop.step()
    assert not (run.folder / "checkpoint.safetensors").exists()


# --- the plan ---


@given(st.integers(0, 300), st.integers(0, 200), st.integers(1, 10**6), st.floats(0.01, 100))
def test_until_the_plan_is_made_no_rate_depends_on_it(step, more, rest, minutes):
    settings = TrainConfig(minutes=minutes)
    plan = Plan(held=step + 1 + more, total=step + 1 + more + rest)
    assert learning_rate(step, settings, None) == learning_rate(step, settings, plan)


@given(st.integers(1, 5000), st.integers(0, 100))
def test_the_rate_rises_to_its_peak_stays_and_falls_to_its_floor(steps, warmup):
    settings = TrainConfig(steps=steps, warmup=warmup, lr=1.0)
    plan = given_plan(settings)
    rates = np.array([learning_rate(s, settings, plan) for s in range(steps)])
    top = np.flatnonzero(rates == 1.0)
    assert top.size
    assert top[0] <= steps // 5
    assert (np.diff(top) == 1).all()
    assert (np.diff(rates[: top[0] + 1]) > 0).all()
    assert (np.diff(rates[top[-1] :]) < 0).all()
    assert rates[top[-1] :].min() >= 0.02
    assert learning_rate(steps, settings, plan) == pytest.approx(0.02)


@given(
    st.integers(20, 10**5), st.floats(1e-3, 10), st.floats(0, 1e5), st.integers(0, 500), st.integers(0, 10**6)
)
def test_a_plan_fills_the_time_that_is_left_and_no_more(step, each, left, eval_every, tokens):
    settings = TrainConfig(eval_every=eval_every)
    plan = settle(settings, step, each, left, min(tokens, 2**15), tokens)
    rest, token = plan.total - step, each / (3 * 16 * 256)
    evaluations = rest / eval_every if eval_every else 0
    spent = rest * each + evaluations * token * min(tokens, 2**15) + token * tokens
    assert plan.held == step
    assert rest == 0 or spent <= left
    assert spent + 3 * each + token * min(tokens, 2**15) + 4 > left


def test_a_budget_becomes_a_plan_that_is_kept(text, tmp_path):
    run = runs.create(config(text, tmp_path / "run", steps=None, minutes=1.0, eval_every=0))
    loop = Loop(run, Silent(), begin=time.perf_counter())
    for _ in range(LEAST + 5):
        loop.step()
    assert run.plan is None
    loop.begin -= 30
    loop.step()
    assert run.plan.held == LEAST + 6
    assert run.total > run.plan.held
    assert load_training(run.folder).extra["plan"] == run.plan._asdict()
    assert runs.resume(run.folder, {}).plan == run.plan


def test_a_spent_budget_still_ends_well(text, tmp_path):
    run = finished(text, tmp_path / "run", steps=None, minutes=0.0001)
    assert run.step == LEAST
    assert math.isfinite(run.history[-1]["validation_loss"])


def test_steps_cap_what_a_budget_allows(text, tmp_path):
    assert finished(text, tmp_path / "a", steps=60, minutes=10.0).plan == (27, 60)
    assert finished(text, tmp_path / "b", steps=5, minutes=10.0).step == 5


# --- mistakes ---


def refused(capsys, *args: str) -> str:
    try:
        code = cli.main(["train", *OPTIONS, "--steps", "3", *args])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_texts_that_cannot_be_used_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"empty.txt": b"", "binary.txt": b"a\0b" * 99, "latin.txt": b"caf\xe9" * 99}.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    Path("short.txt").write_text("only a little")
    assert "missing.txt does not exist" in refused(capsys, "missing.txt")
    assert "empty.txt is empty" in refused(capsys, "empty.txt")
    assert "binary.txt is not text: it has a NUL" in refused(capsys, "binary.txt")
    assert "latin.txt is not UTF-8 text" in refused(capsys, "latin.txt")
    assert "folder holds no file that ends in" in refused(capsys, "folder")
    message = refused(capsys, "short.txt", "--context", "4096")
    assert "short has 13 tokens, but --context 4096 needs at least 4,555; choose a shorter" in message
    assert not Path("runs").exists()


def test_a_prompt_that_cannot_be_read_is_refused_at_once(capsys, text, tmp_path):
    message = refused(capsys, text, "--out", str(tmp_path / "run"), "--prompt", "über")
    assert "'ü'" in message
    assert not (tmp_path / "run").exists()


def without_gpu(monkeypatch):
    """Have CuPy be the piece that is missing, whatever this machine has."""
    monkeypatch.setattr(requirements, "release", lambda: (13, 0))
    monkeypatch.setattr(requirements, "version", lambda package: None)


def test_a_missing_cupy_comes_with_the_command_that_installs_it(capsys, text, tmp_path, monkeypatch):
    without_gpu(monkeypatch)
    message = refused(capsys, text, "--out", str(tmp_path / "run"), "--backend", "cupy")
    assert message.endswith("CuPy is not installed; to mend it: pip install 'npmamba[cuda13]'")
    assert not (tmp_path / "run").exists()
    folder = str(finished(text, tmp_path / "done").folder)
    assert cli.main(["train", "--resume", folder, "--backend", "cupy"]) == 2
    assert cli.main(["generate", folder, "--backend", "cupy"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(";")[1] for line in errors] == [" to mend it: pip install 'npmamba[cuda13]'"] * 2


def test_a_mistake_of_the_program_is_not_told_as_the_user_s(monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli._COMMANDS, "doctor", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


def test_folders_that_cannot_be_used_are_named(capsys, text, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("x")
    assert "a file stands where a folder is needed" in refused(capsys, text, "--out", str(taken / "run"))
    assert "a file stands where a folder is needed" in refused(capsys, text, "--out", str(taken))
    assert "go on with --resume" in refused(
        capsys, text, "--out", str(finished(text, tmp_path / "run").folder)
    )
    assert "there is no training to resume" in refused(capsys, "--resume", str(tmp_path / "none"))


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(capsys, text, tmp_path, monkeypatch):
    out, write = tmp_path / "run", os.write
    written = 0

    def limited(descriptor, data):
        nonlocal written
        written += len(data)
        if written > 60_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    message = refused(capsys, text, "--out", str(out), "--steps", "60", "--checkpoint-every", "2")
    assert "the disk is full" in message
    assert message.endswith(f"go on with: npmamba train --resume {out}")
    monkeypatch.undo()
    assert 0 < load_training(out).step < 60
    assert cli.main(["train", "--resume", str(out), "--quiet", "--no-report"]) == 0
    assert load_training(out).step == 60


def test_what_decides_a_run_cannot_change_when_it_resumes(capsys, text, tmp_path):
    folder = str(finished(text, tmp_path / "run").folder)
    message = refused(capsys, "--resume", folder, "--lr", "0.5", *["--steps", "12"])
    assert message.endswith(
        "--lr cannot change when a run is resumed: it was started with 0.01, and now 0.5 is asked for"
    )
    assert runs.resume(folder, {"sample_length": 3, "lr": 0.01}).config.sample_length == 3


def test_a_run_does_not_resume_on_another_text(text, tmp_path):
    folder = finished(text, tmp_path / "run").folder
    Path(text).write_text(TEXT.replace("fox", "cat"))
    with pytest.raises(ValueError, match="the text fox has changed since .* was started"):
        runs.resume(folder, {})


def test_a_damaged_checkpoint_is_named(text, tmp_path):
    folder = finished(text, tmp_path / "run").folder
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="checkpoint.safetensors: not a complete safetensors file"):
        runs.resume(folder, {})


# --- the end: sample, report, generation ---


def test_a_run_prints_its_sample_and_writes_its_report(capsys, text, tmp_path):
    out = tmp_path / "run"
    assert cli.main(["train", text, "--out", str(out), *OPTIONS, "--steps", "6", "--prompt", "the fox"]) == 0
    captured = capsys.readouterr()
    assert "the fox" in captured.out
    assert "nats per character after 6 steps, on 267 characters in windows of 16" in captured.out
    assert "2,680 characters, 30 different ones" in captured.err
    page = (out / "report.html").read_text()
    for part in (
        "<h2>Loss</h2>",
        "<h2>Selectivity</h2>",
        "<h2>Memory</h2>",
        "layer 2",
        "<mark>the fox</mark>",
    ):
        assert part in page
    assert "npmamba train" in page
    assert "--d-model 8" in page


def test_without_report_none_is_written_or_told(capsys, text, tmp_path):
    out = tmp_path / "run"
    assert cli.main(["train", text, "--out", str(out), *OPTIONS, "--steps", "2", "--no-report"]) == 0
    told = capsys.readouterr().out
    assert f"write more: npmamba generate {out}" in told
    assert "report:" not in told
    assert not (out / "report.html").exists()


def test_quiet_without_report_is_silent(capsys, text, tmp_path):
    out = tmp_path / "run"
    args = ["train", text, "--out", str(out), *OPTIONS, "--steps", "2", "--quiet", "--no-report"]
    assert cli.main(args) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert not (out / "report.html").exists()


def test_runs_are_numbered(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [runs.create(TrainConfig(source=text, **SIZES)).folder for _ in range(2)]
    assert made == [Path("runs/fox-1"), Path("runs/fox-2")]


def test_the_command_of_a_report_starts_the_same_run(text, tmp_path):
    settings = config(text, tmp_path / "run", prompt="it's")
    words = __import__("shlex").split(summary.command_line(settings))
    args = arguments.parser().parse_args(words[1:])
    given = {name: getattr(args, name) for name in TrainConfig.__dataclass_fields__ if name != "out"}
    assert TrainConfig(**{k: v for k, v in given.items() if v is not None}, out=settings.out) == settings


def test_generate_continues_a_prompt_and_repeats_by_seed(capsys, text, tmp_path):
    folder = str(finished(text, tmp_path / "run").folder)
    outputs = []
    for seed in ("1", "1", "2"):
        args = [
            "generate",
            folder,
            "--prompt",
            "the ",
            "--tokens",
            "30",
            "--seed",
            seed,
            "--temperature",
            "2",
        ]
        assert cli.main(args) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("the ")
    assert len(outputs[0]) == len("the ") + 30 + 1
    assert cli.main(["generate", folder, "--prompt", "the ", "--temperature", "-1"]) == 2
    assert "temperature must be at least 0" in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_generation_ends_quietly_when_nobody_reads_on(text, tmp_path):
    folder = finished(text, tmp_path / "run").folder
    command = f"{sys.executable} -m npmamba generate {folder} --tokens 5000 | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "compiling kernels" not in line] == []
    assert len(done.stdout) == 10


@given(st.text(max_size=20), st.integers(0, 3))
def test_pieces_join_to_the_text_whatever_its_characters(text, extra):
    characters = text + "x" * extra + "y"
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    for vocabulary in (Vocabulary(), Vocabulary(characters)):
        assert "".join(pieces(vocabulary, [int(i) for i in vocabulary.encode(text)])) == text


class Words:
    """Stands in for the tokenizers package: tokens are bytes in hexadecimal, so most are half a character."""

    @staticmethod
    def from_file(path):
        return Words()

    def encode(self, text):
        return types.SimpleNamespace(ids=list(text.encode()))

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_published_model_is_read_with_its_tokenizer_and_stops_at_its_end_token(
    capsys, tmp_path, monkeypatch
):
    model = MambaLM(MambaConfig(vocab_size=256, d_model=8, n_layer=1, eos_token_id=0))
    model.save_pretrained(tmp_path)
    args = [
        "generate",
        str(tmp_path),
        "--prompt",
        "für",
        "--tokens",
        "40",
        "--seed",
        "3",
        "--temperature",
        "9",
    ]
    assert cli.main(args) == 2
    assert "has neither vocabulary.json nor tokenizer.json" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert cli.main(args) == 2
    assert "tokenizer.json needs the tokenizers package: pip install tokenizers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=Words))
    assert cli.main(args) == 0
    ids = np.frombuffer("für".encode(), np.uint8).astype(np.int32)[None]
    new = model.generate(ids, 40, temperature=9.0, seed=3, eos_token_id=0)[0, 4:]
    expected = bytes(new[new != 0].tolist()).decode(errors="replace")
    assert capsys.readouterr().out.rstrip("\n") == ("für" + expected).rstrip("\n")


@given(st.text(max_size=30))
@example("one\ntwo\n\nthree")
def test_a_tokenizer_s_pieces_join_to_its_text(text):
    words = Tokenizer.__new__(Tokenizer)
    words.backend = Words()
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert "".join(pieces(words, words.encode(text).tolist())) == text


# --- looking inside ---


def test_step_sizes_and_time_constants_are_those_of_the_equations(text, tmp_path):
    run = runs.create(config(text, tmp_path / "run"))
    model, ids = MambaLM(run.model, run.params), run.corpus.training[:20]
    deltas = step_sizes(model, ids[None])
    assert [d.shape for d in deltas] == [(1, 20, 16)] * 2
    assert all((d > 0).all() for d in deltas)
    np.testing.assert_allclose(selectivity(model, ids), [d[0].mean(axis=-1) for d in deltas])
    np.testing.assert_allclose(selectivity((run.params, run.model), ids[None])[:, 0], selectivity(model, ids))
    taus = time_constants(model, ids)
    A = -np.exp(run.params["backbone.layers.1.mixer.A_log"])
    np.testing.assert_allclose(taus[1, 3], 1 / (deltas[1][0, :, 3].mean() * -A[3]), rtol=1e-5)


def test_the_first_layer_s_step_follows_from_its_own_weights(text, tmp_path):
    """Layer 1 sees the normalized embedding only, so a fresh layer without dt_proj.weight has Delta by its bias."""
    run = runs.create(config(text, tmp_path / "run"))
    prefix = "backbone.layers.0.mixer.dt_proj."
    params = {**run.params, prefix + "weight": np.zeros_like(run.params[prefix + "weight"])}
    (delta, _) = step_sizes((params, run.model), run.corpus.training[None, :5])
    bias = params[prefix + "bias"].astype(np.float64)
    np.testing.assert_allclose(delta[0], np.broadcast_to(np.log1p(np.exp(bias)), (5, 16)), rtol=1e-4)
    assert 0.0009 < delta.min()
    assert delta.max() < 0.11
