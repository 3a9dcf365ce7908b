"""Dotted paths: where a field stands inside a record."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

FieldPath = tuple[str, ...]


def parse_path(field: str) -> FieldPath:
    r"""Steps of a dotted path: `messages.0.content`, `a\.b` for a key that holds a dot.

    Digits are a list index in a list and a key in an object; -1 is the last item.
    """
    keys = [key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", field)]
    if not all(keys):
        raise ValueError(f"field path {field!r} has an empty step")
    return tuple(keys)


def dotted_hint(name: str, columns: Collection[str]) -> str:
    """How to write the name of a column that holds a dot, where there is one."""
    escaped = name.replace(".", "\\.")
    return f", but one {name!r} (write {escaped})" if name in columns else ""


def inside(value: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list):
            try:
                value = value[int(step)]
            except (ValueError, IndexError):
                return None
        else:
            return None
    return value


def with_inside(value: Any, steps: Sequence[str], new: str) -> Any:
    """A copy of the value with another text under the steps."""
    if not steps:
        return new
    step, *rest = steps
    if isinstance(value, dict):
        return {**value, step: with_inside(value[step], rest, new)}
    at = int(step)
    copy = list(value)
    copy[at] = with_inside(value[at], rest, new)
    return copy


@dataclass(frozen=True, slots=True)
class Targets:
    """Which fields of a record are asked about, and which fields it gains.

    `names` are dotted paths as they were given. `backup` keeps the original of the first, None for
    none at all. `samples_field` is None where a record is asked about once.
    """

    names: tuple[str, ...]
    backup: str | None = None
    samples: int = 1
    samples_field: str | None = None
    status_field: str | None = None

    @property
    def paths(self) -> list[FieldPath]:
        """Raises: ValueError (an empty step)."""
        return [parse_path(name) for name in self.names]

    @property
    def each(self) -> int:
        """Answers that a record has."""
        return len(self.names) * self.samples

    @property
    def gained(self) -> list[str]:
        """The fields that a record gains beside originals."""
        return [name for name in (self.samples_field, self.status_field) if name]

    @property
    def backup_keys(self) -> list[str | None]:
        """For each field, the key beside it that keeps the original."""
        return [self.backup, *(self.backup and f"original_{path[-1]}" for path in self.paths[1:])]

    @property
    def backup_columns(self) -> list[str | None]:
        """For each field, the column of a table that keeps the original."""
        return [self.backup, *(self.backup and f"original_{name}" for name in self.names[1:])]
