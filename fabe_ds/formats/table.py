"""Tables as formats: a Dataset with columns of its own, all of which becomes one table again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.answers import Answers
from fabe_ds.errors import FabeError, InputError, UsageError, first_line, reason
from fabe_ds.fields import Targets
from fabe_ds.files import Replacing, finish_replacing
from fabe_ds.formats import columns as by_column
from fabe_ds.formats.base import OURS, Format, Records, Row, Source, Tick, states_of
from fabe_ds.formats.table_output import TableSource, export_table, kind_of_file
from fabe_ds.paging import passed_over
from fabe_ds.quiet import quiet_datasets
from fabe_ds.scratch import NO_ROOM, clear_scratch, not_kept, scratch_folder
from fabe_ds.store.layout import Layout, kept_file, usable_folder
from fabe_ds.text import listed

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)

ROWS = 1000
TABLE_VERSION = 1
"""Of what is kept of Parquet and Arrow files."""


class TableFormat(Format):
    """Base of formats whose records have columns, which all come back as they were but for those
    that were asked about. A class says how its files are read; the rest is here."""

    mirrors = False

    @abstractmethod
    def read(self, source: Source, folder: Path) -> Dataset:
        """The rows of all files as a Dataset, kept as Arrow below `folder`."""

    @abstractmethod
    def batches(self, file: Path) -> Iterator[Any]:
        """All of one file, in parts. Raises what it raises where the file is damaged."""

    def load(self, source: Source, tick: Tick) -> Records:
        if self.settings.output.inplace:
            finish_replacing(self._journal())
        source, bad = self._readable(source)
        usable_folder(self.settings.cache_dir)
        layout = Layout(self.settings.cache_dir)
        folder = layout.made(layout.tables)
        clear_scratch(folder)
        states = self.states(source)
        files = [file.path for file in source.files]
        try:
            with quiet_datasets():
                chosen = self.chosen(source, folder)
        except FabeError:
            raise
        except Exception as error:  # of libraries, which say it in many ways
            raise self._not_read(source, error) from None
        tick(source.size)
        table = TableSource(files, chosen.ranges)
        parts = self._parts(source, chosen)
        left_out = [*map(str, source.unread), *bad]
        # Files are known by their bytes already; a saved Dataset by what its own state says.
        seen = [] if source.files else sorted(states.items())
        seed = repr([chosen.dataset._fingerprint, seen])
        fingerprint = hashlib.sha256(seed.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return Records(chosen.dataset, fingerprint, parts, left_out, states=states, details=table)

    def states(self, source: Source) -> dict[str, tuple[int, ...]]:
        """What tells files that have changed from those that were read."""
        return states_of(source.files)

    def chosen(self, source: Source, folder: Path) -> Split:
        """The rows that the run's split names."""
        return split_of(self.read(source, folder), self.settings.input.split)

    def _parts(self, source: Source, chosen: Split) -> list[tuple[str, int]]:
        """The files of the rows, where they are to be replaced; else the input as a whole.

        Raises: UsageError where a split leaves rows out, which would be gone.
        """
        if not self.settings.output.inplace:
            return [(str(source.root), len(chosen.dataset))]
        counts = [self.rows_in(file.path) for file in source.files]
        if source.files and sum(counts) != len(chosen.dataset):
            raise UsageError("--inplace replaces whole files; leave --split out")
        return [(file.location, n) for file, n in zip(source.files, counts, strict=True)]

    def rows_in(self, file: Path) -> int:
        """How many rows a file holds."""
        return sum(map(len, self.batches(file)))

    def _readable(self, source: Source) -> tuple[Source, list[str]]:
        """The source without the files that cannot be read, and why each cannot, a line each.

        Raises: InputError, unless such files are to be left out.
        """
        if self.settings.input.on_bad_input == "fail" or not source.root.is_dir():
            for file in source.files:
                _check_readable(file.path)
            return source, []
        files, bad = [], []
        for file in source.files:
            wrong = self.broken(file.path)
            if wrong is None:
                files.append(file)
            else:
                log.warning("left out: %s", wrong)
                bad.append(str(wrong))
        if source.files and not files:
            raise UsageError(f"--input {source.root}: none of its files can be read; {bad[-1]}")
        return Source(source.root, files, source.unread), bad

    def broken(self, file: Path) -> InputError | None:
        """What is wrong with a file; it is read whole."""
        try:
            for _ in self.batches(file):
                pass
        except InputError as error:
            return error
        except Exception as error:
            return InputError(file, f"cannot be read: {first_line(error)}")
        return None

    def _not_read(self, source: Source, error: Exception) -> FabeError:
        """What is said where a library could not read the input."""
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return not_kept(self.settings.cache_dir, cause)
        if wrong := next(filter(None, (self.broken(file.path) for file in source.files)), None):
            return wrong
        message = reason(cause) if isinstance(cause, OSError) else first_line(cause)
        if isinstance(error, FileNotFoundError | ConnectionError | ValueError):
            return UsageError(f"--input {source.root}: {message}")
        return InputError(source.root, f"cannot be read: {message}")

    def columns(self, records: Records, whole: bool) -> list[str]:
        names: list[str] = records.dataset.column_names
        if whole:
            return [name for name in names if not name.startswith(OURS)]
        return _heads(self.targets, names)

    def rows(self, table: pa.Table, whole: bool) -> Iterator[Row]:
        return by_column.rows_of(table.to_pydict(), self.targets, whole)

    def where(self, row: Mapping[str, Any], field: int = 0) -> dict[str, Any]:
        return {column: row[column] for column in _heads(self.targets, row)}

    def held(self, records: Records) -> dict[str, str]:
        there = set(records.dataset.column_names)
        return dict.fromkeys(there.intersection(self.targets.gained), "there is such a column")

    def check(self, records: Records) -> None:
        """Raises: UsageError where the table lacks a field."""
        existing = [name for name in records.dataset.column_names if not name.startswith(OURS)]
        for name, path in zip(self.targets.names, self.targets.paths, strict=True):
            found = by_column.in_columns(path, existing)
            if found is None:
                raise UsageError(
                    f"--field {name}: no column {path[0]!r}; there are {listed(existing)}"
                )
            column, inner = found
            kind = getattr(records.dataset.features[column], "dtype", None)
            if not inner and kind not in ("string", "large_string", "string_view"):
                raise UsageError(f"--field {name}: the column is {kind or 'nested'}, not text")

        by_column.new_columns(self.targets, records.dataset.features.arrow_schema)

    def existing(self, records: Records) -> Iterator[list[int]]:
        dataset = records.dataset.with_format("arrow")
        for table in passed_over(dataset.iter(batch_size=ROWS)):
            yield from by_column.existing_outputs(table.to_pydict(), self.targets)

    def write(
        self, records: Records, answers: Answers, paths: Mapping[str, str], tick: Tick
    ) -> dict[str, str]:
        records.check_unchanged()
        layout = Layout(self.settings.cache_dir)
        folder = layout.made(layout.tables)
        with scratch_folder(folder) as scratch:
            dataset, changed = with_answers(records, answers, scratch / "changed.arrow")
            if self.settings.output.inplace:
                return self.replace(dataset, records, changed, tick)
            place, output = Path(paths[""]), self.settings.output.output_path
            kind = kind_of_file(output.name) if output and not output.is_dir() else None
            kind = kind or self.output_kind(self.settings.input.input_path)
            return export_table(dataset, records.details, changed, place, kind, tick)

    def replace(
        self, dataset: Dataset, records: Records, changed: Collection[str], tick: Tick
    ) -> dict[str, str]:
        """Replaces the files that the rows came from, all of them or none. Raises: ExportError."""
        with Replacing(self._journal()) as files:
            first = 0
            for location, count in records.parts:
                part = dataset.select(range(first, first + count))
                with files.open(location) as sink:
                    self.rewrite(part, Path(location), changed, sink, tick)
                first += count
        return files.digests

    def _journal(self) -> Path:
        """Where it is noted which files are about to be replaced: of several, some with a new
        column and some without could not be read again."""
        root = self.settings.input.input_path
        name = hashlib.sha256(os.fsencode(os.path.abspath(root or ""))).hexdigest()[:16]  # noqa: PTH100
        layout = Layout(self.settings.cache_dir)
        return layout.made(layout.runs) / f"replacing-{name}.json"

    def rewrite(
        self, part: Dataset, file: Path, changed: Collection[str], sink: IO[bytes], tick: Tick
    ) -> None:
        """Writes the rows of one file as it is, but for the columns `changed` and new ones."""
        raise UsageError(f"--inplace: {self.name} is never replaced; give an --output")


