#!/bin/sh
# One engine on the GPUs of two machines, through Ray.
#
# usage: serve.sh head MODEL [options of `vllm serve`]     on the first machine; waits for the other, then serves
#        serve.sh worker HEAD_ADDRESS                      on the second machine; stays until interrupted
#
# NODES (2) and GPUS_PER_NODE (8) say what there is. Tensor parallelism spans the GPUs of a machine, pipeline parallelism
# the machines. Both machines need the same vLLM, vllm_shadowkv, Ray, and the model under the same name.
#
# HEAD_ADDRESS is the first machine's address as the others reach it; there it is found by itself, or set it.
# Whoever reaches Ray's ports runs code: Ray asks for a token, the same on all machines. Make one with
# `ray get-auth-token --generate` and copy ~/.ray/auth_token; in a network that is yours alone, RAY_AUTH_MODE=disabled.
# Only the Ray that this started ends with it; others on the machine, on another PORT (6379), go on.
set -eu
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
PORT=${PORT:-6379}
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"

usage() {
    sed -n '4,5s/^# //p' "$0" >&2
    exit 2
}

case "${1:-}" in
head)
    [ $# -ge 2 ] || usage
    model=$2
    shift 2
    address=${HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
    # Without it the engine core would start a Ray of its own, with the GPUs of this machine alone.
    export RAY_ADDRESS="$address:$PORT" VLLM_HOST_IP="$address"
    ray start --head --block --node-ip-address="$address" --port="$PORT" --num-gpus="$GPUS_PER_NODE" &
    ray=$!
    server=
    # The server first: Ray would wait for what it has left at work.
    trap 'for each in $server $ray; do kill "$each" 2>/dev/null || true; wait "$each" || true; done' EXIT
    trap 'exit 1' INT TERM
    python3 - "$NODES" "$ray" <<'EOF' &
import os, sys, time

import ray

while True:
    os.kill(int(sys.argv[2]), 0)  # raises where Ray has not started
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        if len([node for node in ray.nodes() if node["Alive"]]) >= int(sys.argv[1]):
            break
    except ConnectionError:  # not yet
        pass
    print("waiting for the other machines", flush=True)
    time.sleep(5)
EOF
    server=$!
    wait "$server" # in the foreground a shell would hear no signal before its end
    vllm serve "$model" \
        --attention-backend shadowkv \
        --distributed-executor-backend ray \
        --tensor-parallel-size "$GPUS_PER_NODE" \
        --pipeline-parallel-size "$NODES" \
        "$@" &
    server=$!
    wait "$server"
    ;;
worker)
    [ $# -eq 2 ] || usage
    exec ray start --address="$2:$PORT" --num-gpus="$GPUS_PER_NODE" --block
    ;;
*)
    usage
    ;;
esac
