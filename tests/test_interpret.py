"""The kernel interpreter: every planted mistake is found in every schedule, and nothing where there is none."""

from __future__ import annotations

import doctest
import importlib
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npmamba

pytest.importorskip("greenlet", reason="the kernel interpreter needs the extra `fuzz`")

from planted import BLOCKS, BUGS, THREADS

from npmamba import scalar
from npmamba.cuda import arrays, device, launch
from npmamba.cuda.device import (
    Data,
    Flags,
    Long,
    Real,
    Size,
    Stride,
    Wide,
    commit_async,
    copy_async,
    cuda,
    load,
    load4,
    load8,
    rcp,
    shift,
    store,
    store8,
    wait_async,
    wide_dtype,
)
from npmamba.cuda.launch import Kernel
from npmamba.scalar import cast, fma, silu, softplus
from npmamba.testing import words
from npmamba.testing.findings import (
    DivergentBarrierError,
    KernelError,
    OutOfRangeError,
    RaceError,
    ShuffleError,
    UninitializedReadError,
)
from npmamba.testing.interpret import interpret, interpreted

uint32, int64 = np.uint32, np.int64
DTYPES = [np.dtype(name) for name in ("float16", ml_dtypes.bfloat16, "float32", "float64")]
schedules = st.none() | st.integers(0, 2**32 - 1)
five = settings(max_examples=5)


@pytest.fixture(autouse=True)
def kernels_of_this_file_stay_here(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", [])


# --- the table of planted mistakes ---


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.make.__name__)
@five
@given(seed=schedules)
def test_a_planted_mistake_is_found_in_every_schedule(bug, seed):
    with pytest.raises(bug.finding) as found:
        interpret(bug.make(True), BLOCKS, THREADS, *bug.arguments(), seed=seed, check=bug.check)
    assert type(found.value) is bug.finding
    assert bug.array is None or found.value.array.split()[-1] == bug.array
    source = Path(planted.__file__).read_text(encoding="utf-8").splitlines()
    assert found.value.parties
    for party in found.value.parties:
        assert Path(party.file).name == "planted.py"
        assert source[party.line - 1].strip() in str(party)
        assert str(party) in str(found.value)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.make.__name__)
@five
@given(seed=schedules)
def test_without_its_mistake_a_kernel_passes_in_every_schedule(bug, seed):
    x, y, n = bug.arguments()
    before = x.copy()
    interpret(bug.make(False), BLOCKS, THREADS, x, y, n, seed=seed, check=bug.check)
    np.testing.assert_array_equal(y, np.ravel(bug.expected(before)).astype(np.float32))


def test_every_kind_of_finding_is_planted():
    assert {bug.finding for bug in BUGS} == set(KernelError.__subclasses__())


def test_a_message_names_the_element_and_both_threads_with_their_lines():
    bug = next(bug for bug in BUGS if bug.make is planted.no_warp_barrier)
    with pytest.raises(RaceError) as found:
        interpret(bug.make(True), BLOCKS, THREADS, *bug.arguments())
    reader, writer = found.value.parties
    assert (found.value.array, found.value.index) == ("shared array tile", 0)
    assert (reader.thread, writer.thread, writer.block) == ((1, 0, 0), (0, 0, 0), (0, 0, 0))
    assert str(found.value) == (
        f"shared array tile[0] is read by thread 1 of block 0 at planted.py:{reader.line} "
        f"`neighbour = tile[t ^ uint32(1)]`, written by thread 0 of block 0 at planted.py:{writer.line} "
        "`tile[t] = neighbour`, with no barrier between the two"
    )


# --- races: the record of each element against all pairs of accesses ---

ACTORS = [(block, 32 * warp + lane) for block in range(2) for warp in range(2) for lane in range(2)]
accesses = st.tuples(st.sampled_from(ACTORS), st.integers(0, 2), st.booleans())
programs = st.lists(
    st.tuples(st.lists(accesses, max_size=4), st.sampled_from(["barrier", "warp", "none"])), min_size=1, max_size=5
)


