"""Paths: how they are written, and what they lead to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabe_ds.answers import Change
from fabe_ds.fields import Added, Items, found_in, inside, parse_path, with_inside
from fabe_ds.formats.json.edit import edits_beside, probing, room_for, spliced, with_value
from fabe_ds.formats.json.scan import Field


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("code", ("code",)),
        ("meta.code", ("meta", "code")),
        (r"a\.b.c", ("a.b", "c")),
        ("a.0.b", ("a", "0", "b")),
        ("a.*.b", ("a", Items(), "b")),
        ("a[from=gpt].b", ("a", Items("from", "gpt"), "b")),
        ('a[model="gpt-4.1"].b', ("a", Items("model", "gpt-4.1"), "b")),
        ("*", (Items(),)),
    ],
)
def test_a_path_is_read(text, path):
    assert parse_path(text) == path


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b"])
def test_an_empty_step_is_refused(text):
    with pytest.raises(ValueError, match="empty step"):
        parse_path(text)


RECORD = {
    "turns": [
        {"from": "a", "v": 1},
        {"from": "b", "v": 2},
        {"v": 3},
        "text",
        {"from": "b", "v": {"w": 4}},
    ],
    "x.y": {"z": 5},
    "x": {"q": 6},
    "grid": [[1, 2], [3]],
}


@pytest.mark.parametrize(
    ("field", "ways"),
    [
        ("turns.*.v", ["turns.0.v", "turns.1.v", "turns.2.v", "turns.4.v"]),
        ("turns[from=b].v", ["turns.1.v", "turns.4.v"]),
        ("turns[from=b].v.w", ["turns.4.v.w"]),
        ("turns[from=c].v", []),
        ("turns.-1.from", ["turns.-1.from"]),
        ("x.q", ["x.q"]),
        ("x.y.z", ["x.y.z"]),
        ("grid.*.*", ["grid.0.0", "grid.0.1", "grid.1.0"]),
        ("x.*", []),
        ("missing.a", []),
    ],
)
def test_what_a_path_leads_to_is_the_same_in_values_and_in_text(field, ways):
    path = parse_path(field)
    found = found_in(RECORD, path)
    assert [".".join(way) for way in found] == ways
    text = json.dumps(RECORD, indent=1)
    _, located = Field(path, None).locate(text, 0)
    targets = located if isinstance(located, list) else [located] if located else []
    values = [json.loads(text[target.start : target.end]) for target in targets]
    assert values == [inside(RECORD, way) for way in found]


keys = st.sampled_from(["a", "b", "code", "m", 'q"', "é", "s"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
layouts = st.sampled_from([None, 1, 4, "\t"])


@given(st.dictionaries(keys, values, max_size=5), layouts, st.booleans(), st.data())
def test_a_value_is_put_at_any_path_that_has_room(record, indent, ascii_only, data):
    text = json.dumps(record, indent=indent, ensure_ascii=ascii_only)
    path = tuple(data.draw(st.lists(keys, min_size=1, max_size=3)))
    if room_for(text, path) is not None:
        assert with_value(text, path, "7") == text
        return
    assert json.loads(with_value(text, path, "7")) == with_inside(record, path, 7)


@given(st.dictionaries(keys, values, max_size=5), layouts, st.booleans(), st.text(max_size=5))
def test_a_member_goes_right_behind_its_field_and_nothing_else_changes(
    record, indent, ascii_only, new
):
    record = {**record, "code": "x"}
    text = json.dumps(record, indent=indent, ensure_ascii=ascii_only)
    _, target = probing(("code",), ["s"]).locate(text, 0)
    change = Change(Added("s", "answer", ("s",), True), new)
    edits = list(edits_beside(target, [change], text))
    after = "".join(spliced(text, edits))
    assert json.loads(after) == {**record, "s": new}
    names = list(json.loads(after))
    if "s" not in record:
        assert names.index("s") == names.index("code") + 1
    ((start, end, _, added),) = edits
    assert after == text[:start] + added + text[end:]
