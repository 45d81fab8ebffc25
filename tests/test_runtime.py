"""Threads and memory of the CPU kernels: every task once, errors come out, forks and many callers are safe."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import scan_case
from hypothesis import given, settings
from hypothesis import strategies as st

from npmamba.cpu import runtime
from npmamba.cpu.runtime import Int, Kernel, Read, Write, launch, num_threads, set_num_threads
from npmamba.ops.selective_scan import selective_scan, selective_scan_backward

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_work_is_too_small(monkeypatch):
    monkeypatch.setattr(runtime, "SERIAL_WORK", 0)


@pytest.fixture(autouse=True)
def threads_are_put_back():
    yield
    set_num_threads(None)


def compiled(function: Any) -> Any:
    """Let `launch` take a Python function for the compiled kernel of float32."""
    return {np.float32: function}


@settings(max_examples=60)
@given(tasks=st.integers(0, 200), threads=st.integers(1, 9), work=st.sampled_from([0, 1 << 20]))
def test_every_task_is_done_once(tasks, threads, work):
    """Each piece is a range of tasks; together they are all of them, whichever thread takes which."""
    done: list[range] = []
    set_num_threads(threads)
    launch(compiled(lambda start, stop, add: add(range(start, stop))), np.float32, tasks, done.append, work=work)
    assert sorted(task for piece in done for task in piece) == list(range(tasks))
    assert len(done) <= max(1, threads * runtime.PIECES_PER_THREAD)
    assert len(done) == 1 or work


def test_little_work_stays_on_the_calling_thread():
    names: list[str] = []
    set_num_threads(4)
    here = threading.current_thread().name
    run = compiled(lambda start, stop: names.append(threading.current_thread().name))
    launch(run, np.float32, 8, work=runtime.SERIAL_WORK - 1)
    assert names == [here]


def test_several_threads_work_at_the_same_time(no_work_is_too_small):
    """Each waits for the others; alone, the first would wait forever."""
    set_num_threads(3)
    barrier = threading.Barrier(3, timeout=30)
    names = set()

    def run(start: int, stop: int) -> None:
        names.add(threading.current_thread().name)
        barrier.wait()

    launch(compiled(run), np.float32, 3, work=1)
    assert len(names) == 3


@pytest.mark.parametrize("guilty", [0, 5, 11])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_error_in_any_task_reaches_the_caller_and_the_threads_live_on(no_work_is_too_small, guilty, threads):
    set_num_threads(threads)
    done: list[int] = []

    def fail(start: int, stop: int) -> None:
        if start <= guilty < stop:
            raise MemoryError("no scratch")

    for _ in range(2):
        with pytest.raises(MemoryError, match="no scratch"):
            launch(compiled(fail), np.float32, 12, work=1)
    launch(compiled(lambda start, stop: done.extend(range(start, stop))), np.float32, 12, work=1)
    assert sorted(done) == list(range(12))


def test_callers_do_not_wait_for_threads_that_others_keep_busy(no_work_is_too_small):
    """A caller that has done all the tasks itself returns, though the pool never had a thread for it."""
    set_num_threads(2)
    busy, release = threading.Barrier(3, timeout=30), threading.Event()

    def block(start: int, stop: int) -> None:
        busy.wait()
        release.wait(30)

    blocked = launch_in_background(block, 2)
    busy.wait()
    runtime._pool.submit(release.wait, 30)
    done: list[int] = []
    free = launch_in_background(lambda start, stop: done.extend(range(start, stop)), 12)
    free.join(10)
    returned = not free.is_alive()
    release.set()
    blocked.join()
    assert returned
    assert sorted(done) == list(range(12))


def launch_in_background(function: Any, tasks: int) -> threading.Thread:
    thread = threading.Thread(target=launch, args=(compiled(function), np.float32, tasks), kwargs={"work": 1})
    thread.start()
    return thread


def scan(seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    case = scan_case(rng, 2, 300, 20, 3, dtype=np.float32, z=True, D=True)
    dout = rng.standard_normal(case["u"].shape, np.float32)
    return [x.tobytes() for x in (selective_scan(**case), *selective_scan_backward(dout, **case)) if x is not None]


def test_sixteen_callers_at_once_get_the_bits_of_one(no_work_is_too_small):
    set_num_threads(1)
    serial = [scan(seed) for seed in range(16)]
    set_num_threads(3)
    with ThreadPoolExecutor(16) as callers:
        for _ in range(3):
            assert list(callers.map(scan, range(16))) == serial


def test_the_number_of_threads_may_change_while_others_compute(no_work_is_too_small):
    set_num_threads(2)
    serial = [scan(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        results = [callers.submit(scan, i % 4) for i in range(60)]
        for i in range(60):
            set_num_threads(1 + i % 5)
        assert [r.result() for r in results] == [serial[i % 4] for i in range(60)]


FORK = """
import os
import sys
import warnings
import numpy as np
warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about forks of processes with threads
from npmamba import embedding
from npmamba.cpu import runtime
runtime.set_num_threads(3)
runtime.SERIAL_WORK = 0
weight, ids = np.arange(600, dtype=np.float32).reshape(200, 3), np.arange(400) % 200
wanted = weight[ids].tobytes()
assert embedding(weight, ids).tobytes() == wanted
done = []
runtime.launch({np.float32: lambda a, b: done.append((a, b))}, np.float32, 40, work=1)
assert runtime._pool is not None
child = os.fork()
if child == 0:
    forgotten = runtime._pool is None  # its threads are the parent's: there, what they were given would not be begun
    done.clear()
    runtime.launch({np.float32: lambda a, b: done.extend(range(a, b))}, np.float32, 40, work=1)
    right = sorted(done) == list(range(40)) and embedding(weight, ids).tobytes() == wanted
    os._exit(0 if right and forgotten and runtime._pool is not None else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or embedding(weight, ids).tobytes() != wanted)
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="no fork there")
def test_a_forked_child_computes_after_its_parent_used_threads():
    subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("threads", [0, -1, 2.0, "2"])
