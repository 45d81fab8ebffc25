"""What stands for `cuda`, for libdevice and for the primitives of `npmamba.scalar` while a kernel is interpreted."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from greenlet import getcurrent

from npmamba import scalar
from npmamba.cuda import device
from npmamba.testing import memory

FULL = 0xFFFFFFFF


def dtype_of(x: Any) -> np.dtype:
    """Return a NumPy dtype for a NumPy or Numba type."""
    return np.dtype(x) if isinstance(x, (np.dtype, type)) else np.dtype(str(x))


class _Shared:
    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> memory.Array:
        thread: Any = getcurrent()
        return thread.block.shared_array(thread, shape, dtype_of(dtype), alignment)


class _Local:
    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> memory.Local:
        return memory.Local(
            tuple(shape) if isinstance(shape, (tuple, list)) else (int(shape),), dtype_of(dtype)
        )


def _shuffle(source: Any) -> Any:
    def shuffle(self: Any, mask: Any, value: Any, n: Any) -> Any:
        thread: Any = getcurrent()
        return thread.meet("shuffle", int(mask) & FULL, value, source(thread.lane, int(n)))

    return shuffle


class Cuda:
    """The names a kernel finds under ``cuda``."""

    warpsize = 32
    threadIdx = property(lambda self: getcurrent().index)  # type: ignore[attr-defined]
    laneid = property(lambda self: getcurrent().lane)  # type: ignore[attr-defined]
    blockIdx = property(lambda self: getcurrent().block.index)  # type: ignore[attr-defined]
    blockDim = property(lambda self: getcurrent().block.threads)  # type: ignore[attr-defined]
    gridDim = property(lambda self: getcurrent().block.grid)  # type: ignore[attr-defined]
    shared, local = _Shared(), _Local()
    shfl_sync = _shuffle(lambda lane, n: n & 31)
    shfl_xor_sync = _shuffle(lambda lane, n: lane ^ n)
    shfl_up_sync = _shuffle(lambda lane, n: lane - n if lane >= n else lane)
    shfl_down_sync = _shuffle(lambda lane, n: lane + n if lane + n < 32 else lane)

    def grid(self, ndim: int) -> Any:
        at, block, threads = self.threadIdx, self.blockIdx, self.blockDim
        all_ = [getattr(block, q) * getattr(threads, q) + getattr(at, q) for q in "xyz"]
        return all_[0] if ndim == 1 else tuple(all_[:ndim])

    def gridsize(self, ndim: int) -> Any:
        all_ = [getattr(self.gridDim, q) * getattr(self.blockDim, q) for q in "xyz"]
        return all_[0] if ndim == 1 else tuple(all_[:ndim])

    def syncthreads(self) -> None:
        getcurrent().meet("barrier")  # type: ignore[attr-defined]

    def syncwarp(self, mask: Any = FULL) -> None:
        getcurrent().meet("syncwarp", int(mask) & FULL)  # type: ignore[attr-defined]

    def ballot_sync(self, mask: Any, predicate: Any) -> Any:
        said = getcurrent().meet("vote", int(mask) & FULL, bool(predicate))  # type: ignore[attr-defined]
        return np.uint32(sum(1 << lane for lane, yes in said.items() if yes))

    def any_sync(self, mask: Any, predicate: Any) -> Any:
        return any(getcurrent().meet("vote", int(mask) & FULL, bool(predicate)).values())  # type: ignore[attr-defined]

    def all_sync(self, mask: Any, predicate: Any) -> Any:
        return all(getcurrent().meet("vote", int(mask) & FULL, bool(predicate)).values())  # type: ignore[attr-defined]

    def popc(self, x: Any) -> Any:
        return int(x).bit_count()

    def ffs(self, x: Any) -> Any:
        return (int(x) & -int(x)).bit_length()

    def clz(self, x: Any) -> Any:
        return 32 - (int(x) & FULL).bit_length()

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return fma(x, y, z)

    def selp(self, condition: Any, x: Any, y: Any) -> Any:
        return x if condition else y

    def threadfence(self) -> None:
        """Orders memory; blocks run one after another here."""

    threadfence_block = threadfence


# --- numbers, one at a time: math is five times as fast as NumPy's functions ---


def _number(function: Any) -> Any:
    def word(x: Any) -> Any:
        kind = np.float64 if type(x) is np.float64 else np.float32
        try:
            return kind(function(x))
        except OverflowError:
            return kind(math.inf)
        except ValueError:
            return kind(math.nan)

    return word


def cast(c: Any, x: Any) -> Any:
    return type(x)(c)


def fma(x: Any, y: Any, z: Any) -> Any:
    if type(x) is np.float32:
        return np.float32(float(x) * float(y) + float(z))
    return x * y + z


def select(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


exp2, exp, expm1, log1p, sqrt = map(_number, (math.exp2, math.exp, math.expm1, math.log1p, math.sqrt))


def _log(function: Any) -> Any:
    return _number(lambda x: function(x) if x > 0 else (-math.inf if x == 0 else math.nan))


class Libdevice:
    """Stand-ins for the functions of libdevice, by name."""

    exp2f, expf, expm1f, log1pf = map(staticmethod, (exp2, exp, expm1, log1p))
    exp2, exp, expm1, log1p = exp2f, expf, expm1f, log1pf
    logf = log = fast_logf = staticmethod(_log(math.log))
    log2f = log2 = fast_log2f = staticmethod(_log(math.log2))
    fast_expf, sqrtf, sqrt = expf, staticmethod(sqrt), staticmethod(sqrt)
    tanhf = tanh = staticmethod(_number(math.tanh))
    rsqrtf = rsqrt = staticmethod(_number(lambda x: 1 / math.sqrt(x) if x else math.inf))
    fmaf = fma = fmaf_rn = staticmethod(fma)
    fabsf = fabs = staticmethod(abs)
    fmaxf = fmax = staticmethod(np.fmax)
    fminf = fmin = staticmethod(np.fmin)

    @staticmethod
    def fast_fdividef(x: Any, y: Any) -> Any:
        return np.float32(x) / np.float32(y)

    @staticmethod
    def float_as_int(x: Any) -> Any:
        return np.int32(struct.unpack("i", struct.pack("f", x))[0])

    @staticmethod
    def int_as_float(x: Any) -> Any:
        return np.float32(struct.unpack("f", struct.pack("i", x))[0])

    float_as_uint = staticmethod(lambda x: np.float32(x).view(np.uint32))
    uint_as_float = staticmethod(lambda x: np.uint32(x).view(np.float32))
    frcp_rn = frcp_rd = staticmethod(lambda x: np.float32(1) / np.float32(x))


class Math:
    """Python's `math` as Numba compiles it: a float32 stays one."""

    exp, exp2, expm1, log1p, sqrt = (
        Libdevice.exp,
        Libdevice.exp2,
        Libdevice.expm1,
        Libdevice.log1p,
        Libdevice.sqrt,
    )
    log, log2 = Libdevice.log, Libdevice.log2

    def __getattr__(self, name: str) -> Any:
        if name in ("floor", "ceil", "pi", "e", "inf", "nan", "gcd"):
            return getattr(math, name)
        return getattr(np, name)


