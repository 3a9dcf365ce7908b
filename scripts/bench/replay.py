"""A run answered from the record cache alone, under another post-processing than before.

    python scripts/bench/replay.py [RECORDS] [--short] [--beside FOLDER]      (default: 60000)

Records are functions of the standard library; their answers are put into the cache first. Each
run has another `--fences`, so no finished run answers it: every completion is looked up, accepted
anew and written. `--short`: records of one line. `--beside`: another checkout, in turns with this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE))
from tests.support.functions import functions  # noqa: E402

HOW = ["--provider", "openai", "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
ANOTHER = (
    ["--fences", "keep"],
    ["--fences", "first"],
    ["--fences", "last"],
    ["--fences", "longest"],
)
FILL = """
import sys
from pathlib import Path
from fabe_ds import transform_fn
from fabe_ds.providers import Completion
from fabe_ds.store.completions import RecordCache, Row
import json
fn = transform_fn(provider="openai", model="m", base_url="http://127.0.0.1:9/v1", instruction="Up")
cache, rows = RecordCache(Path(".cache")), []
for line in open(sys.argv[1]):
    request = fn.item(json.loads(line)["code"], None)
    text = "```python\\n" + request.text + "\\n```"
    rows.append(Row(fn.provider.key(request), Completion(text, "stop", 150, 120)))
    if len(rows) == 5000:
        cache.put(rows)
        rows.clear()
cache.put(rows)
cache.close()
"""


def run(code: Path, folder: Path, name: str, more: list[str]) -> float:
    """Seconds of one run by the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "fabe_ds", "run", "--input", name, "--instruction", "Up"]
    os.sync()
    started = time.monotonic()
    subprocess.run(
        [*command, *HOW, "--offline", *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="?", type=int, default=60_000)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--beside", type=Path)
    given = parser.parse_args()
    codes = {"here": HERE, **({"beside": given.beside.resolve()} if given.beside else {})}
    base = functions(20_000, 80, 1500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "data.jsonl").open("w") as file:
            for i in range(given.records):
                row = {**base[i % len(base)], "id": i}
                row["code"] = f"x = {i}" if given.short else f"{row['code']}\n# {i}"
                file.write(json.dumps(row) + "\n")
        (folder / "one.jsonl").write_text((folder / "data.jsonl").open().readline())
        subprocess.run([sys.executable, "-c", FILL, "data.jsonl"], cwd=folder, check=True)
        print(f"{'records':>8} {'code':<8} {'s':>6} {'records/s':>10}")
        times: dict[str, list[float]] = {what: [] for what in codes}
        start: dict[str, list[float]] = {what: [] for what in codes}
        for more in ANOTHER:
            for what, code in codes.items():
                start[what].append(run(code, folder, "one.jsonl", more))
                times[what].append(run(code, folder, "data.jsonl", more))
        for what in codes:
            # The first of each loads the records and makes the files' pages; the others replay.
            seconds, idle = min(times[what][1:]), min(start[what][1:])
            rate = given.records / (seconds - idle)
            print(f"{given.records:>8} {what:<8} {seconds:>6.2f} {rate:>10.0f}")
    print("start-up, what a run over one record takes, is left out of records/s")


if __name__ == "__main__":
    main()
