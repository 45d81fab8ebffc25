"""The kernels of the CUDA cross entropy for short rows, as of characters or bytes: a warp has several of them at once.

A row of 256 logits is too little for a warp: it would wait for the label, then for the logits, then for their sum. So
a small team reads it. What a row needs beside its logits (where it begins, its label, a logarithm) is as much work as
they are if a whole team does it; forward, a warp takes as many rows as it has threads, and each thread does that work
for one of them. Backward there is less of it: blocks stay and take row after row, and read it one row ahead.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmamba.cuda.cross_entropy_forward import add_lanes, larger_of, log_of
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, rounded_sum, row_offset, row_pointer, smaller, team_of, two_sum
from npmamba.cuda.vectors import either, movers, place_of, readers, width_of, writers
from npmamba.scalar import select, softmax_term

uint32, int64 = np.uint32, np.int64
LONG = np.dtype(np.int64)
POWER = 8
THREADS = 1 << POWER
WARPS = THREADS // 32
FORWARD_BLOCKS, BACKWARD_BLOCKS = 528, 528
"""Blocks at most: four for each multiprocessor of an H200, as many as run at a time (in float64 three do)."""
LANES = 32
"""Threads of a team at most; it goes through a longer row several times."""
LONGEST, MOST = 1024, 2**32 - 2**24
"""Logits of a short row at most; such rows at most, of which the last warps number more than there are, by 32 bits."""


def forward_numbers(data: np.dtype) -> int:
    """Return how many logits a thread reads at once, forward: 64 bytes of memory."""
    return 64 // data.itemsize


def backward_numbers(data: np.dtype) -> int:
    """Return the same of the backward pass, which also writes."""
    return min(16, 64 // data.itemsize)


# --- forward ---


def forward_constants(vocab: int, data: np.dtype) -> dict[str, int]:
    """Return p, for teams of ``1 << p`` threads, and how many blocks are to fit on a multiprocessor together."""
    return {"p": team_of(vocab, LANES, forward_numbers(data)), "resident": _resident(data)}


def forward_share(rows: int, p: int) -> tuple[int, int]:
    """Return how many rows a warp owns, the same number for all teams, and how many blocks it takes."""
    teams = 32 >> p
    share = -(-rows // (FORWARD_BLOCKS * WARPS * teams)) * teams
    return share, -(-rows // max(1, share * WARPS))


def _resident(data: np.dtype) -> int:
    return 3 if data.itemsize == 8 else 4


def _blocks(p: int, resident: int) -> int:
    return resident


def _shipped(data: np.dtype) -> dict[str, Any]:
    return {"p": tuple(range(6)), "resident": _resident(data)}


def _read(real, data, p):
    """Build ``read(x, q, lane, at, n, wide)``: a thread's share of what its team takes of row q at once, from `at` on.

    Behind the end of the row it is minus infinity.
    """
    numbers, width, number = forward_numbers(data), width_of(data), real.type
    read_part, (take, _), place = either(readers(width, numbers)), movers(width), place_of(width)
    step, chunk, nothing = width << p, numbers << p, -math.inf

    def read(x, q, lane, at, n, wide):
        first, left = uint32(lane * uint32(width)), uint32(n - at)
        there = first < left
        own = shift(q, select(there, uint32(first + at), uint32(0)))
        rest = select(there, uint32(left - first), uint32(0))
        if wide and left >= uint32(chunk):  # all is there, at constant distances: an instruction for each vector
            for k in range(0, numbers, width):
                take(x, k, own, uint32(k // width * step))
        else:
            read_part(x, own, uint32(0), uint32(step), rest, wide)
            for k in range(numbers):
                x[k] = select(place(uint32(0), uint32(step), k) < rest, x[k], number(nothing))

    return read


def _scan(real, data, p):
    """Build ``scan(q, lane, n, wide)``: the largest of a thread's share of row q, and its sum of e^(l - largest)."""
    numbers, number, larger, read = forward_numbers(data), real.type, larger_of(real), _read(real, data, p)
    chunk, lowest = numbers << p, float(np.finfo(real).min)
    several = 1 << p == LANES and chunk < LONGEST

    def add(x, top, total):
        """Add a thread's numbers, by two at a time: so half as many steps wait for the one before."""
        before = top
        for k in range(0, numbers, 2):
            top = larger(top, larger(x[k], x[k + 1]))
        if several:  # else there is nothing before
            total = softmax_term(before, top, total)
        for k in range(0, numbers, 2):
            total += softmax_term(x[k], top, number(1)) + softmax_term(x[k + 1], top, number(1))
        return top, total

    def scan(q, lane, n, wide):
        x = cuda.local.array(numbers, real)
        top, total, at = number(lowest), number(0), uint32(0)
        if several:
            while at < n:
                read(x, q, lane, at, n, wide)
                top, total = add(x, top, total)
                at = uint32(at + uint32(chunk))
        else:
            read(x, q, lane, at, n, wide)
            top, total = add(x, top, total)
        return top, total

    return scan


