"""ReMoE: gates are ReLUs, and a controller finds the penalty that makes them as sparse as asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses
from moe.routers.base import COUNTS_ROWS, Router, Routing, Tokens
from moe.shapes import Float, Int


class ReMoE(Router):
    """Every expert whose logit is positive counts with it: sparse, and differentiable everywhere (Wang et al., 2024).

    The number of experts a token varies; it is k on average once the penalty has been found. Until then more of them
    work: about half at the start.
    k: experts a token to aim at, on average over the tokens of a step.
    penalty: first coefficient of the penalty on the gates, an L1 norm in which expert i counts E / (k tokens) times the number
        of its tokens, so that it balances too. 0 for none: then nothing moves.
    penalty_rate: the coefficient is multiplied by it after a step with more than k experts a token, and divided otherwise.

    Each layer has its own coefficient; the original shares one, from the sparsity of all layers. The penalty is counted over
    the global batch and is zero outside of training. Rows are as many as there are positive gates, and the host waits for
    their number once a call.
    """

    eager = COUNTS_ROWS

    penalty: Tensor
    fan_out_varies = True

    def __init__(self, d_model: int, num_experts: int, *, k: int = 2, penalty: float = 1e-8, penalty_rate: float = 1.2) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot aim at k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        if not 0 <= penalty < torch.inf:
            raise ConfigError(
                f"penalty={penalty} would reward dense gates or end the run; choose router.penalty of at least 0, such as 1e-8"
            )
        if not 1 < penalty_rate < torch.inf:
            raise ConfigError(f"penalty_rate={penalty_rate} would not raise the penalty; choose router.penalty_rate above 1, such as 1.2")
        self.k, self.first_penalty, self.penalty_rate = k, penalty, penalty_rate
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("penalty", torch.empty((), dtype=torch.float32))
        self.reset_parameters()
        self.reset_buffers()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights: half of the gates are open."""
        nn.init.normal_(self.weight, std=std)

    def reset_buffers(self) -> None:
        self.penalty.fill_(self.first_penalty)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        gate = torch.where(tokens.valid[:, None], linear(x, self.weight).relu(), 0)
        with torch.no_grad():
            share = gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
            stats = {
                "gate": gate.sum(0),
                "demand": (gate != 0).sum(0),  # nothing is dropped, whatever k aims at
                "entropy": losses.entropy(share).sum(),
                "confidence": share.amax(-1).sum(),
            }
        routing = Routing.dense(gate, stats=stats)
        if not self.training:
            return routing
        load, count = self.batch_counts(routing.load(self.num_experts), tokens.valid.sum())
        return routing._replace(loss=self.penalty * losses.usage(load, count, gate.sum(0)) / self.k)

    def update(self, load: Int[Tensor, " E"], tokens: int) -> None:
        """Move the penalty by one factor: up if the step had more than k experts a token, else down."""
        if not tokens or not self.first_penalty:
            return
        larger, smaller = self.penalty * self.penalty_rate, self.penalty / self.penalty_rate
        found = torch.where(load.sum() > self.k * tokens, larger, smaller)
        # 0 and infinity would stay for ever
        limits = torch.finfo(torch.float32)
        self.penalty.copy_(found.clamp(limits.tiny, limits.max))

    def _apply(self, fn, recurse=True):
        """The penalty moves with the module but stays float32: it is a product of many factors."""
        penalty = self.penalty
        super()._apply(fn, recurse)
        if self.penalty.dtype != penalty.dtype:
            self.penalty = penalty.to(self.penalty.device)
        return self
