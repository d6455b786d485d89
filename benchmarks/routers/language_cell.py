"""One cell of the comparison on a language model: an ordinary run, watched, and what a step of it costs."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe.cli import split
from moe.config import load
from moe.data.corpus import open_corpus
from moe.data.loader import Validation
from moe.model.transformer import Output
from moe.parallel.balance import add_reports
from moe.recipe import Recipe
from moe.train.console import Console
from moe.train.loop import build_engine, build_loader, build_model, join, restore, train
from moe.train.metrics import health, read
from moe.train.sample import open_model


class Cell(NamedTuple):
    """A run to make: which row at which setting, and the words of its `moe train`."""

    row: str
    setting: str
    lr: float
    seed: int
    stage: str
    steps: int
    words: list[str]
    fingerprint: str
    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """What names the cell in a line of results."""
        return {name: value for name, value in self._asdict().items() if name not in ("words", "folder")} | {
            "words": [word for word in self.words if not word.startswith(("run.folder=", "data.sources="))]
        }


class Watch:
    """Sums up what the routers did, step by step, from what every forward pass of a model reports."""

    def __init__(self, steps: int) -> None:
        self.steps, self.fan_out, self.late, self.held = steps, [], [], None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Output) or not output.reports:
            return
        if not module.training:
            self.held = add_reports(self.held, output.reports)
            return
        self.held = None
        self.fan_out.append(statistics.mean(_fan_out(report) for report in output.reports))
        if len(self.fan_out) > 0.9 * self.steps:
            self.late += self._health(module, add_reports(None, output.reports))
        self.model = module

    def figures(self) -> dict[str, float]:
        """Experts a token over all steps and over the last tenth; balance in that tenth, and over the last held-out text."""
        if self.held is None:
            return {}
        held = self._health(self.model, self.held)
        return {
            "experts": statistics.mean(self.fan_out),
            "experts_late": statistics.mean(self.fan_out[-max(1, self.steps // 10) :]),
            "experts_held_out": statistics.mean(_fan_out(report) for report in self.held),
            "cv": statistics.mean(layer["cv"] for layer in self.late),
            "drop_rate": statistics.mean(layer.get("drop_rate", 0.0) for layer in self.late),
            "cv_held_out": statistics.mean(layer["cv"] for layer in held),
            "dead_held_out": sum(layer["dead"] for layer in held),
        }

    def _health(self, model: Any, reports: list[Any]) -> list[dict[str, float]]:
        routers = model.routers().values()
        return [health(report, getattr(router, "k", None)) for router, report in zip(routers, reports, strict=True)]


def _fan_out(report: Any) -> float:
    return report.load.sum().item() / max(int(report.stats["tokens"]), 1)


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train a cell from its beginning, and give its line of results; an error is a line too, so that others go on."""
    torch.set_num_threads(1)
    shutil.rmtree(cell.folder, ignore_errors=True)  # what a stop left half done
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    watch, start = Watch(cell.steps), time.process_time()
    hook = nn.modules.module.register_module_forward_hook(watch)
    try:
        with cell.folder.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
            train(recipe(cell))
    except Exception as error:  # a diverged run says so in the table
        return cell.facts | {"error": f"{type(error).__name__}: {error}"}
    finally:
        hook.remove()
    seconds = time.process_time() - start
    rows = list(read(cell.folder / "metrics.jsonl"))
    last = next(row for row in reversed(rows) if "validation_loss" in row)
    commit = json.loads((cell.folder / "environment.json").read_text())["commit"] or "unknown"
    price = json.loads((cell.folder / "model.json").read_text())
    figures = {"bits": last["bits_per_byte"], "churn": last.get("churn"), "parameters": price["parameters"], "active": price["active"]}
    if cell.stage == "final":
        figures["bits_alone"] = bits_alone(cell.folder)
    return cell.facts | {"commit": commit, "seconds": round(seconds, 1)} | figures | watch.figures()


def recipe(cell: Cell) -> Recipe:
    """The recipe that a cell's words describe."""
    return load(*split(cell.words))


@torch.no_grad()
def bits_alone(folder: Path) -> float:
    """Bits per byte when each token is routed as if it were a sequence of its own, as it is in generating one at a time.

    Equal to the ordinary figure for a router that looks at each token alone; for others the ordinary figure used later tokens.
    """
    settings = load([folder / "recipe.yaml"], [])
    model, _ = open_model(folder)
    corpus = open_corpus(folder / "tokens")
    batches = Validation(corpus, sequence=settings.data.sequence, sequences=settings.evaluate.sequences, batch=settings.train.batch)
    for router in model.routers().values():
        router.register_forward_pre_hook(alone)
    nats = sum(float(model(*batch, step=settings.train.steps).loss) for batch in batches)
    return nats / math.log(2) / batches.bytes


def alone(router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, tokens, *more = inputs
    return x, tokens._replace(sequence=torch.arange(len(x)), length=1), *more


def step_times(folders: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of a training step as the run left it, router state and fan-out included, all runs in turn, `rounds` times."""
    torch.set_num_threads(1)
    ready = {row: _resume(folder) for row, folder in folders.items()}
    times: dict[str, list[float]] = {row: [] for row in ready}
    for number in range(rounds + 1):
        for row, (engine, batch, step) in ready.items():
            start = time.process_time()
            engine.step(batch, step, 0.0)
            if number:  # the first round warms caches and the allocator
                times[row].append(time.process_time() - start)
    return times


def _resume(folder: Path) -> tuple[Any, Any, int]:
    from moe.checkpoint.store import Store

    settings = load([folder / "recipe.yaml"], [])
    mesh, corpus = join(settings), open_corpus(folder / "tokens")
    engine = build_engine(settings, build_model(settings, corpus.tokenizer), mesh)
    loader = build_loader(settings, corpus, mesh)
    progress = restore(Store(folder / "checkpoints", mesh), engine, loader, Console(first=False), settings.train.steps + 1)
    return engine, loader.take(), progress.step - 1
