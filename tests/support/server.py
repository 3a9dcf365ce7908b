"""A model server over real sockets, which does what a test tells it to.

It speaks OpenAI's protocol (chat/completions, completions, models) and Ollama's (api/chat,
api/generate, api/tags), written from their published references. The answer to a prompt is a
function of it, so a test can tell what each record must become.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

Behaviour = Callable[["Call"], Awaitable[web.StreamResponse | None]]


@dataclass
class Call:
    """One request that reached the server."""

    number: int
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    request: web.Request = field(repr=False)

    @property
    def prompt(self) -> str:
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body["prompt"])


def answer_to(prompt: str) -> str:
    """What the server makes of a prompt: its last paragraph in capitals."""
    return prompt.rsplit("\n\n", 1)[-1].upper()


def openai_run(server: ModelServer, *more: Any) -> list[Any]:
    """The command line of a run over data.jsonl with the server's model."""
    where = () if "--base-url" in more else ("--base-url", server.url)
    return [
        *("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "openai"),
        *("--model", "m", *where, *more),
    ]


class Serving:
    """A server with an event loop in a thread of its own. `_start` calls `_listen`."""

    _runner: web.AppRunner

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _listen(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._port}"


class ModelServer(Serving):
    """Runs in a thread of its own. `behaviour` may answer in its own way, or return None."""

    def __init__(self, behaviour: Behaviour | None = None, latency: float = 0.0, port: int = 0):
        self.behaviour, self.latency = behaviour, latency
        self.calls: list[Call] = []
        self.in_flight = self.most_in_flight = 0
        self.models = ["m", "llama3:latest"]
        self.owner: str | None = None
        """Who the list of models says that it is of, as vLLM and others tell themselves apart."""
        self.key: str | None = None
        super().__init__(port)

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    @property
    def prompts(self) -> list[str]:
        return [call.prompt for call in self.calls]

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._list_openai)
        app.router.add_get("/api/tags", self._list_ollama)
        for path in ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"):
            app.router.add_post(path, self._complete)
        self.routes(app)
        await self._listen(app)

    def routes(self, app: web.Application) -> None:
        """More of a protocol, in a class of its own."""

    async def _list_openai(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return error(401, "Incorrect API key provided", code="invalid_api_key")
        owner = {"owned_by": self.owner} if self.owner else {}
        listed = [{"id": model, **owner} for model in self.models]
        return web.json_response({"object": "list", "data": listed})

    async def _list_ollama(self, _: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": name} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            body = await request.json()
            call = Call(len(self.calls), request.path, body, dict(request.headers), request)
            self.calls.append(call)
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return error(401, "Incorrect API key provided", code="invalid_api_key")
            if self.latency:
                await asyncio.sleep(self.latency)
            answer = await self.behaviour(call) if self.behaviour else None
            return answer or completion(call, answer_to(call.prompt))
        finally:
            self.in_flight -= 1


def completion(call: Call, text: str | None, reason: str = "stop", **extra: Any) -> web.Response:
    """A good answer in the protocol that was asked in."""
    asked, answered = len(call.prompt.split()), len((text or "").split())
    if call.path.startswith("/api/"):
        part = (
            {"message": {"role": "assistant", "content": text, **extra}}
            if call.path == "/api/chat"
            else {"response": text, **extra}
        )
        counts = {"prompt_eval_count": asked, "eval_count": answered}
        return web.json_response(
            {"model": call.body["model"], **part, "done": True, "done_reason": reason, **counts}
        )
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if call.path == "/v1/completions":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text, **extra}
    usage = {"prompt_tokens": asked, "completion_tokens": answered}
    return web.json_response({"id": "x", "choices": [choice], "usage": usage})


def error(
    status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    """An error as OpenAI's servers write it."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return web.Response(
        status=status, text=json.dumps(body), content_type="application/json", headers=headers
    )
