"""Dataset -> files: the new value is spliced into the text that was read."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from json.encoder import encode_basestring, encode_basestring_ascii
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from fabe_ds.errors import ExportError, UsageError
from fabe_ds.records.discover import Source
from fabe_ds.records.load import by_target
from fabe_ds.records.mapped import passed_over

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

ROWS = 2048
_escaped_character = re.compile(r"\\u(?!00[0-7])")
_RECORD = ("file", "index", "before", "raw", "after")
_EDIT = ("start", "end", "joint", "completion")
COLUMNS = (*_RECORD, *_EDIT)

Edit = tuple[int, int, str, str | None]
"""Where a target's literal begins and ends, what stands between it and a backup, the new value."""


class _Row(NamedTuple):
    file: str
    number: int
    before: str
    raw: str
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
    if not len(dataset):
        return []
    missing = set(COLUMNS) - set(dataset.column_names)
    if missing:
        raise UsageError(f"not a transformed carrier: no column {', '.join(sorted(missing))}")
    base = Path(root if inplace else output)  # type: ignore[arg-type]

    def destination(name: str) -> Path:
        return base if inplace and base.is_file() else base / name

    written: list[Path] = []
    rows = _rows(dataset)
    row = next(rows, None)
    while row is not None:
        path = destination(row.file)
        with replacing(path) as file:
            row = _write_file(file, row, rows)
        written.append(path)
    return written


def copy_unchanged(source: Source, path: Path) -> None:
    """A file with no records in it goes through as it is."""
    with replacing(path, compress=False) as file:
        file.write(source.path.read_bytes())


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


def _write_file(file: IO[bytes], row: _Row, rows: Iterator[_Row]) -> _Row | None:
    """Writes one file's rows, from its first on; gives the first of the next file."""
    name, expected = row.file, 0
    parts: list[str] = []
    current: _Row | None = row
    with _Behind(file) as sink:
        while current is not None and current.file == name and current.number == expected:
            expected += 1
            parts.append(current.before)
            parts += spliced(current.raw, current.edits)
            if current.after is not None:
                parts.append(current.after)
                sink.write("".join(parts))
                return next(rows, None)
            if len(parts) > ROWS:
                sink.write("".join(parts))
                parts.clear()
            current = next(rows, None)
    raise ExportError(
        f"{name}: record {expected} is missing or out of order; export takes all the records of "
        "a file, in the order they were loaded"
    )


class _Behind:
    """Writes text to a file a piece behind, in a thread: the disk's time is not ours."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[int] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._pool.shutdown()

    def write(self, text: str) -> None:
        self._settle()
        self._last = self._pool.submit(self._file.write, text.encode())

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


@contextlib.contextmanager
def replacing(path: Path, compress: bool | None = None) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and not before.

    Symlinks are followed; mode and owner of what is replaced are kept; the data is on disk before
    the name changes. Compressed where the name ends in .gz.

    Raises: ExportError.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from None
    scratch = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            gz = path.suffix.lower() == ".gz" if compress is None else compress
            if gz:
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield file
            file.flush()
            _keep_mode(file.fileno(), path)
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        scratch.unlink(missing_ok=True)


def _keep_mode(handle: int, path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        return
    if status.st_nlink > 1:
        log.warning("%s has other hard links; they keep the old contents", path)
    os.fchmod(handle, status.st_mode & 0o7777)
    with contextlib.suppress(PermissionError):  # only root gives files away
        os.fchown(handle, status.st_uid, status.st_gid)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
