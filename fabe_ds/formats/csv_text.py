"""CSV files <-> a Dataset in which every field is the text that it is: 007, 1.10, NA.

Beside its fields, each row keeps its own text (column `ROW`), so that what does not change comes
back as it was written: quotes, line ends, blank lines. Grammar: RFC 4180, with any separator, and
with what Python's csv module allows.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.errors import InputError, reason
from fabe_ds.formats.base import OURS, no_tick
from fabe_ds.formats.discover import InputFile
from fabe_ds.store.layout import kept_file

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ROWS = 1000
ROW = f"{OURS}row"
"""The column of each row's own text."""
LOADER_VERSION = 2
_BOM = "\ufeff"
_OTHERS = ";\t|"
"""Separators that are looked for in a .csv file where the comma does not separate."""
_SNIFFED_ROWS = 20
_SEP_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # which Excel reads and writes
_LINE_END = re.compile(r"\r\n|\n|\r")
_BLANK = re.compile(r"[\r\n]*")


@dataclass(frozen=True, slots=True)
class Head:
    """How a CSV file begins. `opening` stands before the line of names: a byte order mark, Excel's
    line that names the separator."""

    opening: str
    separator: str
    names: list[str]
    row: str
    """The text of the line of names."""

    @property
    def line_end(self) -> str:
        found = _LINE_END.search(self.row, len(self.row.rstrip("\r\n")))
        return found[0] if found else "\n"


def load_csv(files: Sequence[Path], separator: str, folder: Path) -> Dataset:
    """The rows of files with the same columns, kept as Arrow in `folder`.

    `separator`: the usual one of such files; another is looked for where it separates nothing.
    Raises: InputError (file and line; a row with more or fewer fields than the first line has).
    """
    from datasets import Dataset

    digests = [InputFile(str(path), path.name).digest() for path in files]
    seed = repr([LOADER_VERSION, separator, digests])
    name = hashlib.sha256(seed.encode()).hexdigest()[:32]
    place = folder / f"csv-{name}.arrow"
    kept_file(place, lambda scratch: _write_arrow(files, separator, scratch))
    found = Dataset.from_file(str(place))
    return Dataset(found.data, info=found.info, split=found.split, fingerprint=name)


def _write_arrow(files: Sequence[Path], separator: str, place: Path) -> None:
    first = read_head(files[0], separator)
    if first.separator != separator:
        what = "tabs" if first.separator == "\t" else repr(first.separator)
        log.info("%s: its columns are separated by %s", files[0], what)
    schema = pa.schema([*((name, pa.string()) for name in first.names), (ROW, pa.large_string())])
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for path in files:
            head = read_head(path, separator)
            if head.names != first.names:
                raise InputError(path, f"other columns than {files[0]} has", 1)
            rows = read_rows(path, head)
            if head.separator != first.separator:  # no text to put values into: it is written anew
                rows = ((*row[:-1], "") for row in rows)
            while part := list(islice(rows, ROWS)):
                columns = [pa.array(column, pa.string()) for column in zip(*part, strict=True)]
                columns[-1] = columns[-1].cast(pa.large_string())
                writer.write_batch(pa.record_batch(columns, schema=schema))


def read_head(path: Path, separator: str) -> Head:
    """Raises: InputError."""
    with _opened(path) as lines:
        opening = lines.opening
        if named := _SEP_LINE.fullmatch(lines.first):
            opening += next(lines)
            separator = named[1]
        elif separator == ",":
            separator = _separator(path, lines.first)
        rows = _parsed(path, lines, separator, 0)
        row, names = next(rows, ("", []))
        if next(rows, None) is None:  # what follows belongs to no other row
            row += "".join(lines.taken)
        if not names:
            raise InputError(path, "empty: its first line must name the columns")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(path, f"two columns are called {twice!r}", 1)
        return Head(opening, separator, names, row)


def _separator(path: Path, first: str) -> str:
    """What separates the columns: the comma, unless it does not and another does."""
    widths = {}
    for separator in "," + _OTHERS:
        if separator in first or separator == ",":
            widths[separator] = _width(path, separator)
    if widths[","] > 1:
        return ","
    best = max(widths, key=lambda separator: widths[separator])
    return best if widths[best] > 1 else ","


def _width(path: Path, separator: str) -> int:
    """Fields of the first rows, if they have equally many; else 0."""
    try:
        with _opened(path) as lines:
            rows = islice(_parsed(path, lines, separator, 0), _SNIFFED_ROWS)
            widths = {len(fields) for _, fields in rows}
    except InputError:
        return 0
    return widths.pop() if len(widths) == 1 else 0


