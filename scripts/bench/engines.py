"""The two engines of local models side by side: vllm_engine.sh sets up what this needs.

Each engine is a process of its own, given the same records twice: cold, when kernels and caches
are new (the model is loaded), and with other records, warm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.bench.local import SYSTEM, TASKS, prompts
from tests.support.models import save_as_folder, smollm_gguf


def measure(folder: str, count: int, engine: str, task: str) -> None:
    from fabe_ds.providers import Completion, Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider

    endpoint = Endpoint(folder, dtype="bfloat16", batch_size=96, engine=engine)
    provider = HFProvider(endpoint)
    sampling = Sampling(TASKS[task][1])
    asked = [Request("x", text, SYSTEM, sampling) for text in prompts(2 * count, task)]
    provider.preflight()
    rates = []
    for part in (asked[:count], asked[count:], asked[:count]):
        started = time.perf_counter()
        answers = provider.complete(part)
        rates.append(count / (time.perf_counter() - started))
        assert all(isinstance(answer, Completion) for answer in answers)
    print(json.dumps({"cold": rates[0], "others": rates[1], "again": rates[2]}))


def main(count: int, task: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = save_as_folder(smollm_gguf(), Path(folder) / "smollm2")
        print(f"{count} records, records/s   cold  others  the first again")
        for engine in ("vllm", "transformers"):
            ended = subprocess.run(
                [sys.executable, __file__, "--one", str(model), str(count), engine, task],
                capture_output=True,
                text=True,
            )
            if ended.returncode:
                sys.exit(ended.stderr[-2000:])
            line = next(text for text in ended.stdout.splitlines() if text.startswith('{"cold"'))
            rates = json.loads(line)
            print(
                f"{engine:22} {rates['cold']:6.2f} {rates['others']:7.2f} {rates['again']:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main(int(sys.argv[1]), *(sys.argv[2:] or ["refactor"]))
