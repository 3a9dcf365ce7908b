"""What load -> echo -> export costs beside a plain json.loads/json.dumps loop over the same file.

    python scripts/bench/overhead.py [RECORDS ...]        (default: 200000 1000000)

Records are functions of the standard library. Every measurement is the quickest of three
processes; start-up is what a run over one record takes. Peak memory: resident memory that belongs
to the process (anonymous), and all of it with the pages of files that it has mapped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.functions import functions

ROUNDS = 3
LOOP = """
import json, sys
with open(sys.argv[1]) as source, open(sys.argv[2], "w") as sink:
    for line in source:
        record = json.loads(line)
        record["original_code"] = record["code"]
        record["code"] = "# echo: local\\n" + record["code"]
        sink.write(json.dumps(record) + "\\n")
"""


def measure(command: list[str], cwd: Path) -> tuple[float, float, float]:
    """Seconds, peak anonymous MB, peak resident MB."""
    os.sync()  # or our fsync waits for what the one before has left to write
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    peaks = [0.0, 0.0]

    def watch() -> None:
        handle = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = handle.memory_info()
            except psutil.Error:
                return
            peaks[0] = max(peaks[0], (memory.rss - memory.shared) / 1e6)
            peaks[1] = max(peaks[1], memory.rss / 1e6)
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.wait() == 0, command
    seconds = time.monotonic() - started
    thread.join()
    return seconds, *peaks


def best(command: list[str], cwd: Path, rounds: int, fresh: bool = False) -> tuple[float, ...]:
    """The quickest of some rounds, with its peaks; `fresh` starts each without a cache."""
    runs = []
    for _ in range(rounds):
        if fresh:
            shutil.rmtree(cwd / ".cache", ignore_errors=True)
            shutil.rmtree(cwd / "outputs", ignore_errors=True)
        runs.append(measure(command, cwd))
    return min(runs)


def main(sizes: list[int]) -> None:
    base = functions(20_000, 80, 1500)
    head = ("records", "what", "s", "records/s", "of loop", "MB own", "MB all")
    print("{:>9} {:<20} {:>7} {:>10} {:>8} {:>7} {:>7}".format(*head))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fabe = str(Path(sys.executable).parent / "fabe-ds")
        (folder / "one.jsonl").write_text(json.dumps(base[0]) + "\n")
        loop = [sys.executable, "-c", LOOP]
        idle = best([*loop, "one.jsonl", "loop.out"], folder, ROUNDS)[0]
        start = best([fabe, "run", "--input", "one.jsonl"], folder, ROUNDS, fresh=True)[0]
        for size in sizes:
            with (folder / "data.jsonl").open("w") as file:
                for i in range(size):
                    file.write(json.dumps({**base[i % len(base)], "id": i}) + "\n")
            run = [fabe, "run", "--input", "data.jsonl"]
            plain = best([*loop, "data.jsonl", "loop.out"], folder, ROUNDS)
            ours = best(run, folder, ROUNDS, fresh=True)
            again = best(run, folder, ROUNDS)
            rate = size / (plain[0] - idle)
            rows = (
                ("json loop", plain, idle),
                ("load, echo, export", ours, start),
                ("the same again", again, 0.0),
            )
            for what, (seconds, own, whole), offset in rows:
                mine = size / (seconds - offset)
                print(
                    f"{size:>9} {what:<20} {seconds:>7.2f} {mine:>10.0f} {mine / rate:>8.2f} "
                    f"{own:>7.0f} {whole:>7.0f}"
                )
    print(f"start-up, left out of records/s but the last row's: {idle:.2f} s and {start:.2f} s")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [200_000, 1_000_000])
