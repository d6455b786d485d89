"""A stand-in for `python -m moe train` and `moe upcycle` that starts at once: the same files, one line a step, and no model.

It is run as a script. What a run's end should be is read from the file `ending` beside the study's runs: {id: exit code or word}.
A run that has no checkpoint needs the weights that its recipe begins with; what was upcycled stands in the file `upcycled`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import sys
import time


def main() -> None:
    folder = pathlib.Path(json.loads(next(word for word in sys.argv if word.startswith("run.folder=")).partition("=")[2]))
    steps = int(next(word for word in sys.argv if word.startswith("train.steps=")).partition("=")[2])
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    step = max((int(path.name[5:]) for path in checkpoints.iterdir() if path.name[5:].isdecimal()), default=0)
    origin = re.search("^init:\n  from: (.+)$", (folder / "recipe.yaml").read_text(), re.MULTILINE)
    if not step and origin and origin[1] != "null" and not (pathlib.Path(origin[1]) / "weights" / "model").exists():
        sys.exit(f"error: {origin[1]} is not there to begin with")
    ending = ending_of(folder)
    seconds = float(os.environ.get("TRAINER_SECONDS", "0.002"))
    while step < steps:
        time.sleep(seconds)
        step += 1
        with (folder / "taken").open("a") as file:
            file.write(f"{step}\n")
        if step == steps // 2 and ending is not None:
            end(ending)
        if step % 20 == 0 or step == steps:
            partial = checkpoints / f"partial-{os.getpid()}"
            partial.mkdir()
            partial.rename(checkpoints / f"step-{step:08d}")
            for old in sorted(checkpoints.glob("step-*"))[:-2]:
                old.rmdir()
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "model").write_text(str(steps))
    loss = 2 + int(folder.name, 16) % 1000 / 1000
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": steps, "loss": loss, "tokens_per_second": 1000.0}) + "\n")
        file.write(json.dumps({"step": steps, "validation_loss": loss, "bits_per_byte": loss / 0.6931}) + "\n")


def upcycle(source: pathlib.Path, destination: pathlib.Path) -> None:
    if not (source / "weights" / "model").exists():
        sys.exit(f"error: {source} is no model")
    with (destination.parent / "upcycled").open("a") as file:
        file.write(f"{destination.name}\n")
    time.sleep(20 * float(os.environ.get("TRAINER_SECONDS", "0.002")))
    if (ending := ending_of(destination)) is not None:
        end(ending)
    partial = destination.with_name(f".{destination.name}.partial")
    (partial / "weights").mkdir(parents=True, exist_ok=True)
    (partial / "weights" / "model").write_text("sparse")
    partial.rename(destination)


def ending_of(folder: pathlib.Path) -> int | str | None:
    endings = folder.parent / "ending"
    return json.loads(endings.read_text()).get(folder.name) if endings.exists() else None


def end(ending: int | str) -> None:
    if isinstance(ending, int):
        print("error: as it was asked to", flush=True)
        sys.exit(ending)
    if ending == "sleep":
        time.sleep(60)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f"CUDA {ending}: tried to allocate")


if __name__ == "__main__":
    upcycle(*map(pathlib.Path, sys.argv[4:6])) if sys.argv[3] == "upcycle" else main()
