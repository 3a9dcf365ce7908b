from __future__ import annotations

import pytest

from fabe_ds.errors import RecordFailed, TemplateError, UsageError
from fabe_ds.prompts.template import Instruction, load_instruction


def prompt(
    template, text="x = 1", record='{"code": "x = 1", "lang": "py"}', path=("code",), **names
):
    return Instruction(template, "i.j2", names, path).prompt(text, record)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Refactor.", "Refactor.\n\nx = 1"),
        ("Refactor.\n\n\n", "Refactor.\n\nx = 1"),
        ("Goal: {{ goal | default('speed') }}", "Goal: speed\n\nx = 1"),
        ("Do {{ what }}", "Do this\n\nx = 1"),
        ("<{{ text }}>", "<x = 1>"),
        ("<{{ code }}>", "<x = 1>"),
        ("<{{ record.code }}>", "<x = 1>"),
        ("<{{ record['code'] }}>", "<x = 1>"),
        ("{{ record.lang }}", "py\n\nx = 1"),
        ("{{ record | tojson }}", '{"code": "x = 1", "lang": "py"}'),
        ("{% for key in record %}{{ key }} {% endfor %}", "code lang "),
        ("{# text #}Only a comment", "Only a comment\n\nx = 1"),
    ],
)
def test_the_value_is_appended_where_the_template_does_not_mention_it(template, expected):
    assert prompt(template, what="this") == expected


def test_a_nested_field_goes_by_its_own_name():
    record = '{"messages": [{"content": "hi"}]}'
    path = ("messages", "0", "content")
    assert prompt("<{{ content }}>", "hi", record, path) == "<hi>"
    assert prompt("<{{ record.messages[0].content }}>", "hi", record, path) == "<hi>"


@pytest.mark.parametrize("text", ["{{ config }}", "{% for %}", "{{ ''.__class__ }}", "{# x #}"])
def test_record_text_is_data(text):
    assert prompt("Refactor {{ text }}", text) == f"Refactor {text}"
    assert prompt("Refactor", text) == f"Refactor\n\n{text}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("one\ntwo {{ goal }}", "i.j2:2: 'goal' is undefined; give it with --template-var"),
        ("one\n{% if %}", "i.j2:2: "),
        ("{{ text.__class__.__mro__ }}", "i.j2:1: not allowed in a template"),
        ("{{ text\n", "i.j2:"),
    ],
)
def test_a_wrong_template_is_named_with_file_and_line(template, says):
    with pytest.raises(TemplateError) as error:
        prompt(template)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("template", ["{{ record.nothing }}", "{{ range(10**9) }}{{ text }}"])
def test_what_fails_for_one_record_fails_that_record(template):
    with pytest.raises(RecordFailed, match=r"i\.j2:1: "):
        prompt(template)


def test_a_variable_may_not_hide_the_record():
    with pytest.raises(TemplateError, match="--template-var code"):
        prompt("x", code="y")


def test_an_instruction_is_a_file_where_it_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refactor.j2").write_text("Do it")
    assert load_instruction("refactor.j2") == ("Do it", "refactor.j2")
    assert load_instruction("Do it now") == ("Do it now", "instruction")
    with pytest.raises(UsageError, match=r"missing\.j2: No such file"):
        load_instruction("missing.j2")
