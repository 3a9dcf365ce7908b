#!/usr/bin/env bash
# Style, types, and the layers of the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
"$bin/ruff" format --check --quiet .
"$bin/ruff" check --quiet .
"$bin/mypy"
layers=$("$bin/lint-imports" --no-cache) || { echo "$layers" >&2; exit 1; }
