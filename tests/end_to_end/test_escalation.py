"""Records whose answer is no good, asked of other models (--fallback-model)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from aiohttp import web

from tests.conftest import wait_for
from tests.support.server import Call, ModelServer, answer_to, completion, error, openai_run

N = 12


def small_model(call: Call) -> web.Response:
    """Fails in a way of its own for every other record."""
    number = int(call.prompt.rsplit("= ", 1)[-1]) if "= " in call.prompt else 0
    kinds = {
        1: completion(call, "X =", "length"),
        3: completion(call, ""),
        5: completion(call, None, refusal="I cannot"),
        7: completion(call, "X = 7", "odd"),
        9: error(400, "flagged", code="content_filter"),
        11: completion(call, "def f(:"),
    }
    return kinds.get(number) or completion(call, answer_to(call.prompt))


async def by_model(call: Call) -> web.StreamResponse | None:
    if call.body["model"] == "small":
        return small_model(call)
    return completion(call, f"Y = '{call.body['model']}'")


@pytest.fixture
def models():
    with ModelServer(by_model) as running:
        running.models = ["small", "middle", "big"]
        yield running


def run(server, *more):
    words = openai_run(server, "--validate", "python-syntax", *more)
    words[words.index("--model") + 1] = "small"
    return words


def records(box, count=N):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


def codes(box):
    return [record["code"] for record in box.read("outputs/data.jsonl")]


EXPECTED = [f"X = {i}" if i % 2 == 0 else "Y = 'big'" for i in range(N)]


def sent(server):
    return Counter(call.body["model"] for call in server.calls)


def test_what_is_no_good_goes_to_the_next_model_alone(box, models):
    records(box)
    ended = box.fabe(*run(models, "--fallback-model", "big", "--status-field", "state"))
    assert ended.code == 0, ended
    assert codes(box) == EXPECTED
    # The one that failed its check was asked again twice before.
    assert sent(models) == {"small": N + 2, "big": 6}
    asked = [call.prompt for call in models.calls if call.body["model"] == "big"]
    assert all(len(call.body["messages"]) == 2 for call in models.calls[-6:]), asked
    states = [record["state"] for record in box.read("outputs/data.jsonl")]
    assert [state["model"] for state in states] == ["small", "big"] * 6
    assert {state["state"] for state in states} == {"done"}
    assert box.report()["answered_by"] == {"small": 6, "big": 6}
    assert "answered by: small 6, big 6" in ended.out
    assert f"{N} records: {N} rewritten" in ended.out
    before = len(models.calls)
    ended = box.fabe(*run(models, "--fallback-model", "big", "--status-field", "state"))
    assert ended.code == 0
    assert len(models.calls) == before
    again = box.fabe(*run(models, "--fallback-model", "big"))
    assert again.code == 0, again
    assert codes(box) == EXPECTED
    # Of another job, what was refused, and so not kept, is asked about once more.
    assert len(models.calls) - before == 2
    assert sent(models)["big"] == 6


def test_models_are_asked_in_their_order_and_the_last_ones_failure_counts(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        model = call.body["model"]
        if model == "small" or (model == "middle" and call.prompt.endswith(("1", "2"))):
            return completion(call, "cut", "length")
        if model == "big" and call.prompt.endswith("2"):
            return completion(call, "also cut", "length")
        return completion(call, f"of {model}")

    with ModelServer(behave) as server:
        server.models = ["small", "middle", "big"]
        records(box, 3)
        more = ("--fallback-model", "middle", "--fallback-model", "big", "--status-field", "state")
        command = run(server, *more)
        at = command.index("--validate")
        del command[at : at + 2]
        ended = box.fabe(*command)
        assert ended.code == 1
        got = box.read("outputs/data.jsonl")
        assert [record["code"] for record in got] == ["of middle", "of big", "x = 2"]
        assert [record["state"]["model"] for record in got] == ["middle", "big", "big"]
        (failure,) = box.read("outputs.failures.jsonl")
        assert (failure["record"], failure["failure"], failure["model"]) == (2, "truncated", "big")
        assert box.report()["failures_by_kind"] == {"truncated": 1}


def test_faults_on_the_way_ask_no_other_model(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if call.prompt.endswith("3"):
            return error(500, "oops")
        if call.prompt.endswith("4"):
            return error(400, "no such thing")
        return None

    with ModelServer(behave) as server:
        server.models = ["small", "big"]
        records(box, 6)
        ended = box.fabe(*run(server, "--fallback-model", "big", "--retry", 1))
        assert ended.code == 1
        assert set(sent(server)) == {"small"}
        assert box.report()["failed"] == 2


def test_another_address_has_its_own_key_and_the_runs_stays_at_home(box):
    with ModelServer(by_model) as home, ModelServer(by_model) as away:
        home.key, away.key = "k-home", "k-away"
        home.models, away.models = ["small"], ["big"]
        records(box)
        where = f"big@{away.url}"
        keys = {"OPENAI_API_KEY": "k-home", "FALLBACK_API_KEY": "k-away"}
        ended = box.fabe(*run(home, "--fallback-model", where), **keys)
        assert ended.code == 0, ended
        assert codes(box) == EXPECTED
        assert sent(home) == {"small": N + 2}
        assert sent(away) == {"big": 6}
        told = json.dumps(box.report())
        assert "k-away" not in told
        assert "k-home" not in told
        assert "k-away" not in ended.err + ended.out


def test_a_password_in_an_address_is_not_written_down(box, models):
    records(box)
    where = models.url.replace("http://", "http://user:hush@")
    ended = box.fabe(*run(models, "--fallback-model", f"big@{where}"))
    assert ended.code == 0, ended
    assert codes(box) == EXPECTED
    assert "hush" not in ended.err + ended.out
    written = [path for path in box.path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not [path for path in written if b"hush" in path.read_bytes()]


@pytest.mark.parametrize("where", ["gone", "no /v1"])
def test_a_fallback_that_is_not_there_is_said_before_anything_is_spent(box, models, where):
    with ModelServer() as other:
        root = other.root
        if where == "no /v1":
            records(box)
            ended = box.fabe(*run(models, "--fallback-model", f"big@{root}"))
            assert f"--base-url {other.url}" in ended.err
    if where == "gone":
        records(box)
        ended = box.fabe(*run(models, "--fallback-model", f"big@{root}/v1"))
        assert "no server answers there" in ended.err
    assert ended.code == 1
    assert not models.calls
    # With all answers there, nobody has to be.
    assert box.fabe(*run(models)).code == 1
    before = len(models.calls)
    ended = box.fabe(*run(models, "--fallback-model", f"big@{root}/v1", "--offline"))
    assert "no server answers" not in ended.err
    assert len(models.calls) == before


def test_a_model_here_turns_to_a_server(box, talkative):
    # Its answers are always cut.
    with ModelServer(by_model) as away:
        records(box, 4)
        ended = box.fabe(
            *("run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "hf"),
            *("--model", talkative, "--max-new-tokens", 4, "--no-use-chat-template"),
            *("--fallback-model", f"big@{away.url}"),
        )
        assert ended.code == 0, ended
        assert codes(box) == ["Y = 'big'"] * 4


def test_a_run_of_nothing_but_bad_answers_goes_on_with_the_next_model(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        small = call.body["model"] == "small"
        return completion(call, "cut", "length") if small else completion(call, "Y = 1")

    with ModelServer(behave) as server:
        server.models = ["small", "big"]
        records(box, 60)
        ended = box.fabe(*run(server, "--fallback-model", "big", "--concurrency", 8))
        assert ended.code == 0, ended
        assert codes(box) == ["Y = 1"] * 60


def test_caps_count_all_models_each_at_its_price(box, models):
    records(box)
    box.write("p.yaml", "small: {prompt: 0, completion: 1}\nbig: {prompt: 0, completion: 1000}\n")
    more = ("--fallback-model", "big", "--prices", "p.yaml")
    ended = box.fabe(*run(models, *more))
    assert ended.code == 0, ended
    cost = box.report()["cost"]
    # 3 tokens of each answer of the big one, and a few of the small one's.
    assert 6 * 3 * 1000 / 1e6 < cost < 6 * 3 * 1000 / 1e6 * 1.02
    capped = box.fabe(*run(models, *more, "--no-resume", "--max-requests", N + 4))
    assert capped.code == 1
    assert "--max-requests" in capped.err
    box.write("p.yaml", "small: {prompt: 0, completion: 1}\n")
    ended = box.fabe(*run(models, *more, "--dry-run"))
    assert ended.code == 2
    assert "no price of 'big'" in ended.err


def test_a_dry_run_knows_what_the_next_model_would_be_asked(box, models):
    records(box)
    assert box.fabe(*run(models)).code == 1
    dry = box.fabe(*run(models, "--dry-run"))
    assert "6 answered already" in dry.out
    dry = box.fabe(*run(models, "--fallback-model", "big", "--dry-run"))
    assert "6 answered already\n" in dry.out, dry
    before = len(models.calls)
    assert box.fabe(*run(models, "--fallback-model", "big")).code == 0
    assert len(models.calls) - before == 6 + 2  # and what was refused
    dry = box.fabe(*run(models, "--fallback-model", "big", "--dry-run"))
    assert "10 answered already" in dry.out, dry


MAPPED = """
import sys, json, datasets, fabe_ds
if __name__ == "__main__":
    data = datasets.Dataset.from_list([{"code": f"x = {i}"} for i in range(12)])
    fn = fabe_ds.transform_fn(field="code", instruction="Up", provider="openai", model="small",
                              base_url=sys.argv[1], cache_dir=sys.argv[2],
                              validate_with="python-syntax", fallback_models="big",
                              status_field="state")
    data = data.map(fn, batched=True, batch_size=6, num_proc=int(sys.argv[3]) or None)
    print(json.dumps([data["code"][:], [state["model"] for state in data["state"]]]))
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_a_map_turns_to_them_too(tmp_path, models, processes):
    command = [sys.executable, "-c", MAPPED, models.url, str(tmp_path / "c"), str(processes)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended
    assert json.loads(ended.stdout.splitlines()[-1]) == [EXPECTED, ["small", "big"] * 6]


def test_a_killed_run_pays_neither_model_twice(box):
    async def slow(call: Call) -> web.StreamResponse | None:
        return await by_model(call)

    with ModelServer(slow, latency=0.05) as server:
        server.models = ["small", "big"]
        box.lines("data.jsonl", [{"code": f"x{i} = {i % 2}"} for i in range(600)])
        command = run(server, "--fallback-model", "big", "--concurrency", 8)
        process = box.start(*command)
        wait_for(lambda: sent(server)["big"] > 20)
        box.kill(process)
        assert box.fabe(*command).code == 0
        twice = {
            key: count
            for key, count in Counter(
                (call.body["model"], call.prompt) for call in server.calls
            ).items()
            if count > 1
        }
        assert len(twice) <= 16
        assert sum(1 for code in codes(box) if code == "Y = 'big'") == 300


def test_sampled_answers_that_were_passed_on_are_not_paid_for_again(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        small = call.body["model"] == "small"
        return completion(call, "cut", "length") if small else completion(call, "Y = 1")

    with ModelServer(behave) as server:
        server.models = ["small", "big"]
        records(box, 10)
        command = run(server, "--fallback-model", "big", "--temperature", 1)
        assert box.fabe(*command).code == 0
        assert sent(server) == {"small": 10, "big": 10}
        # Another job over the same answers.
        assert box.fabe(*command, "--backup-field", "was").code == 0
        assert sent(server) == {"small": 10, "big": 10}


@pytest.mark.parametrize(
    "wrong",
    ["", " ", "f@", "f@ftp://x", "f@http://", "f@127.0.0.1:9/v1", "@http://h/v1", "small"],
)
def test_what_is_no_fallback_model_is_said_at_once(box, models, wrong):
    records(box)
    ended = box.fabe(*run(models, "--fallback-model", wrong))
    assert ended.code == 2, ended
    assert ended.err.startswith("fabe-ds: --fallback-model")
    assert not models.calls
