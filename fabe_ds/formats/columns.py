"""Records whose fields are columns: what they ask, and the columns that change with the answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import pyarrow as pa

from fabe_ds.answers import (
    STATUS,
    Answer,
    Change,
    by_place,
    changes_of,
    samples_of,
    status,
    values_of,
)
from fabe_ds.errors import UsageError
from fabe_ds.fields import (
    Added,
    FieldPath,
    Step,
    Targets,
    found_in,
    inside,
    is_several,
    joined_keys,
    with_inside,
)
from fabe_ds.formats.base import OURS, Row
from fabe_ds.json_schema import column_type, fitted

Columns = Mapping[str, Sequence[Any]]


def rows_of(columns: Columns, targets: Targets, whole: bool) -> Iterator[Row]:
    """What the rows bring: the values of each field, and the record where `whole`.

    Raises: UsageError (no such column, or one that holds no text).
    """
    records = _records(columns) if whole else repeat(None)
    if targets.has_several:
        for places, record in zip(_places(columns, targets), records, strict=False):
            texts = [place.text(columns) for place in places]
            yield Row(texts, record, None, [place.field for place in places])
        return
    values: list[Sequence[Any]] = []
    for name, path in zip(targets.names, targets.paths, strict=True):
        column, inner = column_of(name, path, columns)
        found = columns[column]
        values.append([_inside(value, inner) for value in found] if inner else found)
        _check_text(name, values[-1])
    yield from map(Row, zip(*values, strict=True), records)


def in_columns(path: FieldPath, columns: Collection[str]) -> tuple[str, Sequence[Step]] | None:
    """The column that a path begins with, and the steps inside it; None where there is none."""
    return next(((key, left) for key, left in joined_keys(path) if key in columns), None)


def column_of(name: str, path: FieldPath, columns: Collection[str]) -> tuple[str, Sequence[Step]]:
    """The same of a field called `name`. Raises: UsageError where there is no such column."""
    found = in_columns(path, columns)
    if found is None:
        raise UsageError(f"--field {name}: the dataset has no column {path[0]!r}")
    return found


def _inside(value: Any, steps: Sequence[Step]) -> Any:
    found = found_in(value, steps)
    return inside(value, found[0]) if found else None


class Place(NamedTuple):
    """Where a text stands: the number of its field, its row and column, and the steps inside."""

    field: int
    row: int
    column: str
    steps: tuple[str, ...]

    def text(self, columns: Columns) -> Any:
        return inside(columns[self.column][self.row], self.steps)


def _places(columns: Columns, targets: Targets) -> Iterator[list[Place]]:
    """The places of all texts of each row."""
    found = [
        (field, *column_of(name, path, columns), is_several(path))
        for field, (name, path) in enumerate(zip(targets.names, targets.paths, strict=True))
    ]
    rows = len(columns[found[0][1]])
    for row in range(rows):
        places: list[Place] = []
        for field, column, inner, several in found:
            ways = found_in(columns[column][row], inner)
            if not ways and not several:  # it has nothing there, and one answer all the same
                ways = [tuple(map(str, inner))]
            places += (Place(field, row, column, way) for way in ways)
        yield places


def _records(columns: Columns) -> Iterator[dict[str, Any]]:
    own = {name: list(values) for name, values in columns.items() if not name.startswith(OURS)}
    return (dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True))


def _check_text(name: str, values: Iterable[Any]) -> None:
    """Raises: UsageError where there is no text among the values, but others."""
    given = (value for value in values if value is not None)
    first = next(given, None)
    if first is not None and not any(isinstance(value, str) for value in (first, *given)):
        raise UsageError(f"--field {name}: its values are not text ({type(first).__name__})")


def new_columns(targets: Targets, schema: pa.Schema) -> dict[str, pa.DataType]:
    """The columns that a table gains, or that gain fields inside them, and their types.

    Raises: UsageError where a column that is there is of a type that cannot hold the answers.
    """
    existing = {column.name: column.type for column in schema}
    text = pa.string()
    new: dict[str, pa.DataType] = {
        backup: text for backup in targets.backup_columns if backup and backup not in existing
    }
    for field, (name, path) in enumerate(zip(targets.names, targets.paths, strict=True)):
        several, added = is_several(path), targets.added(field)
        if several:
            column, inner = column_of(name, path, existing)
            kept = targets.backup_keys[field]
            for key, kind in [
                *([(kept, text)] if kept else []),
                *((str(each.path[0]), _type_of(each, targets)) for each in added),
            ]:
                before = new.get(column, existing[column])
                new[column] = _type_with(before, inner[:-1], key, kind)
            continue
        for each in added:
            kind, head = _type_of(each, targets), str(each.path[0])
            if _is_within(each, {n for n, t in existing.items() if pa.types.is_struct(t)}):
                before = new.get(head, existing[head])
                new[head] = _type_with(before, each.path[1:-1], str(each.path[-1]), kind)
            else:
                new[each.name] = _kept_type(each.name, existing.get(each.name), kind)
    if targets.samples_field:
        each = pa.list_(text)
        new[targets.samples_field] = pa.list_(each) if targets.has_several else each
    if targets.status_field:
        new[targets.status_field] = pa.struct(list(STATUS.items()))
    return new


def _type_of(added: Added, targets: Targets) -> pa.DataType:
    if added.kind == "confidence":
        return pa.float64()
    if added.kind == "reasoning" or not targets.is_json:
        return pa.string()
    return column_type(targets.schema, added.key)


def _kept_type(name: str, before: pa.DataType | None, now: pa.DataType) -> pa.DataType:
    """The type of a column that is there, if it holds what is written now."""
    if before is None or before == now or pa.types.is_null(before):
        return now
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_text(before) for is_text in texts):
        return pa.string()
    if pa.types.is_floating(before) and (pa.types.is_integer(now) or pa.types.is_floating(now)):
        return before
    raise UsageError(
        f"--output-field {name}: there is such a column, of {before}, and answers are {now}; "
        "name another"
    )


def _type_with(
    kind: pa.DataType, steps: Sequence[Step], name: str, new: pa.DataType
) -> pa.DataType:
    """A type with one more field in the objects that the steps lead to."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _type_with(kind.value_type, steps[1:], name, new)
        return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner)
    if not pa.types.is_struct(kind):
        return kind
    fields = {field.name: field.type for field in kind}
    if not steps:
        fields[name] = _kept_type(name, fields.get(name), new)
    elif steps[0] in fields:
        key = str(steps[0])
        fields[key] = _type_with(fields[key], steps[1:], name, new)
    return pa.struct(list(fields.items()))


