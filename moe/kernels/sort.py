"""Sorting assignments by expert: equal experts keep their order, so results do not depend on the backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.shapes import Float, Int


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


def permuted(values: Float[Tensor, "n *c"], order: Int[Tensor, " m"], position: Int[Tensor, " n"]) -> Float[Tensor, "m *c"]:
    """values[order], `order` being the first m places of a `Sorted`; its gradient is a gather by `position`, zero for the rest.

    The gradient of values[order] itself would add up as if places could repeat: a radix sort on a GPU.
    """
    return _Permuted.apply(values, order, position)


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.all = len(order) == len(values)
        return values[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (position,) = grads, ctx.saved_tensors
        if not ctx.all:  # places past the end read a zero
            position = position.clamp(max=len(grad))
            grad = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        return grad[position], None, None
