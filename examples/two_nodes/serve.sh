#!/bin/sh
# One engine on the GPUs of two machines, through Ray.
#
# usage: serve.sh head MODEL [options of `vllm serve`]     on the first machine; waits for the other, then serves
#        serve.sh worker HEAD_ADDRESS                      on the second machine; stays until interrupted
#
# NODES (2) and GPUS_PER_NODE (8) say what there is. Tensor parallelism spans the GPUs of a machine, pipeline parallelism
# the machines. Both machines need the same vLLM, vllm_shadowkv, Ray, and the model under the same name.
set -eu
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
PORT=6379

usage() {
    sed -n '4,5s/^# //p' "$0" >&2
    exit 2
}

case "${1:-}" in
head)
    [ $# -ge 2 ] || usage
    model=$2
    shift 2
    ray start --head --port="$PORT" --num-gpus="$GPUS_PER_NODE"
    trap 'ray stop' EXIT
    python3 - "$NODES" <<'EOF'
import sys, time

import ray

ray.init(address="auto")
while len([node for node in ray.nodes() if node["Alive"]]) < int(sys.argv[1]):
    print("waiting for the other machines", flush=True)
    time.sleep(5)
EOF
    vllm serve "$model" \
        --attention-backend shadowkv \
        --distributed-executor-backend ray \
        --tensor-parallel-size "$GPUS_PER_NODE" \
        --pipeline-parallel-size "$NODES" \
        "$@"
    ;;
worker)
    [ $# -eq 2 ] || usage
    exec ray start --address="$2:$PORT" --num-gpus="$GPUS_PER_NODE" --block
    ;;
*)
    usage
    ;;
esac
