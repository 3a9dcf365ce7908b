"""Parameters of the user's own: into requests, into keys, and out of them."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.test_all_formats import asking
from tests.support.server import Call, error

PARAMS = [
    (["--param", "top_k=5"], {"top_k": 5}),
    (["--param", "user=me"], {"user": "me"}),
    (["--param", 'user="5"'], {"user": "5"}),
    (["--param", "a.b.c=true", "--param", "a.d=[1]"], {"a": {"b": {"c": True}, "d": [1]}}),
    (["--extra-body", '{"a": {"b": 1}}', "--param", "a.c=2"], {"a": {"b": 1, "c": 2}}),
    (["--param", "max_tokens=7"], {"max_tokens": 7}),
    (["--param", "temperature=null"], {"temperature": None}),
    (["--temperature", "none"], {"temperature": None}),
    (["--temperature", "none", "--param", "top_k=5"], {"temperature": None, "top_k": 5}),
]


@pytest.mark.parametrize(("flags", "expected"), PARAMS)
def test_parameters_are_in_the_body_and_in_the_key(box, server, flags, expected):
    box.lines("d.jsonl", [{"code": "x"}])
    assert box.fabe(*asking(server, "d.jsonl")).code == 0
    before = server.calls[-1].body
    ended = box.fabe(*asking(server, "d.jsonl", *flags))
    assert ended.code == 0, ended
    body = dict(server.calls[-1].body)
    for name, value in expected.items():
        assert body.pop(name, None) == value
    assert body == {name: value for name, value in before.items() if name not in expected}
    assert len(server.calls) == 2
    for more in (flags, []):
        assert box.fabe(*asking(server, "d.jsonl", *more)).code == 0
    assert len(server.calls) == 2


def test_parameters_of_a_file_and_of_python(box, server):
    import fabe_ds

    box.lines("d.jsonl", [{"code": "x"}])
    box.write("how.yaml", "params:\n  a.b: 1\n  c: {d: null}\ntemperature: none\n")
    assert box.fabe(*asking(server, "d.jsonl", "--config", "how.yaml")).code == 0
    body = server.calls[-1].body
    assert body["a"] == {"b": 1}
    assert "temperature" not in body
    how = {"provider": "openai", "model": "m", "base_url": server.url, "instruction": "Up"}
    fabe_ds.run(
        input=str(box.path / "d.jsonl"),
        output=str(box.path / "out"),
        cache_dir=box.path / ".cache",
        params={"a": {"b": 1}, "c": {"d": None}, "temperature": None},
        progress=False,
        **how,
    )
    assert len(server.calls) == 1


def test_ollama_takes_its_own(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    run = ("run", "--input", "d.jsonl", "--provider", "ollama", "--model", "llama3")
    more = ("--param", "options.num_ctx=8192", "--param", "think=false")
    assert box.fabe(*run, "--base-url", server.root, "--instruction", "Up", *more).code == 0
    body = server.calls[-1].body
    assert body["options"]["num_ctx"] == 8192
    assert body["options"]["num_predict"] == 128
    assert body["think"] is False


def test_a_parameter_that_the_user_asked_for_and_the_server_refuses_stops(box, server):
    async def refusing(call: Call):
        if "top_k" in call.body:
            return error(400, "Unsupported parameter: 'top_k'", code="unsupported_parameter")
        return None

    server.behaviour = refusing
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(30)])
    run = asking(server, "d.jsonl", "--param", "top_k=5", "--concurrency", 1)
    ended = box.fabe(*run)
    assert ended.code == 1
    assert "does not take the parameter top_k" in ended.err
    assert len(server.calls) == 1


def test_headers_are_sent_and_never_written(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    more = ("--header", "X-Team=red", "--header", "X-Secret=env:MY_SECRET")
    run = asking(server, "d.jsonl", *more, "--log-level", "debug")
    ended = box.fabe(*run, MY_SECRET="hush-hush")
    assert ended.code == 0, ended
    headers = server.calls[-1].headers
    assert headers["X-Team"] == "red"
    assert headers["X-Secret"] == "hush-hush"
    assert box.fabe(*asking(server, "d.jsonl")).code == 0  # the key is the same
    assert len(server.calls) == 1
    everything = ended.out + ended.err
    for path in box.path.rglob("*"):
        if path.is_file():
            everything += path.read_bytes().decode("latin-1")
    assert "hush-hush" not in everything
    missing = box.fabe(*run)
    assert missing.code == 2
    assert "MY_SECRET is not in the environment" in missing.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--param", "top_k"], "name=value"),
        (["--param", ".a=1"], "empty step"),
        (["--extra-body", "[1]"], "a JSON object"),
        (["--extra-body", "{"], "not JSON"),
        (["--header", "X"], "name=value"),
        (["--header", "X Y=1"], "not a header"),
    ],
)
def test_what_is_no_parameter_is_one_line(box, server, flags, said):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(*asking(server, "d.jsonl", *flags))
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_local_model_takes_generation_settings_and_template_variables(box, tiny):
    template = "{{ bos_token }}{% if loud %}LOUD {% endif %}{{ messages[-1]['content'] }}"
    box.write("t.j2", template)
    box.lines("d.jsonl", [{"code": "fox of the"}])
    run = ("run", "--input", "d.jsonl", "--provider", "hf", "--model", tiny, "--instruction", "Up")
    more = ("--max-new-tokens", 8, "--on-truncated", "keep", "--chat-template", "t.j2")
    loud = ("--param", "chat_template_kwargs.loud=true", "--param", "repetition_penalty=5.0")
    plain, other = (box.fabe(*run, *more, *flags, "--dry-run") for flags in ((), loud))
    assert "LOUD" not in plain.out
    assert "LOUD You are" in other.out
    assert "repetition_penalty" in other.out
    assert box.fabe(*run, *more, *loud).code == 0
    wrong = box.fabe(*run, *more, "--param", "toq_k=1")
    assert wrong.code in (1, 2)
    assert "--param toq_k" in wrong.err
    assert json.loads((box.path / "outputs.run.json").read_text())["config"]["params"] == {
        "chat_template_kwargs": {"loud": True},
        "repetition_penalty": 5.0,
    }
