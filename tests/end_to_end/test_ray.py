"""The same runs in the workers of a Ray cluster on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import wait_for
from tests.support.server import ModelServer, answer_to, completion, error, openai_run
from tests.support.zoo import JSON, LINES

# Of the same group: two clusters at once are too much for a small machine.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
RAY = ("--runner", "ray", "--workers", 2)
N, CONCURRENCY = 240, 8


def records(count=N):
    return [{"id": i, "code": f"value_{i} = {i}", "n": 1.0} for i in range(count)]


def command(server, *more):
    return openai_run(server, "--concurrency", CONCURRENCY, *RAY, *more)


def joined(server, address, *more):
    return command(server, "--ray-address", address, *more)


def actors(process):
    """The workers of a run that has started a cluster of its own."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "MapWorker" in "".join(child.cmdline())]


def contents(folder: Path):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def cluster():
    """A cluster of two nodes; gives its address, and a function that kills the second node."""
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "serve_cluster.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:

        def say(line=None):
            if line:
                process.stdin.write(line)
                process.stdin.flush()
            return process.stdout.readline().strip()

        yield say(), lambda: say("kill\n")
        process.stdin.close()


@pytest.fixture(scope="module")
def two_nodes():
    with cluster() as (address, _):
        yield address


@pytest.fixture
def slow_server():
    with ModelServer(latency=0.1) as running:
        yield running


def test_the_same_bytes_as_one_process(box):
    """Odd files, a template that sees the record, two fields, equal records, one that fails."""

    async def behave(call):
        await asyncio.sleep(0.02)
        return error(400, "too rude") if "value_77 " in call.prompt else None

    for suffix, zoo in (("json", JSON), ("jsonl", LINES)):
        for number, (name, text) in enumerate(zoo.items()):
            if name != "long":
                box.write(f"data/{number:02}.{suffix}", text)
    named = [{**record, "name": f"name {record['id']}"} for record in records(30)]
    box.lines("data/plain.jsonl", [*records(), *named])
    box.write("up.j2", "{{ record.id }}\n\n{{ text }}")
    with ModelServer(behave) as server:
        more = ("--instruction", "up.j2", "--also-field", "name", "--concurrency", 7)
        base = openai_run(server, *more)
        base[2] = "data"
        ended = box.fabe(*base, *RAY, OPENAI_API_KEY="sk-secret")
        assert ended.code == 1, ended
        sent = len(server.calls)
        assert server.most_in_flight <= 7
        assert {call.headers["Authorization"] for call in server.calls} == {"Bearer sk-secret"}
        alone = box.fabe(*base, "--output", "alone", "--cache-dir", "other")
        assert alone.code == 1
        assert len(server.calls) == 2 * sent
        box.fabe(*base, "--output", "again")
        assert len(server.calls) == 2 * sent + 1  # the one that fails
    assert contents(box.path / "outputs") == contents(box.path / "alone")
    assert contents(box.path / "outputs") == contents(box.path / "again")
    assert "sk-secret" not in ended.err + ended.out
    ray, other = box.report(), box.report("alone.run.json")
    for count in ("records", "done", "cached", "failed", "skipped", "requests", "prompt_tokens"):
        assert ray[count] == other[count], count
    assert sum(ray["latency"].values()) == sum(other["latency"].values()) > 0
    assert box.read("outputs.failures.jsonl") == box.read("alone.failures.jsonl")
    assert not list((box.path / ".cache/shards").iterdir())


def test_a_worker_is_killed(box, slow_server):
    """What this very run has answered is not sent again, though --no-resume hides all else."""
    box.lines("data.jsonl", records())
    assert box.fabe(*openai_run(slow_server, "--concurrency", 32)).code == 0
    process = box.start(*command(slow_server, "--no-resume"))
    for part in (1.3, 1.6):
        wait_for(lambda part=part: len(slow_server.calls) >= N * part, 60)
        victim = actors(process)[0]
        victim.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "0 failed" not in out
    assert 2 * N <= len(slow_server.calls) <= 2 * N + 2 * CONCURRENCY / 2
    lines = box.read("outputs/data.jsonl")
    assert [line["code"] for line in lines] == [f"VALUE_{i} = {i}" for i in range(N)]


def test_the_driver_is_killed_and_the_run_repeated(box, slow_server):
    box.lines("data.jsonl", records())
    process = box.start(*command(slow_server))
    wait_for(lambda: len(slow_server.calls) >= N / 2, 60)
    workers = actors(process)
    assert len(workers) == 2
    box.kill(process)
    wait_for(lambda: not any(map(psutil.Process.is_running, workers)), 30)
    assert not (box.path / "outputs").exists()
    ended = box.fabe(*command(slow_server), timeout=100)
    assert ended.code == 0, ended
    assert len(slow_server.calls) <= N + CONCURRENCY
    assert [line["n"] for line in box.read("outputs/data.jsonl")] == [1.0] * N
    assert not list((box.path / ".cache/shards").iterdir())


