"""What changed between two texts: line by line, and word by word inside lines that changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Kind = Literal["same", "gone", "new"]
_WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\S\n]+|.|\n", re.DOTALL)
"""A word, a run of blanks, or one character: of Chinese, Japanese and Korean, each."""
MAX_WORDS = 4000
"""Words of two texts that are compared; more would take seconds."""
MIN_LIKENESS = 0.3
"""Share of words in common, from 0 to 1, below which marking the others says nothing."""


class Line(NamedTuple):
    """A line of one text or of both: its pieces, each with whether it changed inside the line."""

    kind: Kind
    pieces: list[tuple[bool, str]]


def diff_lines(before: str, after: str, in_place: bool = True) -> list[tuple[Kind, str]]:
    """Lines of both texts: (kind, line), the kind being same, gone or new. `in_place`: whether one
    takes the place of the other, or stands beside it."""
    lines = _by_lines(before, after, words=False) if in_place else answered_lines(before, after)
    return [(line.kind, "".join(text for _, text in line.pieces)) for line in lines]


def diff_words(before: str, after: str) -> list[Line]:
    """Lines of both texts; in those that changed, words that changed stand apart."""
    return list(_by_lines(before, after, words=True))


def answered_lines(text: str, answer: str) -> list[Line]:
    """The lines of a text, and below them those of an answer that goes into a field of its own:
    there is nothing in common to look for."""
    below: list[tuple[Kind, str]] = [("same", text), ("new", answer)]
    return [Line(kind, [(False, line)]) for kind, part in below for line in part.splitlines()]


def _by_lines(before: str, after: str, words: bool) -> Iterator[Line]:
    old, new = before.splitlines(), after.splitlines()
    # Not ndiff, which looks for likeness inside lines too: a minute for 1,500 of them.
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if what == "equal":
            yield from (Line("same", [(False, line)]) for line in old[a:b])
            continue
        gone, fresh = "\n".join(old[a:b]), "\n".join(new[c:d])
        marked = _marked(gone, fresh) if words and what == "replace" else None
        left, right = marked or ([(False, gone)], [(False, fresh)])
        if b > a:
            yield from (Line("gone", pieces) for pieces in _lines_of(left))
        if d > c:
            yield from (Line("new", pieces) for pieces in _lines_of(right))


_Pieces = list[tuple[bool, str]]


def _marked(gone: str, fresh: str) -> tuple[_Pieces, _Pieces] | None:
    """Both texts in pieces, with which of them changed; None where they have too little in
    common, or are too long."""
    old, new = _WORD.findall(gone), _WORD.findall(fresh)
    if len(old) + len(new) > MAX_WORDS:
        return None
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < MIN_LIKENESS:
        return None
    left: _Pieces = []
    right: _Pieces = []
    for what, a, b, c, d in matcher.get_opcodes():
        if b > a:
            left.append((what != "equal", "".join(old[a:b])))
        if d > c:
            right.append((what != "equal", "".join(new[c:d])))
    return left, right


def _lines_of(pieces: Sequence[tuple[bool, str]]) -> Iterator[_Pieces]:
    """The pieces line by line."""
    line: _Pieces = []
    for changed, text in pieces:
        first, *others = text.split("\n")
        if first:
            line.append((changed, first))
        for other in others:
            yield line or [(False, "")]
            line = [(changed, other)] if other else []
    yield line or [(False, "")]
