#!/usr/bin/env bash
# Distil on four nodes under SLURM, from the directory that has models/ and data/:
#   run.sh [section.key=value ...]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
exec sbatch --nodes=4 "$here/../multinode/train.sbatch" "$here/config.yaml" "$@"