@pytest.mark.parametrize(("number", "own"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_run_keeps_what_is_on_its_way(box, slow_server, two_nodes, number, own):
    box.lines("data.jsonl", records())
    process = box.start(*(command(slow_server) if own else joined(slow_server, two_nodes)))
    wait_for(lambda: len(slow_server.calls) >= N / 3, 60)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("stopped; what was answered is kept, run the same command again to go on\n")
    sent = len(slow_server.calls)
    assert sent < N
    assert box.fabe(*openai_run(slow_server, "--concurrency", 64)).code == 0
    assert len(slow_server.calls) == N


def test_a_refused_key_is_one_line(box, two_nodes):
    box.lines("data.jsonl", records())
    with ModelServer() as server:
        server.key = "sk-right"
        ended = box.fabe(*joined(server, two_nodes, "--api-key", "sk-wrong-one"))
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("fabe-ds: ")
    assert "the key is not accepted (401" in last
    assert "sk-wrong-one" not in ended.err
    logs = [path for path in Path("/tmp/ray/session_latest/logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if b"sk-wrong-one" in path.read_bytes()]


def test_a_run_that_cannot_go_on_keeps_its_answers(box, two_nodes):
    async def behave(call):
        await asyncio.sleep(0.1)
        return error(401, "Incorrect API key provided") if call.number >= 60 else None

    box.lines("data.jsonl", records())
    with ModelServer(behave) as server:
        ended = box.fabe(*joined(server, two_nodes))
        assert ended.code == 1
        assert "the key is not accepted (401" in ended.err.splitlines()[-1]
    with ModelServer(port=int(server.root.rsplit(":", 1)[1])) as server:
        assert box.fabe(*openai_run(server)).code == 0
        assert len(server.calls) == N - 60


def test_equal_records_are_sampled_apart(box, two_nodes):
    async def behave(call):
        return completion(call, f"{answer_to(call.prompt)} {call.number}")

    rows = [{"code": "same", "id": i} for i in range(30)] + records(10)  # equal requests
    box.lines("data.jsonl", [{**row, "lang": "py"} for row in rows])
    box.write("t.j2", "{{ record.lang }}\n\n{{ text }}")
    more = ("--temperature", 1, "--instruction", "t.j2")
    with ModelServer(behave) as server:
        ended = box.fabe(*joined(server, two_nodes, *more))
        assert ended.code == 0, ended
        assert len({line["code"] for line in box.read("outputs/data.jsonl")}) == 40
        assert len(server.calls) == 40
        ended = box.fabe(*openai_run(server, *more, "--output", "alone", "--backup-field", "was"))
        assert "40 from cache" in ended.out
    values = [[line["code"] for line in box.read(f"{n}/data.jsonl")] for n in ("outputs", "alone")]
    assert values[0] == values[1]


def test_several_servers_and_models(box, two_nodes):
    async def behave(call):
        is_small = call.body["model"] == "m" and call.prompt.endswith("0")
        return completion(call, "cut", "length") if is_small else None

    with ModelServer(behave, latency=0.02) as one, ModelServer(behave, latency=0.02) as other:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(60)])
        where = ("--base-url", one.url, "--base-url", other.url)
        more = ("--fallback-model", f"big@{one.url}", "--status-field", "state")
        command = openai_run(one, *where, "--concurrency", 4, *RAY, "--ray-address", two_nodes)
        ended = box.fabe(*command, *more, FALLBACK_API_KEY="sk-other")
        assert ended.code == 0, ended
        rows = box.read("outputs/data.jsonl")
        assert [row["code"] for row in rows] == [f"X = {i}" for i in range(60)]
        models = [row["state"]["model"] for row in rows]
        assert models == ["m" if i % 10 else "big" for i in range(60)]
        assert other.calls
        keys = {c.headers.get("Authorization") for c in one.calls if c.body["model"] == "big"}
        assert keys == {"Bearer sk-other"}
        assert len(one.calls) + len(other.calls) == 66


def test_in_place(box, two_nodes, server):
    box.lines("data.jsonl", records(50))
    assert box.fabe(*joined(server, two_nodes, "--inplace")).code == 0
    assert box.read("data.jsonl")[3]["code"] == "VALUE_3 = 3"
    after = (box.path / "data.jsonl").read_bytes()
    ended = box.fabe(*joined(server, two_nodes, "--inplace"))
    assert "50 done before" in ended.out
    assert (box.path / "data.jsonl").read_bytes() == after
    assert len(server.calls) == 50


def test_a_table(box, two_nodes, server):
    rows = [
        {"turns": [{"role": "user", "content": f"hi {i}"}], "note": f"n {i % 5}", "score": i / 3}
        for i in range(60)
    ]
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), box.path / "data.parquet")
    flags = ["--field", "turns.0.content", "--also-field", "note"]
    flags += ["--instruction", "{{ record.score }}\n\n{{ text }}", "--status-field", "how"]
    flags += ["--samples", 2, "--temperature", 1]
    command = joined(server, two_nodes, *flags, "--gpus-per-worker", 0.5)  # as if there were GPUs
    command[2] = "data.parquet"
    ended = box.fabe(*command)
    assert ended.code == 0, ended
    alone = openai_run(server, *flags, "--output", "alone", "--cache-dir", "other")
    alone[2] = "data.parquet"
    assert box.fabe(*alone).code == 0
    one, other = (pq.read_table(box.path / f"{n}/data.parquet") for n in ("outputs", "alone"))
    assert one.schema == other.schema
    assert one.drop_columns("how") == other.drop_columns("how")
    assert one["turns"][7].as_py() == [{"role": "user", "content": "HI 7"}]
    assert {row["state"] for row in one["how"].to_pylist()} == {"done"}
    assert len(server.calls) == 2 * 60 * 4


