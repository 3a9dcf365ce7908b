"""Servers of Anthropic's Messages and OpenAI's Responses, from their published references."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.support.server import Serving, answer_to

RESULTS = ("processing", "succeeded", "errored", "canceled", "expired")
Answer = Callable[[dict[str, Any]], dict[str, Any] | web.Response]


async def events(request: web.Request, parts: list[dict[str, Any]]) -> web.StreamResponse:
    """Server-sent events, named for their types."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        text = f"event: {part['type']}\ndata: {json.dumps(part)}\n\n"
        await response.write(text.encode())
    return response


class ProtocolServer(Serving):
    """`answer` makes the fields of an answer that differ from the usual one, or a whole one."""

    key_header = "Authorization"

    def __init__(self, answer: Answer = lambda body: {}) -> None:
        super().__init__()
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        self.routes(app)
        await self._listen(app)

    def routes(self, app: web.Application) -> None:
        raise NotImplementedError

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "type": "model"}], "has_more": False})

    async def taken(self, request: web.Request) -> dict[str, Any] | web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return self.answer(body)


def failure(status: int, kind: str, message: str) -> web.Response:
    """An error as Anthropic's servers write it."""
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return web.json_response(body, status=status)


class AnthropicServer(ProtocolServer):
    """POST /v1/messages. It takes what the reference lists, and refuses the rest."""

    KNOWN = frozenset(
        [
            "model",
            "max_tokens",
            "messages",
            "system",
            "temperature",
            "top_p",
            "top_k",
            "stop_sequences",
            "stream",
            "thinking",
            "output_config",
            "service_tier",
            "metadata",
            "tools",
            "tool_choice",
        ]
    )

    batch_seconds = 0.3

    def __init__(self, answer: Answer = lambda body: {}) -> None:
        super().__init__(answer)
        self.batches: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        self.batch_result: Callable[[str], str] = lambda prompt: "succeeded"

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/messages", self.messages)
        app.router.add_post("/v1/messages/batches", self.create)
        app.router.add_get("/v1/messages/batches", self.list)
        app.router.add_get("/v1/messages/batches/{id}", self.show)
        app.router.add_post("/v1/messages/batches/{id}/cancel", self.cancel)
        app.router.add_get("/results/{id}", self.results)

    async def create(self, request: web.Request) -> web.Response:
        asked = (await request.json())["requests"]
        for each in asked:
            assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", each["custom_id"])
            assert not each["params"].get("stream")
        name = f"msgbatch_{len(self.batches)}"
        state: dict[str, Any] = {
            "id": name,
            "type": "message_batch",
            "processing_status": "in_progress",
            "request_counts": dict.fromkeys(RESULTS, 0) | {"processing": len(asked)},
            "cancel_initiated_at": None,
            "results_url": None,
        }
        self.batches[name] = (asked, state)
        asyncio.get_running_loop().call_later(self.batch_seconds, self.end, name)
        return web.json_response(state)

    def end(self, name: str) -> None:
        state = self.batches[name][1]
        state |= {"processing_status": "ended", "results_url": f"{self.root}/results/{name}"}

    async def cancel(self, request: web.Request) -> web.Response:
        state = self.batches[request.match_info["id"]][1]
        state["cancel_initiated_at"] = "2026-01-01T00:00:00Z"
        self.end(state["id"])
        return web.json_response(state)

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(self.batches[request.match_info["id"]][1])

    async def list(self, _: web.Request) -> web.Response:
        states = [state for _, state in reversed(self.batches.values())]
        return web.json_response({"data": states, "has_more": False, "last_id": None})

    async def results(self, request: web.Request) -> web.Response:
        lines = []
        for each in reversed(self.batches[request.match_info["id"]][0]):
            prompt = each["params"]["messages"][-1]["content"]
            kind = self.batch_result(prompt)
            result: dict[str, Any] = {"type": kind}
            if kind == "succeeded":
                result["message"] = self.message(each["params"], {})
            elif kind == "errored":
                error = {"type": "invalid_request_error", "message": "never"}
                result["error"] = {"type": "error", "error": error, "request_id": None}
            lines.append(json.dumps({"custom_id": each["custom_id"], "result": result}) + "\n")
        return web.Response(text="".join(lines))

    async def messages(self, request: web.Request) -> web.StreamResponse:
        given = await self.taken(request)
        body = self.bodies[-1]
        assert request.headers["anthropic-version"] == "2023-06-01"
        if unknown := set(body) - self.KNOWN:
            text = f"{min(unknown)}: Extra inputs are not permitted"
            return failure(400, "invalid_request_error", text)
        assert {turn["role"] for turn in body["messages"]} <= {"user", "assistant"}
        if isinstance(given, web.Response):
            return given
        message = self.message(body, given)
        if not body.get("stream"):
            return web.json_response(message)
        return await events(request, list(self.stream(message)))

    def message(self, body: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        text = answer_to(body["messages"][-1]["content"])
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 10,
                "cache_creation_input_tokens": 5,
                "cache_read_input_tokens": 85,
                "output_tokens": 7,
            },
            **given,
        }

    def stream(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """The message as events; its usage comes cumulated."""
        usage = {**message["usage"], "output_tokens": 1}
        parts: list[dict[str, Any]] = [
            {"type": "message_start", "message": {**message, "content": [], "usage": usage}},
            {"type": "ping"},
        ]
        for index, block in enumerate(message["content"]):
            kind = block["type"]
            parts.append({"type": "content_block_start", "index": index, "content_block": {}})
            for half in (block[kind][:2], block[kind][2:]):
                delta = {"type": f"{kind}_delta", kind: half}
                parts.append({"type": "content_block_delta", "index": index, "delta": delta})
            parts.append({"type": "content_block_stop", "index": index})
        end = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        counted = {"output_tokens": message["usage"]["output_tokens"]}
        parts.append({"type": "message_delta", "delta": end, "usage": counted})
        return [*parts, {"type": "message_stop"}]


class ResponsesServer(ProtocolServer):
    """POST /v1/responses."""

    KNOWN = frozenset(
        [
            "model",
            "input",
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_p",
            "reasoning",
            "text",
            "store",
            "stream",
            "service_tier",
            "include",
            "top_logprobs",
            "metadata",
            "truncation",
        ]
    )

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/responses", self.responses)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        given = await self.taken(request)
        body = self.bodies[-1]
        if unknown := set(body) - self.KNOWN:
            return refused(f"Unknown parameter: '{min(unknown)}'.", min(unknown))
        if body["max_output_tokens"] < 16:
            return refused("Expected a value >= 16.", "max_output_tokens")
        if isinstance(given, web.Response):
            return given
        asked = body["input"]
        text = answer_to(asked if isinstance(asked, str) else asked[-1]["content"])
        part = {"type": "output_text", "text": text, "annotations": []}
        answer = {
            "id": "resp_1",
            "object": "response",
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I think."}]},
                {"type": "message", "role": "assistant", "content": [part]},
            ],
            "usage": {
                "input_tokens": 100,
                "input_tokens_details": {"cached_tokens": 64},
                "output_tokens": 20,
                "output_tokens_details": {"reasoning_tokens": 12},
            },
            **given,
        }
        if not body.get("stream"):
            return web.json_response(answer)
        parts = [
            {"type": "response.created", "response": {**answer, "output": []}},
            {"type": "response.output_text.delta", "delta": text[:2]},
            {"type": "response.output_text.delta", "delta": text[2:]},
            {"type": f"response.{answer['status']}", "response": answer},
        ]
        return await events(request, parts)


def refused(message: str, parameter: str) -> web.Response:
    """An error as OpenAI's servers write it."""
    error = {"message": message, "type": "invalid_request_error", "param": parameter}
    return web.json_response({"error": {**error, "code": "unknown_parameter"}}, status=400)
