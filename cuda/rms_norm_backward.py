"""The backward kernels of the CUDA root-mean-square norm.

The first gives the rows' gradients, and for each block its rows' share of the weight's, summed in registers on the way;
the second adds the blocks' shares. Always in the same order, whichever thread comes first.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Real, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rms_norm_forward import POWER, THREADS, WARPS, numbers_of
from npmamba.cuda.rows import divided, row_pointer, smaller, team_total
from npmamba.cuda.vectors import inside_of, place_of, readers, width_of, writers
from npmamba.scalar import cast, normalized_derivative, select

uint32, int64 = np.uint32, np.int64
BLOCKS = 528
"""Blocks of the first kernel at most: four for each multiprocessor of an H200, two of which run at a time."""
COLUMNS, SLICES, AHEAD = 32, 16, 8
"""Columns of a block of the second kernel, threads that share a column, and rows that a thread reads at once."""


def _backward(real, data, wide, whole):
    width, numbers, slots = width_of(data), numbers_of(real), 2 * WARPS
    cells, bits = numbers * THREADS, width.bit_length() - 1
    read, write = readers(width, numbers)[not wide], writers(width, numbers)[not wide]
    inside, place, total = inside_of(width, wide), place_of(width), team_total(WARPS)

    def read_row(q, s_hat, d, w, dy, s, dsums, weight, r, at, step, n, fused):
        """Read dy into q, s, dsums and the weight, and turn s into s_hat."""
        if fused:
            read(q, dy, at, step, n)
            read(s_hat, s, at, step, n)
            read(d, dsums, at, step, n)
        else:
            read(q, dy, at, step, n)
            read(s_hat, s, at, step, n)
            for k in range(numbers):
                d[k] = cast(0, r)
        read(w, weight, at, step, n)
        for k in range(numbers):
            s_hat[k] *= r

    def add_share(sums, parts, k, share, j, n, tid):
        """Add to dweight: in a cell of the thread or, of a row too long for those, in the block's row of `parts`."""
        if whole:
            sums[uint32(uint32(k * THREADS) + tid)] += share
        elif j < n:
            store(parts, j, load(parts, j) + share)

    def add_teams(sums, parts, n, tid, p):
        """Add up the cells of all teams in the block's row of `parts`."""
        cuda.syncthreads()
        j = tid
        while j < smaller(n, uint32(uint32(numbers) << p)):
            vector = j >> uint32(bits)
            k = uint32(uint32(uint32(vector >> p) << uint32(bits)) + (j & uint32(width - 1)))
            lane = uint32(vector - uint32((vector >> p) << p))
            total = sums[uint32(uint32(k * uint32(THREADS)) + lane)]
            lane = uint32(lane + uint32(uint32(1) << p))
            while lane < uint32(THREADS):
                total += sums[uint32(uint32(k * uint32(THREADS)) + lane)]
                lane = uint32(lane + uint32(uint32(1) << p))
            store(parts, j, total)
            j = uint32(j + uint32(THREADS))

    def rms_norm_backward(
        dy: Data, dy_outer: Stride, dy_inner: Stride,
        s: Data, s_outer: Stride, s_inner: Stride,
        dsums: Data, dsums_outer: Stride, dsums_inner: Stride,
        weight: Wide, rstd: Wide, dx: Data, parts: Wide,
        share: Real, n: Size, rows: Size, inner: Size, power: Size, fused: Size,
    ):  # fmt: skip
        """Equation: ds = r (q - s_hat mean(q s_hat)) + dsum, with s_hat = s r, q = dy weight; dweight = sum dy s_hat.
        Threads: a team of 1 << power warps owns every so many-th row, the same columns of each.
        Owns: its rows of dx; the block's row of `parts`: a team's rows are summed as they come, then the teams.
        Saved: s and r.
        """
        shared, sums = cuda.shared.array(slots, real), cuda.shared.array(cells, real)
        q, s_hat = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        d, w = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        tid, p = uint32(cuda.threadIdx.x), uint32(power + uint32(5))
        first = uint32(uint32(tid - uint32((tid >> p) << p)) * uint32(width))
        step, chunk = uint32(uint32(width) << p), uint32(uint32(numbers) << p)
        teams, block = uint32(uint32(1) << uint32(uint32(POWER) - p)), uint32(cuda.blockIdx.x)
        parts = shift(parts, int64(block) * int64(n))
        if whole:
            for k in range(numbers):
                sums[uint32(uint32(k * THREADS) + tid)] = cast(0, share)
        top, turn = uint32(block * teams), uint32(0)
        while top < rows:
            row = uint32(top + (tid >> p))
            there = row < rows
            row = select(there, row, uint32(0))
            standing = divided(row, inner)
            a, b = row_pointer(dy, standing, dy_outer, dy_inner), row_pointer(s, standing, s_outer, s_inner)
            c, out = row_pointer(dsums, standing, dsums_outer, dsums_inner), shift(dx, int64(row) * int64(n))
            r, dot, at = load(rstd, row), cast(0, share), uint32(0)
            while True:
                read_row(q, s_hat, d, w, a, b, c, weight, r, uint32(first + at), step, n, fused)
                if there:
                    for k in range(numbers):
                        j = place(uint32(first + at), step, k)
                        add_share(sums, parts, k, q[k] * s_hat[k], j, n, tid)
                for k in range(numbers):
                    q[k] *= w[k]
                    dot += select(inside(uint32(first + at), step, k, n), q[k] * s_hat[k], cast(0, share))
                if whole or uint32(n - at) <= chunk:
                    break
                at = uint32(at + chunk)
            mean = total(dot, shared, turn, tid, power) * share
            while there:
                for k in range(numbers):
                    d[k] += normalized_derivative(q[k], s_hat[k], mean, r)
                write(d, out, uint32(first + at), step, n)
                if whole or at == uint32(0):
                    break
                at = uint32(at - chunk)
                read_row(q, s_hat, d, w, a, b, c, weight, r, uint32(first + at), step, n, fused)
                for k in range(numbers):
                    q[k] *= w[k]
            top, turn = uint32(top + uint32(uint32(cuda.gridDim.x) * teams)), uint32(uint32(1) - turn)
        if whole:
            add_teams(sums, parts, n, tid, p)

    return rms_norm_backward


