"""Text for a language model: reading it, turning it into tokens, cutting it into windows.

Nothing here goes online, and nothing depends on hidden state: the batch of a step is a pure function of a
seed and the step's number, so a resumed run sees the same data as an unbroken one.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".txt", ".md", ".py")
IGNORE_INDEX = -100  # what cross_entropy leaves out
_NOT_LIBRARY = (
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__",
)  # fmt: skip


def read_text(path: str | os.PathLike[str], suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Read a UTF-8 text file, or all text files of a folder and its sub-folders, in the order of their names.

    Parameters
    ----------
    path : path
        A file of any name, or a folder.
    suffixes : tuple of str, default (".txt", ".md", ".py")
        Which files of a folder to read; hidden ones are left out.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    ValueError
        If a file is not UTF-8 text or holds a NUL, or if there is no text at all.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "b.txt").write_text("world"), (folder / "a.txt").write_text("hello ")
    >>> read_text(folder)
    'hello world'
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"read_text: {path} does not exist")
    files = _text_files(root, suffixes) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"read_text: {path} holds no file that ends in {', '.join(suffixes)}")
    text = "".join(_decoded(file) for file in files)
    if not text:
        raise ValueError(f"read_text: {path} is empty")
    return text


def _text_files(root: Path, suffixes: tuple[str, ...], left_out: Iterable[str] = ()) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    # By parts, not by string: the order must not depend on the system's separator.
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _decoded(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"read_text: {file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"read_text: {file} is not text: it has a NUL character at position {text.index(chr(0))}")
    return text


def stdlib_corpus(max_chars: int = 10_000_000) -> str:
    """Return the source of Python's standard library: text to learn that every machine has.

    Modules come in the order of their names, without tests and installed packages. The text is the same every
    time on one machine; another version of Python has another one.

    Parameters
    ----------
    max_chars : int, default 10_000_000
        The text is cut off here.

    Raises
    ------
    FileNotFoundError
        If this Python keeps no source of its library on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for file in _text_files(root, (".py",), _NOT_LIBRARY):
        # _sysconfigdata describes how this very Python was built: paths, compilers.
        if file.name.startswith("_sysconfigdata"):
            continue
        try:
            parts.append(_decoded(file))
        except ValueError:
            continue
        size += len(parts[-1])
        if size >= max_chars:
            break
    if not parts:
        raise FileNotFoundError(f"stdlib_corpus: {root} has no Python source; name a text file or folder")
    return "".join(parts)[:max_chars]


def train_val_split(tokens: np.ndarray, fraction: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Split `tokens` in two: the first `fraction` to train on, the rest to validate.

    Raises
    ------
    ValueError
        If a part would be empty.

    Examples
    --------
    >>> train, val = train_val_split(np.arange(10))
    >>> len(train), val
    (9, array([9]))
    """
    _check_tokens("train_val_split", tokens)
    if not 0 < fraction < 1:
        raise ValueError(f"train_val_split: fraction={fraction}; expected a number between 0 and 1")
    cut = int(len(tokens) * fraction)
    if cut == 0 or cut == len(tokens):
        raise ValueError(f"train_val_split: {len(tokens)} tokens leave one part empty at fraction={fraction}")
    return tokens[:cut], tokens[cut:]


def batch_at(tokens: np.ndarray, batch: int, seqlen: int, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training batch of a step: windows at random places, and what follows each token.

    A pure function of its arguments: the places are drawn by the counter-based generator Philox, whose key is
    ``(seed, step)``.

    Parameters
    ----------
    tokens : (length,) integers
    batch, seqlen : int
        Number and length of the windows.
    seed, step : int
        From 0 to 2**64 - 1.

    Returns
    -------
    inputs, targets : (batch, seqlen)
        In the dtype of `tokens`; ``targets[b, t]`` is the token after ``inputs[b, t]``.

    Raises
    ------
    ValueError
        If `tokens` are fewer than ``seqlen + 1``.

    Examples
    --------
    >>> inputs, targets = batch_at(np.arange(100), 2, 3, seed=0, step=7)
    >>> bool((targets == inputs + 1).all())
    True
    """
    _check_tokens("batch_at", tokens)
    _check_sizes("batch_at", batch=batch, seqlen=seqlen)
    if len(tokens) < seqlen + 1:
        raise ValueError(
            f"batch_at: seqlen={seqlen} needs {seqlen + 1} tokens, the last target included, but there "
            f"are {len(tokens)}; use a shorter context or a longer text"
        )
    _check_sizes("batch_at", low=0, seed=seed, step=step)
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    starts = generator.integers(0, len(tokens) - seqlen, batch)
    windows = tokens[starts[:, None] + np.arange(seqlen + 1)]
    return windows[:, :-1], windows[:, 1:]


def batches(
    tokens: np.ndarray, batch: int, seqlen: int, *, seed: int, start: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `batch_at` of the steps `start`, ``start + 1`` and so on without end."""
    step = start
    while True:
        yield batch_at(tokens, batch, seqlen, seed=seed, step=step)
        step += 1


def evaluation_windows(tokens: np.ndarray, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut `tokens` into windows in which every token but the first is a target exactly once, in order.

    Parameters
    ----------
    tokens : (length,) integers
        At least 2.
    seqlen : int
        Length of a window. The last one is filled up with inputs 0 and targets `IGNORE_INDEX`.

    Returns
    -------
    inputs, targets : (windows, seqlen)
        int64.

    Examples
    --------
    >>> inputs, targets = evaluation_windows(np.array([5, 6, 7, 8]), 2)
    >>> inputs.tolist(), targets.tolist()
    ([[5, 6], [7, 0]], [[6, 7], [8, -100]])
    """
    _check_tokens("evaluation_windows", tokens)
    _check_sizes("evaluation_windows", seqlen=seqlen)
    if len(tokens) < 2:
        raise ValueError(f"evaluation_windows: got {len(tokens)} tokens; expected at least 2")
    count = len(tokens) - 1
    shape = (-(-count // seqlen), seqlen)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    inputs.reshape(-1)[:count] = tokens[:-1]
    targets.reshape(-1)[:count] = tokens[1:]
    return inputs, targets


def _check_tokens(where: str, tokens: Any) -> None:
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
        came = tokens.dtype if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"{where}: tokens must be a NumPy array of integers, got {came}")
    if tokens.ndim != 1:
        raise ValueError(f"{where}: tokens must have one axis, got shape {tokens.shape}")


def _check_sizes(where: str, low: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"{where}: {name} must be an integer, got {size!r}")
        if not low <= size < 2**64:
            raise ValueError(f"{where}: {name}={size}; expected at least {low} and below 2**64")
