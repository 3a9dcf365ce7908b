"""Dotted paths: where a field stands inside a record, and which fields a record gains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

EVERY_ITEM = "*"
_bracket = re.compile(r"(.*?)\[([^\[\]=]+)=([^\[\]]*)\]", re.DOTALL)
_step = re.compile(r"(?:\\.|\[[^\[\]]*\]|[^.])*", re.DOTALL)


class Items(NamedTuple):
    """A step into every item of a list; with a `key`, into those items whose key has the value."""

    key: str | None = None
    value: str = ""

    def takes(self, item: Any) -> bool:
        if self.key is None:
            return True
        if not isinstance(item, dict) or self.key not in item:
            return False
        value = item[self.key]
        return (value if isinstance(value, str) else json.dumps(value)) == self.value


Step = str | Items
FieldPath = tuple[Step, ...]


def parse_path(field: str) -> FieldPath:
    r"""Steps of a dotted path: `messages.0.content`, `a\.b` for a key that holds a dot.

    Digits are a list index in a list and a key in an object; -1 is the last item. `*` is every
    item of a list, and `turns[from=gpt]` those items of it whose key has the value.
    """
    steps: list[Step] = []
    for text in _split(field):
        bracket = _bracket.fullmatch(text)
        name = (bracket[1] if bracket else text).replace("\\.", ".")
        if not name:
            raise ValueError(f"field path {field!r} has an empty step")
        steps.append(Items() if name == EVERY_ITEM else name)
        if bracket:
            steps.append(Items(bracket[2].strip(), bracket[3].strip().strip("\"'")))
    return tuple(steps)


def _split(field: str) -> Iterator[str]:
    """The text of each step; a dot in brackets, or behind a backslash, parts nothing."""
    at = 0
    while True:
        found = _step.match(field, at)
        assert found is not None
        yield found[0]
        if found.end() >= len(field):
            return
        at = found.end() + 1


def is_several(path: FieldPath) -> bool:
    """Whether a record may have the field several times."""
    return any(isinstance(step, Items) for step in path)


def is_in_list(path: FieldPath) -> bool:
    """Whether a path leads into an item of a list: a turn of a chat."""
    return len(path) > 1 and any(
        isinstance(step, Items) or step.lstrip("-").isdigit() for step in path[:-1]
    )


def key_of(path: FieldPath) -> str:
    """The name that a template knows the field by: the last key of its path."""
    return next((step for step in reversed(path) if isinstance(step, str)), "text")


def joined_keys(steps: Sequence[Step]) -> Iterator[tuple[str, Sequence[Step]]]:
    """The keys that the first steps of a path may name in an object, each with the steps that are
    left: `a.b.c` is `c` in `b` in `a`, or else a key that holds a dot (`a.b`, `a.b.c`)."""
    for count in range(1, len(steps) + 1):
        if isinstance(steps[count - 1], Items):
            return
        yield ".".join(steps[:count]), steps[count:]  # type: ignore[arg-type]


def found_in(value: Any, steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """The paths below a value that steps lead to, in their order: keys and list indices."""
    if not steps:
        return [()]
    first = steps[0]
    if isinstance(first, Items):
        items = enumerate(value) if isinstance(value, list) else ()
        return [
            (str(index), *rest)
            for index, item in items
            if first.takes(item)
            for rest in found_in(item, steps[1:])
        ]
    if isinstance(value, dict):
        for key, left in joined_keys(steps):
            if key in value and (rests := found_in(value[key], left)):
                return [(key, *rest) for rest in rests]
    elif isinstance(value, list) and _is_index(first, len(value)):
        return [(first, *rest) for rest in found_in(value[int(first)], steps[1:])]
    return []


def _is_index(step: str, length: int) -> bool:
    try:
        return -length <= int(step) < length
    except ValueError:
        return False


def inside(value: Any, steps: Sequence[str]) -> Any:
    """The value under the keys and indices of a path; None where it does not lead anywhere."""
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and _is_index(step, len(value)):
            value = value[int(step)]
        else:
            return None
    return value


def with_inside(value: Any, steps: Sequence[str], new: Any) -> Any:
    """A copy of a value with another one under the steps. The last key may be a new one."""
    if not steps:
        return new
    step, *rest = steps
    if isinstance(value, list):
        copy = list(value)
        copy[int(step)] = with_inside(value[int(step)], rest, new)
        return copy
    value = value or {}
    return {**value, step: with_inside(value.get(step), rest, new)}


Pick = Literal["first", "vote", "first-valid", "judge"]
"""Which of several answers is the value."""


class Added(NamedTuple):
    """A field that is put beside a field that was asked about, or at a path of its own.

    `kind`: the answer, one of its keys, what the model reasoned, or how sure it is of a choice.
    `path`: below the record, or, where `beside`, a key beside the field.
    """

    name: str
    kind: Literal["answer", "key", "reasoning", "confidence"]
    path: FieldPath
    beside: bool
    key: FieldPath = ()
    """Where the value stands in the answer, of kind "key"."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Which fields of a record are asked about, and which fields it gains.

    `names` are dotted paths as they were given. `backup` keeps the original of the first, None for
    none at all. `samples_field` is None where a record is asked about once. With `outputs`, answers
    go there and the fields stay as they are.
    """

    names: tuple[str, ...]
    backup: str | None = None
    samples: int = 1
    samples_field: str | None = None
    status_field: str | None = None
    outputs: tuple[str, ...] = ()
    keyed: tuple[str, ...] = ()
    """Those of `outputs` that are keys of a structured answer."""
    is_json: bool = False
    """Whether answers are JSON, which goes into `outputs` as such."""
    reasoning_field: str | None = None
    confidence_field: str | None = None
    pick: Pick = "first"
    failed_is_null: bool = False
    """Whether a field whose answer failed becomes null; else it stays as it was."""
    skips_existing: bool = False
    """Whether a field is done that has its first output already."""
    model: str | None = None
    several_models: bool = False
    """Whether others may answer than `model`."""
    schema: Mapping[str, Any] | None = None
    """The JSON schema of the answers."""

    @property
    def paths(self) -> list[FieldPath]:
        """Raises: ValueError (an empty step)."""
        return [parse_path(name) for name in self.names]

    @property
    def each(self) -> int:
        """Answers that a record has, unless it may have a field several times."""
        return len(self.names) * self.samples

    @property
    def is_plain(self) -> bool:
        """Whether each record has one answer to each field, which replaces the field, and no more
        becomes of it: so it is for nearly all runs."""
        extra = self.reasoning_field or self.confidence_field
        return not (self.outputs or self.has_several or extra or self.failed_is_null)

    @property
    def has_several(self) -> bool:
        """Whether a record may have a field several times."""
        return any(map(is_several, self.paths))

    @property
    def is_extended(self) -> bool:
        """Whether more is kept of an answer than what became of it."""
        return bool(
            self.reasoning_field
            or self.confidence_field
            or self.pick == "judge"
            or self.several_models
        )

    @property
    def gained(self) -> list[str]:
        """The fields that a record gains as a whole."""
        return [name for name in (self.samples_field, self.status_field) if name]

    @property
    def backup_keys(self) -> list[str | None]:
        """For each field, the key beside it that keeps the original."""
        if self.outputs:
            return [None] * len(self.names)
        return [
            self.backup,
            *(self.backup and f"original_{key_of(path)}" for path in self.paths[1:]),
        ]

    @property
    def backup_columns(self) -> list[str | None]:
        """For each field, the column of a table that keeps the original. A field that a row may
        have several times keeps each original beside it, in no column of its own."""
        if self.outputs:
            return [None] * len(self.names)
        first = None if is_several(self.paths[0]) else self.backup
        return [
            first,
            *(
                None if is_several(path) else self.backup and f"original_{name}"
                for name, path in zip(self.names[1:], self.paths[1:], strict=True)
            ),
        ]

    def added(self, field: int) -> list[Added]:
        """The fields that stand beside a field, or elsewhere, because of an answer to it."""
        outputs, own = self.outputs, self.paths[field]
        in_object = isinstance(own[-1], Items) or not own[-1].lstrip("-").isdigit()
        if len(self.names) > 1 and not self.keyed:  # one for each field
            outputs = outputs[field : field + 1]
        found = [
            Added(
                str(path[0]) if len(path) == 1 else name,
                "key" if name in self.keyed else "answer",
                path,
                beside=len(path) == 1 and in_object,
                key=path if name in self.keyed else (),
            )
            for name, path in ((name, parse_path(name)) for name in outputs)
        ]
        suffix = f"_{key_of(own)}" if field else ""
        if self.reasoning_field:
            name = f"{self.reasoning_field}{suffix}"
            found.append(Added(name, "reasoning", (name,), in_object))
        if self.confidence_field:
            name = f"{self.confidence_field}{suffix}"
            found.append(Added(name, "confidence", (name,), in_object))
        return found
