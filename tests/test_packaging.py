"""What an import costs, and that all of the package is found. (`.ci/run` builds and installs the wheel.)"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import npmamba

ROOT = Path(npmamba.__file__).resolve().parent.parent
PROJECT = ROOT / "pyproject.toml"
checkout = pytest.mark.skipif(not PROJECT.is_file(), reason="about a checkout, not an installed package")

HELP = """
import contextlib, io, npmamba.cli
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
    npmamba.cli.main(["--help"])
assert "train" in said.getvalue()
"""


def run(code: str, folder: Path | None = None) -> Any:
    """Run `code` in a fresh interpreter in `folder` and return what its last line wrote as JSON."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after `code`."""
    return set(run(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_importing_npmamba_loads_nothing_heavy():
    heavy = {"numba", "llvmlite", "scipy", "cupy", "cuda", "matplotlib"}
    assert not packages(loaded("import npmamba")) & heavy


COMPILER = {"compile", "intrinsics", "translate"}
TWINS = sorted({path.stem for path in (ROOT / "npmamba" / "cuda").glob("*.py")} - COMPILER)


def test_importing_cuda_twins_loads_no_cuda_package():
    """All in one process; what the first one had loaded, the last one would show."""
    imports = "\n".join(f"import npmamba.cuda.{name}" for name in TWINS)
    modules = loaded(imports)
    assert {f"npmamba.cuda.{name}" for name in TWINS} <= modules
    assert not modules & {"numba.cuda"}
    assert not packages(modules) & {"cupy", "cupyx", "cuda", "numba_cuda"}


def test_using_an_operation_loads_only_the_cpu_path():
    modules = loaded("import npmamba\nassert callable(npmamba.selective_scan)")
    assert not modules & {"scipy.signal", "scipy.integrate", "numba.cuda"}
    assert not packages(modules) & {"cupy", "cuda", "numba_cuda", "matplotlib", "rich", "hypothesis"}


def test_help_loads_no_numba_and_no_arrays():
    assert not packages(loaded(HELP)) & {"numba", "llvmlite", "scipy", "numpy", "cupy", "matplotlib"}


def test_help_costs_less_than_a_blink():
    """The processor's time is taken, not the clock's, so that a busy machine does not fail the test."""
    pytest.importorskip("resource", reason="the time of a child process is only told on POSIX")
    code = HELP + "\nimport json, time\nprint(json.dumps(time.process_time()))"
    assert min(run(code) for _ in range(3)) < 0.3


def test_every_public_name_can_be_had_and_is_the_one_listed():
    for name in npmamba.__all__:
        assert name in dir(npmamba)
        home = "" if name == "__version__" else f".{npmamba._HOME[name]}"
        assert getattr(npmamba, name) is getattr(importlib.import_module(f"npmamba{home}"), name)
    with pytest.raises(AttributeError, match="module 'npmamba' has no attribute 'selectiv_scan'"):
        npmamba.selectiv_scan  # noqa: B018


def test_the_linked_folders_are_sub_packages():
    run("import json, npmamba.autodiff.tape, npmamba.cuda\nprint(json.dumps(True))")


@checkout
def test_links_that_came_out_as_text_files_still_lead_there(tmp_path):
    """Git without link support, and some archives, write a link as a file that holds the target's name."""
    for name in ("npmamba", "autodiff"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    for link in [path for path in (tmp_path / "npmamba").iterdir() if path.is_symlink()]:
        target = link.readlink()
        link.unlink()
        link.write_text(str(target), encoding="utf-8")
    code = "import json, npmamba.autodiff.tape\nprint(json.dumps(npmamba.autodiff.tape.__file__))"
    assert Path(run(code, tmp_path)) == tmp_path / "autodiff" / "tape.py"


@checkout
def test_the_core_needs_no_more_than_it_says():
    """Five packages, as the README promises; everything else is an extra."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    core = ["ml_dtypes", "numba>=0.61", "numpy>=2.0", "safetensors>=0.7", "scipy"]
    assert sorted(project["dependencies"]) == core
    for name, extra in project["optional-dependencies"].items():
        heavy = [need for need in extra if need.startswith(("torch", "jax", "tensorflow"))]
        assert not heavy or name == "bench"


@checkout
def test_the_cuda_packages_stay_in_their_extras_and_go_together():
    """`test` compiles CUDA kernels with what `cuda13` brings, where NVIDIA builds it, and needs no CuPy."""
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    where = "; sys_platform == 'linux' and platform_machine == 'x86_64'"
    cuda = re.compile("cu|numba|nvidia|numpy")
    found = {name: {need for need in needs if cuda.match(need)} for name, needs in extras.items()}
    numba = "numba-cuda[cu{}]>=0.30,<0.31"
    assert {name: needs for name, needs in found.items() if needs} == {
        "cuda12": {"cupy-cuda12x>=14,<15", numba.format(12), "numpy<2.5"},
        "cuda13": {"cupy-cuda13x>=14,<15", numba.format(13), "numpy<2.5"},
        "test": {f"{need}{where}" for need in (numba.format(13), "cuda-toolkit==13.0.*", "numpy<2.5")},
    }
    assert "npmamba[test-cpu]" in extras["test"]
