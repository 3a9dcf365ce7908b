"""How many tokens prompts have, before anybody has counted them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fabe_ds.providers import Provider, Request

BYTES_A_TOKEN = 4
"""Of English, Chinese and code with today's vocabularies, about."""
COUNTED = 500
"""Prompts that a local model's own tokenizer counts; the others are told by their length."""
_VOCABULARY = "o200k_base"


class PromptTokens:
    """The tokens of requests, added up. `how` says what they were counted with."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self.requests = 0
        self._tokens = self._bytes = 0
        self._counted = self._counted_bytes = 0  # with the model's own tokenizer
        self.how = ""
        self._count_texts = _vocabulary()

    def add(self, requests: Sequence[Request]) -> None:
        """Counts requests."""
        self.requests += len(requests)
        if self._provider.is_local and self._counted < COUNTED:
            self._add_counted(requests[: COUNTED - self._counted])
        elif not self._provider.is_local and self._count_texts is not None:
            self.how = f"{_VOCABULARY}, by toktok"
            self._tokens += sum(self._count_texts([request.plain for request in requests]))
        self._bytes += sum(len(request.plain.encode()) for request in requests)

    def _add_counted(self, requests: Sequence[Request]) -> None:
        for request in requests:
            count = self._provider.prompt_tokens(request)
            if count is not None:
                self._counted += 1
                self._tokens += count
                self._counted_bytes += len(request.plain.encode())

    @property
    def total(self) -> int:
        """About how many there are."""
        if self._counted:
            self.how = "the model's own tokenizer"
            return math.ceil(self._tokens * self._bytes / max(1, self._counted_bytes))
        if self._tokens:
            return self._tokens
        self.how = f"{BYTES_A_TOKEN} bytes each; fabe-ds[prices] counts better"
        return math.ceil(self._bytes / BYTES_A_TOKEN)


def _vocabulary() -> Callable[[list[str]], list[int]] | None:
    """Counts texts by OpenAI's vocabulary; None where the package is not there."""
    try:
        import toktok  # type: ignore[import-untyped]
    except ImportError:
        return None
    return lambda texts: list(toktok.batch_count(texts, _VOCABULARY))
