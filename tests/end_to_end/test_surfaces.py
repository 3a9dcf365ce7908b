"""preview, init and doctor, as a person starts them."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.support.server import ModelServer, completion, openai_run


def preview(server, *more):
    return ["preview", *openai_run(server)[1:], *more]


def test_a_preview_shows_before_and_after_and_counts(box, server):
    box.lines("data.jsonl", [{"code": f"x = {i}\ny"} for i in range(50)])
    ended = box.fabe(*preview(server, "-n", 3))
    assert ended.code == 0, ended.err
    assert len(server.calls) == 3
    assert "--- record 1: done, " in ended.out
    assert "- x = 0\n- y\n+ X = 0\n+ Y\n" in ended.out
    assert "3 records in " in ended.out
    assert "50 in all, 50 were to be asked for" in ended.out
    assert re.search(r"whole run: about \d\S* m?s \(\d.* to \d.*\)", ended.out)
    assert not (box.path / "outputs").exists()
    run = box.fabe(*openai_run(server))
    assert "47 rewritten, 3 from cache" in run.out
    assert len(server.calls) == 50


def test_the_estimates_are_of_what_is_left(box):
    async def behave(call):
        return completion(call, "one two three four")

    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(100)])
    box.write("prices.yaml", "m: {prompt: 1000000, completion: 2000000}")
    with ModelServer(behave) as server:
        ended = box.fabe(*preview(server, "-n", 4, "--prices", "prices.yaml"))
        prompt = len(server.calls[0].prompt.split())
        assert f"whole run: about {100 * prompt} prompt tokens" in ended.out.replace(",", "")
        assert "whole run: about 400 completion tokens\n" in ended.out
        cost = 100 * (prompt + 8)
        assert f"whole run: about {cost} cost" in ended.out.replace(",", "")
        again = box.fabe(*preview(server, "-n", 4))
    assert "4 records" in again.out
    assert "--- record 1: from cache" in again.out
    assert "100 in all, 96 were to be asked for" in again.out
    assert "384 completion tokens" in again.out


def test_a_preview_shows_what_failed(box):
    async def behave(call):
        return completion(call, "")

    box.lines("data.jsonl", [{"code": "x"}])
    with ModelServer(behave) as server:
        ended = box.fabe(*preview(server))
    assert "empty" in ended.out
    assert "+" not in ended.out


def test_a_preview_of_nothing(box, server):
    box.lines("data.jsonl", [{"code": ""}])
    ended = box.fabe(*preview(server))
    assert ended.code == 0
    assert "0 records in" in ended.out


@pytest.mark.parametrize("provider", ["echo", "openai", "ollama", "hf", "modelscope"])
def test_init_writes_a_configuration_that_works(box, provider):
    ended = box.fabe("init", "project", "--provider", provider)
    assert ended.code == 0, ended.err
    config = yaml.safe_load((box.path / "project/fabe-ds.yaml").read_text())
    assert config["provider"] == provider
    box.lines("project/data.jsonl", [{"code": "x = 1"}])
    if provider == "echo":
        run = box.fabe("run", "--config", "project/fabe-ds.yaml")
        assert run.code == 0, run.err
        assert box.read("project/outputs/data.jsonl")[0]["original_code"] == "x = 1"
    elif provider in ("openai", "ollama"):
        shown = box.fabe("run", "--config", "project/fabe-ds.yaml", "--dry-run")
        assert shown.code == 0, shown.err
        assert "easier to read" in shown.out


def test_init_replaces_nothing_unasked(box):
    assert box.fabe("init").code == 0
    box.write("prompt.j2", "mine")
    again = box.fabe("init")
    assert (again.code, again.err) == (
        2,
        "fabe-ds: fabe-ds.yaml: is there already; --force replaces it\n",
    )
    assert (box.path / "prompt.j2").read_text() == "mine"
    assert box.fabe("init", "--force").code == 0
    assert box.fabe("init", "--provider", "opnai", "--force").code == 2


def test_the_doctor(box, server):
    ended = box.fabe("doctor", "--base-url", server.url, OPENAI_API_KEY="sk-secret")
    assert ended.code == 0, ended.out
    assert re.search(r"ok +transformers +5", ended.out)
    assert re.search(r"ok +--base-url +http.*/v1/models answers 200", ended.out)
    assert re.search(r"ok +OPENAI_API_KEY +set", ended.out)
    assert "sk-secret" not in ended.out
    gone = box.fabe("doctor", "--base-url", "http://127.0.0.1:1/v1")
    assert gone.code == 1
    assert "bad   --base-url         nothing answers at http://127.0.0.1:1/v1/models" in gone.out


def test_a_preview_counts_equal_requests_once(box, server):
    box.lines("data.jsonl", [{"code": f"x = {i % 4}"} for i in range(100)])
    ended = box.fabe(*preview(server, "-n", 2))
    assert "100 in all, 4 were to be asked for" in ended.out
    assert "whole run: about 12 completion tokens" in ended.out
    dry = box.fabe(*openai_run(server, "--dry-run"))
    assert "100 to do, of them 50 answered already, 2 to send" in dry.out


def test_a_preview_stopped_by_a_cap_shows_what_it_has(box, server):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(100)])
    ended = box.fabe(*preview(server, "-n", 5, "--max-requests", 2))
    assert ended.code == 1
    assert "2 records in " in ended.out
    assert "+ X = 1" in ended.out
    assert "the budget is used up" in ended.err


def test_a_preview_sends_so_it_is_no_dry_run(box, server):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe(*preview(server), DRY_RUN="1")
    assert ended.code == 2
    assert not server.calls


def test_a_long_record_is_soon_shown(box, server):
    text = "\n".join(f"line {i % 50} of {i % 7}" for i in range(10_000))
    box.lines("data.jsonl", [{"code": text}])
    ended = box.fabe(*preview(server), timeout=30)
    assert ended.code == 0
    assert " more lines" in ended.out
    assert len(ended.out) < 10_000


@pytest.mark.parametrize(
    ("path", "said"), [("", "answers 404: does it end in /v1?"), ("/v1", None)]
)
def test_the_doctor_sees_a_wrong_address(box, server, path, said):
    address = server.root.replace("http://", "http://me:secret@") + path
    ended = box.fabe("doctor", "--base-url", address)
    assert ended.code == (1 if said else 0)
    assert (said or "answers 200") in ended.out
    assert "secret" not in ended.out


def test_init_where_it_cannot_write(box):
    box.write("file", "")
    for place in ("file", "file/below"):
        ended = box.fabe("init", place)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
