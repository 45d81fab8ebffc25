"""Tokens sorted by their ids, stably, on the device: a counting sort, eight bits of the id at a time.

A tile is 256 neighbouring tokens. Three kernels make a pass: each tile counts how often each of the 256 digits occurs
in it, each digit's counts are summed over the tiles before, and each token goes to its digit's place. Nothing is left
to chance: a token's rank is the number of tokens before it with its digit, counted, not drawn from an atomic counter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.arrays import empty
from npmamba.cuda.blockwise import make_block, total
from npmamba.cuda.device import Data, Long, Size, cuda, load, store
from npmamba.cuda.launch import Kernel
from npmamba.scalar import select

uint32, int32, int64 = np.uint32, np.int32, np.int64
KEY = np.dtype(np.uint32)
BITS = 8
TILE = 1 << BITS
"""Tokens of a tile, threads of a block, and digits at most."""
NONE = 2**32 - 1
WARPS = TILE // 32
STEP = 8


def _key(keys, i, vocab):
    """Return the id of the i-th token, or `vocab` where it is no row of the table."""
    key = load(keys, i)
    return uint32(select(key >= int64(0) and key < int64(vocab), key, int64(vocab)))


_, _sum_before = make_block(total, TILE)
_, _sum_before_lane = make_block(total, 32)


def _count(real):
    def token_order_count(
        keys: Long, counts: Data, n: Size, vocab: Size, tiles: Size, bins: Size, low: Size, mask: Size
    ):
        """Equation: counts[digit, tile] = number of tokens of the tile with that digit.
        Threads: a block is a tile; thread i brings the i-th token's digit and counts how often the digit i came.
        Owns: its cell of counts.
        Saved: nothing.
        """
        digits = cuda.shared.array(TILE, KEY)
        tid, tile = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        start = uint32(tile * uint32(TILE))
        filled = select(uint32(n - start) < uint32(TILE), uint32(n - start), uint32(TILE))
        digits[tid] = uint32(NONE)
        if tid < filled:
            digits[tid] = (_key(keys, uint32(start + tid), vocab) >> low) & mask
        cuda.syncthreads()
        found, at = uint32(0), uint32(0)
        while at < filled:
            for k in range(STEP):
                found = uint32(found + select(digits[uint32(at + uint32(k))] == tid, uint32(1), uint32(0)))
            at = uint32(at + uint32(STEP))
        if tid < bins:
            store(counts, uint32(uint32(tid * tiles) + tile), found)

    return token_order_count


def _sum_tiles(real):
    def token_order_sum_tiles(counts: Data, totals: Data, tiles: Size):
        """Equation: counts[digit, tile] = sum of counts[digit, k] over k < tile; totals[digit] = sum over all tiles.
        Threads: a block is a warp, owns a digit and walks along its tiles, STEP neighbouring ones to a thread.
        Owns: the digit's row of counts, and its total.
        Saved: nothing.
        """
        x, shared = cuda.local.array(STEP, KEY), cuda.shared.array(1, KEY)
        tid, digit = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        row, carried, start = uint32(digit * tiles), uint32(0), uint32(0)
        while start < tiles:
            mine = uint32(start + uint32(tid * uint32(STEP)))
            own = uint32(0)
            for k in range(STEP):
                x[k] = uint32(0)
                if uint32(mine + uint32(k)) < tiles:
                    x[k] = load(counts, uint32(row + uint32(mine + uint32(k))))
                own = uint32(own + x[k])
            before = uint32(carried + _sum_before_lane(own, shared, tid))
            for k in range(STEP):
                if uint32(mine + uint32(k)) < tiles:
                    store(counts, uint32(row + uint32(mine + uint32(k))), before)
                before = uint32(before + x[k])
            carried = uint32(cuda.shfl_sync(-1, int32(before), 31))
            start = uint32(start + uint32(32 * STEP))
        if tid == uint32(0):
            store(totals, digit, carried)

    return token_order_sum_tiles


def _move(real):
    def token_order_move(
        keys: Long, tokens: Long, counts: Data, totals: Data, new_keys: Long, new_tokens: Long,
        n: Size, vocab: Size, tiles: Size, bins: Size, low: Size, mask: Size, first: Size,
    ):  # fmt: skip
        """Equation: a token goes to (tokens with a smaller digit) + (tokens before it with its own).
        Threads: a block is a tile, a thread brings and moves one token.
        Owns: the places its tokens go to; no two tokens have the same.
        Saved: nothing.
        """
        shared = cuda.shared.array(WARPS, KEY)
        digits, starts = cuda.shared.array(TILE, KEY), cuda.shared.array(TILE, KEY)
        tid, tile = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        i, filled = uint32(uint32(tile * uint32(TILE)) + tid), uint32(n - uint32(tile * uint32(TILE)))
        filled = select(filled < uint32(TILE), filled, uint32(TILE))
        there, x, before_tile = tid < filled, uint32(0), uint32(0)
        if tid < bins:
            x, before_tile = load(totals, tid), load(counts, uint32(uint32(tid * tiles) + tile))
        starts[tid] = uint32(_sum_before(x, shared, tid) + before_tile)
        key, token, digit = uint32(0), i, uint32(NONE)
        if there:
            key = _key(keys, i, vocab)
            digit = uint32((key >> low) & mask)
            if first == uint32(0):
                token = uint32(load(tokens, i))
        digits[tid] = digit
        cuda.syncthreads()
        rank, at = uint32(0), uint32(0)
        while at < filled:
            for k in range(STEP):
                j = uint32(at + uint32(k))
                rank = uint32(rank + select(digits[j] == digit and j < tid, uint32(1), uint32(0)))
            at = uint32(at + uint32(STEP))
        if there:
            place = uint32(starts[digit] + rank)
            store(new_keys, place, int64(key))
            store(new_tokens, place, int64(token))

    return token_order_move


COUNT = Kernel(_count, threads=TILE, shipped={}, dtypes=("uint32",))
SUM_TILES = Kernel(_sum_tiles, threads=32, shipped={}, dtypes=("uint32",))
MOVE = Kernel(_move, threads=TILE, shipped={}, dtypes=("uint32",))


def token_order(ids: Any, vocab: int, bits: int = BITS) -> tuple[Any, Any]:
    """Return the ids (n,) in order, and which token each belongs to; equal ids in the order of the text.

    Parameters
    ----------
    ids : int64 array (n,), contiguous, n > 0
    vocab : int
        Ids that are not from 0 to vocab - 1 come last, as `vocab`.
    bits : int
        Bits of the id that a pass sorts by, eight at most.

    Returns
    -------
    keys, tokens : int64 arrays (n,)
    """
    n, tiles = ids.size, -(-ids.size // TILE)
    counts, totals = empty(ids, (tiles << bits,), KEY), empty(ids, (1 << bits,), KEY)
    keys, tokens = ids, None
    for low in range(0, vocab.bit_length(), bits):
        bins = min(1 << bits, (vocab >> low) + 1)
        new_keys, new_tokens = empty(ids, (n,), np.int64), empty(ids, (n,), np.int64)
        sizes = (n, vocab, tiles, bins, low, (1 << bits) - 1)
        COUNT.launch((tiles,), KEY, (keys, counts, *sizes))
        SUM_TILES.launch((bins,), KEY, (counts, totals, tiles))
        MOVE.launch((tiles,), KEY, (keys, tokens, counts, totals, new_keys, new_tokens, *sizes, int(low == 0)))
        keys, tokens = new_keys, new_tokens
    return keys, tokens
