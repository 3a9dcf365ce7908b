"""Dataset -> files: the new value is spliced into the text that was read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, repeat
from json.encoder import encode_basestring, encode_basestring_ascii
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from fabe_ds.answers import Answer, Answers, status, values_of
from fabe_ds.errors import ExportError, UsageError
from fabe_ds.fields import Targets
from fabe_ds.files import Replacing
from fabe_ds.formats.base import BROKEN, Records, no_tick
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.json.load import FOREIGN, target_columns
from fabe_ds.paging import passed_over
from fabe_ds.text import real_name

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 2048
_first_member = re.compile(r'\{([ \t\n\r]*)"(?:[^"\\]|\\.)*"[ \t\n\r]*:([ \t\n\r]*)')
_escaped_character = re.compile(r"\\u(?!00[0-7])")
_RECORD = ("file", "index", "before", "raw", "skip", "after")
_EDIT = ("start", "end", "joint")


Edit = tuple[Any, ...]
"""Where a literal begins and ends in a record (-1: it is not there), what stands between it and a
backup, and the new value: a text, or `Json`; None keeps the old one."""


class Json(str):
    """A value that is written as JSON already."""


class EditedRecord(NamedTuple):
    """A record as it stands in its file, what changes in it, and the members that it gains."""

    file: str
    number: int
    before: str
    raw: str
    skip: str | None
    after: str | None
    edits: Sequence[Edit]
    gained: Mapping[str, Any] = MappingProxyType({})


def export_records(
    dataset: Dataset,
    output: str | Path | None = None,
    *,
    inplace: bool = False,
    root: str | Path | None = None,
) -> list[Path]:
    """Writes the records back to files laid out as those they came from.

    `dataset` holds the carrier's columns and `completion`, the new value of the field (null keeps
    it as it is). `output` is a folder that mirrors the input's; with `inplace` the files below
    `root` (the path that was loaded) are replaced. Every file appears whole or not at all. Gives
    the paths written.

    Raises: UsageError, ExportError (rows missing or out of order; a file that cannot be written).
    """
    if inplace == (output is not None):
        raise UsageError("give either an output folder or inplace=True")
    if inplace and root is None:
        raise UsageError("inplace needs root, the path that was loaded")
    base = Path(root if inplace else output)  # type: ignore[arg-type]

    def place(name: str) -> Path:
        return base if inplace and base.is_file() else base / real_name(name)

    if not len(dataset):
        return []
    missing = {*_RECORD, *_EDIT, "completion"} - set(dataset.column_names)
    if missing:
        raise UsageError(f"not a transformed carrier: no column {', '.join(sorted(missing))}")
    names = (*_RECORD, *_EDIT, "completion")
    rows = (_record_of(row, [row[len(_RECORD) :]]) for row in _tuples(dataset, names))
    return [Path(path) for path in write_files(rows, place)]


def rows_with_answers(records: Records, answers: Answers) -> Iterator[EditedRecord]:
    """The records of a carrier, each with the edits that its answers ask for, and with the members
    that it gains: all samples, and what became of it."""
    targets, fields = answers.targets, len(answers.targets.names)
    columns = target_columns(fields + len(targets.gained))
    places = [name for group in columns for name in group[: len(_EDIT)]]
    rows, width = _tuples(records.dataset, [*_RECORD, *places]), len(_RECORD)
    if not targets.gained and targets.each == 1:  # as nearly all are: twice as quick
        texts = (table.column("completion").to_pylist() for table in answers.tables(ROWS))
        for row, text in zip(rows, chain.from_iterable(texts), strict=True):
            file, index, before, raw, skip, after, start, end, joint = row
            edits = ((start, end, joint, text),)
            yield EditedRecord(file, index, before, raw, skip, after, edits)
        return
    done = records.done or repeat((), len(records))
    for row, given, before in zip(rows, answers.records(ROWS), done, strict=True):
        found = [row[at : at + len(_EDIT)] for at in range(width, len(row), len(_EDIT))]
        changes: list[Edit] = [
            (*place, value)
            for place, value in zip(found, values_of(given, targets.samples), strict=False)
        ]
        gained = {} if len(before) == fields else _gained(targets, given)
        if 0 in before:  # samples are those of the first field, which is done
            gained.pop(targets.samples_field or "", None)
        for name, place in zip(targets.gained, found[fields:], strict=True):
            if name in gained and place[0] >= 0:  # as an earlier run in place has left it
                raw = row[_RECORD.index("raw")]
                value = Json(dumped(gained.pop(name), raw))
                changes.append((place[0], place[1], "", value))
        yield _record_of(row, changes, {} if _is_broken(row) else gained)


def _record_of(
    row: tuple[Any, ...], edits: Sequence[Edit], gained: Mapping[str, Any] = MappingProxyType({})
) -> EditedRecord:
    return EditedRecord._make((*row[: len(_RECORD)], edits, gained))


def _gained(targets: Targets, answers: Sequence[Answer]) -> dict[str, Any]:
    gained: dict[str, Any] = {}
    if targets.samples_field:
        gained[targets.samples_field] = [each.completion for each in answers[: targets.samples]]
    if targets.status_field:
        gained[targets.status_field] = status(answers)
    return gained


def _is_broken(row: tuple[Any, ...]) -> bool:
    return row[_RECORD.index("skip")] in (BROKEN, FOREIGN)


def write_files(
    rows: Iterator[EditedRecord],
    place: Callable[[str], Path | str],
    tick: Callable[[int], None] = no_tick,
) -> dict[str, str]:
    """Writes the files of records, each to the place that there is for its name.

    `tick` is told the records that were written, as they are. Gives the SHA-256 of each file by
    its path. Raises: ExportError.
    """
    row = next(rows, None)
    with Replacing() as files, ThreadPoolExecutor(1) as behind:
        while row is not None:
            with files.open(place(row.file)) as file:
                row = _write_file(_Behind(file, behind), row, rows, tick)
    return files.digests


def copy_unchanged(source: InputFile, path: str) -> str:
    """A file with no records in it goes through as it is. Gives its SHA-256."""
    with Replacing() as files, files.open(path, compress=False) as file:
        file.write(source.path.read_bytes())
    return files.digests[path]


def _tuples(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    arrow = dataset.select_columns(list(names)).with_format("arrow")
    for table in passed_over(arrow.iter(batch_size=ROWS)):
        yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _write_file(
    sink: _Behind, row: EditedRecord, rows: Iterator[EditedRecord], tick: Callable[[int], None]
) -> EditedRecord | None:
    """Writes one file's rows, from its first on; gives the first of the next file."""
    name, expected = row.file, 0
    parts: list[str] = []
    current: EditedRecord | None = row
    with sink:
        while current is not None and current.file == name and current.number == expected:
            expected += 1
            parts.append(current.before)
            if current.skip == FOREIGN:
                parts.append(current.raw.encode("latin-1").decode("utf-8", "surrogateescape"))
            elif current.gained:
                whole = "".join(spliced(current.raw, current.edits))
                parts.append(with_members(whole, current.gained))
            else:
                parts += spliced(current.raw, current.edits)
            if current.after is not None:
                parts.append(current.after)
                sink.end("".join(parts))
                tick(expected % ROWS)
                return next(rows, None)
            if len(parts) > ROWS:
                sink.write("".join(parts))
                parts.clear()
            if expected % ROWS == 0:
                tick(ROWS)
            current = next(rows, None)
    raise ExportError(
        f"{name}: record {expected} is missing or out of order; export takes all the records of "
        "a file, in the order they were loaded"
    )


