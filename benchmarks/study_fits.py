"""How fast fits of the scaling laws are, and how far from the truth they end, beside the procedures of the laws' papers.

Runs are made from each law's published values, with chance, and with one in twenty that came out too high; a law is then to foresee
models of four times the size and four times the tokens. The same runs go to each method in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import write_report
from moe.scaling import LAWS
from moe.scaling.fit import bootstrap, cross_check, fit
from moe.scaling.laws import CHINCHILLA, Column, Law, Points
from moe.tables import entry

RUNS, NOISE, DRAWS = 500, 0.003, 200
OUTLIERS, TOO_HIGH = 20, 0.03  # one in so many, and by how much at most
FARTHER, UNSEEN = 4.0, 64
Values = Mapping[str, float]
METHODS: dict[str, Callable[[Law, Points, Column, int], Values]] = {
    "ours": lambda law, x, loss, seed: fit(law, x, loss, seed=seed).values,
    "Huber, L-BFGS, 32 starts": lambda law, x, loss, seed: cross_check(law, x, loss, starts=32, seed=seed),
    "Huber, L-BFGS, 1 start": lambda law, x, loss, seed: cross_check(law, x, loss, starts=1, seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits of scaling laws: how fast, and how right.")
    parser.add_argument("--json", type=Path, help="also write the raw rows to this file")
    parser.add_argument("--quick", action="store_true", help="few runs and draws, to see that it works")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, draws, seeds = (60, 5, 1) if options.quick else (RUNS, DRAWS, options.seeds)
    raw = {name: [measure(entry(LAWS, name, "law"), runs, draws, seed) for seed in range(seeds)] for name in LAWS}
    table = []
    for name, found in raw.items():
        line: dict[str, Any] = {"law": name}
        for method in METHODS:
            line[f"{method}: s"] = f"{median(one[method]['seconds'] for one in found):.2f}"
            worst = [one[method]["error"] for one in found]
            line[f"{method}: off by"] = f"{median(worst):.2%} (at most {max(worst):.2%})"
        line[f"{draws} bootstraps, s"] = f"{median(one['bootstraps'] for one in found):.1f}"
        table.append(line)
    notes = [
        f"{runs} runs by each law's published values, {NOISE:.1%} of chance, one in {OUTLIERS} up to {TOO_HIGH:.0%} too high; medians of "
        f"{seeds} seeds.",
        f"off by: root mean square, relative, over {UNSEEN} models of up to {FARTHER:g} times the largest size and tokens. Seconds of the "
        "processor, one thread.",
        "The starts of the papers' procedure have the best coefficients for their exponents, as ours do.",
    ]
    write_report("study_fits", table, raw=raw, json_file=options.json, quick=options.quick, notes=notes)


def measure(law: Law, runs: int, draws: int, seed: int) -> dict[str, Any]:
    """Each method's seconds and error on the same runs, and the seconds of bootstraps."""
    truth = next(iter(law.published.values()), CHINCHILLA.published["paper"])
    chance = np.random.default_rng(seed)
    x, unseen = points(chance, runs, 1.0), points(chance, UNSEEN, FARTHER)
    high = np.where(np.arange(runs) % OUTLIERS == 0, chance.uniform(0, TOO_HIGH, runs), 0.0)
    loss = law.loss(truth, x) * np.exp(chance.normal(0, NOISE, runs) + high)
    found: dict[str, Any] = {}
    for method, call in METHODS.items():
        start = time.process_time()
        values = call(law, x, loss, seed)
        seconds = time.process_time() - start
        off = law.loss(values, unseen) / law.loss(truth, unseen) - 1
        found[method] = {"seconds": seconds, "error": float(np.sqrt(np.mean(off**2))), "values": dict(values)}
    ours = fit(law, x, loss, seed=seed)
    start = time.process_time()
    bootstrap(ours, x, loss, draws=draws, seed=seed)
    return found | {"bootstraps": time.process_time() - start}


def points(chance: np.random.Generator, count: int, farther: float) -> Points:
    """Runs of 10 M to 1 B active parameters, 1 to 100 B tokens and up to 64 experts; `farther`: of the upper ends, which begin there."""
    low = (1e7, 1e9) if farther == 1.0 else (1e9, 1e11)
    size, tokens = (start * (end / start) ** chance.random(count) for start, end in zip(low, (1e9 * farther, 1e11 * farther), strict=True))
    experts = 2.0 ** chance.integers(0, 7, count)
    sizes = {"active": size, "average": size, "base": size, "total": size * (1 + 0.6 * (experts - 1))}
    return {**sizes, "tokens": tokens, "experts": experts, "sparsity": 1 - 1 / experts, "granularity": 2.0 ** chance.integers(0, 5, count)}


if __name__ == "__main__":
    main()
