"""Is a dense model better trained on, made sparse, or left for a mixture from scratch? At equal extra compute, and from which on.

A dense model is trained on the standard library's text, its learning rate decayed. Then, for each budget of extra training FLOPs
(a share of what the dense model took) and each seed, a run of its own with the rate restarted and decayed again: the dense model
continued; upcycled by copying, with noise, with half the channels drawn anew, and into virtual groups; and a mixture of the same
shape from scratch. Every run is an ordinary run folder under --runs, and what is finished is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.curves import lines
from benchmarks.report import RESULTS, write_report
from benchmarks.upcycling_cell import RESULT, first_figures
from moe.config import load
from moe.data.tokenizer import Bytes
from moe.model.cost import cost
from moe.model.transformer import Transformer
from moe.studies.inference_speed import speeds
from moe.surgery import upcycle
from moe.surgery.stream import Plan, write

BUDGETS = (0.25, 0.5, 1.0, 2.0)  # extra training FLOPs, as a share of the dense model's
SEEDS = (0, 1, 2)
DENSE = ["model.layers=4", "model.d_model=128", "model.heads=4", "model.context=256", "model.d_ff=384"]
MIXTURE = ["model.moe.experts=8", "model.moe.d_expert=384", "model.moe.router.k=2"]
GRANULARITY = 4


class Arm(NamedTuple):
    """A way to spend the extra compute; `upcycled`: options of `moe upcycle`, `pieces`: into how many an expert's layer was cut."""

    upcycled: dict[str, Any] | None = None
    pieces: int = 1


ARMS = {
    "continued dense": Arm(),
    "copy": Arm({"experts": 8, "top_k": 2}),
    "noise": Arm({"experts": 8, "top_k": 2, "variant": "noise", "settings": {"std": 0.1}}),
    "drop r=0.5": Arm({"experts": 8, "top_k": 2, "variant": "drop", "settings": {"ratio": 0.5}}),
    "virtual group G=4": Arm(
        {"experts": 8 * GRANULARITY, "top_k": 2 * GRANULARITY, "variant": "virtual_group", "settings": {"granularity": GRANULARITY}},
        GRANULARITY,
    ),
    "from scratch": Arm(),
}


class Plans(NamedTuple):
    """What is to be run."""

    runs: Path
    steps: int  # of the dense model
    lr: float
    seeds: tuple[int, ...]
    budgets: tuple[float, ...]
    sequences: int  # held out

    def dense(self, seed: int) -> Path:
        return self.runs / f"dense-{self.steps}-lr{self.lr:g}-seed{seed}"

    def source(self, arm: str, seed: int) -> Path:
        """What a run begins with."""
        return self.dense(seed) if ARMS[arm].upcycled is None else self.runs / f"{self.dense(seed).name}-{_slug(arm)}"

    def folder(self, arm: str, budget: float, seed: int) -> Path:
        return self.runs / f"{self.dense(seed).name}-{_slug(arm)}-on-{budget:g}"

    def words(self, folder: Path, steps: int, seed: int, *model: str) -> list[str]:
        return [
            *(f"run.folder={folder}", *model, "data.sequence=256", f"train.steps={steps}", "train.batch=8", f"train.seed={seed}"),
            *(f"optimizer.lr={self.lr}", f"schedule.warmup={min(50, steps // 10)}", "parallel.ranks=1"),
            *(f"checkpoint.every={steps}", f"evaluate.every={max(1, steps // 8)}", f"evaluate.sequences={self.sequences}"),
            *("evaluate.sample_tokens=0", "log.every=50"),
        ]

    def on(self, arm: str, budget: float, seed: int) -> list[str]:
        """The words of a run with extra compute, whose data come in another order than the dense model's."""
        begin = DENSE[:-1] + MIXTURE if arm == "from scratch" else [f"init.from={self.source(arm, seed)}"]
        folder = self.folder(arm, budget, seed)
        price = _flops(self.words(folder, 1, seed, *begin)) / _flops(self.words(self.dense(seed), 1, seed, *DENSE, "model.moe=null"))
        return self.words(folder, max(1, round(budget * self.steps / price)), seed + 100, *begin)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense or sparse, at equal extra compute.")
    parser.add_argument("--json", type=Path, help="also write the raw rows to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--steps", type=int, default=800, help="of the dense model, 2048 tokens each")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    options = parser.parse_args()
    seeds, budgets, steps, sequences = (SEEDS[:1], BUDGETS[:2], 24, 16) if options.quick else (SEEDS, BUDGETS, options.steps, 256)
    plans = Plans(options.runs / "quick" if options.quick else options.runs, steps, options.lr, seeds, budgets, sequences)

    with ThreadPoolExecutor(options.parallel) as pool:
        dense = [(plans.dense(seed), 1, plans.words(plans.dense(seed), steps, seed, *DENSE, "model.moe=null")) for seed in seeds]
        before = list(pool.map(run, dense))
        for arm, seed in itertools.product(ARMS, seeds):
            convert(plans, arm, seed)
        cells = [*itertools.product(ARMS, budgets, seeds)]
        cells.sort(key=lambda cell: -cell[1])  # long runs first, so that the last ones to end are short
        found = pool.map(run, [(plans.folder(*cell), ARMS[cell[0]].pieces, plans.on(*cell)) for cell in cells])
        rows = [
            {"arm": arm, "budget": budget, "seed": seed, **first(plans, arm, budget, seed), **result}
            for (arm, budget, seed), result in zip(cells, found, strict=True)
        ]
    report(plans, before, rows, options)


