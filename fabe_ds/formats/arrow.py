"""Arrow files, and Datasets that `save_to_disk` has made, as formats."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import InputError, UsageError
from fabe_ds.formats.base import Records, Source, Tick, states_of
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.parquet_columns import held_columns, schema_with
from fabe_ds.formats.table import Split, TableFormat, kept_table
from fabe_ds.formats.table_output import save_dataset

if TYPE_CHECKING:
    from datasets import Dataset


class ArrowFormat(TableFormat):
    """Files in Arrow's stream format, or in its file format."""

    name = "arrow"
    suffixes = (".arrow",)

    def read(self, source: Source, folder: Path) -> Dataset:
        files = [file.path for file in source.files]
        schema = _schema_of(files[0])
        for file in files[1:]:
            if _schema_of(file).names != schema.names:
                raise InputError(file, f"other columns than {files[0]} has")
        held = held_columns(schema)
        batches = (batch.select(held.names) for file in files for batch in self.batches(file))
        return kept_table("arrow", source, folder, held, batches)

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
        before = _schema_of(file)
        target = schema_with(before, part, changed)
        new = pa.ipc.new_file if is_file_format else pa.ipc.new_stream
        arrow, done = part.with_format("arrow"), 0
        with new(sink, target) as writer:
            for batch in self.batches(file):
                rows = arrow[done : done + len(batch)]
                done += len(batch)
                columns = [
                    batch.column(each.name)
                    if each.name in before.names and each.name not in changed
                    else rows.column(each.name).cast(each.type)
                    for each in target
                ]
                writer.write_table(pa.table(columns, schema=target))
                tick(len(batch))


def _schema_of(file: Path) -> pa.Schema:
    with pa.memory_map(str(file)) as opened:
        try:
            return pa.ipc.open_stream(opened).schema
        except pa.ArrowInvalid:
            opened.seek(0)
            return pa.ipc.open_file(opened).schema


class SavedFormat(TableFormat):
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has made."""

    name = "dataset"

    def read(self, source: Source, folder: Path) -> Any:
        import datasets

        found = datasets.load_from_disk(str(source.root))
        if self.settings.output.inplace and not isinstance(found, datasets.Dataset):
            raise UsageError("--inplace: it is a DatasetDict, of splits; give an --output")
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
