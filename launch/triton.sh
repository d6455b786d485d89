#!/usr/bin/env bash
# Another Triton in a folder of its own, for a second run of the kernels' tests: bash launch/triton.sh DIR [VERSION]
#
# Then MOE_TRITON_OTHER=DIR bash launch/test.sh --all tests/kernels. numpy comes along: Triton 3.6 interprets with numpy < 2.4 only.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -ge 1 && "$1" != -* ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
python="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"
"$python" -m pip install --quiet --no-deps --target "$1" "triton==${2:-3.6.0}" "numpy<2.4"
