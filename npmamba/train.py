"""Training a language model on a text, so that an interrupted run goes on with the same bits.

Every number that reaches the weights is a pure function of the settings, the text and the step: batches and dropout
are drawn from (seed, step), the learning rate follows from the step. Time decides one thing only, once: how many
steps fit a time budget. That plan is made before any update depends on it, and kept; see `npmamba.plan`.

A GPU works through its steps while the next ones are prepared: losses and norms stay there, and are collected a few
times a second and before anything is saved. Steps are timed from one collection to the next.
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
from npmamba.autodiff import adamw, clip_factor, decay_mask, value_and_grad
from npmamba.backend import on_host
from npmamba.data import IGNORE_INDEX, batch_at, evaluation_windows
from npmamba.plan import given_plan, is_due, learning_rate, settle
from npmamba.progress import Silent
from npmamba.runs import Run, on_backend
from npmamba.settings import TrainConfig

__all__ = ["Interrupted", "TrainConfig", "evaluate", "train"]

UNTIMED = 3  # first steps of a sitting, in which kernels compile
PATIENCE = 0.25  # seconds after which the steps that a GPU was given are waited for
EVALUATED, FINAL = 2**15, 2**18  # at most so many tokens are predicted for a validation loss, the last one


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is on disk."""


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
    begin = (time.perf_counter() if started is None else started) - run.seconds
    loop = Loop(run, display, begin)
    with _stop_signals() as stop:
        while not loop.finished:
            loop.step()
            if stop.is_set():
                loop.collect()
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
    """The steps of one run, with what they need and nothing that must be saved.

    `begin` is when the time budget began, as if all sittings of the run were one. `pending` are the steps whose loss
    and norm have not been collected, the first of which began at `since`.
    """

    run: Run
    display: Silent
    begin: float
    times: list[float] = field(default_factory=list)
    pending: list[tuple[int, Any, Any]] = field(default_factory=list)
    since: float = 0.0

    def __post_init__(self) -> None:
        config = self.run.config
        self.optimizer = adamw(
            lambda step: learning_rate(step, config, self.run.plan),
            weight_decay=config.weight_decay,
            mask=decay_mask(self.run.params),
        )
        self.gradient = value_and_grad(lm.loss)
        self.run.plan = self.run.plan or given_plan(config)
        if self.run.moments is None:
            self.run.moments = self.optimizer.init(self.run.params)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.run.total is not None and self.run.step >= self.run.total

    def step(self) -> None:
        """Do one step, and what is due after it: collect, make the plan, evaluate, save."""
        run, config = self.run, self.run.config
        if not self.pending:
            self.since = time.perf_counter()
        self._update()
        evaluating, saving = (
            bool(every) and run.step % every == 0 and not self.finished
            for every in (config.eval_every, config.checkpoint_every)
        )
        if evaluating or saving or self.finished or not self._may_wait():
            self.collect()
        if evaluating:
            validation, _ = evaluate(run, EVALUATED)
            run.record(step=run.step, validation_loss=validation)
            self.display.validation({"step": run.step, "validation_loss": validation})
        if saving:
            run.save()

    def _may_wait(self) -> bool:
        """Tell whether the numbers of the last steps may stay on the GPU for now."""
        on_gpu = self.run.config.backend != "numpy" and len(self.times) >= UNTIMED
        return on_gpu and time.perf_counter() - self.since < PATIENCE

    def _update(self) -> None:
        run, config = self.run, self.run.config
        batch = {"batch": config.batch, "seqlen": config.context, "seed": config.seed, "step": run.step}
        x, y = on_backend(config.backend, batch_at(run.corpus.training, **batch))
        key = (config.seed, run.step) if config.dropout else None
        loss, gradients = self.gradient(run.params, run.model, x, y, dropout_key=key)
        factor, norm = clip_factor(gradients, config.clip or math.inf)
        run.params, run.moments = self.optimizer.update(gradients, run.moments, run.params, factor, donate=True)
        run.step += 1
        self.pending.append((run.step, loss, norm))

    def collect(self) -> None:
        """Wait for the steps that were begun, write down and report their numbers, and make the plan if it is due."""
        run, config = self.run, self.run.config
        pending = [(step, _number(loss), _number(norm)) for step, loss, norm in self.pending]
        self.pending.clear()
        if not pending:
            return
        each = (time.perf_counter() - self.since) / len(pending)
        for step, loss, _ in pending:
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} at step {step}; try a smaller --lr than {config.lr:g}")
        self.times += [each] * len(pending)
        started = run.seconds
        run.seconds += each * len(pending)
        for n, (step, loss, norm) in enumerate(pending, 1):
            self._report(step, loss, norm, started + n * each)
        if run.plan is None and is_due(config, run.step, time.perf_counter() - self.begin):
            self._make_plan()

    def _make_plan(self) -> None:
        config, size = self.run.config, len(self.run.corpus.validation)
        each = statistics.fmean(self.times[UNTIMED:] or self.times)
        left = self.begin + (config.budget or math.inf) - time.perf_counter()
        parts = {"validation": min(size, EVALUATED), "last": min(size, FINAL)}
        self.run.plan = settle(config, self.run.step, each, left, **parts)
        self.run.save()

    def _report(self, step: int, loss: float, norm: float, seconds: float) -> None:
        run, config = self.run, self.run.config
        pace = statistics.median(self.times[-50:][min(UNTIMED, len(self.times) - 1) :])
        metrics = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate(step - 1, config, run.plan),
            "gradient_norm": norm,
            "tokens_per_second": config.batch * config.context / pace,
            "seconds": round(seconds, 3),
        }
        run.record(**metrics)
        spent = time.perf_counter() - self.begin
        left, done = (config.budget or 0.0) - spent, spent / (config.budget or math.inf)
        if run.total:
            left, done = (run.total - step) * pace, step / run.total
        self.display.step({**metrics, "total": run.total, "seconds_left": left, "done": done})


def _number(x: Any) -> float:
    """Return an array () as a float; one on a GPU is waited for."""
    return float(on_host(x))


def evaluate(run: Run, most: int = FINAL) -> tuple[float, int]:
    """Return the mean loss on the validation text in nats per token, and the number of tokens predicted.

    The text is cut into windows of the training context, each read from a zero state: the first characters of a
    window are predicted from few others, as in the common benchmarks. Of a text of more than `most` tokens,
    every n-th window is taken, so that a part stands for the whole.
    """
    context, batch = run.config.context, run.config.batch
    inputs, targets = evaluation_windows(run.corpus.validation, context)
    every = max(1, -(-len(inputs) // max(1, most // context)))
    inputs, targets = inputs[::every], targets[::every]
    count, losses = int((targets != IGNORE_INDEX).sum()), []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch], targets[start : start + batch]
        loss = lm.loss(run.params, run.model, *on_backend(run.config.backend, part))
        losses.append((loss, int((part[1] != IGNORE_INDEX).sum())))
    total = 0.0
    for loss, tokens in losses:  # collected at last, so that a GPU is never waited for on the way
        total += _number(loss) * tokens
    return total / count, count
