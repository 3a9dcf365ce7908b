"""Chat completions from an Ollama server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fabe_ds import network
from fabe_ds.errors import MalformedResponse, RunStopped
from fabe_ds.providers.forms import LOGPROBS, reasoning_in, told_logprobs
from fabe_ds.providers.http import PREFLIGHT_SECONDS, HttpProvider
from fabe_ds.providers.usage import token_count
from fabe_ds.request import Completion, Request
from fabe_ds.text import encodable, listed

_PORT = 11434
_LONG_PROMPT, _CHARACTERS_A_TOKEN = 2000, 8.0
_run = re.compile(r"(\W)\1+")


class OllamaProvider(HttpProvider):
    """POST /api/chat, not streamed; /api/generate with `raw` where no chat template is wanted.

    Source: Ollama API reference, "Generate a chat completion" and "Generate a completion".
    """

    name = "ollama"
    takes_forms = True
    needs = "an Ollama server (--base-url, default http://localhost:11434)"
    default_base_url: ClassVar[str] = "http://localhost:11434"
    base_url_variables = ("OLLAMA_HOST",)

    @classmethod
    def base_url_of(cls, text: str) -> str:
        """OLLAMA_HOST as Ollama reads it: without a scheme the port is 11434, and the address that
        a server listens on everywhere is reached on this machine."""
        text = text.strip()
        if "://" not in text:
            host = text.partition("/")[0]
            if host.count(":") > 1 and not host.startswith("["):  # IPv6 without brackets
                text = f"[{host}]"
            elif host.startswith(":"):
                text = f"127.0.0.1{text}"
            text = f"http://{text}"
            parts = urlsplit(text)
            if parts.port is None:
                text = f"http://{parts.netloc}:{_PORT}{parts.path}"
        return text.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")

    def path(self, request: Request) -> str:
        return "/api/chat" if request.chat else "/api/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        options: dict[str, Any] = {
            "num_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature if sampling.is_sampling else 0.0,
        }
        if sampling.top_p is not None and sampling.is_sampling:
            options["top_p"] = sampling.top_p
        if sampling.seed is not None:
            options["seed"] = sampling.seed + request.sample
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        body: dict[str, Any] = {"model": self.endpoint.model, "stream": False, "options": options}
        if (level := self.endpoint.thinking) is not None:
            body["think"] = {"on": True, "off": False}.get(level, level)
        if request.form.schema is not None:
            body["format"] = request.form.schema
        if request.form.logprobs:
            body[LOGPROBS] = True
        if request.chat:
            # Without it a prompt that is too long loses its beginning, and nothing says so.
            return {**body, "messages": request.messages, "truncate": False}
        return {**body, "prompt": request.plain, "raw": True}

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        return (name, "") if name == LOGPROBS else super().instead(name, sent, message)

    def sent(self, body: Mapping[str, Any], learned: Mapping[str, str]) -> Mapping[str, Any]:
        # Without it an answer that outgrows the context pushes the prompt out, and goes on.
        renamed = super().sent(body, learned)
        return {**renamed, "shift": False}

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        texts, thoughts = [], []
        logprobs: list[Any] = []
        for chunk in chunks:
            if chunk.get("error"):
                return chunk
            message = chunk.get("message")
            thoughts.append(reasoning_in(message if isinstance(message, Mapping) else chunk) or "")
            logprobs += chunk.get(LOGPROBS) or []
            part = message.get("content") if isinstance(message, Mapping) else chunk.get("response")
            texts.append(part if isinstance(part, str) else "")
        if not chunks[-1].get("done"):
            raise MalformedResponse("the stream broke off before its end")
        whole = encodable("".join(texts))
        message = {"content": whole, "thinking": encodable("".join(thoughts))}
        more = {LOGPROBS: logprobs} if logprobs else {}
        return {**chunks[-1], **more, "message": message, "response": whole}

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
            reasoning_in(message if isinstance(message, Mapping) else payload),
            told_logprobs(payload.get(LOGPROBS)),
        )

    def lost_prompt(self, request: Request, completion: Completion) -> str | None:
        """Servers that do not know `truncate` and `shift` (before 0.12.6) cut the prompt and say
        nothing: what shows is that they counted far too few tokens for it."""
        count, text = completion.prompt_tokens, request.plain
        if not count or len(text) < _LONG_PROMPT:
            return None
        if len(_run.sub(r"\1", text)) < _CHARACTERS_A_TOKEN * count:
            return None
        return (
            f"the server read {count} tokens of a prompt of {len(text)} characters, so its "
            "context (num_ctx) is too small; raise OLLAMA_CONTEXT_LENGTH where it is started"
        )

    def preflight(self) -> None:
        import requests

        where = self.address
        try:
            answer = network.get(where.url("/api/tags"), self.headers(), PREFLIGHT_SECONDS)
            models = [model["name"] for model in answer.json()["models"]]
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            hint = (
                "no Ollama server answers there; start it with `ollama serve`, or give its "
                "--base-url"
            )
            raise self.unreachable(error, hint) from None
        except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
            hint = ""
            if where.parts.path.endswith("/v1"):
                hint = f"; --base-url {where.elsewhere()}, or --provider openai"
            raise RunStopped(f"{where}: answers, but not as an Ollama server does{hint}") from None
        wanted = self.endpoint.model
        known = {name.lower().removesuffix(":latest") for name in models}
        if wanted.lower().removesuffix(":latest") not in known:
            raise RunStopped(
                f"{where}: the model is not there; pull it with `ollama pull {wanted}`"
                + (f", or take one that is: {listed(models)}" if models else "")
            )
