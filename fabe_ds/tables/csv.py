"""CSV files <-> a Dataset in which every field is the text that it is: 007, 1.10, NA."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import InputError
from fabe_ds.records.discover import Source

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 1000


def load_csv(files: Sequence[Path], separator: str, folder: Path) -> Dataset:
    """The rows of files with the same columns, kept as Arrow in `folder`.

    Raises: InputError (file and line; a row with more or fewer fields than the first line has).
    """
    from datasets import Dataset

    digests = [Source(path, path.name).digest() for path in files]
    name = hashlib.sha256(repr([separator, digests]).encode()).hexdigest()[:32]
    place = folder / f"csv-{name}.arrow"
    if not place.exists():
        scratch = place.with_suffix(f".{os.getpid()}.tmp")
        try:
            _write_arrow(files, separator, scratch)
            scratch.replace(place)
        finally:
            scratch.unlink(missing_ok=True)
    found = Dataset.from_file(str(place))
    return Dataset(found.data, info=found.info, split=found.split, fingerprint=name)


def _write_arrow(files: Sequence[Path], separator: str, place: Path) -> None:
    schema = None
    with pa.OSFile(str(place), "wb") as sink:
        writer = None
        for path in files:
            rows = _rows(path, separator)
            names = next(rows)
            if schema is None:
                schema = pa.schema([(name, pa.string()) for name in names])
                writer = pa.ipc.new_stream(sink, schema)
            elif names != schema.names:
                raise InputError(path, f"other columns than {files[0]} has", 1)
            assert writer is not None
            while part := list(islice(rows, ROWS)):
                columns = [pa.array(column, pa.string()) for column in zip(*part, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        if writer is not None:
            writer.close()


def _rows(path: Path, separator: str) -> Iterator[list[str]]:
    """The names of the columns, then the rows."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        names: list[str] = []
        try:
            for row in reader:
                if not row and len(names) != 1:  # an empty line; of one column, an empty field
                    continue
                row = row or [""]
                if not names:
                    names = row
                    if twice := next((name for name in names if names.count(name) > 1), None):
                        raise InputError(path, f"two columns are called {twice!r}", 1)
                elif len(row) != len(names):
                    raise InputError(
                        path,
                        f"{len(row)} fields, where the first line has {len(names)}",
                        reader.line_num,
                    )
                yield row
        except UnicodeDecodeError:
            raise InputError(path, "not UTF-8; convert it first (iconv)") from None
        except csv.Error as error:
            raise InputError(path, str(error), reader.line_num) from None
    if not names:
        raise InputError(path, "empty: its first line must name the columns")


def write_csv(rows: Iterable[Sequence[Any]], separator: str, file: IO[bytes]) -> None:
    """One line a row. What is no text stands as JSON, what is null as nothing."""
    for row in rows:
        line = separator.join(_field(value, separator) for value in row)
        file.write((line or '""').encode() + b"\n")


def _field(value: Any, separator: str) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # The csv module before Python 3.13 leaves a carriage return unquoted.
    if any(mark in text for mark in (separator, '"', "\n", "\r")):
        return '"' + text.replace('"', '""') + '"'
    return text
