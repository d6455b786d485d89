"""Figures of a run: one JSON line a recorded step, mirrored to TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe.engines.base import StepResult
from moe.errors import ConfigError, DataError
from moe.model.moe_layer import Report
from moe.model.transformer import Transformer
from moe.recipe import Log
from moe.train.folder import writing

# Dense peak of one device in FLOP/s, by a part of its name (vendors' data sheets: bfloat16, and float32 without TF32).
PEAK_FLOPS = {
    "bfloat16": {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12},
    "float32": {"B200": 75e12, "H200": 67e12, "H100": 67e12, "A100": 19.5e12, "L40S": 91.6e12},
}


class Metrics:
    """Writer of metrics.jsonl and its mirrors; on ranks other than the first it writes nothing."""

    def __init__(self, folder: Path, log: Log, *, first: bool, from_step: int) -> None:
        self.mirrors: list[Any] = []
        self.path = folder / "metrics.jsonl"
        if not first:
            self.file = None
            return
        with writing(self.path):
            _forget_after(self.path, from_step)
            self.file = self.path.open("a")
        if log.tensorboard:
            self.mirrors.append(_TensorBoard(folder / "tensorboard"))
        if log.wandb_project:
            self.mirrors.append(_WandB(log.wandb_project, folder))

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        with writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        for mirror in self.mirrors:
            mirror.write(row)

    def close(self) -> None:
        for mirror in self.mirrors:
            mirror.close()
        if self.file is not None:
            self.file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl, leaving out a last line that a kill cut short."""
    if not path.exists():
        return
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}:{number} is no row of figures, {line[:30]!r}; remove that line") from None


def _forget_after(path: Path, step: int) -> None:
    """Drop rows of steps that are about to be run again."""
    rows = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


class Clock:
    """Tokens per second and model FLOP utilisation since the last reading."""

    def __init__(self, flops_per_token: float, dtype: str, world: int, device: torch.device) -> None:
        self.flops_per_token, self.world = flops_per_token, world
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.get(dtype, {}).items() if part in name), None)
        self.start, self.tokens = time.perf_counter(), 0

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9)
        self.start, self.tokens = now, 0
        figures = {"tokens_per_second": round(rate, 1)}
        if self.peak is not None:
            figures["mfu"] = round(rate * self.flops_per_token / (self.peak * self.world), 4)
        return figures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: evaluation and saving are not training speed."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


def row_of(
    result: StepResult,
    *,
    step: int,
    lr: float,
    model: Transformer,
    stages: Sequence[dict[str, Any]] = (),
    memory: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The training row of a step, with the routing health of each sparse layer, `stages`, where its time went, and `memory`."""
    row: dict[str, Any] = {
        "step": step,
        "loss": result.loss.item(),
        "auxiliary_loss": result.auxiliary.item(),
        "grad_norm": result.grad_norm.item(),
        "lr": lr,
        "applied": result.applied,
        "memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),  # the process; a GPU's stands in `memory`
    }
    row |= memory or {}
    routers = model.routers()
    if routers:
        layers: dict[str, dict[str, Any]] = {
            str(layer): health(report, getattr(router, "k", None))
            for (layer, router), report in zip(routers.items(), result.reports, strict=True)
        }
        for figures, found in zip(layers.values(), stages, strict=False):
            figures["stages"] = found
        row["layers"] = layers
    return row


def health(report: Report, k: int | None = None) -> dict[str, float]:
    """Routing health of one layer in one step: how evenly, how surely, how completely tokens were routed.

    `max_over_mean` 1 is balance; `cv` is the loads' coefficient of variation; `dead` counts experts without a token.
    """
    load = report.load.double()
    mean = load.mean().clamp(min=1e-9)
    tokens = max(int(report.stats["tokens"]), 1)
    figures = {
        "max_over_mean": (load.max() / mean).item(),
        "cv": (load.std(correction=0) / mean).item(),
        "dead": int((load == 0).sum()),
        "auxiliary_loss": float(report.loss),
    }
    demand = report.stats["demand"].sum().item() if "demand" in report.stats else tokens * k if k is not None else None
    if demand is not None:
        figures["drop_rate"] = 1 - load.sum().item() / max(demand, 1)
    for name in ("entropy", "confidence"):
        if name in report.stats:
            figures[name] = (report.stats[name] / tokens).item()
    return {name: round(value, 6) for name, value in figures.items()}


def _scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield f"{prefix}{key}", float(value)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("log.tensorboard=true needs the package tensorboard; install it with: pip install 'moe[track]'") from None
        self.writer = SummaryWriter(str(folder))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row):
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, project: str, folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(f"log.wandb_project={project} needs the package wandb; install it with: pip install 'moe[track]'") from None
        self.run = wandb.init(project=project, dir=str(folder), name=folder.name, id=folder.name, resume="allow")

    def write(self, row: dict[str, Any]) -> None:
        self.run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        self.run.finish()