def races(program):
    """Tell by definition: are there two accesses of a cell by two threads, one a write, that nothing orders?"""
    every = [(phase, *access) for phase, (some, _) in enumerate(program) for access in some]
    for first, a, cell, writes in every:
        for second, b, other_cell, other_writes in every:
            between = {separator for _, separator in program[first:second]}
            if a == b or cell != other_cell or not (writes or other_writes) or first > second:
                continue
            ordered = "barrier" in between or ("warp" in between and a[1] // 32 == b[1] // 32)
            if a[0] != b[0] or not ordered:
                return True
    return False


def follow(program):
    def kernel(x):
        me = cuda.blockIdx.x, cuda.threadIdx.x
        for some, separator in program:
            for who, cell, writes in some:
                if who == me and writes:
                    x[cell] = 1
                elif who == me:
                    x[cell]
            if separator == "barrier":
                cuda.syncthreads()
            elif separator == "warp":
                cuda.syncwarp()

    return kernel


@settings(max_examples=150)
@given(program=programs, seed=schedules)
def test_a_race_is_found_exactly_if_two_accesses_are_not_ordered(program, seed):
    try:
        interpret(follow(program), 2, 34, np.zeros(3), seed=seed)
    except RaceError:
        assert races(program)
    else:
        assert not races(program)


def test_the_definition_of_a_race_can_say_both():
    write = [((0, 0), 0, True)], "none"
    assert not races([write, write])
    assert races([write, ([((0, 1), 0, False)], "none")])


# --- numbers ---


def _rowwise(real, data, width):
    def rowwise(x: Data, weight: Wide, y: Data, mask: Flags, counts: Long, row: Stride, n: Size, eps: Real):
        tile = cuda.shared.array(width, real, 16)
        kept = cuda.local.array(2, data)
        t, b = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        p = shift(x, int64(b) * row)
        kept[1] = p[t]
        tile[t] = silu(load(p, t)) + eps * load(weight, t)
        cuda.syncthreads()
        total = tile[uint32(width - 1) - t]
        for k in range(5):
            total += cuda.shfl_xor_sync(-1, total, 1 << k)
        store(shift(y, int64(b) * row), t, total * load(kept, 1))
        if t == uint32(0):
            mask[b] = 1
            counts[b] = n - uint32(2**32 - 1)

    return rowwise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@five
@given(seed=schedules)
def test_a_launch_runs_on_numpy_arrays(dtype, seed):
    kernel = Kernel(_rowwise, threads=lambda width: width)
    rng = np.random.default_rng(1)
    real = wide_dtype(dtype)
    x = rng.standard_normal((3, 80)).astype(dtype)[:, :64]
    y, weight = np.zeros((3, 80), dtype)[:, :64], rng.standard_normal(64).astype(real)
    mask, counts = np.zeros(3, bool), np.zeros(3, np.int64)
    with interpreted(seed):
        kernel.launch((3,), dtype, (x, weight, y, mask, counts, 80, 3, 0.5), width=64)
    wide = x.astype(np.float64)
    total = (silu(wide) + 0.5 * weight).reshape(3, 2, 32)[:, ::-1].sum(2).repeat(32, axis=1)
    np.testing.assert_allclose(y.astype(np.float64), total * wide, rtol=4 * ml_dtypes.finfo(dtype).eps, atol=1e-4)
    assert mask.all()
    assert counts.tolist() == [4, 4, 4]


def _types(real):
    def types(x: Wide, y: Wide, n: Size):
        seen = [load(x, 0), silu(load(x, 0)), softplus(x[0]), rcp(x[0]), fma(x[0], x[0], x[0]), cast(0.1, x[0])]
        seen += [cuda.shfl_xor_sync(-1, x[0], 1), real(0.1), x[0] * real(3) + 1, math.exp(x[0])]
        seen += [cuda.libdevice.exp2f(x[0]), cuda.libdevice.fast_fdividef(x[0], x[0]), cuda.fma(x[0], x[0], x[0])]
        assert all(type(v) is real for v in seen), [type(v) for v in seen]
        assert type(n + uint32(1)) is uint32
        assert n * n == uint32(1)
        assert uint32(0) - uint32(1) == n

    return types


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_keep_their_types_and_wrap_around_without_a_warning(dtype):
    x = np.ones(4, dtype)
    with interpreted():
        Kernel(_types, threads=32).launch((1,), dtype, (x, x, 2**32 - 1))


def test_infinity_and_nan_come_without_an_error():
    def kernel(x, y):
        y[0], y[1], y[2] = math.exp(x[0]), math.log(x[1]), math.sqrt(x[2])
        y[3], y[4] = cuda.libdevice.exp2f(x[0]), x[0] * x[0] * x[0] * x[0]

    y = np.zeros(5, np.float32)
    interpret(kernel, 1, 1, np.array([1e30, 0, -1], np.float32), y)
    np.testing.assert_array_equal(y, [np.inf, -np.inf, np.nan, np.inf, np.inf])


@five
@given(seed=schedules)
def test_shuffles_and_votes_follow_their_definitions(seed):
    def kernel(up, down, xor, one, vote):
        t = cuda.threadIdx.x
        up[t] = cuda.shfl_up_sync(-1, t, 3)
        down[t] = cuda.shfl_down_sync(-1, t, 3)
        xor[t] = cuda.shfl_xor_sync(-1, t, 5)
        one[t] = cuda.shfl_sync(-1, t, 7)
        vote[t] = cuda.ballot_sync(-1, t % 3 == 0)
        assert cuda.any_sync(-1, t % 32 == 4)
        assert not cuda.all_sync(-1, t % 32 == 4)
        assert cuda.syncthreads_count(t < 5) == 5

    out = [np.zeros(64, np.int64) for _ in range(5)]
    interpret(kernel, 1, 64, *out, seed=seed)
    t = np.arange(64)
    lane, base = t % 32, t - t % 32
    assert out[0].tolist() == np.where(lane >= 3, t - 3, t).tolist()
    assert out[1].tolist() == np.where(lane < 29, t + 3, t).tolist()
    assert out[2].tolist() == (t ^ 5).tolist()
    assert out[3].tolist() == (base + 7).tolist()
    assert out[4].tolist() == [sum(1 << k for k in range(32) if (b + k) % 3 == 0) for b in base]


def test_a_block_that_ends_in_half_a_warp_shuffles_among_the_lanes_it_has():
    def kernel(y, n):
        t = cuda.threadIdx.x
        y[t] = cuda.shfl_xor_sync(-1, t, n)

    y = np.zeros(48)
    interpret(kernel, 1, 48, y, 1)
    assert y.tolist() == (np.arange(48) ^ 1).tolist()
    with pytest.raises(ShuffleError, match="reads from lane 16, which is not among the lanes 0xffff"):
        interpret(kernel, 1, 48, y, 16)


AS_THEY_ARE = {scalar.exp2m1, scalar.is_double}
"""Primitives that the interpreter runs as arrays have them."""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "primitive", [p for p in scalar.PRIMITIVES if p not in AS_THEY_ARE], ids=lambda primitive: primitive.__name__
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_a_stand_in_computes_what_the_primitive_does(primitive, dtype, seed):
    """`npmamba.scalar` defines them on arrays; the interpreter has faster ones for single numbers."""
    count = primitive.__code__.co_argcount
    drawn = np.random.default_rng(seed).standard_normal((40, count)) * 10
    if primitive is scalar.log1p:
        drawn = np.abs(drawn) / 100
    x = np.concatenate([drawn, np.repeat([[np.inf], [-np.inf], [np.nan], [0.0], [200.0]], count, 1)]).astype(dtype)
    x = [row if primitive is not scalar.select else [row[0] > 0, *row[1:]] for row in x]
    with np.errstate(all="ignore"):
        found = [words.STAND_INS[primitive](*row) for row in x]
        expected = [primitive(*row) for row in x]
    assert {type(v) for v in found} == {dtype}
    cancels = 4e-6 if primitive is scalar.fma else np.finfo(dtype).tiny
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(dtype).eps, atol=cancels)


