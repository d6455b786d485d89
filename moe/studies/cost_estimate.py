"""What a study costs before it starts: FLOPs, hours at a measured speed, disk."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from moe.config import dump
from moe.errors import ConfigError
from moe.model.cost import Cost
from moe.recipe import Recipe
from moe.studies.grid import Run, tokens_a_step
from moe.studies.run_process import LOG, TOKENS, held, quoted
from moe.studies.spec import Means
from moe.train.folder import write_whole
from moe.train.metrics import read

PACE = "pace"
_STEPS, _WARM = 6, 2  # that are timed, and of these the ones left out
_PASS = 150  # FLOPs that cost as much time as AdamW on one parameter, of whose reads and writes it is bound
_STATE = 3  # a checkpoint: weights and two moments
_SMALL = 300_000  # bytes of a run's small files


class Pace(NamedTuple):
    """Seconds of a token, `first + each · work`, and of a process before its first step and after its last."""

    first: float
    each: float
    around: float

    def token(self, price: Cost, tokens_a_step: int) -> float:
        return max(self.first + self.each * work(price, tokens_a_step), self.each * work(price, tokens_a_step) / 2)


class Estimate(NamedTuple):
    """What is left of a study."""

    runs: int
    conversions: int  # of dense twins
    flops: float  # spent, a trunk's once
    seconds: float  # of all processes
    longest: float  # chain of processes that wait for one another
    kept: int  # bytes on disk at the end
    peak: int  # at once

    def hours(self, workers: int) -> float:
        return max(self.seconds / workers, self.longest) / 3600


def work(price: Cost, tokens_a_step: int) -> float:
    """FLOPs of a token in training, the optimizer's pass over all parameters counted as such."""
    return price.training_flops + _PASS * price.parameters / tokens_a_step


def measure(study: Path, runs: list[Run], means: Means) -> Pace:
    """The speed of this machine, from a few steps of the smallest and of the largest run, side by side; remembered."""
    ordered = sorted(runs, key=lambda run: work(run.price, tokens_a_step(run.recipe)))
    pair = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    known, key = study / "pace.json", [*(run.id for run in pair), means.threads, os.cpu_count()]
    with held(study, PACE):  # several workers may begin at once
        if (before := remembered(study)) is not None and before[1] == key:
            return before[0]
        pace = _timed(study / PACE, pair, means.threads)
        write_whole(known, json.dumps({"of": key, "pace": pace}) + "\n")
    return pace