def test_a_node_is_killed(box, slow_server):
    """The worker that ran on it had its cache and its shards from the first node."""
    box.lines("data.jsonl", records())
    with cluster() as (address, kill):
        process = box.start(*joined(slow_server, address))
        wait_for(lambda: len(slow_server.calls) >= N / 2, 60)
        assert kill() == "killed"
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"written: {'outputs/data.jsonl'}" in out
    assert len(slow_server.calls) <= N + CONCURRENCY / 2
    assert [line["code"] for line in box.read("outputs/data.jsonl")] == [
        f"VALUE_{i} = {i}" for i in range(N)
    ]


def test_a_local_model(box, talkative):
    box.lines("data.jsonl", records(40))
    base = ["run", "--input", "data.jsonl", "--instruction", "Up", "--provider", "hf"]
    base += ["--model", talkative, "--max-new-tokens", 6, "--on-truncated", "keep"]
    base += ["--dtype", "float32"]
    ended = box.fabe(*base, *RAY, "--workers", 1)
    assert ended.code == 0, ended
    alone = box.fabe(*base, "--output", "alone", "--cache-dir", "other")
    assert alone.code == 0
    assert contents(box.path / "outputs") == contents(box.path / "alone")
    assert box.report()["completion_tokens"] == box.report("alone.run.json")["completion_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-requests", 5], "leave --runner ray out"),
        (["--batch-api"], "--batch-api sends from one process"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address 127.0.0.1:1: nothing answers there"),
        (["--ray-address", "ray://x:10001"], "start the command on a node of the cluster"),
        (["--gpus-per-worker", 1], "--gpus-per-worker 1: this machine has 0 GPUs, too few"),
        (["--workers", 0], "--workers 0: should be greater than 0"),
    ],
)
def test_what_does_not_go_together(box, server, flags, message):
    box.lines("data.jsonl", records(4))
    ended = box.fabe(*command(server, *flags))
    assert ended.code == 2, ended
    assert message in ended.err.splitlines()[-1]
    assert not server.calls


def test_without_ray(box, server):
    box.lines("data.jsonl", records(4))
    box.write("ray/__init__.py", "raise ImportError('none')")
    ended = box.fabe(*command(server), PYTHONPATH=str(box.path))
    assert (ended.code, ended.err.splitlines()[-1]) == (
        2,
        "fabe-ds: --runner ray needs fabe-ds[ray]: pip install 'fabe-ds[ray]'",
    )


SCRIPT = """
import logging, os, sys
import ray, ray.data
import fabe_ds.distributed

ray.init("local", logging_level="ERROR", log_to_driver=False, include_dashboard=False)
rows = ray.data.from_items([{"id": i, "question": f"why {i}?"} for i in range(40)])
rows = rows.repartition(4)
done = fabe_ds.distributed.transform(
    rows, workers=2, field="question", instruction="Up", provider="openai", model="m",
    base_url=sys.argv[1], status_field="how",
)
for row in sorted(done.take_all(), key=lambda row: row["id"]):
    print(row["id"], row["question"], row["original_question"], row["how"]["state"])
"""


def test_a_dataset_of_ray(box, server):
    script = box.write(
        "script.py", SCRIPT.replace('"Up",', '"Up", backup_field="original_question",')
    )
    command = [sys.executable, str(script), server.url]
    ended = subprocess.run(
        command, cwd=box.path, env=box.environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"{i} WHY {i}? why {i}? done" for i in range(40)]
    assert len(server.calls) == 40
