"""How much is sent at once and a minute, by one process and by several."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
from aiohttp import web

from fabe_ds.engine.rates import Bucket, duration
from tests.conftest import wait_for
from tests.support.server import Call, ModelServer, error, openai_run


class Moving:
    """A server that admits so many at once, and refuses the rest at once."""

    def __init__(self, phases: list[tuple[float, int]], latency: float = 0.1) -> None:
        self.phases, self.latency = phases, latency
        self.started: float | None = None
        self.inside = self.refused = 0
        self.occupied = 0.0  # seconds that places were taken, all together

    def admitted(self) -> int:
        self.started = self.started or time.monotonic()
        past = time.monotonic() - self.started
        for length, limit in self.phases:
            if past < length:
                return limit
            past -= length
        return self.phases[-1][1]

    async def __call__(self, call: Call) -> web.StreamResponse | None:
        if self.inside >= self.admitted():
            self.refused += 1
            return error(429, "too many at once")
        self.inside += 1
        since = time.monotonic()
        try:
            await asyncio.sleep(self.latency)
        finally:
            self.inside -= 1
            self.occupied += time.monotonic() - since
        return None


@pytest.mark.slow
@pytest.mark.alone
def test_auto_follows_a_limit_that_moves(box):
    # Of the places that the server offers, and not of answers: a busy machine is slower at both.
    phases = [(12.0, 8), (12.0, 32), (12.0, 8)]
    offered = sum(seconds * places for seconds, places in phases)
    moving = Moving(phases)
    with ModelServer(moving) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(20_000)])
        process = box.start(*openai_run(server, "--concurrency", "auto", "--retry", 50))
        wait_for(lambda: moving.started is not None)
        assert moving.started is not None
        time.sleep(
            max(0.0, moving.started + sum(length for length, _ in phases) - time.monotonic())
        )
        occupied, refused = moving.occupied / offered, moving.refused / len(server.calls)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    print(f"auto: {occupied:.2f} of the places, {refused:.3f} refused")
    assert refused < 0.05
    assert occupied >= 0.6


WORKERS = """
import sys, datasets, fabe_ds
if __name__ == "__main__":
    data = datasets.Dataset.from_list([{"code": f"x = {i}"} for i in range(int(sys.argv[3]))])
    fn = fabe_ds.transform_fn(field="code", instruction="Up", provider="openai", model="m",
                              base_url=sys.argv[1], cache_dir=sys.argv[2], concurrency=8)
    data = data.map(fn, batched=True, batch_size=20, num_proc=4)
    print(data["code"] == [f"X = {i}" for i in range(len(data))])
"""


@pytest.mark.parametrize("time", range(3))
def test_workers_share_the_concurrency(tmp_path, time):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    with ModelServer(latency=0.02) as server:
        ended = subprocess.run(
            [sys.executable, script, server.url, tmp_path / "cache", "200"],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ended.stdout.strip() == "True", ended.stderr
        assert len(server.calls) == 200
        assert 4 <= server.most_in_flight <= 8


@pytest.mark.skipif(sys.platform != "linux", reason="workers die with their parent on Linux")
def test_workers_die_with_a_killed_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    with ModelServer(latency=0.1) as server:
        command = [sys.executable, script, server.url, tmp_path / "cache", "600"]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while len(server.calls) < 60:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)
        sent = len(server.calls)
        time.sleep(1)
        assert len(server.calls) == sent
        assert sent < 600
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
        assert ended.stdout.strip() == "True", ended.stderr
        assert len(server.calls) <= 600 + 8


def test_workers_share_the_requests_a_minute(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS.replace("concurrency=8", "concurrency=8, rpm=600"))
    with ModelServer() as server:
        started = time.monotonic()
        command = [sys.executable, script, server.url, tmp_path / "cache", "120"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
        seconds = time.monotonic() - started
        assert ended.stdout.strip() == "True", ended.stderr
    assert seconds >= 120 / 10 - 60 / 10 - 1  # what may come at once, and the first second


def test_requests_a_minute_are_kept_to(box):
    with ModelServer() as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(90)])
        started = time.monotonic()
        ended = box.fabe(*openai_run(server, "--rpm", 600, "--concurrency", 50))
        seconds = time.monotonic() - started
    assert ended.code == 0, ended
    assert seconds >= (90 - 60 - 1) / 10


def test_what_the_server_says_is_used_up_is_waited_for(box):
    times: list[float] = []

    async def behave(call: Call) -> web.StreamResponse | None:
        times.append(time.monotonic())
        if len(times) != 10:
            return None
        from tests.support.server import answer_to, completion

        response = completion(call, answer_to(call.prompt))
        response.headers["x-ratelimit-remaining-requests"] = "0"
        response.headers["x-ratelimit-reset-requests"] = "1.2s"
        return response

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(40)])
        assert box.fabe(*openai_run(server, "--concurrency", 2)).code == 0
    assert max(b - a for a, b in itertools.pairwise(times)) >= 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360), ("1s", 1), ("20ms", 0.02), ("1h2m3.5s", 3723.5), ("", 0), ("soon", 0)],
)
def test_durations(text, seconds):
    assert duration(text) == pytest.approx(seconds)


def test_a_bucket_fills_at_its_rate():
    now = 0.0
    bucket = Bucket(60, lambda: now)
    for _ in range(6):
        assert bucket.wait() == 0
        bucket.take(1)
    assert bucket.wait() == pytest.approx(0, abs=0.01)
    bucket.take(3)
    assert bucket.wait() == pytest.approx(3, abs=0.01)
    now += 3.01
    assert bucket.wait() == 0
