"""The batch API against a server that speaks it (from OpenAI's published reference)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import wait_for
from tests.support.server import ModelServer, answer_to, openai_run


class BatchServer(ModelServer):
    """Takes files and batches; a batch is done after `seconds`."""

    def __init__(self, seconds: float = 0.3) -> None:
        super().__init__()
        self.seconds = seconds
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.answer: Callable[[str, int], dict[str, Any] | None] = lambda prompt, batch: None
        self.end = "completed"
        self.reason = "Enqueued token limit"
        self.expected = "/v1/chat/completions"

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/files", self.upload)
        app.router.add_post("/v1/batches", self.create)
        app.router.add_get("/v1/batches", self.list)
        app.router.add_get("/v1/batches/{id}", self.show)
        app.router.add_get("/v1/files/{id}/content", self.download)

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        assert form["purpose"] == "batch"
        file = form["file"]
        assert isinstance(file, web.FileField)
        assert file.filename.endswith(".jsonl")
        return web.json_response({"id": self.keep(file.file.read()), "object": "file"})

    def keep(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["completion_window"] == "24h"
        name = f"batch_{len(self.batches)}"
        state = {"id": name, "status": "in_progress", **body}
        self.batches[name] = state
        asyncio.get_running_loop().call_later(self.seconds, self.finish, name)
        return web.json_response(state)

    def requests(self, name: str) -> Iterator[dict[str, Any]]:
        for line in self.files[self.batches[name]["input_file_id"]].splitlines():
            yield json.loads(line)

    def finish(self, name: str) -> None:
        good, bad = [], []
        for line in reversed(list(self.requests(name))):
            assert line["url"] == self.batches[name]["endpoint"] == self.expected
            prompt = line["body"]["messages"][-1]["content"]
            response = self.answer(prompt, len(self.batches)) or {
                "status_code": 200,
                "body": {
                    "choices": [
                        {"message": {"content": answer_to(prompt)}, "finish_reason": "stop"}
                    ],
                    "usage": {"prompt_tokens": 2, "completion_tokens": 1},
                },
            }
            result = {"custom_id": line["custom_id"], "response": response, "error": None}
            (good if response["status_code"] == 200 else bad).append(result)
        state = self.batches[name]
        for key, lines in (("output_file_id", good), ("error_file_id", bad)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            state[key] = self.keep(text.encode()) if lines else None
        if self.end == "failed":
            state["errors"] = {"data": [{"code": "x", "message": self.reason}]}
        state["status"] = self.end

    async def list(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(self.batches.values())})

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(self.batches[request.match_info["id"]])

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])


@pytest.fixture
def batches():
    with BatchServer() as running:
        yield running


def command(server, *more):
    return openai_run(server, "--batch-api", *more)


def test_records_go_through_one_batch(box, batches):
    box.lines("data.jsonl", [{"code": f"x = {i % 40}"} for i in range(50)])
    ended = box.fabe(*command(batches))
    assert ended.code == 0, ended
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == [
        f"X = {i % 40}" for i in range(50)
    ]
    assert len(batches.batches) == 1
    assert len(list(batches.requests("batch_0"))) == 40
    assert not batches.calls
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(41)])
    assert box.fabe(*command(batches)).code == 0
    assert [len(list(batches.requests(name))) for name in batches.batches] == [40, 1]


def test_failed_lines_are_sent_again_and_refused_ones_are_not(box, batches):
    def answer(prompt, batch):
        if prompt.endswith("= 3") and batch == 1:
            return {"status_code": 500, "body": {"error": {"message": "oops"}}}
        if prompt.endswith("= 4"):
            return {"status_code": 400, "body": {"error": {"message": "never"}}}
        return None

    batches.answer = answer
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
    ended = box.fabe(*command(batches))
    assert ended.code == 1
    assert [len(list(batches.requests(name))) for name in batches.batches] == [10, 1]
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["message"]) == (4, "400: never")


@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_run_takes_its_batch_up_again(box, noted):
    with BatchServer(seconds=4) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
        process = box.start(*command(server))
        wait_for(lambda: len(server.batches) == 1)
        box.kill(process)
        if not noted:  # killed between the server's answer and our note of it
            import sqlite3

            database = sqlite3.connect(box.path / ".cache/records.sqlite")
            database.execute("UPDATE batches SET batch = NULL")
            database.commit()
            database.close()
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert len(server.batches) == 1
        assert [r["code"] for r in box.read("outputs/data.jsonl")] == [
            f"X = {i}" for i in range(10)
        ]


def test_a_batch_that_fails_stops_one_run_and_no_other(box, batches):
    batches.end, batches.reason = "failed", "the file is not valid"
    box.lines("data.jsonl", [{"code": "x"}])
    for _ in range(2):
        ended = box.fabe(*command(batches))
        assert ended.code == 1
        assert "the file is not valid" in ended.err
    batches.end = "completed"
    assert box.fabe(*command(batches)).code == 0
    assert len(batches.batches) == 3


def test_a_batch_left_by_a_killed_run_that_failed_blocks_nothing(box, batches):
    batches.end, batches.reason, batches.seconds = "failed", "the file is not valid", 60
    box.lines("data.jsonl", [{"code": "x"}])
    process = box.start(*command(batches))
    wait_for(lambda: len(batches.batches) == 1)
    box.kill(process)
    (state,) = batches.batches.values()
    batches.end, batches.seconds = "completed", 0.3
    state["status"], state["errors"] = "failed", {"data": [{"message": "not valid"}]}
    assert box.fabe(*command(batches)).code == 0
    assert len(batches.batches) == 2


def test_what_is_too_much_for_the_queue_is_sent_again(box, batches):
    batches.end, batches.reason = "failed", "Enqueued token limit reached for m"
    box.lines("data.jsonl", [{"code": "x"}])
    process = box.start(*command(batches))
    wait_for(lambda: len(batches.batches) == 2)
    batches.end = "completed"
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "sending it again in" in err
    assert box.read("outputs/data.jsonl")[0]["code"] == "X"


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("/openai/v1", "/v1/chat/completions"),
        ("/compatible-mode/v1", "/v1/chat/completions"),
        ("/api/paas/v4", "/v4/chat/completions"),
        ("/openai/deployments/d", "/chat/completions"),
    ],
)
def test_a_batch_names_the_version_and_what_follows(box, base, url):
    class Elsewhere(BatchServer):
        def routes(self, app: web.Application) -> None:
            super().routes(app)
            for route in list(app.router.routes()):
                path = route.resource.canonical if route.resource else ""
                if path.startswith("/v1") and route.method in ("GET", "POST"):
                    moved = path.replace("/v1", base, 1)
                    if moved != path:
                        app.router.add_route(route.method, moved, route.handler)

    with Elsewhere() as server:
        server.expected = url
        box.lines("data.jsonl", [{"code": "x"}])
        ended = box.fabe(*command(server, "--base-url", server.root + base))
        assert ended.code == 0, ended


def test_a_provider_without_a_batch_api_is_refused(box):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe(
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Up",
        "--provider",
        "ollama",
        "--model",
        "m",
        "--batch-api",
    )
    assert ended.code == 2
    assert "--batch-api" in ended.err
