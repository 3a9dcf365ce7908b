"""JSON and JSON-lines files, record by record, in bounded memory."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from json.decoder import JSONDecodeError
from typing import BinaryIO, NamedTuple, TypeVar, cast

from fabe_ds import compression
from fabe_ds.errors import InputError
from fabe_ds.fields import FieldPath, parse_path
from fabe_ds.formats.base import no_tick
from fabe_ds.formats.discover import LINES, InputFile
from fabe_ds.formats.json.scan import Fields, Located, Target, scan_value, skip_space

CHUNK = 1 << 22
_UTF8_BOM = "\ufeff"
_BETWEEN = " \t\n\r" + _UTF8_BOM
"""What may stand around a line's record: of files that were joined, each may bring a mark."""

T = TypeVar("T")


class Record(NamedTuple):
    """One record as it stands in its file: the file is `before + raw` of each, then the tail.

    `line` counts from 1 and is where `raw` begins.
    """

    line: int
    before: str
    raw: str
    targets: tuple[Located, ...]


class Broken(NamedTuple):
    """A line that is no JSON record. `raw` is its text; where `foreign`, it is no UTF-8, and `raw`
    is its bytes as ISO 8859-1."""

    line: int
    before: str
    raw: str
    message: str
    foreign: bool = False


class Tail(NamedTuple):
    """The text of a file that follows its last record (all of it, where it holds none)."""

    text: str


def read_records(
    source: InputFile,
    fields: Fields,
    records_key: str | None = None,
    *,
    keep_broken: bool = False,
    tick: Callable[[int], None] = no_tick,
) -> Iterator[Record | Broken | Tail]:
    """The records of one file, then its tail.

    `keep_broken`: in JSON lines, a line that is no record is given as what it is. `tick` is told
    the bytes of the file that were read, as they are.
    Raises: InputError, naming file, line and column.
    """
    try:
        with source.open() as on_disk:
            reading = cast(BinaryIO, _Ticking(source, on_disk, tick))
            if source.kind == LINES:
                yield from _read_lines(source, reading, fields, keep_broken)
            else:
                keys = parse_path(records_key) if records_key else ()
                yield from _Document(source, reading).read(fields, keys)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(source.path, f"cannot be read: {reason}") from None


class _Ticking:
    """A file's plain bytes; it tells how far the file was read, in bytes on the disk."""

    def __init__(self, source: InputFile, on_disk: BinaryIO, tick: Callable[[int], None]) -> None:
        self._file, self._on_disk, self._tick = source.plain(on_disk), on_disk, tick
        self._position = 0
        # A buffer of megabytes for each of many small files would take longer than the files.
        self._size = CHUNK if source.compressed else os.fstat(on_disk.fileno()).st_size + 1

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(min(size, max(self._size - self._position, 1)))
        except compression.errors() as error:
            raise OSError(str(error)) from None
        position = self._on_disk.tell()
        self._tick(position - self._position)
        self._position = position
        return data


def _check_encoding(source: InputFile, head: bytes) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise InputError(source.path, "UTF-16 or UTF-32, not UTF-8; convert it first (iconv)", 1)


def _not_utf8(source: InputFile, error: UnicodeDecodeError, line: int) -> InputError:
    data = error.object
    line += data.count(b"\n", 0, error.start)
    column = error.start - data.rfind(b"\n", 0, error.start)
    return InputError(source.path, f"not UTF-8: byte 0x{data[error.start]:02x}", line, column)


