"""The contract of an engine: one optimizer step on the global batch, and a canonical view of what it learned."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe.model.moe_layer import Report


class StepResult(NamedTuple):
    """Figures of one step, equal on all ranks and independent of layout and accumulation."""

    loss: Tensor  # mean cross-entropy over the global batch, float64 scalar
    auxiliary: Tensor  # mean weighted auxiliary loss over the global batch
    grad_norm: Tensor  # true global norm before clipping
    applied: bool  # False: loss or gradient was not finite, and nothing learned from this step
    tokens: int  # routed (valid) tokens of the global batch
    reports: list[Report]  # one an MoE layer, totalled over ranks and the window; loss is the mean
