"""How the kernels of the causal convolution divide the work: grids, and the sizes that kernels are given.

All of it follows from the shape and the dtype alone, so that sums over time have the same bits on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from npmamba.cuda import conv_any
from npmamba.cuda.conv_parts import COLUMNS, GROUP, THREADS, lanes_of, row_lanes

STRETCH, SHORTEST, LONGEST = 64, 16, 512
"""Steps of a stretch backward where there is neither little work nor very much, and its bounds."""
AHEAD = {2: 32, 4: 16, 8: 16}
"""Steps of a stretch forward, by the bytes of a number: nothing is summed over time, so that short ones cost little."""
TURNS = 8
"""Pieces that a thread of `npmamba.cuda.conv_lines` takes in turn, at most."""
FEW, PLENTY = 2**15, 2**18
"""Threads of a backward pass, below which each is given half as much to do, and from which on twice as much."""
ENOUGH = 2**16
"""Threads of `npmamba.cuda.conv_lines`, below which each is given half as much to do."""


class Stretches(NamedTuple):
    """How time is divided where a thread walks through it."""

    steps: int
    per_row: int
    lines: int
    """Stretches of all batch rows."""

    @property
    def parts(self) -> int:
        """Parts of dweight that are added in the second stage."""
        return -(-self.lines // GROUP)


def stretches_ahead(x: Any) -> Stretches:
    """Divide the time of `x` (batch, dim, seqlen) for the forward pass."""
    steps = AHEAD[x.dtype.itemsize]
    per_row = -(-x.shape[2] // steps)
    return Stretches(steps, per_row, x.shape[0] * per_row)


def stretches(x: Any) -> Stretches:
    """Divide it for the backward pass, which sums over it: the same way for every memory order."""
    (batch, dim, seqlen), steps = x.shape, STRETCH
    across = batch * -(-dim // row_lanes(x.dtype))
    while across * -(-seqlen // steps) < FEW and steps > SHORTEST:
        steps //= 2
    while across * -(-seqlen // steps) >= PLENTY and steps < LONGEST:
        steps *= 2
    per_row = -(-seqlen // steps)
    return Stretches(steps, per_row, batch * per_row)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_share(x: Any, cut: Stretches) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the grid and the sizes for `npmamba.cuda.conv_rows`."""
    _, dim, seqlen = x.shape
    pieces = -(-dim // row_lanes(x.dtype))
    columns = min(COLUMNS, _power_of_two(pieces))
    blocks = -(-pieces // columns)
    grid = (blocks * -(-cut.lines // (THREADS // columns)),)
    return grid, (dim, seqlen, *cut, columns, blocks)


def line_share(x: Any) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the grid and the sizes for `npmamba.cuda.conv_lines`; the last size is the number of tiles of a row."""
    (batch, dim, seqlen), turns = x.shape, TURNS
    pieces, rows = seqlen // lanes_of(x.dtype), batch * dim
    near_bits = min(THREADS, _power_of_two(pieces)).bit_length() - 1
    near = 1 << near_bits
    while rows * near * -(-pieces // (near * turns)) < ENOUGH and turns > 1:
        turns //= 2
    tiles = -(-pieces // (near * turns))
    return (-(-rows * tiles // (THREADS // near)),), (dim, pieces, near_bits, near * turns, rows, tiles)


def line_share_backward(x: Any, width: int) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the grid and the sizes for the backward kernel of `npmamba.cuda.conv_lines`.

    Where a row is longer than a warp, the last lanes of a warp compute again what the first ones of the next compute.
    """
    (batch, dim, seqlen), turns, size = x.shape, TURNS, lanes_of(x.dtype)
    pieces, rows, helpers = seqlen // size, batch * dim, -(-(width - 1) // size)
    chunks = 1 if pieces <= 32 else -(-pieces // (32 - helpers))
    near, owned = (_power_of_two(pieces),) * 2 if chunks == 1 else (32, -(-pieces // chunks))
    while rows * near * -(-chunks // turns) < ENOUGH and turns > 1:
        turns //= 2
    turns = min(turns, chunks)
    tiles = -(-chunks // turns)
    return (-(-rows * tiles // (THREADS // near)),), (dim, pieces, near.bit_length() - 1, owned, turns, rows, tiles)


def any_share(x: Any, count: int) -> tuple[tuple[int], int]:
    """Return the grid for `npmamba.cuda.conv_any` over `count` numbers a channel, and whether it runs along time."""
    batch, dim, _ = x.shape
    along_time = abs(x.strides[2]) <= abs(x.strides[1])
    length, other = (count, dim) if along_time else (dim, count)
    return (batch * other * -(-length // conv_any.THREADS),), int(along_time)
