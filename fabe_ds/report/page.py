"""One page about a run: a file that any browser shows, with no network."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from fabe_ds.diff import Line, answered_lines, diff_words
from fabe_ds.errors import UsageError, first_line
from fabe_ds.files import check_file_writable, replacing
from fabe_ds.report.advice import HELPS
from fabe_ds.report.charts import charts_of
from fabe_ds.report.live import about, in_place
from fabe_ds.report.result import read_lines
from fabe_ds.report.run_report import RunReport, read_report
from fabe_ds.report.summary import place_of_failure
from fabe_ds.run_files import FAILURES, SAMPLES, of_report
from fabe_ds.text import duration, encodable_value

FOLDER = Path(__file__).parent
SHOWN_FAILURES, SHOWN_CHARACTERS = 50, 2000
"""Of each class; of each text of a failure."""
FAILURE_BYTES, SAMPLE_BYTES = 800_000, 1_600_000
"""Most that failures and samples take of a page, which stays below 3 MB with its charts."""
_TOLD = (
    *("record", "file", "line", "state", "failure", "message"),
    *("finish_reason", "prompt_tokens", "completion_tokens"),
)
"""What a failure holds beside the record's own text and the answer to it."""


def write_page(report: Path, place: Path | None = None) -> Path:
    """The page of a run, from its report (`outputs.run.json`) and the files beside it.

    Raises: UsageError where the report is not one.
    """
    place = place or of_report(report, "html")
    check_file_writable(place)
    page = page_of(page_data(report))
    with replacing(place) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    return place


def page_of(data: Mapping[str, Any] | None) -> str:
    """The page that shows this, or, of None, asks a server for it, again and again."""
    shown = json.dumps(encodable_value(data), ensure_ascii=False, separators=(",", ":"))
    # Nothing in a script's text ends the script, or begins a comment, but these.
    shown = shown.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace(f"/* {name} */", (FOLDER / name).read_text(encoding="utf-8"))
    return page.replace("/* data */", shown)


def page_data(report: Path) -> dict[str, Any]:
    """What the page of a finished run shows. Raises: UsageError."""
    run = read_report(report)
    try:
        return _data(run, report)
    except UsageError:
        raise
    except Exception as error:  # of files that anything may have been done to
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            f"{report}: not as a run leaves it, or a file beside it is not ({what})"
        ) from None


def _data(run: RunReport, report: Path) -> dict[str, Any]:
    failures, samples = (
        read_lines(path) if (path := of_report(report, name)).exists() else []
        for name in (FAILURES, SAMPLES)
    )
    settings = {key: value for key, value in run.config.items() if value not in (None, "", [], {})}
    classes = Counter(failure["failure"] for failure in failures)
    return {
        "name": report.name.removesuffix(".run.json"),
        "about": f"{about(run.config)}; {run.ended}, fabe-ds {run.fabe_ds}",
        "state": "finished",
        "in_place": in_place(run.config),
        "tiles": tiles(run),
        "notes": run.notes,
        "charts": charts_of(run),
        "classes": classes_told(classes),
        "failures": _shown_failures(failures, run),
        "samples": samples_shown(samples, in_place(run.config)),
        "settings": [(key, _told(value)) for key, value in settings.items()],
    }


def tiles(run: RunReport) -> list[tuple[str, str]]:
    """The counts of a run: (name, number)."""
    seconds = max(run.seconds, 1e-9)
    shown = [
        ("records", f"{run.records:,}"),
        ("rewritten", f"{run.done:,}"),
        ("from cache", f"{run.cached:,}"),
        ("failed", f"{run.failed:,}"),
        ("skipped", f"{sum(run.skipped.values()):,}"),
        ("time", duration(seconds)),
        ("records a second", f"{run.records / max(seconds - run.loading, 1e-9):,.1f}"),
        ("requests", f"{run.requests:,}"),
        *([("refusals", f"{run.refusals:,}")] if run.refusals else []),
        ("prompt tokens", f"{run.prompt_tokens:,}"),
        ("completion tokens", f"{run.completion_tokens:,}"),
    ]
    if run.cost:
        shown.append(("cost", f"{run.cost:,.2f}"))
    return shown


