"""Checks that compare an answer with the text that was asked about."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fabe_ds.errors import UsageError

LENGTHS = ("max-length-ratio", "min-length-ratio")
SAME_LANGUAGE = "same-language"
_SHOWN = 5
_FEW_LETTERS, _SURE = 20, 0.95
"""A language is told of texts with at least so many letters, and with at least this probability."""

_url = re.compile(r"(?:https?|ftp)://[^\s<>\"'`\])}]+")
_number = re.compile(r"\d+(?:[.,\u00a0\u202f']\d+)*")
_separator = re.compile(r"[.,\u00a0\u202f']")
_placeholder = re.compile(
    r"\{\{.*?\}\}|\$\{\w[^{}]*\}|%\(\w+\)[-+#0 ]*[\d.]*[a-zA-Z]"
    r"|%(?:\d+\$)?[-+#0]*\d*(?:\.\d+)?[sdifgxXcru@]"
    r"|\{\w*(?:[.:!][^{}\s]*)?\}|<[A-Z][A-Z_]+>|\[[A-Z][A-Z_]+\]"
)
_code = re.compile(r"```[^\n]*\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", re.DOTALL)


def _urls(text: str) -> Iterator[str]:
    return (found.rstrip(".,;:!?") for found in _url.findall(text))


def _placeholders(text: str) -> Iterator[str]:
    return iter(_placeholder.findall(text))


def _numbers(text: str) -> Iterator[str]:
    """The digits of each number: 1,000.5 and 1.000,5 are one number in two languages."""
    return (_separator.sub("", found) for found in _number.findall(text))


def _codes(text: str) -> Iterator[str]:
    return ((block or span).strip() for block, span in _code.findall(text))


_KINDS: dict[str, Callable[[str], Iterator[str]]] = {
    "urls": _urls,
    "placeholders": _placeholders,
    "numbers": _numbers,
    "code": _codes,
}

Compare = Callable[[str, str, Mapping[str, Any] | None], str | None]


def keeping_check(argument: str) -> Compare:
    """The check that an answer holds what the original holds of some kinds (`urls,numbers`), as
    often. Raises: UsageError."""
    names = [name.strip() for name in argument.split(",")]
    for name in names:
        if name not in _KINDS:
            raise UsageError(
                f"--validate keeps:{argument}: keeps what? name some of {', '.join(_KINDS)}"
            )

    def check(text: str, original: str, record: Mapping[str, Any] | None) -> str | None:
        missing: list[str] = []
        for name in names:
            lost = Counter(_KINDS[name](original)) - Counter(_KINDS[name](text))
            missing += lost.elements()
        if not missing:
            return None
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"lacking what the original holds: {', '.join(missing[:_SHOWN])}{more}"

    return check


def language_check() -> Compare:
    """The check that an answer is in the original's language, as far as py3langid is sure of both.

    Raises: UsageError where it is not installed.
    """
    try:
        from py3langid import rank
    except ImportError:
        raise UsageError(
            "--validate same-language needs py3langid: pip install 'fabe-ds[language]'"
        ) from None

    def language(text: str) -> str | None:
        if sum(map(str.isalpha, text)) < _FEW_LETTERS:
            return None
        ranked = rank(text)
        name, best = ranked[0]
        certainty = 1 / sum(math.exp(max(score - best, -700.0)) for _, score in ranked)
        return str(name) if certainty >= _SURE else None

    def check(text: str, original: str, record: Mapping[str, Any] | None) -> str | None:
        before, now = language(original), language(text)
        if before is None or now is None or before == now:
            return None
        return f"in another language ({now}) than the original ({before})"

    return check


def length_check(name: str, argument: str) -> Compare:
    """The check of an answer's length in characters, as a part of the original's. Raises:
    UsageError."""
    try:
        limit = float(argument)
    except ValueError:
        limit = -1.0
    if not 0 < limit < math.inf:
        raise UsageError(f"--validate {name}:{argument}: a number above 0, as in {name}:2")

    def check(text: str, original: str, record: Mapping[str, Any] | None) -> str | None:
        ratio = len(text.strip()) / max(1, len(original.strip()))
        if name == LENGTHS[0] and ratio > limit:
            return f"too long: {ratio:.1f} times the original, at most {limit:g} times is wanted"
        if name == LENGTHS[1] and ratio < limit:
            return f"too short: {ratio:.2f} of the original, at least {limit:g} is wanted"
        return None

    return check
