"""What all caches of compiled kernels share: where they lie, whom they trust, and how a file shows that it is whole.

A cache's folder is named after everything its kernels are compiled from and with, so a stale kernel cannot be found.
Kernels are run as they are read: each file begins with a digest of the rest, and a folder that other users can write to
is not read.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import stat
import sys
from collections.abc import Iterable

DIGEST = hashlib.sha256().digest_size


def root() -> pathlib.Path:
    """Return the folder of all npmamba caches: ``NPMAMBA_CACHE_DIR``, or ``npmamba`` in the user's cache folder."""
    if named := os.environ.get("NPMAMBA_CACHE_DIR"):
        return pathlib.Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "npmamba"


def folder(kind: str, versions: str, sources: Iterable[pathlib.Path]) -> pathlib.Path:
    """Return the folder for kernels of one `kind`, such as ``cpu``, made from `sources` by what `versions` names."""
    digest = hashlib.sha256(f"{sys.version} {versions}".encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return root() / f"{kind}-{digest.hexdigest()[:16]}"


def is_private(path: pathlib.Path) -> bool:
    """Tell whether the folder `path` is this user's and nobody else can write to it; OSError if it is not there."""
    if os.name == "nt":
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def sealed(content: bytes) -> bytes:
    """Return what a file with this content holds: a digest, then the content."""
    return hashlib.sha256(content).digest() + content


def opened(held: bytes) -> bytes:
    """Return the content of what a file holds; ValueError if it was damaged."""
    if hashlib.sha256(held[DIGEST:]).digest() != held[:DIGEST]:
        raise ValueError("its digest is wrong")
    return held[DIGEST:]
