"""The primitives of `npmamba.scalar` that take a CUDA device more than one instruction, in the words of a kernel.

`npmamba.cuda.compile` puts these in the place of the primitives. Those without ``cuda`` run on NumPy numbers as well.
"""

from __future__ import annotations

from npmamba.cuda.device import cuda, rcp
from npmamba.scalar import cast, exp2, fma, select

LOG2E, LOG2E_LOW = 1.4426950216293335, 1.9259629911266175e-08  # their sum is log2(e); the first one is a float32


# --- float32 ---


def exp_float32(x):
    """2^(x log2 e) with the product in two parts: its rounding would cost 1e-5 at x = 80."""
    high = x * cast(LOG2E, x)
    low = fma(x, cast(LOG2E_LOW, x), fma(x, cast(LOG2E, x), -high))
    power = exp2(high)
    low = select(low == low, low, cast(0, x))  # at x = +-inf
    return power * fma(low, cast(0.6931471805599453, x), cast(1, x))


def expm1_float32(x):
    """As libdevice has it."""
    return cuda.libdevice.expm1f(x)


def divide_float32(x, y):
    """A product with the reciprocal: two units in the last place, in two instructions instead of eight."""
    return x * rcp(y)


def magnitude_float32(x):
    """One bit cleared."""
    return cuda.libdevice.fabsf(x)


def exp2_product(x, y):
    """The product is rounded; it costs nothing where the device multiplies and adds."""
    return exp2(x * y)


def is_not_double(x):
    """Known when a kernel is compiled: what is meant for float64 vanishes."""
    return False


# --- float64, for which libdevice has everything ---


def is_double(x):
    """Known when a kernel is compiled."""
    return True


def exp2_float64(x):
    """As libdevice has it."""
    return cuda.libdevice.exp2(x)


def exp_float64(x):
    """As libdevice has it."""
    return cuda.libdevice.exp(x)


def expm1_float64(x):
    """As libdevice has it."""
    return cuda.libdevice.expm1(x)


def log1p_float64(x):
    """As libdevice has it."""
    return cuda.libdevice.log1p(x)


def sqrt_float64(x):
    """As libdevice has it."""
    return cuda.libdevice.sqrt(x)


def rcp_float64(x):
    """Rounded once."""
    return cast(1, x) / x


def divide_float64(x, y):
    """Rounded once."""
    return x / y


def magnitude_float64(x):
    """One bit cleared."""
    return cuda.libdevice.fabs(x)
