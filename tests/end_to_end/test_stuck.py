"""After any stop, refusal or error of an engine, the same process and every other can go on."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time

import datasets
import pytest
from aiohttp import web

import fabe_ds
from fabe_ds.engine.loop import LoopThread
from fabe_ds.errors import FabeError
from fabe_ds.formats.base import Row
from tests.conftest import wait_for
from tests.support.server import Call, ModelServer, error, openai_run

SECONDS = 20


def transform(tmp_path, server_or_url, **more):
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url
    how = {"instruction": "Up", "provider": "openai", "model": "m", "retry": 0, "concurrency": 4}
    return fabe_ds.transform_fn(base_url=url, cache_dir=tmp_path / "cache", **{**how, **more})


def rows(count=8):
    return datasets.Dataset.from_list([{"code": f"x = {i}"} for i in range(count)])


def mapped(fn, data=None):
    """The map in a thread, so that a hang fails the test and not the session."""
    outcome: list[object] = []

    def work():
        try:
            outcome.append((data or rows()).map(fn, batched=True)["code"])
        except BaseException as failed:
            outcome.append(failed)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "it hangs"
    return outcome[0]


def free_port() -> int:
    with ModelServer() as server:
        return int(server.root.rsplit(":", 1)[1])


def test_a_transform_goes_on_when_its_server_has_come_up(tmp_path):
    port = free_port()
    fn = transform(tmp_path, f"http://127.0.0.1:{port}/v1")
    other = transform(tmp_path, f"http://127.0.0.1:{port}/v1", max_new_tokens=99)
    for _ in range(2):
        assert "no server answers there" in str(mapped(fn))
    with ModelServer(port=port) as server:
        expected = [f"X = {i}" for i in range(8)]
        assert list(mapped(fn)) == expected
        assert list(mapped(fn)) == expected
        assert len(server.calls) == 8
        assert list(mapped(other)) == expected  # another on the same cache


def refusing(status: int, **more):
    async def behave(call: Call) -> web.StreamResponse | None:
        return error(status, "no", **more)

    return behave


@pytest.mark.parametrize(
    "behave",
    [
        refusing(401),
        refusing(403),
        refusing(429, code="billing_hard_limit_reached"),
        refusing(404, code="model_not_found"),
        refusing(400),
        refusing(500),
    ],
    ids=["key", "forbidden", "quota", "model", "rejected", "server"],
)
def test_a_refusal_holds_up_nobody_afterwards(tmp_path, behave):
    with ModelServer(behave) as server:
        fn = transform(tmp_path, server)
        for _ in range(2):
            assert isinstance(mapped(fn), FabeError)
        server.behaviour = None
        assert list(mapped(fn)) == [f"X = {i}" for i in range(8)]


def test_a_listing_that_is_refused_holds_up_nobody_afterwards(tmp_path):
    with ModelServer() as server:
        server.key = "k"
        fn = transform(tmp_path, server)
        assert "the key is not accepted" in str(mapped(fn))
        server.key = None
        assert list(mapped(fn)) == [f"X = {i}" for i in range(8)]


def test_another_process_goes_on_too(tmp_path, box):
    port = free_port()
    fn = transform(box.path, f"http://127.0.0.1:{port}/v1")
    assert "no server answers there" in str(mapped(fn))
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(8)])
    with ModelServer(port=port) as server:
        run = openai_run(server, "--cache-dir", box.path / "cache")
        assert box.fabe(*run, timeout=SECONDS + 10).code == 0


def test_a_cache_that_fails_once_holds_up_nobody_afterwards(tmp_path, monkeypatch):
    from fabe_ds.errors import CacheError
    from fabe_ds.store.completions import RecordCache

    def broken(self, keys):
        raise CacheError("disk full")

    with ModelServer() as server:
        fn = transform(tmp_path, server)
        with monkeypatch.context() as patched:
            patched.setattr(RecordCache, "claim", broken)
            assert "disk full" in str(mapped(fn))
        with monkeypatch.context() as patched:
            patched.setattr(RecordCache, "put", broken)
            assert "disk full" in str(mapped(fn))
        assert list(mapped(fn)) == [f"X = {i}" for i in range(8)]


def test_items_that_fail_hold_up_nobody_afterwards(tmp_path):
    with ModelServer(latency=0.05) as server:
        fn = transform(tmp_path, server)

        def broken():
            yield from fn.items(Row([f"x = {i}"]) for i in range(4))
            raise ValueError("the caller's code")

        with pytest.raises(ValueError, match="the caller's code"):
            list(fn.runtime.outcomes(broken()))
        assert list(mapped(fn)) == [f"X = {i}" for i in range(8)]


def test_a_model_that_fails_to_load_holds_up_nobody_afterwards(tmp_path, tiny):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = (folder / "model.safetensors").read_bytes()
    how = {"instruction": "Up", "provider": "hf", "model": str(folder), "max_new_tokens": 4}
    fn = fabe_ds.transform_fn(cache_dir=tmp_path / "cache", on_truncated="keep", **how)
    fn.provider.identity()  # of the whole model

    class Unloadable(Exception):
        pass

    def fail():
        raise Unloadable("out of memory")

    before = fn.provider.preflight
    fn.provider.preflight = fail
    for _ in range(2):
        assert isinstance(mapped(fn, rows(3)), Unloadable)
    fn.provider.preflight = before
    after = mapped(fn, rows(3))
    assert not isinstance(after, AssertionError)
    assert weights == (folder / "model.safetensors").read_bytes()


def test_a_finalizer_on_the_engines_thread_ends(tmp_path):
    """A stopped transform may be collected on the very thread that its closing waits for."""
    with ModelServer() as server:
        fn = transform(tmp_path, server)
        mapped(fn)
        runtime = fn.runtime
        loop = LoopThread.shared()
        done = threading.Event()

        def close():
            runtime.close()
            done.set()

        loop.loop.call_soon_threadsafe(close)
        assert done.wait(5), "the engine's thread waits for itself"
        assert list(mapped(transform(tmp_path, server))) == [f"X = {i}" for i in range(8)]


def test_a_transform_that_was_stopped_leaves_no_cycle_behind(tmp_path):
    with ModelServer(refusing(401)) as server:
        fn = transform(tmp_path, server)
        assert isinstance(mapped(fn), FabeError)
        runtime = fn.session._runtime
        del fn
        gc.collect()
        wait_for(lambda: runtime.closed, 5)


def test_first_calls_from_several_threads_open_one_session(tmp_path):
    with ModelServer(latency=0.1) as server:
        fn = transform(tmp_path, server, concurrency=3)
        threads = [
            threading.Thread(
                target=lambda part=part: fn({"code": [f"x = {part}{i}" for i in range(6)]})
            )
            for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert len(server.calls) == 24
        assert server.most_in_flight <= 3


def test_a_listing_that_hangs_holds_up_no_other_endpoint(tmp_path):
    class Hanging(ModelServer):
        async def _list_openai(self, request: web.Request) -> web.Response:
            await asyncio.sleep(6)
            return await super()._list_openai(request)

    with Hanging() as slow, ModelServer() as quick:
        waiting = threading.Thread(
            target=lambda: transform(tmp_path / "a", slow)({"code": ["x = 1"]}), daemon=True
        )
        waiting.start()
        time.sleep(0.5)
        started = time.monotonic()
        transform(tmp_path / "b", quick)({"code": ["x = 1"]})
        assert time.monotonic() - started < 4
        waiting.join(SECONDS)


STAGES = {
    "before the first answer": lambda server: len(server.calls) >= 1,
    "in the middle": lambda server: len(server.calls) >= 60,
    "near the end": lambda server: len(server.calls) >= 118,
}


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_stopped_at_any_stage_goes_on(box, stage, signal):
    import signal as signals

    with ModelServer(latency=0.05) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(120)])
        process = box.start(*openai_run(server, "--concurrency", 4))
        wait_for(lambda: STAGES[stage](server))
        process.send_signal(getattr(signals, signal))
        process.communicate(timeout=SECONDS)
        ended = box.fabe(*openai_run(server, "--concurrency", 4), timeout=60)
        assert ended.code == 0, ended
        assert len(server.calls) <= 120 + (4 if signal == "SIGKILL" else 0)
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == [f"X = {i}" for i in range(120)]


def test_a_server_that_dies_before_its_first_answer_and_comes_back(box):
    """It lists its models, and then is restarted: the run waits, and says so."""
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(20)])

    async def never(call: Call) -> None:
        await asyncio.sleep(60)

    with ModelServer(never) as first:
        process = box.start(*openai_run(first))
        wait_for(lambda: len(first.calls) >= 1)
        port = int(first.root.rsplit(":", 1)[1])
    time.sleep(3)
    with ModelServer(port=port):
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "gone for" in err
    assert "the server answers again" in err


def test_a_record_that_breaks_every_connection_costs_one_record(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        if call.prompt.endswith("= 5"):
            assert call.request.transport is not None
            call.request.transport.abort()
            return web.Response()
        return None

    with ModelServer(behave) as server:
        box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
        ended = box.fabe(*openai_run(server, "--retry", 6), timeout=90)
        assert ended.code == 1, ended
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["failure"]) == (5, "connection")


def test_the_interpreter_ends_at_once_while_a_listing_hangs(tmp_path):
    class Hanging(ModelServer):
        async def _list_openai(self, request: web.Request) -> web.Response:
            await asyncio.sleep(9)
            return await super()._list_openai(request)

    script = (
        "import sys, threading, fabe_ds\n"
        "fn = fabe_ds.transform_fn(instruction='Up', provider='openai', model='m',"
        " base_url=sys.argv[1], cache_dir=sys.argv[2])\n"
        "threading.Thread(target=fn, args=({'code': ['x']},), daemon=True).start()\n"
        "import time; time.sleep(1)\n"
    )
    with Hanging() as server:
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", script, server.url, tmp_path], timeout=30, check=True)
        assert time.monotonic() - started < 8
