"""The kernels of the CUDA cross entropy for short rows, as of characters or bytes: a warp has several of them at once.

A row of 256 logits is too little for a warp: it would wait for the label, then for the logits, then for their sum. Here
a small team owns a row, blocks stay and take row after row, and what a row needs besides its logits is read one row
ahead.
"""

from __future__ import annotations

import math

import numpy as np

from npmamba.cuda.cross_entropy_forward import add_lanes, larger_of, log_of
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, rounded_sum, row_pointer, two_sum
from npmamba.cuda.vectors import either, place_of, readers, width_of, writers
from npmamba.scalar import select, softmax_term

uint32, int64 = np.uint32, np.int64
LONG = np.dtype(np.int64)
POWER = 8
THREADS = 1 << POWER
WARPS = THREADS // 32
FORWARD_BLOCKS, BACKWARD_BLOCKS = 396, 528
"""Blocks at most: three and four for each multiprocessor of an H200, as many as run at a time."""
LANES = 32
"""Threads of a team at most; it goes through a longer row several times."""


def forward_numbers(data: np.dtype) -> int:
    """Return how many logits a thread reads at once, forward: 64 bytes of memory."""
    return 64 // data.itemsize


def backward_numbers(data: np.dtype) -> int:
    """Return the same of the backward pass, which also writes."""
    return min(16, 64 // data.itemsize)


# --- forward ---


def _scan(real, data):
    """Build ``scan(q, counted, lane, p, n, wide)``: the largest of a thread's share, and its sum of e^(l - largest)."""
    numbers, width, number, larger = forward_numbers(data), width_of(data), real.type, larger_of(real)
    read, place = either(readers(width, numbers)), place_of(width)
    lowest, nothing = float(np.finfo(real).min), -math.inf

    def scan(q, counted, lane, p, n, wide):
        x = cuda.local.array(numbers, real)
        top, total, at = number(lowest), number(0), uint32(0)
        step, chunk = uint32(uint32(width) << p), uint32(uint32(numbers) << p)
        while at < n:
            first = uint32(uint32(lane * uint32(width)) + at)
            for k in range(numbers):
                x[k] = number(nothing)
            if counted:
                read(x, q, first, step, n, wide)
            if uint32(n - at) < chunk:
                for k in range(numbers):
                    x[k] = select(place(first, step, k) < n, x[k], number(nothing))
            before = top
            for k in range(numbers):
                top = larger(top, x[k])
            total = softmax_term(before, top, total)
            for k in range(numbers):
                total += softmax_term(x[k], top, number(1))
            at = uint32(at + chunk)
        return top, total

    return scan


def _merge(real):
    """Build ``merge(top, total, p)``: the shares of a team as one, its sum relative to the largest of all."""
    larger = larger_of(real)

    def merge(top, total, p):
        most = top
        for power in range(5):
            if uint32(power) < p:
                most = larger(most, cuda.shfl_xor_sync(-1, most, 1 << power))
        total = softmax_term(top, most, total)
        for power in range(5):
            if uint32(power) < p:
                total += cuda.shfl_xor_sync(-1, total, 1 << power)
        return most, total

    return merge


def _forward(real, data):
    number, log, scan, merge, nan = real.type, log_of(real), _scan(real, data), _merge(real), math.nan

    def cross_entropy_forward_short(
        logits: Data, outer_stride: Stride, inner_stride: Stride, labels: Long, ignored: Stride,
        losses: Wide, counts: Long, sums: Wide, tops: Wide, n: Size, rows: Size, inner: Size, wide: Size, p: Size,
    ):  # fmt: skip
        """Equation: loss = log(sum e^(l - top)) + top - l[label], with top = max l.
        Threads: a team of 1 << p threads owns every so many-th row.
        Owns: the sum and the largest logit of its rows, 1 and 0 where the label is ignored; the block owns the sum of
        its rows' losses, and how many of them count: a team's as they come, then the teams in order.
        Saved: sum and largest logit.
        """
        highs, lows = cuda.shared.array(WARPS, real), cuda.shared.array(WARPS, real)
        many = cuda.shared.array(WARPS, LONG)
        tid = uint32(cuda.threadIdx.x)
        lane, teams = uint32(tid - uint32((tid >> p) << p)), uint32(uint32(THREADS) >> p)
        start, stride = uint32(uint32(cuda.blockIdx.x) * teams), uint32(uint32(cuda.gridDim.x) * teams)
        high, low, count, row = number(0), number(0), int64(0), uint32(start + (tid >> p))
        label = load(labels, select(row < rows, row, uint32(0)))
        while start < rows:
            there, following = row < rows, uint32(row + stride)
            counted, valid = there and label != ignored, label >= int64(0) and label < int64(n)
            column = uint32(select(valid, label, int64(0)))
            # On its way a row ahead; what is needed of the old label has been taken, so that nobody waits to copy it.
            label = load(labels, select(following < rows, following, uint32(0)))
            q = row_pointer(logits, divided(select(there, row, uint32(0)), inner), outer_stride, inner_stride)
            top, total = scan(q, counted, lane, p, n, wide)
            target = number(0)
            if counted:  # found in the cache now; before, the row would wait for it
                target = load(q, column)
            top, total = merge(top, total, p)
            total = select(valid, total, number(nan))
            if lane == uint32(0) and there:
                store(tops, row, select(counted, top, number(0)))
                store(sums, row, select(counted, total, number(1)))
                if counted:
                    high, low = two_sum(high, low, log(total) + (top - target))
                    count += int64(1)
            start, row = uint32(start + stride), following
        high, low, count = add_lanes(high, low, count)
        if tid & uint32(31) == uint32(0):
            highs[tid >> uint32(5)], lows[tid >> uint32(5)], many[tid >> uint32(5)] = high, low, count
        cuda.syncthreads()
        if tid == uint32(0):
            for k in range(1, WARPS):
                high, low = two_sum(high, low + lows[k], highs[k])
                count += many[k]
            store(losses, uint32(cuda.blockIdx.x), rounded_sum(high, low))
            store(counts, uint32(cuda.blockIdx.x), count)

    return cross_entropy_forward_short


FORWARD = Kernel(_forward, threads=THREADS, shipped={})


# --- backward ---


def _backward(real, data):
    numbers, width, number = backward_numbers(data), width_of(data), real.type
    read, write, place = either(readers(width, numbers)), either(writers(width, numbers)), place_of(width)

    def gradient(x, q, out, counted, column, top, factor, scale, lane, p, n, wide):
        """Write e^(l - top) factor, less `scale` at the label; zeros for a row that does not count."""
        step, at = uint32(uint32(width) << p), uint32(0)
        while at < n:
            first = uint32(uint32(lane * uint32(width)) + at)
            for k in range(numbers):
                x[k] = number(0)
            if counted:
                read(x, q, first, step, n, wide)
                for k in range(numbers):
                    term = softmax_term(x[k], top, factor)
                    x[k] = select(place(first, step, k) == column, term - scale, term)
            write(x, out, first, step, n, wide)
            at = uint32(at + uint32(uint32(numbers) << p))

    def cross_entropy_backward_short(
        logits: Data, outer_stride: Stride, inner_stride: Stride, labels: Long, ignored: Stride,
        tops: Wide, sums: Wide, dout: Wide, count: Long, dlogits: Data,
        n: Size, rows: Size, inner: Size, wide: Size, p: Size,
    ):  # fmt: skip
        """Equation: dl = (softmax(l) - onehot(label)) scale, with softmax(l) scale = e^(l - top) scale / sum and
        scale = dout / count.
        Threads: a team of 1 << p threads owns every so many-th row.
        Owns: its logits' gradients; zeros where the label is ignored.
        Saved: sum and largest logit of each row; how many rows count.
        """
        x = cuda.local.array(numbers, real)
        tid = uint32(cuda.threadIdx.x)
        lane, teams = uint32(tid - uint32((tid >> p) << p)), uint32(uint32(THREADS) >> p)
        stride = uint32(uint32(cuda.gridDim.x) * teams)
        row = uint32(uint32(uint32(cuda.blockIdx.x) * teams) + (tid >> p))
        at = select(row < rows, row, uint32(0))
        label, total = load(labels, at), load(sums, at)
        many = load(count, uint32(0))
        scale = load(dout, uint32(0)) / number(select(many > int64(0), many, int64(1)))
        while row < rows:
            following = uint32(row + stride)
            counted, valid = label != ignored, label >= int64(0) and label < int64(n)
            column = uint32(select(valid, label, int64(n)))
            factor, at = scale / total, select(following < rows, following, uint32(0))
            label, total, top = load(labels, at), load(sums, at), load(tops, row)  # the first two a row ahead, as above
            q = row_pointer(logits, divided(row, inner), outer_stride, inner_stride)
            out = shift(dlogits, int64(row) * int64(n))
            gradient(x, q, out, counted, column, top, factor, scale, lane, p, n, wide)
            row = following

    return cross_entropy_backward_short


BACKWARD = Kernel(_backward, threads=THREADS, shipped={})
