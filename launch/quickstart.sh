#!/usr/bin/env bash
# Train a small Mixture-of-Experts language model here and now: bash launch/quickstart.sh [key=value …]
#
# Needs Python >= 3.11 and nothing else. Makes .venv on its first run, then trains configs/debug.yaml on two processes:
# about five minutes on two cores. The same command again goes on, or shows the finished run's summary.
# MOE_NPROC=1 uses one process (one GPU).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

case "${1:-}" in
-h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$ROOT/launch/quickstart.sh"
    exit 0
    ;;
esac
setup run
say "training: moe train configs/debug.yaml --nproc ${MOE_NPROC:-2} $*"
exec .venv/bin/python -m moe train configs/debug.yaml "$@" --nproc "${MOE_NPROC:-2}"
