"""Sorting assignments by expert: equal experts keep their order, so results do not depend on the backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe.shapes import Int


class Sorted(NamedTuple):
    """A stable order by expert, and how many assignments each has; the number of experts, for a dropped one, sorts last."""

    order: Int[Tensor, " n"]  # place i holds assignment order[i]
    position: Int[Tensor, " n"]  # assignment i lies at place position[i]
    counts: Int[Tensor, " E"]


def sort(expert: Int[Tensor, " n"], num_experts: int) -> Sorted:
    """By torch's stable sort; nothing waits for the device (bincount would)."""
    order = torch.sort(expert, stable=True).indices
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    return Sorted(order, position, counts.scatter_add_(0, expert, torch.ones_like(expert))[:num_experts])
