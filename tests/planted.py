"""Kernels with one mistake each, and the finding of the kernel interpreter that catches it.

Every function below makes a kernel, with its mistake (``bug`` true) or without. Mistakes that give wrong numbers and
nothing else belong to other tests: the comparison with the references (a wrong sign, or a wrong element of the right
array), the compiled text (a literal that makes float64, in tests/test_cuda_offline.py), and the checks of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.device import (
    Data,
    Size,
    commit_async,
    copy_async,
    cuda,
    load,
    load4,
    shift,
    store,
    wait_async,
)
from npmamba.testing.findings import (
    DivergentBarrierError,
    KernelError,
    MisalignedAccessError,
    OutOfRangeError,
    RaceError,
    ShuffleError,
    UninitializedReadError,
)

uint32, int32, int64, real = np.uint32, np.int32, np.int64, np.dtype(np.float32)
BLOCKS, THREADS = 2, 64
CHUNK = 4


class Bug(NamedTuple):
    """A maker of kernels, the finding, the array it names, and what the right kernel computes."""

    make: Callable[[bool], Callable[..., None]]
    finding: type[KernelError]
    array: str | None
    expected: Callable[[np.ndarray], np.ndarray]
    check: str = "races"

    def arguments(self) -> tuple[Any, ...]:
        """Return x and y, flat, one number per thread, and their length."""
        x = np.random.default_rng(0).standard_normal(BLOCKS * THREADS).astype(real)
        return x, np.full_like(x, np.nan), x.size


def rows(x: np.ndarray, width: int = THREADS) -> np.ndarray:
    return x.reshape(-1, width)


# --- races ---


def two_threads_share_a_slot(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t >> uint32(1) if bug else t] = load(x, i)
        cuda.syncthreads()
        store(y, i, tile[t >> uint32(1) if bug else t])

    return kernel


def blocks_overlap(bug):
    def kernel(x: Data, y: Data, n: Size):
        b, t = uint32(cuda.blockIdx.x), uint32(cuda.threadIdx.x)
        i = b * uint32(THREADS - bug) + t
        store(y, i, load(x, i))

    return kernel


def a_block_reads_what_another_writes(bug):
    def kernel(x: Data, y: Data, n: Size):
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        mirrored = load(x, n - uint32(1) - i)
        store(x if bug else y, i, mirrored)

    return kernel


def the_same_value_from_everyone(bug):
    def kernel(x: Data, y: Data, n: Size):
        first = cuda.shared.array(1, real)
        t = uint32(cuda.threadIdx.x)
        p = shift(x, int64(cuda.blockIdx.x) * int64(THREADS))
        if bug or t == uint32(0):
            first[0] = load(p, uint32(0))
        cuda.syncthreads()
        store(shift(y, int64(cuda.blockIdx.x) * int64(THREADS)), t, first[0])

    return kernel


def no_barrier_after_writing(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = real(0)
        cuda.syncthreads()
        tile[t] = load(x, i)
        if not bug:
            cuda.syncthreads()
        store(y, i, tile[uint32(THREADS - 1) - t])

    return kernel


def no_barrier_before_the_next_tile(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        for half in range(2):
            i = uint32(half * THREADS) + t
            if not bug:
                cuda.syncthreads()
            tile[t] = load(x, i)
            cuda.syncthreads()
            if uint32(cuda.blockIdx.x) == uint32(0):
                store(y, i, tile[uint32(THREADS - 1) - t])

    return kernel


def no_warp_barrier(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = load(x, i)
        cuda.syncwarp()
        neighbour = tile[t ^ uint32(1)]
        if not bug:
            cuda.syncwarp()
        tile[t] = neighbour
        store(y, i, tile[t])

    return kernel


def a_warp_barrier_where_two_warps_meet(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = real(0)
        cuda.syncthreads()
        tile[t] = load(x, i)
        if bug:
            cuda.syncwarp()
        else:
            cuda.syncthreads()
        store(y, i, tile[uint32(THREADS - 1) - t])

    return kernel


def a_warp_barrier_for_half_of_the_lanes(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = real(0)
        cuda.syncthreads()
        tile[t] = load(x, i)
        cuda.syncwarp(0x0000FFFF if t & uint32(16) == uint32(0) else 0xFFFF0000)
        store(y, i, tile[t ^ uint32(31 if bug else 15)])

    return kernel


def a_shuffle_taken_for_a_barrier(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = real(0)
        cuda.syncthreads()
        tile[t] = load(x, i)
        cuda.shfl_xor_sync(-1, tile[t], 1)
        if not bug:
            cuda.syncwarp()
        store(y, i, tile[t ^ uint32(1)])

    return kernel


def chunks_overlap(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        i = t * uint32(CHUNK)
        stop = min(i + uint32(CHUNK + bug), n)
        while i < stop:
            store(y, i, load(x, i))
            i += uint32(1)

    return kernel


# --- reads of what nobody wrote ---


def the_last_carry_is_lost(bug):
    def kernel(x: Data, y: Data, n: Size):
        carry = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        if t < uint32(THREADS - 2 if bug else THREADS):
            carry[t] = load(x, i)
        cuda.syncthreads()
        before = carry[t - uint32(1)] if t > uint32(0) else real(0)
        store(y, i, load(x, i) + before)

    return kernel


def shared_sums_start_at_nothing(bug):
    def kernel(x: Data, y: Data, n: Size):
        total = cuda.shared.array(THREADS, real)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        if not bug:
            total[t] = real(0)
        total[t] += load(x, i)
        store(y, i, total[t])

    return kernel


def local_sums_start_at_nothing(bug):
    def kernel(x: Data, y: Data, n: Size):
        sums = cuda.local.array(2, real)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        for k in range(1 if bug else 2):
            sums[k] = real(0)
        sums[1] += load(x, i)
        store(y, i, sums[1])

    return kernel


# --- accesses that are not there ---


def the_element_after_the_last(bug):
    def kernel(x: Data, y: Data, n: Size):
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        after = load(x, i + uint32(1)) if bug or i + uint32(1) < n else real(0)
        store(y, i, after)

    return kernel


def the_element_before_the_first(bug):
    def kernel(x: Data, y: Data, n: Size):
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        before = load(x, i - uint32(1)) if bug or i > uint32(0) else real(0)
        store(y, i, before)

    return kernel


def a_negative_index_of_a_tile(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real)
        t = int32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        tile[t] = load(x, i)
        cuda.syncthreads()
        store(y, i, tile[t - int32(1)] if bug or t > int32(0) else real(0))

    return kernel


def four_at_an_odd_place(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if t < n // uint32(4):
            i = t * uint32(4)
            four = load4(x, i + uint32(bug))
            for k in range(4):
                store(y, i + uint32(k), four[k])

    return kernel


def a_tile_that_is_not_aligned(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real, 4 if bug else 16)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        tile[t] = load(x, i)
        cuda.syncthreads()
        four = load4(tile, t & ~uint32(3))
        store(y, i, four[int(t & uint32(3))])

    return kernel


# --- barriers and shuffles ---


def a_barrier_in_a_branch(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        if not bug or t < uint32(32):
            cuda.syncthreads()
        store(y, i, load(x, i))

    return kernel


def two_barriers_for_one(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        if bug and t < uint32(32):
            cuda.syncthreads()
        else:
            cuda.syncthreads()
        store(y, i, load(x, i))

    return kernel


def gone_before_the_barrier(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        if bug and i == n - uint32(1):
            return
        cuda.syncthreads()
        store(y, i, load(x, i))

    return kernel


def a_shuffle_in_a_branch(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        v = load(x, i)
        if not bug or t < uint32(16):
            v = cuda.shfl_xor_sync(-1, v, 1)
        store(y, i, v)

    return kernel


def a_mask_without_the_caller(bug):
    def kernel(x: Data, y: Data, n: Size):
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        store(y, i, cuda.shfl_xor_sync(0x0000FFFF if bug else 0xFFFFFFFF, load(x, i), 1))

    return kernel


def a_lane_outside_the_mask(bug):
    def kernel(x: Data, y: Data, n: Size):
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        half = 0x0000FFFF if t & uint32(16) == uint32(0) else 0xFFFF0000
        store(y, i, cuda.shfl_xor_sync(half, load(x, i), 31 if bug else 15))

    return kernel


# --- copies to shared memory ---


def _copied(bug, groups_left=0, commit=True, wait=True):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real, 16)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS)
        first = t * uint32(4)
        if first < uint32(THREADS):
            copy_async(tile, first, x, i + first, True)
        if commit or not bug:
            commit_async()
        if wait or not bug:
            wait_async(groups_left if bug else 0)
        cuda.syncthreads()
        store(y, i + t, tile[uint32(THREADS - 1) - t])

    return kernel


def a_copy_not_waited_for(bug):
    return _copied(bug, wait=False)


def a_copy_of_the_youngest_group(bug):
    return _copied(bug, groups_left=1)


def a_copy_of_no_group(bug):
    return _copied(bug, commit=False)


def a_copy_without_a_barrier(bug):
    def kernel(x: Data, y: Data, n: Size):
        tile = cuda.shared.array(THREADS, real, 16)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS)
        tile[t] = real(0)
        cuda.syncthreads()
        if t < uint32(THREADS // 4):
            copy_async(tile, t * uint32(4), x, i + t * uint32(4), True)
        commit_async()
        wait_async(0)
        if not bug:
            cuda.syncthreads()
        store(y, i + t, tile[uint32(THREADS - 1) - t])

    return kernel


def _same(x):
    return x


def _mirrored(x):
    return rows(x)[:, ::-1]


def _neighbours(x):
    return rows(x, 2)[:, ::-1]


def _before(x):
    return np.concatenate([[0], x[:-1]])


def _before_in_block(x):
    return np.pad(rows(x), ((0, 0), (1, 0)))[:, :-1]


BUGS = [
    Bug(two_threads_share_a_slot, RaceError, "tile", _same),
    Bug(blocks_overlap, RaceError, "y", _same),
    Bug(a_block_reads_what_another_writes, RaceError, "x", lambda x: x[::-1]),
    Bug(the_same_value_from_everyone, RaceError, "first", lambda x: np.repeat(x[::THREADS], THREADS)),
    Bug(no_barrier_after_writing, RaceError, "tile", _mirrored),
    Bug(no_barrier_before_the_next_tile, RaceError, "tile", _mirrored),
    Bug(no_warp_barrier, RaceError, "tile", _neighbours),
    Bug(a_warp_barrier_where_two_warps_meet, RaceError, "tile", _mirrored),
    Bug(a_warp_barrier_for_half_of_the_lanes, RaceError, "tile", lambda x: rows(x, 16)[:, ::-1]),
    Bug(a_shuffle_taken_for_a_barrier, RaceError, "tile", _neighbours, check="strict"),
    Bug(chunks_overlap, RaceError, "y", _same),
    Bug(the_last_carry_is_lost, UninitializedReadError, "carry", lambda x: rows(x) + _before_in_block(x)),
    Bug(shared_sums_start_at_nothing, UninitializedReadError, "total", _same),
    Bug(local_sums_start_at_nothing, UninitializedReadError, "sums", _same),
    Bug(the_element_after_the_last, OutOfRangeError, "x", lambda x: np.append(x[1:], 0)),
    Bug(the_element_before_the_first, OutOfRangeError, "x", _before),
    Bug(a_negative_index_of_a_tile, OutOfRangeError, "tile", _before_in_block),
    Bug(four_at_an_odd_place, MisalignedAccessError, "x", _same),
    Bug(a_tile_that_is_not_aligned, MisalignedAccessError, "tile", _same),
    Bug(a_barrier_in_a_branch, DivergentBarrierError, None, _same),
    Bug(two_barriers_for_one, DivergentBarrierError, None, _same),
    Bug(gone_before_the_barrier, DivergentBarrierError, None, _same),
    Bug(a_shuffle_in_a_branch, DivergentBarrierError, None, _neighbours),
    Bug(a_mask_without_the_caller, ShuffleError, None, _neighbours),
    Bug(a_lane_outside_the_mask, ShuffleError, None, lambda x: rows(x, 16)[:, ::-1]),
    Bug(a_copy_not_waited_for, RaceError, "tile", _mirrored),
    Bug(a_copy_of_the_youngest_group, RaceError, "tile", _mirrored),
    Bug(a_copy_of_no_group, RaceError, "tile", _mirrored),
    Bug(a_copy_without_a_barrier, RaceError, "tile", _mirrored),
]
