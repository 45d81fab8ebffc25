"""How the kernels of the causal convolution divide the work: grids, and the sizes that kernels are given.

All of it follows from the shape, the dtype and the kernel alone, so that sums over time have the same bits on every
device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from npmamba.cuda import conv_any
from npmamba.cuda.conv_parts import COLUMNS, GROUP, RESIDENT_BACKWARD, THREADS, UNIT, lanes_of, row_lanes

SHORTEST, LONGEST = 16, 512
"""Steps of a stretch, at least and at most."""
PROCESSORS = 132
"""Multiprocessors of the device that work is cut for (an H200); others get the same cut, so that sums have its bits."""
BEGINNING, BEGINNING_BACKWARD = 8, 12
"""What a stretch costs beside its steps, in steps: weights, and inputs before it and behind it."""
AHEAD: dict[int, int | None] = {2: None, 4: 16, 8: 16}
"""Steps of a stretch forward, by the bytes of a number; without any they are chosen as backward.

Nothing is summed over time, and short stretches cost little where twice the bytes hide what they begin with.
"""
LONGEST_AHEAD = 48
"""Steps of a stretch forward, at most: many short ones even out what blocks of a long one wait for."""
TURNS = 8
"""Pieces that a thread of `npmamba.cuda.conv_lines` takes in turn, at most."""
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


def stretches_ahead(x: Any, resident: int) -> Stretches:
    """Divide the time of `x` (batch, dim, seqlen) for the forward pass, `resident` blocks to a multiprocessor."""
    return _cut(x, AHEAD[x.dtype.itemsize] or _steps(x, PROCESSORS * resident, BEGINNING, LONGEST_AHEAD))


def stretches(x: Any) -> Stretches:
    """Divide it for the backward pass, which sums over it: the same way for every memory order."""
    return _cut(x, _steps(x, PROCESSORS * RESIDENT_BACKWARD[x.dtype.itemsize], BEGINNING_BACKWARD, LONGEST))


def _cut(x: Any, steps: int) -> Stretches:
    per_row = -(-x.shape[2] // steps)
    return Stretches(steps, per_row, x.shape[0] * per_row)


def _steps(x: Any, room: int, beginning: int, longest: int) -> int:
    """Return the steps of a stretch with which all blocks are soonest done, where `room` of them run at a time.

    Blocks run in rounds, and a last round of few blocks takes as long as a full one. Of lengths that are as good the
    longest is taken, for it reads the least twice.
    """
    (batch, _, seqlen), (columns, blocks) = x.shape, _columns(x)

    def time(steps: int) -> int:
        rounds = -(-blocks * -(-batch * -(-seqlen // steps) // (THREADS // columns)) // room)
        return rounds * (steps + beginning)

    return min(range(longest, SHORTEST - 1, -UNIT), key=time)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _columns(x: Any) -> tuple[int, int]:
    """Return how many threads of a block of `npmamba.cuda.conv_rows` lie along the channels, and how many blocks."""
    pieces = -(-x.shape[1] // row_lanes(x.dtype))
    columns = min(COLUMNS, _power_of_two(pieces))
    return columns, -(-pieces // columns)


def row_share(x: Any, cut: Stretches) -> tuple[tuple[int], tuple[int, ...]]:
    """Return the grid and the sizes for `npmamba.cuda.conv_rows`; the threads along the channels come as a shift."""
    columns, blocks = _columns(x)
    grid = (blocks * -(-cut.lines // (THREADS // columns)),)
    return grid, (*x.shape[1:], *cut, columns.bit_length() - 1, blocks)


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
