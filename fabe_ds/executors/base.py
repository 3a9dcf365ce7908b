"""What an executor maps, and what it is asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from fabe_ds.answers import answer_table
from fabe_ds.executors import worker_counts
from fabe_ds.formats.base import OURS, Format, Records, Row
from fabe_ds.paging import passed_over
from fabe_ds.request import Item, Outcome
from fabe_ds.transform import Transform

if TYPE_CHECKING:
    from datasets import Dataset

MAP_ROWS = 1000
"""Records of a batch. Part of the fingerprint, so it is the same for every run."""
DONE = f"{OURS}done"
"""Helper column: the fields of each record that an earlier run has rewritten in place."""


@dataclass(frozen=True, slots=True)
class Work:
    """The records of a run with what a transform needs of them, and where their answers are kept:
    in `path`, and, where several processes write them, in files with names like it."""

    dataset: Dataset
    kind: Format
    transform: Transform
    path: Path

    @classmethod
    def of(cls, records: Records, kind: Format, transform: Transform, path: Path) -> Work:
        import datasets

        columns = kind.columns(records, transform.needs_record)
        dataset = records.dataset.select_columns(columns)
        if records.done is not None:
            done = pa.array(records.done, pa.list_(pa.int8()))
            beside = datasets.Dataset(pa.table({DONE: done}))
            dataset = datasets.concatenate_datasets([dataset, beside], axis=1)
        return cls(dataset, kind, transform, path)

    def tables(self) -> Iterator[pa.Table]:
        """The records, a batch at a time."""
        yield from passed_over(self.dataset.with_format("arrow").iter(batch_size=MAP_ROWS))

    def items(self) -> Iterator[Item]:
        """What all records ask for."""
        for table in self.tables():
            yield from self.transform.items(asking_rows(self.kind, table, self.transform))


class Executor(Protocol):
    """Who maps a transform over records."""

    def map(self, work: Work, finished: bool) -> Dataset:
        """The answers to all records, in their order, as a Dataset with the column
        `answers.COLUMN`. `finished`: the answers of a run without failures are there already.

        Raises: FabeError.
        """


def asking_rows(kind: Format, table: pa.Table, transform: Transform) -> Iterator[Row]:
    """What the rows of a table bring, without the fields that are done."""
    rows = kind.rows(table, transform.needs_record)
    if DONE not in table.column_names:
        return rows
    return map(_without, rows, table.column(DONE).to_pylist())


def _without(row: Row, done: Sequence[int]) -> Row:
    if not done:
        return row
    texts = [None if field in done else text for field, text in enumerate(row.texts)]
    return row._replace(texts=texts)


class AnswerMap:
    """The callable of a batched `Dataset.map`: a table of records becomes one of their answers.

    It is pickled for worker processes as the format and the transform, which are pure
    configuration. With `ahead` (the outcomes of all items of the coming map, in order) a batch
    takes its own of them; without it, each batch waits for its slowest record.
    """

    def __init__(self, kind: Format, transform: Transform) -> None:
        self.kind, self.transform = kind, transform
        self.ahead: Iterator[Outcome] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AnswerMap, (self.kind, self.transform)

    def __call__(self, table: pa.Table, rank: int | None = None) -> pa.Table:
        transform = self.transform
        transform.use_rank(rank)
        each = transform.targets.each
        # With nothing sent ahead, as in a worker process, the batch's own items are asked.
        outcomes = self.ahead
        if outcomes is None:
            outcomes = transform.outcomes(asking_rows(self.kind, table, transform))
        answers = answer_table(islice(outcomes, len(table) * each), each)
        worker_counts.publish(transform.stats)
        return answers
