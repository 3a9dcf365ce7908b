"""openai and ollama: what is sent and what is read, over real sockets; and a real server."""

from __future__ import annotations

import json

import pytest

from fabe_ds.errors import MalformedResponse, RecordFailed
from fabe_ds.providers import Endpoint, Request, Sampling
from fabe_ds.providers.ollama import OllamaProvider
from fabe_ds.providers.openai import OpenAIProvider
from tests.support.server import ModelServer

SAMPLING = Sampling(64, 0.5, 0.9, None, 7, ("END",))


def request(sampling=SAMPLING, chat=True, system="sys", sample=0):
    return Request("x", "Do\n\nx", system, sampling, chat, "python", sample)


TURNS = [{"role": "system", "content": "sys"}, {"role": "user", "content": "Do\n\nx"}]


def test_the_body_of_an_openai_request():
    provider = OpenAIProvider(Endpoint("m", "http://h/v1"))
    body = {"max_tokens": 64, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["END"]}
    assert provider.body(request()) == {"model": "m", "messages": TURNS, **body}
    assert provider.body(request(chat=False)) == {"model": "m", "prompt": "sys\n\nDo\n\nx", **body}
    assert provider.path(request(chat=False)) == "/completions"
    greedy = provider.body(request(Sampling(5), system=None))
    assert greedy == {"model": "m", "messages": TURNS[1:], "max_tokens": 5, "temperature": 0.0}
    assert "max_completion_tokens" in OpenAIProvider(Endpoint("m")).body(request())


def test_the_body_of_an_ollama_request():
    provider = OllamaProvider(Endpoint("m"))
    options = {"num_predict": 64, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["END"]}
    common = {"model": "m", "stream": False, "options": options}
    assert provider.body(request()) == {**common, "messages": TURNS, "truncate": False}
    assert provider.body(request(chat=False)) == {
        **common,
        "prompt": "sys\n\nDo\n\nx",
        "raw": True,
    }
    assert provider.path(request(chat=False)) == "/api/generate"


def choice(**message):
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (choice(content="hi"), "hi"),
        (choice(content=None), ""),
        (choice(content=None, tool_calls=[{}]), ""),
        (choice(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab"),
        (choice(content="hi", reasoning_content="hm"), "hi"),
        (choice(content="", reasoning="hm"), ""),
        ({"choices": [{"text": "hi", "finish_reason": "stop"}]}, "hi"),
    ],
)
def test_openai_answers(payload, text):
    assert OpenAIProvider(Endpoint("m")).completion(payload).text == text


@pytest.mark.parametrize("payload", [{}, {"choices": []}, {"choices": [1]}, {"choices": None}])
def test_openai_answers_without_a_choice_are_malformed(payload):
    with pytest.raises(MalformedResponse):
        OpenAIProvider(Endpoint("m")).completion(payload)


def test_a_refusal_is_no_answer():
    with pytest.raises(RecordFailed, match="I cannot"):
        OpenAIProvider(Endpoint("m")).completion(choice(content=None, refusal="I cannot"))


@pytest.mark.parametrize(
    "payload", [{}, {"message": {}}, {"message": {"content": "x"}, "done": False}, {"response": 1}]
)
def test_ollama_answers_without_a_message_are_malformed(payload):
    with pytest.raises(MalformedResponse):
        OllamaProvider(Endpoint("m")).completion(payload)


def test_the_key_of_a_request_is_what_is_sent_and_nothing_else():
    def key(asked=None, endpoint=None, api_key=None):
        return OpenAIProvider(endpoint or Endpoint("m", "http://h/v1"), api_key).key(
            asked or request()
        )

    assert key() == key(api_key="sk-1")
    assert key() == key(endpoint=Endpoint("m", "http://h/v1/", device="cuda", batch_size=99))
    assert key() == key(endpoint=Endpoint("m", "http://user:secret@h/v1"))
    others = [
        key(request(sample=1)),
        key(request(chat=False)),
        key(request(system="other")),
        key(request(Sampling(65, 0.5, 0.9, None, 7, ("END",)))),
        key(endpoint=Endpoint("n", "http://h/v1")),
        key(endpoint=Endpoint("m", "http://other/v1")),
    ]
    assert len({key(), *others}) == len(others) + 1


def common(server: ModelServer, provider: str) -> list[str]:
    url = server.url if provider == "openai" else server.root
    return [
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Up",
        "--provider",
        provider,
        "--base-url",
        url,
    ]


