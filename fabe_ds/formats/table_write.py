"""A Dataset -> a file, or a folder as `save_to_disk` makes it."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config.settings import STANDARD, RunConfig
from fabe_ds.destinations import check_reports, output_of, reports_of
from fabe_ds.errors import ExportError, UsageError, reason
from fabe_ds.files import (
    check_file_writable,
    check_writable,
    clear_scratch,
    remove,
    replacing,
    scratch_in,
)
from fabe_ds.formats.csv import ROW, read_head, write_csv, write_csv_like
from fabe_ds.formats.parquet import refuse_unheld, write_parquet_like
from fabe_ds.formats.table import SEPARATORS, Table, is_saved
from fabe_ds.run_files import REPORT, beside

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000


def table_place(config: RunConfig) -> tuple[Path, Path]:
    """The file, or the folder, that a table is written to; and what the report stands beside.

    Raises: UsageError where that is the input, or cannot be.
    """
    path = config.input_path
    assert path is not None
    output, single = output_of(config)
    reports = reports_of(config, output, single)
    if single:
        kind = _kind_of_file(output, config)
        place = output
    else:
        kind = _kind_of(config)
        name = path.stem if path.is_file() else path.name or path.resolve().name
        if config.split != "train":  # beside what another split's run has written
            name = f"{name}-{re.sub(r'[^A-Za-z0-9_.]+', '-', config.split).strip('-')}"
        place = output / (name if kind == "dataset" else f"{name}.{kind}")
    source, target = path.resolve(), place.resolve()
    if target in (source, *source.parents) or (path.is_dir() and output.resolve() == source):
        raise UsageError(f"--output {output}: would replace the input {path}; name another")
    inside = path.is_dir() and target.is_relative_to(source) and target.is_file()
    if single and inside and not beside(reports, REPORT).exists():
        raise UsageError(f"--output {output}: would replace a file of the input; name another")
    if config.output_path == STANDARD and kind == "dataset":
        raise UsageError("--output -: a saved Dataset is a folder; give an --output-format")
    if kind == "dataset":
        check_writable(place)
    else:
        check_file_writable(place)
    check_reports(reports)
    return place, reports


def _kind_of_file(output: Path, config: RunConfig) -> str:
    """What a table is written as in a file of that name."""
    suffix = output.suffix.lower()[1:]
    kind = "jsonl" if suffix == "ndjson" else suffix
    if kind not in ("jsonl", "parquet", "csv", "tsv"):
        raise UsageError(f"--output {output}: a table is written as .parquet, .csv, .tsv or .jsonl")
    if config.output_format not in (None, kind):
        raise UsageError(
            f"--output {output} and --output-format {config.output_format} do not go together"
        )
    return kind


def export_table(
    dataset: Dataset,
    table: Table,
    changed: Collection[str],
    place: Path,
    config: RunConfig,
    tick: Callable[[int], None],
) -> None:
    """Writes the rows to `place`, whole or not at all; `tick` is told of them.

    `table` is what they were read as, of which the columns `changed` have other values. What was
    read from a CSV or a Parquet file, and is written as such, keeps all that was not asked
    about as it was. Raises: ExportError, UsageError.
    """
    kind = _kind_of_file(place, config) if output_of(config)[1] else _kind_of(config)
    table.check_unchanged()
    source = table.files[0].suffix.lower()[1:] if table.files else ""
    if kind == source == "parquet":
        with replacing(place) as file:
            write_parquet_like(dataset, table.files, table.ranges, changed, file, tick)
        return
    if source == "parquet":
        refuse_unheld(table.files[0], kind)
    if ROW in dataset.column_names and kind != source:
        dataset = dataset.remove_columns(ROW)
    if kind == "dataset":
        _save(dataset, place)
        return
    with replacing(place) as file:
        if kind == "parquet":
            dataset.to_parquet(file)
        elif kind == "jsonl":
            for row in _rows(dataset):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                tick(1)
        elif ROW in dataset.column_names:
            head = read_head(table.files[0], SEPARATORS[f".{kind}"])
            names = [*head.names, *(n for n in dataset.column_names if n not in (*head.names, ROW))]
            texts = ((row[ROW], [row[name] for name in names]) for row in _rows(dataset))
            write_csv_like(head, names, texts, file, tick)
        else:
            lines = (tuple(row.values()) for row in _rows(dataset))
            separator = SEPARATORS[f".{kind}"]
            write_csv(chain([dataset.column_names], lines), separator, file, tick)


def _kind_of(config: RunConfig) -> str:
    """What a table is written as in a folder."""
    path = config.input_path
    assert path is not None
    if config.output_format:
        return config.output_format
    if is_saved(path):
        return "dataset"
    suffix = path.suffix.lower()
    return suffix[1:] if path.is_file() and suffix in SEPARATORS else "parquet"


def _save(dataset: Dataset, place: Path) -> None:
    scratch = scratch_in(place.parent)
    try:
        scratch.mkdir(parents=True)
        clear_scratch(place.parent)
        dataset.save_to_disk(str(scratch / "saved"))
        if place.exists():
            place.rename(scratch / "old")
        (scratch / "saved").rename(place)
    except OSError as error:
        raise ExportError(f"{place}: cannot be written: {reason(error)}") from None
    finally:
        remove(scratch)


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
