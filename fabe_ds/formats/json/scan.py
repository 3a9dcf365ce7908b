"""Where a field stands in the text of a JSON record, to the character.

The C scanner of the standard library tells each value and where it ends, so a record is read once,
member by member, and never written out again: what is not the field stays the text that it was.
Grammar: RFC 8259, with NaN and Infinity allowed as Python's json allows them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from json.decoder import JSONDecodeError, JSONDecoder, scanstring  # type: ignore[attr-defined]
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from fabe_ds.fields import FieldPath, Items, Step, is_several, joined_keys

# Numbers stay text: their value is never needed, and int() refuses more than 4,300 digits.
_scan_once = JSONDecoder(parse_int=str, parse_float=str).scan_once  # type: ignore[attr-defined]

_space = re.compile(r"[ \t\n\r]*").match
_colon = re.compile(r"[ \t\n\r]*:[ \t\n\r]*").match
_next_member = re.compile(r"[ \t\n\r]*(?:,([ \t\n\r]*)|\})").match
_next_item = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|\])").match
_structure = re.compile(r'["\[\]{}]')


class Target(NamedTuple):
    """The field's place in a record: `text[start:end]` is its JSON literal, `value` its value.

    `joint` is what stands between that literal and a backup's: a comma, the record's own spacing,
    the backup's key and colon. Empty where the object holds a backup already. `beside` are the
    literals of members that were looked for in the same object, None for one that is not there.
    """

    start: int
    end: int
    value: Any
    joint: str
    beside: tuple[tuple[int, int] | None, ...] = ()


Located = Target | None | list[Target]
"""A field's place in a record; all of its places, where it may have several."""


class Deep:
    """Stands for a value nested deeper than the C scanner goes."""


def scan_value(text: str, pos: int) -> tuple[Any, int]:
    """The value that begins at `pos` and the position after it.

    Raises: JSONDecodeError.
    """
    try:
        return _scan_once(text, pos)  # type: ignore[no-any-return]
    except StopIteration as error:
        raise JSONDecodeError("Expecting value", text, error.value) from None
    except RecursionError:
        return Deep(), _skip_deep(text, pos)


class Field:
    """A field's path made ready to be found in one record after another.

    `several`: a record may have it several times, and `locate` gives a list. `beside`: keys of
    members that are looked for in the field's own object.
    """

    def __init__(self, path: FieldPath, backup: str | None, beside: Sequence[str] = ()) -> None:
        self.path, self.backup, self._beside = path, backup, tuple(beside)
        self.several = is_several(path)
        key = path[0] if isinstance(path[0], str) else ""
        self._key = key
        self._usual = (": ", self._joint(" ", ": "))  # as most files are spaced
        self._quoted = encode_basestring(key)
        # A key with no other spelling than its own, but for \\u escapes.
        self._plain = len(path) == 1 and self._quoted == f'"{key}"' and "/" not in key
        self._none_beside = (None,) * len(self._beside)
        self._colon = re.compile(re.escape(self._quoted) + r"([ \t\n\r]*:[ \t\n\r]*)\"").match

    def locate(self, text: str, pos: int) -> tuple[int, Located]:
        """The end of the record that begins at `pos`, and its target where it has one.

        Of equal keys the last counts, as it does for every common JSON reader.
        Raises: JSONDecodeError.
        """
        try:
            record, end = _scan_once(text, pos)
        except (StopIteration, RecursionError):
            record, end = scan_value(text, pos)
        if self._plain and type(record) is dict:
            value = record.get(self._key, self)
            if value is self:
                return end, None
            alone = not self._beside or record.keys().isdisjoint(self._beside)
            # Where the quoted key stands just once, that place is the member: to stand deeper,
            # the key would have to be spelled with an escape here. Half the time of the walk.
            key = text.find(self._quoted, pos, end)
            quoted, none = self._quoted, self._none_beside
            if alone and text.find(quoted, key + 1, end) < 0 and text.find("\\u", pos, end) < 0:
                match = self._colon(text, key)
                if match is not None and text[key - 1] != "\\":
                    start, colon = match.end() - 1, match[1]
                    stop = scanstring(text, start + 1, True)[1]
                    if self.backup is None or self.backup in record:
                        return end, Target(start, stop, value, "", none)
                    if text[key - 2 : key] == ", " and self._usual[0] == colon:
                        return end, Target(start, stop, value, self._usual[1], none)
                    joint = self._joint_at(text, key, stop, colon)
                    return end, Target(start, stop, value, joint, none)
        found = self._targets(text, pos, self.path)
        if self.several:
            return end, found
        return end, found[0] if found else None

    def _joint_at(self, text: str, key: int, stop: int, colon: str) -> str:
        before = key
        while text[before - 1] in " \t\n\r":
            before -= 1
        lead = text[before:key]
        if text[before - 1] == "{":
            following = _next_member(text, stop)
            lead = _lead_of_first(lead, following and following[1], colon)
        return self._joint(lead, colon)

    def _targets(self, text: str, pos: int, steps: Sequence[Step]) -> list[Target]:
        """The targets below the value at `pos`, found step by step and member by member."""
        first = steps[0]
        if text.startswith("{", pos) and not isinstance(first, Items):
            for key, left in joined_keys(steps):
                member = self._member(text, pos, key, last=not left)
                if member is not None and not left:
                    return [member]
                if member is not None and (found := self._targets(text, member.start, left)):
                    return found
            return []
        if not text.startswith("[", pos):
            return []
        items = _items(text, pos)
        if isinstance(first, Items):
            items = [item for item in items if first.takes(item.value)]
        else:
            items = _item(items, first)
        if len(steps) == 1:
            return items
        return [target for item in items for target in self._targets(text, item.start, steps[1:])]

    def _member(self, text: str, pos: int, key: str, last: bool) -> Target | None:
        """Member `key` of the object at `pos`. `last`: it is the field itself."""
        brace = pos
        backup, wanted = (self.backup, self._beside) if last else (None, ())
        beside: dict[str, tuple[int, int]] = {}
        pos = skip_space(text, pos + 1)
        if text.startswith("}", pos):
            return None
        found: tuple[int, int, int, Any, str | None] | None = None
        following: str | None = None
        lead: str | None = None  # the space between the comma before this member and its key
        backed = False
        while True:
            name, key_end, start = _key(text, pos)
            value, end = scan_value(text, start)
            after = _next_member(text, end)
            if after is None:
                raise JSONDecodeError("Expecting ',' delimiter", text, end)
            if name == key:
                found, following = (pos, start, end, value, lead), after[1]
                colon = text[key_end:start]
            elif name == backup:
                backed = True
            if name in wanted:
                beside[name] = (start, end)
            pos, lead = after.end(), after[1]
            if lead is None:
                break
        if found is None:
            return None
        key_start, start, end, value, lead = found
        places = tuple(beside.get(name) for name in wanted)
        if backup is None or backed:
            return Target(start, end, value, "", places)
        if lead is None:
            lead = _lead_of_first(text[brace + 1 : key_start], following, colon)
        return Target(start, end, value, self._joint(lead, colon), places)

    def _joint(self, lead: str, colon: str) -> str:
        return f",{lead}{encode_basestring(str(self.backup))}{colon}"


