"""The command line: quick help, one clear sentence for every mistake, and no traceback."""

from __future__ import annotations

import errno
import io
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba import cli, doctor, progress
from npmamba.cpu import runtime
from npmamba.cuda import machine, requirements
from npmamba.settings import TrainConfig, nearest, read_toml


def run(*args: str, **options) -> subprocess.CompletedProcess:
    """Run the program as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "npmamba", *args], capture_output=True, text=True, timeout=120, **options
    )


def refused(capsys, *args: str) -> str:
    """Run the program in this process and return the one line it ended with."""
    try:
        code = cli.main(args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def test_help_loads_neither_numpy_nor_numba():
    code = (
        "import sys\nfrom npmamba.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(*sorted({'numpy', 'numba', 'scipy', 'rich', 'cupy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert "--d-model" in done.stdout


def test_the_module_is_the_command():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.strip() == __import__("npmamba").__version__


def test_without_a_command_the_help_lists_them_all(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: npmamba")
    assert all(f"\n    {command} " in text for command in cli._COMMANDS)


def test_every_setting_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert name == "source" or f"--{name.replace('_', '-')}" in text
    assert "(default: 256)" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "npmamba: COMMAND: invalid choice: 'trian'; did you mean train?"),
        (["train", "--contxt", "3"], "npmamba train: unknown option --contxt; did you mean --context?"),
        (["train", "--zzzzz"], "npmamba train: unknown option --zzzzz"),
        (
            ["train", "--vocab", "chars"],
            "npmamba train: --vocab: invalid choice: 'chars'; did you mean char?",
        ),
        (
            ["train", "--vocab", "qq"],
            "npmamba train: --vocab: invalid choice: 'qq'; choose from auto, char, byte",
        ),
        (["train", "--context", "abc"], "npmamba train: --context: invalid int value: 'abc'"),
        (["train", "--context", "0"], "npmamba train: --context must be at least 1, got 0"),
        (["train", "--lr", "nan"], "npmamba train: --lr must be at least 0.0, got nan"),
        (["train", "--minutes", "inf"], "npmamba train: --minutes must be finite, got inf"),
        (["train", "--dropout", "1"], "npmamba train: --dropout must be at most 0.99, got 1.0"),
        (["train", "--threads", "0"], "npmamba train: --threads: must be a whole number from 1 up, got '0'"),
        (["train", "a.txt", "b.txt"], "npmamba train: unexpected argument b.txt"),
        (["generate"], "npmamba generate: the following arguments are required: CHECKPOINT"),
        (["doctor", "--jsn"], "npmamba doctor: unknown option --jsn; did you mean --json?"),
        (["fuzz", "math:sqrt", "--name", "dt"], "npmamba fuzz: --name: must be OURS=THEIRS, got 'dt'"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_sentence(capsys, args, message):
    assert refused(capsys, *args) == message


def test_a_setting_file_is_read_and_its_mistakes_are_named(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('d_model = 32\nweight-decay = 0.5\nsource = "x.txt"\n')
    assert read_toml(path) == {"d_model": 32, "weight_decay": 0.5, "source": "x.txt"}
    path.write_text("contxt = 3\n")
    message = f"npmamba train: {path} has the unknown setting 'contxt'; did you mean context?"
    assert refused(capsys, "train", "--config", str(path)) == message
    path.write_text("context = 'long'\n")
    message = "npmamba train: --context must be int, got 'long'"
    assert refused(capsys, "train", "--config", str(path)) == message
    path.write_text("vocab = 'chars'\n")
    message = "npmamba train: --vocab must be one of auto, char, byte, got 'chars'; did you mean char?"
    assert refused(capsys, "train", "--config", str(path)) == message
    path.write_text("context = \n")
    assert "is not a TOML file" in refused(capsys, "train", "--config", str(path))
    missing = str(tmp_path / "none.toml")
    assert refused(capsys, "train", "--config", missing).endswith("there is no such file or folder")


@pytest.mark.parametrize("value", [True, "7", 7.0, None])
def test_settings_have_their_types(value):
    with pytest.raises(TypeError, match="--context must be int"):
        TrainConfig(context=value)


@given(st.sampled_from(sorted(TrainConfig.__dataclass_fields__)), st.integers(0, 20), st.booleans())
def test_one_slip_of_the_pen_is_recognised(name, place, double):
    place %= len(name)
    wrong = name[:place] + (name[place] * 2 if double else "") + name[place + 1 :]
    if len(name) > 4 and wrong not in TrainConfig.__dataclass_fields__:
        assert nearest(wrong, TrainConfig.__dataclass_fields__) == f"; did you mean {name}?"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y: the disk is full"),
        (OSError(errno.EACCES, "Permission denied", "x"), "x: permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (FileNotFoundError("x has no config.json"), "x has no config.json"),
        (MemoryError(), "not enough memory; try a smaller --batch, --context or --d-model"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_are_put_in_words(error, words):
    assert cli.sentence(error) == words


def test_kernels_get_the_threads_and_blas_one_unless_the_user_said_otherwise(monkeypatch):
    for name in ("NPMAMBA", "OMP", "OPENBLAS", "MKL"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cli.set_threads(None)
    assert "NPMAMBA_NUM_THREADS" not in cli.os.environ
    cli.set_threads(3)
    asked = {name: cli.os.environ[f"{name}_NUM_THREADS"] for name in ("NPMAMBA", "OMP", "OPENBLAS", "MKL")}
    assert asked == {"NPMAMBA": "3", "OMP": "7", "OPENBLAS": "1", "MKL": "1"}


def test_ctrl_c_anywhere_is_130_and_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "npmamba doctor: interrupted\n"


# --- doctor ---


def test_the_doctor_finds_this_machine_healthy(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("numpy", "BLAS", "kernel cache", "float32 at once", "numba-cuda", "selective scan"):
        assert part in text


def test_the_doctor_speaks_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {f["group"] for f in found} == {"core", "cpu", "extras", "cuda", "self test"}
    assert all(f["remedy"] for f in found if f["state"] == doctor.MISSING)


def test_a_missing_package_comes_with_the_command_that_installs_it():
    assert doctor._package("no-such-package", "pip install it") == (
        "no-such-package", "missing", "not installed", "pip install it",
    )  # fmt: skip


def test_the_doctor_survives_a_broken_piece_and_says_so(monkeypatch, capsys):
    def broken():
        raise RuntimeError("libopenblas is gone")

    monkeypatch.setattr(doctor, "_PROBES", [("cpu", broken), ("core", doctor._python)])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "!!" in out
    assert "RuntimeError: libopenblas is gone" in out
    assert "numpy" in out


def test_the_self_test_sees_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(doctor, "scan_error", lambda: 1e-3)
    assert doctor._self_test()[0][1] == doctor.BAD


def test_the_pieces_that_cuda_needs_are_named_with_their_remedies(monkeypatch):
    def absent():
        raise requirements.CudaUnavailableError("CuPy is not installed", "pip install it", missing=True)

    def old():
        raise requirements.CudaUnavailableError("the driver is old", "install a newer one")

    monkeypatch.setattr(requirements, "driver", old)
    monkeypatch.setattr(requirements, "cupy_package", absent)
    monkeypatch.setattr(requirements, "device", lambda: "must not be asked")
    rows = {name: rest for name, *rest in doctor._cuda()}
    assert rows["driver"] == [doctor.BAD, "the driver is old", "install a newer one"]
    assert rows["CuPy"] == [doctor.MISSING, "CuPy is not installed", "pip install it"]
    assert "device" not in rows


def test_a_cache_that_others_can_write_is_named(tmp_path):
    tmp_path.chmod(0o777)
    state, detail, remedy = doctor._cache_state(tmp_path)
    assert state == doctor.BAD
    assert remedy == f"chmod go-w {tmp_path}"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    state, detail, remedy = doctor._cache_state(tmp_path / "kernels")
    assert (state, detail) == (doctor.BAD, f"{tmp_path / 'kernels'} cannot be written")
    assert remedy == "set NPMAMBA_CACHE_DIR to a folder of yours"


def test_warmup_compiles_every_declared_kernel(monkeypatch, capsys):
    class Kernel:
        __module__ = "npmamba.cpu.made_up"

        def __init__(self):
            self.asked = []

        def __getitem__(self, dtype):
            self.asked.append(dtype)

    doctor.declare_kernels()
    modules = {kernel.__module__ for kernel in runtime.KERNELS}
    assert {"npmamba.cpu.selective_scan", "npmamba.cpu.causal_conv1d", "npmamba.cpu.rms_norm"} <= modules
    kernels = [Kernel(), Kernel()]
    monkeypatch.setattr(runtime, "KERNELS", kernels)
    assert cli.main(["warmup", "--float64"]) == 0
    assert [kernel.asked for kernel in kernels] == [["float32", "float64"]] * 2
    assert "4 kernels are ready" in capsys.readouterr().out


def test_warmup_compiles_the_gpu_s_kernels_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "KERNELS", [])
    compiled = []
    monkeypatch.setattr(requirements, "require_device", lambda: None)
    monkeypatch.setattr(machine, "current_device", lambda: 3)
    monkeypatch.setattr(machine, "architecture", lambda device: (device, 0))
    monkeypatch.setattr(machine, "machine_code", lambda found, cc: compiled.append((found.name, found.dtype.name, cc)))
    assert cli.main(["warmup"]) == 0
    assert {(dtype, cc) for _, dtype, cc in compiled} == {("float32", (3, 0))}
    names = {name.partition("-")[0] for name, _, _ in compiled}
    assert {"scan_forward.scan", "scan_backward.backward"} <= names
    assert f"{len(compiled)} kernels are ready" in capsys.readouterr().out
    assert cli.main(["warmup", "--bfloat16"]) == 0
    assert {dtype for _, dtype, _ in compiled} == {"float32", "bfloat16"}


# --- progress ---

STEP = {"step": 20, "total": 80, "done": 0.25, "loss": 2.5, "tokens_per_second": 31000.0, "seconds_left": 61}


def test_plain_lines_come_seldom_but_the_last_step_always_shows():
    out = io.StringIO()
    plain = progress.Plain(out, every=3600)
    for step in range(1, 81):
        plain.step({**STEP, "step": step})
    plain.validation({"step": 80, "validation_loss": 2.75})
    assert out.getvalue().splitlines() == [
        "step 1 of 80: loss 2.5000, 31,000 tokens/s, 1:01 left",
        "step 80 of 80: loss 2.5000, 31,000 tokens/s, 1:01 left",
        "step 80: validation loss 2.7500",
    ]


def test_the_library_s_notices_are_shown(capsys):
    with progress.shown():
        logging.getLogger("npmamba").info("compiling kernels (once)")
    logging.getLogger("npmamba").info("unseen")
    assert capsys.readouterr().err == "compiling kernels (once)\n"


def test_quiet_says_nothing(capsys):
    with progress.shown(quiet=True) as display:
        display.note("x")
        display.step(STEP)
        display.validation({"step": 1, "validation_loss": 1.0})
    assert capsys.readouterr().err == ""


def test_the_live_display_shows_loss_speed_and_time_left():
    rich = pytest.importorskip("rich.console")
    live = progress.Live()
    try:
        live.validation({"step": 10, "validation_loss": 2.75})
        live.step(STEP)
        console = rich.Console(file=io.StringIO(), width=120)
        console.print(live._draw(STEP))
        text = console.file.getvalue()
    finally:
        live.close()
    for part in ("20 of 80", "2.5000", "2.7500", "31,000 tokens/s", "1:01 left"):
        assert part in text


def test_before_a_validation_the_live_display_shows_none_and_notes_are_shown_as_they_are(capsys):
    rich = pytest.importorskip("rich.console")
    live = progress.Live()
    try:
        live.note("learning [bold]x.txt[/bold]")
        console = rich.Console(file=io.StringIO(), width=120)
        console.print(live._draw(STEP))
    finally:
        live.close()
    assert "learning [bold]x.txt[/bold]\n" in capsys.readouterr().err
    assert "2.5000" in console.file.getvalue()
    assert "validation" not in console.file.getvalue()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_the_display_fits_what_it_is_shown_on():
    assert type(progress.choose(quiet=True, stream=Terminal())) is progress.Silent
    assert type(progress.choose(quiet=False, stream=io.StringIO())) is progress.Plain
    pytest.importorskip("rich")
    live = progress.choose(quiet=False, stream=Terminal())
    live.close()
    assert type(live) is progress.Live


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    display = progress.choose(quiet=False, stream=stream)
    assert type(display) is progress.Plain
    display.note("compiling kernels (once)")
    assert stream.getvalue() == "compiling kernels (once)\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05"), (-1, "0:00")])
def test_durations_are_written_as_on_a_clock(seconds, text):
    assert progress.clock(seconds) == text


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300))
def test_the_curve_in_a_line_fits_the_line(values):
    curve = progress.spark([float(v) if abs(v) < 1e300 else float("nan") for v in values])
    assert len(curve) <= 48
    assert set(curve) <= set(progress.BARS)
