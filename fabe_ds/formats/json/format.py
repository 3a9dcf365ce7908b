"""JSON and JSON lines as a format: the text of each record is kept, and spliced into."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa

from fabe_ds.answers import Answers
from fabe_ds.errors import UsageError
from fabe_ds.fields import FieldPath, is_several
from fabe_ds.formats.base import BROKEN, Format, Records, Row, Source, Tick, states_of
from fabe_ds.formats.json.edit import room_for
from fabe_ds.formats.json.load import load, target_columns
from fabe_ds.formats.json.write import (
    copy_unchanged,
    existing_outputs,
    rows_with_answers,
    write_files,
)

log = logging.getLogger(__name__)

KEYS_SHOWN = 20
NO_ROOM = "no room"
"""Class of the failure of a record in which an output field has no place."""


class JsonFormat(Format):
    """JSON files (a list of records, objects one after another, a list inside an object) and JSON
    lines, also compressed. Each file becomes a file of the same layout."""

    name = "json"
    suffixes = (".json", ".jsonl", ".ndjson")

    def load(self, source: Source, tick: Tick) -> Records:
        settings, targets = self.settings.input, self.targets
        # Fields to be added are looked for like targets: where one is there, it is refused.
        gained = [(name.replace(".", "\\."), None) for name in targets.gained]
        wanted = [*zip(targets.names, targets.backup_keys, strict=True), *gained]
        states = states_of(source.files)
        loaded = load(
            source.files,
            wanted,
            settings.records_key,
            settings.on_bad_input,
            self.settings.cache_dir,
            tick,
        )
        locations = {file.name: file.location for file in source.files}
        good = [file for file in loaded.files if not file.error]
        names = {file.name for file in good}
        return Records(
            loaded.dataset,
            loaded.dataset._fingerprint,
            parts=[(locations[file.name], file.records) for file in good],
            left_out=[
                *map(str, source.unread),
                *(file.error for file in loaded.files if file.error),
            ],
            digests={locations[name]: digest for name, digest in loaded.digests.items()},
            states={locations[name]: states[locations[name]] for name in names},
            details=[file for file in source.files if file.name in names],
        )

    def columns(self, records: Records, whole: bool) -> list[str]:
        texts = [group[3] for group in target_columns(len(self.targets.names))]
        return [*texts, "error", *(["raw"] if whole or self._placed else [])]

    @property
    def _placed(self) -> list[FieldPath]:
        """The paths of fields that are put elsewhere than beside a field."""
        every = range(len(self.targets.names))
        added = (each for field in every for each in self.targets.added(field))
        return [each.path for each in added if not each.beside]

    def rows(self, table: pa.Table, whole: bool) -> Iterator[Row]:
        count, several = len(self.targets.names), self.targets.has_several
        columns = [table.column(group[3]) for group in target_columns(count)]
        texts = zip(*(column.to_pylist() for column in columns), strict=True)
        records = table.column("raw").to_pylist() if whole else repeat(None, len(table))
        errors = table.column("error").to_pylist()
        if placed := self._placed:
            raws = table.column("raw").to_pylist()
            rooms = [
                None if e else _no_room(raw, placed) for raw, e in zip(raws, errors, strict=True)
            ]
        else:
            rooms = [None] * len(table)
        if not several and not placed:
            return map(Row, texts, records, errors)
        many = [pa.types.is_list(column.type) for column in columns]
        pairs = zip(rooms, errors, strict=True)
        said = ((NO_ROOM, room) if room else (BROKEN, e) for room, e in pairs)
        listed = (_listed(values, many) for values in texts)
        return (
            Row(values, record, error, fields if several else None, failure=kind)
            for (values, fields), record, (kind, error) in zip(listed, records, said, strict=True)
        )

    def existing(self, records: Records) -> Iterator[list[int]]:
        return existing_outputs(records, self.targets)

    def where(self, row: Mapping[str, Any], field: int = 0) -> dict[str, Any]:
        names = target_columns(field + 1)[field]
        text = row["raw"] if row["error"] is not None else row[names[3]]
        return {
            "record": row["index"],
            "file": row["file"],
            "line": row["line"],
            "text": text,
        }

    def check(self, records: Records) -> None:
        import pyarrow.compute as pc

        table = records.dataset.data.table
        readable = pc.is_null(table.column("error"))
        groups = target_columns(len(self.targets.names))
        objects = pc.starts_with(table.column("raw"), "{") if self.targets.gained else readable
        odd = pc.and_not(readable, objects)
        if self.settings.input.on_bad_input == "fail" and pc.any(odd).as_py():
            flag = self.flag_of(self.targets.gained[0])
            raise UsageError(
                f"{flag}: there are records that are no objects, and take no fields; "
                "--on-bad-input skip leaves them as they are"
            )
        for name, path, backup, group in zip(
            self.targets.names, self.targets.paths, self.targets.backup_keys, groups, strict=False
        ):
            joint, text, skip = (table.column(column) for column in group[2:])
            if is_several(path):
                lengths = pc.list_value_length(skip)
                if pc.any(readable).as_py() and not pc.any(pc.greater(lengths, 0)).as_py():
                    raise no_such_field(name, len(table), _first_of(table, readable))
                continue
            missing = pc.equal(skip.fill_null(""), "missing")
            if pc.any(readable).as_py() and not pc.any(pc.and_not(readable, missing)).as_py():
                raise no_such_field(name, pc.sum(readable).as_py(), _first_of(table, readable))
            held = pc.sum(pc.and_(pc.is_valid(text), pc.equal(joint, ""))).as_py() or 0
            if backup and held:
                log.info(
                    "%d records hold %r already: it stays as it is, and no other original is kept",
                    *(held, backup),
                )
            if log.isEnabledFor(logging.DEBUG):
                _say_skipped(table, name, group[4])

    def held(self, records: Records) -> dict[str, str]:
        import pyarrow.compute as pc

        table, fields = records.dataset.data.table, len(self.targets.names)
        groups = target_columns(fields + len(self.targets.gained))[fields:]
        found = {
            name: pc.sum(pc.greater_equal(table.column(group[0]), 0)).as_py() or 0
            for name, group in zip(self.targets.gained, groups, strict=True)
        }
        return {name: f"{count} records hold it" for name, count in found.items() if count}

    def skips(self, records: Records) -> list[pa.ChunkedArray]:
        table = records.dataset.data.table
        columns = [table.column(group[4]) for group in target_columns(len(self.targets.names))]
        return [_one_each(c) if pa.types.is_list(c.type) else c for c in columns]

    def write(
        self, records: Records, answers: Answers, paths: Mapping[str, str], tick: Tick
    ) -> dict[str, str]:
        digests = write_files(rows_with_answers(records, answers), paths.__getitem__, tick)
        empty = {location for location, count in records.parts if not count}
        for file in records.details:
            path = paths[file.name]
            if file.location in empty and path != file.location:
                digests[path] = copy_unchanged(file, path)
        return digests


def _listed(values: Sequence[Any], many: Sequence[bool]) -> tuple[list[str | None], list[int]]:
    """The texts of a record one after another, and which field each is of."""
    texts: list[str | None] = []
    fields: list[int] = []
    for field, value in enumerate(values):
        found = value if many[field] else [value]
        texts += found
        fields += [field] * len(found)
    return texts, fields


def _no_room(raw: str, paths: Sequence[FieldPath]) -> str | None:
    """Why a field cannot be put into a record at one of these paths, or None."""
    for path in paths:
        if (wrong := room_for(raw, path)) is not None:
            return f"no field can be put at {'.'.join(map(str, path))}: {wrong}"
    return None


def _one_each(skips: pa.ChunkedArray) -> pa.ChunkedArray:
    """Why a record has no text in any place of a field, as a word or null."""
    words = (
        "missing" if not places else None if None in places else places[0]
        for places in skips.to_pylist()
    )
    return pa.chunked_array([pa.array(list(words), pa.string())])


def _first_of(table: pa.Table, readable: pa.ChunkedArray) -> str:
    """The text of the first record that is one."""
    import pyarrow.compute as pc

    raw: str = table.column("raw")[pc.index(readable, True).as_py()].as_py()
    return raw


def _say_skipped(table: pa.Table, name: str, column: str) -> None:
    import pyarrow.compute as pc

    skipped = table.filter(pc.is_valid(table.column(column))).select(["file", "line", column])
    for row in skipped.to_pylist():
        log.debug("%s:%d: %r skipped: %s", row["file"], row["line"], name, row[column])


def no_such_field(name: str, records: int, raw: str) -> UsageError:
    """What is said where none of so many records has the field; `raw` is the first one's text."""
    try:
        first = json.loads(raw)
    except (ValueError, RecursionError):
        first = None
    if isinstance(first, list):
        return UsageError(
            f"--field {name}: a record is a JSON list; if the file is one list of records, name it "
            ".json"
        )
    keys = first if isinstance(first, dict) else {}
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    shown = ", ".join(list(keys)[:KEYS_SHOWN]) + more or "no keys"
    lists = [key for key, value in keys.items() if isinstance(value, list)]
    hint = (
        f" (--records-key {lists[0]}, if the records are there)" if lists and records == 1 else ""
    )
    return UsageError(f"--field {name}: no record has it; the first one has {shown}{hint}")