class Fields:
    """Several fields, found together in one record after another."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = fields
        self._only = fields[0] if len(fields) == 1 else None

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def several(self) -> list[bool]:
        """For each field, whether a record may have it several times."""
        return [field.several for field in self._fields]

    def locate(self, text: str, pos: int) -> tuple[int, tuple[Located, ...]]:
        """The end of the record that begins at `pos`, and a target for each field, or None; a list
        of targets for one that it may have several times.

        Raises: JSONDecodeError.
        """
        if self._only is not None:
            end, target = self._only.locate(text, pos)
            return end, (target,)
        found = [field.locate(text, pos) for field in self._fields]
        end = found[0][0] if found else scan_value(text, pos)[1]
        return end, tuple(target for _, target in found)


def skip_space(text: str, pos: int) -> int:
    """The first position from `pos` on that holds no white space."""
    return _space(text, pos).end()  # type: ignore[union-attr]


def _lead_of_first(opening: str, following: str | None, colon: str) -> str:
    """The space to put after a comma behind the first member, whose own space follows a brace."""
    if following is not None:
        return following
    if "\n" in opening:
        return opening
    return " " if colon.endswith(" ") else ""


def _key(text: str, pos: int) -> tuple[str, int, int]:
    """A member's key, where it ends, and where its value begins."""
    if not text.startswith('"', pos):
        raise JSONDecodeError("Expecting property name enclosed in double quotes", text, pos)
    name, end = scanstring(text, pos + 1, True)
    colon = _colon(text, end)
    if colon is None:
        raise JSONDecodeError("Expecting ':' delimiter", text, end)
    return name, end, colon.end()


def _item(items: list[Target], step: str) -> list[Target]:
    """The item with the number `step`, as far as it is there."""
    try:
        wanted = int(step)
    except ValueError:
        return []
    return [items[wanted]] if -len(items) <= wanted < len(items) else []


def _items(text: str, pos: int) -> list[Target]:
    """The items of the list at `pos`."""
    items: list[Target] = []
    pos = skip_space(text, pos + 1)
    while not text.startswith("]", pos):
        value, end = scan_value(text, pos)
        items.append(Target(pos, end, value, ""))
        after = _next_item(text, end)
        if after is None or text[after.end() - 1] == "]":
            break
        pos = after.end()
    return items


def _skip_deep(text: str, pos: int) -> int:
    """The end of a value of any depth; brackets are paired, what is between is not judged."""
    stack: list[str] = []
    while True:
        mark = _structure.search(text, pos)
        if mark is None:
            raise JSONDecodeError("Unterminated nesting starting", text, pos)
        char, pos = mark[0], mark.end()
        if char == '"':
            pos = scanstring(text, pos, True)[1]
        elif char in "[{":
            stack.append("]" if char == "[" else "}")
        elif not stack or stack.pop() != char:
            raise JSONDecodeError("Unpaired bracket", text, pos - 1)
        if not stack:
            return pos