def test_every_word_that_moves_numbers_has_a_stand_in():
    names = {name for name in vars(device) if name.startswith(("load", "store", "copy_", "commit_", "wait_"))}
    assert names >= {"load", "store8", "wait_async"}
    assert {getattr(device, name) for name in names} <= words.STAND_INS.keys()


# --- Numba's kernels ---


def test_arrays_of_several_axes_grids_and_slices():
    def kernel(x, y):
        tile = cuda.shared.array((4, 8), np.float64)
        i, j = cuda.grid(2)
        a, b = cuda.threadIdx.y, cuda.threadIdx.x
        if i < x.shape[0] and j < x.shape[1]:
            tile[a, b] = x[i, j]
            row = x[i]
            y[j, i] = tile[a][b] + row[j:][0] + len(row) + x.ndim
        cuda.atomic.add(y, (0, 6), 1.0)

    x, y = np.arange(35.0).reshape(5, 7), np.zeros((7, 7))
    interpret(kernel, (1, 2), (8, 4), x, y[:, ::-1])
    expected = np.zeros((7, 7))
    expected[:, :5] = 2 * x.T + 7 + 2
    expected[0, 6] = 64
    np.testing.assert_array_equal(y[:, ::-1], expected)


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    def kernel(y, n):
        tile = cuda.shared.array(0, np.float32)
        t = cuda.threadIdx.x
        tile[t] = t
        cuda.syncthreads()
        y[t] = tile[n - t]

    y = np.zeros(8)
    interpret(kernel, 1, 8, y, 7, shared=32)
    assert y.tolist() == list(range(7, -1, -1))
    with pytest.raises(OutOfRangeError, match="shared array tile"):
        interpret(kernel, 1, 8, y, 8, shared=32)


