"""Servers as people have them, over real sockets: one table of what each does to a run.

The names are those under which the reports behind them were collected (A: servers, X: shorter
ones); a sibling that nobody reported stands beside each.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from tests.support.server import Call, ModelServer, answer_to, completion, error, openai_run

Behave = Callable[[Call], Awaitable[web.StreamResponse | None]]


def records(box, count: int = 3) -> None:
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def command(server: ModelServer, *more: Any) -> list[Any]:
    return openai_run(server, "--retry", 1, *more)


def answers(box) -> list[str]:
    return [record["code"] for record in box.read("outputs/data.jsonl")]


def plain(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> Behave:
    text = body if isinstance(body, str) else json.dumps(body)

    async def behave(call: Call) -> web.StreamResponse:
        return web.Response(text=text, status=status, content_type=kind, headers=headers)

    return behave


def choice(content: str | None, reason: Any, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": reason, **more}]}


def ends(reason: Any, **more: Any) -> Behave:
    return plain(choice("def f():\n    retur", reason, **more))


@dataclass
class Case:
    """`behave` answers the record `x = 1` of three (with `always`: every one), at every try.

    `kind`: that record fails so, the others are rewritten. `says` stands in its message, or with
    `stops`, in the one line that the run ends with. `tries`: requests for it, at most.
    """

    behave: Behave
    kind: str = ""
    says: str = ""
    stops: bool = False
    always: bool = False
    tries: int = 1


ENDS = {
    "error in the choice": Case(
        ends("error", error={"code": 502, "message": "upstream"}), "server", "upstream", tries=3
    ),
    "error": Case(ends("error"), "server", "finish reason error", tries=2),
    "A1 DeepSeek": Case(ends("insufficient_system_resource"), "server", tries=2),
    "Zhipu's network": Case(ends("network_error"), "server", tries=2),
    "vLLM's abort": Case(ends("abort"), "server", tries=2),
    "Gemini MAX_TOKENS": Case(ends("MAX_TOKENS"), "truncated"),
    "Anthropic's max_tokens": Case(ends("max_tokens"), "truncated"),
    "Mistral's model_length": Case(ends("model_length"), "truncated", "context"),
    "LM Studio": Case(ends("maxPredictedTokensReached"), "truncated"),
    "Gemini SAFETY": Case(ends("SAFETY"), "refused"),
    "Gemini RECITATION": Case(ends("RECITATION"), "refused"),
    "Zhipu's sensitive": Case(ends("sensitive"), "refused"),
    "a filter and its reason": Case(ends("content_filter: PROHIBITED"), "refused"),
    "Bedrock": Case(ends("guardrail_intervened"), "refused"),
    "a tool call": Case(ends("tool_calls"), "tool call"),
    "unknown": Case(ends("paused_turn"), "unfinished", "'paused_turn'"),
    "an object": Case(ends({"type": "odd"}), "unfinished", "odd"),
}
GOOD_ENDS = ["stop", "STOP", "end_turn", "eos", "eos_token", "stop_sequence", "COMPLETE", None]

MODERATED = {"reasons": ["violence"], "flagged_input": "x"}
REFUSALS = {
    "a firewall's page": Case(
        plain("<!DOCTYPE html><title>Attention Required!</title>", 403, "text/html"), "refused"
    ),
    "OpenRouter's moderation": Case(
        plain({"error": {"code": 403, "message": "Input was flagged", "metadata": MODERATED}}, 403),
        "refused",
        "Input was flagged",
    ),
    "403 after others": Case(plain({"error": "no"}, 403), "refused", "took the key for others"),
    "DashScope": Case(
        plain({"error": {"code": "data_inspection_failed", "message": "bad"}}, 400), "refused"
    ),
    "Azure": Case(
        plain({"error": {"code": "content_filter", "message": "policy"}}, 400), "refused"
    ),
    "A2 Zhipu": Case(plain({"error": {"code": "1301", "message": "敏感"}}, 400), "refused"),
    "A2 DeepSeek": Case(
        plain({"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}, 400),
        "refused",
    ),
    "context, SGLang": Case(
        plain({"object": "error", "message": "is longer than the model's context length"}, 400),
        "context",
    ),
    "context, DashScope": Case(
        plain({"error": {"message": "Range of input length should be [1, 3]"}}, 400), "context"
    ),
    "context, TGI": Case(
        plain({"error": "`inputs` must have less than 9 tokens", "error_type": "validation"}, 422),
        "context",
    ),
}
STOPS = {
    "403 for all": Case(
        plain({"error": "no"}, 403), "key", "the key is not accepted", stops=True, always=True
    ),
    "MiniMax's empty account": Case(
        plain({"error": {"http_code": "429", "message": "insufficient balance (1008)"}}, 429),
        says="the quota is used up",
        stops=True,
        always=True,
    ),
    "Moonshot": Case(
        plain({"error": {"message": "x", "type": "exceeded_current_quota_error"}}, 429),
        says="the quota is used up",
        stops=True,
        always=True,
    ),
    "A4 Zhipu": Case(
        plain({"error": {"message": "x", "code": "1113"}}, 429),
        says="the quota is used up",
        stops=True,
        always=True,
    ),
    "insufficient_quota at the first": Case(
        plain({"error": {"message": "x", "code": "insufficient_quota"}}, 429),
        says="the quota is used up",
        stops=True,
        always=True,
    ),
    "Anthropic": Case(
        plain({"error": {"message": "Your credit balance is too low"}}, 400),
        says="the quota is used up",
        stops=True,
        always=True,
    ),
    "LM Studio's 200": Case(
        plain({"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
        says="does --base-url end in /v1",
        stops=True,
        always=True,
    ),
    "MiniMax's 200": Case(
        plain({"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no balance"}}),
        says="no balance",
        stops=True,
        always=True,
    ),
    "a flat 200": Case(
        plain({"code": 20012, "message": "Model does not exist", "data": None}),
        says="the model is not there",
        stops=True,
        always=True,
    ),
    "the region": Case(
        plain({"error": {"code": "unsupported_country_region_territory", "message": "x"}}, 403),
        says="does not serve this place",
        stops=True,
        always=True,
    ),
}
FAILS = {
    "boom": Case(
        plain({"object": "error", "message": "boom", "code": 40303}), "server", "boom", tries=2
    ),
    "a code in quotes": Case(
        plain({"error": {"code": "429", "message": "slow"}}), "rate", "slow", tries=2
    ),
    "base_resp": Case(
        plain({"choices": None, "base_resp": {"status_code": 1000, "status_msg": "odd"}}),
        "server",
        "odd",
        tries=2,
    ),
}
CASES = ENDS | REFUSALS | STOPS | FAILS


@pytest.mark.parametrize("name", CASES)
def test_case(box, name):
    case = CASES[name]

    async def behave(call: Call) -> web.StreamResponse | None:
        if case.always or call.prompt.endswith("= 1"):
            return await case.behave(call)
        return None

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*command(server))
        tries = sum(call.prompt.endswith("= 1") for call in server.calls)
        asked = len(server.calls)
    assert ended.code == 1, ended
    if case.stops:
        assert case.says in ended.err
        assert ended.err.count("\n") == 1
        assert asked <= (3 if case.kind == "key" else 1)
        assert not (box.path / "outputs").exists()
        return
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["failure"]) == (1, case.kind)
    assert case.says in failure["message"]
    assert answers(box) == ["X = 0", "x = 1", "X = 2"]
    assert tries <= case.tries


def test_a_record_that_is_refused_is_no_key_in_the_next_run_either(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        return error(403, "Forbidden") if call.prompt.endswith("= 1") else None

    with ModelServer(behave) as server:
        records(box)
        for _ in range(2):
            ended = box.fabe(*command(server))
            assert (ended.code, ended.err) == (1, "")
            assert answers(box) == ["X = 0", "x = 1", "X = 2"]


def test_a_surrogate_pair_in_two_parts_of_a_stream(box):
    parts = events(delta(content="y \ud83d"), delta(content="\ude00"), delta("stop"))
    with ModelServer(plain(parts, kind="text/event-stream")) as server:
        records(box)
        assert box.fabe(*command(server)).code == 0
    assert answers(box) == ["y \U0001f600"] * 3


@pytest.mark.parametrize("reason", GOOD_ENDS)
def test_a_good_end_is_a_whole_answer(box, reason):
    with ModelServer(plain(choice("y", reason))) as server:
        records(box)
        assert box.fabe(*command(server)).code == 0
    assert answers(box) == ["y"] * 3


def test_an_unknown_end_that_is_good_is_said_once_and_nothing_is_paid_again(box):
    with ModelServer(plain(choice("y", "fin"))) as server:
        records(box)
        ended = box.fabe(*command(server))
        assert (ended.code, "--good-end fin" in ended.out) == (1, True)
        assert box.fabe(*command(server, "--good-end", "fin")).code == 0
        assert len(server.calls) == 3
    assert answers(box) == ["y"] * 3


def test_all_refused_from_some_time_on_stops_the_run(box):
    """A key that is taken back in the middle is no fault of 200,000 records."""

    async def behave(call: Call) -> web.StreamResponse | None:
        return error(403, "no") if call.number >= 30 else None

    with ModelServer(behave) as server:
        records(box, 200)
        ended = box.fabe(*command(server))
        assert ended.code == 1
        assert "is the key still good" in ended.err
        assert len(server.calls) <= 30 + 20 + 8


@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}),
        (503, {"error": "Model m is currently loading", "estimated_time": 20.0}),
    ],
    ids=["llama.cpp", "hf"],
)
def test_a_model_that_is_loading_is_waited_for(box, count, status, body):
    started = time.monotonic()

    async def behave(call: Call) -> web.StreamResponse | None:
        loading = time.monotonic() - started < 5
        return await plain(body, status)(call) if loading else None

    with ModelServer(behave) as server:
        records(box, count)
        started = time.monotonic()
        ended = box.fabe(*command(server), "--retry", 0)
        assert ended.code == 0, ended
        assert "loading" in ended.err
        assert len(server.calls) <= count + 12
    assert answers(box) == [f"X = {i}" for i in range(count)]


def test_a_server_that_refuses_everything_stays_the_servers_fault(box):
    with ModelServer(plain({"error": "overloaded"}, 503)) as server:
        records(box, 25)
        ended = box.fabe(*command(server, "--give-up-after", 3))
        assert ended.code == 1
        assert "refuses all for" in ended.err
        assert "--offline" in ended.err
        assert len(server.calls) < 60


def test_a_quota_of_a_minute_is_waited_for(box):
    limited = {
        "error": {
            "message": "Allocated quota exceeded, please increase your quota limit.",
            "type": "insufficient_quota",
            "code": "insufficient_quota",
        }
    }

    async def behave(call: Call) -> web.StreamResponse | None:
        return await plain(limited, 429)(call) if call.number == 4 else None

    with ModelServer(behave) as server:
        records(box, 10)
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) == 11


def events(*parts: Any, done: bool = True) -> str:
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return "".join([*lines, *(["data: [DONE]\n\n"] if done else [])])


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": reason}]}


STREAMS = {
    "where stream is not said": events(delta(content="y = 1"), delta("stop")),
    "an answer with an end behind it": json.dumps(choice("y = 1", "stop")) + "\n\ndata: [DONE]\n\n",
    "comments, roles and usage": ": keep-alive\n\n"
    + events(
        delta(role="assistant", content=""),
        delta(content="y ="),
        delta(content=" 1"),
        delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    ),
    "one whole message in an event": events(choice("y = 1", "stop")),
    "windows line ends": events(delta(content="y = 1"), delta("stop")).replace("\n", "\r\n"),
    "without an end": events(delta(content="y = 1"), delta("stop"), done=False),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_nobody_asked_for_is_read(box, name):
    with ModelServer(plain(STREAMS[name], kind="text/event-stream")) as server:
        records(box)
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert len(server.calls) == 3
        assert all(call.body["stream"] is False for call in server.calls)
    assert answers(box) == ["y = 1"] * 3


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (events(delta(content="y ="), done=False), "malformed"),
        (events(delta(content="y ="), {"error": {"code": 502, "message": "gone"}}), "server"),
        (events(delta(content="y"), delta("length")), "truncated"),
    ],
    ids=["cut", "an error inside", "at the limit"],
)
def test_half_a_stream_is_no_answer(box, body, kind):
    with ModelServer(plain(body, kind="text/event-stream")) as server:
        records(box, 1)
        assert box.fabe(*command(server)).code == 1
    (failure,) = box.read("outputs.failures.jsonl")
    assert failure["failure"] == kind
    assert box.read("outputs/data.jsonl") == [{"code": "x = 0"}]


def test_ollamas_json_lines_are_read(box):
    lines = [
        {"message": {"content": "y ="}, "done": False},
        {"message": {"content": " 1"}, "done": True, "done_reason": "stop", "eval_count": 2},
    ]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    with ModelServer(plain(body, kind="application/x-ndjson")) as server:
        records(box)
        run = command(server, "--provider", "ollama", "--base-url", server.root)
        assert box.fabe(*run, "--model", "llama3").code == 0
        assert all(call.body["shift"] is False for call in server.calls)
    assert answers(box) == ["y = 1"] * 3


def test_a_model_that_has_to_stream_is_streamed(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if call.body.get("stream"):
            text = answer_to(call.prompt)
            return await plain(events(delta(content=text), delta("stop")))(call)
        message = "parameter.enable_thinking must be set to false for non-streaming calls"
        return error(400, message, code="invalid_parameter_error")

    with ModelServer(behave) as server:
        records(box, 20)
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert ended.err.count("it wants to stream") == 1
        assert len(server.calls) == 21
    assert answers(box) == [f"X = {i}" for i in range(20)]


@pytest.mark.parametrize("status", [504, 524])
def test_a_proxy_that_cuts_answers_is_not_a_server_that_is_gone(box, status):
    async def behave(call: Call) -> web.StreamResponse:
        await asyncio.sleep(1.2)
        return await plain("<html>Time-out</html>", status, "text/html")(call)

    with ModelServer(behave) as server:
        records(box, 3)
        ended = box.fabe(*command(server, "--give-up-after", 20, "--retry", 3))
        assert ended.code == 1, ended
        assert len(server.calls) == 6  # the model runs in vain twice a record, not four times
    failures = box.read("outputs.failures.jsonl")
    assert [failure["failure"] for failure in failures] == ["proxy"] * 3
    assert "fewer --max-new-tokens, or --stream" in failures[0]["message"]


def test_a_stream_is_asked_for_where_a_proxy_cuts_silent_answers(box):
    """A6: learned from the first answer that is cut, and remembered."""

    async def behave(call: Call) -> web.StreamResponse | None:
        if call.body["stream"]:
            assert call.body["stream_options"] == {"include_usage": True}
            return await plain(events(delta(content=answer_to(call.prompt)), delta("stop")))(call)
        await asyncio.sleep(1.2)
        return await plain("<html>Time-out</html>", 524, "text/html")(call)

    with ModelServer(behave) as server:
        records(box, 3)
        ended = box.fabe(*command(server, "--concurrency", 1))
        assert ended.code == 0, ended
        assert ended.err.count("it wants to stream") == 1
        assert len(server.calls) == 4
        box.lines("data.jsonl", [{"code": "more"}])
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) == 5
        box.lines("data.jsonl", [{"code": "off"}])
        assert box.fabe(*command(server, "--stream", "off", "--retry", 0)).code == 1


def test_the_usage_of_a_stream_is_asked_for_where_the_server_tells_it(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if "stream_options" in call.body:
            return error(400, "Unrecognized request argument supplied: stream_options")
        return await plain(events(delta(content=answer_to(call.prompt)), delta("stop")))(call)

    with ModelServer(behave) as server:
        records(box, 3)
        assert box.fabe(*command(server, "--stream", "--concurrency", 1)).code == 0
        assert len(server.calls) == 4


def test_a_long_stream_is_no_timeout_but_a_silence_is(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(call.request)
        for part in ("a", "b", "c", "d"):
            await response.write(events(delta(content=part)).encode())
            await asyncio.sleep(0.6 if "slow" not in call.prompt else 2.5)
        await response.write(events(delta("stop")).encode())
        return response

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": "x"}, {"code": "slow"}])
        ended = box.fabe(*command(server, "--stream", "on", "--timeout", 1.5, "--retry", 0))
        assert ended.code == 1
        assert box.read("outputs/data.jsonl")[0]["code"] == "abcd"
        (failure,) = box.read("outputs.failures.jsonl")
        assert failure["failure"] == "timeout"


def test_stream_keeps_the_answers_and_the_cache(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        assert call.body["stream"] is True
        return await plain(events(delta(content=answer_to(call.prompt)), delta("stop")))(call)

    with ModelServer(behave) as server:
        records(box)
        assert box.fabe(*command(server, "--stream")).code == 0
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) == 3


def unsupported(name: str, instead: str = "") -> web.Response:
    hint = f" Use '{instead}' instead." if instead else ""
    body = {
        "message": f"Unsupported parameter: '{name}' is not supported with this model.{hint}",
        "type": "invalid_request_error",
        "param": name,
        "code": "unsupported_parameter",
    }
    return web.json_response({"error": body}, status=400)


def test_a_parameter_that_goes_by_another_name_is_learned_once(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if "max_tokens" in call.body:
            return unsupported("max_tokens", "max_completion_tokens")
        return None

    with ModelServer(behave) as server:
        records(box, 20)
        ended = box.fabe(*command(server, "--concurrency", 8))
        assert ended.code == 0, ended
        assert len(server.calls) == 21
        assert ended.err.count("max_tokens goes as max_completion_tokens") == 1
        records(box, 25)  # known from the cache folder, and the keys are the same
        ended = box.fabe(*command(server))
        assert (ended.code, ended.err) == (0, "")
        assert len(server.calls) == 26


@pytest.mark.parametrize(
    "refusal",
    [
        {
            "error": {
                "message": "Unsupported value: 'temperature' does not support 0.0 with this model.",
                "param": "temperature",
                "code": "unsupported_value",
            }
        },
        {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]},
        {"error": {"message": "Unrecognized request argument supplied: temperature"}},
    ],
    ids=["OpenAI", "pydantic", "older"],
)
def test_a_default_that_is_refused_is_left_out(box, refusal):
    async def behave(call: Call) -> web.StreamResponse | None:
        if "temperature" in call.body:
            return web.json_response(refusal, status=400)
        return None

    with ModelServer(behave) as server:
        records(box, 5)
        ended = box.fabe(*command(server))
        assert ended.code == 0, ended
        assert len(server.calls) == 6
        assert "takes no temperature" in ended.err


def test_two_parameters_are_learned_one_after_the_other(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if "max_tokens" in call.body:
            return unsupported("max_tokens")
        return unsupported("temperature") if "temperature" in call.body else None

    with ModelServer(behave) as server:
        records(box, 5)
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) == 7


def test_a_limit_that_goes_by_no_name_stops_the_run(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if "max_tokens" in call.body:
            return unsupported("max_tokens", "max_completion_tokens")
        return error(400, "Unrecognized request argument supplied: max_completion_tokens")

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*command(server), timeout=30)
        assert (ended.code, len(server.calls)) == (1, 2)
        assert "does not take the parameter max_completion_tokens" in ended.err


def test_a_record_that_speaks_of_a_parameter_teaches_nothing(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if call.prompt.endswith("= 1"):
            return error(400, "Invalid prompt: unexpected token near 'temperature'")
        return None

    with ModelServer(behave) as server:
        records(box)
        assert box.fabe(*command(server)).code == 1
        assert all("temperature" in call.body for call in server.calls)


def test_what_the_user_asked_for_stops_the_run_where_it_is_refused(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        return unsupported("top_p") if "top_p" in call.body else None

    with ModelServer(behave) as server:
        records(box, 25)
        ended = box.fabe(*command(server, "--temperature", 1, "--top-p", 0.5))
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert "does not take the parameter top_p" in ended.err
        assert len(server.calls) == 1


def test_the_query_of_an_address_stays_behind_its_path(box):
    records(box, 1)
    url = "https://r.openai.azure.com/openai/deployments/d?api-version=2025-04-01-preview"
    run = ["run", "--input", "data.jsonl", "--instruction", "x", "--model", "m", "--dry-run"]
    ended = box.fabe(*run, "--provider", "openai", "--base-url", url)
    assert (
        "POST https://r.openai.azure.com/openai/deployments/d/chat/completions"
        "?api-version=2025-04-01-preview\n"
    ) in ended.out


def test_a_query_brings_azures_header(box):
    seen = []

    async def behave(call: Call) -> web.StreamResponse | None:
        seen.append((call.request.query_string, call.headers.get("api-key"), call.headers))
        return None

    with ModelServer(behave) as server:
        records(box)
        url = f"{server.url}?api-version=1&code=hush"
        ended = box.fabe(*command(server, "--base-url", url, "--api-key", "k-1"))
        assert ended.code == 0, ended
    assert {entry[:2] for entry in seen} == {("api-version=1&code=hush", "k-1")}
    assert all("Authorization" not in headers for *_, headers in seen)
    assert "hush" not in (box.path / "outputs.run.json").read_text()


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_not_list_models_may_complete_chats(box, status):
    class Restricted(ModelServer):
        async def _list_openai(self, request: web.Request) -> web.Response:
            text = "You have insufficient permissions. Missing scopes: api.model.read."
            return error(status, text)

    with Restricted() as server:
        records(box)
        assert box.fabe(*command(server, "--api-key", "k")).code == 0


def test_a_wait_that_the_body_asks_for_is_kept(box):
    told = "Please retry in 2.66s."
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "2.66s"}]
    body = [{"error": {"code": 429, "message": told, "details": details}}]
    times: list[float] = []

    async def behave(call: Call) -> web.StreamResponse | None:
        times.append(time.monotonic())
        return await plain(body, 429)(call) if times[-1] - times[0] < 2.6 else None

    with ModelServer(behave) as server:
        records(box, 10)
        ended = box.fabe(*command(server, "--retry", 0), "--retry", 1)
        assert ended.code == 0, ended
        assert "waiting" in ended.err
    assert max(b - a for a, b in pairwise(times)) >= 2.5


@pytest.mark.parametrize("reset", ["23h59m59s", "86399"])
def test_a_limit_that_is_used_up_for_a_day_stops_the_run(box, reset):
    async def behave(call: Call) -> web.StreamResponse | None:
        response = completion(call, answer_to(call.prompt))
        response.headers["x-ratelimit-remaining-requests"] = "0"
        response.headers["x-ratelimit-reset-requests"] = reset
        return response

    with ModelServer(behave) as server:
        records(box, 30)
        ended = box.fabe(*command(server, "--give-up-after", 600))
        assert ended.code == 1
        assert "its limit of requests is used up, for 2" in ended.err
        assert len(server.calls) == 1
        records(box, 1)  # nothing is left to send, so nothing is to be waited for
        assert box.fabe(*command(server)).code == 0


def test_a_prompt_that_ollama_cut_is_no_answer(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        message = {"content": "whatever"}
        counts = {"prompt_eval_count": 40, "eval_count": 3}
        return web.json_response(
            {"message": message, "done": True, "done_reason": "stop", **counts}
        )

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": "short"}, {"code": "word and more " * 1000}])
        run = command(server, "--provider", "ollama", "--base-url", server.root)
        assert box.fabe(*run, "--model", "llama3").code == 1
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["failure"]) == (1, "context")
    assert "40 tokens of a prompt" in failure["message"]


@pytest.mark.parametrize("size", [9_000, 100_000])
def test_long_headers_are_read(box, size):
    async def behave(call: Call) -> web.StreamResponse | None:
        response = completion(call, answer_to(call.prompt))
        response.headers["x-debug"] = "d" * size
        return response

    with ModelServer(behave) as server:
        records(box)
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) == 3
