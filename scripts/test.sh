#!/usr/bin/env bash
# Sets up, checks style, types and layers, and runs every test; prints what share of the package the
# tests reach, in all processes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
scripts/check.sh
export COVERAGE_FILE="$PWD/.coverage/data"  # the same file whatever folder a test runs in
.venv/bin/python -m pytest -n 2 --dist loadgroup --cov --cov-report= "$@"
echo "coverage: $(.venv/bin/coverage report --format=total) %"