BACKWARD = Kernel(_backward, THREADS, shipped={"wide": (True, False), "whole": (True, False)})


def _column_sums(real):
    cells, number = COLUMNS * SLICES, real.type

    def rms_norm_column_sums(parts: Wide, sums: Wide, n: Size, count: Size):
        """Equation: sums[j] = sum over k of parts[k, j].
        Threads: a column is read by SLICES threads, AHEAD rows each at a time; neighbours read neighbouring columns.
        Owns: COLUMNS columns of the result; a thread's rows are summed as they come, then the threads in order.
        Saved: nothing.
        """
        shared = cuda.shared.array(cells, real)
        tid = uint32(cuda.threadIdx.x)
        part, column = tid // uint32(COLUMNS), tid % uint32(COLUMNS)
        j = uint32(uint32(cuda.blockIdx.x) * uint32(COLUMNS) + column)
        parts = shift(parts, int64(select(j < n, j, uint32(0))))
        total = number(0)
        while part < count:
            for k in range(AHEAD):
                row = uint32(part + uint32(k * SLICES))
                x = load(shift(parts, int64(select(row < count, row, uint32(0))) * int64(n)), uint32(0))
                total += select(row < count, x, number(0))
            part = uint32(part + uint32(AHEAD * SLICES))
        shared[tid] = total
        cuda.syncthreads()
        if tid < uint32(COLUMNS) and j < n:
            for k in range(1, SLICES):
                total += shared[uint32(column + uint32(k * COLUMNS))]
            store(sums, j, total)

    return rms_norm_column_sums


COLUMN_SUMS = Kernel(_column_sums, threads=COLUMNS * SLICES, shipped={}, dtypes=("float32", "float64"))
