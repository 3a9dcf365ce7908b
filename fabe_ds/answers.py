"""Answers: what became of every record, as one Arrow column beside the records.

A record has a list of answers: those to its first field, sample by sample, then those to the next
field. The list is what an executor gives, what a format writes back, and what a report counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from fabe_ds.fields import Targets
from fabe_ds.paging import passed_over
from fabe_ds.request import Outcome
from fabe_ds.text import encodable

if TYPE_CHECKING:
    from datasets import Dataset, Features

COLUMN = "answers"
FIELDS = {
    "completion": pa.large_string(),  # the new value; null where the record keeps its own
    "failure": pa.string(),  # class of what went wrong, or null
    "message": pa.string(),  # and what that was
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "answer": pa.large_string(),  # the last answer of a record that failed
    "cached": pa.bool_(),  # whether no request was sent for it
}
"""What is kept of one answer."""
FLAT_SCHEMA = pa.schema(list(FIELDS.items()))
_ANSWER = pa.struct(list(FIELDS.items()))
SCHEMA = pa.schema([(COLUMN, pa.list_(_ANSWER))])
STATUS = {
    **dict.fromkeys(("state", "failure", "message", "finish_reason"), pa.string()),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), pa.int64()),
}
"""What `--status-field` says of a record."""


class Answer(NamedTuple):
    """One answer, as `FIELDS` describes it."""

    completion: str | None
    failure: str | None
    message: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    answer: str | None
    cached: bool


def value_of(samples: Sequence[Answer]) -> str | None:
    """The new value of a field that was asked about once or several times: the first answer, unless
    one of them failed: a failed record keeps its original."""
    if any(answer.failure is not None for answer in samples):
        return None
    return samples[0].completion


def values_of(answers: Sequence[Answer], samples: int) -> list[str | None]:
    """The new values of a record's fields."""
    return [value_of(answers[at : at + samples]) for at in range(0, len(answers), samples)]


def features() -> Features:
    """The answers' column as `Dataset.map` wants it declared."""
    from datasets import Features

    return Features.from_arrow_schema(SCHEMA)


def flat_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """One row an outcome, with the columns of `FLAT_SCHEMA`."""
    got = list(outcomes)  # column by column: half the time of making each a row first
    answers = [outcome.completion for outcome in got]
    columns = [
        [None if o.text is None else encodable(o.text) for o in got],
        [outcome.kind for outcome in got],
        [outcome.message for outcome in got],
        [answer and answer.finish_reason for answer in answers],
        [answer and answer.prompt_tokens for answer in answers],
        [answer and answer.completion_tokens for answer in answers],
        [encodable(o.completion.text) if o.kind and o.completion else None for o in got],
        [outcome.cached for outcome in got],
    ]
    return pa.table(columns, schema=FLAT_SCHEMA)


def answer_table(outcomes: Iterable[Outcome], each: int) -> pa.Table:
    """One row a record, with its list of `each` answers. A table, which a map writes as it is."""
    return listed_answers(flat_table(outcomes), each)


def by_record(flat: pa.Table, each: int) -> Iterator[list[Answer]]:
    """The rows of `flat_table` as answers, `each` to a record."""
    rows = map(Answer._make, zip(*(c.to_pylist() for c in flat.columns), strict=True))
    while answers := list(islice(rows, each)):
        yield answers


def listed_answers(flat: pa.Table, each: int) -> pa.Table:
    """The rows of `flat_table` as lists of `each`."""
    chunks = [column.combine_chunks() for column in flat.columns]
    struct = pa.StructArray.from_arrays(chunks, fields=list(_ANSWER))
    # Lists share the rows' buffers: no text is copied.
    offsets = pa.array(range(0, len(flat) + 1, each), pa.int32())
    return pa.table([pa.ListArray.from_arrays(offsets, struct)], schema=SCHEMA)


def status(answers: Sequence[Answer]) -> dict[str, Any]:
    """What became of one record: its first failure, else its last answer; tokens of all.

    `state` is done, cached (no request was sent), failed or skipped (it has no text).
    """
    given = [answer for answer in answers if answer.completion is not None] or answers
    shown = next((answer for answer in answers if answer.failure is not None), given[-1])
    if shown.failure is not None:
        state = "failed"
    elif all(answer.completion is None for answer in answers):
        state = "skipped"
    else:
        state = "cached" if all(answer.cached for answer in given) else "done"
    return {
        "state": state,
        "failure": shown.failure,
        "message": shown.message,
        "finish_reason": shown.finish_reason,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in answers),
    }


class Answers:
    """The answers to all records of a Dataset, in its order, mapped from disk."""

    def __init__(self, dataset: Dataset, targets: Targets) -> None:
        self.dataset, self.targets = dataset, targets

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def flat(self) -> pa.Table:
        """One row an answer."""
        return _flattened(self.dataset.data.table.column(COLUMN))

    def column(self, name: str, field: int, sample: int = 0) -> pa.ChunkedArray:
        """One value a record: of its answer to a field, a sample of them. Not for long texts."""
        values = self.flat.column(name)
        each = self.targets.each
        # Nearly all runs have one answer a record, and then nothing is gathered.
        if each == 1:
            return values
        first = field * self.targets.samples + sample
        return values.take(pa.array(range(first, len(values), each), pa.int64()))

    @property
    def has_failures(self) -> bool:
        failures = self.flat.column("failure")
        return bool(failures.null_count != len(failures))

    @property
    def has_completions(self) -> bool:
        completions = self.flat.column("completion")
        return bool(completions.null_count != len(completions))

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """One row an answer, those of so many records at a time."""
        for part in passed_over(self.dataset.with_format("arrow").iter(batch_size=rows)):
            yield _flattened(part.column(COLUMN))

    def records(self, rows: int) -> Iterator[list[Answer]]:
        """The answers to one record after another."""
        for table in self.tables(rows):
            yield from by_record(table, self.targets.each)


def _flattened(lists: pa.ChunkedArray) -> pa.Table:
    """The answers in lists, one a row. Nothing is copied: Arrow's own functions for it would make
    a copy of all texts."""
    columns: list[list[pa.Array]] = [[] for _ in FIELDS]
    for chunk in lists.chunks:
        if not len(chunk):
            continue
        first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        answers = chunk.values.slice(first, last - first)
        for number, column in enumerate(columns):
            column.append(answers.field(number))
    arrays = [
        pa.chunked_array(chunks, kind)
        for chunks, kind in zip(columns, FIELDS.values(), strict=True)
    ]
    return pa.table(arrays, schema=FLAT_SCHEMA)