def _read_lines(
    source: InputFile, file: BinaryIO, fields: Fields, keep_broken: bool
) -> Iterator[Record | Broken | Tail]:
    number, before = 1, ""
    for chunk in _whole_lines(source, file):
        foreign: dict[int, str] = {}
        try:
            lines = chunk.decode().split("\n")
        except UnicodeDecodeError as error:
            if not keep_broken:
                raise _not_utf8(source, error, number) from None
            lines, foreign = _line_by_line(chunk)
        last = len(lines) - 1
        for index, line in enumerate(lines):
            newline = "" if index == last else "\n"
            raw = line.strip(_BETWEEN)
            if raw:
                start = 0 if len(raw) == len(line) else line.index(raw)
                wrong = foreign.get(index)
                if wrong is None:
                    try:
                        stop, targets = fields.locate(raw, 0)
                        if stop != len(raw):
                            stop = skip_space(raw, stop)
                            raise JSONDecodeError("Extra data on the line", raw, stop)
                    except JSONDecodeError as error:
                        column = start + error.pos + 1
                        if not keep_broken:
                            hint = " (a JSON list? name it .json)" if raw[0] == "[" else ""
                            raise InputError(
                                source.path, error.msg + hint, number, column
                            ) from None
                        wrong = f"not JSON: {error.msg} (column {column})"
                if len(raw) != len(line):
                    before += line[:start]
                if wrong is None:
                    yield Record(number, before, raw, targets)
                else:
                    yield Broken(number, before, raw, wrong, index in foreign)
                before = newline if len(raw) == len(line) else line[start + len(raw) :] + newline
            else:
                before += line + newline
            number += index != last
    yield Tail(before)


def _line_by_line(chunk: bytes) -> tuple[list[str], dict[int, str]]:
    """The lines of bytes that are not all UTF-8, and what is wrong with those that are not."""
    lines: list[str] = []
    foreign: dict[int, str] = {}
    for number, line in enumerate(chunk.split(b"\n")):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            lines.append(line.decode("latin-1"))
            foreign[number] = f"not UTF-8: byte 0x{line[error.start]:02x} (byte {error.start + 1})"
    return lines, foreign


def _whole_lines(source: InputFile, file: BinaryIO) -> Iterator[bytes]:
    """The file in pieces that end where a line does (the last one, where the file does)."""
    pieces: list[bytes] = []
    data = file.read(CHUNK)
    _check_encoding(source, data)
    while data:
        cut = data.rfind(b"\n") + 1
        pieces.append(data[:cut] if cut else data)
        if cut:
            yield b"".join(pieces)
            pieces = [data[cut:]]
        data = file.read(CHUNK)
    yield b"".join(pieces)


