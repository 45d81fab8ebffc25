"""The report: one page that needs nothing else, and charts that say what the numbers say."""

from __future__ import annotations

import html.parser
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.charts import decades, heat_text, loss_chart, short, smooth, spectrum_chart, ticks
from npmamba.report import Report, render, write

finite = st.floats(-1e6, 1e6)


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(0)
    return Report(
        title="a <b> & c",
        facts=[("1.523", "validation loss"), ("463k", "parameters")],
        train=[(s, 4.0 / s + 1) for s in range(1, 200)],
        validation=[(100, 1.5), (199, 1.25)],
        prompt="To be",
        sample=" or <not> to be",
        text=list("To be or\n"),
        delta=rng.uniform(0.01, 0.2, size=(3, 9)),
        time_constants=10 ** rng.normal(1, 1, size=(3, 64)),
        context=128,
        command="npmamba train 'my text.txt'",
        settings={"d_model": 128, "dropout": 0.0},
        machine={"numpy": "2.4.6"},
    )


class Tags(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects what could load something."""

    void = {"meta", "input", "line", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_is_balanced_and_loads_nothing(report):
    page, tags = render(report), Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_page_has_all_its_parts(report):
    page = render(report)
    for part in (
        "1.523",
        "463k",
        "<h2>Loss</h2>",
        "<h2>Sample</h2>",
        "<h2>Selectivity</h2>",
        "<h2>Memory</h2>",
    ):
        assert part in page
    for part in ("<h2>Settings</h2>", "<h2>Machine</h2>", "2.4.6", "prefers-color-scheme:dark", "viewport"):
        assert part in page
    assert "npmamba train &#x27;my text.txt&#x27;" in page
    assert page.count("<svg") == 3


def test_text_is_shown_and_never_becomes_markup(report):
    page = render(report)
    assert "a &lt;b&gt; &amp; c" in page
    assert "<mark>To be</mark> or &lt;not&gt; to be" in page
    assert "<not>" not in page


def test_a_report_without_its_parts_is_still_a_page():
    page, tags = render(Report("empty")), Tags()
    tags.feed(page)
    assert tags.open == []
    assert "<h2>" not in page


def test_writing_replaces_the_whole_file(tmp_path, report):
    path = tmp_path / "report.html"
    path.write_text("x" * 10**6)
    assert write(path, report).read_text(encoding="utf-8") == render(report)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, span):
    marks = ticks(low, low + span)
    assert 2 <= len(marks) <= 8
    assert all(low - 1e-6 * span <= v <= low + span + 1e-6 * span for v in marks)
    gaps = np.diff(marks)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)
    assert f"{gaps[0]:.0e}"[0] in "125"


@given(st.integers(-6, 3), st.integers(1, 6))
def test_decades_are_the_powers_of_ten_inside(first, count):
    assert decades(10.0**first, 10.0 ** (first + count)) == [10.0**k for k in range(first, first + count + 1)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_smoothing_keeps_constants_and_stays_between_the_extremes(seed, size):
    values = np.random.default_rng(seed).normal(size=size)
    out = smooth(values)
    assert (out >= values.min() - 1e-12).all()
    assert (out <= values.max() + 1e-12).all()
    np.testing.assert_allclose(smooth(np.full(size, 3.0)), 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (0.01234, "0.0123"),
        (1500, "1,500"),
        (20_000, "20k"),
        (463_000, "463k"),
        (2.5e6, "2.5M"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def coordinates(svg: str, kind: str) -> np.ndarray:
    (path,) = re.findall(rf'd="M([^"]*?)Z?" class="{kind}"', svg)
    return np.array([[float(v) for v in point.split(",")] for point in path.split("L")])


@pytest.mark.parametrize("log", [False, True])
def test_the_loss_curve_falls_where_the_loss_falls(log):
    svg = loss_chart([(s, 5.0 - 0.01 * s) for s in range(1, 300)], [(100, 4.0), (299, 2.0)], log=log)
    raw, validation = coordinates(svg, "raw"), coordinates(svg, "validation")
    assert (np.diff(raw[:, 0]) >= 0).all()
    assert (np.diff(raw[:, 1]) >= 0).all()  # y grows downwards
    assert ((raw >= 0) & (raw <= [720, 320])).all()
    assert validation[1, 1] > validation[0, 1]
    assert "step 299: validation loss 2.0000" in svg


def test_losses_that_are_not_finite_are_left_out():
    svg = loss_chart([(1, 2.0), (2, float("nan")), (3, float("inf"))], [])
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)]])
def test_short_runs_have_a_chart(points):
    assert loss_chart(points, points, log=True).startswith("<svg")


def test_the_spectrum_peaks_at_the_time_constants():
    taus = np.stack([np.full(50, 3.0), np.full(50, 300.0)])
    svg = spectrum_chart(taus, context=64)
    assert "median 3<" in svg
    assert "median 300<" in svg
    assert "context 64" in svg
    first, second = (
        np.array([[float(v) for v in point.split(",")] for point in path.split("L")])
        for path in re.findall(r'd="M([^"]*)Z" class="ridge"', svg)
    )
    assert first[first[:, 1].argmin(), 0] < second[second[:, 1].argmin(), 0]


def test_equal_time_constants_at_a_power_of_ten_have_a_chart():
    assert "layer 1" in spectrum_chart(np.full((1, 4), 10.0), context=10)


def test_cells_carry_layer_character_and_value():
    delta = np.array([[0.1, 0.2], [0.4, 0.3]])
    text = heat_text(["a", "\n"], delta)
    assert 'title="layer 1 · &#x27;a&#x27; · Δ = 0.1000"' in text
    assert "↵" in text
    assert re.findall(r"--v:([\d.]+)", text) == ["0.00", "1.00", "1.00", "0.00"]
