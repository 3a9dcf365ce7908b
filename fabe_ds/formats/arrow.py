"""Arrow files, and Datasets that `save_to_disk` has made, as formats."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import UsageError
from fabe_ds.formats.base import Records, Source, Tick, states_of
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.parquet import load_with
from fabe_ds.formats.table import ROWS, Split, TableFormat
from fabe_ds.formats.table_output import save_dataset

if TYPE_CHECKING:
    from datasets import Dataset


class ArrowFormat(TableFormat):
    """Files in Arrow's stream format, or in its file format."""

    name = "arrow"
    suffixes = (".arrow",)

    def read(self, source: Source, folder: Path) -> Dataset:
        return load_with("arrow", [file.path for file in source.files], folder)

    def batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file)) as opened:
            try:
                yield from pa.ipc.open_stream(opened)
            except pa.ArrowInvalid:
                opened.seek(0)
                whole = pa.ipc.open_file(opened)
                for number in range(whole.num_record_batches):
                    yield whole.get_batch(number)

    def rewrite(
        self, part: Dataset, file: Path, changed: Collection[str], sink: IO[bytes], tick: Tick
    ) -> None:
        with file.open("rb") as opened:
            is_file_format = opened.read(6) == b"ARROW1"
        schema = part.features.arrow_schema
        new = pa.ipc.new_file if is_file_format else pa.ipc.new_stream
        with new(sink, schema) as writer:
            for table in part.with_format("arrow").iter(batch_size=ROWS):
                writer.write_table(table.cast(schema))
                tick(len(table))


class SavedFormat(TableFormat):
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has made."""

    name = "dataset"

    def read(self, source: Source, folder: Path) -> Any:
        import datasets

        found = datasets.load_from_disk(str(source.root))
        if self.settings.output.inplace and not isinstance(found, datasets.Dataset):
            raise UsageError("--inplace: the Dataset has several splits; give an --output")
        return found

    def batches(self, file: Path) -> Iterator[Any]:
        return iter(())

    def states(self, source: Source) -> dict[str, tuple[int, ...]]:
        return states_of([InputFile(str(p), p.name) for p in sorted(source.root.rglob("*.arrow"))])

    def _parts(self, source: Source, chosen: Split) -> list[tuple[str, int]]:
        if self.settings.output.inplace and self.settings.input.split != "train":
            raise UsageError("--inplace replaces whole Datasets; leave --split out")
        return [(str(source.root), len(chosen.dataset))]

    def replace(
        self, dataset: Dataset, records: Records, changed: Collection[str], tick: Tick
    ) -> dict[str, str]:
        ((location, _),) = records.parts
        save_dataset(dataset, Path(location))
        return {location: ""}

    def output_kind(self, root: Path | None) -> str:
        return self.settings.output.output_format or "dataset"


def is_saved(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` has made."""
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))  # noqa: PTH113
