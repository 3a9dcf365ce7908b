"""What a folder of files of one record each costs, beside a plain loop over the same files.

    python scripts/bench/small_files.py [FILES ...]        (default: 20000 100000)

The loop reads a file, changes the field and writes the file, with nothing brought to the disk; a
run brings all of them there. Memory is what belongs to the process at its peak. Every measurement
is the quicker of two processes; a run over one record, which is mostly start-up, is left out of
"x loop". Nothing is deleted before the end: ext4 takes minutes to use again what was deleted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.bench.overhead import measure
from tests.support.functions import functions

ROUNDS = 2
HEAD = ("files", "what", "s", "files/s", "x loop", "MB own")
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
Figures = tuple[float, float, float]


def run(source: Path, name: str) -> list[str]:
    """The command over a folder, with a cache and an output of their own."""
    command = [str(Path(sys.executable).parent / "fabe-ds"), "run", "--input", str(source)]
    return [*command, "--cache-dir", f"cache-{name}", "--output", f"out-{name}"]


def write_files(folder: Path, size: int) -> Path:
    folder.mkdir()
    base = functions(20_000, 80, 1500)
    for number in range(size):
        record = {"id": number, **base[number % len(base)]}
        (folder / f"{number:06}.json").write_text(json.dumps(record))
    return folder


def main(sizes: list[int]) -> None:
    print("{:>9} {:<18} {:>7} {:>9} {:>8} {:>7}".format(*HEAD))
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        one = write_files(cwd / "one", 1)
        start = min(measure(run(one, f"one-{n}"), cwd)[0] for n in range(ROUNDS))
        for size in sizes:
            source = write_files(cwd / f"in-{size}", size)
            loop = [sys.executable, "-c", LOOP, str(source)]
            plain = min(measure([*loop, f"loop-{size}-{n}"], cwd) for n in range(ROUNDS))
            rows: dict[str, Figures] = {
                "json loop": plain,
                "run": min(measure(run(source, f"{size}-{n}"), cwd) for n in range(ROUNDS)),
                "the same again": min(
                    measure(run(source, f"{size}-0"), cwd) for _ in range(ROUNDS)
                ),
            }
            for what, (seconds, own, _) in rows.items():
                times = (seconds - (start if what != "json loop" else 0.0)) / plain[0]
                print(
                    f"{size:>9} {what:<18} {seconds:>7.2f} {size / seconds:>9.0f} "
                    f"{times:>8.2f} {own:>7.0f}"
                )
    print(f"start-up: {start:.2f} s")


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [20_000, 100_000])
