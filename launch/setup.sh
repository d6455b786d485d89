# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `setup run` or `setup dev` makes .venv from pyproject.toml, once.
#
# An importable torch >= 2.11 of the chosen Python is used as it is (PYTHON=… chooses). PIP_* settings reach pip untouched:
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT … decide where packages come from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT" || exit

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The version of a usable torch of this Python, or nothing.
torch_of() {
    "$1" - 2>/dev/null <<'PYTHON' || true
from importlib.metadata import version
import torch
if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11):
    print(version("torch"))
PYTHON
}

# A Python >= 3.11, rather one that has torch.
choose_python() {
    local candidate found=""
    for candidate in ${PYTHON:-python3 python python3.13 python3.12 python3.11}; do
        new_enough "$candidate" || continue
        found="${found:-$candidate}"
        if [[ -n "$(torch_of "$candidate")" ]]; then
            found="$candidate"
            break
        fi
    done
    [[ -n "$found" ]] || fail "no Python >= 3.11 among: ${PYTHON:-python3 python python3.13 python3.12 python3.11}; install one, or name it with PYTHON=/path/to/python"
    printf '%s\n' "$found"
}

# Constraints of an environment that borrows torch: what is installed already stays, torch at its very version.
borrowed_constraints() {
    "$1" - "$2" "$3" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
print(f"torch=={sys.argv[2]}")
for line in open(sys.argv[1]):
    name = line.partition("==")[0].strip()
    if not name or name.startswith("#") or name == "torch":
        continue
    try:
        version(name)
    except PackageNotFoundError:
        print(line.strip())
PYTHON
}

# Let .venv import what the given Python has, after its own packages.
borrow_packages() {
    local theirs ours
    theirs="$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    ours="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\n' "$theirs" >"$ours/borrowed.pth"
}

setup() {
    local extra="$1" constraints="launch/constraints-cpu.txt" target="." size="100 MB" stamp key python torch=""
    [[ "$extra" == dev ]] && target=".[dev]" && size="400 MB"
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        constraints="launch/constraints-cuda.txt"
    fi
    stamp=".venv/.setup-$extra"
    key="$(cat pyproject.toml "$constraints" launch/setup.sh | cksum)"
    if [[ -x .venv/bin/python ]] && [[ "$(cat "$stamp" 2>/dev/null)" == "$key" ]]; then
        return
    fi

    if [[ ! -x .venv/bin/python ]]; then
        python="$(choose_python)"
        torch="$(torch_of "$python")"
        say "making .venv with $("$python" --version 2>&1) ($(command -v "$python"))${torch:+, using its torch $torch}"
        "$python" -m venv ${torch:+--system-site-packages} .venv </dev/null ||
            fail "$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv"
        if [[ -n "$torch" ]]; then
            # a virtual environment made from another one sees the system below, not the other one
            [[ -n "$(torch_of .venv/bin/python)" ]] || borrow_packages "$python"
            borrowed_constraints "$python" "$constraints" "$torch" >.venv/constraints.txt
        else
            cp "$constraints" .venv/constraints.txt
        fi
    fi
    [[ -e .venv/constraints.txt ]] && constraints=".venv/constraints.txt"

    torch="$(torch_of .venv/bin/python)"
    if [[ -n "$torch" ]]; then
        say "installing what is missing beside torch $torch: about $size at most"
    else
        say "installing torch and about $size of other packages, under $constraints"
        say "torch takes 200 MB as a CPU build and 3 GB with CUDA libraries; pip takes what its index offers (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS)"
    fi
    local quiet=(--quiet)
    [[ -t 1 && -z "${CI:-}" ]] && quiet=()
    PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install ${quiet[@]+"${quiet[@]}"} \
        --constraint "$constraints" --editable "$target" </dev/null ||
        fail "pip could not install; its message is above. Behind a mirror set PIP_INDEX_URL; without a network set PIP_FIND_LINKS to a folder of wheels"
    .venv/bin/python -c 'import torch, moe' || fail "the new environment cannot import torch; remove .venv and try again"
    printf '%s' "$key" >"$stamp"
    [[ "$extra" == dev ]] && printf '%s' "$key" >.venv/.setup-run
    return 0
}
