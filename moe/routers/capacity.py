"""Capacity: what an expert takes from a group of tokens at most; the rest is dropped, and lives on in the residual stream."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routers.base import Routing, Tokens
from moe.shapes import Float, Int

_PARTS = 10**6  # factors are exact to this fraction, so that 1.1 * 100 tokens over 10 experts is 11 and not 12


class Capacity:
    """Keep at most ceil(tokens * k * factor / E) assignments of each group of tokens for each expert.

    factor: from E / k on nothing is ever dropped.
    drop: which are kept. "order": first choices before second ones, and among those as the tokens stand (GShard: Lepikhin
        et al., 2020). "priority": first choices before second ones, and among those the tokens with the largest weights
        (batch priority: Riquelme et al., 2021). "weight": those with the largest weights, whichever choice they are.
    group: "sequence", or so many positions next to each other, which do not reach into another sequence.
    multiple: capacities are rounded up to a multiple of this (V-MoE: 4).

    Padding takes no room, and is not among the tokens. Dropped assignments get expert E and weight 0, and the others keep
    their weights. What becomes of a token depends on later ones, which a model that generates cannot see: through the number
    of tokens, and, with anything but k=1 and drop="order", through what they choose.
    """

    def __init__(
        self,
        num_experts: int,
        factor: float,
        *,
        drop: Literal["order", "priority", "weight"] = "order",
        group: int | Literal["sequence"] = "sequence",
        multiple: int = 1,
    ) -> None:
        if not 1 / _PARTS <= factor < math.inf:
            raise ConfigError(
                f"capacity_factor={factor} is no share of tokens; choose router.capacity_factor above 0, such as 1.25, or null"
            )
        if isinstance(group, int) and group < 1:
            raise ConfigError(f"capacity_group={group} is not a number of tokens; choose router.capacity_group=sequence or at least 1")
        if multiple < 1:
            raise ConfigError(f"capacity_multiple={multiple} is nothing to round up to; choose router.capacity_multiple of at least 1")
        self.num_experts, self.parts, self.drop, self.group, self.multiple = num_experts, round(factor * _PARTS), drop, group, multiple

    @classmethod
    def of(cls, num_experts: int, factor: float | None, drop: str, group: int | str, multiple: int) -> Capacity | None:
        """What a router's options capacity_factor, drop, capacity_group and capacity_multiple ask for."""
        given = {"drop": (drop, "order"), "capacity_group": (group, "sequence"), "capacity_multiple": (multiple, 1)}
        if factor is not None:
            return cls(num_experts, factor, drop=drop, group=group, multiple=multiple)  # pyright: ignore[reportArgumentType]
        for option, (value, default) in given.items():
            if value != default:
                raise ConfigError(f"{option}={value} has no effect without a capacity; give router.capacity_factor, or leave it out")
        return None

    def __call__(self, routing: Routing, tokens: Tokens) -> Routing:
        """A routing of fixed fan-out without what is over capacity; its stats gain "demand", the loads before that."""
        k = routing.fan_out
        assert k is not None
        group = self._groups(tokens)
        order = self._order(routing.weight.detach().view(-1, k), tokens.index)
        bucket = (group[:, None] * (self.num_experts + 1) + routing.expert.view(-1, k)).view(-1)
        bucket, place = bucket[order].sort(stable=True)
        order = order[place]
        position = torch.arange(len(bucket), device=bucket.device) - torch.searchsorted(bucket, bucket)
        kept = position < self._room(group, tokens, k)[order // k]
        kept = torch.empty_like(kept).scatter_(0, order, kept) & (routing.expert < self.num_experts)
        return routing._replace(
            expert=torch.where(kept, routing.expert, self.num_experts),
            weight=routing.weight * kept,  # not `where`: a dropped NaN stays one
            stats=routing.stats | {"demand": routing.load(self.num_experts)},
        )

    def _groups(self, tokens: Tokens) -> Int[Tensor, " t"]:
        """A number below t for each token, which those of its group share."""
        if not isinstance(self.group, int):
            return tokens.sequence
        key = (tokens.sequence << 40) + tokens.index // self.group
        return torch.searchsorted(key.sort().values, key)

    def _room(self, group: Int[Tensor, " t"], tokens: Tokens, k: int) -> Int[Tensor, " t"]:
        """The capacity of each token's group."""
        count = torch.zeros_like(group).scatter_add_(0, group, tokens.valid.long())
        whole = self.num_experts * _PARTS
        room = (count * k * self.parts + whole - 1) // whole
        return ((room + self.multiple - 1) // self.multiple * self.multiple)[group]

    def _order(self, weight: Float[Tensor, "t k"], index: Int[Tensor, " t"]) -> Int[Tensor, " n"]:
        """The assignments, as rows of the routing, from the first to be kept to the last."""
        k = weight.shape[1]
        order = index.argsort(stable=True)
        if self.drop == "priority":
            order = order[weight.amax(-1)[order].argsort(descending=True, stable=True)]
        order = (order * k + torch.arange(k, device=order.device)[:, None]).view(-1)
        if self.drop == "weight":
            order = order[weight.reshape(-1)[order].argsort(descending=True, stable=True)]
        return order
