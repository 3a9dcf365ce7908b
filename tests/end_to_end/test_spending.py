"""Budgets, checks of answers, retries by name, and the cache's own commands."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from fabe_ds.prompts.checks import build_check
from tests.support.server import Call, ModelServer, completion, error, openai_run


def records(box, count=50):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def test_the_cap_on_requests_is_never_passed_and_a_higher_one_goes_on(box, server):
    records(box)
    ended = box.fabe(*openai_run(server, "--max-requests", 20, "--concurrency", 8))
    assert ended.code == 1
    assert "the budget is used up (--max-requests 20)" in ended.err
    assert len(server.calls) == 20
    assert box.fabe(*openai_run(server, "--max-requests", 30)).code == 0
    assert len(server.calls) == 50


def test_failed_tries_count_too(box):
    async def behave(call: Call) -> web.StreamResponse:
        return error(500, "no")

    with ModelServer(behave) as server:
        records(box)
        box.fabe(*openai_run(server, "--max-requests", 10, "--retry", 5))
        assert len(server.calls) == 10


def test_the_cap_on_tokens_is_never_passed(box):
    used = 0

    async def behave(call: Call) -> web.StreamResponse | None:
        nonlocal used
        used += len(call.prompt.split()) + 3
        return None

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*openai_run(server, "--max-tokens-total", 400, "--max-new-tokens", 10))
        assert ended.code == 1
        assert "--max-tokens-total 400" in ended.err
        assert 150 < used <= 400


def test_the_cap_on_cost(box, server):
    records(box)
    box.write("prices.yaml", "m: {prompt: 1000, completion: 2000}\n")
    ended = box.fabe(
        *openai_run(server, "--max-cost", 0.5, "--prices", "prices.yaml", "--max-new-tokens", 10)
    )
    assert ended.code == 1
    assert "--max-cost 0.5" in ended.err
    cost = sum(len(c.prompt.split()) * 1e-3 + 3 * 2e-3 for c in server.calls)
    assert 0.2 < cost <= 0.5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-cost", "1"], "--max-cost needs --prices"),
        (["--max-cost", "1", "--prices", "p.yaml"], "no price of 'm'"),
        (["--max-cost", "1", "--prices", "gone.yaml"], "No such file"),
    ],
)
def test_without_a_price_there_is_no_cost_to_cap(box, server, flags, says):
    records(box)
    box.write("p.yaml", "other: {prompt: 1, completion: 1}\n")
    ended = box.fabe(*openai_run(server, *flags))
    assert ended.code == 2
    assert says in ended.err
    assert not server.calls


def test_an_answer_that_fails_its_check_is_asked_again_with_what_is_wrong(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        turns = call.body["messages"]
        if len(turns) == 2 and turns[-1]["content"].endswith("= 3"):
            return completion(call, "def (:")
        return completion(call, "x = 1")

    with ModelServer(behave) as server:
        records(box, 6)
        ended = box.fabe(*openai_run(server, "--validate", "python-syntax"))
        assert ended.code == 0, ended
        assert len(server.calls) == 7
        again = next(c for c in server.calls if len(c.body["messages"]) == 4)
        assert again.body["messages"][2] == {"role": "assistant", "content": "def (:"}
        assert "not valid Python" in again.body["messages"][3]["content"]
        # From the record cache alone, chain and all.
        box.fabe(
            *openai_run(
                server,
                "--validate",
                "python-syntax",
                "--output",
                "b",
                "--field",
                "code",
                "--backup-field",
                "was",
            )
        )
        assert len(server.calls) == 7
        assert box.read("b/data.jsonl")[3]["code"] == "x = 1"


def test_an_answer_that_keeps_failing_is_listed_with_its_last_words(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        return (
            completion(call, f"def ({len(call.body['messages'])}:")
            if "= 3" in str(call.body)
            else None
        )

    with ModelServer(behave) as server:
        records(box, 6)
        ended = box.fabe(*openai_run(server, "--validate", "python-syntax", "--max-reasks", 2))
        assert ended.code == 1
        assert len(server.calls) == 6 + 2
        (failure,) = box.read("outputs.failures.jsonl")
        assert (failure["record"], failure["failure"], failure["answer"]) == (
            3,
            "invalid",
            "def (6:",
        )
        assert "not valid Python" in failure["message"]


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ("python-syntax", "x = 1", "x ="),
        ("json", '{"a": 1}', "{a: 1}"),
        ("regex:^def ", "def f(): pass", "x"),
        ("json-schema:SCHEMA", '{"a": 1}', '{"a": "x"}'),
    ],
)
def test_the_checks(tmp_path, spec, good, bad):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))
    check = build_check(spec.replace("SCHEMA", str(schema))).check
    assert check(good, "", None) is None
    assert check(bad, "", None)


@pytest.mark.parametrize("spec", ["nothing", "regex:(", "json-schema:gone.json"])
def test_a_wrong_check_is_said_before_anything_is_sent(box, server, spec):
    records(box)
    ended = box.fabe(*openai_run(server, "--validate", spec))
    assert ended.code == 2
    assert ended.err.startswith(f"fabe-ds: --validate {spec}: ")
    assert not server.calls


def test_retry_sends_the_failed_records_of_a_run(box):
    broken = True

    async def behave(call: Call) -> web.StreamResponse | None:
        return error(400, "no") if broken and call.prompt.endswith("= 3") else None

    with ModelServer(behave) as server:
        records(box, 10)
        assert box.fabe(*openai_run(server, "--output", "out")).code == 1
        broken = False
        ended = box.fabe("retry", "out.run.json")
        assert ended.code == 0, ended
        assert "1 rewritten, 9 from cache" in ended.out
        assert len(server.calls) == 11
        assert box.read("out/data.jsonl")[3]["code"] == "X = 3"
    assert box.fabe("retry", "data.jsonl").code == 2
    assert box.fabe("retry", "gone.json").code == 2


def test_the_caches_commands(box, server):
    assert box.fabe("cache", "stats").code == 2
    records(box, 10)
    box.fabe(*openai_run(server))
    ended = box.fabe("cache", "stats")
    assert ended.out.startswith("10 completions, ")
    exported = [json.loads(line) for line in box.fabe("cache", "export").out.splitlines()]
    assert sorted(row["text"] for row in exported) == sorted(f"X = {i}" for i in range(10))
    assert "record 3: hit" in box.fabe("cache", "explain", "outputs.run.json", "--record", 3).out
    box.lines("data.jsonl", [{"code": "new"}, {"code": ""}])
    assert "record 0: miss" in box.fabe("cache", "explain", "outputs.run.json").out
    assert "field is empty" in box.fabe("cache", "explain", "outputs.run.json", "--record", 1).out
    assert box.fabe("cache", "explain", "outputs.run.json", "--record", 9).code == 2
    assert box.fabe("cache", "prune", "--older-than", 1).out.startswith("0 completions removed; ")
    gone = box.fabe("cache", "prune", "--older-than", 0).out
    assert gone.startswith("10 completions removed, and 3 loaded inputs and reports; ")
    assert not list((box.path / ".cache/datasets").iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--batch-api",), "leave --batch-api out"),
        (("--provider", "echo"), "leave --provider echo out"),
    ],
)
def test_caps_are_refused_where_they_would_not_hold(box, server, more, said):
    records(box, 3)
    ended = box.fabe(*openai_run(server, "--max-requests", 1, *more))
    assert ended.code == 2
    assert ended.err.strip().endswith(said)
    assert not server.calls


def test_prices_alone_count_the_cost(box, server):
    records(box, 4)
    box.write("prices.yaml", "m: {prompt: 1000000, completion: 2000000}")
    ended = box.fabe(*openai_run(server, "--prices", "prices.yaml"))
    assert ended.code == 0
    cost = sum(len(call.prompt.split()) + 2 * 3 for call in server.calls)
    assert f"cost {cost:.4f}" in ended.out


def test_retry_sends_just_what_failed_after_a_run_without_resume(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        return error(400, "no") if len(server.calls) <= 10 and call.prompt.endswith("3") else None

    records(box, 10)
    with ModelServer(behave) as server:
        ended = box.fabe(*openai_run(server, "--no-resume", "--system-prompt", ""))
        assert ended.code == 1
        assert "the first: record data.jsonl:4: 400: no" in ended.out
        (box.path / "elsewhere").mkdir()
        box.lines("elsewhere/data.jsonl", [{"code": "another"}])
        again = box.start("retry", box.path / "outputs.run.json")
        again.communicate(timeout=60)
        assert again.returncode == 0
        assert len(server.calls) == 11
        assert all(len(call.body["messages"]) == 1 for call in server.calls)
