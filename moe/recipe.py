"""The form that describes a run: every section, with its defaults, in one object."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe.config import Choice, Settings
from moe.data.sources import SOURCES
from moe.engines.settings import Engine, Optimizer, Schedule
from moe.model.settings import Model
from moe.parallel.layout import Layout


class Run(Settings):
    """Where the run lives."""

    folder: str = "runs/default"


class Data(Settings):
    """What is read, and how it is cut."""

    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    sources: list[Choice(SOURCES)] = Field([{"name": "stdlib"}], min_length=1)  # each with an optional weight
    sequence: int = Field(256, gt=0)  # positions in a training sequence
    document_mask: bool = False  # attention and positions start anew at document boundaries
    validation: float = Field(0.05, gt=0, lt=1)  # share of documents held out, by the hash of their text


class Train(Settings):
    """How long, how much at once, and in which arithmetic."""

    steps: int = Field(1000, gt=0)
    batch: int = Field(16, gt=0)  # sequences per step over all ranks
    accumulate: int = Field(1, gt=0)  # micro-batches that a rank's share of the batch is cut into
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: float32 masters beneath
    clip: float | None = Field(1.0, gt=0)  # global gradient norm; null for no clipping
    balance_window: Literal["running", "exact"] = "running"  # what a global balance loss sees of an accumulation window
    skip_limit: int = Field(10, gt=0)  # non-finite steps in a row before the run stops
    restarts: int = Field(0, ge=0)  # times torchrun starts all ranks again after one died


class Checkpoint(Settings):
    """When to save, and what to keep."""

    every: int = Field(500, gt=0)  # steps
    keep: int = Field(3, ge=2)  # newest ones
    durable_every: int | None = Field(None, gt=0)  # steps; these are never removed
    mode: Literal["blocking", "background"] = "background"


class Evaluate(Settings):
    """Held-out loss and samples."""

    every: int = Field(250, gt=0)  # steps; always at the end as well
    sequences: int = Field(64, gt=0)
    prompt: str = "def "
    sample_tokens: int = Field(200, ge=0)


class Log(Settings):
    """Where figures go beside metrics.jsonl."""

    every: int = Field(10, gt=0)  # steps
    tensorboard: bool = False
    wandb_project: str | None = None


class Recipe(Settings):
    """Everything that determines a run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    parallel: Layout = Layout()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
