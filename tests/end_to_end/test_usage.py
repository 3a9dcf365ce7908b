"""What a run takes as it is billed: cached and reasoning tokens, prices, tiers, estimates."""

from __future__ import annotations

import re

import pytest
from aiohttp import web

from tests.support.server import Call, ModelServer, answer_to, completion, error, openai_run

USAGE = {
    "prompt_tokens": 1000,
    "completion_tokens": 100,
    "prompt_tokens_details": {"cached_tokens": 800},
    "completion_tokens_details": {"reasoning_tokens": 60},
}


async def counted(call: Call) -> web.StreamResponse:
    choice = {
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": answer_to(call.prompt)},
    }
    return web.json_response({"choices": [choice], "usage": USAGE})


def run(server, *more, model="m"):
    words = openai_run(server, *more)
    words[words.index("--model") + 1] = model
    return words


def records(box, count=4):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def test_cached_and_reasoning_tokens_are_told_and_paid_as_such(box):
    with ModelServer(counted) as server:
        records(box)
        box.write("p.yaml", "m: {prompt: 10, cached: 1, completion: 100}\n")
        ended = box.fabe(*run(server, "--prices", "p.yaml"))
        assert ended.code == 0, ended
        assert "4000 prompt (3200 cached) and 400 completion tokens (240 reasoning)" in ended.out
        report = box.report()
        assert (report["cached_tokens"], report["reasoning_tokens"]) == (3200, 240)
        cost = (800 * 10 + 3200 * 1 + 400 * 100) / 1e6
        assert report["cost"] == pytest.approx(cost)


PRICES = re.compile(
    r"prices: (\S+) of (.+), (\S+) and (\S+) a million tokens of prompts and answers"
)


def test_published_prices_are_taken_by_name_and_said(box):
    with ModelServer(counted) as server:
        records(box)
        ended = box.fabe(*run(server, "--prices", "auto", model="gpt-5-mini"))
        assert ended.code == 0, ended
        (said,) = PRICES.findall(ended.err)
        assert said[:2] == ("gpt-5-mini", "OpenAI")
        prompt, answer = map(float, said[2:])
        assert re.search(r"genai-prices \d+\.\d+\.\d+, checked 20\d\d-\d\d-\d\d", ended.err)
        cost = box.report()["cost"]
        most = (4000 * prompt + 400 * answer) / 1e6
        # What was cached costs less.
        assert 400 * answer / 1e6 < cost < most


def test_a_tier_has_its_price_and_is_no_part_of_the_key(box):
    with ModelServer(counted) as server:
        records(box)
        more = ("--prices", "auto", "--service-tier", "flex")
        ended = box.fabe(*run(server, *more, model="gpt-5-mini"))
        assert ended.code == 0, ended
        assert {call.body["service_tier"] for call in server.calls} == {"flex"}
        flex = box.report()["cost"]
        assert box.fabe(*run(server, "--prices", "auto", model="gpt-5-mini")).code == 0
        assert len(server.calls) == 4
        box.fabe(*run(server, "--prices", "auto", "--no-resume", model="gpt-5-mini"))
        assert flex == pytest.approx(box.report()["cost"] / 2)
        assert "service_tier" not in server.calls[-1].body


def test_another_tier_than_was_asked_for_is_said_once(box):
    async def behave(call: Call) -> web.StreamResponse:
        text = answer_to(call.prompt)
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return web.json_response({"choices": [choice], "service_tier": "default"})

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*run(server, "--service-tier", "flex"))
        assert ended.code == 0
        assert ended.err.count("it answers in the tier default, not flex") == 1
        assert "tier" not in box.fabe(*run(server, "--service-tier", "auto", "--no-resume")).err


