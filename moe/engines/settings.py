"""Settings of the step: engine, optimizer, learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe.config import Settings


class Optimizer(Settings):
    """AdamW, SGD, or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)  # of sgd and muon
    weight_decay: float = Field(0.1, ge=0)  # never of norms and biases
    decay_router: bool = True


class Schedule(Settings):
    """Learning rate over steps, as a share of optimizer.lr."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = Field(0, ge=0)  # steps
    decay: float = Field(0.2, gt=0, le=1)  # wsd: share of the run that the final decay takes
    final: float = Field(0.1, ge=0, le=1)  # share of lr at the end


class Engine(Settings):
    """How parameters are held, and what is recomputed or compiled."""

    name: Literal["ddp", "fsdp2"] = "ddp"
    recompute: Literal["none", "full"] = "none"  # activations; never a routing decision
    compile: bool = False
