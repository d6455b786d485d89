"""Which router finds the regressor of a hidden cluster, and how many random settings must be tried until it does.

A sample belongs to one of 16 hidden clusters: x is a point of its cluster's Gaussian in 16 dimensions, and y is a linear function of x that
is the cluster's own, plus noise of standard deviation 0.1. The model is a mixture of 16 linear experts; it reaches the noise only if its
router tells all clusters apart. Neighbouring Gaussians overlap a little. Two clusters that share
an expert cost about 1/16 of the variance, which is how a router that decides too early shows. This is a toy after the clustered data that
COMET (Ibrahim et al., 2023) and DSelect-k (Hazimeh et al., 2021) argue with, not a data set of theirs.

Every router is trained with the same number of random settings, each for the same number of steps on fresh samples, with Adam and a rate
that falls linearly to 0. The i-th settings of all routers have the same learning rate, the same k and the same first experts.
Ranges, log-uniform where two numbers are given:

    all                 learning rate 2e-3 … 1e-1; k 1, 2 or 4
    hash                16, 64 or 256 ids; a random table of its own in each trial
    top_k               balance_loss 1e-4 … 1e-1 (k=1: normalize=none, as in Switch; else selected)
    dselect_k, comet    gamma 0.1 … 10; entropy_loss 1e-3 … 10
    comet+              as comet, and a permutation phase of 1, 2, 5 or 10 % of the steps (local_search around comet)

Samples have no token ids. The id that `hash` gets is the nearest of so many codewords, which are samples of the same distribution: a coarse
place in space that knows nothing of y. A trial is a line of regressors.jsonl under --runs; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import RESULTS, commit, write_report
from benchmarks.routers.figure import dots
from moe.routers import Router, Tokens, build

ROUTERS = ("hash", "top_k", "dselect_k", "comet", "comet+")
CLUSTERS = EXPERTS = D = 16
NOISE, SPREAD = 0.1, 1.5  # standard deviations: of y about its regressor, and of the centres, where a cluster's is 1
BATCH, HELD_OUT = 256, 8192
FEW = 4  # the largest k that is tried: a gate that has not decided by the end uses more experts than this


class Samples(NamedTuple):
    x: Tensor
    y: Tensor
    cluster: Tensor


class Mixture:
    """The distribution of one data seed."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.center = SPREAD * torch.randn(CLUSTERS, D, generator=draw)
        self.slope = torch.randn(CLUSTERS, D, generator=draw) / math.sqrt(D)
        self.offset = torch.randn(CLUSTERS, generator=draw)

    def draw(self, n: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        cluster = torch.randint(CLUSTERS, (n,), generator=generator)
        within = torch.randn(n, D, generator=generator)
        y = (within * self.slope[cluster]).sum(-1) + self.offset[cluster] + NOISE * torch.randn(n, generator=generator)
        return Samples(self.center[cluster] + within, y, cluster)

    def nearest_center(self, x: Tensor) -> Tensor:
        """The best guess of the cluster from x alone."""
        return torch.cdist(x, self.center).argmin(-1)


def settings(router: str, seed: int, trial: int) -> dict[str, Any]:
    """What a trial is run with: the first draws are the same for every router."""
    shared, own = random.Random(f"{seed} {trial}"), random.Random(f"{seed} {trial} {router.removesuffix('+')}")

    def log_uniform(low: float, high: float) -> float:
        return float(f"{low * (high / low) ** own.random():.3g}")

    rate, k = float(f"{2e-3 * 50 ** shared.random():.3g}"), shared.choice((1, 2, 4))
    drawn: dict[str, Any] = {"lr": rate, "router": {"name": router, "k": k}}
    if router == "hash":
        drawn["router"]["vocab"] = own.choice((16, 64, 256))
    elif router == "top_k":
        drawn["router"] |= {"normalize": "none" if k == 1 else "selected", "balance_loss": log_uniform(1e-4, 1e-1)}
    else:
        gate = {"name": router.removesuffix("+"), "k": k, "gamma": log_uniform(0.1, 10), "entropy_loss": log_uniform(1e-3, 10)}
        phase = own.choice((0.01, 0.02, 0.05, 0.1))
        drawn["router"] = {"name": "local_search", "router": gate, "steps": phase} if router == "comet+" else gate
    return drawn


def tokens(x: Tensor, codewords: Tensor | None, step: int) -> Tokens:
    known = Tokens.of(x)._replace(step=step, index=step * BATCH + torch.arange(len(x)))
    return known if codewords is None else known._replace(id=torch.cdist(x, codewords).argmin(-1))


def predict(router: Router, experts: Tensor, x: Tensor, known: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, the router's loss, and the number of experts used, over all samples."""
    routing = router(x, known)
    weight = routing.weight.new_zeros(len(x), EXPERTS + 1)
    weight = weight.index_put((routing.token, routing.expert), routing.weight, accumulate=True)[:, :EXPERTS]
    each = x @ experts[:, :-1].T + experts[:, -1]
    return (weight * each).sum(-1), routing.loss, routing.load(EXPERTS)


def trial(router_name: str, seed: int, number: int, steps: int) -> dict[str, Any]:
    """Train once, and say how good it is."""
    mixture, drawn = Mixture(seed), settings(router_name, seed, number)
    options = dict(drawn["router"])
    if options["name"] == "local_search":
        options["steps"] = max(round(options["steps"] * steps), 1)
    torch.manual_seed(1000 * seed + number)
    experts = (torch.randn(EXPERTS, D + 1) / math.sqrt(D)).requires_grad_()
    codewords = mixture.draw(options["vocab"], 30_000_000 + number).x if options["name"] == "hash" else None
    router = build(options, D, EXPERTS)
    if codewords is not None:
        router.stream = number
        router.reset_buffers()
    optimizer = torch.optim.Adam([experts, *router.parameters()], lr=drawn["lr"])
    stream = mixture.draw(steps * BATCH, 100_000 * (number + 1) + seed)
    for step, (x, y) in enumerate(zip(stream.x.split(BATCH), stream.y.split(BATCH), strict=True)):
        optimizer.param_groups[0]["lr"] = drawn["lr"] * (1 - step / steps)
        guess, loss, load = predict(router, experts, x, tokens(x, codewords, step))
        ((guess - y).square().mean() + loss / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        router.update(load, BATCH)
    router.eval()
    row = {"seed": seed, "name": router_name, "trial": number, "steps": steps, "commit": commit(), "settings": drawn}
    with torch.no_grad():
        for name, offset in (("validation", 1), ("test", 2)):
            held_out = mixture.draw(HELD_OUT, 20_000_000 + offset)
            guess, _, load = predict(router, experts, held_out.x, tokens(held_out.x, codewords, steps))
            row[name] = (guess - held_out.y).square().mean().item()
            row["nonzeros"] = load.sum().item() / HELD_OUT
    return row


def references(seed: int) -> dict[str, float]:
    """Test errors without a learned router: one regressor for all, and the best one of the nearest centre."""
    mixture = Mixture(seed)
    test, train = mixture.draw(HELD_OUT, 20_000_002), mixture.draw(HELD_OUT * 4, 20_000_003)

    def fit(group: Tensor, group_test: Tensor) -> float:
        error = 0.0
        for g in group.unique():
            here, there = group == g, group_test == g
            solution = torch.linalg.lstsq(_with_one(train.x[here]), train.y[here, None]).solution
            error += (_with_one(test.x[there]) @ solution)[:, 0].sub(test.y[there]).square().sum().item()
        return error / HELD_OUT

    return {
        "one": fit(torch.zeros_like(train.cluster), torch.zeros_like(test.cluster)),
        "nearest": fit(mixture.nearest_center(train.x), mixture.nearest_center(test.x)),
        "known": fit(train.cluster, test.cluster),
    }


def trials_needed(rows: Sequence[dict], goal: float, experts: float = math.inf) -> float:
    """Expected draws until the first with a test error of at most `goal`, over all orders; one more than there are if none has it.

    A trial that ends with more experts a sample than `experts` does not count as one that has it.
    """
    hits = sum(row["test"] <= goal and row["nonzeros"] <= experts for row in rows)
    return (len(rows) + 1) / (hits + 1)  # where the first of so many random places lies on average


def summary(name: str, rows: list[dict], goals: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """One line of the table: mean over data seeds ± its standard error."""
    tried = {seed: _of(rows, name, seed) for seed in goals}
    winners = [_best(group) for group in tried.values()]
    sparse = [_best(few) for group in tried.values() if (few := [row for row in group if row["nonzeros"] <= FEW])]

    def trials(which: int, experts: float = math.inf) -> str:
        needed = [trials_needed(group, goals[seed][which], experts) for seed, group in tried.items()]
        missed = sum(count > len(group) for count, group in zip(needed, tried.values(), strict=True))
        return _mean(needed, 3) + (f" ({missed} never)" if missed else "")

    return {
        "router": name,
        "best test MSE": _mean([row["test"] for row in winners]),
        "experts a sample": f"{statistics.mean(row['nonzeros'] for row in winners):.2f}",
        f"best with at most {FEW} experts": _mean([row["test"] for row in sparse]) if sparse else "none",
        "median test MSE": _mean([statistics.median(row["test"] for row in group) for group in tried.values()]),
        "trials to best top_k + 10 %": trials(0),
        f"the same with at most {FEW} experts": trials(0, FEW),
        "trials to a quarter of one regressor": trials(1),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs/routers"), help="folder of finished trials")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5, help="how many data sets")


def run(options: argparse.Namespace) -> None:
    steps, trials, seeds = (20, 2, 1) if options.quick else (options.steps, options.trials, options.seeds)
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = _finish(options.runs / "regressors.jsonl", list(itertools.product(range(seeds), range(trials), ROUTERS)), steps)
    known = {seed: references(seed) for seed in range(seeds)}
    goals = {seed: (1.1 * _best(_of(rows, "top_k", seed))["test"], reference["one"] / 4) for seed, reference in known.items()}
    table = [summary(name, rows, goals) for name in ROUTERS]
    shown = {name: _mean([reference[name] for reference in known.values()]) for name in ("one", "nearest", "known")}
    notes = [
        f"{trials} random settings a router and data set, {steps} steps of {BATCH} samples; mean ± standard error over {seeds} data sets.",
        f"Without a learned router: one regressor for all {shown['one']}, one for each nearest true centre {shown['nearest']}, "
        f"for each true cluster {shown['known']}.",
        "Best: the test error of the setting with the lowest validation error, and how many experts a sample has in it; then the best "
        f"of the settings that end with at most {FEW} experts a sample.",
        f"Trials: expected number of draws, over all orders of the {trials}, until a test error is reached; a data set on which none "
        f"reaches it (“never”) counts as {trials + 1}, which is too little.",
        f"Best minus that of top_k, paired over data sets: {_against(rows, goals)}; of settings with at most {FEW} experts: "
        f"{_against(rows, goals, FEW)}.",
        f"Commits the trials were made at: {', '.join(sorted({row['commit'] for row in rows}))}.",
    ]
    write_report("routers_regressors", table, raw=rows, json_file=options.json, quick=options.quick, notes=notes)
    if not options.quick:
        bars = [(name, *_mean_error([_best(_of(rows, name, seed))["test"] for seed in goals])) for name in ROUTERS]
        dots(RESULTS / "routers_regressors.svg", bars, f"Mixture of regressors: best of {trials} settings", "test MSE, lower is better")


def _finish(path: Path, cells: list[tuple[int, int, str]], steps: int) -> list[dict]:
    """The rows of all cells, of which those that `path` lacks are run and added to it."""
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(row["seed"], row["trial"], row["name"]): row for row in map(json.loads, lines) if row["steps"] == steps}
    with path.open("a") as file:
        for seed, number, name in cells:
            row = done.get((seed, number, name))
            if row is not None and row["settings"] == settings(name, seed, number):
                continue
            row = done[seed, number, name] = trial(name, seed, number, steps)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"seed {seed} trial {number:>2} {name:<9} test {row['test']:.4f} experts {row['nonzeros']:.2f}", flush=True)
    return [done[cell] for cell in cells]


def _of(rows: Sequence[dict], name: str, seed: int) -> list[dict]:
    return [row for row in rows if (row["name"], row["seed"]) == (name, seed)]


def _best(rows: Sequence[dict]) -> dict:
    return min(rows, key=lambda row: row["validation"])


def _against(rows: Sequence[dict], seeds: Iterable[int], experts: float = math.inf) -> str:
    """Every other router's best test error less that of top_k, on the data sets where it has a trial with so few experts."""
    found = []
    for name in ROUTERS:
        pairs = [([row for row in _of(rows, name, seed) if row["nonzeros"] <= experts], _of(rows, "top_k", seed)) for seed in seeds]
        less = [_best(ours)["test"] - _best(other)["test"] for ours, other in pairs if ours]
        if name != "top_k" and less:
            found.append(f"{name} {_mean(less, 2)}")
    return ", ".join(found)


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _mean(values: Sequence[float], digits: int = 4) -> str:
    mean, error = _mean_error(values)
    return f"{mean:.{digits}g}" if math.isnan(error) else f"{mean:.{digits}g} ± {error:.2g}"


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)