def classes_told(classes: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """Classes of failures, the most frequent first: (name, records, what helps)."""
    order = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(kind, count, HELPS.get(kind, "run the same command again")) for kind, count in order]


def samples_shown(samples: Iterable[Mapping[str, str]], in_place: bool) -> list[dict[str, Any]]:
    """Records before and after: as many, evenly spaced, as there is room for. `in_place`: answers
    took the place of the texts, and are compared with them word by word."""
    shown = [_sample(each["where"], each["before"], each["after"], in_place) for each in samples]
    size = sum(map(_size, shown))
    return shown[:: -(-size // SAMPLE_BYTES) or 1]


def _sample(where: str, before: str, after: str, in_place: bool) -> dict[str, Any]:
    lines = diff_words(before, after) if in_place else answered_lines(before, after)
    change = len(after) - len(before) if in_place else len(after)
    return {
        "where": where,
        "change": change,
        "size": f"{change:+,} characters" if in_place else f"{change:,} characters",
        "lines": [_packed(line) for line in lines],
    }


def _packed(line: Line) -> tuple[str, list[str | list[str]]]:
    """A line as the page reads it: its kind's first letter, and its pieces, those that changed as
    lists of one."""
    return line.kind[0], [[text] if changed else text for changed, text in line.pieces]


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _shown_failures(failures: list[dict[str, Any]], run: RunReport) -> list[dict[str, Any]]:
    """Some failures of each class, the classes in turns, as far as there is room; by their places
    in the input."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for failure in failures:
        kept = by_class.setdefault(failure["failure"], [])
        if len(kept) < SHOWN_FAILURES:
            kept.append(failure)
    turns = [failure for each in zip_longest(*by_class.values()) for failure in each if failure]
    lines = _input_lines(turns, run)
    chosen, room = [], FAILURE_BYTES
    for failure in turns:
        shown = _shown(failure, lines.get(_place(failure)) or _field_alone(failure, run))
        room -= _size(shown)
        if room < 0:
            break
        chosen.append((failure["record"], shown))
    return [shown for _, shown in sorted(chosen, key=lambda pair: pair[0])]


def _shown(failure: Mapping[str, Any], record: str) -> dict[str, Any]:
    """What the page tells of a failed record; `record` is an input of it alone."""
    texts = [
        (name, _told(value)[:SHOWN_CHARACTERS])
        for name, value in failure.items()
        if name not in _TOLD and value is not None
    ]
    return {
        "kind": failure["failure"],
        "where": place_of_failure(failure) if "file" in failure else f"record {failure['record']}",
        "message": failure["message"],
        "texts": texts,
        "input": record,
    }


def _place(failure: Mapping[str, Any]) -> tuple[str, int]:
    return str(failure.get("file", "")), int(failure.get("line") or 0)


def _input_lines(failures: list[dict[str, Any]], run: RunReport) -> dict[tuple[str, int], str]:
    """The lines of JSON-lines files that failed records stand in, as they are there now."""
    wanted: dict[str, set[int]] = {}
    for file, line in map(_place, failures):
        if line and Path(file).suffix in (".jsonl", ".ndjson"):
            wanted.setdefault(file, set()).add(line)
    found = {}
    for file, numbers in wanted.items():
        path = Path(run.input) / file if Path(run.input).is_dir() else Path(run.input)
        with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as lines:
            for at, text in enumerate(islice(lines, max(numbers)), 1):
                # What is long would be most of the page; the file has it.
                if at in numbers and len(text) <= 2 * SHOWN_CHARACTERS:
                    found[file, at] = text.strip()
    return found


def _field_alone(failure: Mapping[str, Any], run: RunReport) -> str:
    """A record with nothing but the field, where the input is no JSON-lines file, or is gone."""
    field = str(run.config["field"])
    text = failure.get("text") or failure.get(field)
    return json.dumps({field: text}, ensure_ascii=False) if isinstance(text, str) else ""


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
