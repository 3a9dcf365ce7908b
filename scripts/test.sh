#!/usr/bin/env bash
# Sets up, checks style and types, and runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
scripts/check.sh
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
