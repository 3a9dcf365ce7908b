#!/usr/bin/env bash
# Sets up, checks style, types and layers, and runs every test. Arguments go to pytest instead; but with
# --coverage alone, what the tests through the front door reach of the package, in all processes, is
# measured and printed too, which takes half as long again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
scripts/check.sh
# Four at once on two cores: most tests wait, for a server or for a process.
tests=(.venv/bin/python -m pytest -n 4 --dist loadgroup)
if [ "${1:-}" = --coverage ]; then
    export COVERAGE_FILE="$PWD/.coverage-data/all"  # the same file whatever folder a test runs in
    failed=0
    "${tests[@]}" tests/end_to_end --cov --cov-report= || failed=1
    echo "coverage: $(.venv/bin/coverage report --format=total) %"
    exit $failed
fi
# Not by exec: a test of completion looks for the shell that runs it.
if [ $# -gt 0 ]; then
    "${tests[@]}" "$@"
else
    .venv/bin/python -m pytest -m alone
    "${tests[@]}" -m 'not alone'
fi
