"""Files -> one memory-mapped Dataset that carries each record's own text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import InputError, UsageError
from fabe_ds.folders import private_folder
from fabe_ds.records.discover import Source, discover
from fabe_ds.records.read import Tail, read_records
from fabe_ds.records.scan import Field, Target, parse_path
from fabe_ds.surrogates import encodable

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

LOADER_VERSION = 1
ROWS = 4096
CHARACTERS = 1 << 24

SCHEMA = pa.schema(
    [
        ("file", pa.string()),  # path below the input root
        ("index", pa.int64()),  # which record of its file, from 0
        ("line", pa.int64()),  # where it begins, from 1
        ("before", pa.large_string()),  # text of the file between the last record and this one
        ("raw", pa.large_string()),  # the record's own text
        ("start", pa.int64()),  # raw[start:end] is the target's literal; -1 where there is none
        ("end", pa.int64()),
        ("joint", pa.string()),  # what stands between that literal and a backup's
        ("text", pa.large_string()),  # the target's value; null where the record is skipped
        ("skip", pa.string()),  # why it is skipped, or null
        ("after", pa.large_string()),  # text behind the last record of a file; null for others
    ]
)
"""The carrier: the columns of what `load_records` gives. A file is `before + raw` of all its
rows and `after` of the last."""


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """What became of one input file. `error` is set where it was left out as broken."""

    name: str
    records: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    dataset: Dataset
    sources: list[Source]
    files: list[LoadedFile]


def load_records(
    path: str | Path,
    field: str = "code",
    *,
    glob: str | Sequence[str] = (),
    backup_field: str | None = "original_code",
    records_key: str | None = None,
    on_bad_input: str = "fail",
    cache_dir: str | Path = ".cache",
) -> Dataset:
    """The records of a JSON or JSON-lines file, or of a folder of them, as a Dataset.

    One row a record, with the columns of `SCHEMA`; memory-mapped from `cache_dir`, and reused
    while the contents of the files stay what they are. `field` is a dotted path
    (`messages.0.content`), `glob` one pattern or several for a folder, `records_key` the key of
    the list in files that wrap it in an object.

    Raises: UsageError (nothing to read), InputError (a broken file; with on_bad_input="skip" it
    is logged and left out).
    """
    globs = [glob] if isinstance(glob, str) else list(glob)
    sources = discover(Path(path), globs)
    return load(sources, field, backup_field, records_key, on_bad_input, Path(cache_dir)).dataset


def load(
    sources: Sequence[Source],
    field: str,
    backup_field: str | None,
    records_key: str | None,
    on_bad_input: str,
    cache_dir: Path,
) -> Loaded:
    """`load_records` of files already found; tells what became of each."""
    target = field_target(field, backup_field)
    fingerprint = _fingerprint(sources, field, backup_field, records_key, on_bad_input)
    folder = private_folder(private_folder(cache_dir) / "datasets") / fingerprint
    if not (folder / "files.json").exists():
        _write(folder, sources, target, records_key, on_bad_input)
    files = [LoadedFile(**entry) for entry in json.loads((folder / "files.json").read_text())]
    for file in files:
        if file.error:
            log.warning("left out: %s", file.error)
    return Loaded(_open(folder / "records.arrow", fingerprint), list(sources), files)


def load_fields(
    sources: Sequence[Source],
    targets: Sequence[tuple[str, str | None]],
    records_key: str | None,
    on_bad_input: str,
    cache_dir: Path,
) -> Loaded:
    """`load` for several fields, each with its backup: all the records with the first as their
    target, then all with the second, and so on. A column `target` says which."""
    from datasets import concatenate_datasets

    each = [
        load(sources, field, backup, records_key, on_bad_input, cache_dir)
        for field, backup in targets
    ]
    if len(each) == 1:
        return each[0]
    parts = []
    for number, loaded in enumerate(each):
        column = pa.repeat(pa.scalar(number, pa.int8()), len(loaded.dataset))
        parts.append(loaded.dataset.add_column("target", column))
    return Loaded(concatenate_datasets(parts), each[0].sources, each[0].files)


def by_target(dataset: Dataset) -> list[Dataset]:
    """The records once for each field that they were loaded for."""
    if "target" not in dataset.column_names or not len(dataset):
        return [dataset]
    count = dataset[-1]["target"] + 1
    size = len(dataset) // count
    return [dataset.select(range(n * size, (n + 1) * size)) for n in range(count)]


def field_target(field: str, backup_field: str | None) -> Field:
    """The field made ready. Raises: UsageError where no backup can stand beside it."""
    try:
        path = parse_path(field)
    except ValueError as error:
        raise UsageError(f"--field: {error}") from None
    if backup_field and path[-1] == backup_field:
        raise UsageError(f"--backup-field {backup_field}: it is the target field itself")
    return Field(path, backup_field or None)


def batches(source: Source, field: Field, records_key: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one file in columns, some thousands at a time.

    Raises: InputError.
    """
    rows: list[tuple[Any, ...]] = []
    index = first = weight = 0
    tail = None
    for item in read_records(source, field, records_key):
        if isinstance(item, Tail):
            tail = item.text if index else None
            break
        if len(rows) >= ROWS or weight > CHARACTERS:
            yield _columns(source.name, first, rows, None)
            rows, first, weight = [], index, 0
        line, before, raw, target = item
        skip = _skip_reason(target)
        if target is None:
            rows.append((line, before, raw, -1, -1, "", None, skip))
        else:
            start, end, value, joint = target
            text = None if skip else encodable(value)
            rows.append((line, before, raw, start, end, joint, text, skip))
        weight += len(raw)
        index += 1
    yield _columns(source.name, first, rows, tail)


