"""Arrays without memory, on which `npmamba.cuda.replay` runs the host code of a CUDA twin to see what it does."""

from __future__ import annotations

from typing import Any

import numpy as np

ALIGNMENT = 16
"""The bytes of the widest access: a stand-in's address is that of its array modulo this."""


class NotReplayable(Exception):
    """The host code asked a stand-in for what only an array has, such as its numbers or a copy."""


class _Span:
    """Addresses that look like an array's to NumPy."""

    def __init__(self, address: int, shape: Any, strides: Any, itemsize: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
            "version": 3,
        }


class StandIn:
    """The shape, strides, dtype and place of an array, and the views that can be taken of it.

    The arithmetic of views is NumPy's, on addresses that nobody reads.

    Parameters
    ----------
    library : npmamba.cuda.replay.Trace
        Where the host code finds `empty` and the like.
    source : int
        Number of the argument or allocation whose memory this is.
    shape, strides, dtype, address, device_id
        Of the array; only the remainder of `address` modulo `ALIGNMENT` tells.

    Examples
    --------
    >>> x = StandIn(None, 0, (4, 3), (48, 4), np.float32, address=16)
    >>> x.strides, x[1:, ::-1].strides, x[1:].offset
    ((48, 4), (48, -4), 48)
    """

    __slots__ = ("_origin", "_view", "device_id", "library", "source")

    def __init__(
        self, library: Any, source: int, shape: Any, strides: Any, dtype: Any, address: int = 0, device_id: int = 0
    ) -> None:
        dtype = np.dtype(dtype)
        self.library, self.source, self.device_id = library, source, device_id
        self._origin = (source + 1 << 48) + address % ALIGNMENT
        self._view = np.asarray(_Span(self._origin, shape, strides, dtype.itemsize)).view(dtype)

    shape = property(lambda self: self._view.shape)
    strides = property(lambda self: self._view.strides)
    dtype = property(lambda self: self._view.dtype)
    ndim = property(lambda self: self._view.ndim)
    size = property(lambda self: self._view.size)
    itemsize = property(lambda self: self._view.itemsize)
    nbytes = property(lambda self: self._view.nbytes)
    flags = property(lambda self: self._view.flags)
    data = property(lambda self: self)
    """What tells the device, as with CuPy's arrays."""

    @property
    def ptr(self) -> int:
        """An address with the right remainder."""
        return self._view.__array_interface__["data"][0]

    @property
    def offset(self) -> int:
        """Bytes from where the source begins."""
        return self.ptr - self._origin

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: Any) -> StandIn:
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis not in index:
            index += (Ellipsis,)  # so that NumPy returns an array, and reads no number
        return self._with(self._view[index])

    def swapaxes(self, first: int, second: int) -> StandIn:
        return self._with(self._view.swapaxes(first, second))

    def reshape(self, *shape: Any) -> StandIn:
        if not self._view.flags.c_contiguous:  # NumPy might have to copy
            raise NotReplayable("reshape")
        return self._with(self._view.reshape(*shape))

    def astype(self, dtype: Any, copy: bool = True) -> StandIn:
        if copy or dtype != self.dtype:
            raise NotReplayable("astype")
        return self

    def _with(self, view: np.ndarray) -> StandIn:
        new = object.__new__(StandIn)
        new.library, new.source, new.device_id = self.library, self.source, self.device_id
        new._origin, new._view = self._origin, view
        return new

    def __getattr__(self, name: str) -> Any:
        raise NotReplayable(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotReplayable("assignment")
