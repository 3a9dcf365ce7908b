"""Local models: fabe-ds beside what else there is, on the same records, all in one run.

    python scripts/bench/local.py [RECORDS ...] [--task TASK] [--device cuda]   (default: 48 200)

SmolLM2-135M works on functions of the standard library (80 to 1,500 characters), greedily.
--task refactor (the default) rewrites them under an instruction of about 150 tokens, 64 new tokens
at most; --task typos asks for the same code with typos in comments mended, 256 at most, which
mostly copies. Each line is one process that has loaded the model and answered two records before
the clock starts; peak memory is that process's (llama.cpp: the server's). Useful tokens are those
of the answers; a step gives each row so many tokens; padding is what was computed for nothing, a
part of all prompt tokens that went through the model. With --device cuda the lines are those for a
GPU, and --layers N takes a model of random weights in bfloat16, N layers of 2048, instead. For
vLLM's engine beside these, see vllm_engine.sh.
"""

from __future__ import annotations

import argparse
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
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.functions import functions
from tests.support.models import save_as_folder, smollm_gguf

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
TYPOS = """\
Fix the typos in the comments and docstrings of the following Python function. Leave the code as \
it is. Output only the code, without a fence.

"""
TASKS = {"refactor": (INSTRUCTION, 64), "typos": (TYPOS, 256)}
Figures = dict[str, float]


class Case(NamedTuple):
    """What a line measures: the model's folder, records, type of numbers, rows at once."""

    folder: str
    count: int
    dtype: str
    rows: int
    device: str
    task: str
    speculate: str

    @property
    def new_tokens(self) -> int:
        return TASKS[self.task][1]

    @property
    def prompts(self) -> list[str]:
        return prompts(self.count, self.task)


def prompts(count: int, task: str = "refactor") -> list[str]:
    return [TASKS[task][0] + str(function["code"]) for function in functions(count)]


def turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def timed(work: Callable[[], Figures]) -> Figures:
    started = time.perf_counter()
    figures = work()
    return {**figures, "seconds": time.perf_counter() - started}


def ours(case: Case, repeated: bool = False) -> Figures:
    """The provider as `fabe-ds run` has it; with `repeated`, through the engine that asks once."""
    from fabe_ds.engine.coalesce import Coalescer
    from fabe_ds.engine.local import LocalEngine
    from fabe_ds.providers import Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider
    from fabe_ds.request import Stats
    from fabe_ds.store.completions import RecordCache

    endpoint = Endpoint(
        case.folder,
        dtype=case.dtype,
        batch_size=case.rows,
        device=case.device,
        speculate=case.speculate,
    )
    provider = HFProvider(endpoint)
    sampling = Sampling(case.new_tokens)
    asked = [Request("x", prompt, SYSTEM, sampling) for prompt in case.prompts]
    if repeated:  # three of ten are there before
        asked = [asked[i if i % 10 < 7 else i - 7] for i in range(case.count)]
    provider.complete(asked[:2])
    provider.identity()  # reads the weights once, as loading does
    work = provider.generation.work
    work.__init__()
    with tempfile.TemporaryDirectory() as cache:
        kept = RecordCache(Path(cache))
        coalescer = Coalescer(provider, kept, lambda _, completion: completion.text, Stats())
        engine = LocalEngine(provider, coalescer, max(256, 8 * case.rows))
        figures = timed(lambda: {"answers": len(list(engine.outcomes(asked)))})
        kept.close()
    padding = work.padding / (work.prompt + work.padding)
    each = work.new / max(1, work.row_steps)
    return {**figures, "tokens": work.new, "padding": padding, "each": each}


def pipeline(case: Case) -> Figures:
    """What the documentation of transformers shows: a pipeline with a batch size."""
    import torch
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(case.folder, padding_side="left")
    run = pipeline(
        "text-generation",
        case.folder,
        tokenizer=tokenizer,
        dtype=getattr(torch, case.dtype),
        device=case.device,
    )
    asked = [turns(prompt) for prompt in case.prompts]
    options = {"max_new_tokens": case.new_tokens, "do_sample": False, "return_full_text": False}
    run(asked[:2], batch_size=2, **options)
    answers: list[Any] = []

    def work() -> Figures:
        answers.extend(run(asked, batch_size=case.rows, **options))
        return {}

    figures = timed(work)
    said = [answer[0]["generated_text"] for answer in answers]
    new = sum(len(ids) for ids in tokenizer([str(text) for text in said])["input_ids"])
    lengths = [len(tokenizer.apply_chat_template(turn)["input_ids"]) for turn in asked]
    return {**figures, "tokens": new, "padding": _padding(lengths, case.rows)}


