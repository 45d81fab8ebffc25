"""From a finished run to its sample and its report."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from npmamba.charts import short
from npmamba.cuda.requirements import device
from npmamba.doctor import machine
from npmamba.generate import generate
from npmamba.inspect import selectivity, time_constants
from npmamba.lm import MambaLM
from npmamba.progress import clock
from npmamba.report import Report
from npmamba.runs import REPORT, Run
from npmamba.settings import TrainConfig, flag

SHOWN = 360  # characters in the selectivity map
TEMPERATURE = 0.8


def sample(run: Run) -> tuple[str, str]:
    """Return the prompt and what the model writes after it, by the run's seed."""
    config, vocabulary = run.config, run.corpus.vocabulary
    ids = prompt_ids(run)
    model = MambaLM(run.model, run.params)
    out = generate(model, ids[None], config.sample_length, temperature=TEMPERATURE, seed=config.seed)[0]
    return vocabulary.decode(ids), vocabulary.decode(out[len(ids) :])


def prompt_ids(run: Run) -> np.ndarray:
    """Return the prompt as tokens: the one asked for, or the first whole lines of the validation text."""
    vocabulary = run.corpus.vocabulary
    if run.config.prompt:
        return vocabulary.encode(run.config.prompt)
    lines = (
        vocabulary.decode(run.corpus.validation[:400]).partition("\n")[2].lstrip().splitlines(keepends=True)
    )
    lengths = list(itertools.accumulate(len(line) for line in lines[:-1]))
    count = next((i + 1 for i, length in enumerate(lengths) if length >= 20), 0)
    return vocabulary.encode("".join(lines[:count])) if count else run.corpus.validation[:40]


def summarise(run: Run, prompt: str, text: str, command: str = "") -> Report:
    """Collect what the report shows."""
    losses = [(m["step"], m["loss"]) for m in run.history if "loss" in m]
    validation = [(m["step"], m["validation_loss"]) for m in run.history if "validation_loss" in m]
    ids = run.corpus.vocabulary.encode(prompt + text)[:SHOWN]
    model = MambaLM(run.model, run.params)
    return Report(
        title=run.corpus.name,
        facts=facts(run),
        train=losses,
        validation=validation,
        prompt=prompt,
        sample=text,
        text=[run.corpus.vocabulary.decode(ids[i : i + 1]) for i in range(len(ids))],
        delta=selectivity(model, ids),
        time_constants=time_constants(model, ids).reshape(run.model.n_layer, -1),
        context=run.config.context,
        command=command or command_line(run.config),
        settings={f.name: getattr(run.config, f.name) for f in fields(TrainConfig) if _told(run, f.name)},
        machine={**machine(), **({"GPU": device()} if run.config.backend == "cupy" else {})},
    )


def _told(run: Run, name: str) -> bool:
    return name not in ("out", "prompt") and getattr(run.config, name) is not None


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the numbers that matter: loss, perplexity, size, steps, time."""
    final = next((m["validation_loss"] for m in reversed(run.history) if "validation_loss" in m), math.nan)
    config, unit = run.config, run.corpus.unit
    tokens = run.step * config.batch * config.context
    return [
        (f"{final:.3f}", f"validation loss, nats per {unit}"),
        (f"{final / math.log(2):.2f}", f"bits per {unit}"),
        (f"{math.exp(min(final, 700.0)):.2f}", "perplexity"),
        (short(run.model.parameter_count()), "parameters"),
        (f"{run.step:,}", f"steps of {config.batch} × {config.context} {unit}s"),
        (clock(run.seconds), f"minutes of training, {short(tokens / max(run.seconds, 1e-9))} {unit}s/s"),
    ]


def opening(run: Run) -> str:
    """Say what will be trained on what, and where it goes."""
    parameters = f"{run.model.parameter_count():,} parameters"
    step = f" from step {run.step:,}" if run.step else ""
    return f"{run.corpus}; {parameters}; training{step} into {run.folder}"


def closing(run: Run, prompt: str, text: str, *, reported: bool) -> str:
    """Show the sample, the validation loss and where everything lies."""
    final = run.history[-1]["validation_loss"]
    parts = [f"\n{prompt}{text}\n"] if text else []
    parts.append(
        f"validation loss {final:.4f} nats per {run.corpus.unit} after {run.step:,} steps, "
        f"on {run.history[-1]['tokens']:,} {run.corpus.unit}s "
        f"in windows of {run.config.context}"
    )
    if reported:
        parts.append(f"report: {run.folder / REPORT}")
    return "\n".join([*parts, f"write more: npmamba generate {shlex.quote(str(run.folder))}"])


def command_line(config: TrainConfig) -> str:
    """Write the command that starts this run again."""
    options: Mapping[str, Any] = {
        f.name: getattr(config, f.name)
        for f in fields(TrainConfig)
        if f.name not in ("source", "out") and getattr(config, f.name) != f.default
    }
    words = ["npmamba", "train", *([config.source] if config.source else [])]
    for name, value in options.items():
        words += [flag(name), str(value)]
    return shlex.join(words)
