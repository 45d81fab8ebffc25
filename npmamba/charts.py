"""Charts as plain SVG text: no plotting library, no script, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 56, 18, 14, 48
Points = Sequence[tuple[float, float]]


def _svg(height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def _path(points: Points, kind: str, close: bool = False) -> str:
    if not points:
        return ""
    steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path d="M{steps}{"Z" if close else ""}" class="{kind}"/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    Examples
    --------
    >>> ticks(1.37, 4.2)
    [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    gap = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count * 1.25)
    first = math.ceil(low / gap - 1e-9)
    return [round(k * gap, 12) for k in range(first, math.floor(high / gap + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return the powers of ten inside [low, high]."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**k for k in range(first, last + 1)]


def short(value: float) -> str:
    """Write a number in few characters: 1500 -> '1,500', 20000 -> '20k', 0.0123 -> '0.0123'."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def smooth(values: NDArray[np.float64], window: int = 20) -> NDArray[np.float64]:
    """Return the moving average over about `window` values, fewer at the start, where losses fall fast."""
    average, out = 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        average += (value - average) / min(1 + i / 8, window)
        out[i] = average
    return out


def _thin(points: Points, most: int = 1200) -> Points:
    return points[:: max(1, math.ceil(len(points) / most))]


def _axes(
    x: Callable[[float], float], y: Callable[[float], float], xs: list[float], ys: list[float], height: float
) -> list[str]:
    floor = height - BOTTOM
    out = [_line(LEFT, y(v), WIDTH - RIGHT, y(v), "grid") for v in ys]
    out += [_text(LEFT - 9, y(v) + 4, f"{v:g}", "tick", "end") for v in ys]
    out += [_line(x(v), floor, x(v), floor + 5, "axis") for v in xs]
    out += [_text(x(v), floor + 20, short(v), "tick") for v in xs]
    return [*out, _line(LEFT, floor, WIDTH - RIGHT, floor, "axis")]


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    f = math.log10 if log else float
    a, b = f(low), f(high)
    span = (b - a) or 1.0
    return lambda v: start + (f(v) - a) / span * (end - start)


def loss_chart(train: Points, validation: Points, *, log: bool = False, height: float = 320) -> str:
    """Draw training and validation loss over steps; with `log`, steps on a logarithmic axis.

    Parameters
    ----------
    train, validation : sequence of (step, loss)
        Steps count from 1. Losses that are not finite are left out.
    """
    train = [p for p in train if math.isfinite(p[1])]
    validation = [p for p in validation if math.isfinite(p[1])]
    both = [*train, *validation] or [(1, 0.0)]
    losses = [loss for _, loss in both]
    low, high = min(losses), max(losses)
    pad = 0.05 * (high - low) or 0.5
    y = _scale(low - pad, high + pad, height - BOTTOM, TOP)
    last = max(2.0, max(step for step, _ in both))
    x = _scale(1, last, LEFT + 6, WIDTH - RIGHT - 6, log)
    xs = decades(1, last) if log else [v for v in ticks(1, last) if v >= 1]
    body = _axes(x, y, xs, ticks(low - pad, high + pad), height)
    average = smooth(np.array([loss for _, loss in train]))
    smoothed = [(step, float(a)) for (step, _), a in zip(train, average, strict=True)]
    body.append(_path([(x(s), y(v)) for s, v in _thin(train)], "raw"))
    body.append(_path([(x(s), y(v)) for s, v in _thin(smoothed)], "train"))
    body.append(_path([(x(s), y(v)) for s, v in validation], "validation"))
    body += [
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.6" class="dot">'
        f"<title>step {s:,.0f}: validation loss {v:.4f}</title></circle>"
        for s, v in validation
    ]
    if validation:
        step, loss = validation[-1]
        body.append(_text(x(step), y(loss) - 12, f"{loss:.3f}", "label final", "end"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, "step", "label"))
    return _svg(height, body, "training and validation loss over steps")


def spectrum_chart(taus: NDArray[np.floating], *, context: int, row: float = 58) -> str:
    """Draw, for each layer, how many states have which time constant (in characters, logarithmic axis).

    Parameters
    ----------
    taus : array (layers, states)
        Positive time constants.
    context : int
        Length of the training windows, marked by a line.
    """
    layers = taus.shape[0]
    low, high = 10 ** math.floor(np.log10(taus.min())), 10 ** math.ceil(np.log10(taus.max()) + 1e-9)
    height = TOP + 16 + row * layers + BOTTOM
    x = _scale(low, high, LEFT + 30, WIDTH - RIGHT - 6, log=True)
    edges = np.linspace(np.log10(low), np.log10(high), 97)
    counts = np.array([np.histogram(np.log10(layer), edges)[0] for layer in taus], dtype=float)
    kernel = np.exp(-0.5 * np.linspace(-2.5, 2.5, 9) ** 2)
    curves = [np.convolve(c, kernel / kernel.sum(), mode="same") for c in counts]
    tallest = max(float(c.max()) for c in curves) or 1.0
    body = _axes(x, float, decades(low, high), [], height)
    body += [_line(x(v), TOP + 8, x(v), height - BOTTOM, "grid") for v in decades(low, high)]
    centres = 10 ** ((edges[1:] + edges[:-1]) / 2)
    for i, curve in enumerate(curves):
        floor = TOP + 16 + row * (i + 1)
        ridge = [(x(c), floor - v / tallest * row * 1.15) for c, v in zip(centres, curve, strict=True)]
        body.append(_path([(ridge[0][0], floor), *ridge, (ridge[-1][0], floor)], "ridge", close=True))
        middle = float(np.median(taus[i]))
        body.append(_line(x(middle), floor - 9, x(middle), floor, "median"))
        body.append(_text(LEFT + 18, floor - 5, f"layer {i + 1}", "label", "end"))
        body.append(_text(WIDTH - RIGHT - 6, floor - 5, f"median {short(middle)}", "tick", "end"))
    if low <= context <= high:
        body.append(_line(x(context), TOP, x(context), height - BOTTOM, "mark"))
        body.append(_text(x(context) + 6, TOP + 8, f"context {context}", "tick", "start"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, "time constant in characters", "label"))
    return _svg(height, body, "distribution of time constants in each layer")


def heat_text(text: Sequence[str], delta: NDArray[np.floating]) -> str:
    """Set characters in a row, each over a column of cells: one per layer, the stronger the larger Delta.

    Parameters
    ----------
    text : sequence of seqlen strings
        One label per position.
    delta : array (layers, seqlen)
        Each layer is scaled between its own smallest and largest value.
    """
    low, high = delta.min(axis=1, keepdims=True), delta.max(axis=1, keepdims=True)
    shade = (delta - low) / np.where(high > low, high - low, 1.0)
    columns = []
    for t, label in enumerate(text):
        shown = {"\n": "↵", "\t": "→", " ": "\u00a0"}.get(label, label)
        cells = "".join(
            f'<i style="--v:{shade[n, t]:.2f}" title="layer {n + 1} · {html.escape(repr(label))}'
            f' · Δ = {delta[n, t]:.4f}"></i>'
            for n in range(delta.shape[0])
        )
        columns.append(f"<span><b>{html.escape(shown)}</b>{cells}</span>")
    return f'<div class="heat">{"".join(columns)}</div>'
