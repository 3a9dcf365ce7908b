"""How near to a bare aiohttp loop the request engine comes, against a local server with latency.

    python scripts/bench/http_engine.py [--records 5000] [--concurrency 16 64 256]

Side by side in one run, over the same records: a bare aiohttp loop with a semaphore that does
nothing else; a batched `Dataset.map` with a thread pool and requests, as people write it by hand;
`fabe-ds run`, from its first request to its end (the finished export). Latencies: 100 ms constant,
and log-normal with a median of 100 ms and sigma 0.5 and 0.8. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))
from tests.support.functions import functions  # noqa: E402

ANSWER = json.dumps(
    {
        "id": "x",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "x" * 400},
            }
        ],
        "usage": {"prompt_tokens": 200, "completion_tokens": 100},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Server(asyncio.Protocol):
    """As little of HTTP as a benchmark needs, so that the server is not what is measured."""

    first: float | None = None
    sigma = 0.0
    chance = random.Random(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        size = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                size = int(value)
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        if head.startswith(b"GET"):
            body = json.dumps({"data": [], "first": Server.first}).encode()
            if b"/reset" in head:
                Server.first = None
                Server.sigma = float(head.split(b"sigma=")[1].split()[0])
                Server.chance = random.Random(1)
            self.transport.write(HEAD % len(body) + body)
            return
        if Server.first is None:
            Server.first = time.time()
        delay = 0.1 * math.exp(Server.sigma * Server.chance.gauss(0, 1)) if Server.sigma else 0.1
        loop = asyncio.get_running_loop()
        loop.call_later(delay, self.transport.write, HEAD % len(ANSWER) + ANSWER)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


BARE = """
import asyncio, json, sys, time, aiohttp
url, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
async def main():
    records = [json.loads(line) for line in open(path)]
    gate = asyncio.Semaphore(limit)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def ask(record):
            async with gate:
                body = {"model": "m", "messages": [{"role": "user", "content": record["code"]}]}
                async with session.post(url + "/chat/completions", json=body) as response:
                    return (await response.json())["choices"][0]["message"]["content"]
        await asyncio.gather(*map(ask, records))
asyncio.run(main())
"""
THREADS = """
import sys, datasets, requests
from concurrent.futures import ThreadPoolExecutor
datasets.disable_progress_bars()
url, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
session = requests.Session()
session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=limit))
pool = ThreadPoolExecutor(limit)
def ask(code):
    body = {"model": "m", "messages": [{"role": "user", "content": code}]}
    answer = session.post(url + "/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"]
data = datasets.Dataset.from_list([__import__("json").loads(line) for line in open(path)])
data = data.map(lambda batch: {"code": list(pool.map(ask, batch["code"]))}, batched=True)
data.to_json(sys.argv[4])
"""


def measure(command: list[str], cwd: Path, url: str, sigma: float) -> tuple[float, float, float]:
    """Seconds from the first request to the end, CPU seconds, seconds before the first request."""
    import requests

    requests.get(f"{url}/reset?sigma={sigma}", timeout=5)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.time()
    subprocess.run(
        command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ended = time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = requests.get(f"{url}/models", timeout=5).json()["first"] or ended
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ended - first, cpu, first - started


@contextlib.contextmanager
def served(count: int) -> Iterator[tuple[Path, str]]:
    """A folder with `count` different records as data.jsonl, and the address of the server."""
    command = [sys.executable, __file__, "--serve"]
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        folder = Path(name)
        with (folder / "data.jsonl").open("w") as file:
            for i, record in enumerate(functions(count)):
                file.write(json.dumps({**record, "code": f"# {i}\n{record['code']}"}) + "\n")
        assert server.stdout is not None
        try:
            yield folder, f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    fabe = str(Path(sys.executable).parent / "fabe-ds")
    with served(options.records) as (folder, url):
        print(
            "{:>5} {:>5} {:<16} {:>9} {:>8} {:>10} {:>8}".format(
                "sigma", "limit", "what", "records/s", "of bare", "CPU ms/rec", "start s"
            )
        )
        for sigma in options.sigma:
            for limit in options.concurrency:
                arguments = [url, "data.jsonl", str(limit), "threads.jsonl"]
                run = [
                    fabe,
                    "run",
                    "--input",
                    "data.jsonl",
                    "--instruction",
                    "Do",
                    "--provider",
                    "openai",
                    "--model",
                    "m",
                    "--base-url",
                    url,
                    "--concurrency",
                    str(limit),
                ]
                commands = [
                    ("bare aiohttp", [sys.executable, "-c", BARE, *arguments]),
                    ("map and threads", [sys.executable, "-c", THREADS, *arguments]),
                    ("fabe-ds run", run),
                ]
                shutil.rmtree(folder / ".cache", ignore_errors=True)
                bare = 0.0
                for what, command in commands:
                    seconds, cpu, start = measure(command, folder, url, sigma)
                    rate = options.records / seconds
                    bare = bare or rate
                    print(
                        f"{sigma:>5} {limit:>5} {what:<16} {rate:>9.0f} {rate / bare:>8.2f} "
                        f"{cpu / options.records * 1000:>10.2f} {start:>8.2f}",
                        flush=True,
                    )
        for path in (folder / ".cache/datasets").iterdir():
            shutil.rmtree(path)
        subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((folder / "outputs.run.json").read_text())
        assert report["cached"] == options.records
        seconds = report["seconds"]
        print(
            f"from the record cache: {options.records / seconds:.0f} records/s, load and export too"
        )


if __name__ == "__main__":
    main()
