"""Noisy top-k: the gate of the first sparse mixtures, whose noise lets rarely chosen experts try their luck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers import losses
from moe.routers.base import DRAWS_NOISE, Router, Routing, Tokens, best
from moe.routers.capacity import Capacity
from moe.routers.draw import Law
from moe.routers.noise import normal
from moe.shapes import Float

_LEAST_STD = 1e-6  # in the load loss alone, where noise without width would make a chance a step


class NoisyTopK(Router):
    """Keep the k best of each token's logits after Gaussian noise.

    noise: "learned" has the standard deviation softplus(x W_noise); weights are the softmax of the k noisy logits, their
        sums the importance, and first values zero (Shazeer et al., 2017). "fixed" has 1 / E; weights are the entries of the softmax of
        all noisy logits, and importance is the summed softmax of the logits without noise (V-MoE: Riquelme et al., 2021).
    importance_loss, load_loss: coefficients of the squared coefficients of variation of the importance and of the `smooth_load`
        of experts; 0 for none.
    balance_scope: what their sums are taken over: the call ("micro"), each sequence, or the global batch.
    capacity_factor, drop, capacity_group, capacity_multiple: see `Capacity`; None drops nothing. Losses count what was asked
        for, dropped or not.

    Noise and losses belong to training. Padding gets expert E, weight 0, and no part in losses, statistics or load. A NaN
    logit gives a NaN weight.
    """

    eager = DRAWS_NOISE

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        noise: Literal["learned", "fixed"] = "learned",
        importance_loss: float = 0.1,
        load_loss: float = 0.1,
        balance_scope: Literal["micro", "sequence", "global"] = "global",
        capacity_factor: float | None = None,
        drop: Literal["order", "priority", "weight"] = "order",
        capacity_group: int | Literal["sequence"] = "sequence",
        capacity_multiple: int = 1,
    ) -> None:
        super().__init__(d_model, num_experts)
        self.k, self.noise, self.balance_scope = k, noise, balance_scope
        self.importance_loss, self.load_loss = importance_loss, load_loss
        self.capacity = Capacity.of(num_experts, capacity_factor, drop, capacity_group, capacity_multiple)
        self._check()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model)) if noise == "learned" else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Zeros where the noise is learned, small normal weights where it is not."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0 if self.noise == "learned" else std)

    def initial_law(self, name: str, shape: Sequence[int], layers: int) -> Law | None:
        return Law("constant", 0) if self.noise == "learned" and name.startswith("router.") else None

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        clean = noisy = linear(x, self.weight)
        # softplus, but for its last bits: those of torch's own depend on where in memory an element lies
        std = 1 / self.num_experts if self.noise_weight is None else -F.logsigmoid(-linear(x, self.noise_weight))
        if self.training:
            noisy = clean + std * normal(self.stream, tokens.step, tokens.index, self.num_experts).to(clean.dtype)
        chosen, valid = best(noisy.detach(), self.k), tokens.valid[:, None]
        weight = noisy.gather(1, chosen).softmax(-1) if self.noise == "learned" else noisy.softmax(-1).gather(1, chosen)
        weight = torch.where(valid, weight, 0)
        routing = Routing.per_token(torch.where(valid, chosen, self.num_experts), weight, stats=losses.statistics(clean, tokens.valid))
        if self.training:
            gate = torch.zeros_like(clean).scatter(1, chosen, weight) if self.noise == "learned" else clean.softmax(-1)
            loss = self._uneven("importance", self.importance_loss, gate, routing, tokens)
            loss = loss + self._uneven("smooth_load", self.load_loss, self._chance(clean, noisy, std), routing, tokens)
            routing = routing._replace(loss=loss)
        return routing if self.capacity is None else self.capacity(routing, tokens)

    def _chance(self, clean: Tensor, noisy: Tensor, std: Tensor | float) -> Float[Tensor, "t E"]:
        if not isinstance(std, Tensor):
            return losses.smooth_load(clean, noisy, self.k, std)
        return losses.smooth_load(clean, noisy, self.k, std.clamp(min=_LEAST_STD), against="others")

    def _uneven(self, name: str, coefficient: float, share: Float[Tensor, "t E"], routing: Routing, tokens: Tokens) -> Tensor:
        """The loss of unequal sums of `share`, counted once for each valid token; the sums become statistics."""
        share = torch.where(tokens.valid[:, None], share, 0)
        routing.stats[name] = share.detach().sum(0)
        if not coefficient:
            return share.new_zeros(())
        if self.balance_scope == "sequence":
            sums = torch.zeros_like(share).index_add(0, tokens.sequence, share)
            return coefficient * (losses.importance(sums)[tokens.sequence] * tokens.valid).sum()
        sums, count = share.sum(0), tokens.valid.sum()
        if self.balance_scope == "micro":
            return coefficient * (count * losses.importance(sums))
        if self.window_stats is None or not self.window_complete:
            sums = self.total(sums)
            if self.window_stats is not None:
                sums = sums + self.window_stats[name].to(sums.dtype)
            return coefficient * (count * losses.importance(sums))
        # the whole is known: of its loss a call has its tokens' share of the value, and all of the gradient that is due to it
        value = losses.importance(self.window_stats[name].to(sums.dtype) + (sums - sums.detach()))
        return coefficient * (count * value.detach() + self.window_stats["tokens"] * (value - value.detach()))

    def _check(self) -> None:
        experts, k = self.num_experts, self.k
        if not 1 <= k <= experts:
            raise ConfigError(f"a router cannot choose k={k} of {experts} experts; choose router.k from 1 to {experts}")
        if k == 1 and experts > 1 and self.noise == "learned":
            raise ConfigError(
                "k=1 with noise=learned makes every weight 1, so that the task teaches the router nothing; "
                "choose router.noise=fixed or router.k=2"
            )
        for option in ("importance_loss", "load_loss"):
            if getattr(self, option) < 0:
                raise ConfigError(f"{option}={getattr(self, option)} would work against balance; choose router.{option} of at least 0")
