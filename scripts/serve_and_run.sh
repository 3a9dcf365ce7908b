#!/usr/bin/env bash
# Starts an OpenAI-compatible server, waits until it answers, runs fabe-ds against it, and stops it.
#
#   scripts/serve_and_run.sh -u URL [-w SECONDS] SERVER COMMAND -- FABE-DS FLAGS
#
#   scripts/serve_and_run.sh -u http://127.0.0.1:8000/v1 vllm serve Qwen/Qwen2.5-7B-Instruct -- \
#       --input data.jsonl --instruction 'Rewrite it.' --model Qwen/Qwen2.5-7B-Instruct --concurrency 64
#
# The exit code is that of fabe-ds, or 2 where the server did not come up.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail

fail() { echo "serve_and_run.sh: $1" >&2; exit 2; }

url='' wait=600
while getopts 'u:w:h' option; do
    case $option in
        u) url=${OPTARG%/} ;;
        w) wait=$OPTARG ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ -n "$url" ] || fail 'no -u: the base URL that the server will have, http://127.0.0.1:8000/v1'

server=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do server+=("$1"); shift; done
[ ${#server[@]} -gt 0 ] || fail 'no server command'
[ $# -gt 0 ] || fail 'no -- and flags for fabe-ds after the server command'
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fabe=$root/.venv/bin/fabe-ds
[ -x "$fabe" ] || fabe=fabe-ds

log=$(mktemp)
setsid "${server[@]}" >"$log" 2>&1 &
pid=$!
stop() {
    kill -TERM -- "-$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$log"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

deadline=$((SECONDS + wait))
until curl --silent --fail --output /dev/null --max-time 5 "$url/models"; do
    kill -0 "$pid" 2>/dev/null || { tail -n 5 "$log" >&2; fail 'the server ended before it answered'; }
    [ $SECONDS -lt $deadline ] || { tail -n 5 "$log" >&2; fail "no answer from $url/models in $wait s"; }
    sleep 0.5
done

"$fabe" run --provider openai --base-url "$url" "$@"
