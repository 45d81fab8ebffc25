"""What every test runs under: a Hypothesis profile, and outputs that show when nobody wrote them."""

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

# quick and ci draw the same examples every time, so a red run is the change's doing; deep searches anew.
settings.register_profile("quick", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)


def unwritten(shape: Any, dtype: Any) -> np.ndarray:
    """Stand in for ``numpy.empty``, filled with NaN, or with an integer's lowest value."""
    return np.full(shape, np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else np.nan, dtype)


def pytest_report_header() -> str:
    drawn = "new examples every run" if PROFILE == "deep" else "the same examples every run"
    return f"hypothesis profile: {PROFILE} ({drawn}); HYPOTHESIS_PROFILE=quick|ci|deep chooses"


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests for a GPU out where there is none; say what is missing if they were asked for."""
    twice = [item for item in items if _is_for_gpu_alone(item) and "interpreter" in item.callspec.params.values()]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in set(twice)]
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu or backends.missing() is None:
        return
    wanted = config.option.markexpr
    if "gpu" in wanted and "not gpu" not in wanted:
        raise pytest.UsageError(f"pytest -m '{wanted}': {backends.missing()}")
    config.hook.pytest_deselected(items=for_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
