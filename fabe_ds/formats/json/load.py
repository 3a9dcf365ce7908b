"""Files -> one memory-mapped Dataset that carries each record's own text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import InputError, UsageError
from fabe_ds.fields import key_of, parse_path
from fabe_ds.files import digest, is_text
from fabe_ds.formats.base import BROKEN, no_tick
from fabe_ds.formats.discover import InputFile, discover, refuse_unread
from fabe_ds.formats.json.read import Broken, Record, Tail, read_records
from fabe_ds.formats.json.scan import Field, Fields, Located, Target
from fabe_ds.scratch import clear_scratch, not_kept, remove, scratch_in
from fabe_ds.store.layout import Layout, usable_folder
from fabe_ds.text import encodable

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

LOADER_VERSION = 3
ROWS = 4096
CHARACTERS = 1 << 24
FOREIGN = "not UTF-8"
"""Why a line that is no text is skipped; its `raw` is its bytes as ISO 8859-1."""

_TARGET = [
    ("start", pa.int64()),  # raw[start:end] is the target's literal; -1 where there is none
    ("end", pa.int64()),
    ("joint", pa.string()),  # what stands between that literal and a backup's
    ("text", pa.large_string()),  # the target's value; null where the record is skipped
    ("skip", pa.string()),  # why it is skipped, or null
]


def target_columns(count: int) -> list[list[str]]:
    """The names of the columns of each of so many targets: start, end, ...; start_1, end_1, ..."""
    names = [name for name, _ in _TARGET]
    return [[f"{name}_{number}" if number else name for name in names] for number in range(count)]


def schema_of(several: Sequence[bool]) -> pa.Schema:
    """The columns of a carrier with so many targets a record: lists for those that a record may
    have several times."""
    first, *others = target_columns(len(several)) or [[]]
    types = [[pa.list_(t) if many else t for _, t in _TARGET] for many in several]
    return pa.schema(
        [
            ("file", pa.string()),  # path below the input root, as text.shown_name writes it
            ("index", pa.int64()),  # which record of its file, from 0
            ("line", pa.int64()),  # where it begins, from 1
            ("before", pa.large_string()),  # text between the last record and this one
            ("raw", pa.large_string()),  # the record's own text
            *zip(first, *types[:1], strict=False),
            ("error", pa.string()),  # what is wrong with a line that is no record, or null
            ("after", pa.large_string()),  # text behind a file's last record; null for others
            *(pair for pairs in map(zip, others, types[1:]) for pair in pairs),
        ]
    )


SCHEMA = schema_of([False])
"""The carrier: the columns of what `load_records` gives. A file is `before + raw` of all its
rows and `after` of the last."""
_ROW = ("line", "before", "raw", "error")


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """What became of one input file. `error` is set where it was left out as broken."""

    name: str
    records: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    dataset: Dataset
    sources: list[InputFile]
    files: list[LoadedFile]
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file as it was loaded, by its name."""


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
    found = discover(Path(path), globs)
    refuse_unread(found.unread, on_bad_input)
    targets = [(field, backup_field)]
    loaded = load(found.sources, targets, records_key, on_bad_input, Path(cache_dir))
    return loaded.dataset


def load(
    sources: Sequence[InputFile],
    targets: Sequence[tuple[str, str | None]],
    records_key: str | None,
    on_bad_input: str,
    cache_dir: Path,
    tick: Callable[[int], None] = no_tick,
) -> Loaded:
    """`load_records` of files already found, for several fields, each with the key of its backup.

    Tells what became of each file. `tick` is told the bytes of the input that were read.
    """
    fields = Fields([field_target(*target) for target in targets])
    usable_folder(cache_dir)
    contents, readable, unread = _digests(sources, on_bad_input)
    # Of one field, they are named as they have always been, and so are found again.
    (field, backup_field), *others = targets
    options = (field, backup_field, records_key, on_bad_input, *others)
    fingerprint = _fingerprint(contents, *options)
    layout = Layout(cache_dir)
    folder = layout.made(layout.datasets) / fingerprint
    kept = _kept(folder)
    if kept is None:
        if folder.exists():
            log.warning("%s was damaged; the input is loaded again", folder)
            remove(folder)
        kept = _write(folder, readable, fields, records_key, on_bad_input, tick)
    os.utime(folder)  # its last use, which `cache prune` looks at
    files = [*kept, *unread]
    for file in files:
        if file.error:
            log.warning("left out: %s", file.error)
    records = _open(folder / "records.arrow", fingerprint)
    return Loaded(records, list(sources), files, dict(contents))


