"""The forward kernels of the CUDA cross entropy: a row is read once, for its largest logit and its sum together.

A thread's sum is relative to the largest logit it has seen; where a larger one comes, the sum is scaled down to it. The
first kernel gives each row's loss, the second the mean of those that count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, rounded_sum, row_pointer, two_sum
from npmamba.cuda.vectors import place_of, readers, width_of
from npmamba.scalar import select, softmax_term

uint32, int64 = np.uint32, np.int64
LONG = np.dtype(np.int64)
THREADS = 256
WARPS = THREADS // 32
SUMMANDS = 8
"""Numbers of a thread that the sum over all rows reads at once."""
ADDERS = 512


def numbers_of(real: np.dtype) -> int:
    """Return how many logits a thread reads at once."""
    return 64 // real.itemsize if real == np.float32 else 32 // real.itemsize


# --- a row ---


def _log(x):
    return cuda.libdevice.logf(x)


def _log_double(x):
    return cuda.libdevice.log(x)


def _larger(x, y):
    return cuda.libdevice.fmaxf(x, y)  # of NaN and a number, the number: NaN comes back in the sum


def _larger_double(x, y):
    return cuda.libdevice.fmax(x, y)


def log_of(real: np.dtype) -> Any:
    """Return the logarithm for a dtype."""
    return _log if real == np.float32 else _log_double


def larger_of(real: np.dtype) -> Any:
    """Return the larger of two numbers of a dtype, or the one that is not NaN."""
    return _larger if real == np.float32 else _larger_double


def add_lanes(high, low, count):
    """Add up what `two_sum` made, and whole numbers, over a warp; all its lanes get the sums."""
    for power in range(5):
        other = cuda.shfl_xor_sync(-1, high, 1 << power)
        low += cuda.shfl_xor_sync(-1, low, 1 << power)
        high, low = two_sum(high, low, other)
        count += cuda.shfl_xor_sync(-1, count, 1 << power)
    return high, low, count


def _row_scan(real, data):
    """Build ``scan(p, lane, n, wide)``: the largest of a thread's share of a row, and its sum of e^(l - largest)."""
    numbers, width = numbers_of(real), width_of(data)
    by_vectors, by_numbers = readers(width, numbers)
    larger, place, number = larger_of(real), place_of(width), real.type
    step, chunk = THREADS * width, THREADS * numbers
    lowest, nothing = float(np.finfo(real).min), -math.inf

    def scan(p, lane, n, wide):
        x = cuda.local.array(numbers, real)
        top, total, at = number(lowest), number(0), uint32(0)
        while at < n:
            first = uint32(uint32(lane * uint32(width)) + at)
            if wide:
                by_vectors(x, p, first, uint32(step), n)
            else:
                by_numbers(x, p, first, uint32(step), n)
            if uint32(n - at) < uint32(chunk):
                for k in range(numbers):
                    x[k] = select(place(first, uint32(step), k) < n, x[k], number(nothing))
            before = top
            for k in range(numbers):
                top = larger(top, x[k])
            total = softmax_term(before, top, total)
            for k in range(numbers):
                total += softmax_term(x[k], top, number(1))
            at = uint32(at + uint32(chunk))
        return top, total

    return scan


def _row_merge(real, lanes):
    """Build ``merge(top, total)``: the shares of neighbouring lanes as one, its sum relative to the largest of all."""
    larger = larger_of(real)
    powers = lanes.bit_length() - 1

    def merge(top, total):
        for power in range(powers):
            other, share = cuda.shfl_xor_sync(-1, top, 1 << power), cuda.shfl_xor_sync(-1, total, 1 << power)
            both = larger(top, other)
            total = softmax_term(top, both, total) + softmax_term(other, both, share)
            top = both
        return top, total

    return merge


def _forward(real, data):
    number, log, nan = real.type, log_of(real), math.nan
    scan, merge, merge_warps = _row_scan(real, data), _row_merge(real, 32), _row_merge(real, WARPS)

    def merge_block(top, total, shared_tops, shared_sums, tid):
        """Merge the shares of all warps, in the first of them."""
        if tid & uint32(31) == uint32(0):
            shared_tops[tid >> uint32(5)], shared_sums[tid >> uint32(5)] = top, total
        cuda.syncthreads()
        k = tid & uint32(WARPS - 1)
        return merge_warps(shared_tops[k], shared_sums[k])

    def cross_entropy_forward(
        logits: Data, outer_stride: Stride, inner_stride: Stride, labels: Long, ignored: Stride,
        losses: Wide, counts: Long, sums: Wide, tops: Wide, n: Size, inner: Size, wide: Size,
    ):  # fmt: skip
        """Equation: loss = log(sum e^(l - top)) + top - l[label], with top = max l.
        Threads: a block owns a row; its threads scan it side by side, each with a maximum of its own that grows on the
        way, and then compare.
        Owns: the sum and the largest logit of its row, 1 and 0 where the label is ignored; its loss, and whether it
        counts.
        Saved: sum and largest logit.
        """
        first, second = cuda.shared.array(WARPS, real), cuda.shared.array(WARPS, real)
        tid, row = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        label = load(labels, row)
        counted, valid = label != ignored, label >= int64(0) and label < int64(n)
        top, total, loss = number(0), number(1), number(0)
        if counted:
            p = row_pointer(logits, divided(row, inner), outer_stride, inner_stride)
            target = load(p, uint32(select(valid, label, int64(0))))
            top, total = scan(p, tid, n, wide)
            top, total = merge(top, total)
            top, total = merge_block(top, total, first, second, tid)
            total = select(valid, total, number(nan))
            loss = log(total) + (top - target)
        if tid == uint32(0):
            store(tops, row, top)
            store(sums, row, total)
            store(losses, row, loss)
            store(counts, row, select(counted, int64(1), int64(0)))

    return cross_entropy_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={})


# --- the mean ---


def _mean(real):
    number, warps, nan = real.type, ADDERS // 32, math.nan

    def cross_entropy_mean(losses: Wide, counts: Long, mean: Wide, count: Long, n: Size):
        """Equation: mean = sum of losses / sum of counts; NaN if nothing counts.
        Threads: one block; each thread sums every so many-th number with the roundings kept beside, then all compare.
        Owns: the two results.
        Saved: the count.
        """
        highs, lows = cuda.shared.array(warps, real), cuda.shared.array(warps, real)
        many = cuda.shared.array(warps, LONG)
        tid = uint32(cuda.threadIdx.x)
        high, low, total, at = number(0), number(0), int64(0), tid
        while at < n:
            for k in range(SUMMANDS):
                i = uint32(at + uint32(k * ADDERS))
                x, c = load(losses, select(i < n, i, uint32(0))), load(counts, select(i < n, i, uint32(0)))
                high, low = two_sum(high, low, select(i < n, x, number(0)))
                total += select(i < n, c, int64(0))
            at = uint32(at + uint32(SUMMANDS * ADDERS))
        high, low, total = add_lanes(high, low, total)
        if tid & uint32(31) == uint32(0):
            highs[tid >> uint32(5)], lows[tid >> uint32(5)], many[tid >> uint32(5)] = high, low, total
        cuda.syncthreads()
        if tid == uint32(0):
            for k in range(1, warps):
                high, low = two_sum(high, low + lows[k], highs[k])
                total += many[k]
            loss = rounded_sum(high, low)
            store(mean, uint32(0), select(total > int64(0), loss / number(total), number(nan)))
            store(count, uint32(0), total)

    return cross_entropy_mean


MEAN = Kernel(_mean, threads=ADDERS, shipped={}, dtypes=("float32", "float64"))
