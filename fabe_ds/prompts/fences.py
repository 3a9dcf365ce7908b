"""Fenced code blocks in a model's answer."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Several = Literal["keep", "first", "last", "longest", "fail"]
"""Which block is the answer where it has several."""

_fence = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n]*?)[ \t\r]*$", re.MULTILINE)
_inline = re.compile(r"\A\s*(`{3,})(?!`)([^\n]*?[^`\n])\1\s*\Z")
_opener_behind_words = re.compile(r"(?<=[:\s])[ \t]*(`{3,}|~{3,})([\w+#.-]*)[ \t]*\r?\n")
_closer_behind_code = re.compile(r"(?<=[^\s`~])[ \t]*(`{3,}|~{3,})[ \t]*\r?$", re.MULTILINE)
_closer_before_words = re.compile(
    r"^([ \t]*(?:`{3,}|~{3,}))([^\s`~][^\n`]*[ ][^\n`]*)$", re.MULTILINE
)
_code = re.compile(
    r"^[ \t]+\S|[=;{}<>]|\w\(|\]\s*$|^\s*(def|class|import|from|return|if|for|while|fn|let"
    r"|const|var|function|public|select|package|use|#include|#!)\b",
    re.MULTILINE | re.IGNORECASE,
)
_list_item = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", re.MULTILINE)
_MARKDOWN = ("markdown", "md", "mdx")
_LANGUAGES = """
    python py python3 javascript js typescript ts java c cpp c++ csharp cs go rust ruby php swift
    kotlin scala r julia lua perl bash sh shell zsh sql html css xml json yaml yml toml text txt
    plaintext markdown md
    """.split()  # noqa: SIM905 - a list of words reads better


class Block(NamedTuple):
    """A fenced block: `answer[start:end]` with its fences, and what is between them."""

    start: int
    end: int
    content: str
    closed: bool = True


class SeveralBlocks(Exception):
    """An answer of several blocks, where that is a failure."""


def unwrap_fence(text: str, original: str, several: Several = "keep") -> str:
    """What is inside the fenced block of an answer; the answer itself where there is no one.

    The whole answer may be the block, or prose may stand around it. Where the original had fences
    itself, prose around one is part of the text, and an original that was one block whole stays
    one. `several` says what an answer of several blocks is.

    Raises: SeveralBlocks, with several="fail".
    """
    if "```" not in text and "~~~" not in text:
        return text
    before = fenced_blocks(original) if "```" in original or "~~~" in original else []
    if (inside := _outer(text, original, before)) is not None:
        return inside
    if not before:
        if inline := _inline.match(text):
            return _without_language(inline[2])
        if (code := _before_lone_closer(text)) is not None:
            return code
        text = _repaired(text)
    blocks = fenced_blocks(text)
    if len(blocks) > 1 and not before:
        return _one_of(blocks, text, several)
    if len(blocks) != 1:
        return text
    block = blocks[0]
    whole = not text[: block.start].strip() and not text[block.end :].strip()
    if not whole and text[block.start] in " \t" and not _list_item.search(text[: block.start]):
        return text  # an example inside a comment or docstring
    if before:
        wrapped = len(before) == 1 and original.strip() == original[slice(*before[0][:2])].strip()
        return text if wrapped or not whole else block.content
    return block.content


def _one_of(blocks: list[Block], text: str, several: Several) -> str:
    if several == "fail":
        raise SeveralBlocks(f"the answer has {len(blocks)} code blocks")
    if several == "first":
        return blocks[0].content
    if several == "last":
        return blocks[-1].content
    if several == "longest":
        return max(blocks, key=lambda block: len(block.content)).content
    return text


def _outer(text: str, original: str, before: list[Block]) -> str | None:
    """What is between an answer's first and last fence where these two belong together, whatever
    stands between them; None where they do not."""
    fences = list(_fence.finditer(text))
    if len(fences) < 2:
        return None
    first, last = fences[0], fences[-1]
    ticks = first[2]
    closes = not last[3] and last[2][0] == ticks[0] and len(last[2]) >= len(ticks)
    if not closes or text[last.end() :].strip() or (ticks[0] == "`" and "`" in first[3]):
        return None
    content = _block(text, first, last).content
    if _same(content, original):
        return content
    prose = text[: first.start()].strip()
    info = first[3].split()
    if info and info[0].lower() in _MARKDOWN and len(fences) % 2 == 0 and not _all_tagged(fences):
        return content
    # The original's own fences, and a pair around them all.
    if before and not prose and not _same(text, original):
        own = len(_fence.findall(original))
        if own and len(fences) == own + 2 and not original.lstrip().startswith(("```", "~~~")):
            return content
    return None


def _all_tagged(fences: list[re.Match[str]]) -> bool:
    """Whether every block of a series that stands side by side says its language."""
    return len(fences) > 2 and all(bool(fence[3]) == (n % 2 == 0) for n, fence in enumerate(fences))


def _same(a: str, b: str) -> bool:
    return a.lstrip("\r\n").rstrip() == b.lstrip("\r\n").rstrip()


def _without_language(code: str) -> str:
    """The code of a block on one line, without the name of its language."""
    word, space, rest = code.partition(" ")
    return rest.strip() if space and word.lower() in _LANGUAGES else code.strip()


def _before_lone_closer(text: str) -> str | None:
    """The code before a bare fence that nothing opened; None where it opens a block itself."""
    fences = list(_fence.finditer(text))
    if len(fences) != 1 or fences[0][3] or "```" in text.replace(fences[0][0], "", 1):
        return None
    code = text[: fences[0].start()].rstrip()
    if not code.strip():
        return None
    after = text[fences[0].end() :].strip()
    if not after:
        return code
    closes, opens = _looks_like_code(code), _looks_like_code(after)
    if closes == opens:  # who can say: nothing is lost
        return text
    return code if closes else None


def _looks_like_code(text: str) -> bool:
    return _code.search(text) is not None


def _repaired(text: str) -> str:
    """The text with fences on lines of their own, where they share one with code or words, and it
    makes a whole block of what is none."""
    blocks = fenced_blocks(text)
    if blocks and all(block.closed for block in blocks):
        return text
    steps = (
        (_opener_behind_words, lambda found: f"\n{found[1]}{found[2]}\n"),
        (_closer_before_words, lambda found: f"{found[1]}\n{found[2]}"),
        (_closer_behind_code, lambda found: f"\n{found[1]}"),
    )
    repaired = text
    for pattern, put in steps:
        repaired = pattern.sub(put, repaired)
        found = fenced_blocks(repaired)
        if len(found) == 1 and found[0].closed and found[0].content.strip():
            return repaired
    return text


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
    return Block(opening.start(), end, content, closing is not None)
