"""What a Ray cluster costs beside one process, where one machine would do.

    python scripts/bench/ray_runner.py [--records 5000] [--concurrency 64 256] [--sigma 0.5]

The same records against the same local server (`http_engine.py`'s: 100 ms, log-normal) with the
same concurrency in all: `fabe-ds run` in one process, and with `--runner ray` with one and two
workers, in a cluster that the run starts for itself. Rates count from the first request to the
end; "start" is what comes before. Memory is what the run's processes have for themselves, at its
most.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import requests
from http_engine import served

FABE = str(Path(sys.executable).parent / "fabe-ds")


def measure(command: list[str], cwd: Path, url: str, sigma: float) -> tuple[float, float, float]:
    """Seconds from the first request to the end, seconds before it, most bytes of memory."""
    requests.get(f"{url}/reset?sigma={sigma}", timeout=5)
    started = time.time()
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        sizes = [0]
        watching = threading.Thread(target=_watch, args=(process.pid, sizes), daemon=True)
        watching.start()
    ended = time.time()
    assert process.returncode == 0
    first = requests.get(f"{url}/models", timeout=5).json()["first"]
    return ended - first, first - started, max(sizes)


def _watch(pid: int, sizes: list[int]) -> None:
    try:
        run = psutil.Process(pid)
        while run.is_running():
            size = 0
            for process in (run, *run.children(recursive=True)):
                try:
                    size += process.memory_full_info().uss
                except psutil.Error:
                    continue
            sizes.append(size)
            time.sleep(0.5)
    except psutil.Error:
        return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--sigma", type=float, default=0.5)
    options = parser.parse_args()
    with served(options.records) as (folder, url):
        base = [FABE, "run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "openai"]
        base += ["--model", "m", "--base-url", url]
        print(f"{'records':>7} {'limit':>5} {'what':<16} records/s  of one  start s     MB")
        for limit in options.concurrency:
            one = 0.0
            for what, more in (
                ("one process", []),
                ("ray, 1 worker", ["--runner", "ray", "--workers", "1"]),
                ("ray, 2 workers", ["--runner", "ray", "--workers", "2"]),
            ):
                shutil.rmtree(folder / ".cache", ignore_errors=True)
                command = [*base, "--concurrency", str(limit), *more]
                seconds, start, size = measure(command, folder, url, options.sigma)
                rate = options.records / seconds
                one = one or rate
                print(
                    f"{options.records:>7} {limit:>5} {what:<16} {rate:>9.0f} {rate / one:>7.2f} "
                    f"{start:>8.1f} {size / 1e6:>6.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
