"""What is made of a model's answer before it goes into a record."""

from __future__ import annotations

import re
from typing import NamedTuple

from fabe_ds.errors import RecordFailed

_fence = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n]*?)[ \t\r]*$", re.MULTILINE)
_THINK = r"think|thinking|reasoning|thought"
_mark = re.compile(
    rf"^[ \t]*<(?P<open>{_THINK})>|</(?P<close>{_THINK})>|{_fence.pattern}", re.MULTILINE
)
_blank_start = re.compile(r"\A(?:[ \t]*\r?\n)+")


class Block(NamedTuple):
    """A fenced block: `answer[start:end]` with its fences, and what is between them."""

    start: int
    end: int
    content: str


def clean_answer(
    answer: str,
    finish_reason: str | None,
    *,
    original: str,
    strip_fences: bool,
    on_truncated: str,
) -> str:
    """The text that goes into the record.

    Raises: RecordFailed with kind "truncated" (cut at the token limit, unless on_truncated is
    "keep"), "refused" (a content filter) or "empty".
    """
    if finish_reason == "length" and on_truncated != "keep":
        raise RecordFailed("truncated", "the answer was cut at the token limit (--max-new-tokens)")
    if finish_reason == "content_filter":
        raise RecordFailed("refused", "the server's content filter stopped the answer")
    text = strip_reasoning(answer)
    if strip_fences:
        text = unwrap_fence(text, original)
        text = _blank_start.sub("", text).rstrip()
    if not text.strip():
        thought = "" if text.strip() == answer.strip() else " (nothing but reasoning or fences)"
        raise RecordFailed("empty", f"the model's answer is empty{thought}")
    return text


def strip_reasoning(answer: str) -> str:
    """The answer without `<think>...</think>`, unclosed or never opened ones too.

    A block counts where its tag begins a line outside code fences; a closing tag with no opening
    one (the chat template wrote it) ends reasoning where nothing else of its line follows.
    """
    if "<" not in answer:
        return answer
    kept: list[str] = []
    position = 0
    fence: str | None = None
    thinking: str | None = None
    for mark in _mark.finditer(answer):
        if mark["open"]:
            if thinking is None and fence is None:
                kept.append(answer[position : mark.start()])
                thinking = mark["open"]
        elif mark["close"]:
            rest = answer[mark.end() :].split("\n", 1)[0].strip()
            if thinking == mark["close"]:
                thinking, position = None, mark.end()
            elif thinking is None and not rest and (fence is None or not kept):
                kept, position, fence = [""], mark.end(), None
        elif thinking is None:
            ticks = mark.group(4)
            if fence is None:
                fence = ticks
            elif ticks.startswith(fence) and not mark.group(5):
                fence = None
    if thinking is None:
        kept.append(answer[position:])
    text = "".join(kept)
    return text.lstrip("\r\n") if len(kept) > 1 or thinking else text


def unwrap_fence(text: str, original: str) -> str:
    """What is inside the one fenced block of an answer; the answer itself where there is no one.

    The whole answer may be the block, or prose may stand around it. Where the original had
    fences itself, prose around one is part of the text, and an original that was one block
    whole stays one.
    """
    blocks = fenced_blocks(text)
    if len(blocks) != 1:
        return text
    block = blocks[0]
    whole = not text[: block.start].strip() and not text[block.end :].strip()
    before = fenced_blocks(original) if "```" in original or "~~~" in original else []
    if before:
        wrapped = len(before) == 1 and original.strip() == original[slice(*before[0][:2])].strip()
        return text if wrapped or not whole else block.content
    return block.content


def fenced_blocks(text: str) -> list[Block]:
    """The outermost fenced blocks (CommonMark 4.5), the last one perhaps unclosed.

    Models nest fences of one length, which CommonMark does not know: a fence with a language
    inside a block opens another level, one deeper indented than the block's is code, and where
    the text begins and ends with a fence and what is between does not pair, it is one block.
    """
    fences = list(_fence.finditer(text))
    if not fences:
        return []
    blocks: list[Block] = []
    opened: re.Match[str] | None = None
    depth = 0
    for fence in fences:
        indent, ticks, info = fence.groups()
        if opened is None:
            if ticks[0] == "`" and "`" in info:
                continue  # an inline code span at the start of a line
            opened, depth = fence, 1
            continue
        same = ticks[0] == opened[2][0] and len(ticks) >= len(opened[2])
        if not same or len(indent.expandtabs()) > len(opened[1].expandtabs()):
            continue
        if info:
            depth += "`" not in info
            continue
        depth -= 1
        if not depth:
            blocks.append(_block(text, opened, fence))
            opened = None
    if opened is not None:
        first, last = fences[0], fences[-1]
        closes = not last[3] and last is not first and not text[last.end() :].strip()
        if closes and not text[: first.start()].strip():
            return [_block(text, first, last)]
        blocks.append(_block(text, opened, None))
    return blocks


def _block(text: str, opening: re.Match[str], closing: re.Match[str] | None) -> Block:
    start = min(opening.end() + 1, len(text))
    stop = len(text) if closing is None else closing.start()
    content = text[start:stop]
    if closing is not None:
        content = content[:-1] if content.endswith("\n") else content
        content = content[:-1] if content.endswith("\r") else content
    if opening[1]:  # a block in a list is indented with its fence
        content = re.sub(rf"^{opening[1]}", "", content, flags=re.MULTILINE)
    end = len(text) if closing is None else closing.end()
    return Block(opening.start(), end, content)
