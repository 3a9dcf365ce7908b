"""Parquet files that go to the workers, and the order in which rows come back."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from fabe_ds.errors import RunStopped
from fabe_ds.executors.base import Work
from fabe_ds.files import is_locked
from fabe_ds.formats.base import OURS
from fabe_ds.providers import Request
from fabe_ds.request import Item
from fabe_ds.store.layout import Layout

ROW = f"{OURS}row"
"""Helper column: the number of each row of a shard, counted through all shards."""
SAMPLE = f"{OURS}sample"
"""Sample index of each request of the row: identical sampled requests are numbered 0, 1, 2, ..."""


@contextlib.contextmanager
def shards_folder(cache_dir: Path) -> Iterator[Path]:
    """A folder for this run's shards; those of runs that were killed are removed."""
    layout = Layout(cache_dir)
    home = layout.made(layout.shards)
    for lock in home.glob("*.lock"):
        if not is_locked(lock):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    folder = home.resolve() / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    with FileLock(lock):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def write_shards(tables: Iterable[pa.Table], rows: int, folder: Path) -> list[Path]:
    """Parquet files of up to so many rows each, the rows numbered from 0."""
    shards: list[Path] = []
    first = 0
    for table in tables:
        for start in range(0, len(table), rows):
            part = table.slice(start, rows)
            numbers = pa.array(range(first, first + len(part)), pa.int64())
            shards.append(folder / f"{len(shards):06}.parquet")
            pq.write_table(part.append_column(ROW, numbers), shards[-1])
            first += len(part)
    return shards


def with_sample_numbers(work: Work) -> Iterator[pa.Table]:
    """The records with how many equal requests stand before each of theirs: sampled, each has its
    own answer, as one process would number them."""
    seen: Counter[bytes] = Counter()
    provider = work.transform.provider

    def number_of(item: Item) -> int:
        key = provider.key(item) if isinstance(item, Request) else b""
        seen[key] += 1
        return seen[key] - 1

    for table in work.tables():
        lists = [list(map(number_of, items)) for items in work.items_in(table)]
        yield table.append_column(SAMPLE, pa.array(lists, pa.list_(pa.int64())))


def write_in_order(blocks: Iterable[pa.Table], total: int, schema: pa.Schema, place: Path) -> None:
    """Writes blocks, as they come, and then their rows in order to `place`, whole or not at all.

    Raises: RunStopped where rows are missing.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as scratch:
        arrived, ordered = Path(scratch) / "arrived.arrow", Path(scratch) / "ordered.arrow"
        runs: list[tuple[int, int]] = []  # the first row of each batch, and which batch it is
        with pa.OSFile(str(arrived), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for block in blocks:
                for first, batch in _runs(block, schema):
                    runs.append((first, len(runs)))
                    writer.write_batch(batch)
        expected = 0
        with (
            pa.memory_map(str(arrived)) as source,
            pa.ipc.open_file(source) as reader,
            pa.OSFile(str(ordered), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            for first, number in sorted(runs):
                if first != expected:
                    break
                batch = reader.get_batch(number)
                writer.write_batch(batch)
                expected += len(batch)
        if expected != total:
            raise RunStopped(f"ray: row {expected} of {total} did not come back; run it again")
        ordered.replace(place)


def _runs(block: pa.Table, schema: pa.Schema) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows that follow one another, with the number of their first."""
    block = block.sort_by(ROW).combine_chunks()
    numbers = block.column(ROW).to_numpy()
    columns = block.select(schema.names).cast(schema)
    ends = [*((numbers[1:] - numbers[:-1]) != 1).nonzero()[0] + 1, len(numbers)]
    start = 0
    for end in map(int, ends):
        for batch in columns.slice(start, end - start).combine_chunks().to_batches():
            yield int(numbers[start]), batch
        start = end