def _is_within(added: Added, structs: Collection[str]) -> bool:
    """Whether a field goes into a column that is there, and not into one of its own name."""
    return not added.beside and added.path[0] in structs


def rewritten(
    columns: Columns,
    targets: Targets,
    answers: Sequence[Sequence[Answer]],
    done: Sequence[Sequence[int]] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
) -> dict[str, list[Any]]:
    """The columns that change. `answers` are those to each row; `done` the texts of each row that
    are done before; `types` those of the columns that are new, or gain fields."""
    if targets.is_plain:
        changed = _replaced(columns, targets, answers)
    else:
        changed = _changed(columns, targets, answers, types)
    gained: dict[str, list[Any]] = {}
    if targets.samples_field:
        gained[targets.samples_field] = [samples_of(given, targets) for given in answers]
    if targets.status_field:
        gained[targets.status_field] = [status(given, targets.model) for given in answers]
    for name, values in gained.items():
        for row, places in enumerate(done or ()):
            if places and name in columns and _is_kept(name, places, len(answers[row]), targets):
                values[row] = columns[name][row]
        changed[name] = values
    return changed


def _replaced(
    columns: Columns, targets: Targets, answers: Sequence[Sequence[Answer]]
) -> dict[str, list[Any]]:
    """The columns of fields that were asked about, with new values, and of their originals."""
    changed: dict[str, list[Any]] = {}
    new = [values_of(given, targets) for given in answers]
    for field, (name, path) in enumerate(zip(targets.names, targets.paths, strict=True)):
        column, inner = column_of(name, path, columns)
        # Two fields may be inside one column: the second goes into what the first has made.
        values = changed.get(column) or list(columns[column])
        backup = targets.backup_columns[field]
        if backup and backup not in columns:
            changed[backup] = [_inside(value, inner) for value in values]
        changed[column] = [
            value if (text := given[field]) is None else _with(value, inner, text)
            for value, given in zip(values, new, strict=True)
        ]
    return changed


def _with(value: Any, steps: Sequence[Step], text: str) -> Any:
    return with_inside(value, found_in(value, steps)[0], text) if steps else text