def _heads(targets: Targets, columns: Collection[str]) -> list[str]:
    """The columns that fields stand in, each once, as far as there are such."""
    found = (by_column.in_columns(path, columns) for path in targets.paths)
    return list(dict.fromkeys(head for head, _ in filter(None, found)))


def with_answers(records: Records, answers: Answers, place: Path) -> tuple[Dataset, set[str]]:
    """The records with their answers, and the names of the columns that change. These are written
    to `place`, the others stay where they are."""
    import datasets

    source, targets = records.dataset, answers.targets
    new = by_column.new_columns(targets, source.features.arrow_schema)
    # A field that an earlier run in place has added to a CSV file is text there.
    as_text = {n for n in new if getattr(source.features.get(n), "dtype", None) == "string"}
    new |= dict.fromkeys(as_text, pa.string())
    asked = _heads(targets, source.column_names)
    heads = set() if targets.outputs else set(asked).difference(new)
    kept = datasets.Features({n: source.features[n] for n in source.column_names if n in heads})
    features = kept | datasets.Features.from_arrow_schema(pa.schema(list(new.items())))
    changed = datasets.Features(features).arrow_schema
    needed = [n for n in source.column_names if n in {*asked, *targets.backup_columns, *new}]
    done = iter(records.done) if records.done is not None else None
    given = answers.records(ROWS)
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_stream(sink, changed) as writer:
        for part in source.select_columns(needed).with_format("arrow").iter(batch_size=ROWS):
            rows = [next(given) for _ in range(len(part))]
            marks = [next(done) for _ in rows] if done is not None else None
            values = by_column.rewritten(part.to_pydict(), targets, rows, marks, new)
            for name in as_text:
                values[name] = [v if isinstance(v, str) else _as_json(v) for v in values[name]]
            columns = [pa.array(values[each.name], each.type) for each in changed]
            writer.write_batch(pa.record_batch(columns, schema=changed))
    names = [*source.column_names, *(name for name in new if name not in source.column_names)]
    if not len(source):
        features = datasets.Features({**source.features, **features})
        empty = datasets.Dataset.from_dict({name: [] for name in names}, features)
        return empty, set(changed.names)
    # Mapped, not read: the columns that stay are never copied.
    beside = datasets.Dataset.from_file(str(place))
    others = source.remove_columns([n for n in source.column_names if n in features])
    whole = datasets.concatenate_datasets([others, beside], axis=1).select_columns(names)
    info = source.info.copy()
    info.features = whole.features
    indices = whole._indices
    dataset = datasets.Dataset(whole.data, info=info, split=source.split, indices_table=indices)
    return dataset, set(changed.names)


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def kept_table(
    name: str, source: Source, folder: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Dataset:
    """The rows of files as Arrow in `folder`, sealed with a digest; made anew where they, or the
    files, have changed. The fingerprint is that of the files' bytes. Raises: InputError.
    """
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    digests = [file.digest() for file in source.files]
    seed = repr([TABLE_VERSION, name, str(schema), digests])
    fingerprint = hashlib.sha256(seed.encode()).hexdigest()[:32]
    place = folder / f"{name}-{fingerprint}.arrow"

    def write(scratch: Path) -> None:
        target = features.arrow_schema
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_stream(sink, target) as writer:
            for batch in batches:
                if len(batch):
                    part = pa.Table.from_batches([batch])
                    writer.write_table(datasets.table.table_cast(part, target))

    kept_file(place, write)
    found = datasets.Dataset.from_file(str(place))
    return datasets.Dataset(found.data, info=found.info, split=None, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class Split:
    """The rows that were asked for: `ranges` of all rows, counted through the files."""

    dataset: Dataset
    ranges: Sequence[tuple[int, int]] = field(default_factory=list)


def split_of(found: Dataset | DatasetDict, split: str) -> Split:
    """The rows that a split names, as datasets writes it: test, train[:100], train[50%:]+test.

    Raises: UsageError.
    """
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    if isinstance(found, Dataset):
        named = {"train": found, str(found.split or "train"): found}
    else:
        named = dict(found)
        if split in named and len(named) > 1:
            log.info("split %s of %s (--split takes another)", split, ", ".join(named))
    try:
        instruction = ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: len(rows) for name, rows in named.items()})
    except (ValueError, AssertionError):
        raise UsageError(f"--split {split}: has {', '.join(named)}") from None
    chosen, ranges = [], []
    for part in parts:
        rows = named[part.splitname]
        end = len(rows) if part.to is None else min(part.to, len(rows))
        first = min(part.from_ or 0, end)
        part_of = range(first, end) if first < end else range(0)
        chosen.append(rows if (first, end) == (0, len(rows)) else rows.select(part_of))
        ranges.append((first, end))
    whole = chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
    return Split(whole, ranges)


def _check_readable(file: Path) -> None:
    """Raises: InputError."""
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(file, f"cannot be read: {reason(error)}") from None
