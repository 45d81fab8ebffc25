"""The text of a training run: read, split and encoded by the run's settings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npmamba.data import read_text, stdlib_corpus, train_val_split
from npmamba.settings import TrainConfig
from npmamba.vocabulary import Vocabulary

FRACTION = 0.9


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: the first nine tenths to train on, the rest to validate.

    Attributes
    ----------
    name : str
        For folders and titles.
    vocabulary : Vocabulary
    training, validation : arrays of int32
    digest : str
        SHA-256 of the text: a run resumes on the text it began with, or not at all.
    """

    name: str
    vocabulary: Vocabulary
    training: NDArray[np.int32]
    validation: NDArray[np.int32]
    digest: str

    @property
    def unit(self) -> str:
        """What a token is: a character or a byte."""
        return {"char": "character", "byte": "byte"}[self.vocabulary.kind]

    def __str__(self) -> str:
        count = len(self.training) + len(self.validation)
        return f"{self.name}: {count:,} {self.unit}s, {len(self.vocabulary)} different ones"


def read_corpus(config: TrainConfig) -> Corpus:
    """Read the text that the settings name.

    Raises
    ------
    ValueError, OSError
        If there is no such text, if it is no text, or too short for one window of the context.
    """
    text = stdlib_corpus() if config.source is None else read_text(config.source)
    name = "python" if config.source is None else Path(config.source).resolve().stem
    vocabulary = _vocabulary(config.vocab, text)
    tokens = vocabulary.encode(text)
    needed = int((config.context + 2) / FRACTION) + 2
    if len(tokens) < needed:
        raise ValueError(
            f"{name} has {len(tokens):,} tokens, but --context {config.context} needs at least {needed:,}; "
            "choose a shorter --context or a longer text"
        )
    training, validation = train_val_split(tokens, FRACTION)
    return Corpus(name, vocabulary, training, validation, hashlib.sha256(text.encode()).hexdigest())


def _vocabulary(kind: str, text: str) -> Vocabulary:
    characters = set(text)
    by_character = kind == "char" or (kind != "byte" and len(characters) < 256)
    return Vocabulary("".join(characters) if by_character else None)
