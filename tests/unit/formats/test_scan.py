"""The span scanner: what is not the field stays what it was, whatever the JSON looks like."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabe_ds.fields import parse_path
from fabe_ds.formats.json.scan import Field, Target

CODE = ("code",)


def find(text: str, path: tuple[str, ...] = CODE, backup: str | None = "original") -> Target | None:
    end, target = Field(path, backup).locate(text, 0)
    assert end == len(text)
    return target


@pytest.mark.parametrize(
    ("text", "joint"),
    [
        ('{"code":"x","a":1}', ',"original":'),
        ('{"code": "x", "a": 1}', ', "original": '),
        ('{"a": 1, "code": "x"}', ', "original": '),
        ('{"code": "x"}', ', "original": '),
        ('{ "code" : "x" , "a" : 1 }', ', "original" : '),
        ('{"a":1,\n "code": "x"}', ',\n "original": '),
        ('{\n  "code": "x"\n}', ',\n  "original": '),
        ('{\r\n\t"code":"x",\r\n\t"a":1\r\n}', ',\r\n\t"original":'),
        ('{"code": "x", "original": "w"}', ""),
        ('{"original": null, "code": "x"}', ""),
    ],
)
def test_a_backup_is_spaced_as_the_record_is(text, joint):
    assert find(text).joint == joint


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ('{"code": "a", "code": "b"}', '"b"'),
        ('{"c\\u006fde": "x", "meta": {"code": "x"}}', '"x"'),
        ('{"a": {"code": "no"}, "code": "yes"}', '"yes"'),
        ('{"a": "\\"code\\": ", "code": "yes"}', '"yes"'),
        ('{"\\"code": "no", "code": "yes"}', '"yes"'),
        ('{"code": 1e-12}', "1e-12"),
        ('{"code": [1, {"code": 2}]}', '[1, {"code": 2}]'),
    ],
)
def test_the_target_is_the_last_member_of_that_name(text, literal):
    target = find(text)
    assert text[target.start : target.end] == literal


@pytest.mark.parametrize("text", ["{}", '{"a": {"code": "x"}}', '["code"]', '"code"', "1", "null"])
def test_a_record_without_the_field_has_no_target(text):
    assert find(text) is None


@pytest.mark.parametrize(
    ("field", "literal"),
    [
        ("meta.code", '"m"'),
        ("messages.0.content", '"first"'),
        ("messages.-1.content", '"last"'),
        ("messages.2.content", None),
        ("messages.x.content", None),
        (r"a\.b", '"dotted"'),
        ("meta.0", '"zero"'),
        ("id.code", None),
    ],
)
def test_dotted_paths(field, literal):
    text = json.dumps(
        {
            "id": 1,
            "meta": {"code": "m", "0": "zero"},
            "messages": [{"content": "first"}, {"content": "last"}],
            "a.b": "dotted",
        }
    )
    target = find(text, parse_path(field))
    assert (target and text[target.start : target.end]) == literal


@pytest.mark.parametrize("field", ["", ".", "a.", ".a", "a..b"])
def test_a_path_with_an_empty_step_is_refused(field):
    with pytest.raises(ValueError, match="empty step"):
        parse_path(field)


keys = st.sampled_from(["code", "a", "co\u0064e", "meta", "original", "", 'x"y', "é", "\\code"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["code", '"code"', 'x\\"code', "\\u0063ode", '"code": "no"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(st.tuples(keys, values), max_size=6),
    st.sampled_from([None, 1, 4, "\t"]),
    st.booleans(),
)
def test_quick_and_slow_way_agree_and_splicing_changes_the_field_alone(members, indent, ascii_only):
    body = ",".join(
        f"{json.dumps(key, ensure_ascii=ascii_only)}: "
        f"{json.dumps(value, indent=indent, ensure_ascii=ascii_only)}"
        for key, value in members
    )
    text = "{" + body + "}"
    field = Field(CODE, "original")
    end, target = field.locate(text, 0)
    assert end == len(text)
    assert ([] if target is None else [target]) == field._targets(text, 0, field.path)
    parsed: dict[str, Any] = json.loads(text)
    assert (target is None) == ("code" not in parsed)
    if target is None:
        return
    spliced = text[: target.start] + '"NEW"' + text[target.end :]
    assert repr(json.loads(spliced)) == repr({**parsed, "code": "NEW"})
    if target.joint:
        backed = text[: target.start] + '"NEW"' + target.joint + text[target.start :]
        after = json.loads(backed, object_pairs_hook=list)
        place = max(i for i, (key, _) in enumerate(after) if key == "code")
        assert after[place + 1][0] == "original"