@pytest.mark.parametrize("chat", ["true", "false"])
@pytest.mark.parametrize(("provider", "model"), [("openai", "m"), ("ollama", "llama3")])
def test_every_record_is_rewritten(box, server, provider, model, chat):
    box.lines("data.jsonl", [{"code": f"print({i})", "n": i} for i in range(50)])
    ended = box.fabe(*common(server, provider), "--model", model, "--use-chat-template", chat)
    assert ended.code == 0
    assert box.read("outputs/data.jsonl") == [
        {"code": f"PRINT({i})", "original_code": f"print({i})", "n": i} for i in range(50)
    ]
    paths = {
        ("openai", "true"): "/v1/chat/completions",
        ("openai", "false"): "/v1/completions",
        ("ollama", "true"): "/api/chat",
        ("ollama", "false"): "/api/generate",
    }
    assert {call.path for call in server.calls} == {paths[provider, chat]}
    assert len(server.calls) == 50
    assert box.report()["completion_tokens"] == 50


@pytest.mark.parametrize(
    ("provider", "model", "says"),
    [
        ("openai", "m", "no server answers there"),
        ("ollama", "m", "no Ollama server answers there; start it with `ollama serve`"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(box, provider, model, says):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe(
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Up",
        "--provider",
        provider,
        "--model",
        model,
        "--base-url",
        "http://127.0.0.1:9",
    )
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert says in ended.err
    assert not (box.path / "outputs").exists()


def test_a_broken_tls_is_one_line(box, server):
    box.lines("data.jsonl", [{"code": "x"}])
    url = server.url.replace("http:", "https:")
    ended = box.fabe(
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Up",
        "--provider",
        "openai",
        "--model",
        "m",
        "--base-url",
        url,
    )
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "certificate is not accepted" in ended.err


def test_ollama_says_which_model_to_pull(box, server):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe(*common(server, "ollama"), "--model", "absent:7b")
    assert ended.code == 1
    assert "ollama pull absent:7b" in ended.err
    assert not server.calls


@pytest.mark.parametrize("given", ["flag", "environment", "wrong"])
def test_the_key_is_sent_and_appears_nowhere(box, server, given):
    key = "sk-canary-1234567"
    server.key = key
    box.lines("data.jsonl", [{"code": "x"}])
    flags = {"flag": ["--api-key", key], "wrong": ["--api-key", f"{key}-wrong"]}.get(given, [])
    environment = {"OPENAI_API_KEY": key} if given == "environment" else {}
    ended = box.fabe(
        *common(server, "openai"), "--model", "m", "--log-level", "DEBUG", *flags, **environment
    )
    assert ended.code == (1 if given == "wrong" else 0)
    if given == "wrong":
        assert "the key is not accepted (401)" in ended.err
    assert key not in ended.out + ended.err
    for path in box.path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_real_server(box, llama_server):
    box.lines("data.jsonl", [{"code": f"def f{i}(a):\n  return a+{i}"} for i in range(6)])
    ended = box.fabe(
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Add a docstring.",
        "--provider",
        "openai",
        "--model",
        "smollm2",
        "--base-url",
        llama_server,
        "--max-new-tokens",
        48,
        "--on-truncated",
        "keep",
    )
    assert ended.code == 0, ended
    records = box.read("outputs/data.jsonl")
    assert [r["original_code"] for r in records] == [
        f"def f{i}(a):\n  return a+{i}" for i in range(6)
    ]
    assert all(r["code"].strip() for r in records)
    assert any(r["code"] != r["original_code"] for r in records)
    report = json.loads((box.path / "outputs.run.json").read_text())
    assert report["requests"] == 6
    assert report["completion_tokens"] > 0


@pytest.mark.slow
def test_a_real_servers_complaint_fails_that_record_alone(box, llama_server):
    box.lines("data.jsonl", [{"code": "x = 1"}, {"code": "word " * 4000}, {"code": "y = 2"}])
    ended = box.fabe(
        "run",
        "--input",
        "data.jsonl",
        "--instruction",
        "Repeat.",
        "--provider",
        "openai",
        "--model",
        "smollm2",
        "--base-url",
        llama_server,
        "--max-new-tokens",
        8,
        "--on-truncated",
        "keep",
    )
    assert ended.code == 1
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["line"], failure["failure"]) == (1, 2, "context")
    assert "original_code" not in box.read("outputs/data.jsonl")[1]
