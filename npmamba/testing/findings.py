"""What the kernel interpreter finds: one exception per kind of mistake."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A mistake of a kernel; the message names the thread, the argument and the line."""


class OutOfRangeError(KernelError, IndexError):
    """An access outside an argument's elements, or through a pointer that is None."""


class MisalignedAccessError(KernelError):
    """A vector access to an address that is no multiple of the vector's size."""


class UninitializedReadError(KernelError):
    """A read of memory that nobody has written."""


class RaceError(KernelError):
    """Two threads touch a cell with nothing that orders them, and one of them writes."""


class DivergentBarrierError(KernelError):
    """Some threads wait at a barrier or a shuffle that others never reach."""


class ShuffleError(KernelError):
    """A shuffle whose mask leaves out the calling lane, or the lane it reads from."""
