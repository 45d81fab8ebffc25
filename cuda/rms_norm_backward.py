"""The backward kernels of the CUDA root-mean-square norm.

The first gives the rows' gradients, and for each block its rows' share of the weight's, summed in shared memory on the
way; the second adds the blocks' shares. Always in the same order, whichever thread comes first.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Real, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rms_norm_forward import POWER, THREADS, WARPS
from npmamba.cuda.rows import divided, row_pointer, team_total
from npmamba.cuda.vectors import inside_of, movers, place_of, readers, width_of, writers
from npmamba.scalar import cast, fma, normalized_derivative, select

uint32, int64 = np.uint32, np.int64
BLOCKS = 264
"""Blocks of the first kernel at most: two for each multiprocessor of an H200, which run at a time."""
COLUMNS, SLICES, AHEAD = 32, 32, 16
"""Columns of a block of the second kernel, threads that share a column, and rows that a thread reads at once."""


def numbers_of(real: np.dtype) -> int:
    """Return how many numbers of a row a thread keeps, of each array."""
    return 64 // real.itemsize


def _backward(real, data, wide, whole):
    width, numbers, threads, warps, powers = width_of(data), numbers_of(real), THREADS, WARPS, POWER
    bits, unit, per = width.bit_length() - 1, width if wide else 1, width_of(real)
    read, write = readers(width, numbers)[not wide], writers(width, numbers)[not wide]
    inside, place, total, slots = inside_of(width, wide), place_of(width), team_total(warps), 2 * warps
    number, (take, give) = real.type, movers(per)

    def read_row(q, s_hat, dy, s, r, at, step, n):
        """Read dy into q, and s r into s_hat."""
        read(q, dy, at, step, n)
        read(s_hat, s, at, step, n)
        for k in range(numbers):
            s_hat[k] *= r

    def read_whole_row(q, s_hat, d, dy, s, dsums, r, at, step, n, fused):
        """Read dsums as well, all on the way at once; zeros if there are none."""
        if fused:
            read(q, dy, at, step, n)
            read(s_hat, s, at, step, n)
            read(d, dsums, at, step, n)
        else:
            read(q, dy, at, step, n)
            read(s_hat, s, at, step, n)
            for k in range(numbers):
                d[k] = cast(0, r)
        for k in range(numbers):
            s_hat[k] *= r

    def read_sums(d, dsums, r, at, step, n, fused):
        if fused:
            read(d, dsums, at, step, n)
        else:
            for k in range(numbers):
                d[k] = cast(0, r)

    def clear(cells, w, n, chunk, tid):
        for k in range(numbers):
            w[k] = number(0)
        at = uint32(0)
        while at < n:
            for k in range(0, numbers, per):
                give(w, k, cells, uint32(at + uint32(uint32(k * threads) + uint32(tid * uint32(per)))))
            at = uint32(at + chunk)

    def add_shares(cells, w, q, s_hat, at, tid):
        """Add to dweight, in the thread's own cells; each access is of 16 bytes."""
        for k in range(0, numbers, per):
            cell = uint32(at + uint32(uint32(k * threads) + uint32(tid * uint32(per))))
            take(w, k, cells, cell)
            for i in range(k, k + per):
                w[i] = fma(q[i], s_hat[i], w[i])
            give(w, k, cells, cell)

    def add_shares_far(parts, q, s_hat, first, step, n):
        """Add to dweight where it stands: in the block's row of `parts`, of a row too long for cells."""
        for k in range(numbers):
            j = place(first, step, k)
            if j < n:
                store(parts, j, fma(q[k], s_hat[k], load(parts, j)))

    def add_teams(cells, parts, n, tid, p):
        """Add up the cells of all teams in the block's row of `parts`."""
        cuda.syncthreads()
        chunk, j = uint32(uint32(numbers) << p), tid
        while j < n:
            here = uint32(j & uint32(chunk - uint32(1)))
            vector = here >> uint32(bits)
            k = uint32(uint32(uint32(vector >> p) << uint32(bits)) + (here & uint32(width - 1)))
            lane = uint32(vector - uint32((vector >> p) << p))
            inner = uint32(k & uint32(per - 1))
            first = uint32(uint32(j - here) + uint32(uint32(uint32(k - inner) * uint32(threads)) + inner))
            share = cells[uint32(first + uint32(lane * uint32(per)))]
            lane = uint32(lane + uint32(uint32(1) << p))
            while lane < uint32(threads):
                share += cells[uint32(first + uint32(lane * uint32(per)))]
                lane = uint32(lane + uint32(uint32(1) << p))
            store(parts, j, share)
            j = uint32(j + uint32(threads))

    def rms_norm_backward(
        dy: Data, dy_outer: Stride, dy_inner: Stride,
        s: Data, s_outer: Stride, s_inner: Stride,
        dsums: Data, dsums_outer: Stride, dsums_inner: Stride,
        weight: Wide, rstd: Wide, dx: Data, parts: Wide,
        share: Real, n: Size, rows: Size, inner: Size, p: Size, fused: Size, kept: Size,
    ):  # fmt: skip
        """Equation: ds = r (q - s_hat mean(q s_hat)) + dsum, with s_hat = s r, q = dy weight; dweight = sum dy s_hat.
        Threads: a team of 1 << p threads owns every so many-th row, the same columns of each. Of a row that is not
        `whole`, dy and s are read twice, the second time backwards from where the first ended.
        Owns: its rows of dx; the block's row of `parts`: a thread sums its columns of all its rows in shared memory
        (`kept`, for as many numbers as the team has columns), then the teams are added.
        Saved: s and r.
        """
        shared, cells = cuda.shared.array(slots, real), cuda.shared.array(0, real, 16)
        q, s_hat = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        d, w = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        tid = uint32(cuda.threadIdx.x)
        first = uint32(uint32(tid - uint32((tid >> p) << p)) * uint32(width))
        step, chunk = uint32(uint32(width) << p), uint32(uint32(numbers) << p)
        teams, block = uint32(uint32(1) << uint32(uint32(powers) - p)), uint32(cuda.blockIdx.x)
        parts = shift(parts, int64(block) * int64(n))
        if whole or kept:
            clear(cells, w, n, chunk, tid)
        top, turn = uint32(block * teams), uint32(0)
        while top < rows:
            row = uint32(top + (tid >> p))
            there = row < rows
            row = select(there, row, uint32(0))
            standing = divided(row, inner)
            a, b = row_pointer(dy, standing, dy_outer, dy_inner), row_pointer(s, standing, s_outer, s_inner)
            c, out = row_pointer(dsums, standing, dsums_outer, dsums_inner), shift(dx, int64(row) * int64(n))
            # 0, but unknown to the compiler: it would keep all offsets in registers, and fewer blocks would fit
            begin = uint32(turn >> uint32(1))
            r, dot, at = load(rstd, row), cast(0, share), begin
            while True:
                if whole:
                    read_whole_row(q, s_hat, d, a, b, c, r, uint32(first + at), step, n, fused)
                else:
                    read_row(q, s_hat, a, b, r, uint32(first + at), step, n)
                if there:
                    if whole or kept:
                        add_shares(cells, w, q, s_hat, at, tid)
                    else:
                        add_shares_far(parts, q, s_hat, uint32(first + at), step, n)
                read(w, weight, uint32(first + at), step, n)
                for k in range(0, numbers, unit):
                    more = dot
                    for i in range(k, k + unit):
                        q[i] *= w[i]
                        more = fma(q[i], s_hat[i], more)
                    dot = select(inside(uint32(first + at), step, k, n), more, dot)
                if whole or uint32(n - at) <= chunk:
                    break
                at = uint32(at + chunk)
            mean = total(dot, shared, turn, tid, p) * share
            while there:
                if not whole:
                    read_sums(d, c, r, uint32(first + at), step, n, fused)
                for k in range(numbers):
                    d[k] += normalized_derivative(q[k], s_hat[k], mean, r)
                write(d, out, uint32(first + at), step, n)
                if whole or at == begin:
                    break
                at = uint32(at - chunk)
                read_row(q, s_hat, a, b, r, uint32(first + at), step, n)
                read(w, weight, uint32(first + at), step, n)
                for k in range(numbers):
                    q[k] *= w[k]
            top, turn = uint32(top + uint32(uint32(cuda.gridDim.x) * teams)), uint32(uint32(1) - turn)
        if whole or kept:
            add_teams(cells, parts, n, tid, p)

    return rms_norm_backward


BACKWARD = Kernel(
    _backward,
    THREADS,
    blocks=lambda wide, whole: 2 if wide and whole else 1,
    shipped={"wide": (True, False), "whole": (True, False)},
)


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
