"""Everything that goes wrong between us and a server, over real sockets: one table."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from tests.support.server import (
    Behaviour,
    Call,
    ModelServer,
    answer_to,
    completion,
    error,
    openai_run,
)

RETRY = 2


def command(server, *more):
    return openai_run(server, "--retry", RETRY, "--timeout", 2, "--concurrency", 8, *more)


# What a server may do. Each takes the call and gives a response, or breaks the connection.


async def reset_before(call: Call) -> web.StreamResponse:
    transport = call.request.transport
    assert transport is not None
    linger = transport.get_extra_info("socket")
    linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    transport.abort()
    return web.Response()


async def partial(call: Call, body: bytes, length: int | None, chunked: bool = False):
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    if chunked:
        response.enable_chunked_encoding()
    else:
        response.content_length = length
    await response.prepare(call.request)
    await response.write(body)
    assert call.request.transport is not None
    call.request.transport.abort()
    return response


def good(call: Call) -> bytes:
    body = completion(call, answer_to(call.prompt)).body
    assert isinstance(body, bytes)
    return body


async def reset_inside(call: Call) -> web.StreamResponse:
    return await partial(call, good(call)[:20], 5000)


async def cut_chunk(call: Call) -> web.StreamResponse:
    return await partial(call, good(call)[:20], None, chunked=True)


async def longer_than_said(call: Call) -> web.StreamResponse:
    return await partial(call, good(call), len(good(call)) + 10)


async def never(call: Call) -> None:
    await asyncio.sleep(30)


async def slow_headers(call: Call) -> None:
    await asyncio.sleep(0.5)


async def drip(call: Call, pause: float = 1.0) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(call.request)
    for byte in good(call):
        await response.write(bytes([byte]))
        await asyncio.sleep(pause)
    return response


async def quick_drip(call: Call) -> web.StreamResponse:
    return await drip(call, 0.0)


async def blank_lines_first(call: Call) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(call.request)
    for _ in range(5):
        await response.write(b"\n")
        await asyncio.sleep(0.05)
    await response.write(good(call))
    return response


def raw(body: bytes | str, status: int = 200, kind: str = "application/json", **headers: str):
    async def behave(call: Call) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else body.encode()
        return web.Response(body=data, status=status, content_type=kind, headers=headers)

    return behave


def message(**fields: Any):
    return raw(json.dumps({"choices": [{"message": fields, "finish_reason": "stop"}]}))


def status(code: int, text: str = "no", name: str | None = None, **headers: str):
    named = {key.replace("_", "-"): value for key, value in headers.items()}

    async def behave(call: Call) -> web.StreamResponse:
        return error(code, text, code=name, headers=named)

    return behave


def finish(reason: str):
    async def behave(call: Call) -> web.StreamResponse:
        return completion(call, "HALF", reason)

    return behave


async def zipped(call: Call) -> web.StreamResponse:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    return web.Response(body=gzip.compress(good(call)), headers=headers)


async def with_bom(call: Call) -> web.StreamResponse:
    return web.Response(body=b"\xef\xbb\xbf" + good(call), content_type="application/json")


async def as_text(call: Call) -> web.StreamResponse:
    return web.Response(body=good(call), content_type="text/plain")


async def wrong_charset(call: Call) -> web.StreamResponse:
    return web.Response(
        body=good(call), headers={"Content-Type": "application/json; charset=latin-9"}
    )


async def close_after(call: Call) -> web.StreamResponse:
    response = completion(call, answer_to(call.prompt))
    response.force_close()
    return response


async def huge(call: Call) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(call.request)
    for _ in range(40):
        await response.write(b" " * (1 << 20))
    return response


async def bomb(call: Call) -> web.StreamResponse:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    return web.Response(body=gzip.compress(b" " * (64 << 20), 1), headers=headers)


def date_in(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@dataclass
class Fault:
    """`behave` answers the first try of the middle record. What must come of it:

    - "again": it is tried again, and all is well; `tries` says how often it is sent in all;
    - "fail": that record keeps its original, of class `kind`, the others are rewritten;
    - "stop": the run stops, and says `says`.
    `always` True: it does so at every try. `wait`: seconds between the first try and the next.
    """

    behave: Behaviour
    result: str
    kind: str = ""
    says: str = ""
    tries: int = 2
    always: bool = False
    wait: float = 0.0


FAULTS: dict[str, Fault] = {
    "reset before the headers": Fault(reset_before, "again"),
    "reset inside the body": Fault(reset_inside, "again"),
    "cut chunk": Fault(cut_chunk, "again"),
    "content-length longer than the body": Fault(longer_than_said, "again"),
    "truncated json": Fault(raw('{"choices": [{"mess'), "again"),
    "truncated json, always": Fault(
        raw('{"choices": [{"mess'), "fail", "malformed", "not JSON", RETRY + 1, always=True
    ),
    "slow headers": Fault(slow_headers, "again", tries=1),
    "drip": Fault(drip, "again"),
    "quick drip": Fault(quick_drip, "again", tries=1),
    "never answers": Fault(never, "again"),
    "blank lines first": Fault(blank_lines_first, "again", tries=1),
    "429 with seconds": Fault(status(429, Retry_After="1"), "again", wait=1.0),
    "429 with a date": Fault(
        status(429, Retry_After=date_in(3600)), "stop", says="longer than --give-up-after"
    ),
    "429 with milliseconds": Fault(status(429, retry_after_ms="700"), "again", wait=0.7),
    "503 with seconds": Fault(status(503, Retry_After="1"), "again", wait=1.0),
    "429 with nothing": Fault(status(429), "again"),
    "429 always": Fault(status(429), "fail", "rate", "429", RETRY + 1, always=True),
    "429 with a day": Fault(status(429, Retry_After="86400"), "stop", says="asks to wait 86400 s"),
    "429 with garbage": Fault(status(429, Retry_After="soon"), "again"),
    "429 with a negative": Fault(status(429, Retry_After="-5"), "again"),
    "429 with nan": Fault(status(429, Retry_After="nan"), "again"),
    "quota": Fault(
        status(429, "check your plan and billing details", name="insufficient_quota"),
        "stop",
        says="quota is used up",
    ),
    "a minute's quota": Fault(status(429, name="insufficient_quota"), "again"),
    "500": Fault(status(500), "again"),
    "502": Fault(status(502), "again"),
    "503": Fault(status(503), "again"),
    "504": Fault(status(504), "again"),
    "529": Fault(status(529), "again"),
    "408": Fault(status(408), "again"),
    "409": Fault(status(409), "again"),
    "425": Fault(status(425), "again"),
    "500 always": Fault(
        status(500, "out of order"), "fail", "server", "out of order", RETRY + 1, always=True
    ),
    "400": Fault(status(400, "bad tokens"), "fail", "rejected", "bad tokens", 1),
    "404": Fault(status(404), "fail", "rejected", tries=1),
    "413": Fault(status(413), "fail", "rejected", tries=1),
    "422": Fault(status(422), "fail", "rejected", tries=1),
    "context length": Fault(
        status(400, "maximum context length is 8", "context_length_exceeded"),
        "fail",
        "context",
        "maximum context length is 8",
        1,
    ),
    "401 in mid-run": Fault(status(401), "stop", says="the key is not accepted"),
    "403 in mid-run": Fault(status(403), "fail", "refused", "took the key for others", 1),
    "unknown model": Fault(status(404, name="model_not_found"), "stop", says="model is not there"),
    "200 with an error": Fault(raw('{"error": {"message": "overloaded"}}'), "again"),
    "200 with a 429": Fault(raw('{"error": {"code": 429, "message": "slow"}}'), "again"),
    "200 with a 400": Fault(
        raw('{"error": {"code": 400, "message": "x"}}'), "fail", "rejected", tries=1
    ),
    "no choices": Fault(raw('{"choices": []}'), "again"),
    "no choices, always": Fault(
        raw('{"choices": []}'), "fail", "malformed", "no choices", RETRY + 1, always=True
    ),
    "null content": Fault(message(content=None), "fail", "empty", tries=1),
    "empty content": Fault(message(content=""), "fail", "empty", tries=1),
    "tool calls only": Fault(message(content=None, tool_calls=[{}]), "fail", "empty", tries=1),
    "refusal": Fault(
        message(content=None, refusal="I will not"), "fail", "refused", "I will not", 1
    ),
    "reasoning only": Fault(message(content="", reasoning_content="hm"), "fail", "empty", tries=1),
    "cut at the limit": Fault(finish("length"), "fail", "truncated", tries=1),
    "content filter": Fault(finish("content_filter"), "fail", "refused", tries=1),
    "a proxy's page": Fault(raw("<html>sign in</html>", kind="text/html"), "again"),
    "a page, always": Fault(
        raw("<html>", kind="text/html"), "fail", "malformed", "an HTML page", RETRY + 1, always=True
    ),
    "a huge body": Fault(huge, "fail", "too large", "over 32 MiB", 1),
    "a gzip bomb": Fault(bomb, "fail", "too large", "over 32 MiB", 1),
    "gzip": Fault(zipped, "again", tries=1),
    "text/plain": Fault(as_text, "again", tries=1),
    "wrong charset": Fault(wrong_charset, "again", tries=1),
    "a bom": Fault(with_bom, "again", tries=1),
    "not an object": Fault(raw("[1]"), "again"),
    "an empty body": Fault(raw(""), "again"),
    "redirect": Fault(
        raw("", 307, Location="http://example.invalid/v1"), "stop", says="redirects to"
    ),
    "keep-alive closed": Fault(close_after, "again", tries=1),
}


def test_the_table_has_30_faults():
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("name", FAULTS)
def test_fault(box, name):
    fault = FAULTS[name]
    tries: list[float] = []

    async def behave(call: Call) -> web.StreamResponse | None:
        if not call.prompt.endswith("= 5"):
            return None
        tries.append(time.monotonic())
        if len(tries) == 1 or fault.always:
            return await fault.behave(call)
        return None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
        ended = box.fabe(*command(server), timeout=60)
        assert len(server.calls) <= 10 + RETRY
    if fault.result == "stop":
        assert ended.code == 1, ended
        assert fault.says in ended.err
        assert "Authorization" not in ended.err
        assert len(tries) == 1
        assert not (box.path / "outputs").exists()
        return
    expected = [f"X = {i}" for i in range(10)]
    if fault.result == "fail":
        assert ended.code == 1, ended
        expected[5] = "x = 5"
        (failure,) = box.read("outputs.failures.jsonl")
        assert (failure["record"], failure["failure"]) == (5, fault.kind)
        assert fault.says in failure["message"]
    else:
        assert ended.code == 0, ended
    assert [record["code"] for record in box.read("outputs/data.jsonl")] == expected
    assert len(tries) == fault.tries
    if fault.wait:
        assert tries[1] - tries[0] >= fault.wait


def test_a_cool_down_holds_all_requests_back(box):
    """A 429 that asks for time stops everyone, not just the record that got it."""
    times: list[float] = []

    async def behave(call: Call) -> web.StreamResponse | None:
        times.append(time.monotonic())
        if len(times) == 20:
            return error(429, "slow down", headers={"Retry-After": "1"})
        await asyncio.sleep(0.02)
        return None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(60)])
        assert box.fabe(*command(server)).code == 0
    gap = max(b - a for a, b in pairwise(times[19:]))
    assert gap >= 0.9
    assert len(times) == 61


@pytest.mark.parametrize("seconds", [0.3, 3.0])
def test_a_server_that_restarts_costs_nothing(box, seconds):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(300)])
    with ModelServer(latency=0.02) as first:
        process = box.start(*command(first, "--concurrency", 4))
        while len(first.calls) < 60:
            time.sleep(0.01)
        port = int(first.root.rsplit(":", 1)[1])
    time.sleep(seconds)
    with ModelServer(latency=0.005, port=port):
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, (out, err)
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == [f"X = {i}" for i in range(300)]


def test_a_server_that_stays_away_stops_the_run(box):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(100)])
    with ModelServer(latency=0.05) as server:
        process = box.start(*command(server, "--give-up-after", 2))
        while len(server.calls) < 20:
            time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, (out, err)
    assert "gone for" in err
    assert "run the same command again to go on" in err
    # On a slow machine it takes the five seconds after which progress is told.
    told = [line for line in err.splitlines() if "records/s" not in line]
    assert len(told) <= 3


def test_where_nothing_ever_goes_well_the_run_stops_early(box):
    async def behave(call: Call) -> web.StreamResponse:
        return error(400, "unsupported parameter")

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(500)])
        ended = box.fabe(*command(server))
        assert ended.code == 1
        assert "the first 20 records all failed; the last: 400: unsupported parameter" in ended.err
        assert len(server.calls) <= 20 + 8


def test_a_refused_key_stops_within_one_round(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        await asyncio.sleep(0.05)
        return error(401, "expired") if call.number >= 40 else None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(500)])
        ended = box.fabe(*command(server))
        assert ended.code == 1
        assert ended.err.count("\n") == 1
        assert len(server.calls) <= 40 + 2 * 8


def test_a_random_mixture_of_faults(box):
    """5,000 records: each comes right or fails as it must, in order, within its tries."""
    chance = random.Random(7)
    passing = [
        reset_before,
        reset_inside,
        cut_chunk,
        raw('{"choices": ['),
        status(429),
        status(500),
        status(502),
        status(503),
        raw("<html>"),
        raw('{"choices": []}'),
    ]
    failing = {
        "rejected": status(400),
        "empty": message(content=""),
        "truncated": finish("length"),
        "context": status(400, "x", "context_length_exceeded"),
    }
    fate = {i: chance.choice(list(failing)) for i in range(5000) if chance.random() < 0.02}
    tried: Counter[int] = Counter()

    async def behave(call: Call) -> web.StreamResponse | None:
        record = int(call.prompt.rsplit(" ", 1)[1])
        tried[record] += 1
        if tried[record] <= 3 and chance.random() < 0.1:
            return await chance.choice(passing)(call)
        return await failing[fate[record]](call) if record in fate else None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(5000)])
        ended = box.fabe(*command(server, "--concurrency", 64, "--retry", 8), timeout=200)
        assert ended.code == 1, ended
    failures = {f["record"]: f["failure"] for f in box.read("outputs.failures.jsonl")}
    assert failures == fate
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == [
        f"x = {i}" if i in fate else f"X = {i}" for i in range(5000)
    ]
    assert max(tried.values()) <= 9


def test_half_a_surrogate_pair_hangs_nothing(box):
    """JSON can hold it, UTF-8 cannot: neither an answer nor a refusal may stop the others."""

    async def behave(call: Call) -> web.StreamResponse | None:
        if call.prompt.endswith("= 3"):
            return completion(call, "half \ud83d of it")
        return error(400, "no \ud83d") if call.prompt.endswith("= 5") else None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
        ended = box.fabe(*command(server), timeout=60)
        assert ended.code == 1, ended
        assert box.fabe(*command(server), timeout=60).code == 1
        assert len(server.calls) == 10 + 1
    rewritten = [record["code"] for record in box.read("outputs/data.jsonl")]
    assert (rewritten[3], rewritten[5], rewritten[7]) == ("half \ufffd of it", "x = 5", "X = 7")
    assert box.read("outputs.failures.jsonl")[0]["message"] == "400: no \ufffd"


@pytest.mark.parametrize("body", ['{"detail": "Not Found"}', "404 page not found", ""])
def test_a_wrong_base_url_stops_at_once(box, body):
    async def behave(call: Call) -> web.StreamResponse:
        return await raw(body, 404)(call)

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
        ended = box.fabe(*command(server), timeout=60)
        assert ended.code == 1
        assert "does --base-url end in /v1" in ended.err
        assert len(server.calls) <= 8  # those that were on their way
    assert not (box.path / "outputs").exists()


def test_a_base_url_without_a_scheme_is_one_line(box):
    box.lines("data.jsonl", [{"code": "x"}])
    run = ("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "openai")
    ended = box.fabe(*run, "--model", "m", "--base-url", "127.0.0.1:8000/v1")
    message = "fabe-ds: --base-url 127.0.0.1:8000/v1: write http://HOST:PORT/v1\n"
    assert (ended.code, ended.err) == (2, message)
