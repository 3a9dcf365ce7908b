#!/usr/bin/env bash
# Sets up, checks style, types and layers, and runs every test; prints what share of the package the
# tests through the front door reach, in all processes. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
scripts/check.sh
tests=(.venv/bin/python -m pytest -n 2 --dist loadgroup)
if [ $# -gt 0 ]; then
    exec "${tests[@]}" "$@"
fi
failed=0
"${tests[@]}" tests/unit || failed=1  # dense logic, which takes half as long again when measured
export COVERAGE_FILE="$PWD/.coverage-data/all"  # the same file whatever folder a test runs in
"${tests[@]}" tests/end_to_end --cov --cov-report= || failed=1
echo "coverage: $(.venv/bin/coverage report --format=total) %"
exit $failed