class _Behind:
    """Writes text to a file a piece behind, in a thread: the disk's time is not ours."""

    def __init__(self, file: IO[bytes], thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self._last: Future[int] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()

    def write(self, text: str) -> None:
        self._settle()
        self._last = self._thread.submit(self._write, text)

    def end(self, text: str) -> None:
        """Writes the last piece of the text."""
        self._settle()
        self._write(text)

    def _write(self, text: str) -> int:
        return self._file.write(text.encode("utf-8", "surrogateescape"))

    def _settle(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


def spliced(raw: str, edits: Sequence[Edit]) -> Iterator[str]:
    """The record's text with the new values in it, and the old literals where backups go."""
    done = 0
    for start, end, joint, new in sorted(edits, key=itemgetter(0)) if len(edits) > 1 else edits:
        if new is None:
            continue
        yield raw[done:start]
        yield literal(new, raw)
        yield joint
        done = start if joint else end
    yield raw[done:]


def literal(value: str, raw: str) -> str:
    """The value as a JSON string in the record's own manner: escaped to ASCII where that is."""
    if isinstance(value, Json):
        return value
    if value.isascii() or (raw.isascii() and "\\u" in raw and _escaped_character.search(raw)):
        return encode_basestring_ascii(value)
    return encode_basestring(value)


def dumped(value: Any, record: str) -> str:
    """A value as JSON, in a record's own manner: spaces, escapes."""
    first = _first_member.match(record)
    separators = (", ", ": ") if first is None or first[2] else (",", ":")
    # A record that escapes what is beyond ASCII has its new members escaped, too.
    to_ascii = record.isascii() and _escaped_character.search(record) is not None
    return json.dumps(value, ensure_ascii=to_ascii, separators=separators)


def with_members(record: str, members: Mapping[str, Any]) -> str:
    """The record's text with members behind its own, in its own manner: spaces, line ends,
    escapes. What is no object stays."""
    if not record.startswith("{"):
        return record
    inside = record[:-1].rstrip(" \t\n\r")
    first = _first_member.match(record)
    opening, colon = first.groups() if first else ("", " ")
    # Pretty-printed records have each member on a line; others a space, or nothing.
    lead = opening if "\n" in opening else " " if colon else ""
    parts = [inside]
    for name, value in members.items():
        if first or len(parts) > 1:
            parts.append(f",{lead}")
        parts.append(dumped({name: value}, record)[1:-1])
    return "".join((*parts, record[len(inside) :]))
