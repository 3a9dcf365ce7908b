"""What a run keeps and what it sends, beside `datasets` used by hand.

    python scripts/bench/promises.py [--records 1000] [--concurrency 32]

By hand: `load_dataset("json")`, a batched `map` with a thread pool and requests, `to_json`, as the
documentation of `datasets` has it. The same records, the same server (50 ms an answer). Printed:
how many lines of the output are, but for the field, the bytes that were read; how many requests
were sent where three of ten records are repeated; how many where the command was killed with -9
in the middle and run again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))
from tests.support.server import ModelServer, answer_to  # noqa: E402

BY_HAND = """
import sys, datasets, requests
from concurrent.futures import ThreadPoolExecutor
url, limit = sys.argv[1], int(sys.argv[2])
session = requests.Session()
session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=limit))
pool = ThreadPoolExecutor(limit)
def ask(code):
    body = {"model": "m", "messages": [{"role": "user", "content": "Do\\n\\n" + code}]}
    answer = session.post(url + "/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"]
def rewrite(batch):
    return {"code": list(pool.map(ask, batch["code"]))}
data = datasets.load_dataset("json", data_files="data.jsonl", split="train", cache_dir="cache")
data.map(rewrite, batched=True).to_json("by_hand.jsonl", force_ascii=False)
"""
SPELLINGS = [
    '{{"id": {n}, "code": {code}, "price": 1.50}}',
    '{{"code":{code},"id":{n},"made":"2024-01-02T03:04:05Z"}}',
    '{{ "id" : {n} , "tags" : [ ] , "code" : {code} , "rate" : 1e-12 }}',
    '{{"id": {n}, "name": "caf\\u00e9", "code": {code}, "meta": {{"b": null, "a": 3.0}}}}',
]
"""Records as people's files have them: numbers and escapes of any spelling, keys in any order."""


def lines(count: int, repeated: float, change: bool = False) -> list[str]:
    """The records, or what they must become."""
    chance, texts = random.Random(1), []
    for n in range(count):
        again = texts and chance.random() < repeated
        texts.append(chance.choice(texts) if again else f"def f{n}(x):\n    return x + {n}")
    shown = [answer_to(text) if change else text for text in texts]
    return [
        SPELLINGS[n % len(SPELLINGS)].format(n=n, code=json.dumps(text))
        for n, text in enumerate(shown)
    ]


def run(command: list[str], folder: Path, server: ModelServer, kill_at: int | None = None) -> int:
    """Runs the command, or kills it when so many requests have come; gives the requests so far."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, **quiet) as process:  # type: ignore[call-overload]
        while kill_at is not None and len(server.calls) < kill_at:
            time.sleep(0.001)
        if kill_at is not None:
            process.kill()
        elif process.wait():
            raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return len(server.calls)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    count, limit = options.records, str(options.concurrency)
    print(f"{'':<38} {'fabe-ds':>12} {'by hand':>12}")
    rows: dict[str, list[str]] = {"bytes": [], "repeated": [], "killed": []}
    for what in ("fabe-ds", "by hand"):
        for case, repeated in (("repeated", 0.3), ("killed", 0.0)):
            with tempfile.TemporaryDirectory() as name, ModelServer(latency=0.05) as server:
                folder = Path(name)
                (folder / "data.jsonl").write_text("\n".join(lines(count, repeated)) + "\n")
                if what == "fabe-ds":
                    command = [str(Path(sys.executable).parent / "fabe-ds"), "run"]
                    command += ["--input", "data.jsonl", "--instruction", "Do"]
                    command += ["--provider", "openai", "--model", "m", "--base-url", server.url]
                    command += ["--concurrency", limit, "--backup-field", ""]
                    written = folder / "outputs/data.jsonl"
                else:
                    command = [sys.executable, "-c", BY_HAND, server.url, limit]
                    written = folder / "by_hand.jsonl"
                if case == "killed":
                    run(command, folder, server, count // 2)
                sent = run(command, folder, server)
                rows[case].append(f"{sent:,}")
                if case == "repeated":
                    wanted = lines(count, repeated, change=True)
                    got = written.read_text().splitlines()
                    kept = sum(a == b for a, b in zip(got, wanted, strict=True))
                    rows["bytes"].append(f"{kept:,} of {count:,}")
    unique = len({json.loads(line)["code"] for line in lines(count, 0.3)})
    for name, told in (
        ("bytes", "lines that are the bytes they must be"),
        ("repeated", f"requests for {unique:,} different records"),
        ("killed", f"requests for {count:,}, killed at {count // 2:,}"),
    ):
        print(f"{told:<38} {rows[name][0]:>12} {rows[name][1]:>12}")


if __name__ == "__main__":
    main()
