"""What becomes of a model's answer: tables of answers and the text a user would want of each."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.fences import fenced_blocks
from fabe_ds.prompts.reasoning import strip_reasoning


def clean(answer: str, reason: str | None = "stop", original: str = "old = 1", **options) -> str:
    settings = {"strip_fences": True, "on_truncated": "fail", **options}
    return clean_answer(answer, reason, original=original, **settings)


CODE = "def f():\n    return 1"

UNWRAPPED = {
    "no fence": CODE,
    "one block": f"```python\n{CODE}\n```",
    "one block, newline behind": f"```python\n{CODE}\n```\n\n",
    "no language": f"```\n{CODE}\n```",
    "tildes": f"~~~python\n{CODE}\n~~~",
    "longer fence": f"````python\n{CODE}\n````",
    "prose before": f"Here is the code:\n\n```python\n{CODE}\n```",
    "prose around": f"Sure!\n```python\n{CODE}\n```\nI renamed nothing.",
    "unclosed": f"```python\n{CODE}",
    "prose, unclosed": f"Here you go:\n```python\n{CODE}\n",
    "windows line ends": f"```python\r\n{CODE}\r\n```\r\n",
    "info string": f'```python title="x.py"\n{CODE}\n```',
    "space before the language": f"``` python\n{CODE}\n```",
    "in a list": "1. The code:\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.",
    "blank lines first": f"\n\n{CODE}\n",
    "reasoning first": f"<think>\nhm ```python\nno\n```\n</think>\n\n```python\n{CODE}\n```",
    "reasoning never opened": f"I should return 1.\n</think>\n{CODE}",
    "reasoning never opened, fenced": f"Maybe\n```python\nno\n```\n?\n</think>\n```python\n{CODE}\n```",
    "two thoughts": f"<think>a</think>\n<think>b</think>\n{CODE}",
    "other tags": f"<thinking>\na\n</thinking>\n{CODE}",
}


@pytest.mark.parametrize("name", UNWRAPPED)
def test_the_code_is_what_remains(name):
    assert clean(UNWRAPPED[name]) == CODE


KEPT = {
    "two blocks": "```python\na = 1\n```\nand\n```python\nb = 2\n```",
    "two blocks, bare": "```\na\n```\n\n```\nb\n```\nend",
    "a code span": "```not a block``` but a span",
    "ticks inside a line": 'x = "```"\ny = 2',
    "comparison that looks like a tag": "if a <think> b:\n    pass",
    "a tag in a string": 'START = "<think>"\nEND = "</think>"',
    "indented method": "    def f(self):\n        pass",
}


@pytest.mark.parametrize("name", KEPT)
def test_an_answer_that_is_not_one_block_stays(name):
    assert clean(KEPT[name]) == KEPT[name]


INSIDE = {
    "fence in a string": 'doc = "```"\nend = 1',
    "fence in a docstring, indented": 'def f():\n    """\n    ```\n    x\n    ```\n    """',
    "one bare fence in a string": 's = """\n```\n"""',
    "nested with a language": "# Title\n\n```python\nx\n```\n\nmore",
    "tags in the code": 'x = """\n<think>\n"""',
    "tildes in ticks": "~~~\nx\n~~~",
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_stands_inside_the_block_stays(name):
    assert clean(f"```python\n{INSIDE[name]}\n```") == INSIDE[name]


def test_a_longer_fence_holds_shorter_ones():
    assert clean("````markdown\n```python\nx\n```\n````") == "```python\nx\n```"


@pytest.mark.parametrize(
    ("original", "answer", "expected"),
    [
        ("Text\n```sh\nls\n```\nend", "Texte\n```sh\nls\n```\nfin", "Texte\n```sh\nls\n```\nfin"),
        ("Text\n```sh\nls\n```", "```\nTexte\n```", "Texte"),
        ("```python\na\n```", "```python\nb\n```", "```python\nb\n```"),
    ],
)
def test_fences_that_the_original_had_are_part_of_the_text(original, answer, expected):
    assert clean(answer, original=original) == expected


def test_fences_stay_where_asked():
    answer = f"```python\n{CODE}\n```\n"
    assert clean(answer, strip_fences=False) == answer


@pytest.mark.parametrize(
    ("answer", "reason", "kind"),
    [
        ("", "stop", "empty"),
        (" \n\t", "stop", "empty"),
        ("<think>on and on", "stop", "empty"),
        ("<think>a</think>", "stop", "empty"),
        ("```python\n```", "stop", "empty"),
        ("x = 1", "length", "truncated"),
        ("", "length", "truncated"),
        ("x = 1", "content_filter", "refused"),
    ],
)
def test_what_is_no_answer_fails(answer, reason, kind):
    with pytest.raises(RecordFailed) as error:
        clean(answer, reason)
    assert error.value.kind == kind


def test_a_cut_answer_is_kept_where_asked_but_never_an_empty_one():
    assert clean("x = 1", "length", on_truncated="keep") == "x = 1"
    with pytest.raises(RecordFailed, match="empty"):
        clean("<think>cut in the middle", "length", on_truncated="keep")


parts = st.lists(
    st.sampled_from(
        ["```", "```python", "~~~", "````", "x = 1", "", "<think>", "</think>", "  ```", "a ``` b"]
    ),
    max_size=9,
)


@given(parts)
def test_blocks_never_overlap_and_lie_in_the_text(lines):
    text = "\n".join(lines)
    blocks = fenced_blocks(text)
    assert all(0 <= b.start <= b.end <= len(text) for b in blocks)
    assert all(a.end <= b.start for a, b in pairwise(blocks))


@given(parts)
def test_text_outside_fences_without_tags_is_never_lost(lines):
    text = "\n".join(line for line in lines if "think" not in line)
    assert strip_reasoning(text) == text
