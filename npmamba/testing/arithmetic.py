"""Numbers as a kernel computes them: the primitives of `npmamba.scalar`, Numba's libdevice and `math`, one at a time.

Python's `math` serves a single number five times as fast as NumPy's functions; float32 results are rounded from double.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


def _rounded(function: Callable[[float], float]) -> Callable[[Any], Any]:
    """Return a function of one number that keeps its type, with infinity and NaN where `math` raises errors."""

    def word(x: Any) -> Any:
        kind = np.float32 if type(x) is np.float32 else np.float64
        try:
            return kind(function(x))
        except OverflowError:
            return kind(math.inf)
        except ValueError:
            return kind(math.nan)

    return word


def _logarithm(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return _rounded(lambda x: -math.inf if x == 0 else function(x))


exp, exp2, expm1, log1p, sqrt = map(_rounded, (math.exp, math.exp2, math.expm1, math.log1p, math.sqrt))
log, log2, tanh = _logarithm(math.log), _logarithm(math.log2), _rounded(math.tanh)
_rsqrt = _rounded(lambda x: 1 / math.sqrt(x) if x else math.inf)


def cast(c: Any, x: Any) -> Any:
    return type(x)(c)


def fma(x: Any, y: Any, z: Any) -> Any:
    if type(x) is np.float32:
        return np.float32(float(x) * float(y) + float(z))  # the product is exact in double
    return x * y + z


def select(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def divide(x: Any, y: Any) -> Any:
    return x / y


def reciprocal(x: Any) -> Any:
    return type(x)(1) / x


def exp2_product(x: Any, y: Any) -> Any:
    return exp2(x * y)


def _bits(to: Any, of: Any) -> Callable[[Any], Any]:
    return lambda x: of(x).view(to)


_BOTH = {
    "exp": exp, "exp2": exp2, "expm1": expm1, "log": log, "log2": log2, "log1p": log1p, "sqrt": sqrt, "rsqrt": _rsqrt,
    "tanh": tanh, "fma": fma, "fabs": abs, "fmax": np.fmax, "fmin": np.fmin, "floor": np.floor, "ceil": np.ceil,
}  # fmt: skip
LIBDEVICE = SimpleNamespace(
    **_BOTH,
    **{f"{name}f": function for name, function in _BOTH.items()},
    fast_expf=exp,
    fast_logf=log,
    fast_log2f=log2,
    fast_fdividef=divide,
    frcp_rn=reciprocal,
    float_as_int=_bits(np.int32, np.float32),
    int_as_float=_bits(np.float32, np.int32),
    float_as_uint=_bits(np.uint32, np.float32),
    uint_as_float=_bits(np.float32, np.uint32),
)
"""Stand-ins for ``numba.cuda.libdevice``; add a function to it if you need another."""


class Math:
    """Python's `math` as Numba compiles it: float32 stays float32."""

    def __getattr__(self, name: str) -> Any:
        if name in ("pi", "e", "tau", "inf", "nan", "gcd", "floor", "ceil", "trunc"):
            return getattr(math, name)
        return _BOTH.get(name) or getattr(np, name)


MATH = Math()
