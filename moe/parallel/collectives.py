"""Sums over ranks: one with a gradient for losses of the global batch, one in place for figures and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def sum_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `x` over ranks in place, without a gradient; alone it costs nothing."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x


def total_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `x` over ranks, on every rank, with its gradient.

    The objective is the sum of the ranks' losses, so the gradient is the sum over ranks of theirs. All ranks must call it
    in the same order, and none may leave the result out of its loss if another does not.
    """
    if dist.get_world_size(group) == 1:
        return x
    return _Total.apply(x, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return sum_ranks(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_ranks(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None
