"""`moe train` on one GPU, on slices of OLMoE: speed and memory of four layers, and the losses of one layer beside a CPU's.

The first run is bfloat16 over float32 masters, compiled, at OLMoE's widths and vocabulary; its figures are medians of the steps
after the first ten. The second trains one layer for fifty steps on the GPU, compiled in bfloat16 and in float32, and on the CPU in
float32. A run is ended by force once its metrics have enough rows, because checkpoints of such models take minutes to write.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_report
from moe.train.metrics import read

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "configs" / "models" / "olmoe_1b_7b.yaml")
COMMON = ["train.steps=10000", "log.every=1", "evaluate.every=10000", "checkpoint.every=10000", "optimizer.name=adamw", "optimizer.lr=4e-4"]
SPEED = ["model.layers=4", "data.sequence=4096", "train.batch=8", "train.accumulate=2", "schedule.warmup=100"]
AGREE = ["model.layers=1", "model.vocab=null", "data.sequence=256", "train.batch=4", "schedule.warmup=10"]
TINY = ["model.layers=1", "model.d_model=32", "model.heads=2", "model.vocab=null", "model.moe.experts=8", "model.moe.d_expert=32"]
TINY += ["data.sequence=64", "train.batch=4", "train.accumulate=2", "schedule.warmup=2"]
GPU = ["train.dtype=bfloat16", "engine.compile=true", "parallel.device=cuda"]
WARM_UP = 10  # steps in which kernels are compiled and the allocator finds its sizes


def train(overrides: list[str], steps: int, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """The rows of the first steps of a run, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, log = Path(folder) / "run" / "metrics.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "moe", "train", MODEL, *COMMON, *overrides, f"run.folder={Path(folder) / 'run'}"]
        with log.open("w") as out:
            run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + seconds
        try:
            while run.poll() is None and time.monotonic() < deadline and len(rows := _rows(metrics)) < steps:
                time.sleep(0.5)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        rows, printed = _rows(metrics), log.read_text()
    if not rows:
        raise SystemExit(f"the run wrote no step in {seconds:.0f} s; it said:\n{printed[-2000:]}")
    return rows[:steps], printed


def _rows(metrics: Path) -> list[dict[str, Any]]:
    return [row for row in read(metrics) if "loss" in row]


def speed(overrides: list[str], steps: int, seconds: float) -> dict[str, Any]:
    """Median figures of a run's steps after the first ones."""
    rows, printed = train(overrides, steps, seconds)
    settled = rows[WARM_UP:] or rows[-1:]
    figures = {name: statistics.median(row[name] for row in settled) for name in ("tokens_per_second", "mfu") if name in settled[0]}
    backend = next((line for line in printed.splitlines() if line.startswith("experts by backend")), "")
    return {"steps": len(rows), "loss": rows[-1]["loss"], "peak GiB": rows[-1]["memory_gib"], "experts": backend} | figures


def losses(overrides: list[str], steps: int, seconds: float) -> list[float]:
    return [row["loss"] for row in train(overrides, steps, seconds)[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="the longest that one of the four runs may take")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU, to see that it works")
    chosen = parser.parse_args()
    gpu = [] if chosen.quick else GPU
    steps, fast, agree = (4, TINY, TINY) if chosen.quick else (chosen.steps, SPEED, AGREE)
    raw: dict[str, Any] = {"speed": speed([*fast, *gpu], steps, chosen.seconds)}
    print(json.dumps(raw["speed"]), flush=True)
    single = ["train.dtype=float32", "engine.compile=false"]
    runs = {"gpu, bfloat16": gpu, "gpu, float32": [*gpu[2:], *single], "cpu, float32": ["parallel.device=cpu", *single]}
    raw["losses"] = {name: losses([*agree, *overrides], steps, chosen.seconds) for name, overrides in runs.items()}
    right = raw["losses"]["cpu, float32"]
    table = []
    for name, found in raw["losses"].items():
        apart = [abs(a - b) for a, b in zip(found, right, strict=False)]
        table.append(
            {"run": name, "steps": len(found), "first": found[0], "last": found[-1], "largest difference from the CPU": max(apart)}
        )
    notes = [f"{name}: {value}" for name, value in raw["speed"].items()]
    notes += [f"the run of these notes: {' '.join([*fast, *gpu])}; that of the table: {' '.join(agree)}"]
    write_report("gpu_train", table, raw=raw, json_file=chosen.json, quick=chosen.quick, folder=chosen.folder, notes=notes)


if __name__ == "__main__":
    main()
