"""What there is to tell of a run that has ended: the same for a terminal, a page and a script."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fabe_ds.files import from_here
from fabe_ds.report.advice import what_helps
from fabe_ds.report.result import RunResult
from fabe_ds.text import duration

Style = Literal["good", "known", "bad", "advice", "quiet", "plain"]
"""What a colour means: rewritten, known from before, failed, to be done, left out; none."""


class Fact(NamedTuple):
    """A line of the summary: its name (empty: it belongs to the line before), the text, and what
    it means."""

    name: str
    text: str
    style: Style = "plain"


def facts(result: RunResult, max_new_tokens: int, url: str | None = None) -> Iterator[Fact]:
    """The summary of a run. `url` is where the output is, where that is another file system."""
    yield Fact("rewritten", f"{result.done:,}", "good")
    if result.cached:
        yield Fact("from cache", f"{result.cached:,}", "known")
    if result.failed:
        yield Fact("failed", f"{result.failed:,} ({counts(result.failures_by_kind)})", "bad")
        if first := first_failure(result.failures_file):
            yield Fact("", f"first: {first}", "bad")
        for line in what_helps(result.failures_by_kind, max_new_tokens, report_name(result)):
            yield Fact("", line, "advice")
    if result.skipped:
        skipped = f"{sum(result.skipped.values()):,} ({counts(result.skipped)})"
        yield Fact("skipped", skipped, "quiet")
    for error in result.bad_files:
        yield Fact("left out", error, "bad")
    if result.requests:
        yield Fact("requests", requests(result))
        yield Fact("tokens", tokens(result))
    if result.cost:
        yield Fact("cost", f"{result.cost:,.4f}")
    yield Fact("time", times(result))
    if len(result.answered_by) > 1:
        yield Fact("answered by", answered_by(result))
    for note in result.notes:
        yield Fact("note", note, "advice")
    if result.outputs:
        yield Fact("written", url or place_of(result.outputs))
    if result.failures_file is not None:
        yield Fact("failures", str(from_here(result.failures_file)))
    if result.report is not None:
        yield Fact("report", str(from_here(result.report)))


def report_name(result: RunResult) -> str:
    """The report's path as it is typed in a shell."""
    return (
        "outputs.run.json" if result.report is None else shlex.quote(str(from_here(result.report)))
    )


def counts(by_name: Mapping[str, int]) -> str:
    """Counts by name, by their names: "2 empty, 1 null"."""
    return ", ".join(f"{count} {name}" for name, count in sorted(by_name.items()))


def requests(result: RunResult) -> str:
    """How many were sent, and why some of them."""
    kinds = {"retries": result.retries, "asked again": result.reasks, "twice": result.hedged}
    told = ", ".join(f"{n} {what}" for what, n in kinds.items() if n or what == "retries")
    return f"{result.requests} ({told})"


def tokens(result: RunResult) -> str:
    return (
        f"{result.prompt_tokens} prompt "
        + (f"({result.cached_tokens} cached) " if result.cached_tokens else "")
        + f"and {result.completion_tokens} completion tokens"
        + (f" ({result.reasoning_tokens} reasoning)" if result.reasoning_tokens else "")
    )


def records_per_second(result: RunResult) -> float:
    return result.records / max(result.seconds - result.loading, 1e-9)


def times(result: RunResult) -> str:
    loading = f" ({result.loading:.1f} s loading the model)" if result.loading > 1 else ""
    return f"{duration(result.seconds)}{loading}, {records_per_second(result):.1f} records/s"


def answered_by(result: RunResult) -> str:
    """The models that answered, the busiest first."""
    by = sorted(result.answered_by.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{model} {count}" for model, count in by)


def place_of(paths: list[Path]) -> str:
    """One file, or the folder of several."""
    if len(paths) == 1:
        return str(from_here(paths[0]))
    folder = Path(os.path.commonpath(paths))
    return f"{from_here(folder)}/ ({len(paths)} files)"


def first_failure(path: Path | None) -> str:
    """Where the first failure of a run's list is, and its message; empty where the list is gone, or
    was damaged since."""
    if path is None:
        return ""
    try:
        with path.open(encoding="utf-8") as lines:
            failure = json.loads(next(lines))
        return f"record {place_of_failure(failure)}: {failure['message']}"
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        return ""


def place_of_failure(failure: Mapping[str, Any]) -> str:
    """Where a failed record stands: file and line, or its number."""
    if "file" in failure:
        return f"{failure['file']}:{failure['line']}"
    return str(failure["record"])


def as_json(result: RunResult, **more: Any) -> str:
    """The result as one line of JSON: its fields by their names, with the exit code."""
    body = {field.name: getattr(result, field.name) for field in fields(result)}
    body |= {"records_per_second": round(records_per_second(result), 3)}
    body |= {"exit_code": result.exit_code, **more}
    return json.dumps(body, default=str)
