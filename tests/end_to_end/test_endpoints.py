"""Several servers that have the same model: shared, left out while they are gone, and one key."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter

import pytest
from aiohttp import web

from tests.conftest import wait_for
from tests.support.server import Call, ModelServer, error, openai_run

N = 60


def run_at(*servers, more=()):
    where = [word for server in servers for word in ("--base-url", server.url)]
    return openai_run(servers[0], *where, "--concurrency", 8, *more)


def records(box, count=N, begin=0):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(begin, begin + count)])


def answers(box):
    return [record["code"] for record in box.read("outputs/data.jsonl")]


def expected(count=N):
    return [f"X = {i}" for i in range(count)]


@pytest.fixture
def two():
    with ModelServer(latency=0.02) as one, ModelServer(latency=0.02) as other:
        yield one, other


def test_the_least_busy_is_asked_next(box):
    with ModelServer(latency=0.02) as quick, ModelServer(latency=0.2) as slow:
        records(box, 200)
        ended = box.fabe(*run_at(quick, slow))
        assert ended.code == 0, ended
        assert answers(box) == expected(200)
        sent = Counter(call.prompt for call in [*quick.calls, *slow.calls])
        assert set(sent.values()) == {1}
        assert len(quick.calls) > 3 * len(slow.calls) > 0
        # Concurrency is of all together.
        assert quick.most_in_flight + slow.most_in_flight <= 16
        assert max(quick.most_in_flight, slow.most_in_flight) <= 8


def test_servers_come_and_go_and_nothing_is_asked_again(box, two):
    one, other = two
    records(box)
    assert box.fabe(*run_at(one, other)).code == 0
    before = len(one.calls) + len(other.calls)
    assert before == N
    with ModelServer() as third:
        for servers in ([one], [one, third], [one, other, third]):
            assert box.fabe(*run_at(*servers)).code == 0
            assert len(one.calls) + len(other.calls) + len(third.calls) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_a_named_endpoint_may_move(box, two, inplace):
    one, other = two
    records(box)
    more = ["--endpoint-name", "house", *(["--inplace"] if inplace else [])]
    assert box.fabe(*run_at(one, more=more)).code == 0
    assert len(one.calls) == N
    ended = box.fabe(*run_at(other, more=more))
    assert ended.code == 0, ended
    assert not other.calls


def test_a_server_that_dies_and_comes_back_costs_nothing(box):
    with ModelServer(latency=0.05) as stays:
        dies = ModelServer(latency=0.05)
        dies.__enter__()
        port = dies._port
        records(box, 2500)
        process = box.start(*run_at(stays, dies, more=["--retry", 1]))
        wait_for(lambda: len(dies.calls) > 30)
        dies.__exit__()
        sent_there = len(dies.calls)
        time.sleep(1)
        with ModelServer(latency=0.05, port=port) as back:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
            assert answers(box) == expected(2500)
            sent = sent_there + len(stays.calls) + len(back.calls)
            assert 2500 <= sent <= 2500 + 8  # what was in flight there
            assert back.calls
            assert f"{back.url}: the server answers again" in err or "is gone" not in err


def test_a_server_that_is_not_there_yet_is_looked_for(box):
    with ModelServer(latency=0.05) as here:
        absent = ModelServer()
        with absent:  # a port that is free afterwards
            port = absent._port
        records(box, 1500)
        process = box.start(*run_at(here, absent))
        wait_for(lambda: len(here.calls) > 20)
        with ModelServer(latency=0.05, port=port) as late:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
            assert answers(box) == expected(1500)
            assert late.calls
            assert err.count("the others go on, and it is looked for") == 1
            assert f"{late.url}: the server is there now" in err


def test_where_none_is_there_the_run_stops_at_once(box):
    with ModelServer() as one, ModelServer() as other:
        pass
    records(box)
    ended = box.fabe(*run_at(one, other))
    assert ended.code == 1
    assert ended.err.count("no server answers there") == 1, ended


def out_of_credit(call: Call) -> web.Response:
    return error(429, "insufficient balance (1008)")


def no_such_model(call: Call) -> web.Response:
    return error(404, "The model `m` does not exist", code="model_not_found")


def no_such_key(call: Call) -> web.Response:
    return error(401, "Incorrect API key provided", code="invalid_api_key")


def much_later(call: Call) -> web.Response:
    return error(429, "slow down", headers={"Retry-After": "86400"})


@pytest.mark.parametrize("answer", [out_of_credit, no_such_model, no_such_key, much_later])
def test_a_server_that_cannot_go_on_is_left_out_of_a_run_that_can(box, answer):
    async def behave(call: Call) -> web.StreamResponse:
        return answer(call)

    with ModelServer(latency=0.01) as good, ModelServer(behave) as bad:
        records(box)
        for servers in ((good, bad), (bad, good)):
            ended = box.fabe(*run_at(*servers))
            assert ended.code == 0, ended
            assert answers(box) == expected()
            assert ended.err.count("the others go on without it") <= 1, ended
        assert 1 <= len(bad.calls) <= 16
        ended = box.fabe(*run_at(bad, more=["--no-resume"]))
        assert ended.code == 1
        assert bad.url in ended.err


def test_each_server_has_a_limit_of_its_own(box):
    class Narrow:
        inside = refused = 0

        async def __call__(self, call: Call) -> web.StreamResponse | None:
            if self.inside >= 2:
                self.refused += 1
                return error(429, "too many at once")
            self.inside += 1
            await asyncio.sleep(0.05)
            self.inside -= 1
            return None

    narrow = Narrow()
    with ModelServer(narrow) as small, ModelServer(latency=0.05) as large:
        records(box, 600)
        ended = box.fabe(*run_at(small, large, more=["--concurrency", 32, "--retry", 20]))
        assert ended.code == 0, ended
        assert answers(box) == expected(600)
        assert large.most_in_flight > 16  # not cut for the other's sake
        assert narrow.refused < 120  # of 600: the search for its limit


def test_caps_hold_for_all_servers_together(box, two):
    one, other = two
    records(box)
    ended = box.fabe(*run_at(*two, more=["--max-requests", 25]))
    assert ended.code == 1
    assert "the budget is used up (--max-requests 25)" in ended.err
    assert len(one.calls) + len(other.calls) == 25


def test_a_list_in_yaml_and_what_a_dry_run_and_the_doctor_say(box, two):
    one, other = two
    records(box)
    box.write("how.yaml", f"base_url: [{one.url}, {other.url}]\nconcurrency: 8\n")
    run = openai_run(one)[:-2]
    dry = box.fabe(*run, "--config", "how.yaml", "--dry-run")
    assert f"POST {one.url}/chat/completions\n" in dry.out
    assert f"  or {other.url}/chat/completions\n" in dry.out
    assert box.fabe(*run, "--config", "how.yaml").code == 0
    assert one.calls
    assert other.calls
    doctor = box.fabe("doctor", "--base-url", one.url, "--base-url", "http://127.0.0.1:1/v1")
    assert doctor.code == 1
    assert f"{one.url}/models answers 200" in doctor.out
    assert "nothing answers at http://127.0.0.1:1/v1/models" in doctor.out


def test_two_of_ollama(box):
    with ModelServer(latency=0.05) as one, ModelServer(latency=0.05) as other:
        records(box)
        ended = box.fabe(
            *("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "ollama"),
            *("--model", "llama3", "--base-url", one.root, "--base-url", other.root),
        )
        assert ended.code == 0, ended
        assert answers(box) == expected()
        assert len(one.calls) + len(other.calls) == N
        assert min(len(one.calls), len(other.calls)) > N / 4


MAPPED = """
import sys, json, datasets, fabe_ds
if __name__ == "__main__":
    data = datasets.Dataset.from_list([{"code": f"x = {i}"} for i in range(60)])
    fn = fabe_ds.transform_fn(field="code", instruction="Up", provider="openai", model="m",
                              base_url=json.loads(sys.argv[1]), cache_dir=sys.argv[2])
    print(repr(fn))
    data = data.map(fn, batched=True, batch_size=10, num_proc=int(sys.argv[3]) or None)
    print(data["code"] == [f"X = {i}" for i in range(60)])
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_a_map_asks_all_of_them(tmp_path, two, processes):
    one, other = two
    where = json.dumps([one.url, other.url])
    run = [sys.executable, "-c", MAPPED, where, str(tmp_path / "cache"), str(processes)]
    ended = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.stdout.strip().endswith("True"), ended
    assert one.calls
    assert other.calls
    assert len(one.calls) + len(other.calls) == 60


