"""Safetensors files of NumPy arrays: the safetensors package, for arrays of any layout and files whole or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from npmamba.backend import on_host
from npmamba.files import atomic_write

DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64".split()
_LOOKALIKES = {
    b"PK": "it is a zip archive, as PyTorch's .bin and NumPy's .npz are",
    b"version ": "it is a Git LFS pointer; fetch the weights with: git lfs pull",
}


class TensorFile:
    """An open safetensors file: shapes and metadata by name at once, arrays when asked for.

    The file is mapped into memory. That is safe for checkpoints, which are replaced by a rename and never cut short in
    place: an open file keeps showing the content it had when it was opened.

    Raises
    ------
    OSError
        If the file is absent or cannot be read.
    ValueError
        If it is truncated, damaged, or something else, naming it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with open(path, "rb") as file:  # also raises Python's own error for a folder or a missing permission
            head = file.read(8)
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            why = next((what for start, what in _LOOKALIKES.items() if head.startswith(start)), error)
            raise ValueError(f"{path}: not a complete safetensors file: {why}") from None
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def read(self, name: str) -> np.ndarray:
        """Return the array `name` in memory of its own, C-contiguous and writable."""
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, ValueError, AttributeError) as error:  # the last for a dtype that NumPy lacks
            raise ValueError(f"{self.path}: tensor {name!r} cannot be read: {error}") from None


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file, sorted by name; `TensorFile` says what it raises."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in sorted(file.shapes)}


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write NumPy or CuPy arrays of any layout and byte order to a safetensors file, whole or not at all.

    Equal arrays make equal bytes; only several entries of `metadata` have no fixed order. The content is put together
    in memory, which for a moment takes twice the file's size beside the arrays.

    Raises
    ------
    TypeError
        If a value is no array, or has a dtype that is not among `DTYPES`.
    OSError
        If the file cannot be written; an earlier one stands.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_tensors(path, {"x": np.arange(6.0).reshape(2, 3).T})
    >>> load_tensors(path)["x"].tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    content = encode(tensors, metadata)
    with atomic_write(path) as write:
        write(content)


def encode(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file; see `save_tensors`."""
    plain = {name: _plain(name, array) for name, array in tensors.items()}
    return save(plain, dict(metadata) if metadata else None)


def _plain(name: str, array: Any) -> np.ndarray:
    """Return `array` on the host, in C order and little-endian: the package stores other arrays' bytes as they lie."""
    host = on_host(array)
    if not isinstance(host, np.ndarray | np.generic) or isinstance(host, np.ma.MaskedArray):
        raise TypeError(f"save_tensors: {name} must be an array, got {type(array).__name__}")
    if name == "__metadata__":
        raise TypeError("save_tensors: a tensor cannot be named '__metadata__'")
    if host.dtype.name not in DTYPES:
        raise TypeError(f"save_tensors: {name} has dtype {host.dtype}; known are {', '.join(DTYPES)}")
    return np.asarray(host, host.dtype.newbyteorder("<"), order="C")
