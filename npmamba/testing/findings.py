"""What the kernel interpreter finds: one exception per kind of mistake, with everyone's thread and line."""

from __future__ import annotations

import linecache
import pathlib
import sys
import types
from typing import Any, NamedTuple

_HIDDEN = (
    str(pathlib.Path(__file__).parent),
    str(pathlib.Path(__file__).parent.parent / "cuda" / "device.py"),
)


class Party(NamedTuple):
    """One who takes part in a finding: a thread, its block, and the kernel's line it is at."""

    thread: tuple[int, int, int]
    block: tuple[int, int, int]
    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{called(self.thread, self.block)} at {pathlib.Path(self.file).name}:{self.line} `{text}`"


def called(thread: tuple[int, int, int], block: tuple[int, int, int]) -> str:
    """Return what messages call a thread: by one number each where the others are zero."""
    short = (str(q[0]) if not any(q[1:]) else str(tuple(q)) for q in (thread, block))
    return "thread {} of block {}".format(*short)


class KernelError(RuntimeError):
    """A mistake of a kernel.

    Attributes
    ----------
    array : str or None
        The argument or shared array it is about.
    index : int or tuple of int or None
        The element, counted from the array's first.
    parties : tuple of Party
        First the thread that was running, then the other one, if there is one.
    """

    def __init__(
        self, message: str, array: str | None = None, index: Any = None, parties: tuple[Party, ...] = ()
    ) -> None:
        super().__init__(message)
        self.array, self.index, self.parties = array, index, parties


class OutOfRangeError(KernelError, IndexError):
    """An access outside an array's elements, or through a pointer that is None."""


class MisalignedAccessError(KernelError):
    """A vector access to an address that is no multiple of the vector's size."""


class UninitializedReadError(KernelError):
    """A read of memory that nobody has written."""


class RaceError(KernelError):
    """Two threads touch an element with nothing that orders them, and one of them writes."""


class DivergentBarrierError(KernelError):
    """Some threads wait at a barrier or a shuffle that others never reach."""


class ShuffleError(KernelError):
    """A shuffle whose mask leaves out the calling lane or the lane it reads from."""


def line_of(code: types.CodeType, instruction: int) -> int:
    """Return the line of an instruction, given by its offset as in ``frame.f_lasti``."""
    for k, position in enumerate(code.co_positions()):
        if k == instruction // 2:
            return position[0] or code.co_firstlineno
    return code.co_firstlineno


def party(thread: Any, code: types.CodeType | None = None, instruction: int = 0) -> Party:
    """Return a thread as a `Party`, at an instruction of the kernel or at the line that is running now."""
    if code is None:
        frame: Any = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_HIDDEN):
            frame = frame.f_back
        code, instruction = frame.f_code, frame.f_lasti
    block = thread.block.index
    return Party(tuple(thread.index), tuple(block), code.co_filename, line_of(code, instruction))