def test_a_kernel_and_a_device_function_of_numba():
    numba_cuda = pytest.importorskip("numba.cuda", exc_type=ImportError)

    @numba_cuda.jit(device=True)
    def twice(x):
        return numba_cuda.libdevice.fmaf(x, np.float32(1), x)

    @numba_cuda.jit
    def kernel(x, y):
        i = numba_cuda.grid(1)
        y[i] = twice(numba_cuda.shfl_xor_sync(-1, x[i], 1))

    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    interpret(kernel, 2, 32, x, y)
    assert y.tolist() == (2 * (np.arange(64) ^ 1)).tolist()


def test_words_of_numba_under_names_of_their_own():
    numba_cuda = pytest.importorskip("numba.cuda", exc_type=ImportError)
    libdevice = pytest.importorskip("numba.cuda.libdevice", exc_type=ImportError)
    fmaf, thread, block, count = libdevice.fmaf, numba_cuda.threadIdx, numba_cuda.blockIdx, numba_cuda.popc
    shuffle, sleep = numba_cuda.shfl_xor_sync, numba_cuda.nanosleep

    def kernel(x, y, tired):
        i = 8 * block.x + thread.x
        y[i] = fmaf(shuffle(-1, x[i], 1), np.float32(2), np.float32(count(i)))
        if tired:
            sleep(3)

    x, y = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    interpret(kernel, 2, 8, x, y, False)
    assert y.tolist() == [2 * (i ^ 1) + i.bit_count() for i in range(16)]
    with pytest.raises(KernelError, match=r"no stand-in for cuda.nanosleep: thread 0 of block 0 at test_interpret.py"):
        interpret(kernel, 2, 8, x, y, True)


def test_words_with_dots_under_names_of_their_own_and_a_number_that_has_none():
    numba_cuda = pytest.importorskip("numba.cuda", exc_type=ImportError)
    array, add, lane = numba_cuda.shared.array, numba_cuda.atomic.add, numba_cuda.laneid

    def kernel(y):
        one = array(1, np.float32)
        if cuda.threadIdx.x == 0:
            one[0] = 2
        cuda.syncthreads()
        add(y, 0, one[0])

    y = np.zeros(1, np.float32)
    interpret(kernel, 1, 4, y)
    assert y.tolist() == [8]
    with pytest.raises(KernelError, match="laneid under no other name: write cuda.laneid"):
        interpret(lambda y: add(y, lane, 1), 1, 4, y)


def test_the_last_block_may_read_what_the_others_wrote_before_their_tickets():
    def kernel(parts, tickets, y, ordered):
        b = cuda.blockIdx.x
        parts[b] = b + 1
        cuda.threadfence()
        if not ordered or cuda.atomic.add(tickets, 0, 1) == cuda.gridDim.x - 1:
            y[0] = parts[0] + parts[1] + parts[2]

    parts, tickets, y = np.zeros(3), np.zeros(1, np.int64), np.zeros(1)
    for seed in range(3):
        tickets[0] = 0
        interpret(kernel, 3, 1, parts, tickets, y, True, seed=seed)
        assert y[0] == 6
        with pytest.raises(RaceError, match="and nothing orders blocks"):
            interpret(kernel, 3, 1, parts, tickets, y, False, seed=seed)


