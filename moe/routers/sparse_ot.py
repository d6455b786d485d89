"""Sparsity-constrained optimal transport: a balanced plan of which every column has at most k entries."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import Router, Routing, Tokens, best, running_sum
from moe.routers.expert_choice import LEAK
from moe.routers.groups import Groups, capacity, expert_rows, groups, most_taken, unrouted
from moe.routers.losses import statistics
from moe.shapes import Float, Int


class SparseOT(Router):
    """Route where a sparse transport plan between the tokens and the experts of a sequence has entries (Liu et al., 2023).

    The cost is -softmax(z). The plan minimises cost + gamma/2 ||plan||^2 with at most so many entries in a column; columns
    have their sums exactly, rows nearly: as far as `iterations` of Adam with `learning_rate` on the semi-dual get, and
    sparsity allows. It has no gradient.

    side: what the columns are. "tokens": each of weight 1 on at most k experts. "experts": each of weight T / E on at most
        ceil(k * T / E) tokens, so that a token has k experts on average; those that have none have the residual
        stream alone, and the statistic "unrouted" counts them.
    leak: in training, a token's experts depend on tokens after it. In evaluation side=tokens takes the k largest of each token's own
        probabilities, so that nothing leaks, but side=experts has no such form and is refused unless this is "allow".

    The weight is the softmax probability, not normalised again. Padding has no part; a NaN token shows in its weights.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        side: Literal["tokens", "experts"] = "tokens",
        k: int = 2,
        gamma: float = 1.0,
        iterations: int = 20,
        learning_rate: float = 0.01,
        leak: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= k <= num_experts:
            raise ConfigError(f"a router cannot choose k={k} of {num_experts} experts; choose router.k from 1 to {num_experts}")
        for option, value, default in (("gamma", gamma, 1.0), ("learning_rate", learning_rate, 0.01)):
            if not value > 0:
                raise ConfigError(f"{option}={value} is not above zero; choose router.{option}={default}")
        if iterations < 1:
            raise ConfigError(f"{iterations} iterations balance nothing; choose router.iterations=20")
        if side == "experts" and leak != "allow":
            raise ConfigError(LEAK.format(name="sparse_ot with side=experts"))
        self.side, self.k, self.gamma, self.iterations, self.learning_rate = side, k, gamma, iterations, learning_rate
        self.fan_out_varies = side == "experts"
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits = linear(x, self.weight)
        probability = logits.softmax(-1)
        stats = statistics(logits, tokens.valid)
        if self.side == "experts":
            routing = self._experts_choose(probability, groups(tokens))
            return routing._replace(stats=stats | {"unrouted": unrouted(routing, tokens, self.num_experts)})
        if self.training:
            chosen, kept = self._tokens_choose(probability.detach(), groups(tokens))
        else:
            chosen = best(logits.detach(), self.k)
            kept = torch.ones_like(chosen, dtype=torch.bool)
        kept = kept & tokens.valid[:, None]
        weight = torch.where(kept, probability.gather(1, chosen), 0)
        return Routing.per_token(torch.where(kept, chosen, self.num_experts), weight, stats=stats)

    def _tokens_choose(self, probability: Tensor, at: Groups) -> tuple[Int[Tensor, "t k"], Tensor]:
        cost = -at.gather(probability)
        sound = at.valid & cost.isfinite().all(-1)
        columns = torch.where(sound[..., None], cost, 0)
        row_sums = sound.sum(1, keepdim=True).to(cost.dtype).expand(-1, self.num_experts) / self.num_experts
        alpha = self._solve(columns, row_sums, sound.to(cost.dtype), torch.full_like(at.index, self.k), self.k)
        # the last projection reads what was left out too, so that a NaN comes out of it and not an expert
        chosen, plan = project((alpha[:, None] - cost) / self.gamma, torch.full_like(at.index, self.k), self.k)
        return at.scatter(chosen), at.scatter(~(plan <= 0))

    def _experts_choose(self, probability: Tensor, at: Groups) -> Routing:
        cost = -at.gather(probability.detach())
        sound = at.valid & cost.isfinite().all(-1)
        columns = cost.masked_fill(~sound[..., None], torch.inf).transpose(1, 2)
        count = sound.sum(1, keepdim=True).to(cost.dtype)
        share = (count / self.num_experts).expand(-1, self.num_experts)
        room = capacity(at.valid.sum(1), self.num_experts, self.k)[:, None].expand(-1, self.num_experts)
        most = most_taken(at.index.shape[1], self.num_experts, self.k)
        alpha = self._solve(columns, sound.to(cost.dtype), share, room, most)
        columns = cost.masked_fill(~at.valid[..., None], torch.inf).transpose(1, 2)
        scale = self.gamma * torch.where(count > 0, share, 1)[..., None]
        place, plan = project((alpha[:, None] - columns) / scale, room, most)
        # an empty place is infinitely dear, and is never taken
        return expert_rows(place, ~(plan <= 0) & at.valid[:, None].expand_as(columns).gather(2, place), at, probability)

    def _solve(self, cost: Tensor, row_sums: Tensor, column_sums: Tensor, entries: Tensor, most: int) -> Float[Tensor, "g m"]:
        """Minimise the semi-dual of `semi_dual_gradient` over alpha by a fixed number of Adam steps from zero."""
        alpha = torch.zeros_like(row_sums)
        mean, square = torch.zeros_like(alpha), torch.zeros_like(alpha)
        for step in range(1, self.iterations + 1):
            gradient = semi_dual_gradient(alpha, cost, row_sums, column_sums, entries, most, self.gamma)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            change = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            alpha = alpha - self.learning_rate * change
        return alpha


def semi_dual_gradient(
    alpha: Float[Tensor, "g m"],
    cost: Float[Tensor, "g n m"],
    row_sums: Float[Tensor, "g m"],
    column_sums: Float[Tensor, "g n"],
    entries: Int[Tensor, "g n"],
    most: int,
    gamma: float,
) -> Float[Tensor, "g m"]:
    """Sums of the plan's rows at alpha less what they should be; `cost` lists the plan's columns, `entries` how many each may have."""
    scale = gamma * torch.where(column_sums > 0, column_sums, 1)
    index, plan = project((alpha[:, None] - cost) / scale[..., None], entries, most)
    plan = plan * column_sums[..., None]
    return torch.zeros_like(alpha).scatter_add(1, index.flatten(1), plan.flatten(1)) - row_sums


def project(x: Float[Tensor, "g n m"], entries: Int[Tensor, "g n"], most: int) -> tuple[Int[Tensor, "g n c"], Float[Tensor, "g n c"]]:
    """The point of the simplex nearest to x among those with at most `entries` (of no more than `most`) positive coordinates.

    Its largest coordinates come first: where they are, and what they are. The lowest index wins among equals.
    """
    # a few passes of arg max cost less than a sort
    index = best(x, most) if most <= 8 else torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :most]
    u = x.gather(-1, index)
    number = torch.arange(1, u.shape[-1] + 1, device=x.device)
    inside = number <= entries[..., None]
    threshold = (running_sum(torch.where(inside, u, 0)) - 1) / number
    support = (inside & ~(u <= threshold)).sum(-1, keepdim=True)
    tau = threshold.gather(-1, (support - 1).clamp(min=0))
    return index, torch.where(inside, (u - tau).clamp(min=0), 0)
