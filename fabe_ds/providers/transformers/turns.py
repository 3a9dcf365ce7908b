"""Where a model's turn ends and which part of it is reasoning, in token ids.

Models that write these marks as special tokens lose them when an answer is decoded, so they are
looked for before. Sources: the chat templates and tokenizers of the families that
`fabe_ds.reasoning` names; https://github.com/openai/harmony for channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fabe_ds.reasoning import END_MARKS, PAIRS

_TAGS = [
    (f"<{prefix}{tag}>", f"</{prefix}{tag}>")
    for prefix in ("", "seed:", "mm:")
    for tag in ("think", "thinking", "reasoning", "thought")
]
_ALL_PAIRS = [*_TAGS, *PAIRS, ("<|channel>", "<channel|>")]
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_CHANNEL_ENDS = ("<|end|>", "<|start|>", "<|return|>", "<|call|>")
_WRITTEN = "add_generation_prompt"  # the part of a template that opens the model's turn


class AddedToken(NamedTuple):
    """A token that a tokenizer has beside its vocabulary; a special one is left out of text."""

    number: int
    special: bool


Added = Mapping[str, AddedToken]
"""A tokenizer's added tokens, by their text."""


def special_ids(added: Added) -> dict[str, int]:
    """The special tokens among added ones: their ids, by their text."""
    return {text: token.number for text, token in added.items() if token.special}


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """What finds any of these texts; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def split_controls(
    controls: re.Pattern[str], prompt: str, text: str, instruction: str | None
) -> tuple[set[str], set[str]]:
    """The control tokens that a plain prompt names: those that the user's own words name, and
    those that a record brings, as far as it can be told; one may be both.

    `text` is the record's value. `instruction` holds the user's own words; None takes all of the
    prompt but the value for them.
    """
    found = set(controls.findall(prompt))
    own = prompt.replace(text, "") if instruction is None else instruction
    meant = {name for name in found if name in own}
    return meant, {name for name in found if name not in meant or name in text}


def all_ends(known: Collection[int], added: Added, template: str | None) -> frozenset[int]:
    """The tokens that end an answer: those known of the model and of its tokenizer. Where the chat
    template writes none of these, so that the model was taught another, also those by which the
    template ends a turn."""
    special = special_ids(added)
    if not template or any(n in known and text in template for text, n in special.items()):
        return frozenset(known)
    ends = {special[text] for text in END_MARKS if text in special and text in template}
    return frozenset(known) | ends


def opens_reasoning(template: str | None) -> bool:
    """Whether a chat template opens the model's reasoning, so that the model only ends it."""
    written = (template or "").rpartition(_WRITTEN)[2]
    opener = "|".join(re.escape(opener) for opener, _ in _ALL_PAIRS)
    closer = "|".join(re.escape(closer) for _, closer in _ALL_PAIRS)
    return bool(re.search(rf"(?:{opener})(?!(?:\s|\\n)*(?:{closer}))", written))


def closer_awaited(prompt: str) -> str | None:
    """The mark that ends the reasoning which the end of a prompt has opened."""
    end = prompt.rstrip()
    return next((closer for opener, closer in _ALL_PAIRS if end.endswith(opener)), None)


Piece = int | str
"""A token of an answer, or a mark of reasoning that is part of its text."""


@dataclass(frozen=True)
class Marks:
    """The special tokens of one tokenizer that set reasoning apart, each with its text.

    `closers`: the closing token of each opening one. `channel`, `message` and `channel_ends` are
    those of OpenAI's harmony format; `channel` is None where the tokenizer has none.
    """

    closers: Mapping[int, int]
    texts: Mapping[int, str]
    channel: int | None = None
    message: int | None = None
    channel_ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, added: Added) -> Marks:
        special = special_ids(added)
        closers = {
            special[opener]: special[closer]
            for opener, closer in _ALL_PAIRS
            if opener in special and closer in special
        }
        texts = {number: text for text, number in special.items()}
        if _CHANNEL not in special or _MESSAGE not in special:
            return cls(closers, texts)
        ends = frozenset(special[text] for text in _CHANNEL_ENDS if text in special)
        return cls(closers, texts, special[_CHANNEL], special[_MESSAGE], ends)

    def __bool__(self) -> bool:
        return bool(self.closers) or self.channel is not None

    def split(
        self,
        tokens: Sequence[int],
        awaited: int | None,
        decode: Callable[[Sequence[int]], str],
        original: str,
    ) -> tuple[list[Piece], list[int]]:
        """An answer without its reasoning, and the tokens of the reasoning.

        `awaited`: the token that ends the reasoning which the prompt has opened. `decode` gives
        the text of tokens. A mark that `original` holds is part of the answer's text, and so is
        one that opens behind an answer and never closes.
        """
        if self.channel is not None and self.channel in tokens:
            return self._final_channel(tokens, decode)
        answer: list[Piece] = []
        thought: list[int] = []
        closing = set(self.closers.values())
        for place, token in enumerate(tokens):
            if awaited is not None:
                if token == awaited:
                    awaited = None
                else:
                    thought.append(token)
            elif token not in self.closers and token not in closing:
                answer.append(token)
            elif self._is_text(token, tokens[place:], decode, answer, original):
                answer.append(self.texts[token])
            elif token in closing:  # what the template has opened, in words of its own
                thought, answer = [*thought, *(t for t in answer if isinstance(t, int))], []
            else:
                awaited = self.closers[token]
        return answer, thought

    def _is_text(
        self,
        mark: int,
        rest: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        answer: list[Piece],
        original: str,
    ) -> bool:
        """Whether a mark with the tokens from it on belongs to the text of the answer before it."""
        kept = any(isinstance(piece, str) for piece in answer)
        if mark not in self.closers:
            return kept or self.texts[mark] in original
        if not kept and not decode([t for t in answer if isinstance(t, int)]).strip():
            return False
        return self.texts[mark] in original or self.closers[mark] not in rest

    def _final_channel(
        self, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]
    ) -> tuple[list[Piece], list[int]]:
        """What the last message of the channel named final holds, and what all others hold."""
        answer: list[int] = []
        thought: list[int] = []
        name: list[int] = []
        message: list[int] = []
        place = "text"
        for token in [*tokens, None]:  # None: the end of the last message
            if token is None or token == self.channel or token in self.channel_ends:
                if place == "message" and decode(name).strip().startswith("final"):
                    thought, answer = [*thought, *answer], message
                elif place == "message":
                    thought += message
                place = "text" if token is None or token in self.channel_ends else "name"
                name, message = [], []
            elif token == self.message:
                place = "message"
            elif place == "name":
                name.append(token)
            elif place == "message":
                message.append(token)
        return [*answer], thought
