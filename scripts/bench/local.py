"""Local models: fabe-ds beside what else there is, on the same records, all in one run.

    python scripts/bench/local.py [RECORDS ...]        (default: 48 200)

SmolLM2-135M rewrites functions of the standard library (80 to 1,500 characters) under an
instruction of about 150 tokens: 64 new tokens at most, greedy. Each line is one process that has
loaded the model and answered two records before the clock starts; peak memory is that process's
(llama.cpp: the server's). Useful tokens are those of the answers; padding is what was computed
for nothing, a part of all prompt tokens that went through the model. For vLLM's engine beside
these, see vllm_engine.sh.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.functions import functions
from tests.support.models import save_as_folder, smollm_gguf

NEW_TOKENS = 64
SYSTEM = "You are a coding assistant. Output only the final code."
INSTRUCTION = """\
Rewrite the following Python function so that it is easier to read and to maintain. Keep its name, \
its parameters and what it returns exactly as they are. Use descriptive names for local variables, \
prefer early returns to deep nesting, and replace loops by comprehensions where that is clearer. \
Add type annotations to all parameters and to the result, and write a docstring of one line that \
says what the function does. Do not add imports, do not change the behaviour on errors, and do not \
explain what you did. Where the function is already as simple as can be, give it back unchanged. \
Output only the code, without a fence.

"""
Figures = dict[str, float]


def prompts(count: int) -> list[str]:
    return [INSTRUCTION + str(function["code"]) for function in functions(count)]


def turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def timed(work: Callable[[], Figures]) -> Figures:
    started = time.perf_counter()
    figures = work()
    return {**figures, "seconds": time.perf_counter() - started}


def ours(folder: str, count: int, dtype: str, rows: int, repeated: bool = False) -> Figures:
    """The provider as `fabe-ds run` has it; with `repeated`, through the engine that asks once."""
    from fabe_ds.engine.coalesce import Coalescer
    from fabe_ds.engine.local import LocalEngine
    from fabe_ds.providers import Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider
    from fabe_ds.request import Stats
    from fabe_ds.store.completions import RecordCache

    provider = HFProvider(Endpoint(folder, dtype=dtype, batch_size=rows))
    sampling = Sampling(NEW_TOKENS)
    asked = [Request("x", prompt, SYSTEM, sampling) for prompt in prompts(count)]
    if repeated:  # three of ten are there before
        asked = [asked[i if i % 10 < 7 else i - 7] for i in range(count)]
    provider.complete(asked[:2])
    provider.identity()  # reads the weights once, as loading does
    work = provider.generation.work
    work.__init__()
    with tempfile.TemporaryDirectory() as cache:
        kept = RecordCache(Path(cache))
        coalescer = Coalescer(provider, kept, lambda _, completion: completion.text, Stats())
        engine = LocalEngine(provider, coalescer, 32 * rows)
        figures = timed(lambda: {"answers": len(list(engine.outcomes(asked)))})
        kept.close()
    padding = work.padding / (work.prompt + work.padding)
    return {**figures, "tokens": work.new, "padding": padding}


def pipeline(folder: str, count: int, dtype: str, rows: int) -> Figures:
    """What the documentation of transformers shows: a pipeline with a batch size."""
    import torch
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    run = pipeline(
        "text-generation", folder, tokenizer=tokenizer, dtype=getattr(torch, dtype), device="cpu"
    )
    asked = [turns(prompt) for prompt in prompts(count)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    run(asked[:2], batch_size=2, **options)
    answers: list[Any] = []

    def work() -> Figures:
        answers.extend(run(asked, batch_size=rows, **options))
        return {}

    figures = timed(work)
    said = [answer[0]["generated_text"] for answer in answers]
    new = sum(len(ids) for ids in tokenizer([str(text) for text in said])["input_ids"])
    lengths = [len(tokenizer.apply_chat_template(turn)["input_ids"]) for turn in asked]
    return {**figures, "tokens": new, "padding": _padding(lengths, rows)}


def _padding(lengths: list[int], rows: int) -> float:
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def generate(folder: str, count: int, dtype: str, rows: int) -> Figures:
    """generate() over batches that are sorted by length and padded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    asked = sorted(
        (tokenizer.apply_chat_template(turns(prompt), tokenize=False, add_generation_prompt=True)
         for prompt in prompts(count)),
        key=len,
        reverse=True,
    )  # fmt: skip

    def batches(texts: list[str]) -> Figures:
        new = 0
        for start in range(0, len(texts), rows):
            batch = tokenizer(
                texts[start : start + rows],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
            fresh = output[:, batch["input_ids"].shape[1] :]
            new += int((fresh != tokenizer.pad_token_id).sum())
        return {"tokens": new}

    batches(asked[:2])
    figures = timed(lambda: batches(asked))
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in asked]
    return {**figures, "padding": _padding(lengths, rows)}