def test_one_shuffle_called_from_two_places_is_two():
    def partner(v):
        return cuda.shfl_xor_sync(-1, v, 1)

    def kernel(y):
        t = cuda.threadIdx.x
        y[t] = partner(t) if t < 16 else partner(-t)

    with pytest.raises(DivergentBarrierError, match=r"return cuda.shfl_xor_sync\(-1, v, 1\)"):
        interpret(kernel, 1, 32, np.zeros(32))


# --- arguments ---


def _copy(real):
    def copied(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        if t < n:
            store(y, t, load(x, t))

    return copied


def run(x, y, n, **options):
    with interpreted(**options):
        Kernel(_copy, threads=32).launch((1,), np.float32, (x, y, n))


def test_none_may_be_passed_but_not_followed():
    run(None, None, 0)
    with pytest.raises(OutOfRangeError, match="x is None, but is followed: thread 0 of block 0 at test_interpret.py"):
        run(None, np.zeros(4, np.float32), 4)


@pytest.mark.parametrize("check", ["races", False])
def test_a_view_ends_where_its_elements_end(check):
    whole, y = np.arange(32, dtype=np.float32).reshape(4, 8), np.zeros(32, np.float32)
    with pytest.raises(OutOfRangeError, match=r"x\[4\] lies between the rows"):
        run(whole[:, :4], y, 32, check=check)
    with pytest.raises(OutOfRangeError, match=r"x\[-8\]|x\[24\]|x\[8\]"):
        run(whole[::-1], y, 9, check=check)
    run(whole[1:].T, y, 24, check=check)
    assert y.tolist() == [*range(8, 32), *[0] * 8]


def test_overlapping_arguments_share_one_record():
    whole = np.zeros(33, np.float32)
    run(whole[:32], whole[:32], 32)
    with pytest.raises(RaceError, match="with no barrier between the two"):
        run(whole[:32], whole[1:], 32)


def test_what_a_launch_cannot_pass_is_an_error():
    good = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match="x is annotated Data, which is float32 here; got an array of float64"):
        run(np.zeros(4), good, 4)
    with pytest.raises(TypeError, match="takes 3 arguments, got 2"), interpreted():
        Kernel(_copy, threads=32).launch((1,), np.float32, (good, good))
    for grid, threads in (((1, 70000), 32), (1, 1056)):
        with pytest.raises(ValueError, match="no device takes"):
            interpret(_copy(None), grid, threads, good, good, 4)


def test_an_error_of_python_says_which_thread_and_kernel_it_is_from():
    def _divide(real):
        def divided(n: Size):
            if cuda.threadIdx.x == 3:
                raise ZeroDivisionError

        return divided

    with pytest.raises(ZeroDivisionError) as found, interpreted():
        Kernel(_divide, threads=32).launch((1,), np.float32, (4,))
    assert found.value.__notes__ == ["in thread 3 of block 0", "in kernel test_interpret.divide-float32"]


# --- outputs, copies, layouts of shared memory ---


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.int32), np.dtype(np.int64)], ids=str)
def test_an_output_nobody_wrote_shows_and_is_found_when_read(dtype):
    like, rest = np.zeros(1, np.float32), np.ones(3)

    def kernel(x, y, n):
        t = cuda.threadIdx.x
        if t < n:
            y[t] = x[t]

    with interpreted():
        y = arrays.empty(like, (2, 2), dtype)
        assert dtype.kind in "iu" or np.isnan(y.astype(float)).all()
        interpret(kernel, 1, 4, rest, y.reshape(-1), 3)
        interpret(kernel, 1, 4, y.T.reshape(-1, order="F"), np.zeros(4), 3)
        with pytest.raises(UninitializedReadError, match=r"x\[3\] is read by thread 3 of block 0"):
            interpret(kernel, 1, 4, y.reshape(-1), np.zeros(4), 4)
        y[1, 1] = 1
        interpret(kernel, 1, 4, y.reshape(-1), np.zeros(4), 4)


