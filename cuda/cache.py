"""Machine code of CUDA kernels on disk: a file for each kernel, dtype, constants and architecture.

The folder's name is a hash of what compiles kernels: the sources of the compiler and the versions of all it calls. A
file's name ends in a hash of what is compiled: the kernel, every function it calls and every number they see. So stale
code cannot be found, and an edited kernel is the only one that is compiled again. A damaged file counts as absent, a
folder that cannot be written costs the compilation again, nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from npmamba import cache
from npmamba.cuda import device, requirements

log = logging.getLogger("npmamba")
SOURCES = ("compile.py", "device.py", "intrinsics.py", "primitives.py", "translate.py")
PACKAGES = (
    "numba-cuda", "numba", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink",
    "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12",
)  # fmt: skip


@functools.cache
def folder() -> pathlib.Path:
    """Return the folder for what today's compiler makes."""
    here = pathlib.Path(__file__).resolve().parent
    versions = " ".join(f"{name} {requirements.version(name)}" for name in PACKAGES)
    return cache.folder("cuda", versions, (here / name for name in SOURCES))


def file_name(name: str, function: Any, *more: Any) -> str:
    """Return the name of the file for a kernel; `more` is what else decides on its machine code."""
    digest = hashlib.sha256()
    for part in _parts([function, *more], set()):
        digest.update(part.encode() + b"\0")
    stem = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
    return f"{stem[:120]}-{digest.hexdigest()[:20]}"


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield everything of `value` that the compiler could see, except comments, lines and places.

    An object that cannot be told from others like it is another one in every process, so its kernel is never found.
    """
    if isinstance(value, types.FunctionType):
        if id(value) not in seen:
            seen.add(id(value))
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield from _parts([value.__annotations__, value.__defaults__, cells], seen)
            yield from _parts_of_code(value.__code__, value.__globals__, seen)
    elif isinstance(value, list | tuple | dict):
        yield f"{type(value).__qualname__} of {len(value)}"
        for item in value.items() if isinstance(value, dict) else value:
            yield from _parts(item, seen)
    elif isinstance(value, types.ModuleType | type):
        yield f"{getattr(value, '__module__', '')} {value.__name__}"
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    elif isinstance(value, np.dtype):
        yield f"dtype {value}"
    else:
        yield "cuda" if value is device.cuda else f"{type(value).__qualname__} {value!r}"


def _parts_of_code(code: types.CodeType, known: dict[str, Any], seen: set[int]) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_argcount}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts_of_code(constant, known, seen)
        else:
            yield from _parts(constant, seen)
    for name in code.co_names:
        if name in known:
            yield from _parts([name, known[name]], seen)


def read(name: str) -> tuple[str, bytes] | None:
    """Return the entry point's name and the machine code kept under `name`, or None."""
    try:
        if not cache.is_private(folder()):
            return None
        entry, code = cache.opened((folder() / name).read_bytes()).split(b"\0", 1)
    except OSError:
        return None
    except ValueError as error:
        log.warning("cached kernel %s is damaged and will be compiled again (%s)", name, error)
        return None
    return entry.decode(), code


def write(name: str, entry: str, code: bytes) -> None:
    """Keep machine code under `name`, if the folder can be written; readers see the old file or the new one."""
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        if cache.is_private(folder()):
            _replace(folder() / name, cache.sealed(entry.encode() + b"\0" + code))
    except OSError as error:
        log.info("compiled kernels cannot be kept (%s)", error)


def _replace(path: pathlib.Path, held: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(held)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
