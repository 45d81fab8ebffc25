"""The data of the scan's benchmark on a GPU, and the calls that are timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_timing import cupy

import npmamba
from npmamba.autodiff import pullback
from npmamba.cuda import selective_scan as twin

OPTIONS = {"delta_softplus": True, "discretization": "euler", "seq_idx": None, "reverse": False, "precise": False}
L2 = 60e6
"""Bytes of the second-level cache, in which no input may wait for the next round."""
MOST_COPIES = 64


@dataclass(frozen=True)
class Case:
    """Everything on: z, D, bias and softplus.

    u, delta, z, dout: (batch, dim, seqlen); B, C: (batch, dstate, seqlen); with the channels, or states, of a step side
    by side in memory unless `c_order`. Steps follow the published initialization: the softplus of the bias is
    log-uniform from 1e-3 to 0.1, one number a channel, and delta is small noise around it.
    """

    shape: tuple[int, int, int]
    dstate: int
    arrays: dict[str, Any]
    dout: Any

    @property
    def elements(self) -> int:
        """Numbers of u."""
        return math.prod(self.shape)

    def moved(self, direction: str) -> int:
        """Return the bytes of arguments and results, which any kernel has to move once."""
        batch, _, seqlen = self.shape
        backward = direction == "backward"
        maps = 2 * batch * self.dstate * seqlen * (2 if backward else 1)
        return self.dout.itemsize * ((7 if backward else 4) * self.elements + maps)

    def forward(self, save: bool = False) -> Any:
        """Run the kernels of the forward pass: y, the last state, and what the backward pass needs."""
        return twin.forward(**self.arrays, initial_state=None, **OPTIONS, save=save)

    def backward(self, saved: Any) -> Any:
        """Run the kernels of the backward pass."""
        return twin.backward(self.dout, None, saved)

    def scan(self, *arrays: Any) -> Any:
        """Call the public operation, on `arrays` in the place of this case's."""
        return npmamba.selective_scan(*(arrays or self.arrays.values()), True)

    def recorded(self) -> Any:
        """Call the public operation with its tape: y and `pull`."""
        return pullback(self.scan, *self.arrays.values())


def draw(shape: tuple[int, int, int], dstate: int, dtype: Any, *, c_order: bool = False, seed: int | None = 0) -> Case:
    """Draw a case; without a seed its large arrays hold what was in memory."""
    batch, dim, seqlen = shape
    rng = np.random.default_rng(seed)
    if seed is not None:
        cupy.random.seed(seed)
    memory = {"dtype": dtype, "c_order": c_order, "drawn": seed is not None}
    step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), dim))
    rows, maps = (batch, seqlen, dim), (batch, seqlen, dstate)
    arrays = {
        "u": _array(rows, **memory),
        "delta": _array(rows, scale=0.3, **memory),
        "A": cupy.asarray(-np.tile(np.arange(1, dstate + 1, dtype=np.float32), (dim, 1))),
        "B": _array(maps, **memory),
        "C": _array(maps, **memory),
        "D": cupy.asarray(rng.standard_normal(dim).astype(np.float32)),
        "z": _array(rows, **memory),
        "delta_bias": cupy.asarray(np.log(np.expm1(step)).astype(np.float32)),
    }
    return Case(shape, dstate, arrays, _array(rows, **memory))


def _array(rows: tuple[int, int, int], *, dtype: Any, c_order: bool, drawn: bool, scale: float = 1.0) -> Any:
    """Return normal numbers (batch, channels, steps), bfloat16 cut off rather than rounded."""
    batch, steps, channels = rows
    shape = (batch, channels, steps) if c_order else rows
    if drawn:
        x = cupy.random.standard_normal(shape, dtype=np.float32)
        x *= np.float32(scale)
        if dtype.itemsize == 2:
            x = cupy.ascontiguousarray(x.view(np.uint16)[..., 1::2]).view(dtype)
    else:
        x = cupy.empty(shape, dtype)
    return x if c_order else x.swapaxes(1, 2)


def draw_enough(shape: tuple[int, int, int], dstate: int, dtype: Any, *, c_order: bool = False) -> list[Case]:
    """Draw as many cases of one kind as it takes to find none in the cache when its turn comes again."""
    size = 3 * math.prod(shape) * dtype.itemsize
    copies = max(1, min(MOST_COPIES, math.ceil(3 * L2 / size)))
    return [draw(shape, dstate, dtype, c_order=c_order, seed=seed) for seed in range(copies)]


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """Return a call that makes the next one of `calls` every time."""
    turns = itertools.cycle(calls)

    def call() -> None:
        next(turns)()

    return call


def calls(cases: list[Case], directions: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Return what is timed: for each direction a call that takes the cases in turn."""
    found: dict[str, Callable[[], Any]] = {}
    if "forward" in directions:
        found["forward"] = in_turn([case.forward for case in cases])
    if "forward, saving" in directions:
        found["forward, saving"] = in_turn([lambda case=case: case.forward(save=True) for case in cases])
    if "backward" in directions:
        saved = [case.forward(save=True)[2] for case in cases]
        pairs = zip(cases, saved, strict=True)
        found["backward"] = in_turn([lambda case=case, x=x: case.backward(x) for case, x in pairs])
    return found
