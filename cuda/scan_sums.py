"""The second stage of the CUDA scan's sums: over the blocks of the backward kernel, in a fixed order.

A block leaves its part of every sum in memory. `SUM_MAPS` adds up those of dB and dC, which are sums over channels for
every step, `SUM_PARTS` those over time: dA, dD, the bias gradient, and dB and dC of constant maps.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Size, Stride, Wide, cuda, load, load4, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.scan_tile import load1
from npmamba.scalar import cast

uint32, int64 = np.uint32, np.int64
COLUMNS, TEAMS = 32, 8
"""Columns of a block of SUM_PARTS, and threads that share the rows of one."""
PARTS = COLUMNS * TEAMS
MAP_THREADS = 256
"""Threads of a block of SUM_MAPS."""


def _sum_parts(real, data):
    def sum_parts(parts: Wide, out: Data, rows: Size, columns: Size, padded: Size, width: Size):
        """Equation: out[o, i] = sum_r parts[o, r, i], of columns in groups of `padded` the first `width` each.
        Threads: a block has COLUMNS columns; TEAMS threads share a column's rows and add up in a fixed order.
        Owns: its columns of out.
        """
        shared = cuda.shared.array(PARTS, real, 16)
        thread = uint32(cuda.threadIdx.x)
        lane, team = uint32(thread % uint32(COLUMNS)), uint32(thread // uint32(COLUMNS))
        column = uint32(uint32(cuda.blockIdx.x) * uint32(COLUMNS) + lane)
        outer = int64(cuda.blockIdx.y)
        total = cast(0, load(parts, 0))
        if column < columns:
            at = shift(parts, (outer * int64(rows) + int64(team)) * int64(columns) + int64(column))
            row = team
            while row < rows:
                total += load(at, 0)
                at = shift(at, int64(TEAMS) * int64(columns))
                row = uint32(row + uint32(TEAMS))
        shared[thread] = total
        cuda.syncthreads()
        n = uint32(column % padded)
        if team == uint32(0) and column < columns and n < width:
            for t in range(1, TEAMS):
                total += shared[lane + uint32(t * COLUMNS)]
            store(out, (outer * int64(columns // padded) + int64(column // padded)) * int64(width) + int64(n), total)

    return sum_parts


def _sum_maps(real, data, quads):
    count = 4 if quads else 1
    load_some = load4 if quads else load1

    def add(total, at):
        numbers = load_some(at, 0)
        for c in range(count):
            total[c] += numbers[c]

    def sum_maps(
        parts: Wide, dB: Data, dC: Data, blocks: Size, groups: Size, rows: Stride, group_rows: Stride, padded: Size,
        width: Size,
    ):  # fmt: skip
        """Equation: dB, dC[g, row, n] = sum of the parts [block, row, (B or C, n)] of the blocks of group g.
        Threads: one per `count` neighbouring numbers, blocks of channels one after the other.
        Owns: its numbers of dB or dC; rows are (batch, seqlen).
        """
        total = cuda.local.array(count, real)
        both = int64(padded) * int64(2)
        step = rows * both
        share = int64(MAP_THREADS * count)
        per_group = (step + share - int64(1)) // share
        group = int64(cuda.blockIdx.x) // per_group
        i = int64(cuda.blockIdx.x) % per_group * share + int64(cuda.threadIdx.x) * int64(count)
        if i < step:
            for c in range(count):
                total[c] = cast(0, load(parts, 0))
            at = shift(parts, group * int64(blocks) * step + i)
            k = uint32(0)
            while uint32(k + uint32(4)) <= blocks:
                for ahead in range(4):
                    add(total, shift(at, int64(ahead) * step))
                at = shift(at, int64(4) * step)
                k = uint32(k + uint32(4))
            while k < blocks:
                add(total, at)
                at = shift(at, step)
                k = uint32(k + uint32(1))
            row = i // both
            batch, t = row // group_rows, row % group_rows
            to = ((batch * int64(groups) + group) * group_rows + t) * int64(width)
            for c in range(count):
                column = uint32(i % both + int64(c))
                n = uint32(column % padded)
                if n < width:
                    if column < padded:
                        store(dB, to + int64(n), total[c])
                    else:
                        store(dC, to + int64(n), total[c])

    return sum_maps


SUM_PARTS = Kernel(_sum_parts, PARTS, shipped={})
SUM_MAPS = Kernel(_sum_maps, MAP_THREADS, shipped={"quads": (False, True)})
