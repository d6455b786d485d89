#!/usr/bin/env bash
# A folder of wheels for the GPU tests on a machine that has torch but no network: bash launch/wheels.sh DIR [PYTHON_VERSION]
#
# There: python3 -m pip install --no-index --find-links DIR -r DIR/requirements.txt, then bash launch/test.sh --gpu
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -ge 1 && "$1" != -* ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
folder="$1" python="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"

mkdir -p "$folder"
"$python" - "$ROOT/pyproject.toml" >"$folder/requirements.txt" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
tests = [line for line in project["optional-dependencies"]["dev"] if re.match("pytest|beartype|psutil", line)]
print(*(line for line in project["dependencies"] + tests if not re.match("torch|numpy", line)), sep="\n")
PYTHON
"$python" -m pip download --quiet --dest "$folder" --only-binary=:all: --python-version "${2:-3.12}" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
    --constraint "$ROOT/launch/constraints-cuda.txt" --requirement "$folder/requirements.txt"
du -sh "$folder"