def _columns(
    name: str, first: int, rows: list[tuple[Any, ...]], tail: str | None
) -> dict[str, Any]:
    count = len(rows)
    line, before, raw, start, end, joint, text, skip = zip(*rows, strict=True) if rows else [()] * 8
    after = [None] * count
    if tail is not None:
        after[-1] = tail  # type: ignore[call-overload]
    return {
        "file": pa.repeat(name, count),
        "index": pa.array(range(first, first + count), pa.int64()),
        "line": line,
        "before": before,
        "raw": raw,
        "start": start,
        "end": end,
        "joint": joint,
        "text": text,
        "skip": skip,
        "after": after,
    }


def _skip_reason(target: Target | None) -> str | None:
    if target is None:
        return "missing"
    value = target.value
    if value is None:
        return "null"
    if not isinstance(value, str) or target.end - target.start == len(value):
        return "not a string"  # numbers are scanned as text, and have no quotes
    if not value or value.isspace():
        return "empty"
    return None


def _fingerprint(sources: Sequence[Source], *options: Any) -> str:
    contents = [(source.name, source.digest()) for source in sources]
    seed = json.dumps([LOADER_VERSION, options, contents])
    return hashlib.sha256(seed.encode()).hexdigest()[:32]


def _write(
    folder: Path,
    sources: Sequence[Source],
    field: Field,
    records_key: str | None,
    on_bad_input: str,
) -> None:
    """Writes the carrier beside its place and moves it there whole."""
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        files = []
        with (
            pa.OSFile(str(scratch / "records.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
        ):
            for source in sources:
                files.append(_write_file(writer, source, field, records_key, on_bad_input))
        (scratch / "files.json").write_text(json.dumps([asdict(file) for file in files]))
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "files.json").exists():  # another process may have been first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_file(
    writer: pa.RecordBatchWriter,
    source: Source,
    field: Field,
    records_key: str | None,
    on_bad_input: str,
) -> LoadedFile:
    if on_bad_input == "skip":  # read once before a row of it is written
        try:
            for _ in read_records(source, field, records_key):
                pass
        except InputError as error:
            return LoadedFile(source.name, 0, str(error))
    records = 0
    for columns in batches(source, field, records_key):
        rows = pa.record_batch(columns, schema=SCHEMA)
        records += rows.num_rows
        writer.write_batch(rows)
    return LoadedFile(source.name, records)


def _open(path: Path, fingerprint: str) -> Dataset:
    from datasets import Dataset

    found = Dataset.from_file(os.fspath(path.resolve()))
    return Dataset(found.data, info=found.info, split=found.split, fingerprint=fingerprint)
