"""Safetensors files of NumPy arrays.

Such a file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), then the bytes of
all arrays without a gap. It is written and read here, not by the safetensors package, for four reasons: that
package stores wrong bytes for arrays that are not C-contiguous, does not fsync, maps files into memory (one
truncated by another process then kills Python), and accepts a name that stands twice. Tests compare the two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from npmamba.files import Write, atomic_write

# In the order in which safetensors sorts them: wide types first keep every array aligned.
_DTYPES = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000


class TensorInfo(NamedTuple):
    """What a file's header says of one array: where its bytes lie in the file, and what they mean."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file: the header is read and checked at once, arrays when asked for.

    Arrays are read into memory of their own, never mapped. An open file keeps showing the content it had when
    it was opened, even if a new one takes its name.

    Attributes
    ----------
    entries : dict of str to TensorInfo
    metadata : dict of str to str

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, damaged, or something else, naming it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: not a file")
        self._file = open(path, "rb")
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def damaged(self, why: str) -> ValueError:
        """Return the error that names this file."""
        return ValueError(f"{self.path}: not a complete safetensors file: {why}")

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
            raise self.damaged(_recognise(head) or f"{size} bytes do not hold the header that they announce")
        text = self._file.read(length)
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"its header is no JSON: {error}") from None
        if not isinstance(header, dict) or not text.startswith(b"{"):
            raise self.damaged("its header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.damaged("its metadata is not made of strings")
        entries = {name: self._entry(name, spec, 8 + length) for name, spec in header.items()}
        self._check_cover(entries, 8 + length, size)
        return entries, metadata

    def _entry(self, name: str, spec: Any, start: int) -> TensorInfo:
        if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.damaged(f"tensor {name!r} needs a dtype, a shape and data_offsets")
        code, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise self.damaged(f"tensor {name!r} has dtype {code!r}; known are {', '.join(_DTYPES)}")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise self.damaged(f"tensor {name!r} has shape {shape} and data_offsets {offsets}")
        begin, end = offsets
        if math.prod(shape) * _DTYPES[code].itemsize != end - begin:
            raise self.damaged(
                f"tensor {name!r} of shape {shape}, {code} does not fill bytes {begin} to {end}"
            )
        return TensorInfo(_DTYPES[code], tuple(shape), start + begin, start + end)

    def _check_cover(self, entries: dict[str, TensorInfo], start: int, size: int) -> None:
        for name, info in sorted(entries.items(), key=lambda item: item[1][2:]):
            if info.begin != start:
                raise self.damaged(f"tensor {name!r} begins at byte {info.begin}, expected {start}")
            start = info.end
        if start != size:
            raise self.damaged(f"its tensors end at byte {start}, the file at byte {size}")

    def read(self, name: str) -> np.ndarray:
        """Return the array `name`, C-contiguous and writable."""
        info = self.entries[name]
        try:
            array = np.empty(info.shape, info.dtype.newbyteorder("<"))
        except ValueError as error:
            raise self.damaged(f"tensor {name!r} has shape {info.shape}: {error}") from None
        octets = array.reshape(-1).view(np.uint8)
        self._file.seek(info.begin)
        if self._file.readinto(octets.data) != info.end - info.begin:
            raise self.damaged(f"tensor {name!r} was cut short while it was read")
        if info.dtype == np.bool_ and octets.max(initial=0) > 1:
            raise self.damaged(f"tensor {name!r} is BOOL, but has bytes other than 0 and 1")
        return array.astype(info.dtype, copy=False)


def _recognise(head: bytes) -> str:
    """Name the things that people take for weights."""
    if head.startswith(b"PK"):
        return "it is a zip archive, as PyTorch's .bin and NumPy's .npz are"
    if head.startswith(b"version "):
        return "it is a Git LFS pointer; fetch the weights with: git lfs pull"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file, sorted by name.

    Raises
    ------
    FileNotFoundError, ValueError
        See `TensorFile`.
    """
    with TensorFile(path) as file:
        return {name: file.read(name) for name in sorted(file.entries)}


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, whole or not at all; equal arrays make equal bytes.

    Parameters
    ----------
    path : path
        The file; its folder must exist.
    tensors : mapping of str to array
        NumPy or CuPy arrays of any memory layout and byte order: bool, integers, float16, bfloat16, float32,
        float64 or complex64.
    metadata : mapping of str to str, optional

    Raises
    ------
    TypeError
        If a value is no array, or has another dtype.
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
    with atomic_write(path) as write:
        write_tensors(write, tensors, metadata)


def write_tensors(
    write: Write, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Hand the content of a safetensors file to `write`, piece by piece; see `save_tensors`."""
    codes = list(_DTYPES)
    coded = {name: _code(name, array) for name, array in tensors.items()}
    order = sorted(coded, key=lambda name: (codes.index(coded[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name in order:
        end = begin + math.prod(tensors[name].shape) * _DTYPES[coded[name]].itemsize
        header[name] = {
            "dtype": coded[name],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for name in order:
        write(_octets(tensors[name]))


def _code(name: str, array: Any) -> str:
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"save_tensors: a tensor cannot be named {name!r}")
    if not (hasattr(array, "dtype") and hasattr(array, "shape")) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"save_tensors: {name} must be an array, got {type(array).__name__}")
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise TypeError(
            f"save_tensors: {name} has dtype {array.dtype}; known are {', '.join(map(str, _CODES))}"
        )
    return code


def on_host(array: Any) -> Any:
    """Return a CuPy array as a NumPy array, anything else as it is."""
    return array.get() if hasattr(array, "dtype") and hasattr(array, "get") else array


def _octets(array: Any) -> np.ndarray:
    host = np.asarray(on_host(array))
    little = np.ascontiguousarray(host, host.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)
