"""What changes in the text of a record: new values, and members that it gains.

All in the record's own manner: spaces, line ends, escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from json.encoder import encode_basestring, encode_basestring_ascii
from operator import itemgetter
from typing import Any

from fabe_ds.answers import Change
from fabe_ds.fields import FieldPath, Items
from fabe_ds.formats.json.scan import Field, Target, scan_value

Edit = tuple[Any, ...]
"""Where a literal begins and ends in a record (-1: it is not there), what stands between it and a
backup, and the new value: a text, or `Json`; None keeps the old one."""

_first_member = re.compile(r'\{([ \t\n\r]*)"(?:[^"\\]|\\.)*"[ \t\n\r]*:([ \t\n\r]*)')
_escaped_character = re.compile(r"\\u(?!00[0-7])")
_token = re.compile(r'"(?:[^"\\]|\\.)*"|[ \t\n\r]+|[^\x00-\x7f]', re.DOTALL)
_PROBE = "\0"
"""The key of a backup that no record has: its joint shows how members are parted."""
_QUOTED_PROBE = encode_basestring(_PROBE)


class Json(str):
    """A value that is written as JSON already."""


NULL = Json("null")


def spliced(raw: str, edits: Sequence[Edit]) -> Iterator[str]:
    """The record's text with the new values in it, and the old literals where backups go."""
    done = 0
    for start, end, joint, new in sorted(edits, key=itemgetter(0)) if len(edits) > 1 else edits:
        if new is None:
            continue
        yield raw[done:start]
        yield literal(new, raw)
        yield joint
        done = start if joint else end
    yield raw[done:]


def literal(value: str, raw: str) -> str:
    """The value as a JSON string in the record's own manner: escaped to ASCII where that is."""
    if isinstance(value, Json):
        return value
    if value.isascii() or _is_escaping(raw):
        return encode_basestring_ascii(value)
    return encode_basestring(value)


def _is_escaping(raw: str) -> bool:
    """Whether a record escapes what is beyond ASCII."""
    return raw.isascii() and "\\u" in raw and _escaped_character.search(raw) is not None


def dumped(value: Any, record: str) -> str:
    """A value as JSON, in a record's own manner: spaces, escapes."""
    first = _first_member.match(record)
    separators = (", ", ": ") if first is None or first[2] else (",", ":")
    return json.dumps(value, ensure_ascii=_is_escaping(record), separators=separators)


def part_of(answer: str, key: FieldPath) -> str | None:
    """The JSON text of a part of an answer that is JSON; None where it has no such part."""
    text = answer.strip()
    if not key:
        return text
    _, found = Field(key, None).locate(text, 0)
    return text[found.start : found.end] if isinstance(found, Target) else None


def in_one_line(text: str, raw: str) -> Json:
    """JSON text without line ends in it, which would end a line of JSON lines, and with escapes as
    the record has them."""
    escaping = _is_escaping(raw)

    def replaced(match: re.Match[str]) -> str:
        token = match[0]
        if token[0] in " \t\n\r":
            return "" if "\n" in token or "\r" in token else token
        return token if token.isascii() or not escaping else _ascii(token)

    return Json(_token.sub(replaced, text))


def _ascii(token: str) -> str:
    return "".join(
        character if character.isascii() else encode_basestring_ascii(character)[1:-1]
        for character in token
    )


def value_of(change: Change, raw: str) -> Json:
    """The new value of a change as JSON."""
    value = change.value
    if value is None:
        return NULL
    if not isinstance(value, str):
        return Json(dumped(value, raw))
    if not change.is_json:
        return Json(literal(value, raw))
    part = part_of(value, change.added.key if change.added else ())
    return NULL if part is None else in_one_line(part, raw)


def probing(path: FieldPath, beside: Sequence[str]) -> Field:
    """The field with its neighbours, as `edits_beside` takes what it finds."""
    return Field(path, _PROBE, beside)


def edits_beside(target: Target, changes: Sequence[Change], raw: str) -> Iterator[Edit]:
    """What changes beside a field: a new value for a member that is there, else one more member
    right behind the field. `target` is what `probing` found for the names of these changes."""
    lead, _, colon = target.joint[1:].partition(_QUOTED_PROBE)
    for change, there in zip_longest(changes, target.beside):
        assert change is not None
        assert change.added is not None
        value = value_of(change, raw)
        if there is not None:
            yield there[0], there[1], "", value
        else:
            key = encode_basestring(str(change.added.path[0]))
            yield target.end, target.end, "", Json(f",{lead}{key}{colon}{value}")


def with_members(record: str, members: Mapping[str, Any]) -> str:
    """The record's text with members behind its own, in its own manner: spaces, line ends,
    escapes. What is no object stays."""
    if not record.startswith("{"):
        return record
    return _with_texts(
        record, 0, len(record), {name: dumped(value, record) for name, value in members.items()}
    )


def _with_texts(text: str, start: int, end: int, members: Mapping[str, str]) -> str:
    """The text with members, as JSON, behind those of its object from `start` to `end`."""
    whole = text[start:end]
    inside = whole[:-1].rstrip(" \t\n\r")
    first = _first_member.match(whole)
    usual = _first_member.match(text)
    opening, colon = first.groups() if first else ("", usual[2] if usual else " ")
    # Pretty-printed records have each member on a line; others a space, or nothing.
    lead = opening if "\n" in opening else " " if colon else ""
    parts = [inside]
    for name, value in members.items():
        if first or len(parts) > 1:
            parts.append(f",{lead}")
        key = dumped(name, text)
        parts.append(f"{key}:{' ' if colon else ''}{value}")
    return "".join((text[:start], *parts, whole[len(inside) :], text[end:]))


def room_for(record: str, path: FieldPath) -> str | None:
    """Why a record has no room for a field at a path, or None."""
    start, _, left = _way(record, path)
    if not left or record.startswith(("{", "null"), start):
        return None
    reached = ".".join(map(str, path[: len(path) - len(left)]))
    return f"{reached or 'the record'} is no object"


def with_value(record: str, path: FieldPath, value: str) -> str:
    """The record's text with a value, which is JSON, at a path: in the place of what is there, or
    as a new member of the innermost object that is there. Unchanged where there is no room."""
    start, end, left = _way(record, path)
    if not left:
        return record[:start] + value + record[end:]
    is_object = record.startswith("{", start)
    if not is_object and not record.startswith("null", start):
        return record
    for key in reversed(left[1:] if is_object else left):
        value = f"{{{dumped(key, record)}: {value}}}"
    if not is_object:  # a null becomes an object
        return record[:start] + value + record[end:]
    return _with_texts(record, start, end, {str(left[0]): value})


_member = lru_cache(64)(lambda key: Field((key,), None))


def _way(record: str, path: FieldPath) -> tuple[int, int, FieldPath]:
    """The innermost value on the way of a path that is there, and the steps that are left."""
    start, end, left = 0, len(record), path
    while left:
        step = left[0]
        found = None if isinstance(step, Items) else _member(step).locate(record, start)[1]
        if not isinstance(found, Target):
            break
        start, left = found.start, left[1:]
        end = scan_value(record, start)[1]
    return start, end, left
