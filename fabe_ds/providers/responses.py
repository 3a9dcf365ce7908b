"""OpenAI's Responses API, and servers that speak it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fabe_ds.errors import MalformedResponse, RecordFailed
from fabe_ds.providers.dialects import THINKING
from fabe_ds.providers.forms import TEXT_FORMAT, told_logprobs
from fabe_ds.providers.http import HttpProvider
from fabe_ds.providers.openai import OpenAIProvider, text_of
from fabe_ds.providers.usage import responses_usage
from fabe_ds.request import Completion, Request

LEAST_TOKENS = 16
_INCLUDE = "include"
_CALLS = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call")
"""Items that wait for who asked."""
_ENDED = ("response.completed", "response.incomplete", "response.failed")


class ResponsesProvider(OpenAIProvider):
    """POST {base_url}/responses. Nothing is stored at the server.

    Source: OpenAI API reference, "Responses" and "Streaming events".
    """

    name = "responses"
    lacks = ("stop", "seed")
    needs = "a server of OpenAI's Responses API (--base-url); a key as for openai"

    def path(self, request: Request) -> str:
        return "/responses"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "input": request.messages if request.chat else request.plain,
            "max_output_tokens": max(LEAST_TOKENS, sampling.max_new_tokens),
            "temperature": sampling.temperature if sampling.is_sampling else 0.0,
            "store": False,
        }
        if sampling.top_p is not None:
            body["top_p"] = sampling.top_p
        if self.endpoint.thinking is not None:
            body[THINKING] = self.endpoint.thinking
        if request.form.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": request.form.schema}
            body[TEXT_FORMAT] = {"format": {"type": "json_schema", **schema}}
        if request.form.logprobs:
            body[_INCLUDE] = ["message.output_text.logprobs"]
        return body

    def sent(self, body: Mapping[str, Any], learned: Mapping[str, str]) -> Mapping[str, Any]:
        return HttpProvider.sent(self, body, learned)

    def told_to_think(self, level: str, learned: Mapping[str, str]) -> dict[str, Any]:
        return {"reasoning": {"effort": {"off": "none", "on": "medium"}.get(level, level)}}

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        drops = name in (_INCLUDE, "store") or (name == "temperature" and sent[name] == 0.0)
        return (name, "") if drops else HttpProvider.instead(self, name, sent, message)

    def completion(self, payload: Mapping[str, Any]) -> Completion:
        output = payload.get("output")
        if not isinstance(output, list):
            raise MalformedResponse("the answer has no output")
        output = [item for item in output if isinstance(item, Mapping)]
        messages = [item for item in output if item.get("phase") != "commentary"]
        said = list(_parts(messages, "message", "content"))
        if refusal := "".join(str(part["refusal"]) for part in said if part.get("refusal")):
            raise RecordFailed("refused", f"the model refused: {refusal}")
        logprobs = [each for part in said for each in part.get("logprobs") or ()]
        return Completion(
            text_of(said),
            _reason(payload, output),
            reasoning=text_of(list(_parts(output, "reasoning", "summary", "content"))) or None,
            logprobs=told_logprobs(logprobs) if logprobs else None,
            **responses_usage(payload.get("usage")).counts,
        )

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        items = []
        for chunk in chunks:
            if chunk.get("type") == "response.output_item.done":
                items.append(chunk.get("item"))
            if chunk.get("type") == "error" or chunk.get("error"):
                return {"error": chunk.get("error") or chunk}
            if chunk.get("type") in _ENDED and isinstance(chunk.get("response"), Mapping):
                # Some gateways leave the last event's output empty.
                whole = dict(chunk["response"])
                return whole if whole.get("output") else {**whole, "output": items}
        raise MalformedResponse("the stream broke off before its end")


def _reason(payload: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> str:
    """How the answer ended, in a word of `finish.end_of`. Raises: MalformedResponse."""
    status, details = payload.get("status"), payload.get("incomplete_details")
    if isinstance(details, Mapping) and details.get("reason"):
        return str(details["reason"])
    if any(item.get("type") in _CALLS for item in items):
        return "tool_calls"
    if any(item.get("status") == "incomplete" for item in items):
        return "incomplete"
    if not isinstance(status, str):
        raise MalformedResponse("the answer does not say how it ended")
    return status


def _parts(
    items: Sequence[Mapping[str, Any]], kind: str, *keys: str
) -> Iterator[Mapping[str, Any]]:
    """The parts, below these keys, of the items of one kind."""
    for parts in (
        item.get(key) or () for item in items for key in keys if item.get("type") == kind
    ):
        parts = [{"text": parts}] if isinstance(parts, str) else parts
        yield from (part for part in parts if isinstance(part, Mapping))
