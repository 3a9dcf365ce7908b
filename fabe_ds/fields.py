"""Dotted paths: where a field stands inside a record."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


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