def _merge(real, p):
    """Build ``merge(top, total)``: the shares of a team as one, its sum relative to the largest of all."""
    larger = larger_of(real)

    def merge(top, total):
        most = top
        for power in range(p):
            most = larger(most, cuda.shfl_xor_sync(-1, most, 1 << power))
        total = softmax_term(top, most, total)
        for power in range(p):
            total += cuda.shfl_xor_sync(-1, total, 1 << power)
        return most, total

    return merge


def _forward(real, data, p, resident):
    number, log, scan, merge, nan = real.type, log_of(real), _scan(real, data, p), _merge(real, p), math.nan
    members, teams = 1 << p, 32 >> p

    def store_block(high, low, count, tid, losses, counts):
        """Add up the warps of a block in their order."""
        highs, lows = cuda.shared.array(WARPS, real), cuda.shared.array(WARPS, real)
        many = cuda.shared.array(WARPS, LONG)
        if tid & uint32(31) == uint32(0):
            highs[tid >> uint32(5)], lows[tid >> uint32(5)], many[tid >> uint32(5)] = high, low, count
        cuda.syncthreads()
        if tid == uint32(0):
            for k in range(1, WARPS):
                high, low = two_sum(high, low + lows[k], highs[k])
                count += many[k]
            store(losses, uint32(cuda.blockIdx.x), rounded_sum(high, low))
            store(counts, uint32(cuda.blockIdx.x), count)

    def cross_entropy_forward_short(
        logits: Data, outer_stride: Stride, inner_stride: Stride, labels: Long, ignored: Stride,
        losses: Wide, counts: Long, sums: Wide, tops: Wide,
        n: Size, rows: Size, inner: Size, wide: Size, share: Size,
    ):  # fmt: skip
        """Equation: loss = log(sum e^(l - top)) + top - l[label], with top = max l.
        Threads: a warp owns `share` rows and takes 32 of them at a time, one for each thread. A team of 1 << p threads
        reads the rows of its threads, one in each turn; what it finds is for the thread whose row that is. Where the
        rows begin and what their losses are, all threads find side by side.
        Owns: the sum and the largest logit of its rows, 1 and 0 where the label is ignored; the block owns the sum of
        its rows' losses, and how many of them count: a thread's as they come, then the threads' in a fixed order.
        Saved: sum and largest logit.
        """
        tid = uint32(cuda.threadIdx.x)
        thread, lane = uint32(tid & uint32(31)), uint32(tid & uint32(members - 1))
        leader = uint32(thread - lane)
        start = uint32(uint32(uint32(cuda.blockIdx.x) * uint32(WARPS) + (tid >> uint32(5))) * share)
        high, low, count, taken = number(0), number(0), uint32(0), uint32(0)
        # In all warps, also behind the last row: so the compiler sees that no shuffle misses a thread.
        while taken < share:
            own = uint32(uint32(taken + uint32(lane * uint32(teams))) + leader // uint32(members))
            row = uint32(start + own)
            there = own < share and row < rows
            at = select(there, row, uint32(0))
            label = load(labels, at)
            counted, valid = there and label != ignored, label >= int64(0) and label < int64(n)
            column = uint32(select(valid, label, int64(0)))
            # Row 0 in the place of one that does not count: it is at hand, and what is found there belongs to nobody.
            begin = select(counted, row_offset(divided(at, inner), outer_stride, inner_stride), int64(0))
            due = select(counted, lane, uint32(members))
            top, total, target, turn = number(0), number(1), number(0), uint32(0)
            turns = smaller(uint32(uint32(share - taken) // uint32(teams)), uint32(members))
            while turn < turns:
                q = shift(logits, cuda.shfl_sync(-1, begin, leader + turn))
                most, part = scan(q, lane, n, wide)
                most, part = merge(most, part)
                if turn == due:
                    top, total = most, part
                    target = select(valid, load(q, column), number(nan))  # found in the cache now
                turn = uint32(turn + uint32(1))
            taken = uint32(taken + uint32(32))
            if there:
                total = select(target == target, total, number(nan))  # of a label that is no class
                store(tops, row, top)
                store(sums, row, total)
            if counted:
                high, low = two_sum(high, low, log(total) + (top - target))
                count = uint32(count + uint32(1))
        high, low, found = add_lanes(high, low, int64(count))
        store_block(high, low, found, tid, losses, counts)

    return cross_entropy_forward_short


FORWARD = Kernel(_forward, threads=THREADS, blocks=_blocks, shipped=_shipped)


# --- backward ---


def backward_share(vocab: int, rows: int, data: np.dtype) -> tuple[int, int]:
    """Return p, for teams of ``1 << p`` threads that own rows in turn, and how many blocks it takes."""
    p = team_of(vocab, LANES, backward_numbers(data))
    return p, min(BACKWARD_BLOCKS, -(-rows // (THREADS >> p)))


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
