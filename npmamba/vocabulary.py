"""The code between text and token ids, one token per character or per byte."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

import numpy as np

from npmamba.files import load_json, save_json_atomic


class Vocabulary:
    """A code between text and token ids: one token per character, or one per byte of UTF-8.

    Parameters
    ----------
    characters : str, optional
        The characters of a ``"char"`` vocabulary; order and repetition do not matter, ids follow code points.
        None makes a ``"byte"`` vocabulary of 256, which knows every text.

    Attributes
    ----------
    kind : {"char", "byte"}
    characters : str or None
        Sorted, each once.

    Examples
    --------
    >>> vocabulary = Vocabulary("hello")
    >>> len(vocabulary), vocabulary.characters
    (4, 'ehlo')
    >>> vocabulary.encode("hole")
    array([1, 3, 2, 0], dtype=int32)
    >>> vocabulary.decode([1, 0, 2, 2, 3])
    'hello'
    >>> Vocabulary().encode("é")
    array([195, 169], dtype=int32)
    """

    def __init__(self, characters: str | None = None) -> None:
        self.kind = "byte" if characters is None else "char"
        self.characters = None if characters is None else "".join(sorted(set(characters)))
        if self.characters == "":
            raise ValueError("Vocabulary: characters is empty; expected at least one character")
        self._codes = _code_points(self.characters or "")

    def __len__(self) -> int:
        return 256 if self.characters is None else len(self.characters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"Vocabulary({'' if self.characters is None else repr(self.characters)})"

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        """Return the token ids of `text`, an int32 array.

        Parameters
        ----------
        text : str
        unknown : str, default "error"
            What to do with characters outside the vocabulary: ``"error"``, ``"skip"`` them, or a character of
            the vocabulary that stands in for them.

        Raises
        ------
        ValueError
            For an unknown character: which, where, and what could be done.
        """
        if self.characters is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1).astype(np.int32)
        strange = self._codes[ids] != codes
        if not strange.any():
            return ids
        if unknown == "skip":
            return ids[~strange]
        if len(unknown) == 1 and unknown in self.characters:
            return np.where(strange, np.int32(self.characters.index(unknown)), ids)
        raise self._stranger(text, int(strange.argmax()))

    def _stranger(self, text: str, at: int) -> ValueError:
        character = text[at]
        alike = [character.swapcase(), *unicodedata.normalize("NFKD", character)]
        near = next((c for c in alike if c in (self.characters or "")), None)
        hint = f"; the nearest known is {near!r}" if near else ""
        named = f"character {character!r} (U+{ord(character):04X}) at position {at}"
        return ValueError(
            f"Vocabulary.encode: {named} is not among the {len(self)} known{hint}. "
            "Leave such characters out with unknown='skip', or name a stand-in"
        )

    def decode(self, ids: Any) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises
        ------
        TypeError
            If `ids` are not integers.
        ValueError
            If an id is outside the vocabulary, or `ids` has more than one axis.
        """
        ids = np.asarray(ids)
        if ids.ndim > 1:
            raise ValueError(f"Vocabulary.decode: ids must have one axis, got shape {ids.shape}")
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu":
            raise TypeError(f"Vocabulary.decode: ids must be integers, got {ids.dtype}")
        if ids.min() < 0 or ids.max() >= len(self):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"Vocabulary.decode: id {wrong} is outside 0 to {len(self) - 1}")
        if self.characters is None:
            return ids.astype(np.uint8).tobytes().decode(errors="replace")
        return self._codes[ids].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as JSON, whole or not at all."""
        save_json_atomic(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it holds no vocabulary.
        """
        data = load_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, made of strings: fit for JSON."""
        return {"kind": self.kind} | ({} if self.characters is None else {"characters": self.characters})

    @classmethod
    def from_dict(cls, data: Any) -> Vocabulary:
        """Return the vocabulary that `to_dict` described; ValueError if it is none."""
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind == "byte":
            return cls()
        if kind == "char" and isinstance(data.get("characters"), str):
            return cls(data["characters"])
        raise ValueError("Vocabulary: expected kind 'byte', or kind 'char' with characters")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