def _kept(folder: Path) -> list[LoadedFile] | None:
    """What became of each file, where the folder holds a carrier that is what was written."""
    try:
        kept = json.loads((folder / "files.json").read_text())
        if kept["digest"] == _seal(folder, kept["files"]):
            return [LoadedFile(*entry) for entry in kept["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _seal(folder: Path, files: Sequence[Sequence[Any]]) -> str:
    """Names what a carrier's folder holds: the records, and what became of each file."""
    seed = f"{digest(folder / 'records.arrow')}\0{json.dumps(files)}"
    return hashlib.sha256(seed.encode()).hexdigest()


def _digests(
    sources: Sequence[InputFile], on_bad_input: str
) -> tuple[list[tuple[str, str]], list[InputFile], list[LoadedFile]]:
    """The name and the digest of each file; the files that can be read; those that cannot.

    Raises: InputError, unless such files are to be left out.
    """
    contents, readable, unread = [], [], []
    for source in sources:
        try:
            contents.append((source.name, source.digest()))
        except InputError as error:
            if on_bad_input == "fail":
                raise
            unread.append(LoadedFile(source.name, 0, str(error)))
        else:
            readable.append(source)
    return contents, readable, unread


def field_target(field: str, backup_field: str | None) -> Field:
    """The field made ready. Raises: UsageError where no backup can stand beside it."""
    try:
        path = parse_path(field)
    except ValueError as error:
        raise UsageError(f"--field: {error}") from None
    if backup_field and key_of(path) == backup_field:
        raise UsageError(f"--backup-field {backup_field}: it is the target field itself")
    return Field(path, backup_field or None)


def row_of(record: Record | Broken, several: Sequence[bool]) -> tuple[Any, ...]:
    """A carrier's row but for where it stands: the values of `_ROW`, then those of each target."""
    line, before, raw = record[:3]
    if isinstance(record, Broken):
        nothing = (-1, -1, "", None, FOREIGN if record.foreign else BROKEN)
        values = [[value] if many else value for many in several for value in nothing]
        return (line, before, raw, record.message, *values)
    row = [line, before, raw, None]
    for located in record.targets:
        row += _of_target(located)
    return tuple(row)


def _of_target(target: Located) -> Sequence[Any]:
    if isinstance(target, list):
        places = map(_of_target, target)
        return [list(values) for values in zip(*places, strict=True)] or [[]] * len(_TARGET)
    reason = _skip_reason(target)
    if target is None:
        return -1, -1, "", None, reason
    start, end, value, joint, _ = target
    return start, end, joint, None if reason else encodable(value), reason


class _Rows:
    """Rows of one file after another, written a batch at a time whatever the files' sizes."""

    def __init__(
        self, writer: pa.RecordBatchWriter, schema: pa.Schema, several: Sequence[bool]
    ) -> None:
        self._writer, self._schema, self._several = writer, schema, several
        self._is_single = list(several) == [False]
        names = target_columns(len(several))
        self._names = [*_ROW, *(name for group in names for name in group)]
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._after: dict[int, str] = {}
        self._runs: list[tuple[str, int, int]] = []  # a file's name, first record, first row
        self._weight = 0

    def take(self, name: str, items: Iterator[Record | Broken | Tail]) -> int:
        """The rows of one file; gives how many."""
        index = 0
        self._runs.append((name, 0, len(self._rows)))
        for item in items:
            if isinstance(item, Tail):
                if index:
                    self._after[len(self._rows) - 1] = item.text
                break
            if len(self._rows) >= ROWS or self._weight > CHARACTERS:
                self.flush()
                self._runs.append((name, index, 0))
            target = item.targets[0] if self._is_single and isinstance(item, Record) else None
            if isinstance(target, Target):
                # As `row_of` makes it; made here, it takes half the time.
                start, end, value, joint, _ = target
                skip = _skip_reason(target)
                text = None if skip else encodable(value)
                line, before, raw = item[:3]
                self._rows.append((line, before, raw, None, start, end, joint, text, skip))
            else:
                self._rows.append(row_of(item, self._several))
            self._weight += len(item.raw)
            index += 1
        return index

    def flush(self) -> None:
        count = len(self._rows)
        if not count:
            return
        ends = [*(first for *_, first in self._runs[1:]), count]
        runs = [
            (name, index, end - first)
            for (name, index, first), end in zip(self._runs, ends, strict=True)
        ]
        columns: dict[str, Any] = dict(zip(self._names, zip(*self._rows, strict=True), strict=True))
        columns["file"] = pa.concat_arrays([pa.repeat(name, size) for name, _, size in runs])
        columns["index"] = [index + n for _, index, size in runs for n in range(size)]
        after: list[str | None] = [None] * count
        for number, text in self._after.items():
            after[number] = text
        columns["after"] = after
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._clear()


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


def _fingerprint(contents: Sequence[tuple[str, str]], *options: Any) -> str:
    dotted = any("." in str(name) for name in (options[0], *(name for name, _ in options[4:])))
    # Paths of several steps are found as keys that hold dots, too, since version 3.
    seed = json.dumps([LOADER_VERSION if dotted else 2, options, contents])
    return hashlib.sha256(seed.encode()).hexdigest()[:32]


def _write(
    folder: Path,
    sources: Sequence[InputFile],
    fields: Fields,
    records_key: str | None,
    on_bad_input: str,
    tick: Callable[[int], None],
) -> list[LoadedFile]:
    """Writes the carrier beside its place and moves it there whole.

    Raises: InputError, CacheError.
    """
    skip, schema = on_bad_input == "skip", schema_of(fields.several)
    loaded = []
    clear_scratch(folder.parent)
    try:
        scratch = scratch_in(folder.parent)
        scratch.mkdir(mode=0o700)
        try:
            with (
                pa.OSFile(str(scratch / "records.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
            ):
                rows = _Rows(writer, schema, fields.several)
                for source in sources:
                    error = _broken(source, records_key) if skip else None
                    count = 0
                    if error is None:
                        items = read_records(
                            source, fields, records_key, keep_broken=skip, tick=tick
                        )
                        count = rows.take(source.name, items)
                    loaded.append(LoadedFile(source.name, count, error))
                rows.flush()
            files = [(file.name, file.records, file.error) for file in loaded]
            kept = {
                "files": files,
                "digest": _seal(scratch, files),
            }
            (scratch / "files.json").write_text(json.dumps(kept))
            try:
                scratch.rename(folder)
            except OSError:
                if _kept(folder) is None:  # another process may have been first
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise not_kept(folder.parents[1], error) from None
    return loaded


def _broken(source: InputFile, records_key: str | None) -> str | None:
    """Why a file is left out as a whole. It is read once before a row of it is written."""
    try:
        for _ in read_records(source, Fields(()), records_key, keep_broken=True):
            pass
    except InputError as error:
        return str(error)
    return None


def _open(path: Path, fingerprint: str) -> Dataset:
    from datasets import Dataset

    whole = os.fspath(path.resolve())
    found = Dataset.from_file(whole if is_text(whole) else os.fspath(path))
    return Dataset(found.data, info=found.info, split=found.split, fingerprint=fingerprint)
