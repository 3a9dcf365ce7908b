"""A Dataset -> a file, or a folder as `save_to_disk` makes it."""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fabe_ds.errors import ExportError, reason
from fabe_ds.files import Replacing, swap
from fabe_ds.formats.csv_text import ROW, SEPARATORS, read_head, write_csv, write_csv_like
from fabe_ds.formats.parquet_columns import refuse_unheld, write_parquet_like
from fabe_ds.scratch import clear_scratch, remove, scratch_in

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000
_SAVED = ("state.json", "dataset_info.json")


@dataclass(frozen=True, slots=True)
class TableSource:
    """The files that a table was read from, and which of their rows, all counted through."""

    files: list[Path]
    ranges: Sequence[tuple[int, int]]


def kind_of_file(name: str) -> str | None:
    """What a table is written as in a file of that name; None where it names no such kind."""
    kind = name.rpartition(".")[2].lower()
    kind = "jsonl" if kind == "ndjson" else kind
    return kind if kind in ("jsonl", "parquet", "csv", "tsv") else None


def export_table(
    dataset: Dataset,
    source: TableSource,
    changed: Collection[str],
    place: Path,
    kind: str,
    tick: Callable[[int], None],
) -> dict[str, str]:
    """Writes the rows to `place`, whole or not at all; `tick` is told of them.

    `source` is what they were read from, of which the columns `changed` have other values. What was
    read from a CSV or a Parquet file, and is written as such, keeps all that was not asked about
    as it was. Gives the SHA-256 of the file by its path. Raises: ExportError, UsageError.
    """
    before = source.files[0].suffix.lower()[1:] if source.files else ""
    if before == "parquet" != kind:
        refuse_unheld(source.files[0], kind)
    if ROW in dataset.column_names and kind != before:
        dataset = dataset.remove_columns(ROW)
    if kind == "dataset":
        save_dataset(dataset, place)
        return {str(place): ""}
    with Replacing() as files, files.open(place) as file:
        if kind == before == "parquet":
            write_parquet_like(dataset, source.files, source.ranges, changed, file, tick)
        elif kind == "parquet":
            dataset.to_parquet(file)
        elif kind == "jsonl":
            for row in plain_rows(dataset):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                tick(1)
        elif ROW in dataset.column_names:
            write_csv_rows(dataset, source.files[0], SEPARATORS[f".{kind}"], file, tick)
        else:
            lines = (tuple(row.values()) for row in plain_rows(dataset))
            write_csv(chain([dataset.column_names], lines), SEPARATORS[f".{kind}"], file, tick)
    return files.digests


def write_csv_rows(
    dataset: Dataset, like: Path, separator: str, file: IO[bytes], tick: Callable[[int], None]
) -> None:
    """Writes rows that keep their own text, under the first line of the file `like`."""
    head = read_head(like, separator)
    names = [*head.names, *(n for n in dataset.column_names if n not in (*head.names, ROW))]
    texts = ((row[ROW], [row[name] for name in names]) for row in plain_rows(dataset))
    write_csv_like(head, names, texts, file, tick)


def save_dataset(dataset: Dataset, place: Path) -> None:
    """Writes a folder as `save_to_disk` does, in the place of one that is there, whole or not at
    all; what else stands in that folder stays. Raises: ExportError."""
    place = place.resolve()  # of a link, what it leads to
    scratch = scratch_in(place.parent)
    try:
        scratch.mkdir(parents=True)
        clear_scratch(place.parent)
        dataset.save_to_disk(str(scratch / "saved"))
        if place.exists():
            _take_along(place, scratch / "saved")
            swap(scratch / "saved", place)
        else:
            (scratch / "saved").rename(place)
    except OSError as error:
        raise ExportError(f"{place}: cannot be written: {reason(error)}") from None
    finally:
        remove(scratch)


def _take_along(old: Path, new: Path) -> None:
    """What a folder holds beside a saved Dataset goes into the new one, with the folder's mode."""
    for path in old.iterdir():
        is_ours = path.suffix == ".arrow" or path.name in _SAVED
        if is_ours or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
    shutil.copymode(old, new)


def plain_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows as JSON has them. Not `Dataset.to_json`, which rounds numbers and makes numbers of
    dates."""
    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        yield from map(_plain, table.to_pylist())


def _plain(value: Any) -> Any:
    """A column's value as JSON has it: dates in ISO 8601, bytes in base64, no NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value
