"""Chat completions from any server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fabe_ds.errors import MalformedResponse, RecordFailed
from fabe_ds.providers.dialects import THINKING
from fabe_ds.providers.forms import FORMAT, LOGPROBS, reasoning_in, told_logprobs
from fabe_ds.providers.http import STREAM
from fabe_ds.providers.model_list import ListingProvider
from fabe_ds.providers.usage import usage_of
from fabe_ds.request import Completion, Request
from fabe_ds.text import encodable

_STREAM_OPTIONS = "stream_options"  # without them, a stream tells no tokens
_LIMIT, _NEW_LIMIT = "max_tokens", "max_completion_tokens"
_AZURE = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")


class OpenAIProvider(ListingProvider):
    """POST {base_url}/chat/completions, or /completions where no chat template is wanted.

    Source: OpenAI API reference, "Create chat completion" and "Create completion"; Azure OpenAI
    REST API reference (the query behind the deployment's address, the header `api-key`).
    """

    name = "openai"
    has_batches = True
    has_tiers = True
    takes_forms = True
    needs = "an OpenAI-compatible server (--base-url); a key from --api-key or OPENAI_API_KEY"
    default_base_url: ClassVar[str] = "https://api.openai.com/v1"
    base_url_variables = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
    key_variable = "OPENAI_API_KEY"

    @property
    def _is_openai(self) -> bool:
        return self.base_url == self.default_base_url

    def path(self, request: Request) -> str:
        return "/chat/completions" if request.chat else "/completions"

    def key_headers(self, key: str) -> dict[str, str]:
        azure = self.address.host.endswith(_AZURE) or "api-version=" in self.address.parts.query
        if azure and not key.startswith("eyJ"):  # a token of Entra ID goes as everywhere
            return {"api-key": key}
        return super().key_headers(key)

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {"model": self.endpoint.model}
        if request.chat:
            body["messages"] = request.messages
        else:
            body["prompt"] = request.plain
        # OpenAI's reasoning models know the limit by its new name only, other servers by the old.
        # Where it turns out to be otherwise, `sent` renames it and the key stays.
        newer = self._is_openai and request.chat and self.endpoint.endpoint_name is None
        body[_NEW_LIMIT if newer else _LIMIT] = sampling.max_new_tokens
        body["temperature"] = sampling.temperature if sampling.is_sampling else 0.0
        leaves_temperature = self.endpoint.given_params.get("temperature", 0) is None
        if sampling.top_p is not None and (sampling.is_sampling or leaves_temperature):
            body["top_p"] = sampling.top_p
        if sampling.seed is not None:
            body["seed"] = sampling.seed + request.sample
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.endpoint.thinking is not None:
            body[THINKING] = self.endpoint.thinking
        if request.form.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": request.form.schema}
            body[FORMAT] = {"type": "json_schema", "json_schema": schema}
        if request.form.logprobs:
            body[LOGPROBS] = True if request.chat else 1
        return body

    def sent(self, body: Mapping[str, Any], learned: Mapping[str, str]) -> Mapping[str, Any]:
        renamed = dict(super().sent(body, learned))
        if self._is_openai and _LIMIT in renamed and "messages" in body and _LIMIT not in learned:
            renamed[_NEW_LIMIT] = renamed.pop(_LIMIT)
        stream = learned.get(STREAM, "false")
        if stream:  # some gateways stream where nothing is said
            renamed[STREAM] = stream == "true"
        if stream == "true" and learned.get(_STREAM_OPTIONS, "asked") and STREAM in renamed:
            renamed.setdefault(_STREAM_OPTIONS, {"include_usage": True})
        return renamed

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        if name == _LIMIT:
            return _LIMIT, _NEW_LIMIT
        if name == _NEW_LIMIT:
            return _NEW_LIMIT, _LIMIT
        if name == "temperature" and sent.get(name) == 0.0:
            return name, ""
        if name in (LOGPROBS, _STREAM_OPTIONS):
            return name, ""
        if name == STREAM:
            wanted = re.search(r"only|must|require|non-?stream|enable_thinking", message, re.I)
            return name, "true" if wanted and not sent.get(STREAM) else ""
        return super().instead(name, sent, message)

    def completion(self, payload: Mapping[str, Any]) -> Completion:
        choices = payload.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise MalformedResponse("the answer has no choices")
        choice = choices[0]
        message = choice.get("message", choice)
        if not isinstance(message, Mapping):
            raise MalformedResponse("the answer's choice has no message")
        if message.get("refusal"):
            raise RecordFailed("refused", f"the model refused: {message['refusal']}")
        content = message["text"] if "text" in message else message.get("content")
        # Moonshot puts the usage of a stream into its choice.
        usage = usage_of(payload.get("usage") or choice.get("usage"))
        reason = choice.get("finish_reason")
        return Completion(
            text_of(content),
            reason if isinstance(reason, str | None) else json.dumps(reason),
            reasoning=reasoning_in(message),
            logprobs=told_logprobs(choice.get("logprobs")),
            **usage.counts,
        )

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        texts: list[str] = []
        whole: dict[str, Any] = {}
        message: dict[str, Any] = {}
        reason: Any = None
        thoughts: list[str] = []
        logprobs: list[Any] = []
        for chunk in chunks:
            if chunk.get("error"):
                return chunk
            if chunk.get("usage"):
                whole["usage"] = chunk["usage"]
            choices = chunk.get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
                continue
            choice = choices[0]
            if choice.get("usage"):
                whole["usage"] = choice["usage"]
            if choice.get("error"):
                return chunk
            reason = choice.get("finish_reason") or reason
            part = choice.get("delta") or choice.get("message") or choice
            if isinstance(part, Mapping):
                texts.append(text_of(part["text"] if "text" in part else part.get("content")))
                thoughts.append(reasoning_in(part) or "")
                told = choice.get("logprobs")
                logprobs += (told.get("content") or []) if isinstance(told, Mapping) else []
                if part.get("refusal"):
                    message["refusal"] = message.get("refusal", "") + str(part["refusal"])
        if reason is None:
            raise MalformedResponse("the stream broke off before its end")
        content = encodable("".join(texts))  # a surrogate pair may come in two parts
        if thought := encodable("".join(thoughts)):
            message["reasoning"] = thought
        choice = {"message": {"content": content, **message}, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs}
        return {**whole, "choices": [choice]}


def text_of(content: Any) -> str:
    """The text of a message's content, which may be null or a list of parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
