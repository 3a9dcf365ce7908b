"""Parquet files as a format."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow.parquet as pq

from fabe_ds.formats.base import Source, Tick
from fabe_ds.formats.parquet_columns import held_columns, refuse_other_columns, write_parquet_like
from fabe_ds.formats.table import TableFormat

if TYPE_CHECKING:
    from datasets import Dataset


class ParquetFormat(TableFormat):
    """Parquet files. Columns of types that `datasets` does not know (maps) are not asked about, and
    come back all the same where Parquet is written."""

    name = "parquet"
    suffixes = (".parquet",)

    def read(self, source: Source, folder: Path) -> Dataset:
        import datasets

        files = [file.path for file in source.files]
        held = held_columns(pq.read_schema(files[0]))
        refuse_other_columns(files)
        if not any(pq.read_metadata(file).num_rows for file in files):
            return datasets.Dataset(held.empty_table())
        features = datasets.Features.from_arrow_schema(held)
        return load_with("parquet", files, folder, columns=held.names, features=features)

    def batches(self, file: Path) -> Iterator[Any]:
        return iter(pq.ParquetFile(file).iter_batches())

    def rows_in(self, file: Path) -> int:
        return int(pq.read_metadata(file).num_rows)

    def rewrite(
        self, part: Dataset, file: Path, changed: Collection[str], sink: IO[bytes], tick: Tick
    ) -> None:
        write_parquet_like(part, [file], [(0, len(part))], changed, sink, tick)


def load_with(builder: str, files: Sequence[Path], folder: Path, **options: Any) -> Dataset:
    """The rows of files that one of the builders of `datasets` reads, kept below `folder`."""
    import datasets

    names = [glob.escape(str(file.resolve())) for file in files]
    loaded = datasets.load_dataset(
        builder, data_files=names, split="train", cache_dir=str(folder), **options
    )
    assert isinstance(loaded, datasets.Dataset)
    return loaded
