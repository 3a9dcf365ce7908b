"""The providers `anthropic` and `responses`, against servers of their protocols."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from typing import Any, ClassVar

import pytest
from aiohttp import web

from fabe_ds.providers import Endpoint
from fabe_ds.providers.anthropic import AnthropicProvider
from fabe_ds.providers.responses import ResponsesProvider
from fabe_ds.request import AnswerForm, Request, Sampling
from tests.conftest import wait_for
from tests.end_to_end.test_batch import BatchServer
from tests.support.protocols import AnthropicServer, ResponsesServer, events, failure, refused

SERVERS = {"anthropic": AnthropicServer, "responses": ResponsesServer}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


def run(name, server, *more):
    return [
        *("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", name),
        *("--model", "m", "--base-url", server.url, *more),
    ]


def records(box, count=4):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def codes(box):
    return [record["code"] for record in box.read("outputs/data.jsonl")]


@pytest.fixture(params=SERVERS)
def name(request):
    return request.param


@pytest.mark.parametrize("stream", ["off", "on"])
def test_records_are_answered(box, name, stream):
    with SERVERS[name]() as server:
        records(box)
        ended = box.fabe(*run(name, server, "--stream", stream, "--api-key", "k-1"))
        assert ended.code == 0, ended
        assert codes(box) == [f"X = {i}" for i in range(4)]
        assert all(bool(body.get("stream")) == (stream == "on") for body in server.bodies)
        report = box.report()
        assert (report["prompt_tokens"], report["cached_tokens"]) == (
            (400, 340) if name == "anthropic" else (400, 256)
        )
        before = len(server.bodies)
        # However an answer came, it is the same one.
        assert box.fabe(*run(name, server, "--stream", "auto")).code == 0
        assert len(server.bodies) == before


def test_the_body_is_what_the_reference_says(box, name):
    with SERVERS[name]() as server:
        records(box, 1)
        more = ["--system-prompt", "Be brief", "--max-new-tokens", 99, "--temperature", 0.5]
        more += ["--top-p", 0.9, "--service-tier", "auto"]
        assert box.fabe(*run(name, server, *more)).code == 0
        (body,) = server.bodies
        if name == "anthropic":
            assert body == {
                "model": "m",
                "max_tokens": 99,
                "system": "Be brief",
                "messages": [{"role": "user", "content": "Up\n\nx = 0"}],
                "temperature": 0.5,
                "top_p": 0.9,
                "service_tier": "auto",
            }
        else:
            assert body == {
                "model": "m",
                "max_output_tokens": 99,
                "input": [
                    {"role": "system", "content": "Be brief"},
                    {"role": "user", "content": "Up\n\nx = 0"},
                ],
                "temperature": 0.5,
                "top_p": 0.9,
                "store": False,
                "service_tier": "auto",
            }


@pytest.mark.parametrize(
    ("key", "header", "value"),
    [
        ("sk-ant-api03-x", "x-api-key", "sk-ant-api03-x"),
        ("sk-ant-oat01-x", "Authorization", "Bearer sk-ant-oat01-x"),
    ],
)
def test_anthropics_keys_go_in_their_own_header(box, key, header, value):
    with AnthropicServer() as server:
        records(box, 1)
        run_with = [*run("anthropic", server)]
        at = run_with.index("--base-url")
        del run_with[at : at + 2]
        # As their own clients have it: the address without the version.
        named = {"ANTHROPIC_API_KEY": key, "ANTHROPIC_BASE_URL": server.root}
        ended = box.fabe(*run_with, **named)
        assert ended.code == 0, ended
        (headers,) = server.headers
        assert headers[header] == value
        assert len({"x-api-key", "Authorization"} & set(headers)) == 1


ENDS = {
    "anthropic": {
        "truncated": {"stop_reason": "max_tokens"},
        "refused": {"stop_reason": "refusal", "content": []},
        "unfinished": {"stop_reason": "pause_turn"},
        "tool call": {"stop_reason": "tool_use"},
        "empty": {"content": []},
    },
    "responses": {
        "truncated": {
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
        },
        "refused": {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
        "refused by words": {
            "output": [{"type": "message", "content": [{"type": "refusal", "refusal": "I cannot"}]}]
        },
        "tool call": {
            "output": [
                {"type": "message", "content": [{"type": "output_text", "text": "Let me"}]},
                {"type": "function_call", "name": "f", "arguments": "{}"},
            ]
        },
        "empty": {"output": []},
    },
}


@pytest.mark.parametrize("stream", ["off", "on"])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in ENDS.items() for kind in kinds]
)
def test_no_end_but_a_whole_one_is_taken_for_one(box, name, kind, stream):
    with SERVERS[name](lambda body: ENDS[name][kind]) as server:
        records(box, 1)
        ended = box.fabe(*run(name, server, "--stream", stream, "--retry", 0))
        assert ended.code == 1, ended
        assert codes(box) == ["x = 0"]
        (found,) = box.report()["failures_by_kind"]
        assert found == kind.removesuffix(" by words")


def test_a_whole_answer_at_a_stop_sequence(box):
    with AnthropicServer(lambda body: {"stop_reason": "stop_sequence"}) as server:
        records(box, 1)
        assert box.fabe(*run("anthropic", server, "--stop", ";")).code == 0
        assert server.bodies[0]["stop_sequences"] == [";"]


@pytest.mark.parametrize("flags", [["--stop", ";"], ["--seed", "1"]])
def test_what_responses_do_not_take_is_refused(box, flags):
    with ResponsesServer() as server:
        records(box, 1)
        ended = box.fabe(*run("responses", server, *flags))
        assert ended.code == 2
        assert f"{flags[0]}: responses has no such parameter" in ended.err
        assert not server.bodies


BUSY = {
    "overloaded": failure(529, "overloaded_error", "Overloaded"),
    "overloaded, with another status": failure(500, "overloaded_error", "Overloaded"),
    "a limit": failure(429, "rate_limit_error", "too many requests"),
    "a fault": failure(500, "api_error", "Internal server error"),
}


def copied(response: web.Response) -> web.Response:
    return web.Response(status=response.status, body=response.body, content_type="application/json")


@pytest.mark.parametrize("case", BUSY)
def test_an_overloaded_server_is_asked_again(box, case):
    count = iter(range(100))
    with AnthropicServer(lambda body: copied(BUSY[case]) if next(count) < 2 else {}) as server:
        records(box)
        ended = box.fabe(*run("anthropic", server, "--concurrency", 2))
        assert ended.code == 0, ended
        assert 6 <= len(server.bodies) <= 9  # those of one moment


STOPS = {
    "an empty account": (
        failure(
            400,
            "invalid_request_error",
            "Your credit balance is too low to access the Anthropic API.",
        ),
        "quota",
    ),
    "a wrong key": (failure(401, "authentication_error", "invalid x-api-key"), "key"),
    "no such model": (failure(404, "not_found_error", "model: claude-x"), "model"),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_holds_for_all_stops_the_run_at_the_first(box, case):
    answer, said = STOPS[case]
    with AnthropicServer(lambda body: copied(answer)) as server:
        records(box, 40)
        ended = box.fabe(*run("anthropic", server))
        assert ended.code == 1
        assert said in ended.err
        assert len(server.bodies) == 1


def test_a_fault_in_a_stream_is_no_answer(box):
    class Broken(AnthropicServer):
        broken = 0

        def stream(self, message):
            parts = super().stream(message)
            if self.broken < 2:
                self.broken += 1
                fault = {"type": "overloaded_error", "message": "Overloaded"}
                # Once with an error behind it, once just cut.
                return [*parts[:4], *([{"type": "error", "error": fault}] * (self.broken % 2))]
            return parts

    with Broken() as server:
        records(box, 2)
        ended = box.fabe(*run("anthropic", server, "--stream", "on", "--concurrency", 1))
        assert ended.code == 0, ended
        assert codes(box) == ["X = 0", "X = 1"]
        assert len(server.bodies) == 4


class Streaming(AnthropicServer):
    """Streams these events, whatever is asked."""

    parts: ClassVar[list[dict[str, Any]]] = []

    def stream(self, message):
        return self.parts


class StreamingResponses(ResponsesServer):
    parts: ClassVar[list[dict[str, Any]]] = []

    async def responses(self, request):
        await self.taken(request)
        return await events(request, self.parts)


START = {"type": "message_start", "message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}
STOP = {"type": "message_stop"}
ENDED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}


def said(text, kind="content_block_delta"):
    part = {"type": "text_delta", "text": text}
    return {"type": kind, "index": 0, "delta" if "delta" in kind else "content_block": part}


def item(text, **more):
    part = {"type": "output_text", "text": text}
    return {"type": "message", "status": "completed", "content": [part], **more}


def ended(*items, kind="completed", **more):
    response = {"status": kind, "output": list(items), **more}
    return {"type": f"response.{kind}", "response": response}


# What comes, and the answer: a text, or the class of the failure.
STREAMS = {
    "a text at a block's start": (
        Streaming,
        [START, said("Hello ", "content_block_start"), said("you"), ENDED, STOP],
        "Hello you",
    ),
    "an end that is told twice": (
        Streaming,
        [
            START,
            said("half"),
            {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}},
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": None}},
            STOP,
        ],
        "truncated",
    ),
    "no end": (Streaming, [START, said("half"), STOP], "malformed"),
    "an end that is null": (
        Streaming,
        [START, said("half"), {"type": "message_delta", "delta": {"stop_reason": None}}, STOP],
        "malformed",
    ),
    "an error without a type": (
        Streaming,
        [START, said("hal"), {"type": "", "error": {"message": "died", "code": 500}}, ENDED, STOP],
        "server",
    ),
    "no start": (Streaming, [{"type": "message_start"}, said("x"), ENDED, STOP], "x"),
    "a delta that is a text": (
        Streaming,
        [START, {"type": "content_block_delta", "delta": "x"}, ENDED, STOP],
        "malformed",
    ),
    "a ping behind the end": (Streaming, [START, said("x"), ENDED, STOP, {"type": "ping"}], "x"),
    "items of their own, and an empty end": (
        StreamingResponses,
        [{"type": "response.output_item.done", "item": item("x")}, ended()],
        "x",
    ),
    "nothing but the end": (StreamingResponses, [ended(item("x"))], "x"),
    "nothing but a failure": (
        StreamingResponses,
        [ended(kind="failed", error={"code": "server_error", "message": "died"})],
        "server",
    ),
    "an error without a code": (
        StreamingResponses,
        [{"type": "error", "code": None, "message": "died"}],
        "server",
    ),
    "two ends": (
        StreamingResponses,
        [
            ended(
                item("half"), kind="incomplete", incomplete_details={"reason": "max_output_tokens"}
            ),
            ended(item("half")),
        ],
        "truncated",
    ),
    "an item that is not whole": (
        StreamingResponses,
        [ended(item("half", status="incomplete"))],
        "unfinished",
    ),
    "no state": (StreamingResponses, [ended(item("half"), status=None)], "malformed"),
    "parts that are none": (StreamingResponses, [ended(item("x", content=5))], "malformed"),
    "a search, and an answer": (
        StreamingResponses,
        [ended({"type": "web_search_call", "status": "completed"}, item("x"))],
        "x",
    ),
    "a comment, and an answer": (
        StreamingResponses,
        [ended(item("Let me see. ", phase="commentary"), item("x", phase="final_answer"))],
        "x",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_as_gateways_make_them(box, name):
    kind, parts, expected = STREAMS[name]
    with kind() as server:
        kind.parts = parts
        records(box, 1)
        provider = "anthropic" if kind is Streaming else "responses"
        ran = box.fabe(*run(provider, server, "--stream", "on", "--retry", 0))
        failures = box.report()["failures_by_kind"]
        assert ran.code == (1 if failures else 0), ran
        assert [*failures, *(() if failures else codes(box))] == [expected]


ODD = {
    "no end": ("anthropic", {"stop_reason": None}, "malformed"),
    "an end that is a number": ("anthropic", {"stop_reason": 3}, "malformed"),
    "content that is a text": ("anthropic", {"content": "x"}, "x"),
    "usage that is a list": ("anthropic", {"usage": [1]}, "X = 0"),
    "more tokens than there are": ("anthropic", {"usage": {"input_tokens": 1 << 63}}, "X = 0"),
    "content of a text": ("responses", {"output": [item("", content="x")]}, "x"),
    "probabilities that are none": (
        "responses",
        {"output": [item("", content=[{"type": "output_text", "text": "x", "logprobs": 5}])]},
        "malformed",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_answers_as_gateways_make_them(box, name):
    provider, given, expected = ODD[name]
    with SERVERS[provider](lambda body: given) as server:
        records(box, 1)
        ran = box.fabe(*run(provider, server, "--retry", 0))
        failures = box.report()["failures_by_kind"]
        assert ran.code == (1 if failures else 0), ran
        assert [*failures, *(() if failures else codes(box))] == [expected]


INVALID = "invalid_request_error"
# What a server says, the flags, and whether the run goes on without what it refuses.
REFUSED_FLAGS = {
    "a tier": ("anthropic", ["--service-tier", "flex"], "service_tier: Input should be 'auto'"),
    "a temperature while it reasons": (
        "anthropic",
        ["--thinking", "on", "--max-new-tokens", 4000, "--temperature", 0.7],
        "`temperature` may only be set to 1 when thinking is enabled or in adaptive mode.",
    ),
    "two ways to sample": (
        "anthropic",
        ["--temperature", 0.7, "--top-p", 0.9],
        "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
    ),
    "a blank stop": (
        "anthropic",
        ["--stop", " "],
        "stop_sequences: each stop sequence must contain non-whitespace",
    ),
    "no reasoning": (
        "anthropic",
        ["--thinking", "off"],
        '"thinking.type.disabled" is not supported for this model.',
    ),
}


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_what_was_asked_for_and_is_refused_stops_with_one_line(box, name):
    provider, flags, message = REFUSED_FLAGS[name]
    with SERVERS[provider](lambda body: failure(400, INVALID, message)) as server:
        records(box, 40)
        ran = box.fabe(*run(provider, server, *flags))
        assert ran.code == 1
        assert "the server does not take the parameter" in ran.err
        assert len([line for line in ran.err.splitlines() if line.startswith("fabe-ds:")]) == 1
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "message",
    [
        "This model does not support the effort parameter.",
        "thinking: Input tag 'adaptive' found using 'type' does not match any of the expected "
        "tags: 'disabled', 'enabled'",
        "Validation: thinking.type must be enabled or disabled",
    ],
)
def test_models_of_a_budget_are_known_by_what_they_say(box, message):
    def older(body):
        is_new = body["thinking"]["type"] == "adaptive"
        return failure(400, INVALID, message) if is_new else {}

    with AnthropicServer(older) as server:
        records(box)
        ran = box.fabe(*run("anthropic", server, "--thinking", "high", "--max-new-tokens", 4000))
        assert ran.code == 0, ran
        assert len(server.bodies) == 5


@pytest.mark.parametrize("parameter", ["reasoning.effort", "reasoning"])
def test_a_level_that_responses_do_not_take_stops_with_one_line(box, parameter):
    def answer(body):
        return refused("Unsupported value: 'none' is not supported with this model.", parameter)

    with ResponsesServer(answer) as server:
        records(box, 40)
        ran = box.fabe(*run("responses", server, "--thinking", "off"))
        assert ran.code == 1
        assert "the server does not take the parameter reasoning" in ran.err
        assert len(server.bodies) == 1


def test_more_cached_than_there_are_costs_no_less_than_nothing(box):
    usage = {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 99}, "output_tokens": 1}
    with ResponsesServer(lambda body: {"usage": usage}) as server:
        records(box)
        box.write("p.yaml", "m: {prompt: 10, cached: 1, completion: 100}\n")
        assert box.fabe(*run("responses", server, "--prices", "p.yaml")).code == 0
        assert box.report()["cost"] == pytest.approx(4 * (10 * 1 + 100) / 1e6)


def test_reasoning_is_told_apart(box, name):
    def thinking(body):
        if name == "responses":
            return {}
        text = body["messages"][-1]["content"].rsplit("\n\n", 1)[-1].upper()
        return {
            "content": [
                {"type": "thinking", "thinking": "I think.", "signature": "s"},
                {"type": "text", "text": text},
            ]
        }

    with SERVERS[name](thinking) as server:
        for stream in ("off", "on"):
            records(box)
            more = ["--reasoning-field", "why", "--stream", stream, "--no-resume"]
            assert box.fabe(*run(name, server, *more)).code == 0
            assert {record["why"] for record in box.read("outputs/data.jsonl")} == {"I think."}
            assert codes(box) == [f"X = {i}" for i in range(4)]


THINKING = {
    "anthropic": {
        "off": {"thinking": {"type": "disabled"}},
        "on": {"thinking": {"type": "adaptive"}},
        "low": {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    },
    "responses": {
        "off": {"reasoning": {"effort": "none"}},
        "on": {"reasoning": {"effort": "medium"}},
        "low": {"reasoning": {"effort": "low"}},
    },
}


@pytest.mark.parametrize("level", ["off", "on", "low"])
def test_thinking_is_told_in_their_words(box, name, level):
    with SERVERS[name]() as server:
        records(box, 1)
        ended = box.fabe(*run(name, server, "--thinking", level, "--max-new-tokens", 4000))
        assert ended.code == 0, ended
        expected = THINKING[name][level]
        assert {key: server.bodies[0].get(key) for key in expected} == expected
        if name == "anthropic":  # refused beside reasoning, unless it is 1
            assert ("temperature" in server.bodies[0]) == (level == "off")


def test_a_model_that_wants_a_budget_is_found_out_once(box):
    def older(body):
        if body["thinking"]["type"] == "adaptive":
            text = "adaptive thinking is not supported on this model"
            return failure(400, "invalid_request_error", text)
        return {}

    with AnthropicServer(older) as server:
        records(box)
        more = ["--thinking", "medium", "--max-new-tokens", 4000]
        ended = box.fabe(*run("anthropic", server, *more))
        assert ended.code == 0, ended
        kinds = [body["thinking"]["type"] for body in server.bodies]
        assert kinds == ["adaptive", *["enabled"] * 4]
        assert server.bodies[-1]["thinking"]["budget_tokens"] == 2000
        box.fabe(*run("anthropic", server, *more, "--no-resume"))
        assert [body["thinking"]["type"] for body in server.bodies[5:]] == ["enabled"] * 4
        short = ["--thinking", "medium", "--max-new-tokens", 1000]
        ended = box.fabe(*run("anthropic", server, *short, "--no-resume"))
        assert ended.code == 2
        assert "raise --max-new-tokens" in ended.err


def test_a_temperature_that_is_not_taken_is_left_out(box, name):
    def newer(body):
        if "temperature" not in body:
            return {}
        if name == "responses":
            text = "Unsupported parameter: 'temperature' is not supported with this model."
            return refused(text, "temperature")
        text = "`temperature` is deprecated for this model."
        return failure(400, "invalid_request_error", text)

    with SERVERS[name](newer) as server:
        records(box)
        ended = box.fabe(*run(name, server))
        assert ended.code == 0, ended
        assert len(server.bodies) == 5
        ended = box.fabe(*run(name, server, "--temperature", 0.5))
        assert ended.code == 1
        assert "temperature" in ended.err
        assert 6 <= len(server.bodies) <= 9  # those of one moment


@pytest.mark.parametrize("enforced", [True, False])
def test_a_schema_is_enforced_or_told(box, name, enforced):
    def answer(body):
        place = "output_config" if name == "anthropic" else "text"
        if place in body:
            assert body[place]["format"]["schema"] == SCHEMA
            if not enforced and name == "anthropic":
                text = "output_config.format: Extra inputs are not permitted"
                return failure(400, "invalid_request_error", text)
            if not enforced:
                return refused("Unsupported parameter: 'text.format'", "text.format")
        text = json.dumps({"a": "b"})
        if name == "anthropic":
            return {"content": [{"type": "text", "text": text}]}
        return {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}

    with SERVERS[name](answer) as server:
        records(box)
        box.write("s.json", json.dumps(SCHEMA))
        more = ["--response-format", "s.json", "--output-field", "a"]
        ended = box.fabe(*run(name, server, *more))
        assert ended.code == 0, ended
        assert [record["a"] for record in box.read("outputs/data.jsonl")] == ["b"] * 4
        assert len(server.bodies) == (4 if enforced else 5)
        told = json.dumps(server.bodies[-1]).count("follows this JSON schema")
        assert told == (0 if enforced else 1)


def test_anthropics_batches(box):
    with AnthropicServer() as server:
        seen: Counter[str] = Counter()

        def result(prompt: str) -> str:
            seen[prompt] += 1
            if prompt.endswith("= 3"):
                return "errored"
            return "expired" if prompt.endswith("= 5") and seen[prompt] == 1 else "succeeded"

        server.batch_result = result
        records(box, 8)
        ended = box.fabe(*run("anthropic", server, "--batch-api", "--batch-requests", 4))
        assert ended.code == 1, ended
        assert codes(box) == ["x = 3" if i == 3 else f"X = {i}" for i in range(8)]
        assert [len(asked) for asked, _ in server.batches.values()] == [4, 4, 1]
        (failure,) = box.read("outputs.failures.jsonl")
        assert (failure["record"], failure["message"]) == (3, "400: never")
        assert not server.bodies


def test_anthropics_batches_are_taken_up_listed_and_cancelled(box):
    with AnthropicServer() as server:
        server.batch_seconds = 60
        records(box, 4)
        command = run("anthropic", server, "--batch-api")
        process = box.start(*command)
        wait_for(lambda: bool(server.batches) and "msgbatch_0" in box_log(box))
        box.kill(process)
        listed = box.fabe("batch", "list", "--provider", "anthropic")
        assert listed.out.startswith("* msgbatch_0  in_progress  http://"), listed
        server.end("msgbatch_0")
        ended = box.fabe(*command)
        assert ended.code == 0, ended
        assert len(server.batches) == 1
        box.lines("data.jsonl", [{"code": "y = 1"}])
        process = box.start(*command)
        wait_for(lambda: len(server.batches) == 2 and "msgbatch_1" in box_log(box))
        cancelled = box.fabe("batch", "cancel", "--all", "--provider", "anthropic")
        assert "msgbatch_1  ended" in cancelled.out, cancelled
        process.communicate(timeout=60)


def box_log(box) -> str:
    """The names of the batches that are noted."""
    with contextlib.closing(sqlite3.connect(box.path / ".cache/records.sqlite")) as database:
        return str(database.execute("SELECT batch FROM batches").fetchall())


def test_responses_go_through_openais_batches(box):
    class Batched(BatchServer):
        def finish(self, name: str, end: str | None = None) -> None:
            results = []
            for line in self.requests(name):
                assert line["url"] == self.batches[name]["endpoint"] == "/v1/responses"
                text = line["body"]["input"][-1]["content"].rsplit("\n\n", 1)[-1].upper()
                part = {"type": "output_text", "text": text}
                output = [{"type": "message", "content": [part]}]
                body = {"status": "completed", "output": output}
                response = {"status_code": 200, "body": body}
                results.append({"custom_id": line["custom_id"], "response": response})
            lines = "".join(json.dumps(result) + "\n" for result in results)
            output_file = self.keep(lines.encode())
            self.batches[name] |= {"status": "completed", "output_file_id": output_file}

    with Batched() as server:
        records(box)
        ended = box.fabe(*run("responses", server, "--batch-api"))
        assert ended.code == 0, ended
        assert codes(box) == [f"X = {i}" for i in range(4)]


KEYS = {
    "anthropic": (AnthropicProvider(Endpoint("m", "http://h/v1")), AnswerForm()),
    "anthropic, schema": (AnthropicProvider(Endpoint("m", "http://h/v1")), AnswerForm(SCHEMA)),
    "responses": (ResponsesProvider(Endpoint("m", "http://h/v1")), AnswerForm()),
    "responses, thinking": (
        ResponsesProvider(Endpoint("m", "http://h/v1", thinking="low")),
        AnswerForm(),
    ),
}
PINNED = {
    "anthropic": "e074a411aaeed070",
    "anthropic, schema": "8ade9f45ae184feb",
    "responses": "37d506a929051f02",
    "responses, thinking": "c35c6d527178507c",
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_are_what_they_were(case):
    provider, form = KEYS[case]
    request = Request("x", "Up\n\nx", "S", Sampling(8), form=form)
    assert provider.key(request).hex()[:16] == PINNED[case]
