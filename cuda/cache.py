"""Machine code of CUDA kernels on disk: a file for each kernel, dtype, constants and architecture.

The folder's name is a hash of all kernel sources and of the versions of all that compiles them, so stale code cannot
be found. Each file begins with the digest of the rest: a damaged one counts as absent. A folder that cannot be
written costs the compilation again, nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import sys
import tempfile

from npmamba.cpu.cache import _is_private, root

log = logging.getLogger("npmamba")
SOURCES = ("scalar.py", "cuda/*.py")
COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-core")
DIGEST = 32


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def folder() -> pathlib.Path:
    """Return the folder for the kernels as they are now."""
    package = pathlib.Path(__file__).resolve().parent.parent
    if not (package / "scalar.py").exists():  # reached through the link npmamba/cuda, which `resolve` followed
        package = package / "npmamba"
    versions = [f"{name} {_version(name)}" for name in COMPILERS]
    digest = hashlib.sha256("\n".join([sys.version, *versions]).encode())
    for pattern in SOURCES:
        for source in sorted(package.glob(pattern)):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return root() / f"cuda-{digest.hexdigest()[:16]}"


def read(name: str) -> tuple[str, bytes] | None:
    """Return the entry point's name and the machine code kept under `name`, or None."""
    path = folder() / name
    try:
        if not _is_private(folder()):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest or b"\0" not in content:
        log.warning("cached kernel %s is damaged and will be compiled again", name)
        return None
    entry, code = content.split(b"\0", 1)
    return entry.decode(), code


def write(name: str, entry: str, code: bytes) -> None:
    """Keep machine code under `name`, if the folder can be written; readers see the old file or the new one."""
    content = entry.encode() + b"\0" + code
    try:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_private(folder()):
            return
        handle, temporary = tempfile.mkstemp(dir=folder())
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, folder() / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        log.info("compiled kernels cannot be kept (%s)", error)
