"""Sinkhorn (S-BASE): token choice by an entropic transport plan that gives every expert its share of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import Router, Routing, Tokens, best
from moe.routers.groups import groups
from moe.routers.losses import statistics
from moe.shapes import Bool, Float, Int


class Sinkhorn(Router):
    """Keep each token's k largest entries of the balanced plan exp(z + f + g) over its sequence (Clark et al., 2022).

    iterations: times that rows, then columns, are scaled to their sums; the plan has no gradient. Columns are exact after
        each, rows as good as the iterations are many (20 for logits of ordinary size).

    The weight is sigmoid(z) for k=1 and softmax(z) over all experts for k>1, of the raw logits: gradients flow through it
    alone. In training a token's experts depend on tokens after it; in evaluation each token takes the k largest of its own
    logits, so that nothing leaks, and loads are no longer balanced. Padding has no part; a NaN token shows in its weights.
    """

    def __init__(self, d_model: int, num_experts: int, *, k: int = 1, iterations: int = 20) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        if iterations < 1:
            raise ConfigError(f"{iterations} iterations balance nothing; choose router.iterations=20")
        self.k, self.iterations = k, iterations
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits = linear(x, self.weight)
        chosen = self._select(logits.detach(), tokens)
        weight = (logits.sigmoid() if self.k == 1 else logits.softmax(-1)).gather(1, chosen)
        valid = tokens.valid[:, None]
        expert = torch.where(valid, chosen, self.num_experts)
        return Routing.per_token(expert, torch.where(valid, weight, 0), stats=statistics(logits, tokens.valid))

    def _select(self, logits: Tensor, tokens: Tokens) -> Int[Tensor, "t k"]:
        if not self.training:
            return best(logits, self.k)
        at = groups(tokens)
        z = at.gather(logits)
        _, g = potentials(z, at.valid & z.isfinite().all(-1), self.iterations)
        # f is one number a token and changes no ranking within it
        return best(at.scatter(z + g[:, None]), self.k)


def potentials(z: Float[Tensor, "g s E"], valid: Bool[Tensor, "g s"], iterations: int) -> tuple[Float[Tensor, "g s"], Float[Tensor, "g E"]]:
    """f and g such that exp(z + f + g) sums to 1 over experts and to T/E over the T valid tokens of a group."""
    experts = z.shape[-1]
    z = torch.where(valid[..., None], z, 0)  # rows that are left out stay finite, so that nothing has to be caught below
    share = (valid.sum(1, keepdim=True).clamp(min=1).to(z.dtype) / experts).log()
    outside = torch.where(valid, 0, -torch.inf).to(z.dtype)
    outside = torch.where(valid.any(1, keepdim=True), outside, 0)
    g = z.new_zeros(z.shape[0], experts)
    f = z.new_zeros(z.shape[:2])
    for _ in range(iterations):
        f = -(z + g[:, None]).logsumexp(2)
        g = share - (z + (f + outside)[..., None]).logsumexp(1)
    return f, g