def run(cell: tuple[Path, int, list[str]]) -> dict[str, Any]:
    """A run's result, from its file if it was made with the same words."""
    folder, pieces, words = cell
    path = folder / RESULT
    result = json.loads(path.read_text()) if path.exists() else None
    if result is None or result["words"] != words:
        command = [sys.executable, "-m", "benchmarks.upcycling_cell", str(folder), str(pieces), *words]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=7200)
        if done.returncode:
            raise SystemExit(f"{folder} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        result = json.loads(path.read_text())
        print(f"{folder.name}: {result['held_out'][-1]['bits_per_byte']:.4f} bits per byte in {result['seconds']:.0f} s", flush=True)
    return result


def convert(plans: Plans, arm: str, seed: int) -> None:
    """Upcycle a dense model, unless it was done."""
    upcycled, folder = ARMS[arm].upcycled, plans.source(arm, seed)
    if upcycled is not None and not folder.exists():
        write(Plan(upcycle.plan, {"source": str(plans.dense(seed)), **upcycled, "seed": seed}), folder)


def first(plans: Plans, arm: str, budget: float, seed: int) -> dict[str, Any]:
    """The figures of a run before its first step; none from scratch."""
    path = plans.folder(arm, budget, seed) / "first.json"
    if arm == "from scratch":
        return {}
    if not path.exists():
        path.write_text(json.dumps(first_figures(plans.source(arm, seed), plans.on(arm, budget, seed), ARMS[arm].pieces)))
    return {"first": json.loads(path.read_text())}


def report(plans: Plans, before: list[dict[str, Any]], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table, the charts, and what wins from which budget on."""
    dense = statistics.mean(row["held_out"][-1]["bits_per_byte"] for row in before)
    table, curves = [], {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        line: dict[str, Any] = {"model": arm, "parameters": mine[0]["parameters"], "active": mine[0]["active"]}
        line["before"] = statistics.mean(row["first"]["bits_per_byte"] for row in mine) if "first" in mine[0] else ""
        curves[arm] = [] if arm == "from scratch" else [(0.0, line["before"], math.nan)]
        for budget in plans.budgets:
            bits = [row["held_out"][-1]["bits_per_byte"] for row in mine if row["budget"] == budget]
            mean, error = statistics.mean(bits), _error(bits)
            line[f"+{budget:g}"] = f"{mean:.4f} ± {error:.4f}"
            curves[arm].append((budget, mean, error))
        longest = [row for row in mine if row["budget"] == plans.budgets[-1]]
        alike = [statistics.mean(row["likeness"][-1]["likeness"] for row in longest)] if longest[0]["likeness"] else []
        if alike and "first" in longest[0]:
            alike.insert(0, statistics.mean(row["first"]["likeness"] for row in longest))
        line["likeness"] = " → ".join(f"{value:.3f}" for value in alike)
        table.append(line)
    rates = speeds({arm: plans.folder(arm, plans.budgets[-1], plans.seeds[0]) for arm in ("continued dense", "copy", "virtual group G=4")})
    fast = "; ".join(f"{arm} {_rates(kinds)}" for arm, kinds in rates.items())
    notes = [
        f"Bits per byte on held-out files, mean and standard error of seeds {plans.seeds}; +b: after b times the dense model's FLOPs more.",
        f"The dense model: {dense:.4f} after {plans.steps} steps of 2048 tokens. Peak learning rate {plans.lr:g}, cosine, in every run.",
        "before: the model that a run begins with. likeness: mean cosine of two experts' outputs (of one piece), before and at the end.",
        *verdicts(rows, plans.budgets),
        f"Tokens a second, one thread: {fast}.",
    ]
    if not options.quick:
        title, across = "Extra training of a dense model, continued or made sparse", "extra training FLOPs / dense training FLOPs"
        lines(RESULTS / "upcycling.svg", curves, title, across, "bits per byte, held out")
        beside: dict[str, list[tuple[float, float, float]]] = {
            arm: [(b, -statistics.mean(g), _error(g)) for b in plans.budgets for g in [gained(rows, b)[arm]]] for arm in ARMS
        }
        beside["from scratch"] = []  # off the scale
        lines(RESULTS / "upcycling_beside.svg", beside, "Beside the dense model trained on", across, "bits per byte above it, equal seeds")
        lines(RESULTS / "upcycling_likeness.svg", likenesses(plans, rows), "How alike experts are", "step", "mean cosine of outputs")
    write_report(
        "upcycling", table, raw={"dense": before, "runs": rows, "speeds": rates}, json_file=options.json, quick=options.quick, notes=notes
    )


def gained(rows: list[dict[str, Any]], budget: float) -> dict[str, list[float]]:
    """Of each way, seed by seed, how many bits fewer than continuing dense at this budget."""
    bits = {(row["arm"], row["seed"]): row["held_out"][-1]["bits_per_byte"] for row in rows if row["budget"] == budget}
    seeds = sorted({seed for _, seed in bits})
    return {arm: [bits["continued dense", seed] - bits[arm, seed] for seed in seeds] for arm in ARMS}


def verdicts(rows: list[dict[str, Any]], budgets: Iterable[float]) -> list[str]:
    """For each budget the best, and each way's mean advantage over continuing dense, seed by seed."""
    found = []
    for budget in budgets:
        gains = gained(rows, budget)
        best = max(gains, key=lambda arm: statistics.mean(gains[arm]))
        others = ", ".join(f"{arm} {statistics.mean(g):+.4f} ± {_error(g):.4f}" for arm, g in gains.items() if arm != "continued dense")
        found.append(f"+{budget:g}: {best} is best; bits gained over continuing dense: {others}.")
    return found


def likenesses(plans: Plans, rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Over the steps of the longest runs, mean and error over seeds."""
    found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        runs = [row for row in rows if row["arm"] == arm and row["budget"] == plans.budgets[-1] and row["likeness"]]
        if runs:
            series = [[{"step": 0, **row["first"]}, *row["likeness"]] if "first" in row else row["likeness"] for row in runs]
            found[arm] = [
                (at[0]["step"], statistics.mean(p["likeness"] for p in at), _error([p["likeness"] for p in at]))
                for at in zip(*series, strict=True)
            ]
    return found


def _flops(words: list[str]) -> float:
    settings = load([], words)
    with torch.device("meta"):
        return cost(Transformer(settings.model, settings.model.vocab or Bytes.vocab), settings.data.sequence).training_flops


def _rates(kinds: dict[str, list[float]]) -> str:
    return ", ".join(f"{kind} {statistics.median(values):,.0f}" for kind, values in kinds.items())


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def _slug(arm: str) -> str:
    return arm.replace(" ", "-").replace("=", "")


if __name__ == "__main__":
    main()
