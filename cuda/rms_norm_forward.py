"""The forward kernel of the CUDA root-mean-square norm: a team of threads owns a row and keeps it in registers."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Real, Size, Stride, Wide, cuda, rcp, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, row_pointer, team_total
from npmamba.cuda.vectors import givers, inside_of, place_of, readers, takers, width_of, writers
from npmamba.scalar import cast, fma, normalized, select, sqrt

uint32, int64 = np.uint32, np.int64
POWER = 8
THREADS = 1 << POWER
"""Threads of a block: one team of all of them, or many small ones."""
WARPS = THREADS // 32


def numbers_of(data: np.dtype) -> int:
    """Return how many numbers of a row a thread keeps: 64 bytes of memory, so that enough of it is on its way."""
    return 64 // data.itemsize


def _forward(real, data, wide, fused):
    width, numbers, slots = width_of(data), numbers_of(data), 2 * WARPS
    read, write = readers(width, numbers)[not wide], writers(width, numbers)[not wide]
    take, give, place = takers(width)[not wide], givers(width)[not wide], place_of(width)
    inside, total, unit = inside_of(width, wide), team_total(WARPS), width if wide else 1

    def read_sum(s, t, x, residual, at, step, n):
        """s = x, or x + residual: with `fused` at run time, residual would be read after x has come"""
        read(s, x, at, step, n)
        if fused:
            read(t, residual, at, step, n)
            for k in range(numbers):
                s[k] += t[k]

    def rms_norm_forward(
        x: Data, x_outer: Stride, x_inner: Stride,
        residual: Data, residual_outer: Stride, residual_inner: Stride,
        weight: Wide, y: Data, sums: Data, rstd: Wide,
        eps: Real, share: Real, n: Size, rows: Size, inner: Size, p: Size,
    ):  # fmt: skip
        """Equation: y = s r weight, with s = x + residual and r = 1 / sqrt(mean(s^2) + eps).
        Threads: a team of 1 << p threads owns a row; a short one has a small team, so that none is idle. A row that
        its registers cannot hold goes through them twice, the second time backwards from where the first ended.
        Owns: its row of y, of the sum s (with a residual) and of r.
        Saved: r of each row.
        """
        shared = cuda.shared.array(slots, real)
        s, t = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        tid = uint32(cuda.threadIdx.x)
        row = uint32((uint32(cuda.blockIdx.x) << uint32(uint32(POWER) - p)) + (tid >> p))
        there = row < rows
        row = select(there, row, uint32(0))
        standing = divided(row, inner)
        x = row_pointer(x, standing, x_outer, x_inner)
        residual = row_pointer(residual, standing, residual_outer, residual_inner)
        y, sums = shift(y, int64(row) * int64(n)), shift(sums, int64(row) * int64(n))
        first = uint32(uint32(tid - uint32((tid >> p) << p)) * uint32(width))
        step, chunk = uint32(uint32(width) << p), uint32(uint32(numbers) << p)
        squares, at = cast(0, eps), uint32(0)
        while True:
            read_sum(s, t, x, residual, uint32(first + at), step, n)
            for k in range(0, numbers, unit):
                more = squares
                for i in range(unit):
                    more = fma(s[k + i], s[k + i], more)
                squares = select(inside(uint32(first + at), step, k, n), more, squares)
            if uint32(n - at) <= chunk:
                break
            at = uint32(at + chunk)
        r = rcp(sqrt(fma(total(squares, shared, uint32(0), tid, p), share, eps)))
        while there:
            if fused:
                write(s, sums, uint32(first + at), step, n)
            for k in range(0, numbers, width):  # a vector at a time, so that few registers hold the weight
                j = place(uint32(first + at), step, k)
                take(t, 0, weight, j, n)
                for i in range(width):
                    s[k + i] = normalized(s[k + i], r, t[i])
                give(s, k, y, j, n)
            if at == uint32(0):
                break
            at = uint32(at - chunk)
            read_sum(s, t, x, residual, uint32(first + at), step, n)
        if there and first == uint32(0):
            store(rstd, row, r)

    return rms_norm_forward


FORWARD = Kernel(
    _forward,
    THREADS,
    blocks=lambda wide, fused: 3 - fused if wide else 1,
    shipped={"wide": (True, False), "fused": (True, False)},
)
