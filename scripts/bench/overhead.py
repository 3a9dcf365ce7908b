"""What load -> echo -> export costs beside a plain json.loads/json.dumps loop over the same file.

    python scripts/bench/overhead.py [RECORDS ...]        (default: 200000 1000000)

Records are functions of the standard library. Every measurement is a process of its own; start-up
is what a run over one record takes. Peak memory: resident memory that belongs to the process
(anonymous), and all of it with the mapped cache file's pages, which the system takes back at will.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.functions import functions

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
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.wait() == 0, command
    seconds = time.monotonic() - started
    thread.join()
    return seconds, *peaks


def main(sizes: list[int]) -> None:
    base = functions(20_000, 80, 1500)
    print(f"{'records':>9} {'what':<24} {'s':>7} {'records/s':>10} {'of loop':>8} {'MB own':>7} {'MB all':>7}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fabe = str(Path(sys.executable).parent / "fabe-ds")
        (folder / "one.jsonl").write_text(json.dumps(base[0]) + "\n")
        loop = [sys.executable, "-c", LOOP]
        idle = measure([*loop, "one.jsonl", "loop.out"], folder)[0]
        start = measure([fabe, "run", "--input", "one.jsonl"], folder)[0]
        start = min(start, measure([fabe, "run", "--input", "one.jsonl", "--output", "o2"], folder)[0])
        print(f"start-up: loop {idle:.2f} s, fabe-ds {start:.2f} s (left out of records/s below)")
        for size in sizes:
            with (folder / "data.jsonl").open("w") as file:
                for i in range(size):
                    file.write(json.dumps({**base[i % len(base)], "id": i}) + "\n")
            plain = measure([*loop, "data.jsonl", "loop.out"], folder)
            run = [fabe, "run", "--input", "data.jsonl"]
            ours = measure(run, folder)
            again = measure(run, folder)
            rate = size / (plain[0] - idle)
            rows = (("json loop", plain, idle), ("load, echo, export", ours, start), ("the same again", again, 0.0))
            for what, (seconds, own, whole), offset in rows:
                mine = size / (seconds - offset)
                print(f"{size:>9} {what:<24} {seconds:>7.2f} {mine:>10.0f} {mine / rate:>8.2f} {own:>7.0f} {whole:>7.0f}")
            (folder / "data.jsonl").unlink()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [200_000, 1_000_000])
