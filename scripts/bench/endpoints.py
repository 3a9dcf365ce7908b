"""Two servers beside one, and two of which one is killed and started again in the middle.

    python scripts/bench/endpoints.py [--records 16000]

Each server is a process of its own that works on 64 requests at once, 100 ms each, and lets more
wait. One is asked with --concurrency 64, two with 128. Of "a tenth escalated", one answer in ten
is cut and another model asked (--fallback-model), so 0.91 is the most there is. The rate is that of
the whole command less the time that a run of 100 records takes. "sent twice" are requests that came
again, to either server; what a killed server had in flight may be among them, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

LATENCY, AT_ONCE = 0.1, 64


def serve(port: int, log: Path) -> None:
    """Runs a server; each prompt that comes is written to a file, so that a kill loses none."""
    gate = asyncio.Semaphore(AT_ONCE)
    seen = log.open("a")

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        is_cut = body["model"] == "m" and prompt.endswith("0 cut")
        seen.write(json.dumps(prompt) + "\n")
        seen.flush()
        async with gate:
            await asyncio.sleep(LATENCY)
        reason = "length" if is_cut else "stop"
        choice = {"finish_reason": reason, "message": {"role": "assistant", "content": prompt}}
        return web.json_response({"choices": [choice]})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": []})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", models)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


class Server:
    """A server process, at a port that it keeps when it is started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port, self.log = port, folder / f"{port}.log"
        self.url = f"http://127.0.0.1:{port}/v1"
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, "--serve", str(self.port), str(self.log)]
        self.process = subprocess.Popen(command)
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/models").close()
                return
            time.sleep(0.05)
        raise SystemExit("the server does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def seen(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def run(
    folder: Path, records: int, servers: list[Server], *more: str, end: str = ""
) -> tuple[float, str]:
    """Seconds of a command over so many records, and its first line."""
    data = folder / f"{records}.jsonl"
    data.write_text("".join(json.dumps({"code": f"x = {i}{end}"}) + "\n" for i in range(records)))
    where = [word for server in servers for word in ("--base-url", server.url)]
    began = time.monotonic()
    ended = subprocess.run(
        [
            *(Path(sys.executable).parent / "fabe-ds", "run", "--input", data),
            *("--output", folder / "out", "--cache-dir", folder / "cache", "--no-resume"),
            *("--provider", "openai", "--model", "m", "--instruction", "Copy", *where),
            *("--concurrency", str(AT_ONCE * len(servers)), *more),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return time.monotonic() - began, ended.stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=16_000)
    parser.add_argument("--serve", nargs=2)
    asked = parser.parse_args()
    if asked.serve:
        serve(int(asked.serve[0]), Path(asked.serve[1]))
        return
    count = asked.records
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = [Server(folder, 18771), Server(folder, 18772)]
        start = min(run(folder, 100, servers[:1])[0] for _ in range(2)) - 100 * LATENCY / AT_ONCE
        rates = []
        print(f"{'servers':<24}{'records/s':>10}{'of one':>8}{'sent twice':>12}")
        for asked_of in (servers[:1], servers):
            before = [len(server.seen) for server in servers]
            seconds, _ = run(folder, count, asked_of)
            came = [each.seen[n:] for each, n in zip(servers, before, strict=True)]
            again = _twice(came)
            rates.append(count / (seconds - start))
            label = f"{len(asked_of)}, {AT_ONCE} at once each"
            print(f"{label:<24}{rates[-1]:>10.0f}{rates[-1] / rates[0]:>8.2f}{again:>12}")
        # One record in ten is cut, and asked of another model at the same server.
        seconds, _ = run(folder, count, servers[:1], "--fallback-model", "big", end=" cut")
        rate = count / (seconds - start)
        print(f"{'1, a tenth escalated':<24}{rate:>10.0f}{rate / rates[0]:>8.2f}{'-':>12}")
        before = [len(server.seen) for server in servers]
        killer = threading.Timer(start + count / rates[1] * 0.3, _restarted, [servers[1]])
        killer.start()
        seconds, said = run(folder, count, servers)
        killer.join()
        came = [each.seen[n:] for each, n in zip(servers, before, strict=True)]
        rate = count / (seconds - start)
        line = f"{'2, one away for 2 s':<24}{rate:>10.0f}{rate / rates[0]:>8.2f}{_twice(came):>12}"
        print(f"{line}   {said.split(';')[0]}")
        for server in servers:
            server.kill()


def _restarted(server: Server) -> None:
    server.kill()
    time.sleep(2.0)
    server.start()


def _twice(came: list[list[Any]]) -> int:
    counts = Counter(prompt for each in came for prompt in each)
    return sum(number - 1 for number in counts.values())


if __name__ == "__main__":
    main()
