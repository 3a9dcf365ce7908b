"""Dataset -> files: the new value is spliced into the text that was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from fabe_ds.answers import Answer, Answers, by_place, changes_of, samples_of, status
from fabe_ds.errors import ExportError, UsageError
from fabe_ds.fields import FieldPath, Targets
from fabe_ds.files import Replacing
from fabe_ds.formats.base import BROKEN, Records, no_tick
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.json.edit import (
    NULL,
    Edit,
    Json,
    dumped,
    edits_beside,
    probing,
    spliced,
    value_of,
    with_members,
    with_value,
)
from fabe_ds.formats.json.load import FOREIGN, target_columns
from fabe_ds.formats.json.scan import Field, Target
from fabe_ds.paging import passed_over
from fabe_ds.text import real_name

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 2048
_RECORD = ("file", "index", "before", "raw", "skip", "after")
_EDIT = ("start", "end", "joint")
_RAW, _SKIP = _RECORD.index("raw"), _RECORD.index("skip")


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
    placed: Sequence[tuple[FieldPath, str]] = ()
    """Values, as JSON, that go to paths of their own."""


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
    edited = [name for group in columns for name in group[: len(_EDIT)]]
    rows, width = _tuples(records.dataset, [*_RECORD, *edited]), len(_RECORD)
    if targets.is_plain and not targets.gained and targets.each == 1:  # twice as quick
        texts = (table.column("completion").to_pylist() for table, _ in answers.tables(ROWS))
        for row, text in zip(rows, chain.from_iterable(texts), strict=True):
            file, index, before, raw, skip, after, start, end, joint = row
            edits = ((start, end, joint, text),)
            yield EditedRecord(file, index, before, raw, skip, after, edits)
        return
    done = records.done or repeat((), len(records))
    changing = _Changing(targets)
    for row, given, before in zip(rows, answers.records(ROWS), done, strict=True):
        found = [row[at : at + len(_EDIT)] for at in range(width, len(row), len(_EDIT))]
        places, broken = _places(found[:fields]), _is_broken(row)
        changes, placed = changing.of(row[_RAW], places, given) if not broken else ([], [])
        is_done = bool(places) and len(before) == len(places)
        gained = {} if is_done else _gained(targets, given)
        if 0 in before:  # samples are those of the first field, which is done
            gained.pop(targets.samples_field or "", None)
        for name, place in zip(targets.gained, found[fields:], strict=True):
            if name in gained and place[0] >= 0:  # as an earlier run in place has left it
                value = Json(dumped(gained.pop(name), row[_RAW]))
                changes.append((place[0], place[1], "", value))
        takes_fields = not broken and row[_RAW].startswith("{")
        yield _record_of(row, changes, gained if takes_fields else {}, placed)


Place = tuple[int, tuple[Any, ...]]
"""The field of a text, and where its literal is: start, end, joint."""


def _places(found: Sequence[tuple[Any, ...]]) -> list[Place]:
    """The places of all texts of a record; a field that it may have several times has lists."""
    places: list[Place] = []
    for field, place in enumerate(found):
        if isinstance(place[0], list):
            places += ((field, each) for each in zip(*place, strict=True))
        else:
            places.append((field, place))
    return places


class _Changing:
    """What becomes of one record after another, by the answers to them."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._added = [targets.added(field) for field in range(len(targets.names))]
        self._beside = [
            probing(path, [str(each.path[0]) for each in added if each.beside])
            for path, added in zip(targets.paths, self._added, strict=True)
        ]

    def of(
        self, raw: str, places: Sequence[Place], answers: Sequence[Answer]
    ) -> tuple[list[Edit], list[tuple[FieldPath, str]]]:
        """The edits of a record, and the values that go to paths of their own."""
        edits: list[Edit] = []
        placed: list[tuple[FieldPath, str]] = []
        around: dict[int, list[Target]] = {}
        for (field, place), samples in zip(
            places, by_place(answers, self._targets.samples), strict=True
        ):
            if field not in around:
                around[field] = self._around(field, raw)
            changes = changes_of(samples, self._targets, self._added[field])
            beside = [change for change in changes if change.added and change.added.beside]
            target = next((t for t in around[field] if t.start == place[0]), None)
            if beside and target is not None:
                edits += edits_beside(target, beside, raw)
            for change in changes:
                if change.added is None:
                    edits.append((*place, NULL if change.value is None else change.value))
                elif not change.added.beside:
                    placed.append((change.added.path, value_of(change, raw)))
        return edits, placed

    def _around(self, field: int, raw: str) -> list[Target]:
        """The places of a field with what stands beside them, where that is asked for."""
        if not any(each.beside for each in self._added[field]):
            return []
        found = self._beside[field].locate(raw, 0)[1]
        return found if isinstance(found, list) else [found] if found else []


def _is_value(raw: str, place: tuple[int, int] | None) -> bool:
    """Whether a literal is there and is not null, which a failure may have left."""
    return place is not None and raw[place[0] : place[1]] != "null"


def existing_outputs(records: Records, targets: Targets) -> Iterator[list[int]]:
    """For each record, which of its texts have their first output already."""
    firsts = [targets.added(number)[0] for number in range(len(targets.names))]
    looking = [
        (probing(path, [str(first.path[0])]) if first.beside else Field(first.path, None))
        for path, first in zip(targets.paths, firsts, strict=True)
    ]
    for raw, skip in _tuples(records.dataset, ("raw", "skip")):
        there: list[bool] = []
        for field, first in zip(looking, firsts, strict=True):
            found = None if _is_broken_skip(skip) else field.locate(raw, 0)[1]
            if not first.beside:
                place = (found.start, found.end) if isinstance(found, Target) else None
                there.append(_is_value(raw, place))
            elif isinstance(found, list):
                there += (_is_value(raw, target.beside[0]) for target in found)
            else:
                there.append(found is not None and _is_value(raw, found.beside[0]))
        yield [place for place, is_there in enumerate(there) if is_there]


def _record_of(
    row: tuple[Any, ...],
    edits: Sequence[Edit],
    gained: Mapping[str, Any] = MappingProxyType({}),
    placed: Sequence[tuple[FieldPath, str]] = (),
) -> EditedRecord:
    values = list(row[: len(_RECORD)])
    if isinstance(values[_SKIP], list):  # of a field that records may have several times
        values[_SKIP] = values[_SKIP][0] if _is_broken(row) else None
    return EditedRecord._make((*values, edits, gained, placed))


def _gained(targets: Targets, answers: Sequence[Answer]) -> dict[str, Any]:
    gained: dict[str, Any] = {}
    if targets.samples_field:
        gained[targets.samples_field] = samples_of(answers, targets)
    if targets.status_field:
        gained[targets.status_field] = status(answers, targets.model)
    return gained


def _is_broken(row: tuple[Any, ...]) -> bool:
    return _is_broken_skip(row[_SKIP])


def _is_broken_skip(skip: str | list[str] | None) -> bool:
    """Whether a line is no record, by why it is skipped."""
    if isinstance(skip, list):
        skip = skip[0] if skip else None
    return skip in (BROKEN, FOREIGN)


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
            elif current.gained or current.placed:
                whole = "".join(spliced(current.raw, current.edits))
                for path, value in current.placed:
                    whole = with_value(whole, path, value)
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
