"""One page about a run: a file that any browser shows, with no network."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fabe_ds.diff import diff_lines
from fabe_ds.errors import UsageError, first_line
from fabe_ds.files import check_file_writable, replacing
from fabe_ds.report.result import read_lines
from fabe_ds.report.run_report import RunReport, read_report
from fabe_ds.run_files import FAILURES, SAMPLES

PAGE = Path(__file__).parent / "page.html.j2"
SHOWN_FAILURES = 50  # of each class
SHOWN_CHARACTERS = 2000
_TOLD = (
    *("record", "file", "line", "state", "failure", "message"),
    *("finish_reason", "prompt_tokens", "completion_tokens"),
)
"""What a failure holds beside the record's own text and the answer to it."""
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 200, 52, 26
FEWEST_PLACES = 8  # for bars


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, and the same as rows of a table for those who cannot see it."""

    title: str
    svg: str
    columns: tuple[str, str]
    rows: list[tuple[str, str]]


def write_page(report: Path, place: Path | None = None) -> Path:
    """The page of a run, from its report (`outputs.run.json`) and the files beside it.

    Raises: UsageError where the report is not one.
    """
    place = place or report.with_name(f"{report.name.removesuffix('.run.json')}.html")
    check_file_writable(place)
    run = read_report(report)
    try:
        page = _page(run, report)
    except UsageError:
        raise
    except Exception as error:  # of files that anything may have been done to
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            f"{report}: not as a run leaves it, or a file beside it is not ({what})"
        ) from None
    with replacing(place) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    return place


def _page(run: RunReport, report: Path) -> str:
    import jinja2

    stem = report.name.removesuffix(".run.json")
    failures, samples = (
        read_lines(path) if (path := report.with_name(f"{stem}.{name}")).exists() else []
        for name in (FAILURES, SAMPLES)
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        name=stem,
        run=run,
        tiles=_tiles(run),
        charts=_charts(run),
        failures=_by_class(failures),
        samples=[
            {**sample, "diff": diff_lines(sample["before"], sample["after"])} for sample in samples
        ],
        settings={
            key: value for key, value in run.config.items() if value not in (None, "", [], {})
        },
    )


def _tiles(run: RunReport) -> list[tuple[str, str]]:
    seconds, loading = max(run.seconds, 1e-9), run.loading
    tiles = [
        ("records", f"{run.records:,}"),
        ("rewritten", f"{run.done:,}"),
        ("from cache", f"{run.cached:,}"),
        ("failed", f"{run.failed:,}"),
        ("skipped", f"{sum(run.skipped.values()):,}"),
        ("time", _duration(seconds)),
        ("records a second", f"{run.records / max(seconds - loading, 1e-9):,.1f}"),
        ("requests", f"{run.requests:,}"),
        *([("refusals", f"{run.refusals:,}")] if run.refusals else []),
        ("prompt tokens", f"{run.prompt_tokens:,}"),
        ("completion tokens", f"{run.completion_tokens:,}"),
    ]
    if run.cost:
        tiles.append(("cost", f"{run.cost:,.2f}"))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{int(rest):02}" if hours or minutes else f"{rest:.1f} s"


def _charts(run: RunReport) -> list[Chart]:
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
    ticks = [(part, _duration(end * part)) for part in (0, 0.25, 0.5, 0.75, 1)]
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


def _by_class(failures: list[dict[str, Any]]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    classes: dict[str, list[dict[str, Any]]] = {}
    for failure in failures:
        classes.setdefault(failure["failure"], []).append(failure)
    order = sorted(classes.items(), key=lambda pair: -len(pair[1]))
    return [
        (kind, len(found), [_shown(failure) for failure in found[:SHOWN_FAILURES]])
        for kind, found in order
    ]


def _shown(failure: dict[str, Any]) -> dict[str, Any]:
    """What the page tells of a failed record: where, message, and (name, text) of what it holds."""
    where = f"{failure['file']}:{failure['line']} " if "file" in failure else ""
    texts = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in failure.items()
        if name not in _TOLD and value is not None
    ]
    return {
        "where": f"{where}(record {failure['record']})" if where else f"record {failure['record']}",
        "message": failure["message"],
        "texts": [(name, text[:SHOWN_CHARACTERS]) for name, text in texts],
    }
