"""What a training run says while it goes: live with rich on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

BARS = "▁▂▃▄▅▆▇█"


class Silent:
    """Says nothing; the others have the same four methods."""

    def note(self, text: str) -> None:
        """Show one line that stays."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take the figures of one training step: step, total, done, loss, tokens_per_second, seconds_left."""

    def validation(self, metrics: Mapping[str, Any]) -> None:
        """Take a validation loss: step, validation_loss."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Plain(Silent):
    """One line every few seconds, for files and pipes.

    Parameters
    ----------
    out : text stream
    every : float
        Least number of seconds between two lines.
    """

    def __init__(self, out: TextIO | None = None, every: float = 5.0) -> None:
        self.out = out or sys.stderr
        self.every, self.last = every, -math.inf

    def note(self, text: str) -> None:
        """Write the line."""
        self.out.write(text + "\n")
        self.out.flush()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Write a line if the last one is long enough ago, or this step is the last."""
        now = time.monotonic()
        if now - self.last >= self.every or metrics["step"] == metrics["total"]:
            self.last = now
            self.note(describe(metrics))

    def validation(self, metrics: Mapping[str, Any]) -> None:
        """Write a line."""
        self.note(f"step {metrics['step']}: validation loss {metrics['validation_loss']:.4f}")


class Live(Silent):
    """A bar, the loss as a small curve, speed and time left, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.console = Console(stderr=True, highlight=False)
        self.live = RichLive(console=self.console, refresh_per_second=8, transient=True)
        self.losses: list[float] = []
        self.validated: float | None = None
        self.live.start()

    def note(self, text: str) -> None:
        """Print the line above the live part."""
        self.console.print(text, markup=False)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Redraw."""
        self.losses.append(metrics["loss"])
        self.live.update(self._draw(metrics))

    def validation(self, metrics: Mapping[str, Any]) -> None:
        """Remember the validation loss for the next drawing."""
        self.validated = metrics["validation_loss"]

    def close(self) -> None:
        """Stop drawing."""
        self.live.stop()

    def _draw(self, metrics: Mapping[str, Any]) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        total = metrics["total"]
        head = Table.grid(padding=(0, 2))
        of = f"step {metrics['step']:,}" + (f" of {total:,}" if total else "")
        head.add_row(ProgressBar(1.0, metrics["done"], width=40), of, left(metrics))
        body = Table.grid(padding=(0, 2))
        body.add_row(
            Text("loss", style="dim"),
            Text(f"{metrics['loss']:.4f}", style="bold cyan"),
            Text(spark(self.losses), style="cyan"),
        )
        if self.validated is not None:
            body.add_row(Text("validation", style="dim"), Text(f"{self.validated:.4f}", style="bold yellow"))
        body.add_row(Text("speed", style="dim"), Text(f"{metrics['tokens_per_second']:,.0f} tokens/s"))
        return Group(head, body)


class NoticeHandler(logging.Handler):
    """Shows what the library logs (such as "compiling kernels") in the display in use."""

    def __init__(self, display: Silent) -> None:
        super().__init__(logging.INFO)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show the message."""
        self.display.note(record.getMessage())


def describe(metrics: Mapping[str, Any]) -> str:
    """Put the figures of a step in one line.

    Examples
    --------
    >>> describe({"step": 20, "total": 80, "loss": 2.5, "tokens_per_second": 31000.4, "seconds_left": 61})
    'step 20 of 80: loss 2.5000, 31,000 tokens/s, 1:01 left'
    """
    of = f" of {metrics['total']}" if metrics["total"] else ""
    parts = [f"loss {metrics['loss']:.4f}", f"{metrics['tokens_per_second']:,.0f} tokens/s", left(metrics)]
    return f"step {metrics['step']}{of}: " + ", ".join(part for part in parts if part)


def left(metrics: Mapping[str, Any]) -> str:
    """Say how much time is left, if that is known."""
    seconds = metrics.get("seconds_left")
    return "" if seconds is None else f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """Write a duration: 61 -> '1:01', 3725 -> '1:02:05'."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def spark(values: list[float], width: int = 48) -> str:
    """Draw a curve in one line of text, its newest point at the right end.

    Examples
    --------
    >>> spark([4.0, 3.0, 2.0, 1.0])
    '█▆▃▁'
    """
    size = max(1, math.ceil(len(values) / width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    means = [m for m in means if math.isfinite(m)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join(BARS[round((m - low) / span * (len(BARS) - 1))] for m in means)


def choose(*, quiet: bool, stream: TextIO | None = None) -> Silent:
    """Return the display that fits: none if `quiet`, live on a terminal that has rich, else plain lines."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    if stream.isatty():
        try:
            return Live()
        except ImportError:
            pass
    return Plain(stream)


@contextlib.contextmanager
def shown(*, quiet: bool = False) -> Iterator[Silent]:
    """Use a display for a while; it also shows what the library logs, such as that kernels are being compiled."""
    display, log = choose(quiet=quiet), logging.getLogger("npmamba")
    handler, level = NoticeHandler(display), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield display
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        display.close()