def said(body: str, status: int = 200, kind: str = "application/json"):
    def answer(call: Call) -> web.Response:
        return web.Response(text=body, status=status, content_type=kind)

    return answer


BROKEN = {
    "refuses all": said('{"error": {"message": "bad request"}}', 400),
    "fails": said('{"error": {"message": "oops"}}', 500),
    "a page": said("<html>hello</html>", 200, "text/html"),
    "a list": said("[1, 2]"),
    "no choice": said('{"choices": [null]}'),
    "garbage": said("\x00\x01{"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_quick_and_broken_server_costs_no_record(box, name):
    async def behave(call: Call) -> web.StreamResponse:
        return BROKEN[name](call)

    with ModelServer(latency=0.05) as good, ModelServer(behave) as bad:
        records(box, 200)
        ended = box.fabe(*run_at(good, bad))
        assert ended.code == 0, ended
        assert answers(box) == expected(200)
        assert len(good.calls) == 200
        assert len(bad.calls) < 60  # it is left alone, and asked now and then
        assert "requests in a row came to nothing" in ended.err


def test_a_server_that_hangs_costs_no_record(box):
    async def hangs(call: Call) -> web.StreamResponse | None:
        await asyncio.sleep(30)
        return None

    with ModelServer(latency=0.02) as good, ModelServer(hangs) as bad:
        records(box, 100)
        ended = box.fabe(*run_at(good, bad, more=["--timeout", 2, "--retry", 1]))
        assert ended.code == 0, ended
        assert answers(box) == expected(100)


def test_a_record_that_all_servers_refuse_fails(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        return error(400, "no") if call.prompt.endswith("= 7") else None

    with ModelServer(behave) as one, ModelServer(behave) as other:
        records(box, 20)
        ended = box.fabe(*run_at(one, other))
        assert ended.code == 1
        assert answers(box) == [f"X = {i}" if i != 7 else "x = 7" for i in range(20)]
        asked = [call.prompt for call in [*one.calls, *other.calls]]
        assert sum(prompt.endswith("= 7") for prompt in asked) == 2


@pytest.mark.parametrize("words", [["--base-url", ""], ["--base-url", "URL", "--base-url", ""]])
def test_an_empty_address_is_no_address(box, server, words):
    records(box)
    words = [server.url if word == "URL" else word for word in words]
    ended = box.fabe(*openai_run(server, *words))
    assert ended.code == 2
    assert "--base-url: an empty one" in ended.err
