"""Input and output on other file systems: fsspec's memory, and hf:// against a Hub over sockets."""

from __future__ import annotations

import json

import fsspec
import pytest

import fabe_ds
from fabe_ds import FabeError, UsageError
from tests.support.hub import Hub, Repo
from tests.support.server import ModelServer

LINES = b'{"code": "x", "n": 1.10}\n{"code":"y"}\n'
UP = b'{"code": "X", "original_code": "x", "n": 1.10}\n{"code":"Y","original_code":"y"}\n'


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def run(tmp_path):
    with ModelServer() as server:

        def running(**options):
            how = {"provider": "openai", "model": "m", "base_url": server.url, "instruction": "Up"}
            cache = tmp_path / "cache"
            return fabe_ds.run(progress=False, cache_dir=cache, **{**how, **options})

        running.server = server
        yield running


def test_a_file_and_a_folder_come_back_where_they_are_wanted(memory, run):
    memory.pipe("/in/a.jsonl", LINES)
    memory.pipe("/in/deep/b.json", b'[ {"code": "x"} ]')
    memory.pipe("/in/note.txt", b"no")
    result = run(input="memory://in", output="memory://out/records")
    assert (result.done + result.cached, result.failed) == (3, 0)  # two are equal
    assert memory.cat("/out/records/a.jsonl") == UP
    assert memory.cat("/out/records/deep/b.json") == b'[ {"code": "X", "original_code": "x"} ]'
    assert not memory.exists("/out/records/note.txt")
    report = json.loads(memory.cat("/out/records.run.json"))
    assert report["config"]["input_path"] == "memory://in"
    assert report["records"] == 3
    assert [row["code"] for row in result.dataset()] == ["X", "Y", "X"]
    one = run(input="memory://in/a.jsonl", output="memory://out/one.jsonl")
    assert (one.done, one.cached) == (0, 2)
    assert memory.cat("/out/one.jsonl") == UP


def test_what_has_not_changed_is_neither_fetched_nor_asked_nor_written_again(memory, run):
    memory.pipe("/in/a.jsonl", LINES)
    memory.pipe("/in/b.jsonl", LINES)
    run(input="memory://in", output="memory://out")
    before = memory.info("/out/a.jsonl")["created"]
    sent = len(run.server.calls)
    again = run(input="memory://in", output="memory://out")
    assert (again.done, again.cached, len(run.server.calls)) == (0, 4, sent)
    assert memory.info("/out/a.jsonl")["created"] == before
    memory.pipe("/in/b.jsonl", b'{"code": "z"}\n')
    changed = run(input="memory://in", output="memory://out")
    assert (changed.records, changed.done) == (3, 1)
    memory.rm("/in/b.jsonl")
    assert run(input="memory://in", output="memory://out").records == 2
    memory.rm("/out/a.jsonl")
    run(input="memory://in", output="memory://out")
    assert memory.cat("/out/a.jsonl") == UP


def test_in_place_and_tables(memory, run):
    memory.pipe("/d.jsonl", LINES)
    run(input="memory://d.jsonl", inplace=True)
    assert memory.cat("/d.jsonl") == UP
    again = run(input="memory://d.jsonl", inplace=True)
    assert again.skipped == {"done before": 2}
    assert memory.cat("/d.jsonl") == UP
    memory.pipe("/t/d.csv", b"code,n\nx,1.10\n")
    run(input="memory://t/d.csv", output="memory://t/out.csv")
    assert memory.cat("/t/out.csv") == b"code,n,original_code\nX,1.10,x\n"


def test_patterns_choose_what_is_fetched(memory, run):
    memory.pipe("/in/a.jsonl", LINES)
    memory.pipe("/in/deep/b.jsonl", b"not JSON")
    result = run(input="memory://in", output="memory://out", input_glob=["*.jsonl"])
    assert result.records == 2
    assert memory.find("/out") == ["/out/a.jsonl"]


def test_failures_are_left_beside_the_output(memory, run):
    memory.pipe("/d.jsonl", LINES + b"broken\n")
    result = run(input="memory://d.jsonl", output="memory://o.jsonl", on_bad_input="skip")
    assert result.failed == 1
    (line,) = memory.cat("/o.jsonl.failures.jsonl").splitlines()
    assert json.loads(line)["failure"] == "broken"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input": "memory://no.jsonl"}, "--input memory://no.jsonl: no such file or folder"),
        ({"input": "s3://b/no.jsonl"}, "--input s3://b/no.jsonl: Install s3fs"),
        ({"input": "zz://b/no.jsonl"}, "--input zz://b/no.jsonl: Protocol not known: zz"),
        ({"input": "memory://d.jsonl", "output": "zz://b"}, "--output zz://b: Protocol not known"),
    ],
)
def test_what_is_wrong_is_one_line(memory, run, options, said):
    memory.pipe("/d.jsonl", LINES)
    with pytest.raises(UsageError) as raised:
        run(**options)
    assert str(raised.value).startswith(said)
    assert not run.server.calls


def test_an_output_that_refuses_is_said_and_what_was_answered_is_kept(memory, run, monkeypatch):
    memory.pipe("/d.jsonl", LINES)
    with monkeypatch.context() as patched:

        def refuses(*_, **__):
            raise PermissionError("quota")

        patched.setattr(type(memory), "put_file", refuses)
        with pytest.raises(FabeError, match=r"--output memory://o\.jsonl: quota"):
            run(input="memory://d.jsonl", output="memory://o.jsonl")
    assert not memory.exists("/o.jsonl")
    again = run(input="memory://d.jsonl", output="memory://o.jsonl")
    assert (again.done, again.cached) == (0, 2)
    assert memory.cat("/o.jsonl") == UP


def test_the_hub_as_a_file_system(box):
    with Hub() as hub, ModelServer() as server:
        hub.repos["org/data"] = Repo(True, commits=["0" * 40])
        hub.files("org/data")["raw/a.jsonl"] = LINES
        hub.files("org/data")["README.md"] = b"# Data"
        address = "hf://datasets/org/data"
        how = ["--provider", "openai", "--model", "m", "--base-url", server.url]
        command = ["run", "--input", f"{address}/raw", "--instruction", "Up", *how]
        ended = box.fabe(*command, "--output", f"{address}/clean", **hub.environment)
        assert ended.code == 0, ended
        assert f"written: {address}/clean" in ended.out
        assert hub.files("org/data")["clean/a.jsonl"] == UP
        assert "clean.run.json" in hub.files("org/data")
        again = box.fabe(*command, "--output", f"{address}/clean", **hub.environment)
        assert again.code == 0, again
        assert len(server.calls) == 2
        missing = box.fabe("run", "--input", f"{address}/no.jsonl", **hub.environment)
        assert (missing.code, missing.err) == (
            2,
            f"fabe-ds: --input {address}/no.jsonl: no such file or folder\n",
        )
        retried = box.fabe(
            "retry", box.path / ".cache/remote" / _copy(box) / "clean.run.json", **hub.environment
        )
        assert retried.code == 0, retried


def _copy(box) -> str:
    (found,) = (box.path / ".cache/remote").glob("*/clean.run.json")
    return found.parent.name
