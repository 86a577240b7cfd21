#!/usr/bin/env bash
# Prefill on one engine, decode on another, which find each other's sealed blocks in a folder.
#
#   ask.sh serve MODEL FOLDER [FLAGS]   starts both, on ports 8001 and 8002; Ctrl-C ends them
#   ask.sh ask MODEL PROMPT_FILE        the prompt to the first for one token, then to the second
set -euo pipefail

connector() {
    printf '{"kv_connector": "ShadowKVConnector", "kv_role": "%s", "kv_connector_extra_config": {"path": "%s"}}' "$1" "$2"
}

serve() {
    vllm serve "$2" --port "$1" --served-model-name "$2" --attention-backend shadowkv --enable-prompt-tokens-details \
        --kv-transfer-config "$(connector "$4" "$3")" "${@:5}" &
}

ask() {
    python3 -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "prompt": open(sys.argv[2]).read(),
        "max_tokens": int(sys.argv[3]), "temperature": 0}))' "$2" "$3" "$4" |
        curl -sSf "http://127.0.0.1:$1/v1/completions" -H 'Content-Type: application/json' -d @-
}

case "${1:-}" in
serve)
    trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
    serve 8001 "$2" "$3" kv_producer "${@:4}"
    serve 8002 "$2" "$3" kv_consumer "${@:4}"
    wait
    ;;
ask)
    ask 8001 "$2" "$3" 1 >/dev/null
    sleep 1 # the last blocks are being written; what is not there is computed
    ask 8002 "$2" "$3" 64
    echo
    ;;
*)
    sed -n '2,5s/^# \?//p' "$0"
    exit 2
    ;;
esac
