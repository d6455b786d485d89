"""Does the mixture win? An MoE against its dense counterpart with the same active parameters on the same data.

Both are trained with each of the same learning rates and seeds; each is judged at its own best rate. Every run is an
ordinary run folder under --runs, and what is finished is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import write_report

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
KINDS = ("dense", "moe")


def command(kind: str, rate: float, seed: int, folder: Path, steps: int) -> list[str]:
    """`moe train` for one cell; the dense model's feed-forward is as wide as the experts a token passes."""
    model = ["model.moe=null", "model.d_ff=384"] if kind == "dense" else []
    return [
        *(sys.executable, "-m", "moe", "train", "configs/debug.yaml"),
        *(f"run.folder={folder}", f"train.steps={steps}", f"train.seed={seed}", f"optimizer.lr={rate}", "parallel.ranks=1"),
        *(f"evaluate.every={steps}", f"checkpoint.every={steps}", "evaluate.sequences=512", "evaluate.sample_tokens=1", "log.every=50"),
        *model,
    ]


def result(folder: Path, steps: int) -> dict | None:
    """Validation row of a finished run."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row for row in rows if "validation_loss" in row and row["step"] == steps), None)


def run(cell: tuple[str, float, int], runs: Path, steps: int) -> dict:
    kind, rate, seed = cell
    folder = runs / f"{kind}-lr{rate:g}-seed{seed}-steps{steps}"
    if result(folder, steps) is None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command(kind, rate, seed, folder, steps), env=environment, capture_output=True, text=True, timeout=7200)
        if done.returncode:
            raise SystemExit(f"{folder} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    row = result(folder, steps)
    assert row is not None
    print(f"{kind:<6} lr {rate:g} seed {seed}: {row['bits_per_byte']:.4f} bits per byte", flush=True)
    commit = json.loads((folder / "environment.json").read_text())["commit"] or "unknown"
    figures = {"validation_loss": row["validation_loss"], "bits_per_byte": row["bits_per_byte"]}
    return {"kind": kind, "lr": rate, "seed": seed, "commit": commit} | figures


def table(rows: list[dict]) -> list[dict]:
    """Mean and standard error over seeds, for every kind and rate, the best rate of each kind marked."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for rate in dict.fromkeys(row["lr"] for row in rows):
            losses = [row["validation_loss"] for row in rows if (row["kind"], row["lr"]) == (kind, rate)]
            bits = [row["bits_per_byte"] for row in rows if (row["kind"], row["lr"]) == (kind, rate)]
            error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
            cells.append(
                {
                    "model": kind,
                    "lr": rate,
                    "validation loss": statistics.mean(losses),
                    "standard error": error,
                    "bits per byte": statistics.mean(bits),
                }
            )
        best = min(cells, key=lambda cell: cell["validation loss"])
        lines += [cell | {"best rate": "yes" if cell is best else ""} for cell in cells]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the raw rows to this file")
    parser.add_argument("--quick", action="store_true", help="two runs of a few steps, to see that it works")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--runs", type=Path, default=Path("runs/dense_vs_moe"))
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    options = parser.parse_args()
    steps = 20 if options.quick else options.steps
    cells = list(itertools.product(KINDS, RATES[:1], SEEDS[:1]) if options.quick else itertools.product(KINDS, RATES, SEEDS))
    with ThreadPoolExecutor(options.parallel) as pool:
        rows = list(pool.map(lambda cell: run(cell, options.runs, steps), cells))
    made = sorted({row["commit"][:7] + ("+" if row["commit"].endswith("+changes") else "") for row in rows})
    notes = [f"Commits the runs were made at (+ for a changed checkout): {', '.join(made)}.", f"{steps} steps, seeds {SEEDS}."]
    write_report("dense_vs_moe", table(rows), raw=rows, json_file=options.json, quick=options.quick, notes=notes)


if __name__ == "__main__":
    main()
