"""The folder of a training run: made, written at checkpoints, and read again to go on.

A folder holds ``checkpoint.safetensors`` (all that resuming needs, in one file), the model as ``config.json`` and
``model.safetensors`` with ``vocabulary.json``, the figures of every step in ``metrics.jsonl``, and ``report.html``.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from npmamba import backend
from npmamba.autodiff.optim import AdamWState
from npmamba.autodiff.tree import tree_map
from npmamba.checkpoint import load_training, save_model, save_training
from npmamba.config import MambaConfig
from npmamba.corpus import Corpus, read_corpus
from npmamba.cuda.requirements import require_device
from npmamba.files import atomic_write
from npmamba.lm import init_params
from npmamba.plan import Plan
from npmamba.settings import TrainConfig, flag
from npmamba.streaming import VOCABULARY

METRICS, REPORT = "metrics.jsonl", "report.html"


@dataclass
class Run:
    """A training run: its settings, its text, and the state that a checkpoint keeps.

    Attributes
    ----------
    step : int
        Steps done.
    plan : Plan or None
        None until the time budget is turned into steps.
    seconds : float
        Time spent in steps, over all sittings.
    history : list of dict
        The figures of ``metrics.jsonl``.
    """

    config: TrainConfig
    folder: Path
    corpus: Corpus
    model: MambaConfig
    params: dict[str, Any]
    moments: AdamWState | None = None
    step: int = 0
    plan: Plan | None = None
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> int | None:
        """The number of steps in all, None until it is planned."""
        return self.plan and self.plan.total

    def record(self, **metrics: Any) -> None:
        """Append figures to ``metrics.jsonl``."""
        self.history.append(metrics)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self) -> None:
        """Write the checkpoint and the model, each whole or not at all."""
        extra = {
            "settings": asdict(self.config),
            "plan": self.plan,
            "seconds": self.seconds,
            "text": self.corpus.digest,
        }
        params, moments = on_host(self.params), on_host(self.moments)
        save_training(self.folder, self.step, self.model, params, moments, extra)
        save_model(self.folder, self.model, params)


def require(name: str) -> None:
    """Raise CudaUnavailableError, which says what is missing and how to mend it, if a backend cannot be used here."""
    if name == "cupy":
        require_device()


def on_backend(name: str, tree: Any) -> Any:
    """Return `tree` with its arrays in the library of the backend; a copy to the GPU is not waited for."""
    if name == "numpy":
        return tree
    cupy = importlib.import_module("cupy")
    return tree_map(lambda x: cupy.asarray(x) if hasattr(x, "dtype") else x, tree)


def on_host(tree: Any) -> Any:
    """Return `tree` with NumPy arrays."""
    return tree_map(backend.on_host, tree)


def create(config: TrainConfig) -> Run:
    """Make a new run: read its text, choose its folder, draw its weights.

    Raises
    ------
    ValueError, OSError
        If the text cannot be used or the folder cannot be written, or holds a run already.
    CudaUnavailableError
        If it is to run on a GPU that cannot be used.
    """
    corpus = read_corpus(config)
    corpus.vocabulary.encode(
        config.prompt or ""
    )  # a prompt that cannot be read is better known now than later
    require(config.backend)
    folder = _choose_folder(config, corpus.name)
    sizes: dict[str, Any] = {"d_model": config.d_model, "n_layer": config.layers, "d_state": config.d_state}
    model = MambaConfig(vocab_size=len(corpus.vocabulary), dropout=config.dropout, **sizes)
    params = on_backend(config.backend, init_params(model, seed=config.seed, dtype=config.dtype))
    corpus.vocabulary.save(folder / VOCABULARY)
    return Run(config, folder, corpus, model, params)


def _choose_folder(config: TrainConfig, name: str) -> Path:
    if config.out is None:
        candidates = (Path("runs") / f"{name}-{n}" for n in itertools.count(1))
        return _make(next(folder for folder in candidates if not folder.exists()))
    folder = Path(config.out)
    if (folder / METRICS).exists():
        raise ValueError(
            f"{folder} holds a run already; go on with --resume {folder}, or choose another --out"
        )
    return _make(folder)


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).touch()  # claims the folder, and shows at once whether it can be written
    return folder


def resume(folder: str | Path, changes: Mapping[str, Any]) -> Run:
    """Read a run's last checkpoint.

    Parameters
    ----------
    folder : path
    changes : mapping
        Settings given anew; only those that no number of the training depends on may differ, and the backend: a
        run that goes on there rounds otherwise.

    Raises
    ------
    ValueError, OSError
        If there is no checkpoint, if the text is no longer the one it was, or if `changes` would make another run.
    CudaUnavailableError
        If it is to run on a GPU that cannot be used.
    """
    folder = Path(folder)
    state = load_training(folder)
    saved = TrainConfig(**state.extra["settings"])
    fixed = {f.name for f in fields(TrainConfig) if not f.metadata["free"]}
    for name, value in changes.items():
        if name in fixed and value != getattr(saved, name):
            raise ValueError(
                f"{flag(name)} cannot change when a run is resumed: it was started with "
                f"{getattr(saved, name)}, and now {value} is asked for"
            )
    config = replace(saved, **{name: value for name, value in changes.items() if name not in fixed})
    require(config.backend)
    corpus = read_corpus(config)
    if corpus.digest != state.extra["text"]:
        raise ValueError(f"the text {corpus.name} has changed since {folder} was started, so it cannot go on")
    moments = None if state.opt_state is None else AdamWState(**state.opt_state)
    plan = state.extra["plan"] and Plan(**state.extra["plan"])
    kept = {"step": state.step, "plan": plan, "seconds": state.extra["seconds"]}
    history = _read_metrics(folder, state.step)
    params, moments = on_backend(config.backend, (state.params, moments))
    return Run(config, folder, corpus, state.config, params, moments, history=history, **kept)


def _read_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Read the figures up to `step` and drop later ones, which resuming will write again, and a torn last line."""
    history = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            break
        if metrics["step"] > step or metrics.get("final"):
            break
        history.append(metrics)
    with atomic_write(folder / METRICS) as write:
        write("".join(json.dumps(metrics) + "\n" for metrics in history).encode())
    return history