class _Libdevice(Libdevice):
    pass


CUDA, LIBDEVICE, MATH = Cuda(), _Libdevice(), Math()
Cuda.libdevice = LIBDEVICE  # type: ignore[attr-defined]


def commit_async() -> None:
    pass


def wait_async(pending: int) -> None:
    pass


STAND_INS: dict[Any, Any] = {
    device.load: memory.load,
    device.store: memory.store,
    device.load2: memory.vector_load(2),
    device.load4: memory.vector_load(4),
    device.load8: memory.vector_load(8),
    device.store2: memory.vector_store(2),
    device.store4: memory.vector_store(4),
    device.store8: memory.vector_store(8),
    device.copy_async: memory.copy_async,
    device.commit_async: commit_async,
    device.wait_async: wait_async,
    scalar.cast: cast,
    scalar.fma: fma,
    scalar.select: select,
    scalar.exp2: exp2,
    scalar.exp2_product: lambda x, y: exp2(x * y),
    scalar.exp2_product_small: lambda x, y: exp2(x * y),
    scalar.exp: exp,
    scalar.expm1: expm1,
    scalar.log1p: log1p,
    scalar.sqrt: sqrt,
    scalar.magnitude: abs,
    device.rcp: lambda x: type(x)(1) / x,
}
"""What a function is replaced by while kernels are interpreted; add a stand-in for an intrinsic of your own here."""