class _Document:
    """A .json file read through a window of text that slides and grows as records need it.

    All before `mark` is done with; `line` is the line of the mark. `before` collects what stands
    between records.
    """

    def __init__(self, source: InputFile, file: BinaryIO) -> None:
        self.source, self.file = source, file
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.mark, self.line = "", 0, 1
        self.indent = 0  # characters of the window's first line that lie before the window
        self.size, self.started, self.eof = CHUNK, False, False
        self.before = ""

    def read(self, fields: Fields, keys: FieldPath) -> Iterator[Record | Tail]:
        while not self.text and self.grow():
            pass
        if self.text.startswith(_UTF8_BOM):
            self.before, self.mark = _UTF8_BOM, 1
        opening = self.peek()
        if opening and keys:
            if opening != "{":
                raise self.error("--records-key asks for an object around the records", self.mark)
            yield from self.wrapped(fields, keys)
        elif opening == "[":
            yield from self.items(fields)
        elif opening == "{":
            yield from self.sequence(fields)
        elif opening:
            raise self.error(
                "Expecting a list of objects or an object", skip_space(self.text, self.mark)
            )
        if rest := self.peek():
            hint = " (JSON lines? name it .jsonl)" if rest in "{[" else ""
            raise self.error(f"Extra data{hint}", skip_space(self.text, self.mark))
        yield Tail(self.before + self.text[self.mark :])

    def items(self, fields: Fields) -> Iterator[Record]:
        """The items of the list at the mark; afterwards the mark is behind its bracket."""
        self.take(_expect("["))
        if self.peek() == "]":
            self.take(_expect("]"))
            return
        while True:
            yield self.record(fields)
            if self.take(_expect(",]")).endswith("]"):
                return

    def sequence(self, fields: Fields) -> Iterator[Record]:
        """Objects one after another: a single one, or JSON lines in a file called .json."""
        while self.peek() == "{":
            yield self.record(fields)

    def wrapped(self, fields: Fields, keys: FieldPath) -> Iterator[Record]:
        """The list under `keys`; what stands around it goes into `before` and the tail."""
        key, rest = keys[0], keys[1:]
        found = False
        closing = self.take(_expect("{"))
        if self.peek() == "}":
            closing = self.take(_expect("}"))
        while not closing.endswith("}"):
            if self.member_name() == key:
                found = True
                if self.peek() != ("{" if rest else "["):
                    what = "an object" if rest else "a list"
                    raise self.error(f"--records-key: {key!r} is not {what}", self.mark)
                yield from self.wrapped(fields, rest) if rest else self.items(fields)
            else:
                self.take(lambda text, mark: scan_value(text, skip_space(text, mark))[1])
            closing = self.take(_expect(",}"))
        if not found:
            raise self.error(f"--records-key: no key {key!r} in this object", self.mark)

    def record(self, fields: Fields) -> Record:
        """The record at the mark (space before it allowed)."""

        def read(text: str, mark: int) -> tuple[Record, int]:
            start = skip_space(text, mark)
            end, targets = fields.locate(text, start)
            targets = tuple(_moved(located, start) for located in targets)
            line = self.line + text.count("\n", mark, start)
            before = self.before + text[mark:start]
            return Record(line, before, text[start:end], targets), end

        record = self.step(read)
        self.before = ""
        return record

    def member_name(self) -> object:
        def name_and_colon(text: str, mark: int) -> int:
            start = skip_space(text, mark)
            if not text.startswith('"', start):
                raise JSONDecodeError("Expecting property name", text, start)
            return _expect(":")(text, scan_value(text, start)[1])

        taken = self.take(name_and_colon)
        return scan_value(taken, skip_space(taken, 0))[0]

    def take(self, read: Callable[[str, int], int]) -> str:
        """Steps over what is no record; its text is kept in `before`, and given."""

        def span(text: str, mark: int) -> tuple[str, int]:
            end = read(text, mark)
            return text[mark:end], end

        taken = self.step(span)
        self.before += taken
        return taken

    def step(self, read: Callable[[str, int], tuple[T, int]]) -> T:
        """What `read(text, mark)` gives; the mark moves to the position after it.

        It is called again with more text while what it sees is cut off.
        """
        while True:
            try:
                value, end = read(self.text, self.mark)
            except JSONDecodeError as error:
                # Cut off, or wrong? A string's error points at its beginning, others at the cut.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if cut and not self.eof:
                    self.grow()
                    continue
                raise self.error(error.msg, error.pos) from None
            if end == len(self.text) and not self.eof:  # a number may go on behind the window
                self.grow()
                continue
            self.line += self.text.count("\n", self.mark, end)
            self.mark = end
            return value

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while (pos := skip_space(self.text, self.mark)) == len(self.text) and self.grow():
            pass
        return self.text[pos : pos + 1]

    def grow(self) -> bool:
        """Reads on; what lies before the mark is let go. False at the end of the file."""
        if self.eof:
            return False
        kept = self.text[self.mark :]
        newline = self.text.rfind("\n", 0, self.mark)
        self.indent = self.mark - newline - 1 if newline >= 0 else self.indent + self.mark
        self.size = max(CHUNK, len(kept))  # in proportion to a long record, or it is quadratic
        data = self.file.read(self.size)
        if not self.started:
            _check_encoding(self.source, data)
            self.started = True
        self.eof = not data
        try:
            self.text = kept + self.decode(data, final=self.eof)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.source, error, self.line + kept.count("\n")) from None
        self.mark = 0
        return not self.eof

    def error(self, message: str, pos: int) -> InputError:
        line = self.line + self.text.count("\n", self.mark, pos)
        newline = self.text.rfind("\n", 0, pos)
        column = pos - newline if newline >= 0 else self.indent + pos + 1
        return InputError(self.source.path, message, line, column)


def _moved(located: Located, by: int) -> Located:
    """The places of a field, counted from so many characters later."""
    if located is None:
        return None
    if isinstance(located, Target):
        return located._replace(start=located.start - by, end=located.end - by)
    return [target._replace(start=target.start - by, end=target.end - by) for target in located]


def _expect(chars: str) -> Callable[[str, int], int]:
    """A reader that steps over white space and one of `chars`."""

    def read(text: str, mark: int) -> int:
        pos = skip_space(text, mark)
        if pos == len(text) or text[pos] not in chars:
            raise JSONDecodeError(f"Expecting '{chars[0]}' delimiter", text, pos)
        return pos + 1

    return read
