"""Files that are whole or absent: written under a temporary name, synced to the disk, then renamed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SUFFIX = "npmamba-tmp"
# Process numbers mean something on one machine only, and folders may be shared by several.
_HOST = platform.node().replace(".", "-").replace(os.sep, "-") or "host"

_counter = itertools.count()
_being_written: set[str] = set()

Write = Callable[[Any], None]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Write]:
    """Write a file under a temporary name beside `path`, and give it that name once it is on the disk.

    Whatever happens, `path` holds its earlier content or all of the new one. What killed processes of this
    machine left behind is removed on the way.

    Yields
    ------
    write : callable
        Appends bytes, or any buffer of bytes.

    Raises
    ------
    OSError
        If something cannot be written (disk full, no permission). The earlier file stands, no litter stays.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_write(path) as write:
    ...     write(b"all or nothing")
    >>> path.read_text()
    'all or nothing'
    """
    target = os.path.realpath(path)
    sweep(target)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{_HOST}.{os.getpid()}.{next(_counter)}.{_SUFFIX}")
    _being_written.add(temporary)
    try:
        yield from _write_then_rename(temporary, target)
    except OSError as error:
        why = f"could not write {path}: {error.strerror or error}; any earlier file there is unchanged"
        raise OSError(error.errno, why) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        _being_written.discard(temporary)
    _sync_folder(folder)


def _write_then_rename(temporary: str, target: str) -> Iterator[Write]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        yield lambda data: _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, target)


def _write_all(descriptor: int, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: str) -> None:
    """Make the new name survive a power cut; some systems and file systems cannot, and need not be told."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files beside `path` that processes of this machine left when they were killed."""
    folder, name = os.path.split(os.path.realpath(path))
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            litter = os.path.join(folder, entry)
            parts = entry.removeprefix(f".{name}.{_HOST}.").split(".")
            ours = len(parts) == 3 and parts[2] == _SUFFIX and litter not in _being_written
            if ours and _is_dead(parts[0]):
                os.unlink(litter)


def _is_dead(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    # A container gives its processes the same few numbers every time: ours, then, is an earlier life's.
    if int(pid) == os.getpid():
        return True
    if os.name != "posix":
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def save_json_atomic(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as JSON, whole or not at all; see `atomic_write`."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as write:
        write(text.encode())


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is no JSON, naming the file.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