def test_leaving_the_interpreter_leaves_nothing_behind():
    code = arrays.empty.__code__
    with interpreted(), interpreted(1):
        assert arrays.empty.__code__ is not code
    with pytest.raises(TypeError):
        run(np.zeros(4), None, 4)
    assert arrays.empty.__code__ is code
    assert launch._interpreter is None


def _pipeline(real, stages):
    def pipeline(x: Data, y: Data, n: Size):
        tiles = cuda.shared.array(stages * 128, real, 16)
        t = uint32(cuda.threadIdx.x)
        four, tile = t * uint32(4), uint32(0)
        while tile < uint32(stages - 1):
            i = tile * uint32(128) + four
            copy_async(tiles, i, x, i, i < n)
            commit_async()
            tile += uint32(1)
        while (tile - uint32(stages - 1)) * uint32(128) < n:
            i = tile * uint32(128) + four
            copy_async(tiles, tile % uint32(stages) * uint32(128) + four, x, i, i < n)
            commit_async()
            wait_async(stages - 1)
            cuda.syncthreads()
            at = (tile - uint32(stages - 1)) * uint32(128)
            for k in range(4):
                j = t + uint32(32 * k)
                if at + j < n:
                    store(y, at + j, tiles[at % uint32(stages * 128) + j])
            cuda.syncthreads()
            tile += uint32(1)

    return pipeline


@pytest.mark.parametrize("stages", [1, 2, 3])
@five
@given(seed=schedules)
def test_a_pipeline_of_copies_passes(stages, seed):
    x = np.arange(512, dtype=np.float32)[:460]
    y = np.full_like(x, np.nan)
    with interpreted(seed):
        Kernel(_pipeline, threads=32).launch((1,), x.dtype, (x, y, x.size), stages=stages)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_are_four_or_eight_neighbours(dtype):
    def kernel(x: Data, y: Data):
        store8(y, 8, load8(x, 0))
        store8(y, 0, load4(x, 8) + load4(x, 12))

    x = np.arange(16).astype(dtype)
    y = np.zeros_like(x)
    interpret(kernel, 1, 1, x, y)
    assert y.astype(int).tolist() == [*range(8, 16), *range(8)]


def test_shared_arrays_of_one_line_in_two_functions_are_two():
    def make(size):
        def part(i):
            return cuda.shared.array(size, np.float32)

        return part

    one, two = make(8), make(4)

    def kernel(y):
        t = cuda.threadIdx.x
        a, b, again = one(t), two(t), one(t)
        assert a is again
        a[t] = t
        b[t % 4] = t
        y[0] = len(a) + len(b)

    y = np.zeros(1)
    interpret(kernel, 1, 1, y)
    assert y[0] == 12


def test_a_barrier_of_lanes_that_wait_in_the_wrong_order_is_still_served():
    def kernel(y):
        t = cuda.threadIdx.x
        if t >= 16:
            cuda.syncwarp(0xFFFF0000)
        y[t] = cuda.shfl_xor_sync(-1, t, 16)

    y = np.zeros(32)
    interpret(kernel, 1, 32, y)
    assert y.tolist() == (np.arange(32) ^ 16).tolist()
    with pytest.raises(DivergentBarrierError, match=r"waits for lanes 0xffffffff; it misses thread 16 of block 0"):
        interpret(follow_two_paths, 1, 32, y)


def follow_two_paths(y):
    t = cuda.threadIdx.x
    if t < 16:
        y[t] = cuda.shfl_xor_sync(-1, t, 1)
    else:
        y[t] = cuda.shfl_xor_sync(-1, t, 2)


# --- what is told to users ---


def test_the_page_of_the_folder_is_true():
    page = Path(npmamba.__file__).parent / "cuda" / "README.md"
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 3
    assert result.failed == 0


def test_a_missing_greenlet_is_told_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    monkeypatch.delitem(sys.modules, "npmamba.testing.interpret")
    with pytest.raises(ImportError, match=r'greenlet, which the extra `fuzz` brings: pip install "npmamba\[fuzz\]"'):
        importlib.import_module("npmamba.testing.interpret")


def test_an_unknown_word_is_named():
    def kernel():
        cuda.nanosleep(3)

    with pytest.raises(KernelError, match=r"no stand-in for cuda.nanosleep: thread 0 of block 0 at test_interpret.py"):
        interpret(kernel, 1, 1)
