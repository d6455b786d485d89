"""A tiny job with the life of a training run: start, agree, step, save, resume, stop. Started by test_launch.

    python tests/parallel/stand_in.py FOLDER STEPS [TIMEOUT [slow]]

It sums step + rank over ranks and appends the total to FOLDER/curve; the state saved after each step is that file.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moe import faults
from moe.errors import Preempted
from moe.parallel.fingerprint import check_agreement
from moe.parallel.launch import StopSignal, run_rank
from moe.parallel.layout import Layout
from moe.parallel.mesh import start


def main() -> None:
    folder, steps, timeout = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 60
    stop = StopSignal()
    mesh = start(Layout(device="cpu", timeout=timeout))
    check_agreement(mesh, {"folder": str(folder), "steps": str(steps), "seed": os.environ.get(f"SEED_OF_{mesh.rank}", "0")})
    (folder / f"pid-{mesh.rank}").write_text(str(os.getpid()))
    curve = folder / "curve"
    step = len(curve.read_text().split()) if curve.exists() else 0
    while step < steps:
        faults.point("before", step=step)
        if step == 2 and "ABORTED" in os.environ:  # as if rank 1 slept, and NCCL's watchdog came to the others
            time.sleep(60) if mesh.rank == 1 else time.sleep(0.1)
            os.abort()
        total = torch.tensor(float(step + mesh.rank))
        dist.all_reduce(total)
        faults.point("after", step=step)
        mesh.first_does(partial(save, curve, total.item()))
        step += 1
        if mesh.agree(stop.asked):
            raise Preempted(f"stopped at step {step} of {steps}")
        if "slow" in sys.argv:
            time.sleep(0.05)


def save(curve: Path, total: float) -> None:
    with curve.open("a") as file:
        file.write(f"{total}\n")


if __name__ == "__main__":
    run_rank(main)
