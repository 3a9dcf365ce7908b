"""What a run leaves beside its output: the report, the list of failures, some examples."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabe_ds.answers import Answer, Answers, by_place, by_record
from fabe_ds.files import replacing
from fabe_ds.formats.base import Format, Records
from fabe_ds.job import Job
from fabe_ds.paging import row_table
from fabe_ds.report.counts import models_of, record_counts
from fabe_ds.report.course import Course
from fabe_ds.report.result import RunResult
from fabe_ds.report.run_report import write_report
from fabe_ds.run_files import FAILURES, REPORT, SAMPLES, beside

ROWS = 1000
EXAMPLES_KEPT, EXAMPLE_CHARACTERS = 200, 4000


def write_reports(
    job: Job, records: Records, answers: Answers, outputs: Sequence[Path], course: Course
) -> RunResult:
    """Writes what stands beside the output, and gives the counts."""
    kind, transform, reports = job.format, job.transform, job.destination.reports
    stats, flat = transform.stats, answers.flat
    skips, asked = kind.skips(records), stats.settled > 0
    counts = record_counts(answers, skips, records, asked)
    result = RunResult(
        **counts,
        bad_files=records.left_out,
        outputs=list(outputs),
        seconds=time.monotonic() - course.started,
        requests=stats.requests if transform.provider.cached else 0,
        retries=stats.retries,
        refusals=stats.refusals,
        reasks=stats.reasks,
        hedged=stats.hedged,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        cached_tokens=stats.cached_tokens,
        reasoning_tokens=stats.reasoning_tokens,
        cost=stats.cost,
        loading=stats.loading,
        notes=[*stats.notes, *_nothing_asked(counts, kind)],
        answered_by=models_of(answers, job.config.model),
        failures_file=beside(reports, FAILURES) if counts["failed"] else None,
        report=beside(reports, REPORT),
    )
    failures = failed_records(records, kind, answers) if counts["failed"] else ()
    write_failures(failures, beside(reports, FAILURES))
    write_examples(examples(records, kind, answers), beside(reports, SAMPLES))
    assert job.config.input_path is not None
    details = {
        "input": str(job.config.input_path.absolute()),
        "history": course.history,
        "latency": stats.latency,
        "instruction": transform.texts.instruction[0],
        "prompt_tokens_each": sizes(flat.column("prompt_tokens")),
        "completion_tokens_each": sizes(flat.column("completion_tokens")),
    }
    write_report(job.shown, result, details)
    return result


def _nothing_asked(counts: Mapping[str, Any], kind: Format) -> Iterator[str]:
    """What to say of a run in which no record had a text to ask about."""
    skipped, without_text = (
        counts["skipped"],
        {"empty", "missing", "null", "not a string", "no text"},
    )
    if set(skipped) <= without_text and 0 < counts["records"] == sum(skipped.values()):
        names = ", ".join(kind.targets.names)
        yield f"nothing was asked for: no record has a text at {names}"


def failed_records(records: Records, kind: Format, answers: Answers) -> Iterator[dict[str, Any]]:
    """A failure for each text that failed: where its record stands, what went wrong, the texts."""
    first = 0
    for table, lengths in answers.tables(ROWS):
        # Nearly all parts of a run have no failure, and are not looked at row by row.
        if table.column("failure").null_count < len(table):
            for number, given in enumerate(by_record(table, lengths), first):
                if any(answer.failure is not None for answer in given):
                    yield from _failures_of(number, given, records, kind)
        first += len(lengths)


def _failures_of(
    number: int, answers: Sequence[Answer], records: Records, kind: Format
) -> Iterator[dict[str, Any]]:
    targets = kind.targets
    table = row_table(records.dataset, number)
    (row,) = table.to_pylist()
    asked = next(iter(kind.rows(table, whole=False)))
    for place, samples in enumerate(by_place(answers, targets.samples)):
        failed = next((answer for answer in samples if answer.failure is not None), None)
        if failed is None:
            continue
        field = place if asked.fields is None else asked.fields[place]
        where: dict[str, Any] = {"record": number, **kind.where(row, field)}
        if asked.fields is not None:
            where["text"] = asked.texts[place]
        yield {
            "record": where.pop("record"),
            **({"field": targets.names[field]} if len(targets.names) > 1 else {}),
            **({"place": place} if asked.fields is not None else {}),
            **{key: where.pop(key) for key in ("file", "line") if key in where},
            "failure": failed.failure,
            "message": failed.message,
            "finish_reason": failed.finish_reason,
            **({"model": failed.model} if failed.model else {}),
            **where,
            "answer": failed.answer,
        }


def write_failures(failures: Iterable[dict[str, Any]], path: Path) -> None:
    """One line a failure; no file where there are none."""
    rows = iter(failures)
    first = next(rows, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        for failure in (first, *rows):
            line = json.dumps(failure, ensure_ascii=False, default=str)
            file.write((line + "\n").encode())


def sizes(column: Any) -> dict[int, int]:
    """A column of whole numbers as counts by size: {n: values of up to 2**(n/4)}."""
    steps: Counter[int] = Counter()
    for entry in column.drop_null().value_counts().to_pylist():
        steps[math.ceil(4 * math.log2(max(1, entry["values"])))] += entry["counts"]
    return dict(sorted(steps.items()))


def examples(records: Records, kind: Format, answers: Answers) -> Iterator[tuple[str, str, str]]:
    """(where, before, after) of some records that were rewritten, evenly spaced."""
    import pyarrow.compute as pc

    flat, targets = answers.flat.column("completion"), answers.targets
    given = pc.indices_nonzero(pc.is_valid(flat)).to_numpy()
    given = given[given % targets.samples == 0]
    step = max(1, math.ceil(len(given) / EXAMPLES_KEPT))
    for index in map(int, given[::step]):
        number, at = answers.record_of(index)
        table = row_table(records.dataset, number)
        (row,) = table.to_pylist()
        asked = next(iter(kind.rows(table, whole=False)))
        text = at // targets.samples
        before, field = asked.texts[text], asked.fields[text] if asked.fields else text
        where = {"record": number, **kind.where(row, field)}
        place = f"record {where['record']}"
        if "file" in where:
            place = f"{where['file']}:{where.get('line', '?')} ({place})"
        yield place, before, flat[index].as_py()


def write_examples(examples: Iterable[tuple[str, str, str]], path: Path) -> None:
    """Some records before and after, for the report's page."""
    with replacing(path) as file:
        for where, before, after in examples:
            texts = {"before": before[:EXAMPLE_CHARACTERS], "after": after[:EXAMPLE_CHARACTERS]}
            line = json.dumps({"where": where, **texts}, ensure_ascii=False)
            file.write((line + "\n").encode())
