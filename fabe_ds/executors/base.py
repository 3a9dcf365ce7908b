"""What an executor maps, and what it is asked to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from fabe_ds.answers import answer_table
from fabe_ds.executors import worker_counts
from fabe_ds.formats.base import OURS, Format, Records, Row, without
from fabe_ds.paging import passed_over
from fabe_ds.request import Item, Outcome
from fabe_ds.transform import Transform

if TYPE_CHECKING:
    from datasets import Dataset

MAP_ROWS = 1000
"""Records of a batch. Part of the fingerprint, so it is the same for every run."""
DONE = f"{OURS}done"
"""Helper column: which texts of each record are done before."""
CHOSEN = f"{OURS}chosen"
"""Helper column: whether the run asks about the record (--limit)."""


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
        beside = {}
        if records.done is not None:
            beside[DONE] = pa.array(records.done, pa.list_(pa.int32()))
        if records.limit is not None:
            chosen = [number < records.limit for number in range(len(records))]
            beside[CHOSEN] = pa.array(chosen, pa.bool_())
        if beside:
            marks = datasets.Dataset(pa.table(beside))
            dataset = datasets.concatenate_datasets([dataset, marks], axis=1)
        return cls(dataset, kind, transform, path)

    def tables(self) -> Iterator[pa.Table]:
        """The records, a batch at a time."""
        yield from passed_over(self.dataset.with_format("arrow").iter(batch_size=MAP_ROWS))

    def items(self) -> Iterator[Item]:
        """What all records ask for."""
        for table in self.tables():
            yield from self.transform.items(asking_rows(self.kind, table, self.transform))

    def items_by_record(self) -> Iterator[list[Item]]:
        """What each record asks for."""
        for table in self.tables():
            yield from self.items_in(table)

    def items_in(self, table: pa.Table) -> Iterator[list[Item]]:
        """What each record of one of the tables asks for."""
        targets = self.transform.targets
        items = self.transform.items(asking_rows(self.kind, table, self.transform))
        places = counts_of(self.kind, table)
        for count in repeat(len(targets.names), len(table)) if places is None else places:
            yield list(islice(items, count * targets.samples))


class Executor(Protocol):
    """Who maps a transform over records."""

    def map(self, work: Work, finished: bool) -> Dataset:
        """The answers to all records, in their order, as a Dataset with the column
        `answers.COLUMN`. `finished`: the answers of a run without failures are there already.

        Raises: FabeError.
        """


def asking_rows(kind: Format, table: pa.Table, transform: Transform) -> Iterator[Row]:
    """What the rows of a table bring, without the texts that are done or left out."""
    marks = {name: table.column(name) for name in (DONE, CHOSEN) if name in table.column_names}
    rows = kind.rows(table.drop_columns(list(marks)), transform.needs_record)
    if DONE in marks:
        rows = map(without, rows, marks[DONE].to_pylist())
    if CHOSEN in marks:
        chosen = marks[CHOSEN].to_pylist()
        rows = (row._replace(chosen=is_in) for row, is_in in zip(rows, chosen, strict=True))
    return rows


def counts_of(kind: Format, table: pa.Table) -> list[int] | None:
    """How many texts each row of a table brings; None where each brings one of each field."""
    places = kind.places(table)
    return None if places is None else list(map(len, places))


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
        targets = transform.targets
        # With nothing sent ahead, as in a worker process, the batch's own items are asked.
        outcomes = self.ahead
        if outcomes is None:
            outcomes = transform.outcomes(asking_rows(self.kind, table, transform))
        places = counts_of(self.kind, table)
        expected = len(table) * targets.each if places is None else sum(places) * targets.samples
        answers = answer_table(islice(outcomes, expected), targets, places)
        worker_counts.publish(transform.stats)
        return answers
