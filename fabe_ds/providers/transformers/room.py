"""Whether prompts and their answers fit into a local model's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.providers.base import Endpoint
from fabe_ds.request import Request

if TYPE_CHECKING:
    from fabe_ds.providers.transformers.chat import Chat

_MORE_BYTES = 512
"""What a chat template may put around a prompt, in bytes."""


@dataclass(frozen=True, slots=True)
class PromptRoom:
    """The room that a model has. `context`: the most tokens that a prompt and its answer may have
    together, None where no limit is known."""

    endpoint: Endpoint
    context: int | None

    def check(self) -> None:
        """Raises: UsageError where an answer alone may fill the model's context."""
        room, new = self.context, self.endpoint.max_new_tokens
        if room and new is not None and new >= room:
            raise UsageError(
                f"--max-new-tokens {new}: the context of {self.endpoint.model} is {room} tokens, "
                "prompt and answer together; take fewer"
            )

    def is_over(self, chat: Chat, request: Request) -> bool:
        """Whether a prompt is longer than the model takes. A token is a byte at least, so most
        prompts are known to fit without counting."""
        room, new = self.context, request.sampling.max_new_tokens
        if not room or len(request.plain.encode()) + _MORE_BYTES + new <= room:
            return False
        return self._over(chat.ids(request), request) > 0

    def _over(self, ids: list[int], request: Request) -> int:
        """By how many tokens a prompt is too long."""
        return len(ids) + request.sampling.max_new_tokens - self.context if self.context else 0

    def fitting(self, chat: Chat, request: Request) -> list[int]:
        """The prompt's tokens, cut where the settings say so. Raises: RecordFailed."""
        ids = chat.ids(request)
        if not ids:
            raise RecordFailed("prompt", "the prompt has no tokens")
        if self._over(ids, request) <= 0:
            return ids
        room, new = self.context or 0, request.sampling.max_new_tokens
        why = (
            f"the prompt has {len(ids)} tokens, which with {new} new ones (--max-new-tokens) is "
            f"more than the model's {room}"
        )
        if self.endpoint.on_long_prompt == "truncate-left":
            cut = chat.fitting(request, room - new)
            if cut is not None:
                return cut
            why += ", and cutting the value does not help"
        raise RecordFailed("context", why)
