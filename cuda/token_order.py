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


def _peers(digit, there):
    """Return which lanes of the warp have a token of the same digit, as bits: one ballot for each bit of a digit."""
    peers = uint32(cuda.ballot_sync(-1, there))
    for bit in range(BITS):
        mine = (digit >> uint32(bit)) & uint32(1) != uint32(0)
        votes = uint32(cuda.ballot_sync(-1, mine))
        peers = uint32(peers & select(mine, votes, uint32(votes ^ uint32(NONE))))
    return peers


def _tally(tallies, digit, there, tid):
    """Count each warp's tokens of each digit in `tallies`, for all to see; return the token's rank in its warp."""
    for warp in range(WARPS):
        tallies[uint32(uint32(warp * TILE) + tid)] = uint32(0)
    peers = _peers(digit, there)
    rank = uint32(cuda.popc(peers & uint32(uint32(uint32(1) << (tid & uint32(31))) - uint32(1))))
    cuda.syncthreads()
    if there and rank == uint32(0):
        tallies[uint32(uint32((tid >> uint32(5)) * uint32(TILE)) + digit)] = uint32(cuda.popc(peers))
    cuda.syncthreads()
    return rank


def _count(real):
    cells = WARPS * TILE

    def token_order_count(
        keys: Long, counts: Data, n: Size, vocab: Size, tiles: Size, bins: Size, low: Size, mask: Size
    ):
        """Equation: counts[digit, tile] = number of tokens of the tile with that digit.
        Threads: a block is a tile; thread i brings the i-th token's digit, and adds up the warps' counts of digit i.
        Owns: its cell of counts.
        Saved: nothing.
        """
        tallies = cuda.shared.array(cells, KEY)
        tid, tile = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        i = uint32(uint32(tile * uint32(TILE)) + tid)
        digit = uint32((_key(keys, select(i < n, i, uint32(0)), vocab) >> low) & mask)
        _tally(tallies, digit, i < n, tid)
        if tid < bins:
            found = uint32(0)
            for warp in range(WARPS):
                found = uint32(found + tallies[uint32(uint32(warp * TILE) + tid)])
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
    cells = WARPS * TILE

    def token_order_move(
        keys: Long, tokens: Long, counts: Data, totals: Data, new_keys: Long, new_tokens: Long,
        n: Size, vocab: Size, tiles: Size, bins: Size, low: Size, mask: Size, first: Size,
    ):  # fmt: skip
        """Equation: a token goes to (tokens with a smaller digit) + (tokens before it with its own).
        Threads: a block is a tile, a thread brings and moves one token.
        Owns: the places its tokens go to; no two tokens have the same.
        Saved: nothing.
        """
        tallies, shared = cuda.shared.array(cells, KEY), cuda.shared.array(WARPS, KEY)
        starts = cuda.shared.array(TILE, KEY)
        tid, tile = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        i, x, before_tile = uint32(uint32(tile * uint32(TILE)) + tid), uint32(0), uint32(0)
        there = i < n
        i = select(there, i, uint32(0))
        key, token = _key(keys, i, vocab), i
        if first == uint32(0):
            token = uint32(load(tokens, i))
        if tid < bins:
            x, before_tile = load(totals, tid), load(counts, uint32(uint32(tid * tiles) + tile))
        starts[tid] = uint32(_sum_before(x, shared, tid) + before_tile)
        digit = uint32((key >> low) & mask)
        rank = _tally(tallies, digit, there, tid)
        if there:
            place = uint32(starts[digit] + rank)
            for warp in range(WARPS):
                if uint32(warp) < tid >> uint32(5):
                    place = uint32(place + tallies[uint32(uint32(warp * TILE) + digit)])
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
