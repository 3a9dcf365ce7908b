"""Pushing to a Hub, and reading from one, over HTTP."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import fabe_ds
from tests.support.hub import Hub
from tests.support.scope import TOKEN, Scope
from tests.support.server import ModelServer, completion, error, openai_run

FABE = Path(sys.executable).with_name("fabe-ds")
ROWS = [{"id": i, "code": f"x = {i}", "score": 0.5, "tags": ["a"]} for i in range(10)]


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def card(files: dict[str, bytes]) -> tuple[dict[str, object], str]:
    _, head, body = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), body


def table(files: dict[str, bytes], start="data/train-"):
    (name,) = [name for name in files if name.startswith(start)]
    return pq.read_table(io.BytesIO(files[name]))


def test_a_run_is_pushed_and_is_private(box, hub, server):
    box.lines("in/data.jsonl", ROWS)
    box.write("in/README.md", "---\nlicense: apache-2.0\nlanguage:\n- en\n---\nMine.\n")
    command = openai_run(server, "--push-to-hub", "me/rewritten", "--api-key", "sk-secret")
    command[2] = "in"
    ended = box.fabe(*command, **hub.environment)
    assert ended.code == 0, ended
    assert f"pushed: {hub.root}/datasets/me/rewritten" in ended.out
    assert hub.repos["me/rewritten"].private
    files = hub.files("me/rewritten")
    records = table(files)
    assert records.column_names == ["id", "code", "original_code", "score", "tags"]
    assert records["code"].to_pylist() == [f"X = {i}" for i in range(10)]
    assert records["id"].to_pylist() == list(range(10))
    facts, text = card(files)
    assert (facts["license"], facts["language"]) == ("apache-2.0", ["en"])
    assert facts["configs"][0]["config_name"] == "default"
    assert "| model | `m` |" in text
    assert "```\nUp\n```" in text
    assert "| rewritten | 10 |" in text
    reproduce = text.split("## Reproduce")[1].replace(" \\\n ", "")
    assert (
        "fabe-ds run --input in --instruction prompt.txt --provider openai --model m" in reproduce
    )
    for secret in ("hf_test", "sk-secret"):
        assert not any(secret.encode() in data for data in files.values())
        assert secret not in ended.out + ended.err


def test_it_is_pushed_from_any_folder(box, hub, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    box.lines("other/outputs/data.jsonl", [{"code": "another"}])
    push = [FABE, "push", "../outputs.run.json", "me/here"]
    environment = {**box.environment, **hub.environment}
    subprocess.run(push, cwd=box.path / "other", env=environment, check=True)
    assert table(hub.files("me/here"))["code"].to_pylist() == [f"X = {i}" for i in range(10)]


def test_what_is_public_stays_no_secret_and_words_of_others_stay(box, hub, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    push = ("push", "outputs.run.json", "me/shown")
    assert box.fabe(*push, "--public", **hub.environment).code == 0
    files = hub.files("me/shown")
    files["README.md"] += b"\n## My own words\n"
    ended = box.fabe(*push, **hub.environment)
    assert (ended.code, ended.err) == (
        2,
        "fabe-ds: me/shown is there already, and everybody sees it: --public, or another name\n",
    )
    more = ("--public", "--config-name", "second")
    assert box.fabe(*push, *more, **hub.environment).code == 0
    assert box.fabe(*push, "--public", **hub.environment).code == 0
    text = card(hub.files("me/shown"))[1]
    assert text.count("## My own words") == 1
    assert text.count("## Reproduce") == 2
    assert server.url not in text


@pytest.mark.parametrize("where", ["hub", "scope"])
@pytest.mark.parametrize(
    "names", [("a b/c",), ("me/x", "--config-name", "a/b"), ("me/x", "--split", "a b")]
)
def test_names_that_no_hub_takes_are_one_line(request, box, server, where, names):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    more = ("--hub", "modelscope") if where == "scope" else ()
    environment = request.getfixturevalue(where).environment
    ended = box.fabe("push", "outputs.run.json", *names, *more, **environment)
    assert ended.code == 2
    assert ended.err.count("\n") == 1


def test_a_wrong_name_is_said_before_a_record_is_spent(box, hub, server):
    box.lines("data.jsonl", ROWS)
    ended = box.fabe(*openai_run(server, "--push-to-hub", "a b/c"), **hub.environment)
    assert ended.code == 2
    assert not server.calls


def test_no_licence_is_made_up(box, hub, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    ended = box.fabe("push", "outputs.run.json", "me/plain", "--public", **hub.environment)
    assert ended.code == 0, ended
    assert not hub.repos["me/plain"].private
    facts, _ = card(hub.files("me/plain"))
    assert "license" not in facts
    assert "language" not in facts


def test_a_run_with_failures_is_refused_unless_forced(box, hub):
    async def behave(call):
        return error(400, "no") if call.prompt.endswith("3") else None

    box.lines("data.jsonl", ROWS)
    with ModelServer(behave) as server:
        assert box.fabe(*openai_run(server)).code == 1
    refused = box.fabe("push", "outputs.run.json", "me/some", **hub.environment)
    assert refused.code == 2
    assert "1 records failed" in refused.err
    assert not hub.repos
    forced = box.fabe(
        "push", "outputs.run.json", "me/some", "--force", "--failures", **hub.environment
    )
    assert forced.code == 0, forced
    files = hub.files("me/some")
    assert table(files)["code"].to_pylist()[3] == "x = 3"
    failed = table(files, "failures/train-")
    assert failed["record"].to_pylist() == [3]
    facts, text = card(files)
    assert {config["config_name"] for config in facts["configs"]} == {"default", "failures"}
    assert "| failed, and kept as they were | 1 |" in text


def test_to_a_branch_and_a_configuration(box, hub, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    push = ("push", "outputs.run.json", "me/two", "--revision", "next", "--config-name", "small")
    ended = box.fabe(*push, "--split", "test", **hub.environment)
    assert ended.code == 0, ended
    files = hub.files("me/two", "next")
    assert len(table(files, "small/test-")) == 10
    assert "README.md" in files
    assert "README.md" not in hub.files("me/two")


def test_what_is_pushed_is_typed_and_as_it_was(box, hub, server):
    """Dates stay text, large and mixed values stay whole, wrapped records are records."""
    rows = [
        {"code": "a", "day": "2024-01-02", "n": 1, "mixed": "1", "big": 2**70, "x": {}},
        {
            "code": "b",
            "day": "2024-01-03",
            "n": 2.5,
            "mixed": {"k": 0.12345678901234566},
            "late": [1],
        },
    ]
    box.write("data.json", json.dumps({"version": 1, "data": rows}))
    more = ("--records-key", "data", "--backup-field", "", "--template-var", "goal=it's short")
    command = openai_run(server, *more, "--push-to-hub", "me/typed", "--temperature", 0.5)
    command[2] = "data.json"
    ended = box.fabe(*command, **hub.environment)
    assert ended.code == 0, ended
    records = table(hub.files("me/typed"))
    assert str(records.schema.field("day").type) == "string"
    assert records.drop_columns(["mixed", "big", "x"]).to_pylist() == [
        {"code": "A", "day": "2024-01-02", "n": 1.0, "late": None},
        {"code": "B", "day": "2024-01-03", "n": 2.5, "late": [1]},
    ]
    assert records["mixed"].to_pylist() == ['"1"', '{"k": 0.12345678901234566}']
    assert records["big"].to_pylist() == [str(2**70), None]
    _, text = card(hub.files("me/typed"))
    for flags in (
        "--template-var 'goal=it'\"'\"'s short'",
        "--temperature 0.5",
        "--records-key data",
    ):
        assert flags in text


def test_the_split_that_was_read_is_the_one_that_is_pushed(box, hub, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    push = ("push", "outputs.run.json", "me/first", "--split", "test", "--config-name", "small")
    assert box.fabe(*push, **hub.environment).code == 0
    more = ("--split", "test[:4]", "--config-name", "small", "--backup-field", "was")
    command = openai_run(server, *more, "--push-to-hub", "me/second")
    command[2] = "me/first"
    ended = box.fabe(*command, **hub.environment)
    assert ended.code == 0, ended
    assert len(table(hub.files("me/second"), "small/test-")) == 4
    text = card(hub.files("me/second"))[1]
    assert "The records of `me/first`" in text
    assert "--config-name small" in text


def test_a_run_in_place_can_be_pushed(box, hub, server):
    box.lines("data.jsonl", ROWS)
    for _ in range(2):
        assert box.fabe(*openai_run(server, "--inplace")).code == 0
    report = ".cache/runs/data.jsonl.run.json"
    ended = box.fabe("push", report, "me/inplace", **hub.environment)
    assert ended.code == 0, ended
    assert table(hub.files("me/inplace"))["code"].to_pylist() == [f"X = {i}" for i in range(10)]


def test_a_dataset_of_the_hub_is_read_and_its_licence_kept(box, hub, server):
    box.lines("data.jsonl", ROWS)
    box.write("README.md", "---\nlicense: mit\n---\n")
    assert box.fabe(*openai_run(server)).code == 0
    assert box.fabe("push", "outputs.run.json", "me/first", **hub.environment).code == 0
    command = openai_run(server, "--field", "original_code", "--backup-field", "")
    command[2] = "me/first"
    ended = box.fabe(*command, "--push-to-hub", "me/second", **hub.environment)
    assert ended.code == 0, ended
    records = table(hub.files("me/second"))
    assert records["original_code"].to_pylist() == [f"X = {i}" for i in range(10)]
    assert card(hub.files("me/second"))[0]["license"] == "mit"


def test_a_dataset_that_is_not_there_is_one_line(box, hub, server):
    command = openai_run(server)
    command[2] = "me/absent"
    ended = box.fabe(*command, **hub.environment)
    assert ended.code == 2
    assert "no such file or folder, and no such dataset on the Hub" in ended.err
    gone = box.fabe(*command, **{**hub.environment, "HF_ENDPOINT": "http://127.0.0.1:1"})
    assert (gone.code, gone.err) == (
        2,
        "fabe-ds: --input me/absent: no such file or folder, and the Hub cannot be reached\n",
    )


def test_a_hub_that_is_away_is_one_line(box, server):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    gone = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_test"}
    ended = box.fabe("push", "outputs.run.json", "me/x", **gone)
    assert ended.code == 1
    assert "fabe-ds: me/x: the Hub refused: " in ended.err


def test_an_instruction_with_fences_of_its_own(box, hub, server):
    async def behave(call):
        return completion(call, "done")

    box.lines("data.jsonl", ROWS[:1])
    box.write("prompt.txt", "Put it in\n```\nfences\n```\n{{ text }}")
    with ModelServer(behave) as fenced:
        command = openai_run(fenced, "--push-to-hub", "me/fences")
        command[4] = "prompt.txt"
        assert box.fabe(*command, **hub.environment).code == 0
    assert "````\nPut it in" in card(hub.files("me/fences"))[1]


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("a b/c", "hf_test", "--push-to-hub a b/c: "),
        ("me/x", "hf_wrong", "me/x: the Hub does not accept the token (401)"),
    ],
)
def test_what_is_wrong_is_one_line(box, hub, server, repo, token, said):
    box.lines("data.jsonl", ROWS)
    assert box.fabe(*openai_run(server)).code == 0
    ended = box.fabe("push", "outputs.run.json", repo, **{**hub.environment, "HF_TOKEN": token})
    assert ended.code in (1, 2), sys.version
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert token not in ended.err


@pytest.fixture
def scope(box):
    with Scope() as running:
        yield running


def to_modelscope(scope, server, *more):
    return openai_run(server, "--push-to-hub", "me/rewritten", "--hub", "modelscope", *more)


def test_a_run_is_pushed_to_modelscope(box, scope, server):
    box.lines("data.jsonl", ROWS)
    box.write("README.md", "---\nlicense: mit\nlanguage:\n- en\n---\nMine.\n")
    ended = box.fabe(*to_modelscope(scope, server), **scope.environment)
    assert ended.code == 0, ended
    assert ended.out.endswith(f"pushed: {scope.root}/datasets/me/rewritten\n")
    assert "Upload Report" not in ended.out
    assert scope.created["me/rewritten"]["Visibility"] == "1"  # private
    assert scope.created["me/rewritten"]["License"] == "mit"
    files = scope.files["me/rewritten"]
    records = table(files)
    assert records["code"].to_pylist() == [f"X = {i}" for i in range(10)]
    assert records["tags"].to_pylist() == [["a"]] * 10
    facts, text = card(files)
    assert facts["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    ]
    assert (facts["license"], facts["language"]) == ("mit", ["en"])
    assert "| rewritten | 10 |" in text
    assert TOKEN not in ended.out + ended.err + "".join(map(str, files.values()))


def test_what_failed_is_pushed_beside_it_and_other_configurations_stay(box, scope):
    async def behave(call):
        return error(400, "too rude") if call.prompt.endswith("x = 3") else None

    box.lines("data.jsonl", ROWS)
    with ModelServer(behave) as server:
        more = ("--push-config-name", "first", "--public")
        ended = box.fabe(*to_modelscope(scope, server, *more), **scope.environment)
        assert ended.code == 1
        assert ended.err.splitlines()[-1].startswith("not pushed: records failed")
        assert not scope.files
        push = ["push", "outputs.run.json", "me/rewritten", "--hub", "modelscope", "--force"]
        assert box.fabe(*push, **scope.environment).code == 0
        more = ("--config-name", "second", "--split", "test", "--failures")
        assert box.fabe(*push, *more, **scope.environment).code == 0
    files = scope.files["me/rewritten"]
    assert sorted(files) == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        "failures/test-00000-of-00001.parquet",
        "second/test-00000-of-00001.parquet",
    ]
    assert table(files, "failures/test-")["text"].to_pylist() == ["x = 3"]
    facts, _ = card(files)
    assert [entry["config_name"] for entry in facts["configs"]] == ["default", "second", "failures"]
    assert "license" not in facts
    assert scope.created["me/rewritten"]["License"] == "other"


@pytest.mark.parametrize(
    ("repo", "environment", "message"),
    [
        ("me/rewritten", {"MODELSCOPE_API_TOKEN": "wrong"}, "does not accept the token"),
        ("rewritten", {}, "--push-to-hub rewritten: "),
        ("me/rewritten", {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:1"}, "ModelScope refused: "),
    ],
)
def test_what_modelscope_does_not_take_is_one_line(box, scope, server, repo, environment, message):
    box.lines("data.jsonl", ROWS[:2])
    assert box.fabe(*openai_run(server)).code == 0
    push = ["push", "outputs.run.json", repo, "--hub", "modelscope"]
    ended = box.fabe(*push, **{**scope.environment, **environment})
    assert ended.code in (1, 2)
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_wrong_option_of_push_to_hub_is_named(tmp_path):
    with pytest.raises(
        fabe_ds.UsageError, match="unknown setting 'privat'; did you mean 'private'"
    ):
        fabe_ds.push_to_hub(tmp_path / "outputs.run.json", "me/rewritten", privat=False)
    with pytest.raises(fabe_ds.UsageError, match="No such file"):
        fabe_ds.push_to_hub(tmp_path / "outputs.run.json", "me/rewritten", private=False)