WRONG = {
    "a model that is in no list": (["--prices", "auto"], "nobody", "no price of 'nobody'"),
    "a tier that has no price": (
        ["--prices", "auto", "--service-tier", "gold"],
        "gpt-5-mini",
        "--service-tier gold",
    ),
    "a tier that the file lacks": (
        ["--prices", "p.yaml", "--service-tier", "flex"],
        "m",
        "no price of 'm' for --service-tier flex",
    ),
    "a file that is no YAML": (["--prices", "broken.yaml"], "m", "--prices broken.yaml:2"),
    "a folder": (["--prices", "."], "m", "--prices .: Is a directory"),
    "a cap without prices": (["--max-cost", "1"], "m", "--max-cost needs --prices"),
    "a blank tier": (["--service-tier", " "], "m", "--service-tier"),
    "a tier twice": (
        ["--service-tier", "flex", "--param", "service_tier=priority"],
        "m",
        "--service-tier and --param service_tier",
    ),
    "a tier of a batch": (["--service-tier", "flex", "--batch-api"], "m", "--service-tier and"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_price_is_refused(box, server, name):
    flags, model, said = WRONG[name]
    records(box)
    box.write("p.yaml", "m: {prompt: 1, completion: 2}\n")
    box.write("broken.yaml", "m: {prompt: 1,\n")
    ended = box.fabe(*run(server, *flags, model=model))
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not server.calls


FULL = {
    "OpenAI": error(429, "Resource Unavailable", code="resource_unavailable"),
    "Groq": error(498, "capacity exceeded", code="capacity_exceeded"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_tier_without_room_is_asked_again(box, name):
    seen = []

    async def behave(call: Call) -> web.StreamResponse | None:
        seen.append(call.prompt)
        full = FULL[name]
        if seen.count(call.prompt) == 1:
            return web.Response(status=full.status, body=full.body, content_type="application/json")
        return completion(call, answer_to(call.prompt))

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*run(server, "--service-tier", "flex"))
        assert ended.code == 0, ended
        assert len(seen) == 8


def test_patchy_room_costs_no_record_a_try(box):
    seen = []

    async def behave(call: Call) -> web.StreamResponse | None:
        seen.append(call.prompt)
        if call.prompt.endswith("= 2") and seen.count(call.prompt) <= 3:
            return error(429, "Resource Unavailable", code="resource_unavailable")
        return completion(call, answer_to(call.prompt))

    with ModelServer(behave) as server:
        records(box)
        ended = box.fabe(*run(server, "--service-tier", "flex", "--retry", 1))
        assert ended.code == 0, ended
        assert len(seen) == 7


def test_a_provider_without_tiers_refuses_them(box, server):
    records(box)
    ended = box.fabe(*run(server, "--provider", "ollama", "--service-tier", "flex"))
    assert ended.code == 2
    assert "--service-tier: ollama has none" in ended.err


def test_a_dry_run_estimates_what_is_left_to_send(box, server):
    box.lines("data.jsonl", [{"code": f"x = {i}\n" * 100} for i in range(40)])
    box.write("p.yaml", "m: {prompt: 1, completion: 10}\n")
    flags = ("--prices", "p.yaml", "--max-new-tokens", 50)
    dry = box.fabe(*run(server, *flags, "--dry-run"))
    found = re.search(
        r"about ([\d,]+) prompt tokens \((.+)\), at most 2,000 completion tokens; cost (\S+) at most",
        dry.out,
    )
    assert found, dry
    tokens = int(found[1].replace(",", ""))
    assert 40 * 400 < tokens < 40 * 700
    assert "o200k_base" in found[2]
    assert float(found[3]) == pytest.approx((tokens + 2000 * 10) / 1e6, rel=0.01)
    assert not server.calls
    box.fabe(*run(server, "--limit", 39, *flags))
    dry = box.fabe(*run(server, *flags, "--dry-run"))
    assert "at most 50 completion tokens" in dry.out, dry


def test_without_a_vocabulary_bytes_are_counted(box, server):
    box.write("hide/toktok.py", "raise ImportError\n")
    records(box)
    dry = box.fabe(*run(server, "--dry-run"), PYTHONPATH=str(box.path / "hide"), LC_ALL="C.UTF-8")
    assert "prompt tokens (4 bytes each" in dry.out, dry


def test_a_local_models_own_tokenizer_counts(box, tiny):
    records(box)
    dry = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "hf"),
        *("--model", tiny, "--dry-run"),
    )
    assert "(the model's own tokenizer)" in dry.out, dry
