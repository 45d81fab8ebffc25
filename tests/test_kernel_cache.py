"""Compiled kernels on disk: found again by the next process, never stale, never trusted when damaged or foreign."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npmamba.cache import root
from npmamba.cpu import cache
from npmamba.cpu.runtime import Int, Kernel, Read, Write

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(cache.__file__).resolve().parent.parent
PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
import numpy as np
from npmamba import embedding_backward
dout, input_ids = np.arange(8, dtype=np.float32).reshape(4, 2), np.array([0, 2, 0, 1])
print(embedding_backward(dout, input_ids, 3).tolist())
"""
ANSWER = "[[4.0, 6.0], [6.0, 7.0], [2.0, 3.0]]\n"


def twice(start: Int, stop: Int, x: Read[1], out: Write[1]):
    for i in range(start, stop):
        out[i] = x[i] + x[i]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder in a place of its own; caches are kept for kernels of the package, so `twice` poses as one."""
    monkeypatch.setenv("NPMAMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.KernelCache, "_said", False)
    monkeypatch.setattr(twice, "__module__", "npmamba.cpu.twice")
    cache.folder.cache_clear()
    yield cache.folder()
    cache.folder.cache_clear()


def run(caplog: Any, dtype: Any = np.float32) -> list[str]:
    """Compile or load `twice` as a new process would, use it, and return what was logged."""
    cache.KernelCache._said = False
    caplog.clear()
    with caplog.at_level(logging.INFO, "npmamba"):
        compiled = Kernel(twice)[dtype]
    out = np.zeros(3, dtype)
    compiled(0, 3, np.array([1, 2, 3], dtype), out)
    assert out.tolist() == [2, 4, 6]
    return [f"{record.levelname} {record.message}" for record in caplog.records]


@pytest.fixture(autouse=True)
def kernels_of_this_file_stay_here(monkeypatch):
    monkeypatch.setattr("npmamba.cpu.runtime.KERNELS", [])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_kernel_is_compiled_once_and_says_where_it_is_kept(folder, caplog):
    assert run(caplog) == [f"INFO compiling kernels (once); they are kept in {folder}"]
    kept = files(folder)
    assert len(kept) == 2
    assert all("npmamba.cpu.twice.twice-float32" in name for name in kept)
    assert run(caplog) == []
    assert files(folder) == kept


def test_a_new_folder_belongs_to_its_user_alone(folder, caplog):
    run(caplog)
    assert os.name == "nt" or folder.stat().st_mode & 0o077 == 0


def test_each_dtype_has_files_of_its_own(folder, caplog):
    """Else two processes that compile for two dtypes could put the one's code where the other's is looked for."""
    run(caplog)
    single = files(folder)
    assert len(run(caplog, np.float64)) == 1
    assert len(files(folder) - single) == 2
    assert run(caplog) == run(caplog, np.float64) == []


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbage(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def empty(content: bytes) -> bytes:
    return b""


def zeros_in_the_middle(content: bytes) -> bytes:
    """What a power failure may leave of a page that was never written."""
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


def one_bit_flipped(content: bytes) -> bytes:
    """In the machine code, which pickle reads as a plain run of bytes."""
    place = content.index(b"ELF") + 2000 if b"ELF" in content else len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("kind", ["nbi", "nbc"], ids=["index", "data"])
@pytest.mark.parametrize("damage", [truncated, garbage, empty, zeros_in_the_middle, one_bit_flipped])
def test_a_damaged_file_is_reported_once_and_replaced(folder, caplog, damage, kind):
    run(caplog)
    (file,) = folder.glob(f"*.{kind}")
    file.write_bytes(damage(file.read_bytes()))
    lines = run(caplog)
    warnings = [line for line in lines if line.startswith("WARNING")]
    damaged = "WARNING cached kernel npmamba.cpu.twice.twice-float32 is damaged and will be compiled again"
    assert len(lines) - len(warnings) == 1
    if (damage, kind) != (one_bit_flipped, "nbi"):  # that may just as well name something else, which is not there
        assert len(warnings) == 1
        assert warnings[0].startswith(damaged)
    assert run(caplog) == []


def test_a_missing_data_file_is_compiled_again(folder, caplog):
    run(caplog)
    next(folder.glob("*.nbc")).unlink()
    assert len(run(caplog)) == 1
    assert run(caplog) == []


@pytest.mark.skipif(os.name == "nt", reason="folders have other permissions there")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(folder, caplog, mode):
    run(caplog)
    folder.chmod(mode)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(run(caplog)) == 1
    assert len(run(caplog, np.float64)) == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(0o700)
    assert run(caplog) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner there")
def test_a_folder_of_somebody_else_is_not_read(folder, caplog, monkeypatch):
    run(caplog)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert len(run(caplog)) == 1


def test_a_folder_that_cannot_be_made_costs_only_the_compilation(folder, caplog):
    folder.parent.write_text("a file where a folder should be")
    for _ in range(2):
        lines = run(caplog)
        assert lines[0].startswith("INFO compiling kernels (once)")
        assert lines[1].startswith("INFO compiled kernels cannot be kept (")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_that_cannot_be_written_costs_only_the_compilation(folder, caplog, monkeypatch, damaged):
    run(caplog)
    if damaged:
        next(folder.glob("*.nbi")).write_bytes(b"")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._Files, "_open_for_write", full)
    assert run(caplog) == [] or damaged
    lines = run(caplog, np.float32 if damaged else np.float64)
    assert lines[-1].startswith("INFO compiled kernels cannot be kept (")


def copy_of_the_sources(to: Path) -> Path:
    """Copy what kernels are made of, and return the place of cache.py in the copy."""
    for pattern in cache.SOURCES:
        for path in PACKAGE.glob(pattern):
            copy = to / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return to / "cpu" / "cache.py"


def folder_for(place: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr(cache, "__file__", str(place))
    cache.folder.cache_clear()
    return cache.folder()


@pytest.mark.parametrize("source", ["scalar.py", "cpu/simd.py", "cpu/scan_tile.py", "cpu/selective_scan.py"])
def test_an_edited_kernel_source_has_another_folder(folder, tmp_path, monkeypatch, source):
    place = copy_of_the_sources(tmp_path / "npmamba")
    assert folder_for(place, monkeypatch) == folder, "where the sources lie does not matter"
    with (tmp_path / "npmamba" / source).open("a") as file:
        file.write("\n")
    edited = folder_for(place, monkeypatch)
    assert edited != folder
    assert edited.parent == folder.parent


def test_a_new_or_renamed_kernel_source_has_another_folder(folder, tmp_path, monkeypatch):
    place = copy_of_the_sources(tmp_path / "npmamba")
    (place.parent / "scan_tile.py").rename(place.parent / "scan_tiles.py")
    renamed = folder_for(place, monkeypatch)
    (place.parent / "more.py").write_text("")
    assert len({folder, renamed, folder_for(place, monkeypatch)}) == 3


def test_another_version_of_numba_or_python_has_another_folder(folder, monkeypatch):
    monkeypatch.setattr(cache.numba, "__version__", "0.0")
    other = folder_for(Path(cache.__file__), monkeypatch)
    monkeypatch.setattr(cache.sys, "version", "3.99")
    assert len({folder, other, folder_for(Path(cache.__file__), monkeypatch)}) == 3


def test_the_folder_of_the_caches_is_where_the_system_keeps_such_things(monkeypatch):
    monkeypatch.delenv("NPMAMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert root() == Path("/somewhere/npmamba")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert root() == Path.home() / ".cache" / "npmamba"
    monkeypatch.setattr(cache.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert root() == Path("/local/npmamba")


def start(place: Path) -> subprocess.Popen:
    environment = {**os.environ, "NPMAMBA_CACHE_DIR": str(place)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, **pipes)


def test_processes_share_the_cache_and_may_start_at_once(tmp_path):
    """Two that find nothing, and a third that compiles nothing."""
    together = [start(tmp_path), start(tmp_path)]
    for process in together:
        answer, log = process.communicate()
        assert answer == ANSWER, log
        assert log.count("compiling kernels (once)") == 1
    answer, log = start(tmp_path).communicate()
    assert (answer, log) == (ANSWER, "")


SCAN = """
import sys
import numpy as np
from npmamba import selective_scan
from npmamba.reference.selective_scan import forward
draw = np.random.default_rng(1).uniform
shapes = {"u": (1, 3, 5), "delta": (1, 3, 5), "A": (3, 2), "B": (1, 2, 5)}
given = [draw(-1, -0.1, shape) if name == "A" else draw(0.1, 1, shape) for name, shape in shapes.items()]
for rule in sys.argv[1:]:
    C = draw(0.1, 1, (1, 2, 5))
    y, expected = selective_scan(*given, C, discretization=rule), forward(*given, C, discretization=rule)[0]
    np.testing.assert_allclose(y, expected, rtol=1e-12)
"""


def test_kernels_of_one_source_that_several_processes_compiled_are_told_apart(tmp_path):
    """Each process numbers what it compiles from one on, so the number does not tell the rules of the scan apart."""
    rules = ["euler", "zoh"]
    environment = {**os.environ, "NPMAMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}

    def scan(*names: str) -> None:
        command = [sys.executable, "-c", SCAN, *names]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for rule in rules:
        scan(rule)
    scan(*rules)
    scan(*reversed(rules))
