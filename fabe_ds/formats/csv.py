"""CSV and TSV files as a format."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fabe_ds.formats.base import Source, Tick
from fabe_ds.formats.csv_text import SEPARATORS, load_csv, read_head, read_rows
from fabe_ds.formats.table import TableFormat
from fabe_ds.formats.table_output import write_csv_rows

if TYPE_CHECKING:
    from datasets import Dataset


class CsvFormat(TableFormat):
    """CSV and TSV files: every field is the text that it is, and comes back as it was written."""

    name = "csv"
    suffixes = (".csv", ".tsv")

    def read(self, source: Source, folder: Path) -> Dataset:
        files = [file.path for file in source.files]
        return load_csv(files, SEPARATORS[files[0].suffix.lower()], folder)

    def batches(self, file: Path) -> Iterator[Any]:
        for row in read_rows(file, read_head(file, SEPARATORS[file.suffix.lower()])):
            yield [row]

    def rewrite(
        self, part: Dataset, file: Path, changed: Collection[str], sink: IO[bytes], tick: Tick
    ) -> None:
        write_csv_rows(part, file, SEPARATORS[file.suffix.lower()], sink, tick)

    def output_kind(self, root: Path | None) -> str:
        if self.settings.output.output_format or root is None or not root.is_file():
            return super().output_kind(root)
        return root.suffix.lower()[1:]
