"""Messages from Anthropic's servers, and others that speak their protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fabe_ds.errors import MalformedResponse
from fabe_ds.providers.dialects import THINKING, anthropics_thinking
from fabe_ds.providers.forms import OUTPUT_CONFIG
from fabe_ds.providers.model_list import ListingProvider
from fabe_ds.providers.usage import messages_usage
from fabe_ds.request import Completion, Request
from fabe_ds.text import encodable

_about_thinking = r"effort|thinking\.type|adaptive thinking|'adaptive'"
_BUDGET = "thinking budget"  # learned of models that are told how many tokens to reason with


class AnthropicProvider(ListingProvider):
    """POST {base_url}/messages.

    Source: Anthropic API reference, "Messages", "Streaming Messages", "Extended thinking".
    """

    name = "anthropic"
    has_batches, batch_api, has_tiers = True, "messages", True
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
        return super().key_headers(key) if key.startswith("sk-ant-oat") else {"x-api-key": key}

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
        if sampling.is_sampling or thinking in (None, "off"):  # one that reasons takes no 0
            body["temperature"] = sampling.temperature if sampling.is_sampling else 0.0
        body |= {"top_p": sampling.top_p} if sampling.top_p is not None else {}
        body |= {"stop_sequences": list(sampling.stop)} if sampling.stop else {}
        body |= {THINKING: thinking} if thinking is not None else {}
        if request.form.schema is not None:
            body[OUTPUT_CONFIG] = {"format": {"type": "json_schema", "schema": request.form.schema}}
        return body

    def told_to_think(self, level: str, learned: Mapping[str, str]) -> dict[str, Any]:
        return anthropics_thinking(level, self.endpoint.max_new_tokens or 0, _BUDGET in learned)

    def refused(self, sent: Mapping[str, Any], parameter: str | None, message: str) -> str | None:
        if "thinking" in sent and re.search(_about_thinking, message):
            return "thinking"
        named = re.match(r"(\w+)(\.[\w.]+)?: ", message.removeprefix("Validation: "))
        optional = sent.keys() - {"model", "messages", "system"}
        return named[1] if named and named[1] in optional else None

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        if name == "thinking" and sent[name].get("type") == "adaptive":
            return _BUDGET, "true"
        drops = name == "temperature" and sent[name] == 0.0
        return (name, "") if drops else super().instead(name, sent, message)

    def completion(self, payload: Mapping[str, Any]) -> Completion:
        blocks, reason = payload.get("content"), payload.get("stop_reason")
        blocks = [{"text": blocks}] if isinstance(blocks, str) else blocks  # of some gateways
        if not isinstance(blocks, list) or not isinstance(reason, str):
            raise MalformedResponse("the answer has no content, or does not say how it ended")
        return Completion(
            _joined(blocks, "text"),
            reason,
            reasoning=_joined(blocks, "thinking") or None,
            logprobs=None,
            **messages_usage(payload.get("usage")).counts,
        )

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        usage: dict[str, Any] = {}
        whole: dict[str, Any] = {"content": [], "usage": usage}
        for chunk in chunks:
            if chunk.get("error"):
                return chunk
            message = chunk.get("message") or {}
            delta = chunk.get("delta") or chunk.get("content_block") or {}
            for name in ("text", "thinking"):
                if isinstance(delta.get(name), str):
                    whole["content"].append({name: delta[name]})
            if delta.get("stop_reason"):
                whole["stop_reason"] = delta["stop_reason"]
            counts = message.get("usage") or chunk.get("usage") or {}  # they come cumulated
            usage |= {name: count for name, count in counts.items() if count is not None}
        if not any(chunk.get("type") == "message_stop" for chunk in chunks):
            raise MalformedResponse("the stream broke off before its end")
        return whole


def _joined(blocks: Sequence[Any], kind: str) -> str:
    parts = (block.get(kind) for block in blocks if isinstance(block, Mapping))
    return encodable("".join(part for part in parts if isinstance(part, str)))
