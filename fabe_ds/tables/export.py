"""A Dataset -> a file, or a folder as `save_to_disk` makes it."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fabe_ds.config import RunConfig
from fabe_ds.records.export import replacing
from fabe_ds.tables.load import SEPARATORS, is_saved

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000
DEFAULT_OUTPUT = Path("outputs")


def export_table(dataset: Dataset, config: RunConfig) -> Path:
    """Writes the rows in the output folder, whole or not at all; gives the place.

    Raises: ExportError.
    """
    path, folder = config.input_path, config.output_path or DEFAULT_OUTPUT
    assert path is not None
    kind = config.output_format or _kind_of(path)
    if kind == "dataset":
        return _save(dataset, folder / path.name)
    place = folder / f"{path.stem if path.is_file() else path.name}.{kind}"
    with replacing(place) as file:
        if kind == "parquet":
            dataset.to_parquet(file)
        elif kind == "jsonl":
            _write_lines(dataset, file)
        else:
            _write_csv(dataset, file, SEPARATORS[f".{kind}"])
    return place


def _kind_of(path: Path) -> str:
    """What a table is written as where nobody says."""
    if is_saved(path):
        return "dataset"
    suffix = path.suffix.lower()
    return suffix[1:] if path.is_file() and suffix in SEPARATORS else "parquet"


def _save(dataset: Dataset, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        dataset.save_to_disk(str(scratch / "saved"))
        if place.exists():
            place.rename(scratch / "old")
        (scratch / "saved").rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return place


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        yield from table.to_pylist()


def _write_lines(dataset: Dataset, file: IO[bytes]) -> None:
    """JSON lines. Not `Dataset.to_json`, which rounds numbers and makes numbers of dates."""
    for row in _rows(dataset):
        file.write((json.dumps(_plain(row), ensure_ascii=False) + "\n").encode())


def _write_csv(dataset: Dataset, file: IO[bytes], separator: str) -> None:
    """One line a row; what is no text stands as JSON."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow(dataset.column_names)
    for row in _rows(dataset):
        writer.writerow(
            value if value is None or isinstance(value, str) else json.dumps(_plain(value))
            for value in row.values()
        )
    text.detach()


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
