"""Sequences as rows of a rectangle, for routers that look across tokens: a group is a sequence, whatever a rank holds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.routers.base import Routing, Tokens
from moe.shapes import Bool, Float, Int

_ROUNDING = 1e-9  # 50 * 1.1 is 55 in decimal, and a little more in binary


class Groups(NamedTuple):
    """Which token stands where: g sequences of s places, the shorter ones filled up.

    Tokens stand in the order of their global index, so that the order in which a call lists them decides nothing.
    """

    index: Int[Tensor, "g s"]  # t at a place without a token
    valid: Bool[Tensor, "g s"]  # a token stands here, and it is no padding
    tokens: int

    @property
    def token(self) -> Int[Tensor, "g s"]:
        """`index`, with some token or other at the empty places."""
        return self.index.clamp(max=self.tokens - 1)

    def gather(self, x: Float[Tensor, "t E"]) -> Float[Tensor, "g s E"]:
        """The rows of tokens at their places."""
        return x[self.token]

    def scatter(self, y: Tensor) -> Tensor:
        """What stands at the places, [g, s, …], as rows of tokens, [t, …]."""
        out = y.new_zeros(self.tokens + 1, *y.shape[2:])
        return out.index_put((self.index,), y)[: self.tokens]


def groups(tokens: Tokens) -> Groups:
    """The sequences of a call. Without `tokens.length` this waits once for the device, to learn how many and how long they are."""
    t, device = tokens.valid.shape[0], tokens.valid.device
    if tokens.length is not None or t == 0:
        length = max(tokens.length or 0, 1)
        index = torch.arange(t, device=device).view(t // length, length)
        return Groups(index, tokens.valid[index], t)
    order = torch.argsort(tokens.index)
    order = order[torch.argsort(tokens.sequence[order], stable=True)]
    sequence = tokens.sequence[order]
    position = torch.arange(t, device=device)
    start = torch.full_like(position, t).scatter_reduce(0, sequence, position, "amin")
    position = position - start[sequence]
    many, length = (torch.stack([sequence[-1], position.max()]) + 1).tolist()
    index = position.new_full((many, length), t).index_put((sequence, position), order)
    return Groups(index, torch.cat([tokens.valid, tokens.valid.new_zeros(1)])[index], t)


def capacity(count: Int[Tensor, " g"], experts: int, each: float) -> Int[Tensor, " g"]:
    """ceil(count * each / experts): tokens that an expert may take in groups of `count` when a token has `each` experts on average."""
    return torch.ceil(count.double() * each / experts - _ROUNDING).long().clamp(max=count)


def most_taken(places: int, experts: int, each: float) -> int:
    """The largest that `capacity` can be in groups of so many places."""
    return min(math.ceil(places * each / experts - _ROUNDING), places)


def expert_rows(place: Int[Tensor, "g E c"], kept: Bool[Tensor, "g E c"], groups: Groups, weight: Float[Tensor, "t E"]) -> Routing:
    """Every expert takes the tokens at c places of each group, where `kept`; a token's weight is its row's entry for the expert."""
    g, experts, c = place.shape
    token = groups.token.gather(1, place.reshape(g, experts * c)).view(g, experts, c).transpose(0, 1).reshape(experts, g * c)
    kept = kept.transpose(0, 1).reshape(experts, g * c)
    expert = torch.arange(experts, device=token.device)[:, None].expand_as(token)
    taken = torch.where(kept, weight[token, expert], 0)
    routing = Routing.per_expert(token, taken)
    return routing._replace(expert=torch.where(kept, expert, experts).reshape(-1))


def unrouted(routing: Routing, tokens: Tokens, experts: int) -> Int[Tensor, ""]:
    """How many valid tokens have no expert: the residual stream carries them alone."""
    has = torch.zeros_like(tokens.index).scatter_add_(0, routing.token, (routing.expert < experts).long())
    return (tokens.valid & (has == 0)).sum()
