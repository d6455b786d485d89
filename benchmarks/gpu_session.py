"""Everything that is wanted of a GPU, in order of value, each part bounded in time and its results kept whatever the next does:

    python -m benchmarks.gpu_session --folder results           about 30 minutes on an H100
    python -m benchmarks.gpu_session --parts tests kernels      some of it, where a session is cut into pieces

tests, kernels and profile need torch, Triton and pytest alone; for tune and train see launch/wheels.sh. MOE_COMMIT names the
commit where there is no repository.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    """A command, in whose words {folder} and {minutes} are filled in."""

    minutes: float
    words: tuple[str, ...]


KERNELS = ("{python}", "-m", "benchmarks.kernels", "--folder", "{folder}", "--minutes", "{inner}")
TUNE = "d=2048,f=768,experts=128,k=8,tokens=32768"  # Qwen3-30B-A3B
PARTS = {
    "tests": Part(6, ("bash", "launch/test.sh", "--gpu", "-q", "-p", "no:cacheprovider", "--durations=10")),
    "kernels": Part(9, KERNELS),
    "profile": Part(2, (*KERNELS, "--profile", "--tokens", "32768", "--routings", "natural", "--layers", "triton", "torch")),
    "tune": Part(4, ("{python}", "-m", "moe", "tune", "--shape", TUNE, "--out", "{folder}/tuned.json")),
    "train": Part(8, ("{python}", "-m", "benchmarks.gpu_train", "--folder", "{folder}", "--seconds", "110")),
}


def run(name: str, part: Part, folder: Path) -> dict:
    """Run a part to its end or its limit; its output goes to a log either way."""
    inner = max(part.minutes - 1.5, 0.5)  # a cell that has begun is finished
    words = [word.format(python=sys.executable, folder=folder, inner=inner) for word in part.words]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHON": sys.executable}
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        child = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code: int | str = child.wait(60 * part.minutes)
        except subprocess.TimeoutExpired:
            code = f"ended after {part.minutes} minutes"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return {"part": name, "result": code, "seconds": round(time.monotonic() - start, 1), "command": " ".join(words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("OUT", "gpu_session")), help="where results go; $OUT if set")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, help="limit of each part, in place of its own")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for name in chosen.parts:
        part = PARTS[name] if chosen.minutes is None else PARTS[name]._replace(minutes=chosen.minutes)
        done.append(run(name, part, folder))
        (folder / "session.json").write_text(json.dumps(done, indent=1) + "\n")
        print(json.dumps(done[-1]), (folder / f"{name}.log").read_text()[-2000:], sep="\n", flush=True)
    raise SystemExit(any(part["result"] != 0 for part in done))


if __name__ == "__main__":
    main()
