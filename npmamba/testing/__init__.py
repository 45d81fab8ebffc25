"""Tests of kernels, yours or ours: what holds for every scan, convolution and step, and who breaks it.

`check_scan`, `check_conv1d` and `check_state_update` try to break a kernel and report how hard they tried (`Report`),
or raise the smallest case that breaks it (`Counterexample`). `check_vjp` asks a differentiable function whether its
gradients are the transpose of its derivative. `npmamba.testing.interpret` runs CUDA kernels with no device, and finds
their races.

>>> import numpy as np
>>> import npmamba
>>> from npmamba.testing import check_state_update, check_vjp
>>> check_state_update(npmamba.selective_state_update, max_examples=5, seed=0, max_size=300).examples
5
>>> one = np.ones((1, 2, 3))
>>> check_vjp(lambda u: npmamba.selective_scan(u, one, -one[0, :, :1], one[:, :1], one[:, :1]), 2 * one)
"""

from __future__ import annotations

import importlib
from typing import Any

_VERDICT = ("Counterexample", "Report", "check_conv1d", "check_scan", "check_state_update")
_WHERE = {"check_vjp": "npmamba.autodiff.check"} | dict.fromkeys(_VERDICT, "npmamba.testing.verdict")
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
