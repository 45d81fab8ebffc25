"""In which order the CPU kernels walk through time, and how they divide the channels.

`schedule` turns ``reverse`` and ``seq_idx`` into a list of steps, so that the kernels know neither.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """The walk through time, one row per batch row or a single row for all.

    Attributes
    ----------
    order : int64 array (rows, seqlen)
        Position in time of each step of the scan; padding is left out.
    fresh : int64 array (rows, seqlen)
        1 where a step begins a new sequence and finds an empty state; 0 at the first step of all.
    steps : int64 array (rows,)
        Number of steps of each row.
    """

    order: np.ndarray
    fresh: np.ndarray
    steps: np.ndarray


def schedule(seqlen: int, seq_idx: np.ndarray | None, reverse: bool) -> Schedule:
    """Return the walk through `seqlen` positions.

    Negative entries of `seq_idx` (batch, seqlen) are padding. A run begins where the index differs from that of the
    last step that was not padding.
    """
    if seq_idx is None:
        return _every_step(seqlen, reverse)
    order = np.zeros(seq_idx.shape, np.int64)
    fresh = np.zeros(seq_idx.shape, np.int64)
    steps = np.zeros(seq_idx.shape[0], np.int64)
    for b, index in enumerate(seq_idx):
        valid = np.flatnonzero(index >= 0)[:: -1 if reverse else 1]
        steps[b] = valid.size
        order[b, : valid.size] = valid
        fresh[b, 1 : valid.size] = index[valid[1:]] != index[valid[:-1]]
    return Schedule(order, fresh, steps)


@functools.lru_cache(maxsize=4)
def _every_step(seqlen: int, reverse: bool) -> Schedule:
    order, steps = np.arange(seqlen)[None, :: -1 if reverse else 1], np.array([seqlen])
    for kept in (order, steps):  # it is shared by all later calls
        kept.setflags(write=False)
    return Schedule(order, np.broadcast_to(np.int64(0), (1, seqlen)), steps)


@functools.lru_cache(maxsize=16)
def channel_blocks(dim: int, groups: int, size: int) -> np.ndarray:
    """Divide `dim` channels into blocks of at most `size`, none of which crosses a border between groups.

    Returns
    -------
    int64 array (blocks, 3)
        First channel, end, and group of each block.
    """
    share = dim // groups
    blocks = [
        (group * share + d, group * share + min(d + size, share), group)
        for group in range(groups)
        for d in range(0, share, size)
    ]
    table = np.array(blocks, np.int64).reshape(-1, 3)
    table.setflags(write=False)
    return table
