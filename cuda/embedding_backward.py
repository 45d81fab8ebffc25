"""The backward kernels of the CUDA embedding: tokens in the order of their ids are summed, 32 at a time where possible.

The first kernel sums each chunk of 32 sorted tokens that has one id only; in the second each row of the table adds up
its whole chunks, and its tokens before and after them. A word that is half of the text has many chunks, which are
summed all at once; one that came twice has none.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, rounded_sum, row_pointer, smaller, two_sum
from npmamba.cuda.vectors import givers, takers, width_of
from npmamba.scalar import select

uint32, int64 = np.uint32, np.int64
THREADS = 128
WARPS = THREADS // 32
CHUNK = 32
OFTEN = 64
"""Tokens from which on an id is frequent: its row of a large table is left to several warps. A multiple of CHUNK."""


def _batch(real, data):
    """Build ``read_tokens``, ``read_parts`` and ``add``: a vector of each of some rows, all read before one is used."""
    width, number = width_of(data), real.type
    rows = min(8, 32 // width)
    by_vector, by_number = takers(width)

    def token_row(dout, outer_stride, inner_stride, inner, tokens, k, count, i):
        token = uint32(load(tokens, uint32(k + select(uint32(i) < count, uint32(i), uint32(0)))))
        return row_pointer(dout, divided(token, inner), outer_stride, inner_stride)

    def part_row(parts, k, count, i, n):
        part = uint32(k // uint32(CHUNK)) + select(uint32(i) < count, uint32(i), uint32(0))
        return shift(parts, int64(part) * int64(n))

    def read_tokens(x, dout, outer_stride, inner_stride, inner, tokens, k, count, j, n, wide):
        if wide:
            for i in range(rows):
                row = token_row(dout, outer_stride, inner_stride, inner, tokens, k, count, i)
                by_vector(x, i * width, row, j, n)
        else:
            for i in range(rows):
                row = token_row(dout, outer_stride, inner_stride, inner, tokens, k, count, i)
                by_number(x, i * width, row, j, n)

    def read_parts(x, parts, k, count, j, n, wide):
        if wide:
            for i in range(rows):
                by_vector(x, i * width, part_row(parts, k, count, i, n), j, n)
        else:
            for i in range(rows):
                by_number(x, i * width, part_row(parts, k, count, i, n), j, n)

    def add(total, x, count):
        for k in range(width):
            for i in range(rows):
                total[k] += select(uint32(i) < count, x[i * width + k], number(0))

    return rows, read_tokens, read_parts, add


def _chunks(real, data):
    width, number = width_of(data), real.type
    rows, read_tokens, _, add = _batch(real, data)
    cells, columns = rows * width, 32 * width
    by_vector, by_number = givers(width)

    def embedding_chunks(
        dout: Data, outer_stride: Stride, inner_stride: Stride, keys: Long, tokens: Long,
        begins: Long, ends: Long, parts: Wide, n: Size, count: Size, inner: Size, wide: Size,
    ):  # fmt: skip
        """Equation: parts[c] = sum of dout over the sorted tokens 32 c to 32 c + 31, where these have one id.
        Threads: a warp owns a chunk and 32 vectors of columns, eight rows at a time.
        Owns: these cells of parts; of the ids that begin or end in the chunk, where they do.
        Saved: nothing.
        """
        x, total = cuda.local.array(cells, real), cuda.local.array(width, real)
        tid = uint32(cuda.threadIdx.x)
        lane, chunk = tid & uint32(31), uint32(uint32(uint32(cuda.blockIdx.x) * uint32(WARPS)) + (tid >> uint32(5)))
        start = uint32(chunk * uint32(CHUNK))
        i = uint32(start + lane)
        if cuda.blockIdx.y == 0 and i < count:
            key = uint32(load(keys, i))
            if i == uint32(0) or uint32(load(keys, uint32(i - uint32(1)))) != key:
                store(begins, key, int64(i))
            if uint32(i + uint32(1)) == count or uint32(load(keys, uint32(i + uint32(1)))) != key:
                store(ends, key, int64(i) + int64(1))
        if uint32(start + uint32(CHUNK)) > count or load(keys, start) != load(keys, uint32(start + uint32(CHUNK - 1))):
            return
        j = uint32(uint32(uint32(cuda.blockIdx.y) * uint32(columns)) + uint32(lane * uint32(width)))
        for k in range(width):
            total[k] = number(0)
        for batch in range(0, CHUNK, rows):
            k = uint32(start + uint32(batch))
            read_tokens(x, dout, outer_stride, inner_stride, inner, tokens, k, uint32(rows), j, n, wide)
            add(total, x, uint32(rows))
        parts = shift(parts, int64(chunk) * int64(n))
        if wide:
            by_vector(total, 0, parts, j, n)
        else:
            by_number(total, 0, parts, j, n)

    return embedding_chunks


def _backward(real, data, warps):
    width, number = width_of(data), real.type
    rows, read_tokens, read_parts, add = _batch(real, data)
    cells, columns, slots, teams = rows * width, 32 * width, warps * 32 * width, WARPS // warps
    by_vector, by_number = givers(width)

    def add_batch(high, low, total, x, count):
        for k in range(width):
            total[k] = number(0)
        add(total, x, count)
        for k in range(width):
            high[k], low[k] = two_sum(high[k], low[k], total[k])

    def add_warps(high, low, highs, lows, tid):
        """Give the sums of all warps to the first, in order."""
        cuda.syncthreads()
        for k in range(width):
            at = uint32(uint32(tid * uint32(width)) + uint32(k))
            highs[at], lows[at] = high[k], low[k]
        cuda.syncthreads()
        if tid < uint32(32):
            for warp in range(1, warps):
                for k in range(width):
                    at = uint32(uint32(tid * uint32(width)) + uint32(warp * columns + k))
                    high[k], low[k] = two_sum(high[k], low[k] + lows[at], highs[at])

    def owned_row(keys, begins, ends, vocab, tid, frequent):
        """Return the row of this warp, or this block, and where its tokens begin and end; `vocab` if it has none."""
        block = uint32(cuda.blockIdx.x)
        row = uint32(uint32(block * uint32(teams)) + (tid >> uint32(5)) // uint32(warps))
        if warps > 1 and frequent:
            row = uint32(load(keys, uint32(block * uint32(OFTEN))))
        row = smaller(row, vocab)
        begin, end = uint32(load(begins, row)), uint32(load(ends, row))
        often = uint32(end - begin) >= uint32(OFTEN)
        if frequent:
            if warps == 1:
                row = select(often, vocab, row)
            else:  # a frequent row has one block, that of the first multiple of OFTEN among its tokens
                mine = often and uint32(begin + uint32(OFTEN - 1)) // uint32(OFTEN) == block
                row = select(mine, row, vocab)
        return row, begin, end

    def embedding_backward(
        dout: Data, outer_stride: Stride, inner_stride: Stride, keys: Long, tokens: Long, begins: Long, ends: Long,
        parts: Wide, dweight: Data, n: Size, vocab: Size, inner: Size, wide: Size, frequent: Size,
    ):  # fmt: skip
        """Equation: dweight[v] = sum of dout over the tokens with id v.
        Threads: `warps` warps own a row of the table and take its batches by turns: whole chunks, which are summed
        already, and single tokens before and after them. With `frequent`, one warp leaves out frequent rows, and
        several take these only.
        Owns: its row of dweight, or the columns of it that blocks along y share; zeros if no token has that id.
        Saved: nothing; `tokens` are sorted by id, those of id v stand from begins[v] to ends[v].
        """
        highs, lows = cuda.shared.array(slots, real), cuda.shared.array(slots, real)
        x, total = cuda.local.array(cells, real), cuda.local.array(width, real)
        high, low = cuda.local.array(width, real), cuda.local.array(width, real)
        tid = uint32(cuda.threadIdx.x)
        lane, warp = tid & uint32(31), tid >> uint32(5)
        row, begin, end = owned_row(keys, begins, ends, vocab, tid, frequent)
        if row == vocab:
            return
        dweight = shift(dweight, int64(row) * int64(n))
        at = uint32(uint32(cuda.blockIdx.y) * uint32(columns))
        while at < n:
            j, k, turn = uint32(at + uint32(lane * uint32(width))), begin, uint32(0)
            for i in range(width):
                high[i], low[i] = number(0), number(0)
            while k < end:
                left, past = uint32(end - k), k & uint32(CHUNK - 1)
                whole = past == uint32(0) and left >= uint32(CHUNK)
                count = select(whole, uint32(left // uint32(CHUNK)), smaller(left, uint32(uint32(CHUNK) - past)))
                count = smaller(count, uint32(rows))
                if turn == warp % uint32(warps):
                    if whole:
                        read_parts(x, parts, k, count, j, n, wide)
                    else:
                        read_tokens(x, dout, outer_stride, inner_stride, inner, tokens, k, count, j, n, wide)
                    add_batch(high, low, total, x, count)
                k = uint32(k + select(whole, uint32(count * uint32(CHUNK)), count))
                turn = uint32(turn + uint32(1)) % uint32(warps)
            if warps > 1:
                add_warps(high, low, highs, lows, tid)
            if warp % uint32(warps) == uint32(0):
                for i in range(width):
                    total[i] = rounded_sum(high[i], low[i])
                if wide:
                    by_vector(total, 0, dweight, j, n)
                else:
                    by_number(total, 0, dweight, j, n)
            at = uint32(at + uint32(uint32(cuda.gridDim.y) * uint32(columns)))

    return embedding_backward


CHUNKS = Kernel(_chunks, threads=THREADS, shipped={})
BACKWARD = Kernel(_backward, threads=THREADS, shipped={"warps": (1, WARPS)})