def _padding(lengths: list[int], rows: int) -> float:
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def generate(case: Case) -> Figures:
    """generate() over batches that are sorted by length and padded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, dtype = case.rows, getattr(torch, case.dtype)
    tokenizer = AutoTokenizer.from_pretrained(case.folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype).eval().to(case.device)
    asked = sorted(
        (tokenizer.apply_chat_template(turns(prompt), tokenize=False, add_generation_prompt=True)
         for prompt in case.prompts),
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
            ).to(case.device)
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=case.new_tokens, do_sample=False)
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


def llama(case: Case) -> Figures:
    """fabe-ds run against llama.cpp's server with the same weights as GGUF, its slots full."""
    import psutil

    binary = str(Path(sys.executable).parent / "fabe-ds")
    peak = 0.0
    with tempfile.TemporaryDirectory() as box, llama_server(case.rows) as (url, process):
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
                *("--concurrency", str(case.rows), "--max-new-tokens", str(case.new_tokens)),
                *("--on-truncated", "keep", "--cache-dir", f"cache{count}"),
            ]
            Path(box, "i.txt").write_text(TASKS[case.task][0] + "{{ code }}")
            # A weak model leaves some answers empty: those records fail, and cost as much.
            subprocess.run(command, cwd=box, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            report = json.loads(Path(box, "outputs.run.json").read_text())
            return {"seconds": report["seconds"], "tokens": report["completion_tokens"]}

        thread = threading.Thread(target=watch)
        thread.start()
        run(2)
        figures = run(case.count)
        done.set()
        thread.join()
    return {**figures, "padding": 0.0, "peak": peak}


KINDS = {
    "pipeline": pipeline,
    "generate": generate,
    "ours": ours,
    "repeated": lambda case: ours(case, repeated=True),
    "llama": llama,
}
CPU = [
    ("pipeline, batch 8", "pipeline", "float32", 8, "off"),
    ("pipeline, batch 8", "pipeline", "bfloat16", 8, "off"),
    ("sorted generate, batch 16", "generate", "bfloat16", 16, "off"),
    ("llama.cpp server, 8 slots", "llama", "q4_1", 8, "off"),
    ("fabe-ds, 48 rows", "ours", "float32", 48, "auto"),
    ("fabe-ds, 8 rows", "ours", "bfloat16", 8, "auto"),
    ("fabe-ds, 32 rows (default)", "ours", "bfloat16", 32, "auto"),
    ("the same, no drafts", "ours", "bfloat16", 32, "off"),
    ("fabe-ds, 48 rows", "ours", "bfloat16", 48, "auto"),
    ("fabe-ds, 96 rows", "ours", "bfloat16", 96, "auto"),
    ("the same, 30% repeated", "repeated", "bfloat16", 96, "auto"),
]
GPU = [
    ("pipeline, batch 32", "pipeline", "bfloat16", 32, "off"),
    ("pipeline, batch 256", "pipeline", "bfloat16", 256, "off"),
    ("sorted generate, batch 256", "generate", "bfloat16", 256, "off"),
    ("fabe-ds, 32 rows (default)", "ours", "bfloat16", 32, "auto"),
    ("fabe-ds, 256 rows", "ours", "bfloat16", 256, "off"),
    ("fabe-ds, 256 rows", "ours", "bfloat16", 256, "auto"),
    ("fabe-ds, 1024 rows", "ours", "bfloat16", 1024, "auto"),
]


def random_model(folder: Path, tokenizer: Path, layers: int) -> Path:
    """A model of random weights with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def measured(kind: str, case: Case) -> Figures:
    """The figures of a line, from a process of its own."""
    command = [sys.executable, __file__, "--one", kind, *map(str, case)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr[-2000:])
    figures: Figures = json.loads(ended.stdout.splitlines()[-1])
    return figures


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as box:
        model = save_as_folder(smollm_gguf(), Path(box) / "smollm2")
        if options.layers:
            model = random_model(Path(box) / "random", model, options.layers)
        print(
            f"{'records':>7} {'what':27} {'type':9} {'records/s':>9} {'of bf16 pipeline':>16} "
            f"{'useful tok/s':>12} {'a step':>6} {'padding':>7} {'peak MB':>7}"
        )
        for count in options.records or [48, 200]:
            base = None
            for what, kind, dtype, rows, drafts in GPU if options.device == "cuda" else CPU:
                case = Case(str(model), count, dtype, rows, options.device, options.task, drafts)
                figures = measured(kind, case)
                rate = count / figures["seconds"]
                if kind == "pipeline" and dtype == "bfloat16" and base is None:
                    base = rate
                ratio = f"{rate / base:.2f}" if base else ""
                print(
                    f"{count:7} {what:27} {dtype:9} {rate:9.2f} {ratio:>16} "
                    f"{figures['tokens'] / figures['seconds']:12.0f} "
                    f"{figures.get('each', 1):6.2f} {figures['padding']:7.1%} "
                    f"{figures['peak']:7.0f}",
                    flush=True,
                )


def peak(device: str) -> float:
    """Most memory in use so far, in MB: the GPU's, or this process's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, folder, count, dtype, rows, device, task, drafts = sys.argv[2:]
        case = Case(folder, int(count), dtype, int(rows), device, task, drafts)
        figures = KINDS[kind](case)
        print(json.dumps({"peak": peak(device), **figures}))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("records", type=int, nargs="*")
        parser.add_argument("--task", choices=TASKS, default="refactor")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument("--layers", type=int, default=0)
        main(parser.parse_args())