@contextlib.contextmanager
def llama_server(slots: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, str(Path(__file__).parents[2] / "tests/support/serve_llama.py")]
    with subprocess.Popen(
        [*command, str(smollm_gguf()), str(slots)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip() + "/v1", process
        process.terminate()


def llama(_: str, count: int, dtype: str, rows: int) -> Figures:
    """fabe-ds run against llama.cpp's server with the same weights as GGUF, its slots full."""
    import psutil

    binary = str(Path(sys.executable).parent / "fabe-ds")
    peak = 0.0
    with tempfile.TemporaryDirectory() as box, llama_server(rows) as (url, process):
        server, done = psutil.Process(process.pid), threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.2):
                peak = max(peak, server.memory_info().rss / 1e6)

        def run(count: int) -> Figures:
            lines = [json.dumps({"code": function["code"]}) for function in functions(count)]
            Path(box, "data.jsonl").write_text("\n".join(lines))
            command = [
                *(binary, "run", "--input", "data.jsonl", "--instruction", "i.txt"),
                *("--provider", "openai", "--model", "m", "--base-url", url),
                *("--concurrency", str(rows), "--max-new-tokens", str(NEW_TOKENS)),
                *("--on-truncated", "keep", "--cache-dir", f"cache{count}"),
            ]
            Path(box, "i.txt").write_text(INSTRUCTION + "{{ code }}")
            # A weak model leaves some answers empty: those records fail, and cost as much.
            subprocess.run(command, cwd=box, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            report = json.loads(Path(box, "outputs.run.json").read_text())
            return {"seconds": report["seconds"], "tokens": report["completion_tokens"]}

        thread = threading.Thread(target=watch)
        thread.start()
        run(2)
        figures = run(count)
        done.set()
        thread.join()
    return {**figures, "padding": 0.0, "peak": peak}


KINDS = {
    "pipeline": pipeline,
    "generate": generate,
    "ours": ours,
    "repeated": lambda *given: ours(*given, repeated=True),
    "llama": llama,
}
LINES = [
    ("pipeline, batch 8", "pipeline", "float32", 8),
    ("pipeline, batch 8", "pipeline", "bfloat16", 8),
    ("sorted generate, batch 16", "generate", "bfloat16", 16),
    ("llama.cpp server, 8 slots", "llama", "q4_1", 8),
    ("fabe-ds, batch 48", "ours", "float32", 48),
    ("fabe-ds, batch 8", "ours", "bfloat16", 8),
    ("fabe-ds, batch 48", "ours", "bfloat16", 48),
    ("fabe-ds, batch 96", "ours", "bfloat16", 96),
    ("the same, 30% repeated", "repeated", "bfloat16", 96),
]


def main(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = save_as_folder(smollm_gguf(), Path(folder) / "smollm2")
        print(
            f"{'records':>7} {'what':27} {'type':9} {'records/s':>9} {'of bf16 pipeline':>16} "
            f"{'useful tok/s':>12} {'padding':>7} {'peak MB':>7}"
        )
        for count in counts:
            base = None
            for what, kind, dtype, rows in LINES:
                command = [sys.executable, __file__, "--one", kind, str(model), str(count)]
                ended = subprocess.run(
                    [*command, dtype, str(rows)], capture_output=True, text=True, check=True
                )
                figures = json.loads(ended.stdout.splitlines()[-1])
                rate = count / figures["seconds"]
                if kind == "pipeline" and dtype == "bfloat16":
                    base = rate
                ratio = f"{rate / base:.2f}" if base else ""
                print(
                    f"{count:7} {what:27} {dtype:9} {rate:9.2f} {ratio:>16} "
                    f"{figures['tokens'] / figures['seconds']:12.0f} {figures['padding']:7.1%} "
                    f"{figures['peak']:7.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, model, count, dtype, rows = sys.argv[2:]
        figures = KINDS[kind](model, int(count), dtype, int(rows))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"peak": usage.ru_maxrss / 1e3, **figures}))
    else:
        main([int(count) for count in sys.argv[1:]] or [48, 200])
