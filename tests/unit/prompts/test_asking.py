"""What is asked about a text."""

from __future__ import annotations

import pytest

from fabe_ds.config.settings import TransformConfig
from fabe_ds.fields import parse_path
from fabe_ds.prompts.asking import Asking, texts_of
from fabe_ds.prompts.conversation import turns_before
from fabe_ds.prompts.form import choice_in
from fabe_ds.request import LEAVE, Request


def asking(takes_forms: bool = True, **settings) -> Asking:
    config = TransformConfig(**{"instruction": "Do", "system_prompt": "", **settings})
    return Asking(config, texts_of(config), takes_forms)


def test_a_provider_that_knows_no_forms_is_told_of_them_in_the_prompt():
    item = asking(takes_forms=False, choices=["a", "b"]).item("x", None)
    assert isinstance(item, Request)
    assert item.prompt == "Do\n\nx\n\nAnswer with one of these, and nothing else:\na\nb"
    assert asking(choices=["a", "b"]).item("x", None).prompt == "Do\n\nx"


@pytest.mark.parametrize(
    ("where", "record", "asked"),
    [
        ("text == 'x'", None, True),
        ("code == 'y'", None, False),
        ("record.lang == 'C'", {"lang": "C"}, True),
        ("record.lang == 'C'", {}, False),
        ("record.tags and 'a' in record.tags", '{"tags": ["a"]}', True),
        ("record.a.b.c", {"a": {}}, None),
        ("record.n > 3", {"n": None}, None),
        ("text|length > 3", None, False),
    ],
)
def test_a_condition(where, record, asked):
    item = asking(where=where).item("x", record)
    if asked is None:
        assert item.kind == "where"
    else:
        assert isinstance(item, Request) if asked else item is LEAVE


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("good", "good"),
        (" Good.\n", "good"),
        ('"good"', "good"),
        ('{"choice": "good"}', "good"),
        ('{"label": "Bad"}', "bad"),
        ("**bad**", "bad"),
        ("good or bad", None),
        ("goodish", None),
        ("", None),
        ("[]", None),
        ('{"a": "good", "b": "bad"}', None),
        ("1", None),
    ],
)
def test_a_choice_is_found_where_it_is_all_that_is_said(answer, chosen):
    assert choice_in(answer, ["good", "bad"]) == chosen


CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "image"}]},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "b"},
    ]
}


def test_the_turns_before_one():
    path = parse_path("messages[role=assistant].content")
    assert turns_before(CHAT, path, 0) == [("system", "s"), ("user", "u")]
    assert turns_before(CHAT, path, 2) == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "a"),
        ("user", "t"),
    ]
    assert turns_before(CHAT, parse_path("messages.-1.content"), 0)[-1] == ("user", "t")
    assert turns_before(CHAT, parse_path("messages.0.content"), 0) == []
