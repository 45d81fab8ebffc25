"""The report of a training run: one HTML file that needs nothing else, in light and dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npmamba.charts import Points, heat_text, loss_chart, short, spectrum_chart
from npmamba.files import atomic_write
from npmamba.report_style import SCRIPT, STYLE


@dataclass
class Report:
    """What a report shows; empty parts are left out.

    Parameters
    ----------
    title : str
    facts : sequence of (value, label)
        The numbers that matter, in large type.
    train, validation : sequence of (step, loss)
    prompt, sample : str
        The text given and the text that the model wrote after it.
    text : sequence of seqlen strings
        The characters that `delta` belongs to.
    delta : array (layers, seqlen)
        Mean Delta over channels, see `npmamba.inspect.selectivity`.
    time_constants : array (layers, states)
        See `npmamba.inspect.time_constants`.
    context : int
        Length of the training windows.
    command : str
        How to get this run again.
    settings, machine : mapping
        Rows of the two tables.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    train: Points = ()
    validation: Points = ()
    prompt: str = ""
    sample: str = ""
    text: Sequence[str] = ()
    delta: NDArray[np.floating] | None = None
    time_constants: NDArray[np.floating] | None = None
    context: int = 0
    command: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)


def render(report: Report) -> str:
    """Return the report as one HTML page.

    Examples
    --------
    >>> page = render(Report("tiny", facts=[("1.52", "validation loss")]))
    >>> "1.52" in page and "http" not in page
    True
    """
    sections = (_header, _loss, _sample, _selectivity, _spectrum, _tables)
    body = "".join(section(report) for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(report.title)} · npmamba</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def write(path: str | Path, report: Report) -> Path:
    """Write the report to `path`, whole or not at all, and return the path."""
    with atomic_write(path) as put:
        put(render(report).encode())
    return Path(path)


def _section(title: str, caption: str, body: str, extra: str = "") -> str:
    return f"<section><h2>{title}</h2>{extra}<p class=caption>{caption}</p>{body}</section>"


def _header(report: Report) -> str:
    tiles = "".join(
        f"<div><strong>{html.escape(value)}</strong><span>{html.escape(label)}</span></div>"
        for value, label in report.facts
    )
    title = f"<p class=brand>npmamba</p><h1>{html.escape(report.title)}</h1>"
    return f"<header>{title}<div class=facts>{tiles}</div></header>"


def _loss(report: Report) -> str:
    if not report.train and not report.validation:
        return ""
    switch = (
        '<input type="radio" name="scale" id="lin" checked><label for="lin">linear</label>'
        '<input type="radio" name="scale" id="log"><label for="log">logarithmic</label>'
    )
    charts = "".join(
        f"<figure class={name}>{loss_chart(report.train, report.validation, log=name == 'log')}</figure>"
        for name in ("lin", "log")
    )
    caption = (
        "Mean negative log-probability of the next character, in nats. "
        "<em class=k-train>Training</em> (thin: each step, thick: moving average) and "
        "<em class=k-validation>validation</em> on text the model never trained on."
    )
    return f"<section class=loss><h2>Loss</h2>{switch}<p class=caption>{caption}</p>{charts}</section>"


def _sample(report: Report) -> str:
    if not report.sample:
        return ""
    text = f"<mark>{html.escape(report.prompt)}</mark>{html.escape(report.sample)}"
    return _section(
        "Sample", "The marked text was given; the model wrote the rest.", f"<pre class=sample>{text}</pre>"
    )


def _selectivity(report: Report) -> str:
    if report.delta is None or not len(report.text):
        return ""
    layers = report.delta.shape[0]
    ranges = "".join(
        f"<li><b>layer {i + 1}</b> {row.min():.3g} – {row.max():.3g}</li>"
        for i, row in enumerate(report.delta)
    )
    caption = (
        f"Each character stands over {layers} cells, layer 1 on top: the step size Δ that the layer chose "
        "there, averaged over its channels. A strong cell lets the character in and forgets what came "
        "before; a faint one passes it by and keeps the state. Point at a cell for its value."
    )
    ramp = "".join(f'<i style="--v:{v}"></i>' for v in (0, 0.25, 0.5, 0.75, 1))
    scale = f"<ul class=ranges><li class=ramp>{ramp} small to large Δ</li>{ranges}</ul>"
    return _section("Selectivity", caption, heat_text(report.text, report.delta) + scale)


def _spectrum(report: Report) -> str:
    if report.time_constants is None:
        return ""
    caption = (
        "Left to itself, a state decays by the factor e in 1/(Δ·|A|) characters. How many states of each "
        "layer have which time constant, at the mean Δ of their channel: short ones see letters, long ones "
        "words and beyond."
    )
    chart = spectrum_chart(report.time_constants, context=report.context)
    return _section("Memory", caption, f"<figure>{chart}</figure>")


def _rows(title: str, rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_show(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<div><h2>{title}</h2><table>{cells}</table></div>"


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return short(value) if abs(value) >= 1e4 else f"{value:g}"


def _tables(report: Report) -> str:
    command = (
        f"<h2>Run it again</h2><pre class=command>{html.escape(report.command)}</pre>"
        if report.command
        else ""
    )
    tables = _rows("Settings", report.settings) + _rows("Machine", report.machine)
    return f"<section><div class=tables>{tables}</div>{command}</section>"
