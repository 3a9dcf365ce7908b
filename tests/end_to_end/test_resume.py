"""Killed, stopped and repeated runs: nothing lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from aiohttp import web

from tests.conftest import COMMAND, wait_for
from tests.support.server import ModelServer, answer_to, completion, error, openai_run

N = 500
CONCURRENCY = 16


def records(count=N):
    return [{"id": i, "code": f"value_{i} = {i}", "n": 1.0} for i in range(count)]


def command(server, *more):
    return openai_run(server, "--concurrency", CONCURRENCY, *more)


def expected(count=N):
    return "".join(
        json.dumps(
            {"id": i, "code": f"VALUE_{i} = {i}", "original_code": f"value_{i} = {i}", "n": 1.0}
        )
        + "\n"
        for i in range(count)
    )


@pytest.fixture
def slow_server():
    with ModelServer(latency=0.05) as running:
        yield running


def test_kill_9_loses_only_what_was_in_flight(box, slow_server):
    box.lines("data.jsonl", records())
    for part in (0.3, 0.6):
        process = box.start(*command(slow_server))
        wait_for(lambda part=part: len(slow_server.calls) >= N * part)
        box.kill(process)
        assert not (box.path / "outputs").exists()
    ended = box.fabe(*command(slow_server))
    assert ended.code == 0, ended
    assert (box.path / "outputs/data.jsonl").read_text() == expected()
    assert N <= len(slow_server.calls) <= N + 2 * CONCURRENCY
    database = sqlite3.connect(box.path / ".cache/records.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_R2_a_stopped_run_drains_and_sends_nothing_twice(box, slow_server, number):
    box.lines("data.jsonl", records())
    for part in (0.2, 0.4, 0.6):
        process = box.start(*command(slow_server))
        wait_for(lambda part=part: len(slow_server.calls) >= N * part)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130, (out, err)
        assert "run the same command again to go on" in err
        assert "Traceback" not in err
        assert not (box.path / "outputs").exists()
    ended = box.fabe(*command(slow_server))
    assert ended.code == 0, ended
    assert (box.path / "outputs/data.jsonl").read_text() == expected()
    assert len(slow_server.calls) == N


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_does_not_wait(box, first):
    with ModelServer(latency=60) as server:
        box.lines("data.jsonl", records(5))
        process = box.start(*command(server))
        wait_for(lambda: len(server.calls) == 5)
        process.send_signal(first)
        assert "waiting for what is on its way" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130


@pytest.mark.parametrize(
    "change",
    [
        [],
        ["--concurrency", 3],
        ["--batch-size", 1],
        ["--retry", 9],
        ["--timeout", 99],
        ["--api-key", "sk-x"],
        ["--output", "elsewhere"],
    ],
    ids=lambda change: change[0] if change else "unchanged",
)
def test_a_repeated_run_sends_nothing(box, server, change):
    box.lines("data.jsonl", records(20))
    box.fabe(*command(server))
    ended = box.fabe(*command(server, *change))
    assert "0 rewritten, 20 from cache" in ended.out, ended
    assert len(server.calls) == 20


@pytest.mark.parametrize(
    "change",
    [
        ["--instruction", "Down"],
        ["--model", "llama3"],
        ["--temperature", "0.5"],
        ["--system-prompt", "Other"],
        ["--use-chat-template", "false"],
        ["--top-p", "0.9", "--temperature", "1"],
        ["--no-resume"],
    ],
    ids=lambda change: change[0],
)
def test_what_changes_the_request_sends_it_again(box, server, change):
    box.lines("data.jsonl", records(20))
    box.fabe(*command(server))
    box.fabe(*command(server, *change))
    assert len(server.calls) == 40


def test_only_what_is_new_is_sent(box, server):
    box.lines("data.jsonl", records(20))
    box.fabe(*command(server))
    box.lines("data.jsonl", [*reversed(records(20)), {"code": "added"}])
    box.fabe(*command(server))
    assert len(server.calls) == 21
    (box.path / "data.jsonl").rename(box.path / "renamed.jsonl")
    box.fabe(*[str(a).replace("data.jsonl", "renamed.jsonl") for a in command(server)])
    assert len(server.calls) == 21


def test_a_changed_treatment_of_answers_reads_them_again_and_sends_nothing(box):
    async def fenced(call):
        return completion(call, f"```\n{call.prompt[-5:]}\n```")

    with ModelServer(fenced) as server:
        box.lines("data.jsonl", [{"code": "x = 1"}])
        box.fabe(*command(server))
        assert box.read("outputs/data.jsonl")[0]["code"] == "x = 1"
        box.fabe(*command(server, "--no-strip-fences"))
        assert box.read("outputs/data.jsonl")[0]["code"] == "```\nx = 1\n```"
        assert len(server.calls) == 1


def test_equal_records_are_sent_once(box, slow_server):
    box.lines("data.jsonl", [{"code": f"same_{i % 3}"} for i in range(60)])
    ended = box.fabe(*command(slow_server))
    assert len(slow_server.calls) == 3
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == [
        f"SAME_{i % 3}" for i in range(60)
    ]
    assert "3 rewritten, 57 from cache" in ended.out


def test_equal_records_are_sampled_each(box, slow_server):
    box.lines("data.jsonl", [{"code": "same"}] * 5)
    box.fabe(*command(slow_server, "--temperature", "1"))
    assert len(slow_server.calls) == 5
    box.fabe(*command(slow_server, "--temperature", "1", "--output", "b"))
    assert len(slow_server.calls) == 5


def test_failures_are_sent_again_and_nothing_else(box):
    broken = True

    async def some_fail(call):
        if broken and call.prompt.endswith(("= 3", "= 7", "= 11")):
            return error(400, "no")
        return None

    with ModelServer(some_fail) as server:
        box.lines("data.jsonl", records(20))
        ended = box.fabe(*command(server))
        assert ended.code == 1
        assert [f["record"] for f in box.read("outputs.failures.jsonl")] == [3, 7, 11]
        failed = [r for r in box.read("outputs/data.jsonl") if "original_code" not in r]
        assert failed == [records()[i] for i in (3, 7, 11)]
        broken = False
        ended = box.fabe(*command(server))
        assert ended.code == 0
        assert len(server.calls) == 23
        assert (box.path / "outputs/data.jsonl").read_text() == expected(20)
        assert not (box.path / "outputs.failures.jsonl").exists()


@pytest.mark.parametrize("what", ["cut", "empty"])
def test_an_answer_that_was_no_use_is_asked_again(box, what):
    bad = True

    async def behave(call):
        if not bad:
            return None
        return completion(call, "half", "length") if what == "cut" else completion(call, "")

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": "x = 1"}])
        ended = box.fabe(*command(server))
        assert ended.code == 1
        assert box.read("outputs/data.jsonl") == [{"code": "x = 1"}]
        if what == "cut":
            box.fabe(*command(server, "--on-truncated", "keep"))
            assert box.read("outputs/data.jsonl")[0]["code"] == "half"
            assert len(server.calls) == 1
            assert box.fabe(*command(server)).code == 1  # it would be cut again
            assert len(server.calls) == 1
        bad = False
        again = ["--retry-all"] if what == "cut" else []
        assert box.fabe(*command(server, *again)).code == 0
        assert box.read("outputs/data.jsonl")[0]["code"] == "X = 1"
        assert len(server.calls) == 2


def test_two_runs_at_once_do_not_pay_twice(box, slow_server):
    box.lines("data.jsonl", records(200))
    first = box.start(*command(slow_server, "--output", "a"))
    second = box.start(*command(slow_server, "--output", "b"))
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (out, err)
    assert len(slow_server.calls) == 200
    assert (box.path / "a/data.jsonl").read_text() == expected(200)
    assert (box.path / "b/data.jsonl").read_text() == expected(200)


def test_a_run_takes_over_from_one_that_was_killed(box, slow_server):
    """Claims of a dead process do not hold up the living."""
    box.lines("data.jsonl", records(100))
    process = box.start(*command(slow_server))
    wait_for(lambda: len(slow_server.calls) >= 30)
    box.kill(process)
    ended = box.fabe(*command(slow_server), timeout=30)
    assert ended.code == 0


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut"])
def test_a_damaged_cache_is_set_aside(box, server, damage):
    box.lines("data.jsonl", records(200))
    box.fabe(*command(server))
    path = box.path / ".cache/records.sqlite"
    data = path.read_bytes()
    shutil.rmtree(box.path / ".cache/datasets")
    path.write_bytes(
        {"garbage": b"x" * 5000, "empty": b"", "cut": data[: len(data) * 2 // 3]}[damage]
    )
    ended = box.fabe(*command(server, "--output", "b"))
    assert ended.code == 0, ended
    assert (box.path / "b/data.jsonl").read_text() == expected(200)
    if damage != "empty":
        assert "set aside" in ended.err


@pytest.mark.parametrize("what", ["file", "readonly database"])
def test_a_cache_that_cannot_be_written_is_said_before_anything_is_sent(box, server, what):
    box.lines("data.jsonl", records(5))
    if what == "file":
        box.write(".cache", "in the way")
    else:
        box.write(".cache/records.sqlite/x", "a folder")
    ended = box.fabe(*command(server))
    assert ended.code in (1, 2)
    assert ".cache" in ended.err
    assert not server.calls


def test_the_cache_is_private(box, server):
    box.lines("data.jsonl", records(5))
    box.fabe(*command(server))
    assert (box.path / ".cache").stat().st_mode & 0o777 == 0o700
    assert (box.path / ".cache/records.sqlite").stat().st_mode & 0o777 == 0o600


def test_in_place_twice_rewrites_once(box, server):
    box.lines("data.jsonl", records(20))
    first = box.fabe(*command(server, "--inplace"))
    assert first.code == 0, first
    text = (box.path / "data.jsonl").read_text()
    assert text == expected(20)
    again = box.fabe(*command(server, "--inplace"))
    assert "20 done before" in again.out
    assert len(server.calls) == 20
    assert (box.path / "data.jsonl").read_text() == text


def test_in_place_goes_on_where_it_was_stopped(box):
    """Some files replaced, one failed record: only what is missing is sent."""
    broken = True

    async def one_fails(call):
        return error(400, "no") if broken and call.prompt.endswith("= 3") else None

    with ModelServer(one_fails) as server:
        for name in ("a", "b"):
            box.lines(f"in/{name}.jsonl", records(10))
        run = command(server, "--inplace", "--backup-field", "")
        run[2] = "in"
        assert box.fabe(*run).code == 1
        calls = len(server.calls)
        broken = False
        assert box.fabe(*run).code == 0
        assert len(server.calls) == calls + 1
        assert [r["code"] for r in box.read("in/b.jsonl")] == [
            f"VALUE_{i} = {i}" for i in range(10)
        ]


def test_order_is_kept_whatever_the_latency(box):
    async def dawdle(call):
        await asyncio.sleep((call.number * 7919 % 100) / 400)

    with ModelServer(dawdle) as server:
        box.lines("data.jsonl", records(200))
        assert box.fabe(*command(server)).code == 0
        assert (box.path / "outputs/data.jsonl").read_text() == expected(200)


def test_one_slow_record_holds_nobody_up(box):
    """The look-ahead: the server stays full while the first record takes its time."""

    async def first_is_slow(call):
        await asyncio.sleep(3 if call.prompt.endswith("= 0") else 0.02)

    with ModelServer(first_is_slow) as server:
        box.lines("data.jsonl", records(1500))
        process = box.start(*command(server))
        wait_for(lambda: len(server.calls) == 1500)
        assert any(call.prompt.endswith("= 0") for call in server.calls[:16])
        assert server.in_flight >= 1
        process.communicate(timeout=30)
        assert server.most_in_flight == CONCURRENCY


@pytest.mark.slow
def test_50_random_kills(box):
    """The output is that of an undisturbed run, and the requests stay within what was in flight."""
    chance = random.Random(11)
    kills = 0
    with ModelServer(latency=0.15) as server:
        box.lines("data.jsonl", records())
        command_4 = [4 if part == CONCURRENCY else part for part in command(server)]
        while kills < 50:
            process = box.start(*command_4)
            before = len(server.calls)
            while process.poll() is None and len(server.calls) == before:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.3)
            if process.poll() is not None:
                process.communicate()
                break
            box.kill(process)
            kills += 1
        ended = box.fabe(*command_4)
        assert ended.code == 0, ended
        assert kills >= 25
        assert (box.path / "outputs/data.jsonl").read_text() == expected()
        assert len(server.calls) <= N + kills * 4
        print(f"{kills} kills, {len(server.calls)} requests for {N} records")


def test_a_request_that_never_answers_is_asked_a_second_time(box):
    async def one_hangs(call):
        hung = (
            call.prompt.endswith("= 150") and sum(p.endswith("= 150") for p in server.prompts) == 1
        )
        await asyncio.sleep(60 if hung else 0.01)

    with ModelServer(one_hangs) as server:
        box.lines("data.jsonl", records(300))
        ended = box.fabe(*command(server), timeout=30)
        assert ended.code == 0, ended
        assert (box.path / "outputs/data.jsonl").read_text() == expected(300)
        assert len(server.calls) == 301


def test_a_kill_after_the_last_answer_costs_nothing(box, server):
    box.lines("data.jsonl", records(50))
    box.fabe(*command(server))
    for path in (box.path / ".cache/datasets").glob("*/cache-*.arrow"):
        path.unlink()
    for path in (box.path / ".cache/datasets").glob("*/finished-*"):
        path.unlink()
    ended = box.fabe(*command(server, "--output", "b"))
    assert ended.code == 0
    assert len(server.calls) == 50
    assert (box.path / "b/data.jsonl").read_text() == expected(50)


def test_leftovers_of_killed_runs_do_no_harm(box, server):
    box.lines("data.jsonl", records(20))
    box.fabe(*command(server))
    (folder,) = (box.path / ".cache/datasets").glob("[0-9a-f]*")
    box.write(f".cache/datasets/{folder.name}/tmpabc", b"half an arrow file")
    box.write(".cache/datasets/.new-x/records.arrow", b"half")
    box.write(".cache/owners/dead.lock", b"")
    box.write("outputs/.data.jsonl.x.tmp", b"half")
    ended = box.fabe(*command(server))
    assert ended.code == 0
    assert len(server.calls) == 20


def test_a_key_is_not_sent_in_the_open(box):
    box.lines("data.jsonl", records(2))
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
        "http://api.example.com/v1",
        "--api-key",
        "sk-1",
    )
    assert ended.code == 1
    assert "the key would be sent unencrypted" in ended.err


def test_a_full_disk_stops_the_run_and_keeps_what_is_stored(box):
    async def long_answer(call):
        return completion(call, answer_to(call.prompt) + "#" * 2000)

    with ModelServer(long_answer, latency=0.01) as server:
        box.lines("data.jsonl", records(200))
        line = shlex.join([*COMMAND, *map(str, command(server))])
        full = subprocess.run(
            ["bash", "-c", f"ulimit -f 200; exec {line}"],
            cwd=box.path,
            env=box.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert full.returncode == 1, full
        assert "records.sqlite" in full.stderr
        assert "Traceback" not in full.stderr
        sent = len(server.calls)
        assert sent < 200
        assert box.fabe(*command(server)).code == 0
        assert len(server.calls) <= 200 + 2 * CONCURRENCY


def test_a_locked_cache_is_waited_for(box, server):
    box.lines("data.jsonl", records(20))
    box.fabe(*command(server, "--instruction", "Other"))
    other = sqlite3.connect(box.path / ".cache/records.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    process = box.start(*command(server))
    time.sleep(3)
    other.execute("COMMIT")
    other.close()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, (out, err)
    assert len(server.calls) == 40


def test_a_touched_file_sends_nothing_and_an_edited_one_its_change(box, server):
    path = box.lines("data.jsonl", records(20))
    box.fabe(*command(server))
    stamp = path.stat()
    path.touch()
    box.fabe(*command(server))
    assert len(server.calls) == 20
    path.write_text(path.read_text().replace("value_7 = 7", "value_7 = 8"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    box.fabe(*command(server))
    assert len(server.calls) == 21


def test_a_busy_ollama_is_asked_again(box):
    async def busy_first(call):
        if call.number < 3:
            text = {"error": "server busy, please try again.  maximum pending requests exceeded"}
            return web.json_response(text, status=503)
        return None

    with ModelServer(busy_first) as server:
        box.lines("data.jsonl", records(10))
        ended = box.fabe(
            "run",
            "--input",
            "data.jsonl",
            "--instruction",
            "Up",
            "--provider",
            "ollama",
            "--model",
            "llama3",
            "--base-url",
            server.root,
        )
        assert ended.code == 0, ended
        assert len(server.calls) == 13


def test_a_kill_while_files_are_replaced_leaves_old_or_new(box):
    path = box.lines("data.jsonl", records(60_000))
    old = path.read_bytes()
    new = b""
    chance = random.Random(5)
    seen = set()
    for _ in range(8):
        path.write_bytes(old)
        shutil.rmtree(box.path / ".cache", ignore_errors=True)
        process = box.start("run", "--input", "data.jsonl", "--inplace")
        if not new:
            process.communicate()
            new = path.read_bytes()
            assert new != old
            continue
        wait_for(
            lambda process=process: (
                list((box.path / ".cache/datasets").glob("*/cache-*")) or process.poll() is not None
            )
        )
        time.sleep(chance.random() * 0.4)
        box.kill(process)
        assert path.read_bytes() in (old, new)
        seen.add(path.read_bytes() == new)
    assert seen


def test_caps_are_refused_to_workers(tmp_path, server):
    script = tmp_path / "script.py"
    script.write_text(
        "import datasets, fabe_ds\n"
        "data = datasets.Dataset.from_list([{'code': str(i)} for i in range(4)])\n"
        f"fn = fabe_ds.transform_fn(instruction='Up', provider='openai', model='m', "
        f"base_url={server.url!r}, cache_dir={str(tmp_path / 'c')!r}, max_requests=2)\n"
        "data.map(fn, batched=True, num_proc=2)\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert "leave num_proc out" in ended.stderr
    assert not server.calls