def read_rows(path: Path, head: Head) -> Iterator[tuple[str, ...]]:
    """The fields of each row, and behind them its own text. Raises: InputError."""
    with _opened(path) as lines:
        if head.opening.removeprefix(_BOM):
            next(lines)
        rows = _parsed(path, lines, head.separator, len(head.names))
        next(rows)
        held: tuple[str, list[str]] | None = None
        for text, fields in rows:
            if held is not None:
                yield (*held[1], held[0])
            held = text, fields
        if held is not None:
            yield (*held[1], held[0] + "".join(lines.taken))


class _Lines:
    """The lines of a CSV file, with their ends; `taken` are those since it was last emptied."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file
        self.taken: list[str] = []
        self.number = 0
        self.opening = _BOM if file.read(1) == _BOM else ""
        if not self.opening:
            file.seek(0)
        position = file.tell()
        self.first = file.readline()
        file.seek(position)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.number += 1
        return line


def _opened(path: Path) -> _Lines:
    """Raises: InputError."""
    try:
        return _Lines(path, path.open(encoding="utf-8", newline=""))
    except OSError as error:
        raise InputError(path, f"cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> InputError:
    return InputError(path, "not UTF-8; convert it first (iconv)")


def _parsed(
    path: Path, lines: _Lines, separator: str, width: int
) -> Iterator[tuple[str, list[str]]]:
    """The rows from here on: the text of each, and its fields. Blank lines belong to the row after
    them. `width`: the fields that each must have; 0 for those of the first."""
    csv.field_size_limit(sys.maxsize)
    lines.taken.clear()
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for fields in reader:
            if not fields and width != 1:  # an empty line; of one column, an empty field
                continue
            fields = fields or [""]
            if width and len(fields) != width:
                message = f"{len(fields)} fields, where the first line has {width}"
                raise InputError(path, message, lines.number)
            width = width or len(fields)
            text = "".join(lines.taken)
            lines.taken.clear()
            yield text, fields
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except csv.Error as error:
        raise InputError(path, str(error), lines.number) from None
    except OSError as error:
        raise InputError(path, f"cannot be read: {reason(error)}") from None


def write_csv_like(
    head: Head,
    names: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Any]]],
    file: IO[bytes],
    tick: Callable[[int], None] = no_tick,
) -> None:
    """Writes rows as they were read, but for fields with another value.

    `names` are the columns of the rows: those of `head`, and behind them new ones. A row is its own
    text and its values.
    """
    splice = _Splice(head)
    line = head.opening + splice(head.row, names)
    file.write(line.encode())
    for text, values in rows:
        if not line.endswith(("\n", "\r")):  # the last line of a file, and no longer the last
            file.write(head.line_end.encode())
        line = splice(text, values)
        file.write(line.encode())
        tick(1)


class _Splice:
    """Puts values into the text of a row."""

    def __init__(self, head: Head) -> None:
        self._names, self._separator, self._line_end = head.names, head.separator, head.line_end
        separator = re.escape(head.separator)
        self._field = re.compile(
            rf'("[^"]*(?:""[^"]*)*"|[^{separator}\r\n]*)({separator}|\r\n|\n|\r|\Z)'
        )

    def __call__(self, text: str, values: Sequence[Any]) -> str:
        if not text:
            return self._anew(values)
        width = len(self._names)
        position = _BLANK.match(text).end() if width > 1 else 0  # type: ignore[union-attr]
        parts, quoted = [text[:position]], False
        for value in values[:width]:
            found = self._field.match(text, position)
            if found is None:
                return self._anew(values)
            old, end = found.groups()
            position = found.end()
            is_quoted = old.startswith('"')
            new = "" if value is None else _text_of(value)
            if (old[1:-1].replace('""', '"') if is_quoted else old) != new:
                quoted = quoted or is_quoted
                old = _field(value, self._separator, is_quoted)
            parts += (old, end)
        last = parts.pop()
        if last == self._separator:
            return self._anew(values)
        for value in values[width:]:
            parts += (self._separator, _field(value, self._separator, quoted))
        return "".join((*parts, last, text[position:]))

    def _anew(self, values: Sequence[Any]) -> str:
        return _line(values, self._separator, self._line_end)


def write_csv(
    rows: Iterable[Sequence[Any]],
    separator: str,
    file: IO[bytes],
    tick: Callable[[int], None] = no_tick,
) -> None:
    """One line a row. What is no text stands as JSON, what is null as nothing."""
    for row in rows:
        file.write(_line(row, separator, "\n").encode())
        tick(1)


def _line(values: Sequence[Any], separator: str, end: str) -> str:
    return (separator.join(_field(value, separator) for value in values) or '""') + end


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _field(value: Any, separator: str, quoted: bool = False) -> str:
    text = "" if value is None else _text_of(value)
    # The csv module before Python 3.13 leaves a carriage return unquoted.
    if quoted or any(mark in text for mark in (separator, '"', "\n", "\r")):
        return '"' + text.replace('"', '""') + '"'
    return text
