"""Chat completions from an Ollama server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import requests

from fabe_ds.errors import MalformedResponse, RunStopped
from fabe_ds.providers.base import Completion, HttpProvider, Request, token_count


class OllamaProvider(HttpProvider):
    """POST /api/chat, not streamed; /api/generate with `raw` where no chat template is wanted.

    Source: Ollama API reference, "Generate a chat completion" and "Generate a completion".
    """

    name = "ollama"
    needs = "an Ollama server (--base-url, default http://localhost:11434)"
    default_base_url: ClassVar[str] = "http://localhost:11434"

    def path(self, request: Request) -> str:
        return "/api/chat" if request.chat else "/api/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        options: dict[str, Any] = {
            "num_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature if sampling.samples else 0.0,
        }
        if sampling.top_p is not None and sampling.samples:
            options["top_p"] = sampling.top_p
        if sampling.seed is not None:
            options["seed"] = sampling.seed + request.sample
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        body: dict[str, Any] = {"model": self.endpoint.model, "stream": False, "options": options}
        if request.chat:
            # Without it a prompt that is too long loses its beginning, and nothing says so.
            return {**body, "messages": request.messages, "truncate": False}
        return {**body, "prompt": request.plain, "raw": True}

    def completion(self, payload: Mapping[str, Any]) -> Completion:
        message = payload.get("message")
        text = message.get("content") if isinstance(message, Mapping) else payload.get("response")
        if not isinstance(text, str):
            raise MalformedResponse("the answer has no message")
        if payload.get("done") is False:
            raise MalformedResponse("the answer is not done")
        reason = payload.get("done_reason")
        return Completion(
            text,
            reason if isinstance(reason, str) else None,
            token_count(payload, "prompt_eval_count"),
            token_count(payload, "eval_count"),
        )

    def preflight(self) -> None:
        self.refuse_open_key()
        where = self.identity()
        try:
            answer = requests.get(f"{self.base_url}/api/tags", headers=self.headers(), timeout=10)
            models = [model["name"] for model in answer.json()["models"]]
        except requests.exceptions.ConnectionError:
            raise RunStopped(
                f"{where}: no Ollama server answers there; start it with `ollama serve`, or give "
                "its --base-url"
            ) from None
        except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
            raise RunStopped(f"{where}: answers, but not as an Ollama server does") from None
        wanted = self.endpoint.model
        known = {name.lower().removesuffix(":latest") for name in models}
        if wanted.lower().removesuffix(":latest") not in known:
            raise RunStopped(
                f"{where}: the model is not there; pull it with `ollama pull {wanted}`"
            )
