"""What tests/conftest.py decides: how many examples are drawn, by how many processes, and what a failure prints."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
from hypothesis import given, reproduce_failure, settings
from hypothesis import strategies as st

TESTS = pathlib.Path(__file__).resolve().parent
FAILING = """
from hypothesis import given, strategies
@given(strategies.integers(0, 10**6))
def test_planted(x):
    assert x < 1234
"""


def processes(*args: str, **options: Any) -> int | None:
    """Ask the hook as pytest-xdist does; None: as many as there are cores."""
    chosen = {"trace": False, "capture": "fd", "collectonly": False, "keyword": "", "lf": False, "markexpr": "not slow"}
    places = [word for word in args if not word.startswith("-")]
    asked = SimpleNamespace(args=args, dir=TESTS.parent)
    option = SimpleNamespace(**{**chosen, **options}, dist="no")
    config: Any = SimpleNamespace(args=places or ["tests"], invocation_params=asked, option=option)
    return conftest.pytest_xdist_auto_num_workers(config)


def test_whole_folders_are_spread_and_all_else_is_not():
    assert processes() is processes("tests") is processes("-x") is processes(markexpr="slow") is None
    assert processes("tests/test_tape.py") == processes("tests", "tests/test_tape.py::test_x") == 0
    for alone in ({"trace": True}, {"capture": "no"}, {"collectonly": True}, {"keyword": "tape"}, {"lf": True}):
        assert processes(**alone) == 0


def test_one_process_has_the_gpu():
    assert processes(markexpr="gpu") == processes(markexpr="gpu and not slow") == 0
    assert processes(markexpr="not gpu") is None


def test_who_names_a_number_of_processes_gets_it():
    assert processes("-n", "auto", "tests/test_tape.py") is processes("-nauto", keyword="tape") is None
    assert processes("--numprocesses=auto", "tests/test_tape.py") is None


@pytest.fixture
def profile(request):
    """Load a profile for the time of a test."""
    before = settings.get_current_profile_name()
    settings.load_profile(request.param)
    yield request.param
    settings.load_profile(before)


@pytest.mark.parametrize("profile", conftest.PROFILES, indirect=True)
def test_a_profile_draws_as_many_examples_as_its_row_says(profile):
    examples, factor, same = conftest.PROFILES[profile]
    assert settings.default.derandomize is same
    assert settings.default.print_blob

    @settings(max_examples=40)
    @given(st.integers())
    def own(x):
        pass

    @given(st.integers())
    def default(x):
        pass

    conftest._scale_examples([SimpleNamespace(function=f) for f in (own, default, default, own)])
    drawn = [test._hypothesis_internal_use_settings.max_examples for test in (own, default)]
    assert drawn == [40 * factor, examples]


@pytest.mark.parametrize("profile", ["quick", "ci", "deep"])
def test_a_failure_comes_again_from_what_it_printed(profile, tmp_path):
    """Here by the test alone, in another process: no database of examples is at hand."""
    (tmp_path / "test_planted.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir=.", f"--hypothesis-profile={profile}", "test_planted.py"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PY_COLORS": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"hypothesis profile: {profile}" in done.stdout
    blob = re.search(r"@reproduce_failure\('(.+)', b'(.+)'\)", done.stdout)
    assert blob is not None, done.stdout
    scope: dict[str, Any] = {}
    exec(FAILING, scope)
    again = reproduce_failure(blob[1], blob[2].encode())(scope["test_planted"])
    with pytest.raises(AssertionError):
        again()
