"""The result of a run: its counts, and the way to its records and its failures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import RECORDS_FAILED, UsageError, reason

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did. Counts are records; `outputs` are the files written (or found up to date).

    `requests` were sent; of them `retries` after a failed one, `reasks` after an answer that failed
    its check, `hedged` a second time because the first took too long; `refusals` were answered by
    "too much at once". Of the tokens of prompts `cached_tokens` were in the server's cache, of
    those of answers `reasoning_tokens` were reasoning, as far as servers tell.
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
    cached_tokens: int
    reasoning_tokens: int
    cost: float
    failures_file: Path | None = None
    report: Path | None = None
    loading: float = 0.0
    """Those of `seconds` in which a local model was loaded."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how a local model answered."""
    answered_by: dict[str, int] = field(default_factory=dict)
    """Answers by the model that gave them, where several were asked."""

    @property
    def exit_code(self) -> int:
        return RECORDS_FAILED if self.failed or self.bad_files else 0

    def dataset(self) -> Dataset:
        """The records that were written, as a Dataset with columns of their own types."""
        from fabe_ds.report.outputs import written_records
        from fabe_ds.report.run_report import read_report

        assert self.report is not None
        return written_records(read_report(self.report))

    def page(self, place: str | Path | None = None) -> Path:
        """Writes the page about the run (`fabe-ds report`), by default beside its report, and gives
        its path. Raises: UsageError."""
        from fabe_ds.report.page import write_page

        assert self.report is not None
        return write_page(self.report, None if place is None else Path(place))

    def _repr_html_(self) -> str:
        """What a notebook shows: counts, failures and what helps, some records before and after,
        and where it all is."""
        from fabe_ds.report.result_html import result_html

        return result_html(self)

    def failures(self) -> Dataset:
        """The failed records: where each stands (`file`, `record`), `failure` (the class),
        `message`, `text`, ...; empty where none failed."""
        from datasets import Dataset

        if self.failures_file is None:
            return Dataset.from_list([])
        return Dataset.from_list(read_lines(self.failures_file))


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
