"""What the CUDA kernels need to know of packed sequences, found on the device: the host waits for nothing.

`step_flags` says of every step in turn what happens there: a kernel that carries a state visits them all. `walk` lists
the steps that are there, and puts padding at the end: a kernel that looks a few steps back finds them side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import empty, strides, zeros
from npmamba.cuda.blockwise import largest, make_block, total
from npmamba.cuda.device import Data, Flags, Long, Size, Stride, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.layout import native

uint32, int64 = np.uint32, np.int64
INDEX = np.dtype(np.uint32)

NORMAL, FRESH, ABSENT = 0, 1, 2
"""The step follows the one before; it begins a new sequence, with empty state; it is padding and does not exist."""

THREADS = 128
STEPS = 8
"""Neighbouring steps of a thread."""
CHUNK = THREADS * STEPS
WARPS = THREADS // 32


largest_of_all, largest_of_earlier = make_block(largest, THREADS)
total_of_all, total_of_earlier = make_block(total, THREADS)


# --- one flag per step ---


def _at(p, step, s):
    """Return the index of step `s`."""
    return load(shift(p, int64(s) * step), uint32(0))


def _step_flags(real, data):
    def schedule_step_flags(
        seq_idx: Data, flags: Flags, counts: Long, origin: Stride, row: Stride, step: Stride, signed: Size,
        seqlen: Size, chunks: Size,
    ):  # fmt: skip
        """Equation: flag = 2 where the index is negative, else 1 where it differs from that of the last step before
        whose index is not negative, else 0; count = how many steps of a chunk are not padding.
        Threads: a block is a batch row and a chunk of steps, a thread 8 neighbouring steps. The last step before the
        chunk that is not padding is looked for backwards, a chunk at a time: mostly the first look finds it.
        Owns: the flags of its steps and the count of its chunk.
        Saved: nothing.
        """
        shared = cuda.shared.array(WARPS, INDEX)
        index = cuda.local.array(STEPS, data)
        tid, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        b = uint32(block // chunks)
        p, out = shift(seq_idx, origin + int64(b) * row), shift(flags, int64(b) * int64(seqlen))
        first = uint32(uint32(block - b * chunks) * uint32(CHUNK))
        seen, end = uint32(0), first  # `seen` counts the steps up to the last one that is not padding
        while end > uint32(0) and seen == uint32(0):
            end = uint32(end - uint32(CHUNK))
            for k in range(STEPS):
                s = uint32(end + uint32(k * THREADS) + tid)
                if signed == uint32(0) or _at(p, step, s) >= 0:
                    seen = uint32(s + uint32(1))
            seen = largest_of_all(seen, shared, tid)
        first = uint32(first + tid * uint32(STEPS))
        mine, count = uint32(0), uint32(0)
        for k in range(STEPS):
            s = uint32(first + uint32(k))
            if s < seqlen:
                index[k] = _at(p, step, s)
                if signed == uint32(0) or index[k] >= 0:
                    mine, count = uint32(s + uint32(1)), uint32(count + uint32(1))
        seen = largest(seen, largest_of_earlier(mine, shared, tid))
        before = _at(p, step, uint32(seen - uint32(1)) if seen > uint32(0) else uint32(0))
        for k in range(STEPS):
            s = uint32(first + uint32(k))
            if s < seqlen:
                flag = uint32(ABSENT)
                if signed == uint32(0) or index[k] >= 0:
                    flag = uint32(FRESH) if seen > uint32(0) and index[k] != before else uint32(NORMAL)
                    seen, before = uint32(s + uint32(1)), index[k]
                store(out, s, flag)
        count = total_of_all(count, shared, tid)
        if tid == uint32(0):
            store(counts, block, int64(count))

    return schedule_step_flags


STEP_FLAGS = Kernel(_step_flags, threads=THREADS, shipped={}, dtypes=("int32", "int64"))


def _readable(seq_idx: Any) -> Any:
    """Return the indices as int32 or int64; uint64 keeps its bits."""
    if seq_idx.dtype.itemsize == 8:
        return native(seq_idx, seq_idx.dtype.newbyteorder("=")).view(np.int64)
    return native(seq_idx, np.int64 if seq_idx.dtype.newbyteorder("=") == np.uint32 else np.int32)


def _flags_and_counts(seq_idx: Any, reverse: bool) -> tuple[Any, Any]:
    batch, seqlen = seq_idx.shape
    chunks = -(-seqlen // CHUNK)
    flags, counts = empty(seq_idx, (batch, seqlen), np.uint8), empty(seq_idx, (batch, chunks), np.int64)
    signed = int(seq_idx.dtype.kind == "i")
    seq_idx = _readable(seq_idx)
    row, step = strides(seq_idx)
    origin, step = ((seqlen - 1) * step, -step) if reverse else (0, step)
    arguments = (seq_idx, flags, counts, origin, row, step, signed, seqlen, chunks)
    STEP_FLAGS.launch((batch * chunks,), seq_idx.dtype, arguments)
    return flags, counts


def step_flags(seq_idx: Any, reverse: bool) -> Any:
    """Return what happens at each step of a scan over packed sequences.

    Parameters
    ----------
    seq_idx : integer array (batch, seqlen), in any memory order
        Number of the sequence each step belongs to; negative for padding.
    reverse : bool
        Whether the scan runs from the last position to the first.

    Returns
    -------
    uint8 array (batch, seqlen), C-contiguous
        One flag per step, **in the order of the scan**: with `reverse`, column s belongs to position
        ``seqlen - 1 - s``. `ABSENT` for padding; `FRESH` where the index differs from that of the last step before
        that is not padding; `NORMAL` elsewhere, also at the first step of all, which finds the initial state.
    """
    return _flags_and_counts(seq_idx, reverse)[0]


# --- the list of steps ---


def is_fresh(entry):
    """Tell whether a sequence begins at an entry of the list of steps."""
    return entry < 0


def position(entry):
    """Return where in time the step of an entry of the list of steps lies.

    -1 - p has the bits of p turned over. The upper half of the result is known to be zero, which halves a product.
    """
    return int64(uint32(entry ^ (entry >> int64(63))))


def _walk(real):
    def schedule_walk(
        flags: Flags, counts: Long, entries: Long, totals: Long, seqlen: Size, chunks: Size, reverse: Size
    ):
        """Equation: entry i is the i-th step that is not padding, its position p or, where a sequence begins, -1 - p;
        behind the last of them stand the positions of padding.
        Threads: a block is a batch row and a chunk of steps, a thread 8 neighbouring steps.
        Owns: the entries of its steps; the number of steps that are not padding, if its chunk is the first.
        Saved: nothing.
        """
        shared = cuda.shared.array(WARPS, INDEX)
        tid, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        b = uint32(block // chunks)
        chunk = uint32(block - b * chunks)
        before, after = uint32(0), uint32(0)
        n = tid
        while n < chunks:
            count = uint32(load(counts, int64(b) * int64(chunks) + int64(n)))
            before = uint32(before + count) if n < chunk else before
            after = after if n < chunk else uint32(after + count)
            n = uint32(n + uint32(THREADS))
        before, after = total_of_all(before, shared, tid), total_of_all(after, shared, tid)
        first = uint32(chunk * uint32(CHUNK) + tid * uint32(STEPS))
        p, out = shift(flags, int64(b) * int64(seqlen)), shift(entries, int64(b) * int64(seqlen))
        mine = uint32(0)
        for k in range(STEPS):
            s = uint32(first + uint32(k))
            if s < seqlen and load(p, s) != ABSENT:
                mine = uint32(mine + uint32(1))
        place = uint32(before + total_of_earlier(mine, shared, tid))
        for k in range(STEPS):
            s = uint32(first + uint32(k))
            if s < seqlen:
                at = int64(seqlen) - int64(1) - int64(s) if reverse else int64(s)
                flag = load(p, s)
                if flag == ABSENT:
                    store(out, uint32(before + after + s - place), at)
                else:
                    store(out, place, -1 - at if flag == FRESH else at)
                    place = uint32(place + uint32(1))
        if chunk == uint32(0) and tid == uint32(0):
            store(totals, b, int64(before + after))

    return schedule_walk


WALK = Kernel(_walk, threads=THREADS, shipped={}, dtypes=("float32",))


def walk(seq_idx: Any, reverse: bool) -> tuple[Any, Any]:
    """Return the steps of packed sequences, those that are there first.

    Parameters
    ----------
    seq_idx, reverse
        As for `step_flags`.

    Returns
    -------
    entries : int64 array (batch, seqlen)
        For each step of the scan that is not padding its position p in time, or ``-1 - p`` where a sequence begins that
        is not the first; then the positions of padding.
    totals : int64 array (batch,)
        How many steps of each row are not padding.
    """
    flags, counts = _flags_and_counts(seq_idx, reverse)
    (batch, seqlen), chunks = flags.shape, counts.shape[1]
    entries, totals = empty(flags, (batch, seqlen), np.int64), (empty if chunks else zeros)(flags, (batch,), np.int64)
    WALK.launch((batch * chunks,), np.float32, (flags, counts, entries, totals, seqlen, chunks, int(reverse)))
    return entries, totals
