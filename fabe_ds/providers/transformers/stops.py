"""Stop strings, looked for in what a local model has written so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_SPARE = 8  # tokens looked at beyond those that a stop string takes at most


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> frozenset[int]:
    """The stop strings that are one added token each, as ids: they end an answer as its own end
    does."""
    added = tokenizer.get_added_vocab() if stops else {}
    return frozenset(added[stop] for stop in stops if stop in added)


def stopper(tokenizer: Any, stops: Sequence[str]) -> Callable[[Sequence[int]], str | None] | None:
    """What gives, of new tokens, the text before the first stop string, and None where they hold
    none. Special tokens are looked at as text and left out of it. None without stop strings."""
    if not stops:
        return None
    tail = max(len(text.encode()) for text in stops) + _SPARE  # a token is a byte at least

    def stopped(tokens: Sequence[int]) -> str | None:
        end = tokenizer.decode(tokens[-tail:], skip_special_tokens=False)
        if not any(text in end for text in stops):
            return None
        return text_before(tokenizer, tokens, stops)

    return stopped


def text_before(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> str | None:
    """The text of tokens before the first of the stop strings, without special tokens; None where
    there is none of them."""
    text = before_stop(str(tokenizer.decode(tokens, skip_special_tokens=False)), stops)
    if text is None:
        return None
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special and number in tokens:
            text = text.replace(token.content, "")
    return text


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """A text up to the first of the stop strings; None where it holds none of them."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None
