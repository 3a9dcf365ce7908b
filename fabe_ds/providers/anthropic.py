"""Messages from Anthropic's servers, and others that speak their protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fabe_ds.errors import MalformedResponse
from fabe_ds.providers.dialects import THINKING, anthropics_thinking
from fabe_ds.providers.forms import OUTPUT_CONFIG
from fabe_ds.providers.model_list import ListingProvider
from fabe_ds.providers.usage import token_count
from fabe_ds.request import Completion, Request
from fabe_ds.text import encodable

_BUDGET = "thinking budget"  # learned of models that are told how many tokens to reason with


class AnthropicProvider(ListingProvider):
    """POST {base_url}/messages.

    Source: Anthropic API reference, "Messages", "Streaming Messages", "Extended thinking".
    """

    name = "anthropic"
    has_batches = has_tiers = True
    takes_forms = True
    lacks = ("seed",)
    needs = "a key from --api-key or ANTHROPIC_API_KEY"
    default_base_url: ClassVar[str] = "https://api.anthropic.com/v1"
    base_url_variables = ("ANTHROPIC_BASE_URL",)
    key_variable = "ANTHROPIC_API_KEY"

    @classmethod
    def base_url_of(cls, text: str) -> str:
        """Their own clients take the address without the version."""
        return f"{text.rstrip('/').removesuffix('/v1')}/v1"

    def path(self, request: Request) -> str:
        return "/messages"

    def key_headers(self, key: str) -> dict[str, str]:
        is_token = key.startswith("sk-ant-oat")  # of OAuth
        return super().key_headers(key) if is_token else {"x-api-key": key}

    def headers(self) -> dict[str, str]:
        return {"anthropic-version": "2023-06-01", **super().headers()}

    def body(self, request: Request) -> dict[str, Any]:
        sampling, thinking = request.sampling, self.endpoint.thinking
        turns = request.messages if request.chat else [{"role": "user", "content": request.plain}]
        system = [turn["content"] for turn in turns if turn["role"] == "system"]
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "max_tokens": sampling.max_new_tokens,
            "messages": [turn for turn in turns if turn["role"] != "system"],
        }
        body |= {"system": "\n\n".join(system)} if system else {}
        if thinking in (None, "off"):  # a model that reasons samples as it likes
            body["temperature"] = sampling.temperature if sampling.is_sampling else 0.0
            if sampling.top_p is not None and sampling.is_sampling:
                body["top_p"] = sampling.top_p
        body |= {"stop_sequences": list(sampling.stop)} if sampling.stop else {}
        body |= {THINKING: thinking} if thinking is not None else {}
        if request.form.schema is not None:
            body[OUTPUT_CONFIG] = {"format": {"type": "json_schema", "schema": request.form.schema}}
        return body

    def told_to_think(self, level: str, learned: Mapping[str, str]) -> dict[str, Any]:
        limit = self.endpoint.max_new_tokens or 0
        return anthropics_thinking(level, limit, bool(learned.get(_BUDGET)))

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        if name == "thinking" and sent[name].get("type") == "adaptive":
            return _BUDGET, "true"
        drops = name == "temperature" and sent[name] == 0.0
        return (name, "") if drops else super().instead(name, sent, message)

    def completion(self, payload: Mapping[str, Any]) -> Completion:
        blocks, usage = payload.get("content"), payload.get("usage")
        if not isinstance(blocks, list):
            raise MalformedResponse("the answer has no content")
        # What was in a cache, or went into one, is counted apart from the rest.
        cached = token_count(usage, "cache_read_input_tokens")
        written = token_count(usage, "cache_creation_input_tokens") or 0
        new, reason = token_count(usage, "input_tokens"), payload.get("stop_reason")
        return Completion(
            _joined(blocks, "text"),
            reason if isinstance(reason, str) else None,
            None if new is None else new + written + (cached or 0),
            token_count(usage, "output_tokens"),
            _joined(blocks, "thinking") or None,
            None,
            cached,
            token_count(usage, "output_tokens_details", "thinking_tokens"),
        )

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        whole: dict[str, Any] = {"content": []}
        for chunk in chunks:
            kind, delta = chunk.get("type"), chunk.get("delta") or {}
            if kind == "error":
                return chunk
            if kind == "message_start":
                whole["usage"] = dict(chunk["message"].get("usage") or {})
            elif kind == "content_block_delta":
                for name in ("text", "thinking"):
                    if isinstance(delta.get(name), str):
                        whole["content"].append({"type": name, name: delta[name]})
            elif kind == "message_delta":
                whole["stop_reason"] = delta.get("stop_reason")
                whole["usage"] = {**whole.get("usage", {}), **(chunk.get("usage") or {})}
        if chunks[-1].get("type") != "message_stop":
            raise MalformedResponse("the stream broke off before its end")
        return whole


def _joined(blocks: Sequence[Any], kind: str) -> str:
    parts = (block.get(kind) for block in blocks if isinstance(block, Mapping))
    return encodable("".join(part for part in parts if isinstance(part, str)))
