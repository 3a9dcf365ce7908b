"""What a run leaves behind: its counts, its report and its list of failures."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config.settings import MAYBE_FILES, SCHEMA_FILE, RunConfig, setting
from fabe_ds.errors import RECORDS_FAILED, UsageError, reason
from fabe_ds.files import is_text, replacing
from fabe_ds.network import without_secrets
from fabe_ds.run_files import FAILURES, SAMPLES, beside
from fabe_ds.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLES_KEPT, SAMPLE_CHARACTERS = 200, 4000


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did. Counts are records; `outputs` are the files written (or found up to date).

    `requests` were sent; of them `retries` after a failed one, `reasks` after an answer that failed
    its check, `hedged` a second time because the first took too long; `refusals` were answered by
    "too much at once".
    """

    records: int
    done: int
    cached: int
    failed: int
    skipped: dict[str, int]
    failures_by_kind: dict[str, int]
    bad_files: list[str]
    outputs: list[Path]
    seconds: float
    requests: int
    retries: int
    refusals: int
    reasks: int
    hedged: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    failures_file: Path | None = None
    report: Path | None = None
    loading: float = 0.0
    """Those of `seconds` in which a local model was loaded."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how a local model answered."""

    @property
    def exit_code(self) -> int:
        return RECORDS_FAILED if self.failed or self.bad_files else 0

    def dataset(self) -> Dataset:
        """The records that were written, as a Dataset with columns of their own types."""
        from fabe_ds.report.outputs import written_records

        assert self.report is not None
        return written_records(read_report(self.report))

    def failures(self) -> Dataset:
        """The failed records: where each stands (`file`, `record`), `failure` (the class),
        `message`, `text`, ...; empty where none failed."""
        from datasets import Dataset

        if self.failures_file is None:
            return Dataset.from_list([])
        return Dataset.from_list(read_lines(self.failures_file))


def read_report(report: Path) -> dict[str, Any]:
    """What a run has left as its report. Raises: UsageError where the file is not one."""
    try:
        run: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        defaults = {
            name: declared.get_default(call_default_factory=True)
            for name, declared in RunConfig.model_fields.items()
        }
        run["config"] = {**defaults, **run["config"]}
        if not (isinstance(run["failed"], int) and all(isinstance(p, str) for p in run["outputs"])):
            raise TypeError("of another shape")
        if not isinstance(run.setdefault("failures_file", None), str | None):
            raise TypeError("of another shape")
    except OSError as error:
        raise UsageError(f"{report}: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{report}: not the report of a run (outputs.run.json)") from None
    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that a run has left. Raises: UsageError."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:  # str.splitlines would split at U+2028 too
            rows.extend(json.loads(line) for line in lines)
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}:{len(rows) + 1}: damaged; a new run makes it anew") from None
    return rows


def leave(
    config: RunConfig,
    result: RunResult,
    output: Path,
    failures: Iterable[dict[str, Any]],
    samples: Iterable[tuple[str, str, str]],
    course: dict[str, Any],
) -> None:
    """Writes the failures, the samples and the report of a run beside its output."""
    write_failures(failures, beside(output, FAILURES))
    write_samples(samples, beside(output, SAMPLES))
    write_report(config, result, course)


def write_failures(failures: Iterable[dict[str, Any]], path: Path) -> None:
    """One line a failed record; no file where there are none."""
    rows = iter(failures)
    first = next(rows, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        for failure in (first, *rows):
            file.write((json.dumps(failure, ensure_ascii=False) + "\n").encode())


def sizes(column: Any) -> dict[int, int]:
    """A column of whole numbers as counts by size: {n: values of up to 2**(n/4)}."""
    steps: Counter[int] = Counter()
    for entry in column.drop_null().value_counts().to_pylist():
        steps[math.ceil(4 * math.log2(max(1, entry["values"])))] += entry["counts"]
    return dict(sorted(steps.items()))


def spread(indices: Sequence[int]) -> list[int]:
    """So many of the indices as samples are kept of, evenly spaced."""
    step = max(1, math.ceil(len(indices) / SAMPLES_KEPT))
    return [int(index) for index in indices[::step]]


def write_samples(samples: Iterable[tuple[str, str, str]], path: Path) -> None:
    """(where, before, after) of some records, for the report's page."""
    with replacing(path) as file:
        for where, before, after in samples:
            texts = {"before": before[:SAMPLE_CHARACTERS], "after": after[:SAMPLE_CHARACTERS]}
            line = json.dumps({"where": where, **texts}, ensure_ascii=False)
            file.write((line + "\n").encode())


def write_report(config: RunConfig, result: RunResult, course: dict[str, Any]) -> None:
    """The counts, the settings but for the key, and the run's `course`, as JSON.

    `course` is its instruction, and its history and sizes for the charts.
    """
    assert result.report is not None
    settings = {
        name: getattr(config, name)
        for name in RunConfig.model_fields
        if name != "api_key" and setting(name, "panel")
    }
    check = config.validate_with
    if check and check.startswith(SCHEMA_FILE):
        schema = _from_anywhere(check.removeprefix(SCHEMA_FILE))
        settings["validate_with"] = f"{SCHEMA_FILE}{schema}"
    if config.base_url:
        settings["base_url"] = without_secrets(config.base_url)
    for name, value in settings.items():
        if isinstance(value, Path) or name in MAYBE_FILES:
            settings[name] = _from_anywhere(value)
    ended = f"{datetime.now():%Y-%m-%d %H:%M}"
    counts = {field.name: getattr(result, field.name) for field in fields(result)}
    body = {"fabe_ds": __version__, "ended": ended, "config": settings, **counts, **course}
    # There may be very many.
    body["outputs"] = [os.path.abspath(path) for path in result.outputs]  # noqa: PTH100
    report = json.dumps(body, indent=2, ensure_ascii=False, default=str)
    if not is_text(report):  # a name that is no UTF-8: JSON has an escape for its bytes
        report = json.dumps(body, indent=2, default=str)
    with replacing(result.report) as file:
        file.write(report.encode() + b"\n")


def _from_anywhere(value: Path | str | None) -> Path | str | None:
    """A path as it can be found from any folder; what is none (a name, a text) stays."""
    try:
        return Path(value).absolute() if value and Path(value).exists() else value
    except (OSError, ValueError):  # a text too long for a name, or with a NUL in it
        return value
