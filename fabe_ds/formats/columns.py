"""Records whose fields are columns: what they ask, and the columns that change with the answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa

from fabe_ds.answers import STATUS, Answer, status, values_of
from fabe_ds.errors import UsageError
from fabe_ds.fields import Targets, dotted_hint, inside, with_inside
from fabe_ds.formats.base import OURS, Row

Columns = Mapping[str, Sequence[Any]]


def rows_of(columns: Columns, targets: Targets, whole: bool) -> Iterator[Row]:
    """What the rows bring: the values of each field, and the record where `whole`.

    Raises: UsageError (no such column, or one that holds no text).
    """
    values: list[Sequence[Any]] = []
    for name, (column, *inner) in zip(targets.names, targets.paths, strict=True):
        if column not in columns:
            hint = dotted_hint(name, columns)
            raise UsageError(f"--field {name}: the dataset has no column {column!r}{hint}")
        values.append([inside(v, inner) for v in columns[column]] if inner else columns[column])
        _check_text(name, values[-1])
    texts = zip(*values, strict=True)
    return map(Row, texts, _records(columns) if whole else repeat(None))


def _records(columns: Columns) -> Iterator[dict[str, Any]]:
    own = {name: list(values) for name, values in columns.items() if not name.startswith(OURS)}
    return (dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True))


def _check_text(name: str, values: Iterable[Any]) -> None:
    """Raises: UsageError where there is no text among the values, but others."""
    given = (value for value in values if value is not None)
    first = next(given, None)
    if first is not None and not any(isinstance(value, str) for value in (first, *given)):
        raise UsageError(f"--field {name}: its values are not text ({type(first).__name__})")


def new_columns(targets: Targets, existing: Collection[str]) -> dict[str, pa.DataType]:
    """The columns that a table of these columns gains, and their types."""
    text = pa.string()
    new: dict[str, pa.DataType] = {
        backup: text for backup in targets.backup_columns if backup and backup not in existing
    }
    if targets.samples_field:
        new[targets.samples_field] = pa.list_(text)
    if targets.status_field:
        new[targets.status_field] = pa.struct(list(STATUS.items()))
    return new


def rewritten(
    columns: Columns,
    targets: Targets,
    answers: Sequence[Sequence[Answer]],
    done: Sequence[Sequence[int]] | None = None,
) -> dict[str, list[Any]]:
    """The columns that change. `answers` are those to each row; `done` the fields of each row that
    an earlier run has rewritten in place."""
    changed: dict[str, list[Any]] = {}
    new = [values_of(given, targets.samples) for given in answers]
    for field, (column, *inner) in enumerate(targets.paths):
        # Two fields may be inside one column: the second goes into what the first has made.
        values = changed.get(column) or list(columns[column])
        backup = targets.backup_columns[field]
        if backup and backup not in columns:
            changed[backup] = [inside(value, inner) for value in values]
        changed[column] = [
            value if (text := given[field]) is None else with_inside(value, inner, text)
            for value, given in zip(values, new, strict=True)
        ]
    gained: dict[str, list[Any]] = {}
    if targets.samples_field:
        gained[targets.samples_field] = [
            [answer.completion for answer in given[: targets.samples]] for given in answers
        ]
    if targets.status_field:
        gained[targets.status_field] = list(map(status, answers))
    for name, values in gained.items():
        for row, fields in enumerate(done or ()):
            if fields and name in columns and _is_kept(name, fields, targets):
                values[row] = columns[name][row]
        changed[name] = values
    return changed


def _is_kept(name: str, done: Sequence[int], targets: Targets) -> bool:
    """Whether a gained field of a record stays as an earlier run in place has left it: samples are
    the first field's, and a state is of all fields that are asked about."""
    return 0 in done if name == targets.samples_field else len(done) == len(targets.names)
