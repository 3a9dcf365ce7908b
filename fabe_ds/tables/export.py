"""A Dataset -> a file, or a folder as `save_to_disk` makes it."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config import RunConfig
from fabe_ds.errors import UsageError
from fabe_ds.folders import check_writable
from fabe_ds.records.export import replacing
from fabe_ds.result import DEFAULT_OUTPUT
from fabe_ds.tables.csv import write_csv
from fabe_ds.tables.load import SEPARATORS, is_saved

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000


def table_place(config: RunConfig) -> Path:
    """The file, or the folder, that a table is written to.

    Raises: UsageError where that is the input, or cannot be.
    """
    path, folder = config.input_path, config.output_path or DEFAULT_OUTPUT
    assert path is not None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: not a folder")
    kind = config.output_format or _kind_of(path)
    name = path.stem if path.is_file() else path.name or path.resolve().name
    if config.split != "train":  # beside what another split's run has written
        name = f"{name}-{re.sub(r'[^A-Za-z0-9_.]+', '-', config.split).strip('-')}"
    place = folder / (name if kind == "dataset" else f"{name}.{kind}")
    source, target = path.resolve(), place.resolve()
    if target in (source, *source.parents) or (path.is_dir() and folder.resolve() == source):
        raise UsageError(f"--output {folder}: would replace the input {path}; name another")
    check_writable(place)
    return place


def export_table(dataset: Dataset, place: Path, config: RunConfig) -> None:
    """Writes the rows to `place`, whole or not at all. Raises: ExportError."""
    assert config.input_path is not None
    kind = config.output_format or _kind_of(config.input_path)
    if kind == "dataset":
        _save(dataset, place)
        return
    with replacing(place) as file:
        if kind == "parquet":
            dataset.to_parquet(file)
        elif kind == "jsonl":
            for row in _rows(dataset):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        else:
            lines = (tuple(row.values()) for row in _rows(dataset))
            write_csv(chain([dataset.column_names], lines), SEPARATORS[f".{kind}"], file)


def _kind_of(path: Path) -> str:
    """What a table is written as where nobody says."""
    if is_saved(path):
        return "dataset"
    suffix = path.suffix.lower()
    return suffix[1:] if path.is_file() and suffix in SEPARATORS else "parquet"


def _save(dataset: Dataset, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        dataset.save_to_disk(str(scratch / "saved"))
        if place.exists():
            place.rename(scratch / "old")
        (scratch / "saved").rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
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
