"""Top-k token choice: Switch, GShard, Mixtral, OLMoE, Qwen3-MoE and DeepSeek-V2/V3 are settings of this one router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.kernels.auto import fused_top_k
from moe.kernels.product import linear
from moe.routers import losses, noise
from moe.routers.base import DRAWS_NOISE, Router, Routing, Tokens, best, full_precision
from moe.routers.capacity import Capacity
from moe.shapes import Bool, Float, Int


class Decision(NamedTuple):
    """What TopK makes of a call's logits."""

    expert: Int[Tensor, "t k"]  # best first; E on padding, and where a choice is not used
    weight: Float[Tensor, "t k"]  # 0 there
    mass: Float[Tensor, " E"]  # probabilities summed over valid tokens
    probability: Float[Tensor, "t E"] | None  # 0 on padding; None where only their sum was computed
    z: Float[Tensor, ""]
    stats: dict[str, Tensor]


class TopK(Router):
    """Keep each token's k best experts (Shazeer et al., 2017).

    score: how logits become scores. Scores before the selection are `normalize="none"`; scores among the selected,
        after it, are `normalize="selected"`: for softmax the two readings, renormalise or take the softmax of
        the selected logits, are the same numbers.
    scale: factor on the weights (DeepSeek-V3: 2.5).
    groups, groups_kept, group_score: choose only within a token's best groups of neighbouring experts, ranked by
        their best score (DeepSeek-V2) or the sum of their two best (DeepSeek-V3).
    second: "random" uses, in training, the second of two choices with probability min(1, 2 g), where g is its share of the
        two weights; the first keeps its own (GShard: Lepikhin et al., 2020).
    jitter: in training, multiply the input by U(1 - jitter, 1 + jitter) (Switch).
    balance_loss: coefficient of the Switch loss, whose loads are counted over the call ("micro"), over each sequence,
        or over the global batch; 0 for none. It is 1 at balance, whatever k.
    balance_counts: whether those loads are of all of a token's choices, or of the first alone (GShard).
    z_loss: coefficient of the router z-loss; 0 for none.
    bias_rate: loss-free balancing (Wang et al., 2024): a bias per expert, used for the selection alone, moves by this much a
        step. 0 keeps the bias as it is; None has none. It combines with the losses (DeepSeek-V3: "sequence", 1e-4).
    capacity_factor, drop, capacity_group, capacity_multiple: see `Capacity`; None drops nothing. Losses and bias count
        what was asked for, dropped or not.

    Padding gets expert E, weight 0, and no part in loss, statistics or load. The losses are zero outside of training.
    A NaN logit gives a NaN weight, so that the step's loss shows it to every rank; nothing raises or waits for the device here.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: Literal["none", "selected"] = "selected",
        scale: float = 1.0,
        groups: int = 1,
        groups_kept: int = 1,
        group_score: Literal["best", "best_two"] = "best_two",
        second: Literal["always", "random"] = "always",
        jitter: float = 0.0,
        balance_loss: float = 0.01,
        balance_scope: Literal["micro", "sequence", "global"] = "global",
        balance_counts: Literal["all", "first"] = "all",
        z_loss: float = 0.0,
        bias_rate: float | None = None,
        capacity_factor: float | None = None,
        drop: Literal["order", "priority", "weight"] = "order",
        capacity_group: int | Literal["sequence"] = "sequence",
        capacity_multiple: int = 1,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k, self.score, self.normalize, self.scale = k, score, normalize, scale
        self.groups, self.groups_kept, self.group_score = groups, groups_kept, group_score
        self.second, self.jitter, self.z_loss, self.bias_rate = second, jitter, z_loss, bias_rate
        self.balance_loss, self.balance_scope, self.balance_counts = balance_loss, balance_scope, balance_counts
        self.capacity = Capacity.of(num_experts, capacity_factor, drop, capacity_group, capacity_multiple)
        self._check()
        self.eager = DRAWS_NOISE if jitter or second == "random" else None
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("bias", None if bias_rate is None else torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights, no bias."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        if self.jitter and self.training:
            draw = noise.uniform(self.stream, tokens.step, tokens.index, self.d_model)
            x = full_precision(x) * (1 + self.jitter * (2 * draw - 1))
        logits = linear(x, self.weight)
        fused = fused_top_k(logits, self.k) if self._fusable() else None
        decision = self._decide(logits, tokens) if fused is None else self._decide_at_once(fused, logits, tokens)
        expert, weight, stats = decision.expert, decision.weight, decision.stats
        routing = Routing.per_token(expert, weight, stats=stats)
        counted = routing if self.balance_counts == "all" else Routing.per_token(expert[:, :1], weight[:, :1])
        if self.second == "random":
            stats["demand"] = routing.load(self.num_experts)  # what is not used was not asked for
        if self.capacity is not None or counted is not routing:
            stats["balance_load"] = counted.load(self.num_experts)
        if self.training:
            loss = self._balance(counted, decision, tokens)
            routing = routing._replace(loss=loss + self.z_loss * decision.z if self.z_loss else loss)
        return routing if self.capacity is None else self.capacity(routing, tokens)

    def update(self, load: Int[Tensor, " E"], tokens: int) -> None:
        """Raise the bias of experts below the mean load, lower it above (Wang et al., 2024).

        The bias is kept around zero: the selection does not see a constant, but float32 would, once it has grown.
        """
        if self.bias is None or not self.bias_rate:
            return
        self.bias += self.bias_rate * torch.sign(load.sum() - load * self.num_experts)
        self.bias -= self.bias.mean()

    def _fusable(self) -> bool:
        """Whether these options are among those that the fused kernel knows."""
        plain = self.score == "softmax" and self.groups == 1 and self.second == "always" and self.scale > 0
        by_token = self.training and self.balance_loss and self.balance_scope == "sequence"
        return plain and not by_token

    def _decide_at_once(self, fused: Callable[..., Any], logits: Float[Tensor, "t E"], tokens: Tokens) -> Decision:
        """`_decide` in two launches."""
        expert, weight, mass, z, entropy, confidence = fused(
            logits, tokens.valid, self.bias, self.k, self.normalize == "selected", self.scale
        )
        stats = {"probability": mass.detach(), "entropy": entropy, "confidence": confidence, "z": z.detach()}
        return Decision(expert, weight, mass, None, z, stats)

    def _decide(self, logits: Float[Tensor, "t E"], tokens: Tokens) -> Decision:
        log_score = logits.log_softmax(-1) if self.score == "softmax" else F.logsigmoid(logits)
        chosen = self._select(logits.detach(), log_score.detach())
        log_chosen = log_score.gather(1, chosen)
        # in logarithms, so that the sum of scores that all underflow is not divided by
        weight = self.scale * (log_chosen.softmax(-1) if self.normalize == "selected" else log_chosen.exp())

        valid = tokens.valid
        probability = log_score.exp() if self.score == "softmax" else log_score.softmax(-1)
        probability = torch.where(valid[:, None], probability, 0)
        mass, z = probability.sum(0), torch.where(valid, losses.z(logits), 0).sum()
        with torch.no_grad():
            stats = {
                "probability": mass.detach(),
                "entropy": losses.entropy(probability).sum(),
                "confidence": probability.amax(-1).sum(),
                "z": z.detach(),
            }
        used = self._used(log_chosen.detach(), tokens)
        return Decision(torch.where(used, chosen, self.num_experts), torch.where(used, weight, 0), mass, probability, z, stats)

    def _select(self, logits: Tensor, log_score: Tensor) -> Int[Tensor, "t k"]:
        if self.bias is None and self.groups == 1:
            return best(logits, self.k)  # scores rank the same, but saturate
        score = log_score.exp() if self.bias is None else log_score.exp() + self.bias
        ranking = logits if self.bias is None else score
        if self.groups > 1:
            by_group = score.unflatten(-1, (self.groups, -1))
            top = 1 if self.group_score == "best" else min(2, by_group.shape[-1])
            kept = best(by_group.topk(top).values.sum(-1), self.groups_kept)
            outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, kept, False)
            ranking = ranking.masked_fill(outside.repeat_interleave(by_group.shape[-1], 1), -torch.inf)
        return best(ranking, self.k)

    def _used(self, log_chosen: Tensor, tokens: Tokens) -> Bool[Tensor, "t k"]:
        """Which of a token's choices count."""
        if self.second == "always" or not self.training:
            return tokens.valid[:, None].expand(-1, self.k)
        draw = noise.uniform(self.stream + 1, tokens.step, tokens.index, 1)  # the next stream: this one is the jitter's
        unused = draw >= 2 * log_chosen.softmax(-1)[:, 1:]
        return tokens.valid[:, None] & ~torch.cat([torch.zeros_like(unused), unused], 1)

    def _balance(self, counted: Routing, decision: Decision, tokens: Tokens) -> Tensor:
        """The balance loss summed over the call's valid tokens.

        It is linear in the call's probabilities once the loads are known, so that the sum over calls and ranks is
        exactly the loss of the global batch when the window is complete. While it is not, a call sees the
        loads of the window so far, its own included, over all ranks.
        """
        if not self.balance_loss:
            return decision.mass.new_zeros(())
        if self.balance_scope == "sequence":
            assert decision.probability is not None
            expert = counted.expert.view(-1, self.k if self.balance_counts == "all" else 1)
            load = losses.sequence_loads(expert, tokens.sequence, self.num_experts)[tokens.sequence]
            return self.balance_loss * losses.balance(load, decision.probability).sum()
        load = counted.load(self.num_experts)
        if self.balance_scope == "global":
            load = self._window_load(load)
        return self.balance_loss * losses.balance(load, decision.mass)

    def _window_load(self, load: Tensor) -> Tensor:
        window = (self.window_stats or {}).get("balance_load", self.window)
        if window is not None and self.window_complete:
            return window
        load = self.total(load)
        return load if window is None else load + window

    def _apply(self, fn, recurse=True):
        """The bias moves with the module but stays float32: below, a step would be rounded away."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def _check(self) -> None:
        experts, k = self.num_experts, self.k
        if not 1 <= k <= experts:
            raise ConfigError(f"a router cannot choose k={k} of {experts} experts; choose router.k from 1 to {experts}")
        if k == 1 and experts > 1 and self.normalize == "selected":
            raise ConfigError(
                "k=1 with normalize=selected makes every weight 1, so that the router's gradient is exactly zero and it never "
                "learns; choose router.normalize=none (Switch) or router.k=2"
            )
        if experts % self.groups:
            raise ConfigError(
                f"{experts} experts do not split into {self.groups} equal groups; choose router.groups={_divisor(experts, self.groups)}"
            )
        if not 1 <= self.groups_kept <= self.groups:
            raise ConfigError(f"groups_kept={self.groups_kept} of {self.groups} groups; choose router.groups_kept from 1 to {self.groups}")
        if k > (room := self.groups_kept * experts // self.groups):
            raise ConfigError(
                f"k={k} experts do not fit into {self.groups_kept} kept groups with {room}; choose a larger router.groups_kept"
            )
        if self.second == "random" and k != 2:
            raise ConfigError(f"second=random is about the second of two choices, and k={k}; choose router.k=2 or router.second=always")
        for option in ("balance_loss", "z_loss", "bias_rate"):
            if (getattr(self, option) or 0) < 0:
                raise ConfigError(f"{option}={getattr(self, option)} would work against balance; choose router.{option} of at least 0")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter={self.jitter} would turn inputs around; choose router.jitter from 0 up to, but not including, 1")


def _divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, max(at_most, 1) + 1) if number % d == 0)
