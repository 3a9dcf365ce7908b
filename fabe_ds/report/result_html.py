"""The result of a run as a notebook shows it."""

from __future__ import annotations

import contextlib
import html
import json
from itertools import islice

from fabe_ds.diff import diff_lines
from fabe_ds.errors import UsageError
from fabe_ds.report.live import in_place
from fabe_ds.report.notebook import diff_html, link_html, table_html
from fabe_ds.report.result import RunResult, read_lines
from fabe_ds.report.run_report import read_report
from fabe_ds.report.summary import Style, facts, place_of_failure
from fabe_ds.run_files import SAMPLES, of_report

COLOURS: dict[Style, str] = {
    "good": "color:#1a7f37",
    "known": "color:#0a6c74",
    "bad": "color:#c0392b",
    "advice": "color:#9a6700",
    "quiet": "opacity:.7",
    "plain": "",
}
SHOWN_SAMPLES, SHOWN_FAILURES, SHOWN_LINES = 3, 5, 30


def result_html(result: RunResult) -> str:
    """Counts, failures with what helps, a few records before and after, and links."""
    tokens, compared = 0, True
    samples: list[dict[str, str]] = []
    if result.report is not None:
        try:
            config = read_report(result.report).config
            tokens, compared = config["max_new_tokens"], in_place(config)
            path = of_report(result.report, SAMPLES)
            samples = read_lines(path) if path.exists() else []
        except UsageError:  # gone, or damaged since; the counts are still here
            samples = []
    rows = [
        (fact.name, f'<span style="{COLOURS[fact.style]}">{_linked(fact.name, fact.text, result)}')
        for fact in facts(result, tokens)
    ]
    parts = [f"<b>{result.records:,} records</b>", table_html((n, f"{v}</span>") for n, v in rows)]
    # What anything may have been done to since.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        parts += _failures(result)
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        for sample in islice(_spread(samples), SHOWN_SAMPLES):
            lines = diff_lines(sample["before"], sample["after"], compared)
            parts.append(diff_html(sample["where"], lines[:SHOWN_LINES]))
    return f"<div>{''.join(parts)}</div>"


def _spread(samples: list[dict[str, str]]) -> list[dict[str, str]]:
    return samples[:: max(1, len(samples) // SHOWN_SAMPLES)]


def _linked(name: str, text: str, result: RunResult) -> str:
    files = {"failures": result.failures_file, "report": result.report}
    if name == "written" and len(result.outputs) == 1:
        files["written"] = result.outputs[0]
    place = files.get(name)
    return html.escape(text) if place is None else link_html(place, text)


def _failures(result: RunResult) -> list[str]:
    if result.failures_file is None or not result.failures_file.exists():
        return []
    with result.failures_file.open(encoding="utf-8") as lines:
        shown = [json.loads(line) for line in islice(lines, SHOWN_FAILURES)]
    rows = [(place_of_failure(each), html.escape(str(each["message"]))) for each in shown]
    more = result.failed - len(shown)
    behind = f"<div>and {more:,} more</div>" if more > 0 else ""
    return [f"<details><summary>What failed</summary>{table_html(rows)}{behind}</details>"]
