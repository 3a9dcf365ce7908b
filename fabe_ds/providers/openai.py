"""Chat completions from any server that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import requests

from fabe_ds.errors import MalformedResponse, RecordFailed, RunStopped
from fabe_ds.providers.base import Completion, HttpProvider, Request, token_count


class OpenAIProvider(HttpProvider):
    """POST {base_url}/chat/completions, or /completions where no chat template is wanted.

    Source: OpenAI API reference, "Create chat completion" and "Create completion".
    """

    name = "openai"
    needs = "an OpenAI-compatible server (--base-url); a key from --api-key or OPENAI_API_KEY"
    default_base_url: ClassVar[str] = "https://api.openai.com/v1"

    def path(self, request: Request) -> str:
        return "/chat/completions" if request.chat else "/completions"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {"model": self.endpoint.model}
        if request.chat:
            body["messages"] = request.messages
        else:
            body["prompt"] = request.plain
        # OpenAI's reasoning models know the limit by its new name only, other servers by the old.
        newer = self.base_url == self.default_base_url and request.chat
        body["max_completion_tokens" if newer else "max_tokens"] = sampling.max_new_tokens
        body["temperature"] = sampling.temperature if sampling.samples else 0.0
        if sampling.top_p is not None and sampling.samples:
            body["top_p"] = sampling.top_p
        if sampling.seed is not None:
            body["seed"] = sampling.seed + request.sample
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return body

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
        usage = payload.get("usage")
        return Completion(
            _text(content),
            choice.get("finish_reason"),
            token_count(usage, "prompt_tokens"),
            token_count(usage, "completion_tokens"),
        )

    def preflight(self) -> None:
        self.refuse_open_key()
        try:
            answer = requests.get(
                f"{self.base_url}/models", headers=self.headers(), timeout=10, allow_redirects=False
            )
        except requests.exceptions.SSLError:
            raise RunStopped(
                f"{self.identity()}: the server's certificate is not accepted"
            ) from None
        except requests.exceptions.RequestException:
            raise RunStopped(
                f"{self.identity()}: no server answers there; start it, or give its --base-url"
            ) from None
        if answer.status_code in (401, 403):
            raise RunStopped(
                f"{self.identity()}: the key is not accepted ({answer.status_code}); give it with "
                "--api-key or OPENAI_API_KEY"
            )


def _text(content: Any) -> str:
    """The text of a message's content, which may be null or a list of parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
