"""The settings of a training run: one list that the command line, TOML files and Python code share.

Nothing here imports NumPy, so ``npmamba --help`` stays instant.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


def _option(default: Any, kind: type, help: str, **meta: Any) -> Any:
    """One setting: its `low` and `high` end, its `choices`, and whether it is `free`.

    A free setting may change when a run is resumed: no number of the training depends on it, but for the rounding of
    another backend.
    """
    rules = {"choices": (), "low": None, "high": None, "free": False, **meta}
    return field(default=default, metadata={"kind": kind, "help": help, **rules})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Each field is also an option of ``npmamba train`` (``d_model`` is ``--d-model``) and a key of its
    ``--config`` file. Values are checked when the object is made.

    Raises
    ------
    ValueError, TypeError
        Naming the option, what came and what was expected.

    Examples
    --------
    >>> TrainConfig(context=128, steps=300).vocab
    'auto'
    >>> TrainConfig(context=0)
    Traceback (most recent call last):
    ...
    ValueError: --context must be at least 1, got 0
    """

    source: str | None = _option(None, str, "text file or folder to learn (default: Python's own library)")
    out: str | None = _option(None, str, "folder for the run (default: runs/NAME-N)")
    vocab: str = _option(
        "auto",
        str,
        "auto: char if fewer than 256 different ones occur",
        choices=("auto", "char", "byte"),
    )
    context: int = _option(256, int, "characters per training window", low=1)
    batch: int = _option(16, int, "windows per step", low=1)
    steps: int | None = _option(None, int, "number of steps (default: what --minutes allow)", low=1)
    minutes: float | None = _option(
        None, float, "time budget, start-up included (default: 2.5 unless --steps is given)", low=0.0
    )
    d_model: int = _option(128, int, "width of the model", low=1)
    layers: int = _option(4, int, "number of Mamba blocks", low=1)
    d_state: int = _option(16, int, "states per channel", low=1, high=256)
    lr: float = _option(0.01, float, "peak learning rate", low=0.0)
    warmup: int = _option(50, int, "steps of linear warm-up", low=0)
    weight_decay: float = _option(0.1, float, "decoupled weight decay, on matrices only", low=0.0)
    dropout: float = _option(0.0, float, "dropout rate", low=0.0, high=0.99)
    clip: float = _option(1.0, float, "largest norm of the gradient (0: no limit)", low=0.0)
    seed: int = _option(0, int, "seed of weights, batches, dropout and sample", low=0)
    dtype: str = _option("float32", str, "type of weights and arithmetic", choices=("float32", "float64"))
    backend: str = _option(
        "numpy", str, "numpy: on the CPU, cupy: on a GPU", choices=("numpy", "cupy"), free=True
    )
    eval_every: int = _option(
        100, int, "steps between validation losses (0: only at the end)", low=0, free=True
    )
    checkpoint_every: int = _option(
        100, int, "steps between checkpoints (0: only at the end)", low=0, free=True
    )
    sample_length: int = _option(400, int, "characters of sample text at the end (0: none)", low=0, free=True)
    prompt: str | None = _option(
        None, str, "text that the sample continues (default: from the validation text)", free=True
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f.name, getattr(self, f.name), f.metadata, optional=f.default is None)

    @property
    def budget(self) -> float | None:
        """The time budget in seconds, or None where only the number of steps counts."""
        if self.minutes is None:
            return 150.0 if self.steps is None else None
        return 60.0 * self.minutes


def flag(name: str) -> str:
    """Return the option that sets the field `name`: ``d_model`` -> ``--d-model``."""
    return "--" + name.replace("_", "-")


def _check(name: str, value: Any, meta: Any, *, optional: bool) -> None:
    if value is None and optional:
        return
    kinds = (int, float) if meta["kind"] is float else meta["kind"]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{flag(name)} must be {meta['kind'].__name__}, got {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(
            f"{flag(name)} must be one of {', '.join(meta['choices'])}, got {value!r}"
            + nearest(str(value), meta["choices"])
        )
    if meta["low"] is not None and not value >= meta["low"]:
        raise ValueError(f"{flag(name)} must be at least {meta['low']}, got {value}")
    if meta["kind"] is float and not abs(value) < float("inf"):
        raise ValueError(f"{flag(name)} must be finite, got {value}")
    if meta["high"] is not None and not value <= meta["high"]:
        raise ValueError(f"{flag(name)} must be at most {meta['high']}, got {value}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` with the known name most like `name`, or nothing if none is.

    Examples
    --------
    >>> nearest("--contxt", ["--context", "--batch"])
    '; did you mean --context?'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read settings from a TOML file: the option names, with ``_`` or ``-``.

    Raises
    ------
    ValueError
        If the file is not TOML, or has a key that is no setting (the nearest one is named).
    """
    known = [f.name for f in fields(TrainConfig)]
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    values = {key.replace("-", "_"): value for key, value in raw.items()}
    for key in values:
        if key not in known:
            raise ValueError(f"{path} has the unknown setting {key!r}{nearest(key, known)}")
    return values
