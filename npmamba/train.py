"""Training a language model on a text, so that an interrupted run goes on with the same bits.

Every number that reaches the weights is a pure function of the settings, the text and the step: batches and dropout
are drawn from (seed, step), the learning rate follows from the step. Time decides one thing only, once: how many
steps fit a time budget. That number is settled during the warm-up, before any update depends on it, and kept.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from npmamba import lm
from npmamba.autodiff import adamw, clip_by_global_norm, decay_mask, value_and_grad, warmup_cosine
from npmamba.data import IGNORE_INDEX, batch_at, evaluation_windows
from npmamba.progress import Silent
from npmamba.runs import Run, on_backend
from npmamba.settings import TrainConfig

__all__ = ["Interrupted", "TrainConfig", "evaluate", "learning_rate", "train"]

MEASURED = 20  # steps whose time decides how many fit the budget
UNTIMED = 3  # of these, the first ones: kernels compile in them
FLOOR = 0.02  # the cosine ends at this fraction of the peak
EVALUATED, FINAL = 2**15, 2**18  # at most so many tokens are predicted for a validation loss, the last one


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is on disk."""


def learning_rate(step: int, config: TrainConfig, total: int | None) -> float:
    """Return the learning rate of the update after `step` updates, see `npmamba.autodiff.warmup_cosine`.

    Parameters
    ----------
    step : int
        Updates made so far.
    config : TrainConfig
    total : int or None
        Number of steps in all; None while it is not decided, which is during the warm-up only.

    Examples
    --------
    >>> config = TrainConfig(lr=1.0, warmup=10, steps=110)
    >>> [round(learning_rate(s, config, 110), 2) for s in (0, 9, 10, 60, 110)]
    [0.09, 0.91, 1.0, 0.51, 0.02]
    """
    warmup = max(config.warmup, MEASURED) if config.budget else min(config.warmup, (config.steps or 0) // 5)
    end = max(total or 0, warmup + 1)
    return warmup_cosine(config.lr, warmup, end, final=FLOOR * config.lr)(step)


def train(run: Run, display: Silent | None = None, *, started: float | None = None) -> Run:
    """Train until the last step, saving on the way.

    Parameters
    ----------
    run : Run
        From `npmamba.runs.create` or `npmamba.runs.resume`; changed in place.
    display : optional
        Told about steps and validation losses, see `npmamba.progress`.
    started : float, optional
        When the time budget began, by ``time.perf_counter()``; by default now.

    Raises
    ------
    Interrupted
        After Ctrl-C or SIGTERM: the step was finished and the state saved.
    ValueError
        If the loss is no longer finite.
    """
    display = display or Silent()
    deadline = (time.perf_counter() if started is None else started) + (run.config.budget or math.inf)
    loop = Loop(run, display, deadline)
    with _stop_signals() as stop:
        while not loop.finished:
            loop.step()
            if stop.is_set():
                run.save()
                raise Interrupted(
                    f"stopped after step {run.step}; go on with: npmamba train --resume {run.folder}"
                )
    loss, count = evaluate(run)
    run.record(step=run.step, validation_loss=loss, tokens=count, final=True)
    run.save()
    return run


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, earlier[number])

    earlier.update({number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@dataclass
class Loop:
    """The steps of one run, with what they need and nothing that must be saved."""

    run: Run
    display: Silent
    deadline: float
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.run.config
        self.optimizer = adamw(
            lambda step: learning_rate(step, config, self.run.total),
            weight_decay=config.weight_decay,
            mask=decay_mask(self.run.params),
        )
        self.gradient = value_and_grad(lm.loss)
        if config.budget is None or (config.steps or math.inf) <= MEASURED:
            self.run.total = config.steps
        if self.run.moments is None:
            self.run.moments = self.optimizer.init(self.run.params)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.run.total is not None and self.run.step >= self.run.total

    def step(self) -> None:
        """Do one step, and what is due after it: fix the number of steps, evaluate, save."""
        run, config = self.run, self.run.config
        began = time.perf_counter()
        loss, norm = self._update()
        self.times.append(time.perf_counter() - began)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} at step {run.step}; try a smaller --lr than {config.lr:g}"
            )
        if run.total is None and run.step >= MEASURED:
            run.total = self._fit()
            run.save()
        run.seconds += time.perf_counter() - began
        self._report(loss, norm)
        if config.eval_every and run.step % config.eval_every == 0 and not self.finished:
            validation, _ = evaluate(run, EVALUATED)
            run.record(step=run.step, validation_loss=validation)
            self.display.validation({"step": run.step, "validation_loss": validation})
        if config.checkpoint_every and run.step % config.checkpoint_every == 0 and not self.finished:
            run.save()

    def _update(self) -> tuple[float, float]:
        run, config = self.run, self.run.config
        batch = {"batch": config.batch, "seqlen": config.context, "seed": config.seed, "step": run.step}
        x, y = on_backend(config.backend, batch_at(run.corpus.training, **batch))
        key = (config.seed, run.step) if config.dropout else None
        loss, gradients = self.gradient(run.params, run.model, x, y, dropout_key=key)
        gradients, norm = clip_by_global_norm(gradients, config.clip or math.inf)
        run.params, run.moments = self.optimizer.update(gradients, run.moments, run.params)
        run.step += 1
        return float(loss), float(norm)

    def _fit(self) -> int:
        """Decide how many steps fit the time that is left, validation and the end included."""
        config = self.run.config
        each = statistics.fmean(self.times[UNTIMED:] or self.times)
        token = each / (3 * config.batch * config.context)  # a forward pass is about a third of a step
        size = len(self.run.corpus.validation)
        end = token * min(size, FINAL) + 4.0
        if config.eval_every:
            each += token * min(size, EVALUATED) / config.eval_every
        left = self.deadline - time.perf_counter() - end
        total = self.run.step + max(0, int(left / each))
        return min(total, config.steps or total)

    def _report(self, loss: float, norm: float) -> None:
        run, config = self.run, self.run.config
        pace = statistics.median(self.times[-50:][min(UNTIMED, len(self.times) - 1) :])
        metrics = {
            "step": run.step,
            "loss": loss,
            "learning_rate": learning_rate(run.step - 1, config, run.total),
            "gradient_norm": norm,
            "tokens_per_second": config.batch * config.context / pace,
            "seconds": round(run.seconds, 3),
        }
        run.record(**metrics)
        left = None if run.total is None else (run.total - run.step) * pace
        self.display.step({**metrics, "total": run.total, "seconds_left": left})


def evaluate(run: Run, most: int = FINAL) -> tuple[float, int]:
    """Return the mean loss on the validation text in nats per token, and the number of tokens predicted.

    The text is cut into windows of the training context, each read from a zero state: the first characters of a
    window are predicted from few others, as in the common benchmarks. Of a text of more than `most` tokens,
    every n-th window is taken, so that a part stands for the whole.
    """
    context, batch = run.config.context, run.config.batch
    inputs, targets = evaluation_windows(run.corpus.validation, context)
    every = -(-targets.size // max(most, context))
    inputs, targets = inputs[::every], targets[::every]
    total, count = 0.0, int((targets != IGNORE_INDEX).sum())
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch], targets[start : start + batch]
        x, y = on_backend(run.config.backend, part)
        total += float(lm.loss(run.params, run.model, x, y)) * int((y != IGNORE_INDEX).sum())
    return total / count, count