def remembered(study: Path) -> tuple[Pace, Any] | None:
    """The speed that was measured last, and of what; None if there is none, or a kill cut it short."""
    try:
        before = json.loads((study / "pace.json").read_text())
        return Pace(*before["pace"]), before["of"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _timed(folder: Path, pair: list[Run], threads: int) -> Pace:
    start = time.monotonic()
    processes = [_start(folder / run.id, run.recipe, threads) for run in pair]
    codes = [process.wait() for process in processes]
    around, found = time.monotonic() - start, []
    for run, code in zip(pair, codes, strict=True):
        speeds = [row["tokens_per_second"] for row in read(folder / run.id / "metrics.jsonl") if "tokens_per_second" in row]
        if not code and len(speeds) > _WARM:
            found.append((work(run.price, tokens_a_step(run.recipe)), 1 / statistics.median(speeds[_WARM:]), tokens_a_step(run.recipe)))
    if not found:  # where one alone fails, as for want of memory, its row will say so
        log = folder / pair[0].id / LOG
        raise ConfigError(f"no run of the study starts ({' '.join(log.read_text().strip().splitlines()[-1:])[:300]}); see {log}")
    shutil.rmtree(folder)
    (x, a, _), (y, b, _) = found[0], found[-1]
    each = (b - a) / (y - x) if y > x and b > a else b / y
    return Pace(max(a - each * x, 0.0), each, max(1.0, around - _STEPS * max(seconds * tokens for _, seconds, tokens in found)))


def _start(folder: Path, recipe: Recipe, threads: int) -> subprocess.Popen[bytes]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    alone = recipe.model_copy(update={"init": Recipe.model_fields["init"].get_default(call_default_factory=True)})
    write_whole(folder / "recipe.yaml", dump(alone))  # what it begins with is not there yet
    (folder / TOKENS).symlink_to(Path("..") / ".." / TOKENS)
    words = [f"run.folder={quoted(folder)}", f"train.steps={_STEPS}", "log.every=1", "evaluate.sequences=1"]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moe", "train", str(folder / "recipe.yaml"), *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def seconds_of(run: Run, pace: Pace, first: int = 0, last: int | None = None) -> float:
    """Of the process that takes a run, or its trunk, from one step to another."""
    each = tokens_a_step(run.recipe)
    held_out = run.recipe.evaluate.sequences * run.recipe.data.sequence / 3
    steps = (run.recipe.train.steps if last is None else last) - first
    return (steps * each + held_out) * pace.token(run.price, each) + pace.around


def estimate(missing: list[Run], pace: Pace, means: Means, workers: int, corpus: int = 0) -> Estimate:
    """What these runs cost, trunks counted once; beside them on disk lie so many bytes of a corpus."""
    flops = 0.0
    kept, live, trunks, alone, chains = corpus, [], {}, {}, {}
    for run in missing:
        start = run.trunk.start if run.trunk else 0
        if run.trunk:
            trunks.setdefault(run.trunk.id, []).append(run)
        flops += (run.recipe.train.steps - start) * tokens_a_step(run.recipe) * run.price.training_flops
        alone[run.id] = seconds_of(run, pace, start)
        live.append(run.price.bytes * (_STATE * _checkpoints(run.recipe) + 1))
    for sharing in trunks.values():
        starts, run = sorted({run.trunk.start for run in sharing}), sharing[0]
        flops += starts[-1] * tokens_a_step(run.recipe) * run.price.training_flops
        chains[run.trunk.id] = seconds_of(run, pace, 0, starts[-1]) + pace.around * (len(starts) - 1)
        kept += _STATE * run.price.bytes * means.keep_trunks
    ends = {run.id: alone[run.id] + (chains[run.trunk.id] if run.trunk else 0.0) for run in missing}
    made = {run.origin.id: run for run in missing if run.origin and run.origin.asked}  # what surgery writes
    for run in missing:
        if run.origin:
            ends[run.id] += ends.get(run.origin.twin.id, 0.0) + pace.around
    seconds = sum(alone.values()) + sum(chains.values()) + pace.around * len(made)
    longest = max(ends.values(), default=0.0)
    kept += sum(_SMALL + run.price.bytes * means.keep_weights for run in missing)
    # trunks, what runs begin with, and the checkpoint that each run leaves its trunk with stay until those are done
    peak = kept + workers * max(live, default=0) + sum(_STATE * run.price.bytes for run in missing if run.trunk)
    peak += sum(_STATE * _checkpoints(sharing[0].recipe) * sharing[0].price.bytes for sharing in trunks.values())
    peak += 2 * sum(run.price.bytes for run in {run.origin.id: run for run in missing if run.origin}.values())
    return Estimate(len(missing), len(made), flops, seconds, longest, kept, peak)


def _checkpoints(recipe: Recipe) -> int:
    """That a process has on disk at once, the one that is being written among them."""
    every = recipe.checkpoint.durable_every
    return recipe.checkpoint.keep + 1 + (recipe.train.steps // every if every else 0)


def table(missing: list[Run], found: Estimate, workers: int, means: Means) -> Table:
    """The estimate, to be read."""
    lines = Table.grid(padding=(0, 2))
    trunks = len({run.trunk.id for run in missing if run.trunk})
    shared = f", most of them off {counted(trunks, 'trunk')}" if trunks else ""
    made = f", and dense twins made sparse {found.conversions}x" if found.conversions else ""
    lines.add_row("runs", f"{found.runs}{shared}{made}")
    alone = sum(run.flops for run in missing)
    lines.add_row("compute", f"{found.flops:.3g} FLOP" + (f" ({alone:.3g} without trunks)" if trunks else ""))
    lines.add_row(
        "time", f"{hours(3600 * found.hours(workers))} with {counted(workers, 'run')} at once, {counted(means.threads, 'thread')} each"
    )
    lines.add_row("disk", f"{found.peak / 1e9:.2f} GB at most if no run fails, {found.kept / 1e9:.2f} GB at the end")
    return lines


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def hours(seconds: float) -> str:
    """A time to read: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
