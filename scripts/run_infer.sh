#!/usr/bin/env bash
# A run in short options; settings may come from the environment too. What follows -- goes to
# fabe-ds as it is:   scripts/run_infer.sh -m MODEL -i data.jsonl -o outputs -- --seed 7
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: run_infer.sh -i INPUT [options] [-- more fabe-ds flags]
  -m MODEL        model name or folder            (MODEL_PATH)
  -i INPUT        file or folder of records
  -o OUTPUT       folder to write to              (outputs)
  -f FIELD        field to rewrite                (code)
  -I INSTRUCTION  text or template file           (configs/prompts/refactor_python.j2)
  -g GLOB         pattern of files in a folder
  -P PROVIDER     echo|openai|ollama|hf|modelscope (modelscope)
  -d DEVICE       cpu|cuda|cuda:N|mps|auto        (DEVICE, cpu)
  -S SIZE         batch size                      (8)
  -C NUMBER       requests at once                (4)
  -n TOKENS       most new tokens                 (MAX_NEW_TOKENS, 128)
  -t TEMPERATURE  sampling temperature            (TEMPERATURE, 0.0)
  -c FOLDER       cache folder                    (.cache)
  -l 0|1          local files only                (LOCAL_FILES_ONLY, 1)
  -D              dry run                         (DRY_RUN)
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
instruction="$here/configs/prompts/refactor_python.j2"
provider=modelscope
flags=()
while getopts "m:i:o:f:I:g:P:d:S:C:n:t:c:l:Dh" option; do
    case $option in
        m) flags+=(--model "$OPTARG") ;;
        i) flags+=(--input "$OPTARG") ;;
        o) flags+=(--output "$OPTARG") ;;
        f) flags+=(--field "$OPTARG") ;;
        I) instruction=$OPTARG ;;
        g) flags+=(--glob "$OPTARG") ;;
        P) provider=$OPTARG ;;
        d) flags+=(--device "$OPTARG") ;;
        S) flags+=(--batch-size "$OPTARG") ;;
        C) flags+=(--concurrency "$OPTARG") ;;
        n) flags+=(--max-new-tokens "$OPTARG") ;;
        t) flags+=(--temperature "$OPTARG") ;;
        c) flags+=(--cache-dir "$OPTARG") ;;
        l) flags+=(--local-files-only "$OPTARG") ;;
        D) flags+=(--dry-run) ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
exec fabe-ds run --provider "$provider" --instruction "$instruction" "${flags[@]}" "$@"
