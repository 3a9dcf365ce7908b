"""How much of a server's rate is kept when it refuses now and then, against a local server.

    python scripts/bench/flaky.py [--seeds 10] [--only NAME]

Each law is one kind of weather, over real sockets: a server of constant latency (100 ms) or of
log-normal latency (median 82 ms, sigma 0.7) that refuses a share of all requests, or refuses in a
burst, or admits so many at once (a number that moves). `fabe-ds run` asks it without end for so
many seconds, once for each seed; the rate is that of good answers. A ratio is the rate beside that
of the same server without refusals (bursts: from 5 s after the burst's end on), beside what the
admitted requests could do at most, or (auto, with 64 workers behind the server) beside the best of
the seeds. "least" is what the worst seed has to reach, or after a burst, where but four seconds are
looked at, the mean of the seeds. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

BURST_SECONDS = 2.0


@dataclass(frozen=True)
class Law:
    """One kind of weather. `least`: the ratio that it has to reach."""

    name: str
    concurrency: str = "32"
    sigma: float = 0.0
    status: int = 503
    share: float = 0.0
    burst: float = 0.0  # share refused in the first seconds, instead of always
    admits: str = ""  # requests at once; "8,32,8" moves in thirds of the run
    workers: int = 10_000  # requests at once that are worked on; more wait
    least: float = 0.0
    seconds: float = 5.0


SIGMAS = (0.0, 0.7)
LAWS = [
    *(
        Law(f"{share:.1%} of 503", sigma=sigma, share=share, least=least)
        for sigma in SIGMAS
        for share, least in ((0.001, 0.8), (0.01, 0.8), (0.03, 0.7), (0.1, 0.0))
    ),
    *(
        Law(f"{share:.1%} of 429", sigma=0.7, status=429, share=share, least=least)
        for share, least in ((0.01, 0.8), (0.03, 0.7))
    ),
    *(
        Law("30% in a burst of 2 s", sigma=sigma, burst=0.3, least=0.95, seconds=11)
        for sigma in SIGMAS
    ),
    Law("all in a burst of 2 s", sigma=0.7, burst=1.0, least=0.95, seconds=11),
    *(
        Law("admits 8, 32, 8", sigma=sigma, status=429, admits="8,32,8", seconds=15)
        for sigma in SIGMAS
    ),
    *(
        Law(f"auto, {share:.1%} of 503", "auto", 0.7, share=share, workers=64, least=0.8, seconds=9)
        for share in (0.0, 0.01)
    ),
]


class Run:
    """What one run of the client met. A request of a killed client counts for its own run."""

    def __init__(self, law: dict[str, Any]) -> None:
        self.law, self.chance = law, random.Random(law["seed"])
        self.first: float | None = None
        self.good: list[float] = []
        self.refused = self.inside = 0
        self.gate = asyncio.Semaphore(law["workers"])

    def refuses(self) -> bool:
        law, now = self.law, time.monotonic()
        self.first = self.first or now
        past = now - self.first
        if law["burst"]:
            return past < BURST_SECONDS and self.chance.random() < law["burst"]
        if law["admits"]:
            levels = law["admits"].split(",")
            place = min(len(levels) - 1, int(past / law["seconds"] * len(levels)))
            return self.inside >= int(levels[place])
        return self.chance.random() < law["share"]

    async def answer(self) -> bool:
        """Takes the time of an answer; False where it is a refusal."""
        if self.refuses():
            self.refused += 1
            return False
        sigma = self.law["sigma"]
        latency = 0.082 * math.exp(sigma * self.chance.gauss(0, 1)) if sigma else 0.1
        self.inside += 1
        try:
            async with self.gate:
                await asyncio.sleep(latency)
        finally:
            self.inside -= 1
        self.good.append(time.monotonic())
        return True


class Weather:
    """The server; POST /weather begins a new run under a law."""

    run: Run

    async def weather(self, request: web.Request) -> web.Response:
        self.run = Run(await request.json())
        return web.Response()

    async def counts(self, _: web.Request) -> web.Response:
        first = self.run.first or 0.0
        times = [moment - first for moment in self.run.good]
        return web.json_response({"good": times, "refused": self.run.refused})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def complete(self, request: web.Request) -> web.Response:
        run, body = self.run, await request.json()
        if not await run.answer():
            return web.json_response({"error": {"message": "busy"}}, status=run.law["status"])
        message = {"role": "assistant", "content": body["messages"][-1]["content"]}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return web.json_response({"choices": [choice]})


def serve() -> None:
    async def main() -> None:
        weather = Weather()
        app = web.Application()
        app.router.add_post("/weather", weather.weather)
        app.router.add_get("/counts", weather.counts)
        app.router.add_get("/v1/models", weather.models)
        app.router.add_post("/v1/chat/completions", weather.complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


def measure(root: str, folder: Path, law: Law, seed: int, calm: bool) -> dict[str, Any]:
    """What the server counted of one run that is stopped after the law's seconds."""
    import requests

    still = {"share": 0.0, "burst": 0.0, "admits": ""} if calm else {}
    settings = {**law.__dict__, **still, "seed": seed}
    requests.post(f"{root}/weather", json=settings, timeout=5)
    command = [
        *(str(Path(sys.executable).parent / "fabe-ds"), "run", "--input", "data.jsonl"),
        *("--instruction", "x", "--provider", "openai", "--model", "m", "--no-resume"),
        *("--base-url", f"{root}/v1", "--concurrency", law.concurrency, "--retry", "8"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, **quiet) as process:
        while not (seen := requests.get(f"{root}/counts", timeout=5).json())["good"]:
            if seen["refused"]:
                break
            time.sleep(0.05)
        time.sleep(law.seconds)
        seen = requests.get(f"{root}/counts", timeout=5).json()
        process.kill()
    return dict(seen)


def rate(seen: dict[str, Any], start: float, end: float) -> float:
    return sum(start <= moment < end for moment in seen["good"]) / (end - start)


def report(root: str, folder: Path, law: Law, seeds: int, calm: dict[Any, float]) -> bool:
    """Measures a law and prints its row. `calm` keeps the rates without refusals."""
    start = BURST_SECONDS + 5 if law.burst else 4.0 if law.concurrency == "auto" else 1.0
    rates, ratios, refused = [], [], []
    for seed in range(seeds):
        seen = measure(root, folder, law, seed, calm=False)
        rates.append(rate(seen, start, law.seconds))
        refused.append(seen["refused"] / max(1, seen["refused"] + len(seen["good"])))
        like = (law.concurrency, law.sigma, law.seconds, seed)
        if law.concurrency != "auto" and not law.admits:
            if like not in calm:
                calm[like] = rate(measure(root, folder, law, seed, calm=True), start, law.seconds)
            ratios.append(rates[-1] / calm[like])
    if law.admits:
        mean = statistics.fmean(map(int, law.admits.split(",")))
        best = mean / (0.082 * math.exp(law.sigma**2 / 2) if law.sigma else 0.1)
        ratios = [rate / best for rate in rates]
    if law.concurrency == "auto":
        ratios = [rate / max(rates) for rate in rates]
    good = (statistics.fmean(ratios) if law.burst else min(ratios)) >= law.least
    print(
        f"{law.name:<24} {law.concurrency:>5} {law.sigma:>5} {statistics.fmean(rates):>9.0f} "
        f"{min(ratios):>6.2f} {statistics.fmean(ratios):>6.2f} {statistics.fmean(refused):>8.1%} "
        f"{law.least:>6.2f} {'' if good else 'MISSED'}",
        flush=True,
    )
    return good


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        folder = Path(name)
        with (folder / "data.jsonl").open("w") as file:
            file.writelines(json.dumps({"code": f"x = {i}"}) + "\n" for i in range(30_000))
        assert server.stdout is not None
        root = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        print(f"{options.seeds} seeds; a ratio is the rate beside that without refusals")
        print("law                      limit sigma records/s    min   mean  refused  least")
        try:
            calm: dict[Any, float] = {}
            good = [
                report(root, folder, law, options.seeds, calm)
                for law in LAWS
                if options.only in law.name
            ]
        finally:
            server.terminate()
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
