"""From a folder's vocabulary to text that appears while it is drawn."""

from __future__ import annotations

import codecs
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from npmamba.vocabulary import Vocabulary

VOCABULARY, TOKENIZER = "vocabulary.json", "tokenizer.json"


class Tokenizer:
    """A published model's ``tokenizer.json``, read by the tokenizers package; used like a `Vocabulary`."""

    kind = "pieces"

    def __init__(self, path: Path) -> None:
        try:
            package: Any = importlib.import_module("tokenizers")
        except ImportError:
            raise ImportError(f"{path} needs the tokenizers package: pip install tokenizers") from None
        self.backend = package.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text`."""
        return np.array(self.backend.encode(text).ids, dtype=np.int32)

    def decode(self, ids: Any) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode([int(i) for i in ids]))


def load_vocabulary(folder: str | Path) -> Vocabulary | Tokenizer:
    """Return the vocabulary beside a model: ``vocabulary.json`` of a run, or a published ``tokenizer.json``.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is neither, or it cannot be read.
    ImportError
        If a ``tokenizer.json`` is there, but not the package that reads it.
    """
    root = Path(folder)
    if (root / VOCABULARY).is_file():
        return Vocabulary.load(root / VOCABULARY)
    if (root / TOKENIZER).is_file():
        return Tokenizer(root / TOKENIZER)
    raise FileNotFoundError(f"{folder} has neither {VOCABULARY} nor {TOKENIZER}, so its tokens have no text")


def pieces(vocabulary: Vocabulary | Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they come; a character of several tokens comes when it is complete.

    Examples
    --------
    >>> list(pieces(Vocabulary(), "né".encode()))
    ['n', '', 'é', '']
    """
    if vocabulary.kind == "byte":
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)
    elif vocabulary.kind == "char":
        for token in tokens:
            yield vocabulary.decode(np.array([token]))
    else:
        yield from _grown(vocabulary, tokens)


def _grown(vocabulary: Vocabulary | Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode the last few tokens together: what one of them means can depend on its neighbours."""
    recent: list[int] = []
    shown = ""
    for token in tokens:
        recent.append(token)
        text = vocabulary.decode(recent)
        if text.endswith("\ufffd"):  # half a character: its other tokens are still to come
            continue
        yield text[len(shown) :]
        if text.endswith("\n"):
            recent, text = [], ""
        shown = text
    if recent:
        yield vocabulary.decode(recent)[len(shown) :]
