#!/usr/bin/env bash
# DeepSpeed in a folder of its own, for the tests of its engine, which are skipped without: bash launch/deepspeed.sh DIR [VERSION]
#
# Then PYTHONPATH=DIR bash launch/test.sh --all tests/engines/test_deepspeed.py. 25 MB, without a second torch.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -ge 1 && "$1" != -* ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
python="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"
"$python" -m pip install --quiet --no-deps --target "$1" "deepspeed==${2:-0.19.8}" einops hjson msgpack ninja py-cpuinfo
