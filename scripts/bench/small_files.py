"""What a folder of files of one record each costs, beside a plain loop over the same files.

    python scripts/bench/small_files.py [FILES ...]        (default: 20000 100000)

The loop reads a file, changes the field and writes the file, with nothing brought to the disk; a
run brings all of them there. Memory is what belongs to the process at its peak; start-up is
counted. Every measurement is the quicker of two processes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.bench.overhead import best
from tests.functions import functions

ROUNDS = 2
LOOP = """
import json, os, sys
source, sink = sys.argv[1:]
os.makedirs(sink, exist_ok=True)
for name in sorted(os.listdir(source)):
    with open(f"{source}/{name}") as file:
        record = json.load(file)
    record["original_code"] = record["code"]
    record["code"] = "# echo: local\\n" + record["code"]
    with open(f"{sink}/{name}", "w") as file:
        json.dump(record, file)
"""


def main(sizes: list[int]) -> None:
    base = functions(20_000, 80, 1500)
    print("{:>9} {:<22} {:>7} {:>9} {:>8} {:>7}".format(*HEAD))
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            cwd = Path(name)
            (cwd / "in").mkdir()
            for number in range(size):
                record = {"id": number, **base[number % len(base)]}
                (cwd / f"in/{number:06}.json").write_text(json.dumps(record))
            loop = [sys.executable, "-c", LOOP, "in", "outputs"]
            run = [str(Path(sys.executable).parent / "fabe-ds"), "run", "--input", "in"]
            plain = best(loop, cwd, ROUNDS, fresh=True)
            rows = {"json loop": plain, "run": best(run, cwd, ROUNDS, fresh=True)}
            rows["the same again"] = best(run, cwd, ROUNDS)
            for what, (seconds, own, _) in rows.items():
                times = seconds / plain[0]
                print(
                    f"{size:>9} {what:<22} {seconds:>7.2f} {size / seconds:>9.0f} "
                    f"{times:>8.2f} {own:>7.0f}"
                )
            shutil.rmtree(cwd / "in")


HEAD = ("files", "what", "s", "files/s", "x loop", "MB own")

if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [20_000, 100_000])
