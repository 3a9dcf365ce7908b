"""The tokens that a server counted, wherever it says so.

Sources: OpenAI API reference, "Usage" (`prompt_tokens_details`, `completion_tokens_details`);
DeepSeek (`prompt_cache_hit_tokens`); Moonshot (`cached_tokens`); SGLang (`reasoning_tokens`); xAI,
whose `completion_tokens` leave reasoning out; Gemini's layer for OpenAI's protocol, of which the
total alone holds it; Anthropic API reference, "Messages".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MOST = 1 << 40
"""No answer has as many tokens."""


class Usage(NamedTuple):
    """Tokens as they are billed: `cached` are a part of `prompt`, `reasoning` one of `completion`.
    None is what the server does not say."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    reasoning: int | None = None

    @property
    def counts(self) -> dict[str, int | None]:
        """As a completion has them."""
        return {f"{name}_tokens": count for name, count in self._asdict().items()}


def token_count(usage: Any, *path: str) -> int | None:
    """A count out of a server's usage report, which may lack it or hold nonsense."""
    for key in path:
        usage = usage.get(key) if isinstance(usage, Mapping) else None
    is_count = isinstance(usage, int) and not isinstance(usage, bool) and 0 <= usage < MOST
    return usage if is_count else None


def billed(
    prompt: int | None, completion: int | None, cached: int | None, reasoning: int | None
) -> Usage:
    """Counts put right: zeros throughout are what some gateways send who have not counted."""
    if not prompt and not completion:
        return Usage()
    if cached is not None and prompt is not None:
        cached = min(cached, prompt)
    return Usage(prompt, completion, cached, reasoning)


def usage_of(usage: Any) -> Usage:
    """The usage that comes with a chat completion."""
    prompt, completion = (
        token_count(usage, "prompt_tokens"),
        token_count(usage, "completion_tokens"),
    )
    cached = _first(
        token_count(usage, "prompt_tokens_details", "cached_tokens"),
        token_count(usage, "prompt_cache_hit_tokens"),
        token_count(usage, "cached_tokens"),
    )
    reasoning = _first(
        token_count(usage, "completion_tokens_details", "reasoning_tokens"),
        token_count(usage, "reasoning_tokens"),
    )
    whole = token_count(usage, "total_tokens") or 0
    if completion is not None and prompt is not None:
        if whole > prompt + completion:
            completion = whole - prompt
        elif reasoning is not None and reasoning > completion and whole != prompt + completion:
            completion += reasoning
    return billed(prompt, completion, cached, reasoning)


def messages_usage(usage: Any) -> Usage:
    """The usage of Anthropic's Messages: what was in a cache, or went into one, is counted apart
    from the rest of the prompt."""
    new, cached = token_count(usage, "input_tokens"), token_count(usage, "cache_read_input_tokens")
    written = token_count(usage, "cache_creation_input_tokens") or 0
    return billed(
        None if new is None else new + written + (cached or 0),
        token_count(usage, "output_tokens"),
        cached,
        token_count(usage, "output_tokens_details", "thinking_tokens"),
    )


def responses_usage(usage: Any) -> Usage:
    """The usage of OpenAI's Responses."""
    return billed(
        token_count(usage, "input_tokens"),
        token_count(usage, "output_tokens"),
        token_count(usage, "input_tokens_details", "cached_tokens"),
        token_count(usage, "output_tokens_details", "reasoning_tokens"),
    )


def _first(*counts: int | None) -> int | None:
    return next((count for count in counts if count is not None), None)
