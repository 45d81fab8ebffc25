"""What every test runs under: a Hypothesis profile, several processes, and outputs that show when nobody wrote them."""

from __future__ import annotations

import os
from typing import Any

import backends
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from npmamba.cpu import runtime
from npmamba.cuda import replay

# Kernels compile inside the first example, so neither deadlines nor slow-input checks mean anything here.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}

# name: (examples of a test that names no number, factor for those that do, the same examples every run)
PROFILES = {
    "few": (2, 0.1, True),  # to run every line once, where kernels are slow: without the compiler
    "quick": (20, 1, True),
    "ci": (100, 1, True),
    "deep": (2000, 20, False),
    "release": (20000, 200, False),
}
for _name, (_examples, _, _same) in PROFILES.items():
    settings.register_profile(_name, max_examples=_examples, derandomize=_same, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def unwritten(shape: Any, dtype: Any) -> np.ndarray:
    """Stand in for ``numpy.empty``, filled with NaN, or with an integer's lowest value."""
    return np.full(shape, np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else np.nan, dtype)


def pytest_report_header() -> str:
    profile = settings.get_current_profile_name()
    drawn = "the same examples every run" if settings.default.derandomize else "new examples every run"
    return f"hypothesis profile: {profile} ({drawn}); --hypothesis-profile={'|'.join(PROFILES)} chooses"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Say how many processes ``-n auto`` of pyproject.toml means; None: as many as there are cores.

    One process for files and names, which are done before others have started; where the terminal is needed; and for
    ``-m gpu``, as there is one device.
    """
    option = config.option
    if any(word.startswith(("-n", "--numprocesses")) for word in config.invocation_params.args):
        return None
    files = not all((config.invocation_params.dir / place).is_dir() for place in config.args)
    alone = option.trace or option.capture == "no" or option.collectonly
    if files or alone or option.keyword or getattr(option, "lf", False) or _wants_gpu(option.markexpr):
        return 0
    if backends.missing() is None:
        option.dist = "loadgroup"  # what needs the GPU stays together in one process
    return None


def _wants_gpu(markexpr: str) -> bool:
    return "gpu" in markexpr and "not gpu" not in markexpr


@pytest.fixture(autouse=True)
def outputs_nobody_wrote_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the CPU kernels allocate, so that a cell left out cannot pass as a lucky zero.

    The code is replaced inside the function, as modules hold the function itself under a name of their own.
    """
    monkeypatch.setattr(runtime.empty, "__code__", unwritten.__code__)


@pytest.fixture(autouse=True)
def no_host_code_is_remembered() -> None:
    """Forget what CUDA twins do for arguments of which kind: a test may change it."""
    replay.forget()


@pytest.fixture(scope="session", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device_backend(request: pytest.FixtureRequest) -> backends.Interpreter:
    """Give the place where CUDA twins run, once each: see tests/backends.py."""
    return backends.backend(request.param)


def _is_for_gpu_alone(item: pytest.Item) -> bool:
    """Tell whether a test function carries the mark itself; then its run in the interpreter is meant by nobody."""
    marks = getattr(getattr(item, "function", None), "pytestmark", [])
    return hasattr(item, "callspec") and any(mark.name == "gpu" for mark in marks)


def _scale_examples(items: list[pytest.Item]) -> None:
    """Multiply the numbers of examples that tests name, which are meant for the profile quick."""
    factor = PROFILES.get(settings.get_current_profile_name(), (0, 1))[1]
    for function in {getattr(item, "function", None) for item in items}:
        own = getattr(function, "_hypothesis_internal_use_settings", None)  # where Hypothesis keeps a test's settings
        if own is not None and own.max_examples != settings.default.max_examples:
            examples = max(2, round(own.max_examples * factor))
            function._hypothesis_internal_use_settings = settings(own, max_examples=examples)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests for a GPU out where there is none; say what is missing if they were asked for."""
    _scale_examples(items)
    twice = [item for item in items if _is_for_gpu_alone(item) and "interpreter" in item.callspec.params.values()]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in set(twice)]
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu or backends.missing() is None:
        if getattr(config.option, "loadgroup", False):
            for item in for_gpu:
                item.add_marker(pytest.mark.xdist_group("gpu"))
        return
    if _wants_gpu(config.option.markexpr):
        raise pytest.UsageError(f"pytest -m '{config.option.markexpr}': {backends.missing()}")
    config.hook.pytest_deselected(items=for_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
