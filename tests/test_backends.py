"""The places where CUDA twins are tested: one test function for both, and what happens where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import backends
import numpy as np
import pytest
from arrays import layouts, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import npmamba
from npmamba.cuda import arrays, launch
from npmamba.cuda.device import Data, Size, Stride, cuda, load, store
from npmamba.cuda.launch import Kernel

pytest.importorskip("greenlet", reason="the kernel interpreter needs the extra `fuzz`")
uint32, int64 = np.uint32, np.int64
schedules = st.none() | st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def kernels_of_this_file_stay_here(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", [])


@settings(max_examples=5)
@given(seed=schedules, name=st.sampled_from(["fortran", "part of a row", "negative strides"]))
def test_one_test_runs_in_the_interpreter_and_on_a_gpu(device_backend, seed, name):
    def copy(x):
        y = arrays.empty(x, x.shape, x.dtype)
        kernel.launch((1,), x.dtype, (x, y, *arrays.strides(x), x.shape[1], x.size))
        return {"y": (y, None)}

    kernel = Kernel(_gather, threads=32)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = layouts(x)[name]
    assert same_bits(device_backend.call(copy, view, seed=seed)["y"][0], x)
    moved = device_backend.array(view)
    assert moved.strides == view.strides
    assert (arrays.address(moved) - view.ctypes.data) % 16 == 0


def _gather(real):
    def gathered(x: Data, y: Data, row: Stride, column: Stride, columns: Size, n: Size):
        t = uint32(cuda.threadIdx.x)
        if t < n:
            store(y, t, load(x, int64(t // columns) * row + int64(t % columns) * column))

    return gathered


@pytest.mark.skipif(backends.missing() is None, reason="there is a GPU")
def test_without_a_gpu_its_tests_are_left_out_or_refused_in_a_sentence(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU", encoding="utf-8")
    (tmp_path / "test_both.py").write_text(
        "def test_both(device_backend):\n    assert not device_backend.fast\n", encoding="utf-8"
    )
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(Path(npmamba.__file__).parent.parent)])}

    def run_pytest(*options):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        return subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)

    assert "1 passed, 1 deselected" in run_pytest().stdout
    refused = run_pytest("-m", "gpu")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: pytest -m 'gpu': CUDA kernels cannot run: " in refused.stderr
