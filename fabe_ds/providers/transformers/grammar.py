"""Decoding that a JSON schema constrains: at each step, the tokens that an answer may go on with.

The masks are llguidance's, whose grammars follow the token vocabulary byte by byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

# Spaces as in what models have read most; free ones let small models run on in them.
_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,  # keywords that it does not know are checked in the answer
}


class Matcher:
    """How far one row's answer is in its grammar."""

    __slots__ = ("_matcher", "words")

    def __init__(self, matcher: Any, words: int) -> None:
        """`words`: of 32 bits in a mask, a bit for each token."""
        self._matcher, self.words = matcher, words

    def fresh(self) -> Matcher:
        """One at the beginning, for another row."""
        return Matcher(self._matcher.deep_copy(), self.words)

    @property
    def is_over(self) -> bool:
        """Whether the answer is whole: nothing may follow but its end."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        if not self.is_over:
            self._matcher.consume_token(token)

    def write_mask(self, bits: torch.Tensor) -> None:
        """Sets a bit for each token that may follow, in a row of 32-bit words."""
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * 4)


class Grammars:
    """Makes matchers for one model's tokens."""

    def __init__(self, tokenizer: Any, width: int, ends: Collection[int]) -> None:
        """`width`: of the model's scores. `ends`: tokens that end an answer.

        Raises: ValueError (a tokenizer whose tokens cannot be told byte by byte), ImportError.
        """
        import llguidance.hf

        self._tokens: Any = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=max(width, len(tokenizer)), eos_token=sorted(ends) or None
        )
        self._made: dict[str, Matcher] = {}

    def of(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher of JSON that follows the schema; what it cannot enforce is left to the check of
        the answer. Raises: ValueError."""
        from llguidance import LLMatcher

        written = json.dumps(schema)
        if written not in self._made:
            grammar = LLMatcher.grammar_from_json_schema(written, overrides=_OPTIONS)
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(matcher.get_error().partition("\n")[0])
            self._made[written] = Matcher(matcher, -(-self._tokens.vocab_size // 32))
        return self._made[written]


def constrained(scores: torch.Tensor, matchers: Sequence[Matcher | None]) -> torch.Tensor:
    """Scores [rows, vocabulary] with those of tokens that may not follow at minus infinity.

    `matchers`: one a row, None for a row that is free. The scores are changed in place.
    """
    held = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not held:
        return scores
    width = scores.shape[-1]
    words = max(matcher.words for matcher in matchers if matcher is not None)
    bits = torch.zeros(len(held), words, dtype=torch.int32)
    for place, row in enumerate(held):
        matcher = matchers[row]
        assert matcher is not None
        matcher.write_mask(bits[place])
    octets = bits.numpy().view(np.uint8)
    banned = np.unpackbits(octets, axis=1, count=width, bitorder="little") == 0
    mask = torch.from_numpy(banned).to(scores.device)
    rows = torch.tensor(held, device=scores.device)
    scores[rows] = scores[rows].masked_fill(mask, float("-inf"))
    return scores


class GrammarProcessor:
    """The same for transformers' generate: a logits processor of prompts that end at `start`."""

    def __init__(self, matchers: Sequence[Matcher | None], start: int) -> None:
        self._matchers, self._start = matchers, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self._start:
            for matcher, token in zip(self._matchers, ids[:, -1].tolist(), strict=True):
                if matcher is not None:
                    matcher.take(token)
        return constrained(scores.clone(), self._matchers)
