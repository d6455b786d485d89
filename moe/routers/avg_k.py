"""Avg-K: experts are chosen by their own keys, without a parameter of the router's or a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import Router, Routing, Tokens, best
from moe.shapes import Float


class AvgK(Router):
    """Choose each token's k experts with the best average key, and add them unweighted (Liu et al., 2023).

    A hidden unit's key is its row of the up projection, of the gate where experts are gated; an expert's score is thus the
    mean pre-activation of its units. The choice has no gradient: keys learn in the experts that compute.

    Padding gets expert E and weight 0. A NaN score gives a NaN weight.
    """

    def __init__(self, d_model: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        self.k = k

    def summary(self, up: Float[Tensor, "E g f d"], down: Float[Tensor, "E d f"]) -> Float[Tensor, "E d"]:
        return up.detach()[:, 0].mean(1, dtype=torch.promote_types(up.dtype, torch.float32))

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens, summary: Float[Tensor, "E d"]) -> Routing:
        score = linear(x.detach(), summary)
        chosen, valid = best(score, self.k), tokens.valid[:, None]
        weight = torch.where(score.gather(1, chosen).isnan(), torch.nan, torch.ones_like(chosen, dtype=score.dtype))
        return Routing.per_token(torch.where(valid, chosen, self.num_experts), torch.where(valid, weight, 0))