def _changed(
    columns: Columns,
    targets: Targets,
    answers: Sequence[Sequence[Answer]],
    types: Mapping[str, pa.DataType] | None,
) -> dict[str, list[Any]]:
    """The columns with all changes that answers make, place by place."""
    changes = _Changes(columns, targets, types or {})
    for places, given in zip(_places(columns, targets), answers, strict=True):
        for place, samples in zip(places, by_place(given, targets.samples), strict=True):
            for change in changes_of(samples, targets, changes.added[place.field]):
                changes.make(place, change)
    return changes.changed


class _Changes:
    """Columns that change: all that will, whether or not a value of them does."""

    def __init__(
        self, columns: Columns, targets: Targets, types: Mapping[str, pa.DataType]
    ) -> None:
        self._columns, self._targets, self._types = columns, targets, types
        self.added = [targets.added(field) for field in range(len(targets.names))]
        self._several = [is_several(path) for path in targets.paths]
        self.changed: dict[str, list[Any]] = {}
        self._structs = {
            name
            for name, values in columns.items()
            if any(isinstance(value, Mapping) for value in values)
            or pa.types.is_struct(types.get(name, pa.null()))
        }
        for field, (name, path) in enumerate(zip(targets.names, targets.paths, strict=True)):
            column, inner = column_of(name, path, columns)
            backup = targets.backup_columns[field]
            if backup and backup not in columns:
                found = columns[column]
                self.changed[backup] = [_inside(value, inner) for value in found]
            if not targets.outputs or self._several[field]:
                self._column(column)
            for each in self.added[field] if not self._several[field] else ():
                self._column(self._name_of(each))

    def _name_of(self, added: Added) -> str:
        return str(added.path[0]) if _is_within(added, self._structs) else added.name

    def _column(self, name: str) -> list[Any]:
        """A column that may be changed: a copy of what is there, or an empty one."""
        if name not in self.changed:
            rows = len(next(iter(self._columns.values())))
            self.changed[name] = list(self._columns.get(name, [None] * rows))
        return self.changed[name]

    def make(self, place: Place, change: Change) -> None:
        added, row = change.added, place.row
        if added is None:
            values = self._column(place.column)
            if self._several[place.field]:
                self._keep_original(place)
            values[row] = with_inside(values[row], place.steps, change.value)
        elif self._several[place.field]:
            values = self._column(place.column)
            steps = (*place.steps[:-1], str(added.path[0]))
            values[row] = with_inside(values[row], steps, self._value(change))
        elif _is_within(added, self._structs):
            values = self._column(str(added.path[0]))
            values[row] = with_inside(
                values[row], list(map(str, added.path[1:])), self._value(change)
            )
        else:
            self._column(added.name)[row] = self._value(change)

    def _keep_original(self, place: Place) -> None:
        key = self._targets.backup_keys[place.field]
        values = self._column(place.column)
        steps = (*place.steps[:-1], key or "")
        is_object = isinstance(inside(values[place.row], place.steps[:-1]), Mapping)
        if key and is_object and inside(values[place.row], steps) is None:
            old = inside(values[place.row], place.steps)
            values[place.row] = with_inside(values[place.row], steps, old)

    def _value(self, change: Change) -> Any:
        """The new value as a column holds it."""
        value, added = change.value, change.added
        assert added is not None
        if not change.is_json or not isinstance(value, str):
            own = self._types.get(added.name)
            return value if own is None or value is None else fitted(value, own)
        whole = json.loads(value)
        part = _inside(whole, added.key) if added.key else whole
        kind = self._types.get(added.name, _type_of(added, self._targets))
        return fitted(part, kind)


def existing_outputs(columns: Columns, targets: Targets) -> Iterator[list[int]]:
    """For each row, which of its texts have their first output already."""
    firsts = [targets.added(field)[0] for field in range(len(targets.names))]
    several = [is_several(path) for path in targets.paths]
    for row, places in enumerate(_places(columns, targets)):
        there = []
        for number, place in enumerate(places):
            first = firsts[place.field]
            if several[place.field]:
                steps: Sequence[str] = (*place.steps[:-1], str(first.path[0]))
                value = inside(columns[place.column][row], steps)
            elif first.name in columns:
                value = columns[first.name][row]
            else:
                head, *inner = map(str, first.path)
                value = inside(columns[head][row], inner) if head in columns else None
            if value not in (None, ""):
                there.append(number)
        yield there


def _is_kept(name: str, done: Sequence[int], answers: int, targets: Targets) -> bool:
    """Whether a gained field of a record stays as an earlier run has left it: samples are the first
    text's, and a state is of all texts that are asked about."""
    return 0 in done if name == targets.samples_field else len(done) * targets.samples == answers
