"""Sigma-MoE: sigmoid gates without competition, balanced by the entropy of their mean softmax and by expert dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses, noise
from moe.routers.base import DRAWS_NOISE, Router, Routing, Tokens, best
from moe.routers.draw import Law
from moe.shapes import Float


class Sigma(Router):
    """Weigh each token's k best experts by the sigmoid of their logits, unnormalised (Csordás et al., 2023).

    entropy_loss: coefficient of sum_e p_e log p_e with p the mean softmax of the logits over the global batch; it is least,
        -log E, at balance.
    expert_dropout: chance that a token may not choose an expert in training; weights are not rescaled for it. A token
        left with fewer than k experts drops the rest of its assignments.
    init: "paper" starts the layer as slices of one wide dense network, variance 2 / (fan-in * layers) with the width of all
        experts together as the down projections' fan-in, and the router's rows at equal length, so that only their angles
        decide; "model" follows the model's init_std.

    The paper's experts are ungated, with relu. Padding gets expert E, weight 0 and no part in the loss, which is zero outside
    of training. A NaN logit gives a NaN weight.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        entropy_loss: float = 1e-3,
        expert_dropout: float = 0.2,
        init: Literal["paper", "model"] = "paper",
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k, self.entropy_loss, self.expert_dropout, self.init = k, entropy_loss, expert_dropout, init
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        if entropy_loss < 0:
            raise ConfigError(f"entropy_loss={entropy_loss} would work against balance; choose router.entropy_loss of at least 0")
        if not 0 <= expert_dropout < 1:
            raise ConfigError(f"expert_dropout={expert_dropout} is not a chance below 1; choose router.expert_dropout=0.05, or 0 for none")
        self.eager = DRAWS_NOISE if expert_dropout else None
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights."""
        nn.init.normal_(self.weight, std=std)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        fan_in = {"router.weight": self.d_model, "experts.up": self.d_model, "experts.down": self.num_experts * shape[-1]}.get(name)
        if fan_in is None or self.init == "model":
            return None
        return Law("normal", math.sqrt(2 / (fan_in * layers)), equal_rows=name == "router.weight")

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits, valid = linear(x, self.weight), tokens.valid[:, None]
        ranking, allowed = logits.detach(), valid
        if self.training and self.expert_dropout:
            allowed = valid & (noise.uniform(self.stream, tokens.step, tokens.index, self.num_experts) >= self.expert_dropout)
            ranking = torch.where(allowed, ranking, -torch.inf)
        chosen = best(ranking, self.k)
        kept = allowed.expand_as(logits).gather(1, chosen)
        expert = torch.where(kept, chosen, self.num_experts)
        # torch.sigmoid rounds the last elements of a tensor differently, and so would depend on the split into calls
        weight = torch.where(kept, F.logsigmoid(logits.gather(1, chosen)).exp(), 0)

        probability = torch.where(valid, logits.softmax(-1), 0)
        with torch.no_grad():
            stats = {
                "probability": probability.sum(0),
                "entropy": losses.entropy(probability).sum(),
                "confidence": probability.amax(-1).sum(),
            }
        if not (self.training and self.entropy_loss):
            return Routing.per_token(expert, weight, stats=stats)
        loss = self.entropy_loss * (probability.sum(0) * self._log_mean(stats["probability"], valid.sum())).sum()
        return Routing.per_token(expert, weight, loss, stats)

    def _log_mean(self, mass: Float[Tensor, " E"], count: Tensor) -> Float[Tensor, " E"]:
        """log p of the global batch, from a call's probabilities summed over its valid tokens.

        A constant to autograd: the other part of the gradient of p log p is 1 for each expert, and a softmax does not feel
        what is added to all of its outputs. So the loss is linear in a call's probabilities, and the calls of a window
        whose mean is known add up to the loss and gradient of the whole. Before that a call sees the window so far.
        """
        window, dtype = self.window_stats, mass.dtype
        sums = torch.cat([mass.double(), count[None].double()])
        if window is None or not self.window_complete:
            sums = self.total(sums)
        if window is not None:
            seen = torch.cat([window["probability"].double(), window["tokens"][None].double()])
            sums = seen if self.window_complete else sums + seen
        mean = sums[:-1] / sums[-1].clamp(min=1)
        return mean.clamp(min=torch.finfo(dtype).tiny).log().to(dtype)
