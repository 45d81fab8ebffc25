"""Machine code of CUDA kernels on disk: named after all it is made from, never trusted when damaged or foreign.

None of this needs a device or Numba's CUDA compiler; a stand-in counts what is compiled.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npmamba.cuda
from npmamba.cuda import cache, launch, machine, requirements
from npmamba.cuda.launch import Kernel

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """
from npmamba.cuda.device import Data, Real, Size, Wide, cuda, load, store
from npmamba.scalar import cast, softplus
import numpy as np

scale = 2

def _twice(x):
    return x + x

def _wrapped(x, more=1):
    return _twice(x)

def build(real, width):
    inner = lambda x: x
    def kernel(x: Data, y: Data, n: Size):
        "A docstring."
        i = np.uint32(cuda.threadIdx.x)
        for k in range(width):
            store(y, i, softplus(_wrapped(inner(load(x, i)))) * cast(scale, load(x, i)))
    return kernel
"""


BOUNDS = (np.dtype("float32"), 128, 1, (9, 0))


def file_of(source: str = SOURCE, width: Any = 4, more: tuple[Any, ...] = BOUNDS) -> str:
    """Return the name of the file for the kernel that `source` builds."""
    scope: dict[str, Any] = {"__name__": "made_up"}
    exec(compile(source, "<made up>", "exec"), scope)
    return cache.file_name("kernel-float32", scope["build"](np.dtype("float32"), width), *more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder in a place of its own."""
    monkeypatch.setenv("NPMAMBA_CACHE_DIR", str(tmp_path / "cache"))
    cache.folder.cache_clear()
    machine._say_once.cache_clear()
    yield cache.folder()
    cache.folder.cache_clear()


# --- the name of a file ---


def test_the_same_kernel_has_the_same_file():
    assert file_of() == file_of()
    assert file_of().startswith("kernel-float32-")


def test_comments_places_and_other_kernels_do_not_matter():
    assert file_of("# moved down\n\n\n" + SOURCE.replace("        for", "        # why\n        for")) == file_of()
    assert file_of(SOURCE + "\ndef other(x):\n    return x\n") == file_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale = 2", "scale = 3"),
        ("scale = 2", "scale = 2.0"),
        ("scale = 2", "scale = True + True"),
        ("scale = 2", "scale = np.float32(2)"),
        ("return x + x", "return x * x"),
        ("return x + x", "return x + x + 0"),
        ("return _twice(x)", "return _twice(_twice(x))"),
        ("more=1", "more=2"),
        ("lambda x: x", "lambda x: -x"),
        ("n: Size", "n: Real"),
        ("y: Data", "y: Wide"),
        ("threadIdx.x", "threadIdx.y"),
        ("softplus(", "cast(1, "),
        ("range(width)", "range(width, 9)"),
        ("store(y, i", "store(x, i"),
    ],
)
def test_whatever_the_compiler_sees_has_another_file(old, new):
    assert old in SOURCE
    changed = file_of(SOURCE.replace(old, new))
    assert (changed == file_of()) == (new == "scale = True + True"), "2 by another way is still 2"


def test_constants_dtypes_bounds_and_architectures_have_files_of_their_own():
    names = [
        file_of(),
        file_of(width=8),
        file_of(width=True),
        file_of(width=(4,)),
        file_of(width=np.arange(4)),
        file_of(width=np.arange(2000)),
        file_of(width=np.r_[np.arange(1000), 0, np.arange(1001, 2000)]),
        file_of(width=np.dtype("float16")),
        file_of(width=np.float16),
        file_of(more=(np.dtype("float16"), *BOUNDS[1:])),
        file_of(more=(BOUNDS[0], 256, *BOUNDS[2:])),
        file_of(more=(*BOUNDS[:2], 2, BOUNDS[3])),
        file_of(more=(*BOUNDS[:3], (8, 0))),
    ]
    assert len(set(names)) == len(names)


def test_what_cannot_be_named_is_never_found():
    assert file_of(width=object()) != file_of(width=object())


def test_functions_that_call_each_other_have_a_name():
    source = SOURCE.replace("return x + x", "return _wrapped(x)")
    assert file_of(source) == file_of(source) != file_of()


def test_another_process_finds_the_same_file():
    program = "import test_cuda_cache; print(test_cuda_cache.file_of())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
        assert said.decode().strip() == file_of()


