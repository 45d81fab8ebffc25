"""The backward kernels of the CUDA embedding: tokens in the order of their ids are summed, 32 at a time where possible.

An id is frequent if two multiples of 32 are among the places of its sorted tokens. The first kernel sums each chunk of
32 tokens that has one frequent id only; a block then adds up such a row's whole chunks, and its tokens before and after
them. Half of the text may be one word: its chunks are summed all at once. Of a large table most rows have a few tokens
or none: a warp owns each of these, and has several vectors of several tokens on their way.
"""

from __future__ import annotations

import numpy as np

from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift, store
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import rounded_sum, smaller, two_sum
from npmamba.cuda.vectors import either, givers, takers, width_of, writers
from npmamba.scalar import select

uint32, int64 = np.uint32, np.int64
THREADS = 128
WARPS = THREADS // 32
CHUNK = 32
GROUP = 8
"""Chunks in which a block looks for frequent ids that are its own."""
VECTORS = 3
"""Vectors of a row that a lane sums at once, where a warp owns the row."""


def token_row(dout, stride, tokens, k, count, i):
    """Return the row of dout of the i-th token from k on, or of the first if there are no more than `count`."""
    token = load(tokens, uint32(k + select(uint32(i) < count, uint32(i), uint32(0))))
    return shift(dout, token * stride)


