"""What is paid for is paid for once, advice that helps, and getting out what is there."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.conftest import wait_for
from tests.support.server import Call, ModelServer, answer_to, completion, error, openai_run


def records(box, count: int = 20) -> None:
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


class Cutting(ModelServer):
    """Answers of even records have 200 tokens, of odd ones 5: greedy ones are the same whatever
    the limit, as far as it lets them."""

    async def _answer(self, call: Call) -> web.StreamResponse:
        limit = call.body.get("max_tokens") or call.body["options"]["num_predict"]
        tokens = 200 if int(call.prompt.rsplit(" ", 1)[1]) % 2 == 0 else 5
        cut = tokens > limit
        response = completion(call, answer_to(call.prompt), "length" if cut else "stop")
        body = json.loads(response.body)
        count = min(tokens, limit)
        if "usage" in body:
            body["usage"]["completion_tokens"] = count
        else:
            body["eval_count"] = count
        return web.json_response(body)

    def __init__(self) -> None:
        super().__init__(self._answer)


@pytest.mark.parametrize("provider", ["openai", "ollama"])
def test_a_higher_limit_asks_the_cut_ones_alone(box, provider):
    with Cutting() as server:
        records(box)
        run = openai_run(server)
        if provider == "ollama":
            run += ["--provider", "ollama", "--base-url", server.root, "--model", "llama3"]
        ended = box.fabe(*run, "--max-new-tokens", 100)
        assert (ended.code, len(server.calls)) == (1, 20)
        assert "10 cut at the token limit: run again with --max-new-tokens 200" in ended.out
        dry = box.fabe(*run, "--max-new-tokens", 300, "--dry-run")
        assert "10 answered already, 10 to send" in dry.out or "10 answered already" in dry.out
        assert box.fabe(*run, "--max-new-tokens", 300).code == 0
        assert len(server.calls) == 30
        for limit in (300, 400, 200):  # again; higher; and lower, but no answer is longer
            assert box.fabe(*run, "--max-new-tokens", limit).code == 0
        assert len(server.calls) == 30
        assert box.fabe(*run, "--max-new-tokens", 50).code == 1
        assert len(server.calls) == 40  # those of 200 tokens would be cut there


def test_sampled_answers_are_those_of_their_limit(box):
    with Cutting() as server:
        records(box, 4)
        box.fabe(*openai_run(server, "--temperature", 1, "--max-new-tokens", 100))
        box.fabe(*openai_run(server, "--temperature", 1, "--max-new-tokens", 300))
        assert len(server.calls) == 8
        seeded = openai_run(server, "--temperature", 1, "--seed", 3)
        box.fabe(*seeded, "--max-new-tokens", 100)
        box.fabe(*seeded, "--max-new-tokens", 300)
        assert len(server.calls) == 14  # with a record's own seed, the whole ones are the same


def test_no_resume_reads_no_other_limit(box):
    with Cutting() as server:
        records(box, 4)
        box.fabe(*openai_run(server, "--max-new-tokens", 100))
        box.fabe(*openai_run(server, "--max-new-tokens", 300, "--no-resume"))
        assert len(server.calls) == 8


KEPT = {
    "truncated": lambda call: completion(call, "half", "length"),
    "refused": lambda call: completion(call, "no", "content_filter"),
    "unfinished": lambda call: completion(call, "half", "odd_word"),
    "empty": lambda call: completion(call, "<think>on and on"),
}
SENT_AGAIN = {
    "server": lambda call: error(500, "out of order"),
    "empty": lambda call: completion(call, ""),
    "malformed": lambda call: web.json_response({"choices": []}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_would_fail_the_same_is_not_asked_again(box, kind):
    async def behave(call: Call) -> web.StreamResponse | None:
        return KEPT[kind](call) if call.prompt.endswith("= 3") else None

    with ModelServer(behave) as server:
        records(box, 6)
        for _ in range(2):
            ended = box.fabe(*openai_run(server))
            assert ended.code == 1, ended
            (failure,) = box.read("outputs.failures.jsonl")
            assert failure["failure"] == kind
            assert "run the same command again" not in ended.out
        assert len(server.calls) == 6
        explained = box.fabe("cache", "explain", "outputs.run.json", "--record", 3)
        assert ("retry --all" in explained.out) == (kind != "empty")
        assert box.fabe("retry", "outputs.run.json").code == 1
        assert len(server.calls) == 6
        assert box.fabe("retry", "outputs.run.json", "--all").code == 1
        assert len(server.calls) == 7


@pytest.mark.parametrize("kind", SENT_AGAIN)
def test_what_passes_is_sent_again(box, kind):
    bad = True

    async def behave(call: Call) -> web.StreamResponse | None:
        return SENT_AGAIN[kind](call) if bad and call.prompt.endswith("= 3") else None

    with ModelServer(behave) as server:
        records(box, 6)
        ended = box.fabe(*openai_run(server, "--retry", 0))
        assert ended.code == 1, ended
        bad = False
        assert box.fabe(*openai_run(server)).code == 0
        assert len(server.calls) == 7


def test_an_answer_that_never_passes_its_check_is_kept(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        bad = any("= 3" in turn["content"] for turn in call.body["messages"])
        return completion(call, "def (:" if bad else "y = 1")

    with ModelServer(behave) as server:
        records(box, 6)
        run = openai_run(server, "--validate", "python-syntax", "--max-reasks", 1)
        for _ in range(2):
            ended = box.fabe(*run)
            assert ended.code == 1
            assert box.read("outputs.failures.jsonl")[0]["failure"] == "invalid"
        assert len(server.calls) == 7
        assert "1 asked again" not in ended.out
        # Without the check, the same answers are read again.
        assert box.fabe(*openai_run(server)).code == 0
        assert len(server.calls) == 7


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_answered_can_be_got_out_while_the_server_is_dead(box, inplace):
    async def behave(call: Call) -> web.StreamResponse | None:
        await asyncio.sleep(0.05)
        return None

    records(box, 60)
    where = ["--inplace"] if inplace else []
    with ModelServer(behave) as server:
        process = box.start(*openai_run(server, "--give-up-after", 1, *where))
        wait_for(lambda: len(server.calls) >= 24)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--offline" in err
    ended = box.fabe(*openai_run(server, "--offline", *where))
    assert ended.code == 1, ended
    out = box.read("data.jsonl" if inplace else "outputs/data.jsonl")
    done = [record for record in out if "original_code" in record]
    assert 16 <= len(done) < 60
    assert all(record["code"] == record["original_code"].upper() for record in done)
    report = next((box.path / ".cache/runs").glob("*.run.json")) if inplace else None
    counts = json.loads(report.read_text()) if report else box.report()
    assert counts["failures_by_kind"] == {"unanswered": 60 - len(done)}
    assert counts["requests"] == 0
    port = int(server.root.rsplit(":", 1)[1])
    with ModelServer(port=port) as again:
        assert box.fabe(*openai_run(again, *where)).code == 0
        assert len(again.calls) == 60 - len(done)
    out = box.read("data.jsonl" if inplace else "outputs/data.jsonl")
    assert [record["code"] for record in out] == [f"X = {i}" for i in range(60)]


def test_a_budget_that_is_spent_says_how_to_go_on(box, server):
    records(box)
    ended = box.fabe(*openai_run(server, "--max-requests", 5))
    assert ended.code == 1
    assert "--offline" in ended.err
    assert box.fabe(*openai_run(server, "--offline")).code == 1
    assert box.report()["cached"] == 5


def test_many_failures_of_one_kind_are_said_once_with_what_helps(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        await asyncio.sleep(0.1)
        return completion(call, "half", "length") if call.number % 3 == 1 else None

    with ModelServer(behave) as server:
        records(box, 260)
        ended = box.fabe(*openai_run(server, "--concurrency", 4))
    assert ended.code == 1
    assert "cut at --max-new-tokens: raise it" in ended.err
    assert "run again with --max-new-tokens 256" in ended.out
    assert ended.out.count("\n") <= 8


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('{"code": "x = 1"}', False),
        ("'''python\nx = 1\n'''", False),
        ("x = 1", True),
        ('"""Doc."""\nx = 1', True),
    ],
)
def test_code_in_a_literal_is_no_code(box, text, passes):
    async def behave(call: Call) -> web.StreamResponse | None:
        return completion(call, text)

    with ModelServer(behave) as server:
        records(box, 1)
        run = openai_run(server, "--validate", "python-syntax", "--max-reasks", 0)
        assert box.fabe(*run).code == (0 if passes else 1)