def shipped_files() -> str:
    """Return the names of the files of all kernels that are shipped, as text."""
    kernels = {found.name: found for kernel in launch.declared() for found in kernel.specializations()}
    return "\n".join(cache.file_name(name, *found[:1], *found[2:]) for name, found in sorted(kernels.items()))


def test_another_process_finds_every_kernel_that_is_shipped():
    """None of them sees an object that cannot be named: it would be compiled anew in every process."""
    program = "import test_cuda_cache; print(test_cuda_cache.shipped_files())"
    environment = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    here = shipped_files().split("\n")
    assert [name for name, other in zip(here, said.decode().split(), strict=True) if name != other] == []
    assert len(set(here)) == len(here)


@given(st.text(min_size=1, max_size=300))
def test_every_name_is_a_file_name(name):
    file = cache.file_name(name, file_of)
    assert len(file.encode()) <= 250 or not name.isascii()
    assert file == Path(file).name


# --- the name of the folder ---


@pytest.mark.parametrize("source", cache.SOURCES)
def test_an_edited_compiler_has_another_folder(folder, tmp_path, monkeypatch, source):
    place = tmp_path / "cuda"
    place.mkdir()
    for name in cache.SOURCES:
        shutil.copy(Path(cache.__file__).parent / name, place)
    monkeypatch.setattr(cache, "__file__", str(place / "cache.py"))
    cache.folder.cache_clear()
    assert cache.folder() == folder, "where the sources lie does not matter"
    with (place / source).open("a") as file:
        file.write("\n")
    cache.folder.cache_clear()
    assert cache.folder() != folder
    assert cache.folder().parent == folder.parent


@pytest.mark.parametrize("package", cache.PACKAGES)
def test_other_versions_have_another_folder(folder, monkeypatch, package):
    version = requirements.version
    monkeypatch.setattr(requirements, "version", lambda name: "0.0" if name == package else version(name))
    cache.folder.cache_clear()
    assert cache.folder() != folder


def test_cpu_and_cuda_kernels_lie_side_by_side(folder):
    from npmamba.cpu import cache as cpu

    cpu.folder.cache_clear()
    try:
        assert cpu.folder().parent == folder.parent
        assert cpu.folder() != folder
    finally:
        cpu.folder.cache_clear()


# --- files ---


def test_what_was_written_is_read(folder):
    assert cache.read("a") is None
    cache.write("a", "entry", b"\0code\0")
    assert cache.read("a") == ("entry", b"\0code\0")
    assert os.name == "nt" or folder.stat().st_mode & 0o077 == 0
    assert [path.name for path in folder.iterdir()] == ["a"]


def damaged(folder: Path, caplog: Any, content: bytes) -> list[str]:
    (folder / "a").write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.INFO, "npmamba"):
        assert cache.read("a") is None
    return [f"{record.levelname} {record.message}" for record in caplog.records]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 40, -1])
def test_a_truncated_file_counts_as_absent_and_is_reported(folder, caplog, length):
    cache.write("a", "entry", b"code" * 100)
    whole = (folder / "a").read_bytes()
    said = damaged(folder, caplog, whole[:length])
    assert said == ["WARNING cached kernel a is damaged and will be compiled again (its digest is wrong)"]
    cache.write("a", "entry", b"code" * 100)
    assert cache.read("a") == ("entry", b"code" * 100)