def _batch(real, data):
    """Build ``read_tokens``, ``read_parts`` and ``add``: a vector of each of some rows, all read before one is used."""
    width, number = width_of(data), real.type
    rows = min(8, 32 // width)
    by_vector, by_number = takers(width)

    def part_row(parts, k, count, i, n):
        part = uint32(k // uint32(CHUNK)) + select(uint32(i) < count, uint32(i), uint32(0))
        return shift(parts, int64(part) * int64(n))

    def read_tokens(x, dout, stride, tokens, k, count, j, n, wide):
        if wide:
            for i in range(rows):
                row = token_row(dout, stride, tokens, k, count, i)
                by_vector(x, i * width, row, j, n)
        else:
            for i in range(rows):
                row = token_row(dout, stride, tokens, k, count, i)
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
        dout: Data, stride: Stride, keys: Long, tokens: Long, begins: Long, ends: Long, parts: Wide,
        n: Size, count: Size, wide: Size,
    ):  # fmt: skip
        """Equation: parts[c] = sum of dout over the sorted tokens 32 c to 32 c + 31, where these have one frequent id.
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
        if uint32(start + uint32(CHUNK)) > count:
            return
        before, after = uint32(start - smaller(start, uint32(CHUNK))), uint32(start + uint32(CHUNK))
        key, last = load(keys, start), load(keys, uint32(start + uint32(CHUNK - 1)))
        earlier, later = load(keys, before), load(keys, smaller(after, uint32(count - uint32(1))))
        often = before != start and earlier == key or after < count and later == key
        if key != last or not often:
            return
        j = uint32(uint32(uint32(cuda.blockIdx.y) * uint32(columns)) + uint32(lane * uint32(width)))
        for k in range(width):
            total[k] = number(0)
        for batch in range(0, CHUNK, rows):
            k = uint32(start + uint32(batch))
            read_tokens(x, dout, stride, tokens, k, uint32(rows), j, n, wide)
            add(total, x, uint32(rows))
        parts = shift(parts, int64(chunk) * int64(n))
        if wide:
            by_vector(total, 0, parts, j, n)
        else:
            by_number(total, 0, parts, j, n)

    return embedding_chunks


def _first_multiple(begin):
    return uint32(uint32(begin + uint32(CHUNK - 1)) & uint32(2**32 - CHUNK))


def _is_frequent(begin, end):
    """Tell whether two multiples of CHUNK are among the places from begin to end."""
    return begin < end and uint32(_first_multiple(begin) + uint32(CHUNK)) < end


# --- rows that a block owns ---


def _frequent(real, data):
    width, number = width_of(data), real.type
    rows, read_tokens, read_parts, add = _batch(real, data)
    cells, columns, slots = rows * width, 32 * width, WARPS * 32 * width
    by_vector, by_number = givers(width)

    def add_batch(high, low, total, x, count):
        for k in range(width):
            total[k] = number(0)
        add(total, x, count)
        for k in range(width):
            high[k], low[k] = two_sum(high[k], low[k], total[k])

    def add_row(high, low, total, x, dout, stride, tokens, parts, k, end, j, n, wide, warp):
        """Add a warp's share of the tokens from k to end."""
        often, turn = _is_frequent(k, end), uint32(0)
        for i in range(width):
            high[i], low[i] = number(0), number(0)
        while k < end:
            left, past = uint32(end - k), k & uint32(CHUNK - 1)
            whole = often and past == uint32(0) and left >= uint32(CHUNK)
            count = select(whole, uint32(left // uint32(CHUNK)), smaller(left, uint32(uint32(CHUNK) - past)))
            count = smaller(count, uint32(rows))
            if turn == warp:
                if whole:
                    read_parts(x, parts, k, count, j, n, wide)
                else:
                    read_tokens(x, dout, stride, tokens, k, count, j, n, wide)
                add_batch(high, low, total, x, count)
            k = uint32(k + select(whole, uint32(count * uint32(CHUNK)), count))
            turn = uint32(turn + uint32(1)) % uint32(WARPS)

    def add_warps(high, low, highs, lows, tid):
        """Give the sums of all warps to the first, in order."""
        cuda.syncthreads()
        for k in range(width):
            at = uint32(uint32(tid * uint32(width)) + uint32(k))
            highs[at], lows[at] = high[k], low[k]
        cuda.syncthreads()
        if tid < uint32(32):
            for warp in range(1, WARPS):
                for k in range(width):
                    at = uint32(uint32(tid * uint32(width)) + uint32(warp * columns + k))
                    high[k], low[k] = two_sum(high[k], low[k] + lows[at], highs[at])

    def is_own(keys, place, count, vocab):
        """Tell whether the id at a multiple of CHUNK is frequent, and this the first multiple among its places."""
        before, after = uint32(place - smaller(place, uint32(CHUNK))), uint32(place + uint32(CHUNK))
        last = uint32(count - uint32(1))
        key, earlier = load(keys, smaller(place, last)), load(keys, smaller(before, last))
        later = load(keys, smaller(after, last))
        first = place == uint32(0) or earlier != key
        return after < count and later == key and first and key < int64(vocab)

    def embedding_frequent(
        dout: Data, stride: Stride, keys: Long, tokens: Long, begins: Long, ends: Long, parts: Wide, dweight: Data,
        n: Size, count: Size, vocab: Size, wide: Size, every: Size,
    ):  # fmt: skip
        """Equation: dweight[v] = sum of dout over the tokens with id v.
        Threads: a block owns a row of the table or, unless `every` row has one, all frequent ids that have their first
        multiple of CHUNK in its GROUP chunks. Its warps take a row's batches by turns: whole chunks, which are summed
        already if the id is frequent, and single tokens before and after them.
        Owns: 32 vectors of columns of its rows of dweight; zeros if no token has that id.
        Saved: nothing; `tokens` are sorted by id, those of id v stand from begins[v] to ends[v].
        """
        highs, lows = cuda.shared.array(slots, real), cuda.shared.array(slots, real)
        x, total = cuda.local.array(cells, real), cuda.local.array(width, real)
        high, low = cuda.local.array(width, real), cuda.local.array(width, real)
        tid, block, own = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x), uint32(1)
        j = uint32(uint32(uint32(cuda.blockIdx.y) * uint32(columns)) + uint32((tid & uint32(31)) * uint32(width)))
        start = uint32(block * uint32(GROUP * CHUNK))
        if every == uint32(0):
            own = uint32(0)
            for turn in range(GROUP):
                mine = is_own(keys, uint32(start + uint32(turn * CHUNK)), count, vocab)
                own = uint32(own | select(mine, uint32(1 << turn), uint32(0)))
        turn = uint32(0)
        while own >> turn > uint32(0):
            if (own >> turn) & uint32(1) != uint32(0):
                row = block
                if every == uint32(0):
                    row = uint32(load(keys, uint32(start + uint32(turn * uint32(CHUNK)))))
                begin, end = uint32(load(begins, row)), uint32(load(ends, row))
                warp = tid >> uint32(5)
                add_row(high, low, total, x, dout, stride, tokens, parts, begin, end, j, n, wide, warp)
                add_warps(high, low, highs, lows, tid)
                if warp == uint32(0):
                    for i in range(width):
                        total[i] = rounded_sum(high[i], low[i])
                    out = shift(dweight, int64(row) * int64(n))
                    if wide:
                        by_vector(total, 0, out, j, n)
                    else:
                        by_number(total, 0, out, j, n)
            turn = uint32(turn + uint32(1))

    return embedding_frequent


# --- rows that a warp owns ---


def _rows(real, data):
    width, number = width_of(data), real.type
    numbers, together = VECTORS * width, 16 // width
    columns, step, cells = 32 * numbers, 32 * width, numbers * together
    write, (by_vector, by_number) = either(writers(width, numbers)), takers(width)

    def read_tokens(x, dout, stride, tokens, k, left, first, n, wide):
        """Read some tokens' numbers, all on the way at once; one that is not there is read as the first."""
        if wide:
            for i in range(together):
                row = token_row(dout, stride, tokens, k, left, i)
                for v in range(VECTORS):
                    by_vector(x, i * numbers + v * width, row, uint32(first + uint32(v * step)), n)
        else:
            for i in range(together):
                row = token_row(dout, stride, tokens, k, left, i)
                for v in range(VECTORS):
                    by_number(x, i * numbers + v * width, row, uint32(first + uint32(v * step)), n)

    def embedding_rows(
        dout: Data, stride: Stride, tokens: Long, begins: Long, ends: Long, dweight: Data,
        n: Size, vocab: Size, wide: Size,
    ):  # fmt: skip
        """Equation: dweight[v] = sum of dout over the tokens with id v.
        Threads: a warp owns a row of the table whose id is not frequent, VECTORS vectors a lane at a time.
        Owns: its row of dweight; zeros if no token has that id.
        Saved: nothing; `tokens` are sorted by id, those of id v stand from begins[v] to ends[v].
        """
        x, total = cuda.local.array(cells, real), cuda.local.array(numbers, real)
        tid, at = uint32(cuda.threadIdx.x), uint32(0)
        row = uint32(uint32(uint32(cuda.blockIdx.x) * uint32(WARPS)) + (tid >> uint32(5)))
        if row >= vocab:
            return
        begin, end = uint32(load(begins, row)), uint32(load(ends, row))
        if _is_frequent(begin, end):
            return
        dweight = shift(dweight, int64(row) * int64(n))
        while at < n:
            first, k = uint32(at + uint32((tid & uint32(31)) * uint32(width))), begin
            for i in range(numbers):
                total[i] = number(0)
            while k < end:
                left = uint32(end - k)
                read_tokens(x, dout, stride, tokens, k, left, first, n, wide)
                for i in range(together):
                    for c in range(numbers):
                        total[c] += select(uint32(i) < left, x[i * numbers + c], number(0))
                k = uint32(k + smaller(left, uint32(together)))
            write(total, dweight, first, uint32(step), n, wide)
            at = uint32(at + uint32(columns))

    return embedding_rows


CHUNKS = Kernel(_chunks, threads=THREADS, shipped={})
FREQUENT = Kernel(_frequent, threads=THREADS, shipped={})
ROWS = Kernel(_rows, threads=THREADS, blocks=4, shipped={})
