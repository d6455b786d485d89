"""Muon for stacks of matrices: each expert's matrix is orthogonalised on its own, all of them in batched products."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe.shapes import Float

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al., 2024


def orthogonalise(x: Float[Tensor, "n r c"], iterations: int = 5, eps: float = 1e-7) -> Float[Tensor, "n r c"]:
    """The nearest orthogonal matrix of each of n, roughly: singular values come out between 0.7 and 1.2.

    A Newton-Schulz iteration in bfloat16, as in torch.optim.Muon (Jordan et al., 2024).
    """
    a, b, c = _QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


class StackedMuon(torch.optim.Optimizer):
    """torch.optim.Muon on every matrix of stacks [… r c], each step scaled to the size of AdamW's (Liu et al., 2025).

    Matrices must be whole on this rank: orthogonalising a piece of one is another update.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, **group)

    def _move(self, p: Tensor, grad: Tensor, *, lr: float, momentum: float, weight_decay: float, **_: Any) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = grad.lerp(average, momentum).flatten(0, -3)  # Nesterov: one step further along the average
        p.mul_(1 - lr * weight_decay)
        p.add_(orthogonalise(direction).reshape(p.shape), alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))
