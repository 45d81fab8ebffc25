"""Vectors of neighbouring numbers between memory and registers: by one access of 16 bytes, or number by number.

Both ways move the same numbers for the same threads, so what is computed has the same bits. A kernel takes one of the
two at run time, by a flag that the host finds with `npmamba.cuda.rows.wide`. It branches around all that it reads at
once: across a branch no access overlaps another. Nothing is read beyond a row: an index behind its end is drawn back to
its beginning, and the caller leaves the number out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.cuda.device import load, load2, load4, load8, store, store2, store4, store8
from npmamba.scalar import select

uint32 = np.uint32


def width_of(dtype: Any) -> int:
    """Return how many numbers 16 bytes hold."""
    return 16 // np.dtype(dtype).itemsize


def _take1(numbers, k, p, j):
    numbers[k] = load(p, j)


def _take2(numbers, k, p, j):
    numbers[k], numbers[k + 1] = load2(p, j)


def _take4(numbers, k, p, j):
    numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3] = load4(p, j)


def _take8(numbers, k, p, j):
    (
        numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3],
        numbers[k + 4], numbers[k + 5], numbers[k + 6], numbers[k + 7],
    ) = load8(p, j)  # fmt: skip


def _give1(numbers, k, p, j):
    store(p, j, numbers[k])


def _give2(numbers, k, p, j):
    store2(p, j, (numbers[k], numbers[k + 1]))


def _give4(numbers, k, p, j):
    store4(p, j, (numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3]))


def _give8(numbers, k, p, j):
    low = numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3]
    store8(p, j, (*low, numbers[k + 4], numbers[k + 5], numbers[k + 6], numbers[k + 7]))


# --- one vector ---


def movers(width: int) -> tuple[Any, Any]:
    """Build ``take(numbers, k, p, j)`` and ``give(numbers, k, p, j)``: ``p[j : j + width]`` by one access."""
    return {1: (_take1, _give1), 2: (_take2, _give2), 4: (_take4, _give4), 8: (_take8, _give8)}[width]


def takers(width: int) -> tuple[Any, Any]:
    """Build ``take(numbers, k, p, j, n)`` twice, by one access and by `width`.

    They read ``p[j : j + width]`` into a local array from its k-th place on; `n` is the length of the row p.
    """
    take, _ = movers(width)

    def by_vector(numbers, k, p, j, n):
        take(numbers, k, p, select(j < n, j, uint32(0)))

    def by_number(numbers, k, p, j, n):
        for i in range(width):
            at = uint32(j + uint32(i))
            numbers[k + i] = load(p, select(at < n, at, uint32(0)))

    return by_vector, by_number


def givers(width: int) -> tuple[Any, Any]:
    """Build ``give(numbers, k, p, j, n)`` twice likewise: they write what the row has of ``p[j : j + width]``."""
    _, give = movers(width)

    def by_vector(numbers, k, p, j, n):
        if j < n:
            give(numbers, k, p, j)

    def by_number(numbers, k, p, j, n):
        for i in range(width):
            at = uint32(j + uint32(i))
            if at < n:
                store(p, at, numbers[k + i])

    return by_vector, by_number


# --- several vectors of a row ---


def place_of(width: int) -> Any:
    """Build ``place(first, step, k)``: where in the row a thread's k-th number stands, its vectors `step` apart."""

    def place(first, step, k):
        return uint32(first + uint32(uint32(k // width) * step) + uint32(k % width))

    return place


def inside_of(width: int, whole: bool) -> Any:
    """Build ``inside(first, step, k, n)``: whether a number is one of the row. `whole` vectors are or are not."""
    place, unit = place_of(width), width if whole else 1

    def inside(first, step, k, n):
        return place(first, step, k // unit * unit) < n

    return inside


def _each(one: Any, width: int, count: int) -> Any:
    place = place_of(width)

    def move(numbers, p, first, step, n):
        for k in range(0, count, width):
            one(numbers, k, p, place(first, step, k), n)

    return move


def readers(width: int, count: int) -> tuple[Any, Any]:
    """Build ``read(numbers, p, first, step, n)`` twice, by vectors and by numbers: `count` numbers of a thread."""
    by_vector, by_number = takers(width)
    return _each(by_vector, width, count), _each(by_number, width, count)


def writers(width: int, count: int) -> tuple[Any, Any]:
    """Build ``write(numbers, p, first, step, n)`` twice, by vectors and by numbers."""
    by_vector, by_number = givers(width)
    return _each(by_vector, width, count), _each(by_number, width, count)


def either(pair: tuple[Any, Any]) -> Any:
    """Build the function that takes the first of a pair of readers or writers where its last argument `wide` is set."""
    by_vectors, by_numbers = pair

    def move(numbers, p, first, step, n, wide):
        if wide:
            by_vectors(numbers, p, first, step, n)
        else:
            by_numbers(numbers, p, first, step, n)

    return move
