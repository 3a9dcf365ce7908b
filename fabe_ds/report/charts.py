"""Charts of a run, as SVG."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from fabe_ds.report.run_report import RunReport
from fabe_ds.text import duration

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 200, 52, 26
FEWEST_PLACES = 8  # for bars


class Chart(NamedTuple):
    """A picture, and the same as rows of a table for those who cannot see it."""

    title: str
    svg: str
    columns: tuple[str, str]
    rows: list[tuple[str, str]]


def charts_of(run: RunReport) -> list[Chart]:
    """The charts of a run, as far as there is something to draw."""
    charts = []
    points = run.history
    rates = [
        (b[0], (b[1] - a[1]) / (b[0] - a[0])) for a, b in pairwise(_spaced(points)) if b[0] > a[0]
    ]
    if len(rates) > 1:
        rows = [(f"{moment:.1f} s", f"{rate:.1f}") for moment, rate in rates]
        title = "Throughput, records a second"
        charts.append(Chart(title, _line(rates, title), ("time", "records a second"), rows))
    charts += _flow_charts(points)
    for title, counts, edge, unit in (
        ("Latency of an answer", "latency", lambda n: 2 ** (n / 4), _seconds),
        ("Prompt tokens of a record", "prompt_tokens_each", _whole, "{:,}".format),
        ("Completion tokens of a record", "completion_tokens_each", _whole, "{:,}".format),
    ):
        if bars := [(unit(at), count) for at, count in _buckets(getattr(run, counts), edge)]:
            rows = [(f"up to {at}", f"{count:,}") for at, count in bars]
            charts.append(Chart(title, _bars(bars, title), ("size", "records"), rows))
    return charts


def _flow_charts(points: Sequence[Sequence[float]]) -> list[Chart]:
    """How many requests were in flight, and how many the server refused, over a run's time."""
    if not points or len(points[0]) < 7 or not any(point[4] for point in points):
        return []
    charts = []
    spaced = _spaced(points)
    for title, column, name in (
        ("Requests that may be in flight", 4, "limit"),
        ("Requests in flight", 5, "in flight"),
    ):
        values = [(point[0], point[column]) for point in spaced]
        rows = [(f"{moment:.1f} s", f"{value:g}") for moment, value in values]
        charts.append(Chart(title, _line(values, title), ("time", name), rows))
    refusals = [(b[0], (b[6] - a[6]) / (b[0] - a[0])) for a, b in pairwise(spaced) if b[0] > a[0]]
    if any(rate for _, rate in refusals):
        title = "Refusals (too much at once), a second"
        rows = [(f"{moment:.1f} s", f"{rate:.2f}") for moment, rate in refusals]
        charts.append(Chart(title, _line(refusals, title), ("time", "refusals a second"), rows))
    return charts


def _whole(step: int) -> int:
    return math.floor(2 ** (step / 4))


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:,.2g} s"


def _spaced(points: Sequence[Sequence[float]], most: int = 80) -> list[Sequence[float]]:
    return list(points[:: max(1, math.ceil(len(points) / most))])


def _buckets(steps: dict[int, int], edge: Callable[[int], float]) -> list[tuple[float, int]]:
    """Counts by the largest size that each holds, from the least to the most, empty ones too."""
    if not steps:
        return []
    buckets: Counter[float] = Counter()
    for step in range(min(steps), max(steps) + 1):
        buckets[edge(step)] += steps.get(step, 0)
    return list(buckets.items())


def _frame(title: str, most: float, inner: str, ticks: list[tuple[float, str]]) -> str:
    """An SVG with axes: `ticks` are places on the lower one, in parts of its length."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for step in range(3):
        y = _y(most * step / 2, most)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{most * step / 2:,.3g}" if most < 1000 else f"{most * step / 2:,.0f}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="left">{label}</text>')
    parts.append(inner)
    for place, label in ticks:
        x = LEFT + place * (WIDTH - LEFT)
        anchor = "end" if place > 0.95 else "middle" if place > 0.05 else "start"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    return "".join([*parts, "</svg>"])


def _y(value: float, most: float) -> float:
    return 10 + (HEIGHT - BOTTOM - 10) * (1 - value / (most or 1))


def _line(points: list[tuple[float, float]], title: str) -> str:
    end, most = points[-1][0], max(rate for _, rate in points)
    places = [
        f"{LEFT + moment / end * (WIDTH - LEFT):.1f},{_y(rate, most):.1f}"
        for moment, rate in points
    ]
    base = _y(0, most)
    area = f'<polygon class="area" points="{LEFT},{base} {" ".join(places)} {WIDTH},{base}"/>'
    line = f'<polyline class="line" points="{" ".join(places)}"/>'
    ticks = [(part, duration(end * part)) for part in (0, 0.25, 0.5, 0.75, 1)]
    return _frame(title, most, area + line, ticks)


def _bars(bars: list[tuple[str, int]], title: str) -> str:
    most = max(count for _, count in bars)
    places = max(len(bars), FEWEST_PLACES)  # a few bars are not made to fill the picture
    wide = (WIDTH - LEFT) / places
    drawn = [
        f'<rect class="bar" x="{LEFT + n * wide + 1:.1f}" width="{max(1, wide - 2):.1f}" rx="2" '
        f'y="{_y(count, most):.1f}" height="{_y(0, most) - _y(count, most):.1f}">'
        f"<title>up to {edge}: {count:,}</title></rect>"
        for n, (edge, count) in enumerate(bars)
    ]
    every = math.ceil(len(bars) / 8)
    ticks = [((n + 0.5) / places, edge) for n, (edge, _) in enumerate(bars) if n % every == 0]
    return _frame(title, most, "".join(drawn), ticks)
