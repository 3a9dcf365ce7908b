"""A night in small: a run over a server that does all that servers do in one night.

    python scripts/bench/night.py [--records 20000] [--loading 60]

Latency is log-normal (median 82 ms, sigma 0.7); one request in a hundred is answered by 503; the
model loads for a minute before its first answer; the server is restarted twice in the middle; one
record in 200 is broken off once (`insufficient_system_resource`), and one in 200 is stopped by a
filter (`SAFETY`) always. The run is killed twice with -9 and resumed. Printed: the output, how
many requests there were beside the bound, and the rate while the server was there, beside a run
that nothing disturbs. The terminal's lines go to night.log in the current folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

CONCURRENCY = 32


def serve(port: int, loading: float, calm: bool, seen_file: str) -> None:
    """Answers until it is killed; notes the time, record and kind of each answer."""
    chance, started = random.Random(port), time.monotonic()
    with Path(seen_file).open("a", buffering=1) as seen:
        asked = {int(line.split()[1]) for line in Path(seen_file).read_text().splitlines() if line}

        async def models(_: web.Request) -> web.Response:
            return web.json_response({"data": []})

        async def complete(request: web.Request) -> web.Response:
            if time.monotonic() - started < loading:
                error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
                return web.json_response({"error": error}, status=503)
            text = (await request.json())["messages"][-1]["content"]
            record = int(text.rsplit(" ", 1)[1])
            if not calm and chance.random() < 0.01:
                seen.write(f"{time.time():.2f} {record} refused\n")
                return web.json_response({"error": {"message": "busy"}}, status=503)
            await asyncio.sleep(0.082 * math.exp(0.7 * chance.gauss(0, 1)))
            reason, content = "stop", f"value {record} new"
            if not calm and record % 200 == 0 and record not in asked:
                reason, content = "insufficient_system_resource", "value"
            if not calm and record % 200 == 100:
                reason, content = "SAFETY", "val"
            asked.add(record)
            seen.write(f"{time.time():.2f} {record} {reason}\n")
            message = {"role": "assistant", "content": content}
            usage = {"prompt_tokens": 9, "completion_tokens": 3}
            choice = {"message": message, "finish_reason": reason}
            return web.json_response({"choices": [choice], "usage": usage})

        async def main() -> None:
            app = web.Application()
            app.router.add_get("/v1/models", models)
            app.router.add_post("/v1/chat/completions", complete)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
            await asyncio.Event().wait()

        asyncio.run(main())


class Night:
    """The server and the client, each started, killed and started again."""

    def __init__(self, folder: Path, calm: bool) -> None:
        self.folder, self.calm, self.seen = folder, calm, folder / "seen.txt"
        self.seen.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.log = (folder / "night.log").open("a")

    def server(self, loading: float) -> None:
        options = ["--port", str(self.port), "--loading", str(loading), "--seen", str(self.seen)]
        command = [sys.executable, __file__, "--serve", *options, *(["--calm"] * self.calm)]
        self._server = subprocess.Popen(command)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def client(self) -> None:
        self._client = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "fabe-ds"), "run", "--input", "data.jsonl"),
                *("--instruction", "x", "--provider", "openai", "--model", "m"),
                *("--base-url", f"http://127.0.0.1:{self.port}/v1"),
                *("--concurrency", str(CONCURRENCY)),
            ],
            cwd=self.folder,
            stdout=self.log,
            stderr=self.log,
        )

    def answers(self) -> int:
        return sum(1 for _ in self.seen.open())

    def until(self, count: int) -> None:
        while self.answers() < count and self._client.poll() is None:
            time.sleep(0.1)

    def kill_client(self) -> None:
        self._client.send_signal(signal.SIGKILL)
        self._client.wait()

    def kill_server(self) -> None:
        self._server.kill()
        self._server.wait()

    def end(self) -> int:
        code = self._client.wait()
        self.kill_server()
        return code

    def rate(self) -> float:
        """Answers a second, over the seconds in which there were any but the first and last."""
        seconds: dict[int, int] = {}
        for line in self.seen.open():
            moment, _, kind = line.split()
            seconds[int(float(moment))] = seconds.get(int(float(moment)), 0) + (kind != "refused")
        edges = {s for s in seconds if s - 1 not in seconds or s + 1 not in seconds}
        inner = [count for second, count in seconds.items() if second not in edges]
        return sum(inner) / max(1, len(inner))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--loading", type=float, default=60.0)
    for name in ("--serve", "--calm"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--port", type=int)
    parser.add_argument("--seen")
    options = parser.parse_args()
    if options.serve:
        serve(options.port, options.loading, options.calm, options.seen)
        return
    count = options.records
    records = [{"id": i, "code": f"value {i}", "n": 1.50} for i in range(count)]
    with tempfile.TemporaryDirectory() as calm_name, tempfile.TemporaryDirectory() as name:
        for folder in (Path(calm_name), Path(name)):
            lines = (json.dumps(record) + "\n" for record in records)
            (folder / "data.jsonl").write_text("".join(lines))
        calm = Night(Path(calm_name), calm=True)
        calm.server(0)
        calm.client()
        calm.end()
        night = Night(Path(name), calm=False)
        night.server(options.loading)
        night.client()
        night.until(count // 5)
        night.kill_client()
        night.client()
        night.until(2 * count // 5)
        night.kill_server()
        time.sleep(3)
        night.server(5)
        night.until(3 * count // 5)
        night.kill_client()
        night.client()
        night.until(4 * count // 5)
        night.kill_server()
        time.sleep(3)
        night.server(5)
        code = night.end()
        report(records, night, calm.rate(), code)


def expected(record: dict[str, Any]) -> str:
    if record["id"] % 200 == 100:
        return json.dumps(record) + "\n"
    new = {"code": f"{record['code']} new", "original_code": record["code"]}
    return json.dumps({"id": record["id"], **new, "n": record["n"]}) + "\n"


def report(records: list[dict[str, Any]], night: Night, calm: float, code: int) -> None:
    right = "".join(map(expected, records))
    output = night.folder / "outputs/data.jsonl"
    kinds: dict[str, int] = {}
    for line in night.seen.open():
        kinds[line.split()[2]] = kinds.get(line.split()[2], 0) + 1
    asked, again = sum(kinds.values()), kinds["refused"] + kinds["insufficient_system_resource"]
    # A request that a kill or a restart cut may be answered and not read, and is sent again.
    bound = len(records) + again + 4 * CONCURRENCY
    print(f"exit code {code} (1: the filtered records failed)")
    print(f"bytes as they must be: {output.exists() and output.read_text() == right}")
    print(f"requests {asked}, at most {bound} ({kinds})")
    print(f"records/s {night.rate():.0f}, undisturbed {calm:.0f}: {night.rate() / calm:.2f}")
    (Path.cwd() / "night.log").write_text((night.folder / "night.log").read_text())


if __name__ == "__main__":
    main()
