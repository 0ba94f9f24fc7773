#!/usr/bin/env bash
# Distil on the eight GPUs of this node, from the directory that has models/ and data/:
#   run.sh [section.key=value ...] [--dry-run]
set -euo pipefail
# tensor-parallel communication overlaps the matrix products only when kernels queue in one line
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --standalone --nproc-per-node 8 \
  -m megatron_opd "$(dirname "${BASH_SOURCE[0]}")/config.yaml" "$@"
