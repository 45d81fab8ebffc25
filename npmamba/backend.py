"""Which array library, and which kernels: decided by the arrays themselves.

There is no global switch and no ``device=``: NumPy arrays go to the Numba kernels of ``npmamba.cpu``,
CuPy arrays to the Numba CUDA kernels of ``npmamba.cuda``. CuPy is never imported here: an array of its
can only exist if its owner imported it.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


def is_array(x: Any) -> bool:
    """Tell whether `x` is a NumPy or CuPy array; masked arrays, scalars and matrices, whose axes stay two, are none."""
    if isinstance(x, np.ndarray):
        return not isinstance(x, np.ma.MaskedArray | np.matrix)
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def array_module(op: str, **arrays: Any) -> ModuleType:
    """Return ``numpy`` or ``cupy``, the library that all `arrays` belong to.

    Parameters
    ----------
    op : str
        The operation that asks, named in the error.
    **arrays
        Arguments by name; those that are None are left out.

    Raises
    ------
    TypeError
        If an argument is no array, or if NumPy and CuPy arrays are mixed. Both culprits are named.
    ValueError
        If CuPy arrays are on two GPUs, or on one that is not the current one, where nothing could be launched.
    """
    kinds = {type(x) for x in arrays.values() if x is not None}
    if len(kinds) == 1 and np.ndarray in kinds:
        return np
    first: tuple[str, str] | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        if not is_array(x):
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {type(x).__name__}")
        library = "numpy" if isinstance(x, np.ndarray) else "cupy"
        if first is None:
            first = (name, library)
        elif first[1] != library:
            raise TypeError(
                f"{op}: {first[0]} is a {first[1]} array, but {name} is a {library} array; "
                "move them to one device first"
            )
    if first is None or first[1] == "numpy":
        return np
    _check_devices(op, arrays)
    return sys.modules["cupy"]


def _check_devices(op: str, arrays: dict[str, Any]) -> None:
    """Raise ValueError unless all CuPy arrays are on the current GPU; costs a fraction of a microsecond an array."""
    current = sys.modules["cupy"].cuda.runtime.getDevice()
    for name, x in arrays.items():
        if x is not None and x.data.device_id != current:
            places = {other: y.data.device_id for other, y in arrays.items() if y is not None}
            other = next((other for other, place in places.items() if place != places[name]), None)
            if other is not None:
                raise ValueError(
                    f"{op}: {name} is on GPU {places[name]}, but {other} is on GPU {places[other]}; "
                    "move them to one GPU first"
                )
            raise ValueError(
                f"{op}: {name} is on GPU {places[name]}, but the current GPU is {current}; "
                f"call it inside `with cupy.cuda.Device({places[name]}):`"
            )


def on_host(x: Any) -> Any:
    """Return a CuPy array as a NumPy array, which waits for the GPU; anything else as it is."""
    return x.get() if is_array(x) and not isinstance(x, np.ndarray) else x


def beside(op: str, array: Any, x: Any) -> Any:
    """Return `x`, a NumPy or CuPy array, in the library of `array`. A copy to the GPU is not waited for."""
    if array_module(op, array=array) is np:
        return on_host(x)
    return sys.modules["cupy"].asarray(x)


@cache
def _load(package: str, op: str) -> ModuleType:
    return importlib.import_module(f"npmamba.{package}.{op}")


def twin(op: str, array: Any) -> ModuleType:
    """Return the module that computes `op` for arrays like `array`: ``npmamba.cpu.<op>`` or ``npmamba.cuda.<op>``.

    Raises
    ------
    TypeError
        If `array` is a CuPy array and this release has no CUDA twin for `op`.
    """
    if isinstance(array, np.ndarray):
        return _load("cpu", op)
    try:
        return _load("cuda", op)
    except ModuleNotFoundError as error:
        if error.name != f"npmamba.cuda.{op}":
            raise
        raise TypeError(
            f"{op}: this release has no CUDA kernels for it; call it with NumPy arrays (cupy.asnumpy)"
        ) from None


def forward(op: str, check: Any, arguments: tuple[Any, ...], options: dict[str, Any], *, save: bool) -> Any:
    """Check the arguments of an operation with ``check(op, *arguments, **options)`` and return what its twin returns.

    A CUDA twin that was called so before, with arrays of such shapes, strides, dtypes and places, needs no second
    check: that takes longer than a GPU needs for a small scan.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None and type(arguments[0]) is cupy.ndarray:
        again = getattr(twin(op, arguments[0]).forward, "again", None)
        results = again and again(arguments, {**options, "save": save})
        if results is not None:
            return results
    check(op, *arguments, **options)
    return twin(op, arguments[0]).forward(*arguments, **options, save=save)
