"""What each rank of a verification runs: `python -m moe.verify.rank JOB`, started by `moe.parallel.launch`.

The job is a folder with cases.json, a list of cases; the first rank leaves the trace of case n in n.safetensors, or in n.txt the
sentence for which it was refused.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe.errors import MoeError
from moe.parallel.launch import run_rank
from moe.parallel.mesh import Mesh, start
from moe.train.deterministic import be_deterministic
from moe.verify.shrink import built
from moe.verify.trace import trace

_QUIET_SECONDS = 5


def work(folder: Path) -> None:
    """Trace every case."""
    cases = json.loads((folder / "cases.json").read_text())
    recipe = built(cases[0]["words"])
    if recipe.train.deterministic:
        be_deterministic()
    mesh = start(recipe.parallel)
    torch.set_num_threads(1)
    progress = Progress()
    for number, case in enumerate(cases):
        run(case, mesh, folder / str(number))
        if mesh.first:
            progress.say(f"{number + 1} of {len(cases)}: {case['name']}")
    if mesh.first:
        progress.end()


def run(case: dict[str, Any], mesh: Mesh, path: Path) -> None:
    """Trace one case into a file; a refusal, which all ranks give alike, is its answer too."""
    try:
        found = trace(built(case["words"]), mesh, steps=case["steps"], ranks=case["ranks"])
    except MoeError as error:
        if mesh.first:
            path.with_suffix(".txt").write_text(str(error))
        return
    if mesh.first:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path.with_suffix(".safetensors"))


class Progress:
    """One line that changes at a terminal; elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self.live, self.last = sys.stderr.isatty(), time.monotonic()

    def say(self, text: str) -> None:
        if self.live:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > _QUIET_SECONDS:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_rank(lambda: work(Path(sys.argv[1])))
