#!/usr/bin/env bash
# One node of several; start it on each, with the same words, in a directory that all of them see:
#   NODES=2 NODE=0 HEAD=10.0.0.1:29400 examples/multinode/node.sh CONFIG.yaml [section.key=value ...]
set -euo pipefail
: "${NODES:?how many nodes there are}" "${NODE:?which of them this is: 0, 1, ...}"
: "${HEAD:?address:port of node 0, for the others to reach}"
[[ $NODE =~ ^[0-9]+$ && $NODE -lt $NODES ]] || { echo "NODE: got $NODE, expected 0 to $((NODES - 1))" >&2; exit 2; }
# tensor-parallel communication overlaps the matrix products only when kernels queue in one line
export CUDA_DEVICE_MAX_CONNECTIONS=1
# a rank for each GPU, unless RANKS says how many; node 0 is where the others meet
exec torchrun --nnodes "$NODES" --nproc-per-node "${RANKS:-gpu}" --rdzv-id "opd-$HEAD" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-conf "is_host=$((NODE == 0))" \
  -m megatron_opd "$@"