@given(place=st.integers(0, 8 * 400), content=st.binary(min_size=1, max_size=400))
def test_one_flipped_bit_anywhere_is_seen(place, content):
    from npmamba.cache import opened, sealed

    held = bytearray(sealed(content))
    assert opened(bytes(held)) == content
    place %= 8 * len(held)
    held[place // 8] ^= 1 << place % 8
    with pytest.raises(ValueError, match="digest"):
        opened(bytes(held))


def test_a_file_of_something_else_is_refused(folder, caplog):
    from npmamba.cache import sealed

    cache.write("a", "entry", b"code")
    assert len(damaged(folder, caplog, sealed(b"whole, but no entry point"))) == 1


@pytest.mark.skipif(os.name == "nt", reason="folders have other permissions there")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(folder, mode):
    cache.write("a", "entry", b"code")
    folder.chmod(mode)
    cache.write("b", "entry", b"code")
    assert cache.read("a") is None
    assert [path.name for path in folder.iterdir()] == ["a"]
    folder.chmod(0o700)
    assert cache.read("a") == ("entry", b"code")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner there")
def test_a_folder_of_somebody_else_is_not_read(folder, monkeypatch):
    cache.write("a", "entry", b"code")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert cache.read("a") is None


def test_a_folder_that_cannot_be_made_costs_only_the_compilation(folder, caplog):
    folder.parent.write_text("a file where a folder should be")
    with caplog.at_level(logging.INFO, "npmamba"):
        cache.write("a", "entry", b"code")
    assert caplog.records[-1].message.startswith("compiled kernels cannot be kept (")
    assert cache.read("a") is None


@pytest.mark.parametrize("step", ["mkstemp", "write", "replace"])
def test_a_full_or_read_only_disk_costs_only_the_compilation(folder, caplog, monkeypatch, step):
    cache.write("a", "entry", b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if step == "mkstemp":
        monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    elif step == "replace":
        monkeypatch.setattr(cache.os, "replace", full)
    else:
        monkeypatch.setattr(cache.os, "fdopen", lambda handle, mode: os.close(handle) or full())
    with caplog.at_level(logging.INFO, "npmamba"):
        cache.write("a", "entry", b"new")
    assert caplog.records[-1].message == "compiled kernels cannot be kept ([Errno 28] No space left on device)"
    assert cache.read("a") == ("entry", b"old")
    assert [path.name for path in folder.iterdir()] == ["a"], "no litter"


def test_readers_see_whole_files_while_others_write(folder, caplog):
    contents = [(f"entry{n}", bytes([n]) * 50_000) for n in range(4)]
    cache.write("a", *contents[0])
    writers = [threading.Thread(target=lambda c=c: [cache.write("a", *c) for _ in range(25)]) for c in contents]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(cache.read("a"))
    assert seen
    assert all(found in contents for found in seen)
    assert not caplog.records
    assert [path.name for path in folder.iterdir()] == ["a"], "no litter"


# --- the two together ---


def _tripled(real, width):
    def kernel(x: object):
        return width

    return kernel


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for `npmamba.cuda.compile` that lists what it was asked for."""
    asked: list[tuple[str, tuple[int, int]]] = []

    def compile_machine(function, name, dtype, threads, blocks, cc):
        asked.append((name, cc))
        return types.SimpleNamespace(name=f"entry_{function(None)}", code=f"{name} for {cc}".encode())

    monkeypatch.setattr(npmamba.cuda, "compile", types.SimpleNamespace(compile_machine=compile_machine), raising=False)
    monkeypatch.setattr(requirements, "require_compiler", lambda cc: None)
    monkeypatch.setattr("npmamba.cuda.launch.KERNELS", [])
    return asked


def test_each_specialization_is_compiled_once_for_each_architecture(folder, compiler, caplog):
    kernel = Kernel(_tripled, threads=lambda width: 32 * width)
    wanted = [("float32", 1), ("float32", 2), ("bfloat16", 1)]
    with caplog.at_level(logging.INFO, "npmamba"):
        for _ in range(2):
            for dtype, width in wanted:
                found = machine.machine_code(kernel.specialize(dtype, width=width), (9, 0))
                name = f"test_cuda_cache.tripled-{dtype}-width={width}"
                assert found == (f"entry_{width}", f"{name} for (9, 0)".encode())
        machine.machine_code(kernel.specialize("float32", width=1), (8, 0))
    assert len(compiler) == 4
    said = [record.message for record in caplog.records]
    assert said == [f"compiling CUDA kernels (once); they are kept in {folder}"]


def test_a_damaged_kernel_is_compiled_again(folder, compiler):
    specialization = Kernel(_tripled, threads=32).specialize("float32", width=1)
    good = machine.machine_code(specialization, (9, 0))
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert machine.machine_code(specialization, (9, 0)) == good
    assert machine.machine_code(specialization, (9, 0)) == good
    assert len(compiler) == 2


def test_kept_kernels_need_no_compiler(folder, compiler, monkeypatch):
    specialization = Kernel(_tripled, threads=32).specialize("float32", width=1)
    good = machine.machine_code(specialization, (9, 0))

    def missing(cc):
        raise requirements.CudaUnavailableError("numba-cuda is not installed", "install it")

    monkeypatch.setattr(requirements, "require_compiler", missing)
    assert machine.machine_code(specialization, (9, 0)) == good
    with pytest.raises(requirements.CudaUnavailableError, match="numba-cuda is not installed; to mend it: install it"):
        machine.machine_code(specialization, (8, 0))
    assert len(compiler) == 1
