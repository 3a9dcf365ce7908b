"""Answers of a local model as text, with their reasoning told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from fabe_ds.providers.transformers.stops import before_stop
from fabe_ds.providers.transformers.turns import Marks, Piece, special_ids
from fabe_ds.request import Completion, Request

if TYPE_CHECKING:
    from fabe_ds.providers.transformers.attention import Answer
    from fabe_ds.providers.transformers.chat import Chat


class AnswerReader:
    """Makes completions of the tokens that a model gave."""

    def __init__(self, chat: Chat, own_stops: tuple[str, ...]) -> None:
        """`own_stops`: the stop strings of the model's own settings."""
        self._chat, self._own_stops = chat, own_stops
        self._marks, self._specials = Marks.of(chat.added), special_ids(chat.added)

    def completion(self, request: Request, prompt: list[int], answer: Answer) -> Completion:
        """The answer as text, and its reasoning apart where the model writes its marks as special
        tokens, or the prompt has opened it."""
        text, reasoning = answer.text, None
        awaited = self._chat.awaited(prompt) if request.chat and self._chat.template else None
        closer = self._specials.get(awaited) if awaited else None
        if self._marks or closer is not None:
            pieces, thought = self._marks.split(answer.tokens, closer, self._decoded, request.text)
            if thought or text is None:
                reasoning = self._decoded(thought) if thought else None
                whole = "".join(self._joined(pieces))
                before = before_stop(whole, self.stops(request))
                text = whole if before is None else before
        if text is None:
            text = self._decoded(answer.tokens)
        if awaited is not None and closer is None:
            thoughts, found, rest = text.partition(awaited)
            text, reasoning = (rest.lstrip("\r\n"), thoughts) if found else ("", text)
        # The token that ended it was computed too.
        count = len(answer.tokens) + (answer.reason == "stop" and answer.text is None)
        return Completion(text, answer.reason, len(prompt), count, reasoning)

    def _joined(self, pieces: Sequence[Piece]) -> Iterator[str]:
        """The texts of an answer's tokens, and the marks between them."""
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if is_text:
                yield from (str(mark) for mark in group)
            else:
                yield self._decoded([piece for piece in group if isinstance(piece, int)])

    def stops(self, request: Request) -> tuple[str, ...]:
        """The stop strings of the user and those of the model's own settings."""
        return (*request.sampling.stop, *self._own_stops)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special ones."""
        return str(self._chat.tokenizer.decode(tokens, skip_special_tokens=True))
