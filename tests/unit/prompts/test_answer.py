"""What becomes of a model's answer: tables of answers and the text a user would want of each."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.fences import fenced_blocks
from fabe_ds.reasoning import strip_reasoning


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


T = "```"
SHARED_LINES = {
    "a closing fence that was never opened": f"{CODE}\n{T}",
    "and prose behind it": f"{CODE}\n{T}\n\nThis returns 1.",
    "an opener behind words": f"Here is the code: {T}python\n{CODE}\n{T}",
    "an opener behind words, bare": f"The code:{T}\n{CODE}\n{T}\n",
    "a closer behind code": f"{T}python\n{CODE}{T}",
    "a closer behind code, and prose": f"{T}python\n{CODE}{T}\nDone.",
    "a closer before words": f"{T}python\n{CODE}\n{T}This sets x.",
}


@pytest.mark.parametrize("name", SHARED_LINES)
def test_fences_that_share_a_line_are_fences(name):
    assert clean(SHARED_LINES[name]) == CODE


@pytest.mark.parametrize("answer", [f"{T}x = 1{T}", f"{T}python x = 1 {T}", f"{T}py x = 1{T}\n"])
def test_a_block_on_one_line(answer):
    assert clean(answer) == "x = 1"


@pytest.mark.parametrize("words", ["Here is the code:", "Here is the corrected code.\n", "Sure"])
def test_an_opener_without_an_end_is_no_closer(words):
    assert clean(f"{words}\n{T}\n{CODE}\n") == CODE


def test_a_lone_fence_between_code_and_code_loses_neither():
    assert clean(f"{CODE}\n{T}\nx = f()") == f"{CODE}\n{T}\nx = f()"


@pytest.mark.parametrize("text", ["\n" * 30_000, " \n" * 15_000, "</s>" * 5_000, "`" * 30_000])
def test_a_degenerate_answer_takes_no_time(text):
    started = time.process_time()
    clean(f"x{text}x", original="x\n")
    clean("x = 1", original=f"x{text}")
    assert time.process_time() - started < 1


REASONING = {
    "the answer on the closing tag's line": "I should return 1.</think>x = 1",
    "and JSON": 'hm\n</think>{"a": 1}',
    "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    "<|channel|>final<|message|>x = 1",
    "harmony, ended": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    "<|channel|>final <|constrain|>json<|message|>x = 1<|return|>",
    "harmony without its marks": "analysishm.assistantfinalx = 1",
    "Magistral": "[THINK]hm[/THINK]x = 1",
    "capitals": "<Think>\nhm\n</Think>\nx = 1",
    "a tag that is not closed": "<think hm\n</think>\nx = 1",
    "an answer tag": "<think>\nhm\n</think>\n<answer>\nx = 1\n</answer>",
    "a response tag": "<think>hm</think><response>x = 1</response>",
    "Kimi": "◁think▷hm◁/think▷x = 1",
    "Seed": "<seed:think>hm</seed:think>x = 1",
    "Command A": "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>x = 1<|END_RESPONSE|>",
    "Apertus": "<|inner_prefix|>hm<|inner_suffix|>x = 1",
    "Gemma": "<|channel>thought\nhm<channel|>x = 1",
    "Granite": "Here is my thought process:\nhm\n\nHere is my response:\nx = 1",
    "OpenThinker": "<|begin_of_thought|>hm<|end_of_thought|>\n"
    "<|begin_of_solution|>x = 1<|end_of_solution|>",
    "a draft in a fence, then the answer": f"Maybe\n{T}\nno\n{T}\n?</think>x = 1",
    "an end mark": "x = 1<|im_end|>",
    "another": "x = 1</s>",
    "and another": "x = 1<|eot_id|>\n",
    "in a fence": f"{T}python\nx = 1\n{T}<|im_end|>",
    "inside a fence": f"{T}python\nx = 1<|im_end|>\n{T}",
    "ran on": "x = 1<|im_end|>\n<|im_start|>user\nnext",
    "ran on, Llama": "x = 1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nnext",
    "ran on, Gemma": "x = 1<end_of_turn>\n<start_of_turn>user\nnext<end_of_turn>",
    "twice": "x = 1<|im_end|><|endoftext|>",
}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_and_marks_are_no_part_of_the_answer(name):
    assert clean(REASONING[name]) == ('{"a": 1}' if "JSON" in name else "x = 1")


@pytest.mark.parametrize(
    "thoughts",
    [
        "[THINK]on and on",
        "<Think>on",
        "<|channel|>analysis<|message|>on and on",
        "◁think▷on",
        "<seed:think>on",
    ],
)
def test_thoughts_alone_are_no_answer(thoughts):
    with pytest.raises(RecordFailed, match="nothing but reasoning"):
        clean(thoughts)


OWN = {  # what the original itself holds, in an answer that changes something else
    "a closing tag in the line": ("a </think> b = 1", "a </think> b = 2"),
    "a tag in a string": ("S = '</think>'", "S = '</think>' + x"),
    "an end mark in a pattern": ("re.sub('</s>', '')", "re.sub('</s>', '', text)"),
    "an end mark at the end": ("template + <|im_end|>", "templates + <|im_end|>"),
    "a whole template": (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant",
    ),
    "struck text": ("<s>old</s>", "<s>older</s>"),
    "an answer tag": ("<answer>4</answer>", "<answer>5</answer>"),
    "a think block": ("<think>a</think>b", "<think>a</think>c"),
    "a tag of its own, further inside": ("<r><Thought>x</Thought></r>", "<Thought>\ny\n</Thought>"),
    "channels": ("<|channel|>final<|message|>a", "<|channel|>final<|message|>b"),
}


@pytest.mark.parametrize("name", OWN)
def test_what_the_original_holds_stays(name):
    original, answer = OWN[name]
    ends = "\n" if original.endswith("\n") else ""
    assert clean(answer, original=original) == answer + ends


ABOUT_MARKS = [  # code and prose that speak of marks, and write none
    'text.split("</think>")[1]',
    "`</think>` ends it",
    "<s>x</s>",
    '<p>Now 5</p><s class="old">10</s>',
    r"return text.partition('</think>\n')[2]",
    "s.index('x</think>') + 8",
    'MARK = "<|channel|>final<|message|>"\nprint(MARK)',
    "eos_token = </s>",
    "{{ m.content }}<|im_end|>",
    'f"<|start_header_id|>user<|end_header_id|>{q}<|eot_id|><|start_header_id|>assistant"',
    "t = '<s>[INST] {a} [/INST] {b}</s>[INST] {c}'",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello",
    "function A() {\n  return (\n    <Thinking size={3} />\n  )\n}",
    "function A() {\n  return (\n    <Thinking size={3}>\n    x\n    </Thinking>\n  )\n}",
    'def f():\n    """Use it.\n\n    ```\n    f()\n    ```\n    """',
    "Text first.\n<thought>\nnever closed",
]


@pytest.mark.parametrize("answer", ABOUT_MARKS)
def test_marks_that_are_quoted_or_paired_stay(answer):
    assert clean(answer) == answer


MARKDOWN = f"# T\n\n{T}\npip install x\n{T}\n\nend"


@pytest.mark.parametrize("language", ["markdown", "md", "mdx", "Markdown"])
@pytest.mark.parametrize("original", [MARKDOWN, "# T", MARKDOWN.replace("# T", "# U")])
def test_a_markdown_value_in_a_markdown_fence(language, original):
    assert clean(f"{T}{language}\n{MARKDOWN}\n{T}", original=original) == MARKDOWN


def test_a_bare_fence_around_a_text_with_the_originals_fences():
    changed = MARKDOWN.replace("# T", "# U")
    assert clean(f"{T}\n{changed}\n{T}", original=MARKDOWN) == changed


@pytest.mark.parametrize(
    ("original", "answer", "expected"),
    [
        ("def f():\n    pass\n", CODE + "\n", CODE + "\n"),
        ("def f():\n    pass\n", CODE, CODE + "\n"),
        ("def f():\n    pass\n", f"{T}\n{CODE}\n{T}", CODE + "\n"),
        ("def f():\n    pass\r\n", CODE, CODE + "\r\n"),
        ("def f():\n    pass\n\n", CODE, CODE + "\n\n"),
        ("def f(): pass", CODE + "\n", CODE),
    ],
)
def test_the_last_line_ends_as_the_original_does(original, answer, expected):
    assert clean(answer, original=original) == expected


SEVERAL = f"{T}python\na = 1\n{T}\nand use it:\n{T}python\nprint(a)\nprint(a)\n{T}"


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        ("keep", SEVERAL),
        ("first", "a = 1"),
        ("last", "print(a)\nprint(a)"),
        ("longest", "print(a)\nprint(a)"),
    ],
)
def test_one_of_several_blocks(several, expected):
    assert clean(SEVERAL, several=several) == expected
    assert clean(f"{T}\na\n{T}", several=several) == "a"


def test_several_blocks_fail_where_asked():
    with pytest.raises(RecordFailed) as error:
        clean(SEVERAL, several="fail")
    assert error.value.kind == "fences"


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


pieces = st.sampled_from(
    [
        *("x = 1", "", "    y", "text", "```", "```python", "~~~", "````", "<think>", "</think>"),
        *("a </think> b", "</s>", "<|im_end|>", "[THINK]", "<|channel|>final<|message|>", "\r"),
        *("<answer>", "</answer>", "assistantfinal", "analysis", "'</s>'", "x ```", "``` y z"),
    ]
)
originals = st.lists(pieces, min_size=1, max_size=8).map("\n".join).filter(str.strip)
plain = (
    st.lists(
        st.sampled_from(["x = 1", "", "    y = 2", "text", '"""', "a `b` c", "# <tag>", "é"]),
        min_size=1,
        max_size=8,
    )
    .map("\n".join)
    .filter(str.strip)
)


@given(originals)
def test_an_answer_that_is_the_original_is_the_original(original):
    assert clean(original, original=original) == original


@given(
    plain,
    st.sampled_from(["", "python", "markdown"]),
    st.sampled_from(["", "Sure:\n", "<think>hm</think>\n"]),
)
def test_an_answer_that_is_the_original_in_a_fence_is_the_original(original, language, before):
    answer = f"{before}```{language}\n{original}\n```"
    assert clean(answer, original=original) == original


@given(originals)
def test_a_fence_around_an_original_with_marks_of_its_own_is_taken_off(original):
    assert clean(f"```python\n{original}\n```", original=original) == original


@given(
    plain,
    st.sampled_from(
        ["```\n{}\n```", "```python\n{}\n```\n", "{}", "{}<|im_end|>", "ok</think>{}"],
    ),
)
def test_wrapping_loses_no_code(code, wrapping):
    assert clean(wrapping.format(code)).strip() == code.strip()
