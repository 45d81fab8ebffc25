"""The forward kernel of the CUDA root-mean-square norm: a team of threads owns a row and keeps it in registers."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Real, Size, Stride, Wide, cuda, rcp, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, row_pointer, team_total
from npmamba.cuda.vectors import inside_of, readers, width_of, writers
from npmamba.scalar import cast, fma, normalized, select, sqrt

uint32, int64 = np.uint32, np.int64
POWER = 8
THREADS = 1 << POWER
"""Threads of a block, which is one team of all of them or up to eight of a warp."""
WARPS = THREADS // 32


def numbers_of(real: np.dtype) -> int:
    """Return how many numbers of a row a thread keeps: 64 bytes, so that a block holds a row of 4,096 float32."""
    return 64 // real.itemsize


def _forward(real, data, wide):
    width, numbers, slots = width_of(data), numbers_of(real), 2 * WARPS
    read, write = readers(width, numbers)[not wide], writers(width, numbers)[not wide]
    inside, total = inside_of(width, wide), team_total(WARPS)

    def read_sum(s, t, x, residual, at, step, n, fused):
        """s = x, or x + residual"""
        if fused:
            read(s, x, at, step, n)
            read(t, residual, at, step, n)
            for k in range(numbers):
                s[k] += t[k]
        else:
            read(s, x, at, step, n)

    def rms_norm_forward(
        x: Data, x_outer: Stride, x_inner: Stride,
        residual: Data, residual_outer: Stride, residual_inner: Stride,
        weight: Wide, y: Data, sums: Data, rstd: Wide,
        eps: Real, share: Real, n: Size, rows: Size, inner: Size, power: Size, fused: Size,
    ):  # fmt: skip
        """Equation: y = s r weight, with s = x + residual and r = 1 / sqrt(mean(s^2) + eps).
        Threads: a team of 1 << power warps owns a row. A row that its registers cannot hold goes through them twice,
        the second time backwards from where the first ended.
        Owns: its row of y, of the sum s (with a residual) and of r.
        Saved: r of each row.
        """
        shared = cuda.shared.array(slots, real)
        s, t = cuda.local.array(numbers, real), cuda.local.array(numbers, real)
        tid, p = uint32(cuda.threadIdx.x), uint32(power + uint32(5))
        row = uint32((uint32(cuda.blockIdx.x) << uint32(uint32(POWER) - p)) + (tid >> p))
        there = row < rows
        row = select(there, row, uint32(0))
        place = divided(row, inner)
        x = row_pointer(x, place, x_outer, x_inner)
        residual = row_pointer(residual, place, residual_outer, residual_inner)
        y, sums = shift(y, int64(row) * int64(n)), shift(sums, int64(row) * int64(n))
        first = uint32(uint32(tid - uint32((tid >> p) << p)) * uint32(width))
        step, chunk = uint32(uint32(width) << p), uint32(uint32(numbers) << p)
        squares, at = cast(0, eps), uint32(0)
        while True:
            read_sum(s, t, x, residual, uint32(first + at), step, n, fused)
            for k in range(numbers):
                there_too = inside(uint32(first + at), step, k, n)
                squares = fma(s[k], select(there_too, s[k], cast(0, eps)), squares)
            if uint32(n - at) <= chunk:
                break
            at = uint32(at + chunk)
        r = rcp(sqrt(fma(total(squares, shared, uint32(0), tid, power), share, eps)))
        while there:
            if fused:
                write(s, sums, uint32(first + at), step, n)
            read(t, weight, uint32(first + at), step, n)
            for k in range(numbers):
                s[k] = normalized(s[k], r, t[k])
            write(s, y, uint32(first + at), step, n)
            if at == uint32(0):
                break
            at = uint32(at - chunk)
            read_sum(s, t, x, residual, uint32(first + at), step, n, fused)
        if there and first == uint32(0):
            store(rstd, row, r)

    return rms_norm_forward


FORWARD = Kernel(_forward, THREADS, blocks=lambda wide: 4 if wide else 1, shipped={"wide": (True, False)})
