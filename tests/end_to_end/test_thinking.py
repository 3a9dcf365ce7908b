"""--thinking: told to each server in its own way, under one key."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from fabe_ds.providers import Endpoint, Request, Sampling
from fabe_ds.providers.dialects import DIALECTS, dialect_of_host
from fabe_ds.providers.openai import OpenAIProvider
from tests.end_to_end.test_all_formats import asking
from tests.support.server import Call, ModelServer, completion, error

TABLE = {
    ("openai", "off"): {"reasoning_effort": "none"},
    ("openai", "on"): {"reasoning_effort": "medium"},
    ("openai", "low"): {"reasoning_effort": "low"},
    ("vllm", "off"): {"chat_template_kwargs": {"enable_thinking": False}},
    ("sglang", "on"): {"chat_template_kwargs": {"enable_thinking": True}},
    ("llamacpp", "off"): {"chat_template_kwargs": {"enable_thinking": False}},
    ("vllm", "high"): {
        "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "high"},
        "reasoning_effort": "high",
    },
    ("ollama", "off"): {"reasoning_effort": "none"},
    ("dashscope", "off"): {"enable_thinking": False},
    ("siliconflow", "on"): {"enable_thinking": True},
    ("deepseek", "off"): {"thinking": {"type": "disabled"}},
    ("zhipu", "on"): {"thinking": {"type": "enabled"}},
    ("moonshot", "off"): {"thinking": {"type": "disabled"}},
    ("volcengine", "off"): {"thinking": {"type": "disabled"}},
    ("openrouter", "off"): {"reasoning": {"enabled": False}},
    ("openrouter", "high"): {"reasoning": {"effort": "high"}},
}
HOSTS = {
    "https://api.openai.com/v1": "openai",
    "https://r.openai.azure.com/openai/v1": "openai",
    "https://dashscope-intl.aliyuncs.com/compatible-mode/v1": "dashscope",
    "https://api-inference.modelscope.cn/v1": "dashscope",
    "https://api.siliconflow.cn/v1": "siliconflow",
    "https://api.deepseek.com": "deepseek",
    "https://open.bigmodel.cn/api/paas/v4": "zhipu",
    "https://api.z.ai/api/paas/v4": "zhipu",
    "https://api.moonshot.ai/v1": "moonshot",
    "https://ark.cn-beijing.volces.com/api/v3": "volcengine",
    "https://openrouter.ai/api/v1": "openrouter",
    "http://notopenrouter.ai/v1": None,
    "http://localhost:8000/v1": None,
}


def test_every_dialect_is_in_the_table():
    assert {name for name, _ in TABLE} == set(DIALECTS)


@pytest.mark.parametrize(("name", "level"), TABLE)
def test_a_server_is_told_in_its_own_dialect(box, server, name, level):
    box.lines("d.jsonl", [{"code": "x"}])
    run = asking(server, "d.jsonl", "--thinking", level, "--max-new-tokens", 512)
    ended = box.fabe(*run, "--dialect", name)
    assert ended.code == 0, ended
    body = server.calls[-1].body
    expected = TABLE[name, level]
    assert {key: body[key] for key in expected} == expected
    for other in DIALECTS:  # moved to another server, it is the same request
        if other != name and level in ("on", "off"):
            assert box.fabe(*run, "--dialect", other).code == 0
            break
    assert len(server.calls) == 1


@pytest.mark.parametrize("url", HOSTS)
def test_a_public_server_is_known_by_its_address(url):
    provider = OpenAIProvider(Endpoint("m", base_url=url, thinking="off"))
    assert dialect_of_host(provider.address.host) == HOSTS[url]


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "library"])
def test_other_servers_are_known_by_what_they_say_of_themselves(box, owner):
    class Owned(ModelServer):
        async def _list_openai(self, request: web.Request) -> web.Response:
            return web.json_response({"data": [{"id": "m", "owned_by": owner}]})

    box.lines("d.jsonl", [{"code": "x"}])
    with Owned() as server:
        run = asking(server, "d.jsonl", "--thinking", "off")
        assert box.fabe(*run).code == 0
        body = server.calls[-1].body
        assert "chat_template_kwargs" in body or body["reasoning_effort"] == "none"


def test_a_server_that_is_not_known_is_one_line(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(*asking(server, "d.jsonl", "--thinking", "off"))
    assert ended.code == 1
    assert "--dialect" in ended.err
    assert server.calls == []
    wrong = box.fabe(*asking(server, "d.jsonl", "--dialect", "klingon"))
    assert wrong.code == 2
    assert "no such dialect" in wrong.err


def test_a_server_that_refuses_is_one_line(box, server):
    async def refusing(call: Call):
        if "chat_template_kwargs" in call.body:
            return error(400, "Unrecognized request argument supplied: chat_template_kwargs")
        return completion(call, "NEW")

    server.behaviour = refusing
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(5)])
    run = asking(server, "d.jsonl", "--thinking", "off", "--dialect", "vllm", "--concurrency", 1)
    ended = box.fabe(*run)
    assert ended.code == 1
    assert "does not take the parameter chat_template_kwargs" in ended.err
    assert len(server.calls) == 1


def test_ollama_is_told_by_think(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    how = ("--provider", "ollama", "--model", "llama3", "--base-url", server.root)
    for level, expected in (("off", False), ("on", True), ("low", "low")):
        run = ("run", "--input", "d.jsonl", "--instruction", "Up", *how, "--thinking", level)
        assert box.fabe(*run).code == 0
        assert server.calls[-1].body["think"] == expected


def test_answers_that_will_be_cut_are_told_of_before(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    run = asking(server, "d.jsonl", "--thinking", "on", "--dialect", "vllm")
    assert "--max-new-tokens 4096" in box.fabe(*run).err
    assert "4096" not in box.fabe(*run, "--max-new-tokens", 512).err


def test_a_dry_run_shows_the_servers_own_words(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    run = asking(server, "d.jsonl", "--thinking", "off", "--dry-run")
    assert '"enable_thinking": false' in box.fabe(*run, "--dialect", "vllm").out
    assert "fabe_ds.thinking" not in box.fabe(*run).out


def test_a_level_is_a_variable_of_a_local_template(tiny):
    from fabe_ds.errors import UsageError
    from fabe_ds.providers.transformers.hf import HFProvider

    template = "{{ bos_token }}{{ reasoning_effort }} {{ messages[0]['content'] }}"
    request = Request("x", "x", None, Sampling(4))
    bodies = []
    for level in ("low", "high", "off"):
        model = HFProvider(Endpoint(str(tiny), chat_template=template, thinking=level))
        bodies.append(json.dumps(model.body(request)))
        expected = {"off": "none"}.get(level, level)
        assert model.tokenizer.decode(model.prompt_ids(request)).endswith(f"{expected} x")
    assert len(set(bodies)) == 3
    plain = HFProvider(
        Endpoint(str(tiny), chat_template="{{ messages[0]['content'] }}", thinking="low")
    )
    with pytest.raises(UsageError, match="knows no reasoning_effort"):
        plain.prompt_ids(request)
