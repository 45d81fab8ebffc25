"""What the CUDA kernels need to know of packed sequences: one flag per step, found on the device.

The CPU kernels are given a list of the steps that are not padding (`npmamba.cpu.schedule`), whose length the host must
know. Here nothing waits for the device: every step is visited and its flag says what to do there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import empty, strides
from npmamba.cuda.device import Data, Flags, Size, Stride, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.layout import native

uint32, int32, int64 = np.uint32, np.int32, np.int64
INDEX = np.dtype(np.uint32)

NORMAL, FRESH, ABSENT = 0, 1, 2
"""The step follows the one before; it begins a new sequence, with empty state; it is padding and does not exist."""

THREADS = 128
STEPS = 8
"""Neighbouring steps of a thread."""
CHUNK = THREADS * STEPS
WARPS = THREADS // 32


def _at(p, step, s):
    """Return the index of step `s`."""
    return load(shift(p, int64(s) * step), uint32(0))


def _largest(x, y):
    return x if x > y else y


def _largest_of_block(mine, shared, tid):
    """Return the largest of all threads' numbers, to all of them."""
    for power in range(5):
        mine = _largest(mine, uint32(cuda.shfl_xor_sync(-1, int32(mine), 1 << power)))
    cuda.syncthreads()
    if tid % uint32(32) == uint32(0):
        shared[tid // uint32(32)] = mine
    cuda.syncthreads()
    for warp in range(WARPS):
        mine = _largest(mine, shared[uint32(warp)])
    return mine


def _largest_before(mine, shared, tid):
    """Return the largest of the numbers of all threads before this one, 0 for the first."""
    lane = tid % uint32(32)
    for power in range(5):
        lower = uint32(cuda.shfl_up_sync(-1, int32(mine), 1 << power))
        if lane >= uint32(1 << power):
            mine = _largest(mine, lower)
    cuda.syncthreads()
    if lane == uint32(31):
        shared[tid // uint32(32)] = mine
    before = uint32(cuda.shfl_up_sync(-1, int32(mine), 1))
    if lane == uint32(0):
        before = uint32(0)
    cuda.syncthreads()
    for warp in range(WARPS):
        if uint32(warp) < tid // uint32(32):
            before = _largest(before, shared[uint32(warp)])
    return before


def _step_flags(real, data):
    def schedule_step_flags(
        seq_idx: Data,
        flags: Flags,
        origin: Stride,
        row: Stride,
        step: Stride,
        signed: Size,
        seqlen: Size,
        chunks: Size,
    ):
        """Equation: flag = 2 where the index is negative, else 1 where it differs from that of the last step before
        whose index is not negative, else 0.
        Threads: a block is a batch row and a chunk of steps, a thread 8 neighbouring steps. The last step before the
        chunk that is not padding is looked for backwards, a chunk at a time: mostly the first look finds it.
        Owns: the flags of its steps.
        Saved: nothing.
        """
        shared = cuda.shared.array(WARPS, INDEX)
        index = cuda.local.array(STEPS, data)
        tid, block = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        b = block // chunks
        p, out = shift(seq_idx, origin + int64(b) * row), shift(flags, int64(b) * int64(seqlen))
        first = (block - b * chunks) * uint32(CHUNK)
        seen, end = uint32(0), first  # `seen` counts the steps up to the last one that is not padding
        while end > uint32(0) and seen == uint32(0):
            end -= uint32(CHUNK)
            for k in range(STEPS):
                s = end + uint32(k * THREADS) + tid
                if signed == uint32(0) or _at(p, step, s) >= 0:
                    seen = s + uint32(1)
            seen = _largest_of_block(seen, shared, tid)
        first += tid * uint32(STEPS)
        mine = uint32(0)
        for k in range(STEPS):
            s = first + uint32(k)
            if s < seqlen:
                index[k] = _at(p, step, s)
                if signed == uint32(0) or index[k] >= 0:
                    mine = s + uint32(1)
        seen = _largest(seen, _largest_before(mine, shared, tid))
        before = _at(p, step, seen - uint32(1) if seen > uint32(0) else uint32(0))
        for k in range(STEPS):
            s = first + uint32(k)
            if s < seqlen:
                flag = uint32(ABSENT)
                if signed == uint32(0) or index[k] >= 0:
                    flag = uint32(FRESH) if seen > uint32(0) and index[k] != before else uint32(NORMAL)
                    seen, before = s + uint32(1), index[k]
                store(out, s, flag)

    return schedule_step_flags


STEP_FLAGS = Kernel(_step_flags, threads=THREADS)


def _readable(seq_idx: Any) -> Any:
    """Return the indices as int32 or int64; uint64 keeps its bits."""
    if seq_idx.dtype.itemsize == 8:
        return native(seq_idx, seq_idx.dtype.newbyteorder("=")).view(np.int64)
    return native(seq_idx, np.int64 if seq_idx.dtype.newbyteorder("=") == np.uint32 else np.int32)


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
    batch, seqlen = seq_idx.shape
    flags = empty(seq_idx, (batch, seqlen), np.uint8)
    chunks = -(-seqlen // CHUNK)
    signed = int(seq_idx.dtype.kind == "i")
    seq_idx = _readable(seq_idx)
    row, step = strides(seq_idx)
    origin, step = ((seqlen - 1) * step, -step) if reverse else (0, step)
    arguments = (seq_idx, flags, origin, row, step, signed, seqlen, chunks)
    STEP_FLAGS.launch((batch * chunks,), seq_idx.dtype, arguments)
    return flags
