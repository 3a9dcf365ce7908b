"""Parquet files as a format."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fabe_ds.formats.base import Source, Tick
from fabe_ds.formats.parquet_columns import (
    ROWS,
    held_columns,
    refuse_other_columns,
    write_parquet_like,
)
from fabe_ds.formats.table import TableFormat, kept_table

if TYPE_CHECKING:
    from datasets import Dataset


class ParquetFormat(TableFormat):
    """Parquet files. Columns of types that `datasets` does not know (maps) are not asked about, and
    come back all the same where Parquet is written."""

    name = "parquet"
    suffixes = (".parquet",)

    def read(self, source: Source, folder: Path) -> Dataset:
        files = [file.path for file in source.files]
        held = held_columns(pq.read_schema(files[0]))
        refuse_other_columns(files)
        return kept_table("parquet", source, folder, held, _held_batches(files, held.names))

    def batches(self, file: Path) -> Iterator[Any]:
        return iter(pq.ParquetFile(file).iter_batches(ROWS))

    def rows_in(self, file: Path) -> int:
        return int(pq.read_metadata(file).num_rows)

    def rewrite(
        self, part: Dataset, file: Path, changed: Collection[str], sink: IO[bytes], tick: Tick
    ) -> None:
        write_parquet_like(part, [file], [(0, len(part))], changed, sink, tick)


def _held_batches(files: Sequence[Path], names: list[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        yield from pq.ParquetFile(file).iter_batches(ROWS, columns=names)