def test_a_number_of_threads_is_a_whole_number_from_1_up(threads):
    message = f"^set_num_threads: threads must be a whole number from 1 up, or None, got {threads!r}$"
    with pytest.raises(ValueError, match=message):
        set_num_threads(threads)


def test_the_number_of_threads_is_as_set_or_named_or_that_of_the_cores(monkeypatch):
    monkeypatch.delenv("NPMAMBA_NUM_THREADS", raising=False)
    cores = num_threads()
    assert cores >= 1
    monkeypatch.setenv("NPMAMBA_NUM_THREADS", "5")
    assert num_threads() == 5
    set_num_threads(7)
    assert num_threads() == 7
    set_num_threads(None)
    assert num_threads() == 5
    monkeypatch.setenv("NPMAMBA_NUM_THREADS", "")
    assert num_threads() == cores


@pytest.mark.parametrize("named", ["0", "-1", "two", "1.5", " ", "²"])
def test_a_wrong_environment_variable_is_named(monkeypatch, named):
    monkeypatch.setenv("NPMAMBA_NUM_THREADS", named)
    with pytest.raises(ValueError, match=f"^NPMAMBA_NUM_THREADS must be a whole number from 1 up, got {named!r}$"):
        selective_scan(**scan_case(np.random.default_rng(0), 1, 4, 2, 3, dtype=np.float32))


# --- kernels ---


def add(start: Int, stop: Int, x: Read[2], out: Write[2]):
    for i in range(start, stop):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] + 1


def test_a_kernel_is_compiled_once_for_a_dtype_and_takes_any_strides():
    kernel = Kernel(add)
    assert kernel.__name__ == "add"
    assert kernel[np.float32] is kernel["float32"]
    assert kernel[np.float64] is not kernel[np.float32]
    x = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    for view in (x, x.T, x[::-1, ::2], np.broadcast_to(x[0], (3, 6)), x[:0]):
        view.flags.writeable = False
        out = np.zeros(view.shape[::-1], np.float32).T
        kernel[np.float32](0, len(view), view, out)
        np.testing.assert_array_equal(out, view + 1)


def test_a_kernel_takes_arrays_of_its_dtype_only():
    kernel = Kernel(add)[np.float32]
    with pytest.raises(TypeError):
        kernel(0, 1, np.zeros((1, 1)), np.zeros((1, 1)))


def test_scratch_memory_begins_on_a_cache_line_and_is_writable():
    for dtype in (np.float32, np.float64):
        for size in (1, 17, 1000):
            block = runtime._aligned((size, 2), np.zeros(1, dtype))
            assert (block.ctypes.data % 64, block.shape, block.dtype) == (0, (size, 2), np.dtype(dtype))
            block[...] = 1


def test_all_kernels_in_both_dtypes_are_few():
    from npmamba.doctor import declare_kernels

    declare_kernels()
    ours = {kernel.name for kernel in runtime.KERNELS if kernel.name.startswith("npmamba.")}
    assert len(ours) > 20  # they are counted at all
    assert 2 * len(ours) <= 60, "each costs seconds in a first run: make options of a kernel, not kernels of an option"


def test_there_are_as_many_threads_as_cores_that_this_process_may_use(monkeypatch):
    monkeypatch.delenv("NPMAMBA_NUM_THREADS", raising=False)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", {0: {4, 6, 7}, 1: {4}}.__getitem__, raising=False)
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: 8)
    assert runtime.num_threads() == 3
    monkeypatch.delattr(runtime.os, "sched_getaffinity")
    assert runtime.num_threads() == 8
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: None)
    assert runtime.num_threads() == 1
