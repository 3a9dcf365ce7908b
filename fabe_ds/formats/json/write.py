"""Dataset -> files: the new value is spliced into the text that was read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from json.encoder import encode_basestring, encode_basestring_ascii
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from fabe_ds.errors import ExportError, UsageError
from fabe_ds.files import Replacing
from fabe_ds.formats.discover import Source
from fabe_ds.formats.json.load import FOREIGN, by_target
from fabe_ds.formats.json.read import no_tick
from fabe_ds.formats.paging import passed_over
from fabe_ds.text import real_name

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 2048
_escaped_character = re.compile(r"\\u(?!00[0-7])")
_RECORD = ("file", "index", "before", "raw", "skip", "after")
_EDIT = ("start", "end", "joint", "completion")
COLUMNS = (*_RECORD, *_EDIT)

Edit = tuple[int, int, str, str | None]
"""Where a target's literal begins and ends, what stands between it and a backup, the new value."""


class _Row(NamedTuple):
    file: str
    number: int
    before: str
    raw: str
    skip: str | None
    after: str | None
    edits: tuple[Edit, ...]


def export_records(
    dataset: Dataset,
    output: str | Path | None = None,
    *,
    inplace: bool = False,
    root: str | Path | None = None,
) -> list[Path]:
    """Writes the records back to files laid out as those they came from.

    `dataset` holds the carrier's columns and `completion`, the new value of each target (null
    keeps it as it is). `output` is a folder that mirrors the input's; with `inplace` the
    files below `root` (the path that was loaded) are replaced. Every file appears whole or not at
    all. Gives the paths written.

    Raises: UsageError, ExportError (rows missing or out of order; a file that cannot be written).
    """
    if inplace == (output is not None):
        raise UsageError("give either an output folder or inplace=True")
    if inplace and root is None:
        raise UsageError("inplace needs root, the path that was loaded")
    base = Path(root if inplace else output)  # type: ignore[arg-type]

    def place(name: str) -> Path:
        return base if inplace and base.is_file() else base / real_name(name)

    return [Path(path) for path in write_files(dataset, place)]


def write_files(
    dataset: Dataset, place: Callable[[str], Path | str], tick: Callable[[int], None] = no_tick
) -> dict[str, str]:
    """Writes the files of a transformed carrier, each to the place that there is for its name.

    `tick` is told the records that were written, as they are. Gives the SHA-256 of each file by
    its path.
    Raises: UsageError, ExportError.
    """
    if not len(dataset):
        return {}
    missing = set(COLUMNS) - set(dataset.column_names)
    if missing:
        raise UsageError(f"not a transformed carrier: no column {', '.join(sorted(missing))}")
    rows = _rows(dataset)
    row = next(rows, None)
    with Replacing() as files, ThreadPoolExecutor(1) as behind:
        while row is not None:
            with files.open(place(row.file)) as file:
                row = _write_file(_Behind(file, behind), row, rows, tick)
    return files.digests


def copy_unchanged(source: Source, path: str) -> str:
    """A file with no records in it goes through as it is. Gives its SHA-256."""
    with Replacing() as files, files.open(path, compress=False) as file:
        file.write(source.path.read_bytes())
    return files.digests[path]


def _rows(dataset: Dataset) -> Iterator[_Row]:
    """The records, each with the edits of all its targets."""
    first, *others = by_target(dataset)
    edits = zip(*(_tuples(part, _EDIT) for part in (first, *others)), strict=True)
    for record, edit in zip(_tuples(first, _RECORD), edits, strict=True):
        yield _Row._make((*record, edit))


def _tuples(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    arrow = dataset.select_columns(list(names)).with_format("arrow")
    for table in passed_over(arrow.iter(batch_size=ROWS)):
        yield from zip(*(table.column(name).to_pylist() for name in names), strict=True)


def _write_file(
    sink: _Behind, row: _Row, rows: Iterator[_Row], tick: Callable[[int], None]
) -> _Row | None:
    """Writes one file's rows, from its first on; gives the first of the next file."""
    name, expected = row.file, 0
    parts: list[str] = []
    current: _Row | None = row
    with sink:
        while current is not None and current.file == name and current.number == expected:
            expected += 1
            parts.append(current.before)
            if current.skip == FOREIGN:
                parts.append(current.raw.encode("latin-1").decode("utf-8", "surrogateescape"))
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
    for start, end, joint, new in sorted(edits, key=itemgetter(0)):
        if new is None:
            continue
        yield raw[done:start]
        yield literal(new, raw)
        yield joint
        done = start if joint else end
    yield raw[done:]


def literal(value: str, raw: str) -> str:
    """The value as a JSON string in the record's own manner: escaped to ASCII where that is."""
    if value.isascii() or (raw.isascii() and "\\u" in raw and _escaped_character.search(raw)):
        return encode_basestring_ascii(value)
    return encode_basestring(value)
