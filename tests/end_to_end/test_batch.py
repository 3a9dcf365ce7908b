"""The batch API against a server that speaks it (from OpenAI's published reference)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from aiohttp import web

import fabe_ds
from fabe_ds.request import Request, Sampling
from tests.conftest import wait_for
from tests.support.server import ModelServer, answer_to, error, openai_run

FULL = {
    "code": "token_limit_exceeded",
    "message": "Enqueued token limit reached for m in organization org-1. Limit: 2,000,000 enqueued "
    "tokens. Please try again once some in_progress batches have been completed.",
    "line": None,
}


class BatchServer(ModelServer):
    """Takes files and batches; a batch is done after `seconds`.

    `queue` is how many requests may be on their way, all batches together. `ends` says how a batch
    ends, by its number, where it is otherwise than `end`: with a word, or a whole state.
    """

    def __init__(self, seconds: float = 0.3) -> None:
        super().__init__()
        self.seconds = seconds
        self.queue: int | None = None
        self.ends: dict[int, str | dict[str, Any]] = {}
        self.answered: Counter[str] = Counter()
        self.page = 100
        self.most_running = 0
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
        app.router.add_post("/v1/batches/{id}/cancel", self.cancel)
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
        total = self.files[body["input_file_id"]].count(b"\n")
        counts = {"total": total, "completed": 0, "failed": 0}
        state = {"id": name, "status": "in_progress", "request_counts": counts, **body}
        running = [other for other in self.batches.values() if other["status"] == "in_progress"]
        self.batches[name] = state
        queued = total + sum(other["request_counts"]["total"] for other in running)
        if self.queue is not None and queued > self.queue:
            state |= {"status": "failed", "errors": {"data": [FULL]}}
            return web.json_response(state)
        self.most_running = max(self.most_running, 1 + len(running))
        asyncio.get_running_loop().call_later(self.seconds, self.finish, name)
        return web.json_response(state)

    async def cancel(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if self.batches[name]["status"] == "in_progress":
            self.finish(name, "cancelled")
        return web.json_response(self.batches[name])

    def requests(self, name: str) -> Iterator[dict[str, Any]]:
        for line in self.files[self.batches[name]["input_file_id"]].splitlines():
            yield json.loads(line)

    def finish(self, name: str, end: str | None = None) -> None:
        state = self.batches.get(name, {})
        if state.get("status") != "in_progress":
            return
        given = end or self.ends.get(int(name.partition("_")[2]), self.end)
        if isinstance(given, dict):
            state |= given
            return
        good, bad = [], []
        lines = list(self.requests(name))
        unfinished = lines[len(lines) // 2 :] if given in ("expired", "cancelled") else []
        for line in unfinished:
            failure = {"code": f"batch_{given}", "message": "not in time"}
            bad.append({"custom_id": line["custom_id"], "response": None, "error": failure})
        for line in reversed(lines[: len(lines) - len(unfinished)]):
            assert line["url"] == self.batches[name]["endpoint"] == self.expected
            prompt = line["body"]["messages"][-1]["content"]
            self.answered[prompt] += 1
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
        for key, results in (("output_file_id", good), ("error_file_id", bad)):
            text = "".join(json.dumps(line) + "\n" for line in results)
            state[key] = self.keep(text.encode()) if results else None
        if given == "failed":
            state["errors"] = {"data": [{"code": "x", "message": self.reason}]}
        state["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        state["status"] = given

    async def list(self, request: web.Request) -> web.Response:
        states = list(reversed(self.batches.values()))
        if after := request.query.get("after"):
            states = states[[state["id"] for state in states].index(after) + 1 :]
        page = states[: min(self.page, int(request.query.get("limit", 20)))]
        more = len(states) > len(page)
        return web.json_response({"object": "list", "data": page, "has_more": more})

    async def show(self, request: web.Request) -> web.Response:
        state = self.batches.get(request.match_info["id"])
        return error(404, "No batch found") if state is None else web.json_response(state)

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


def many(box, count):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def codes(box):
    return [record["code"] for record in box.read("outputs/data.jsonl")]


def expected(count):
    return [f"X = {i}" for i in range(count)]


@pytest.mark.slow
def test_120_000_records_whatever_becomes_of_their_batches(box):
    with BatchServer(seconds=0.5) as server:
        # Two batches of 50,000 are too many at once; one is lost, one expires half done.
        server.queue = 60_000
        fault = {"status": "failed", "errors": {"data": [{"code": "x", "message": "our fault"}]}}
        server.ends = {2: fault, 4: "expired"}
        many(box, 120_000)
        ended = box.fabe(*command(server), timeout=250)
        assert ended.code == 0, ended
        assert codes(box) == expected(120_000)
        assert set(server.answered.values()) == {1}  # paid for once
        assert "our fault; sent again" in ended.err
        assert box.report()["requests"] > 120_000
        assert not box.report()["failures_by_kind"]


def test_several_batches_are_in_flight(box, batches):
    many(box, 100)
    batches.seconds = 1.0
    ended = box.fabe(*command(batches, "--batch-requests", 10, "--batches", 3))
    assert ended.code == 0, ended
    assert codes(box) == expected(100)
    assert len(batches.batches) == 10
    assert batches.most_running == 3


def test_a_queue_that_holds_less_than_a_batch_gets_smaller_ones(box, batches):
    many(box, 100)
    batches.queue = 30
    ended = box.fabe(*command(batches))
    assert ended.code == 0, ended
    assert codes(box) == expected(100)
    sizes = [state["request_counts"]["total"] for state in batches.batches.values()]
    assert sizes[:2] == [100, 50]
    assert set(sizes[-4:]) == {25}
    assert 2 <= ended.err.count("sending it again in") <= 3
    assert set(batches.answered.values()) == {1}


def test_a_line_that_a_batch_is_refused_for_fails_alone(box, batches):
    error = {"code": "invalid", "message": "line 3 is too long", "line": 3}
    batches.ends = {0: {"status": "failed", "errors": {"data": [error]}}}
    many(box, 10)
    ended = box.fabe(*command(batches))
    assert ended.code == 1
    assert codes(box) == [*expected(10)[:2], "x = 2", *expected(10)[3:]]
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["failure"]) == (2, "rejected")
    assert failure["message"] == "line 3 is too long"
    assert len(batches.batches) == 2


def test_batches_that_all_fail_stop_the_run(box, batches):
    batches.end, batches.reason = "failed", "no such model"
    many(box, 40)
    ended = box.fabe(*command(batches, "--batch-requests", 10))
    assert ended.code == 1
    assert "no such model" in ended.err
    assert len(batches.batches) == 4  # those in flight, and no more
    batches.end = "completed"
    assert box.fabe(*command(batches)).code == 0


PHASES = {
    "before it is sent": lambda server: bool(server.files),
    "while it runs": lambda server: len(server.batches) >= 2,
    "when some have ended": lambda server: len(server.batches) >= 4,
    "while answers are read": lambda server: server.reading,
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_costs_nothing(box, phase):
    class Slow(BatchServer):
        reading = False

        async def create(self, request: web.Request) -> web.Response:
            if phase == "before it is sent" and not self.batches:
                await asyncio.sleep(1)
            return await super().create(request)

        async def download(self, request: web.Request) -> web.StreamResponse:
            data = self.files[request.match_info["id"]]
            if phase != "while answers are read" or self.reading:
                return web.Response(body=data)
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            self.reading = True
            await asyncio.sleep(2)
            return response

    with Slow(seconds=1.5) as server:
        many(box, 3000)
        more = ("--batch-requests", 500, "--batches", 2)
        process = box.start(*command(server, *more))
        wait_for(lambda: PHASES[phase](server))
        box.kill(process)
        ended = box.fabe(*command(server, *more))
        assert ended.code == 0, ended
        assert codes(box) == expected(3000)
        assert set(server.answered.values()) == {1}


ODD_LINES = {
    "a page": b"<html>oops</html>\n",
    "half a line": b'{"custom_id": "ab',
    "a list": b"[1]\n",
    "null": b"null\n",
    "an unknown name": b'{"custom_id": "zz", "response": {"status_code": 200, "body": {}}}\n',
    "no name": b'{"custom_id": null, "response": {"status_code": 200, "body": {}}}\n',
    "a state that is none": b'{"custom_id": "'
    + b"0" * 64
    + b'", "response": {"status_code": "x"}}\n',
    "text in a row": b'{"custom_id": "' + b"0" * 64 + b'", "response": "x"}\n',
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_lines_that_cannot_be_read_are_no_answers_and_harm_no_others(box, name):
    class Odd(BatchServer):
        def keep(self, data: bytes) -> str:
            # Of the first batch's answers, one line is lost to nonsense.
            if len(self.batches) == 1 and b'"response"' in data:
                _, _, rest = data.partition(b"\n")
                data = rest + ODD_LINES[name] if name == "half a line" else ODD_LINES[name] + rest
            return super().keep(data)

    with Odd() as server:
        many(box, 6)
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert codes(box) == expected(6)
        assert len(server.batches) == 2
        assert len(list(server.requests("batch_1"))) == 1


def test_a_parameter_that_is_refused_is_learned_from_a_batch_too(box, batches):
    refusal = {
        "message": "Unsupported value: 'temperature' does not support 0",
        "param": "temperature",
    }
    body = {"error": {**refusal, "code": "unsupported_value", "type": "invalid_request_error"}}

    def answer(prompt, batch):
        return {"status_code": 400, "body": body} if batch == 1 else None

    batches.answer = answer
    many(box, 6)
    ended = box.fabe(*command(batches))
    assert ended.code == 0, ended
    assert codes(box) == expected(6)
    assert len(batches.batches) == 2
    assert all("temperature" not in line["body"] for line in batches.requests("batch_1"))
    assert ended.err.count("it takes no temperature") == 1
    many(box, 7)
    assert box.fabe(*command(batches)).code == 0
    assert all("temperature" not in line["body"] for line in batches.requests("batch_2"))
    ended = box.fabe(*command(batches, "--temperature", 0.5, "--seed", 1, "--no-resume"))
    assert ended.code == 0


def test_a_batch_that_the_server_has_forgotten_is_sent_again(box):
    with BatchServer(seconds=60) as server:
        many(box, 6)
        process = box.start(*command(server))
        wait_for(lambda: len(server.batches) == 1)
        box.kill(process)
        forgotten = server.batches.pop("batch_0")
        server.batches["batch_other"] = {**forgotten, "id": "batch_other", "metadata": {}}
        server.seconds = 0.2
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert codes(box) == expected(6)
        assert "is not there any more" in ended.err


@pytest.mark.parametrize("what", ["create", "upload", "show", "download"])
def test_a_hiccup_in_passing_costs_nothing(box, what):
    class Hiccup(BatchServer):
        hiccups = 0

        async def _handle(self, name: str, request: web.Request) -> web.StreamResponse:
            good: web.StreamResponse = await getattr(BatchServer, name)(self, request)
            if name != what or self.hiccups:
                return good
            self.hiccups += 1
            if what == "show":
                return web.Response(text="<html>", content_type="text/html")
            if what == "upload":
                return web.json_response({"object": "file"})
            if what == "download":  # the connection breaks half way
                response = web.StreamResponse(headers={"Content-Length": "100000"})
                await response.prepare(request)
                await response.write(b"{}\n")
                assert request.transport is not None
                request.transport.close()
                return response
            assert request.transport is not None
            request.transport.close()  # the batch is there, and nobody was told
            return good

        async def create(self, request):
            return await self._handle("create", request)

        async def upload(self, request):
            return await self._handle("upload", request)

        async def show(self, request):
            return await self._handle("show", request)

        async def download(self, request):
            return await self._handle("download", request)

    with Hiccup() as server:
        many(box, 6)
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert codes(box) == expected(6)
        assert len(server.batches) == 1
        assert server.hiccups == 1


def test_what_a_run_does_about_batches_leaves_those_of_others_alone(box):
    class Slow(BatchServer):
        async def create(self, request: web.Request) -> web.Response:
            if not self.batches:
                await asyncio.sleep(1.5)
            return await super().create(request)

    with Slow() as server:
        many(box, 3)
        (box.path / "data.jsonl").rename(box.path / "one.jsonl")
        box.lines("data.jsonl", [{"code": f"y = {i}"} for i in range(3)])
        first = [*command(server), "--output", "one"]
        first[first.index("data.jsonl")] = "one.jsonl"
        process = box.start(*first)
        wait_for(lambda: bool(server.files))
        other = box.start(*command(server))  # while the first one's batch has no name yet
        wait_for(lambda: len(server.batches) >= 1)
        box.kill(process)
        _, err = other.communicate(timeout=30)
        assert other.returncode == 0, err
        assert box.fabe(*first).code == 0
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("words", [["list"], ["cancel", "b"]])
def test_a_server_that_is_away_is_said_soon(box, words):
    ended = box.fabe("batch", *words, "--base-url", "http://127.0.0.1:9/v1", timeout=30)
    assert ended.code == 1
    assert "http://127.0.0.1:9/v1" in ended.err


def test_open_batches_of_other_data_hold_nothing_up(box):
    with BatchServer(seconds=60) as server:
        many(box, 10)
        process = box.start(*command(server))
        wait_for(lambda: len(server.batches) == 1)
        box.kill(process)
        server.seconds = 0.2
        box.lines("data.jsonl", [{"code": f"y = {i}"} for i in range(10)])
        ended = box.fabe(*command(server, "--batches", 1))
        assert ended.code == 0, ended
        assert codes(box) == [f"Y = {i}" for i in range(10)]
        assert server.batches["batch_0"]["status"] == "in_progress"
        # Nor are they lost.
        server.finish("batch_0")
        many(box, 10)
        assert box.fabe(*command(server)).code == 0
        assert len(server.batches) == 2


def test_batches_are_listed_and_cancelled(box):
    with BatchServer(seconds=60) as server:
        server.page = 2
        many(box, 40)
        process = box.start(*command(server, "--batch-requests", 10))
        wait_for(lambda: len(server.batches) == 4)
        listed = box.fabe("batch", "list")
        assert listed.code == 0, listed
        rows = listed.out.splitlines()
        assert len(rows) == 4
        assert rows[0].startswith("* batch_3  in_progress  0 of 10  http://")
        one = box.fabe("batch", "cancel", "batch_3")
        assert one.out == "batch_3  cancelled\n", one
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "batch batch_3 was cancelled" in err
        rest = box.fabe("batch", "cancel", "--all")
        assert rest.out.splitlines() == [f"batch_{n}  cancelled" for n in (2, 1, 0)], rest
        server.seconds = 0.2
        ended = box.fabe(*command(server, "--batch-requests", 10))
        # Those of the other three are told of first.
        assert ended.code == 1, ended
        ended = box.fabe(*command(server, "--batch-requests", 100, "--retry", 5))
        while ended.code and "was cancelled" in ended.err:
            ended = box.fabe(*command(server, "--batch-requests", 100))
        assert ended.code == 0, ended
        assert codes(box) == expected(40)
        assert set(server.answered.values()) == {1}
        assert box.fabe("batch", "list").code == 2  # none is open, and no server is named
        elsewhere = box.fabe("batch", "list", "--base-url", server.url)
        assert "  batch_0  cancelled  5 of 10" not in elsewhere.out
        assert elsewhere.out.count("batch_") == len(server.batches)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], "no batch is open"),
        (["cancel"], "name the batches"),
        (["cancel", "b1", "--all"], "name the batches"),
        (["cancel", "b1", "--base-url", "URL"], "b1: no such batch"),
        (["list", "--provider", "ollama", "--base-url", "URL"], "ollama has no batches"),
    ],
)
def test_mistakes_about_batches_are_one_line(box, batches, words, said):
    words = [batches.url if word == "URL" else word for word in words]
    ended = box.fabe("batch", *words)
    assert ended.code == 2, ended
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_window_goes_to_the_server_and_a_line_says_how_far_each_is(box):
    class Windowed(BatchServer):
        windows: ClassVar[list[str]] = []

        async def create(self, request: web.Request) -> web.Response:
            body = await request.json()
            self.windows.append(body["completion_window"])
            body["completion_window"] = "24h"

            async def changed() -> Any:
                return body

            request.json = changed  # type: ignore[method-assign]
            return await super().create(request)

        async def show(self, request: web.Request) -> web.Response:
            state = self.batches[request.match_info["id"]]
            if state["status"] == "in_progress":
                state["request_counts"]["completed"] += 1
            return await super().show(request)

    with Windowed(seconds=7) as server:
        many(box, 20)
        ended = box.fabe(*command(server, "--batch-requests", 10, "--batch-window", "72h"))
        assert ended.code == 0, ended
        assert server.windows == ["72h", "72h"]
        shown = re.search(r"2 batches: batch_0 (\d) of 10, batch_1 \d of 10", ended.err)
        assert shown, ended


def test_a_pass_that_was_left_is_taken_up_by_the_next_in_the_same_process(tmp_path):
    with BatchServer(seconds=2) as server:
        fn = fabe_ds.transform_fn(
            field="code",
            instruction="Up",
            provider="openai",
            model="m",
            base_url=server.url,
            cache_dir=str(tmp_path),
            batch_api=True,
        )
        asked = [Request(f"x = {i}", f"Up\n\nx = {i}", None, Sampling(128)) for i in range(5)]
        outcomes = fn.answers(iter(asked))

        def interrupt() -> None:
            wait_for(lambda: bool(server.batches))
            os.kill(os.getpid(), signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
        threading.Thread(target=interrupt).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                next(outcomes)
        finally:
            signal.signal(signal.SIGINT, before)
        outcomes.close()
        assert [outcome.text for outcome in fn.answers(iter(asked))] == expected(5)
        assert len(server.batches) == 1
        fn.close()
