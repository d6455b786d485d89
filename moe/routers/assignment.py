"""BASE layers: in training, the best assignment of a sequence's tokens to experts that gives none more than its share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import Router, Routing, Tokens, best
from moe.routers.groups import groups
from moe.routers.losses import statistics
from moe.shapes import Bool, Float, Int


class BalancedAssignment(Router):
    """One expert a token, at most ceil(T / E) tokens of a sequence of T an expert, for the largest sum of logits (Lewis et al., 2021).

    tolerance: the mean logit of a sequence's tokens is within this of the best possible, as a share of the range of its logits,
        where the auction ends within its rounds.
    rounds: bids before the auction is cut short; the last assignment that was complete then counts, and is further from the best.

    The weight is sigmoid(z) of the expert's logit. In training a token's expert depends on tokens after it; in evaluation each
    token takes its largest logit, so that nothing leaks, and loads are no longer balanced. The paper shuffles tokens over
    workers and balances each worker's; here a sequence is balanced, whatever the ranks. Padding takes no place.
    """

    k = 1

    def __init__(self, d_model: int, num_experts: int, *, tolerance: float = 1e-3, rounds: int = 256) -> None:
        super().__init__(d_model, num_experts)
        if not 0 < tolerance < 1:
            raise ConfigError(f"a tolerance of {tolerance} is not a share of the logits' range; choose router.tolerance=0.001")
        if rounds < 1:
            raise ConfigError(f"an auction of {rounds} rounds sells nothing; choose router.rounds=256")
        self.tolerance, self.rounds = tolerance, rounds
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits = linear(x, self.weight)
        chosen = self._select(logits.detach(), tokens)
        weight = logits.sigmoid().gather(1, chosen)
        valid = tokens.valid[:, None]
        expert = torch.where(valid, chosen, self.num_experts)
        return Routing.per_token(expert, torch.where(valid, weight, 0), stats=statistics(logits, tokens.valid))

    def _select(self, logits: Tensor, tokens: Tokens) -> Int[Tensor, "t 1"]:
        greedy = best(logits, 1)
        if not self.training:
            return greedy
        at = groups(tokens)
        z = at.gather(logits)
        taken = at.scatter(assign(z, at.valid & z.isfinite().all(-1), self.tolerance, self.rounds))[:, None]
        return torch.where(taken < self.num_experts, taken, greedy)


class Auction:
    """Unassigned tokens bid, experts keep the best bids, in all groups at once (Bertsekas & Castañon, 1989).

    A bid is what makes the bidder indifferent between its best expert and its second, plus epsilon; an expert's price is its
    lowest kept bid once it is full. When a group has no unassigned token it starts again from its prices with
    an epsilon five times smaller, until the last: then the sum of values is within T * epsilon of the largest. Phantoms of
    equal value everywhere take the places that T tokens leave empty, without which falling back to old prices would be wrong.
    """

    def __init__(self, value: Float[Tensor, "g s E"], valid: Bool[Tensor, "g s"], tolerance: float) -> None:
        g, _, experts = value.shape
        self.experts = experts
        count = valid.sum(1)
        self.room = (count + experts - 1) // experts
        phantoms = torch.arange(experts - 1, device=value.device) < (self.room * experts - count)[:, None]
        self.present = torch.cat([valid, phantoms], 1)
        inside = valid[..., None]
        self.value = torch.cat([torch.where(inside, value, 0), value.new_zeros(g, experts - 1, experts)], 1)
        high = torch.where(inside, value, -torch.inf).flatten(1).amax(1)
        low = torch.where(inside, value, torch.inf).flatten(1).amin(1)
        # a group without a difference between its logits still needs bids that rise
        span = torch.where(high > low, high - low, 1)
        self.last, self.epsilon = tolerance * span, torch.maximum(0.1 * span, tolerance * span)
        self.start = self.price = value.new_zeros(g, experts)
        self.owner = torch.full_like(self.present, experts, dtype=torch.int64)
        self.bid = value.new_zeros(self.present.shape)
        self.complete = self.owner
        self.over = torch.zeros_like(count, dtype=torch.bool)

    def round(self) -> None:
        """One bid of every unassigned token, and a new phase for groups that have none left."""
        bidding = self.present & (self.owner == self.experts)
        net = self.value - self.price[:, None]
        expert = net.argmax(2)
        first = net.gather(2, expert[..., None])[..., 0]
        second = net.scatter_(2, expert[..., None], -torch.inf).amax(2)
        bid = self.price.gather(1, expert) + (first - second) + self.epsilon[:, None]
        self.owner = torch.where(bidding, expert, self.owner)
        self.bid = torch.where(bidding, bid, self.bid)
        self._keep_the_best()

        settled = ~(self.present & (self.owner == self.experts)).any(1)
        self.complete = torch.where(settled[:, None], self.owner, self.complete)
        self.over = self.over | (settled & (self.epsilon <= self.last))
        again = settled & ~self.over
        self.epsilon = torch.where(again, torch.maximum(self.epsilon / 5, self.last), self.epsilon)
        self.owner = torch.where(again[:, None], self.experts, self.owner)
        self.start = torch.where(again[:, None], self.price, self.start)

    def _keep_the_best(self) -> None:
        order = self.bid.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, self.owner.gather(1, order).argsort(dim=1, stable=True))
        owner = self.owner.gather(1, order)
        load = torch.zeros_like(self.price, dtype=torch.int64)
        load = torch.cat([load, load[:, :1]], 1).scatter_add(1, self.owner, torch.ones_like(self.owner))
        begin = load.cumsum(1) - load
        rank = torch.arange(owner.shape[1], device=owner.device) - begin.gather(1, owner)
        kept = torch.where(rank < self.room[:, None], owner, self.experts)
        self.owner = torch.empty_like(owner).scatter(1, order, kept)
        full = load[:, :-1] >= self.room[:, None]
        lowest = (begin[:, :-1] + self.room[:, None] - 1).clamp(0, owner.shape[1] - 1)
        self.price = torch.where(full, self.bid.gather(1, order.gather(1, lowest)), self.start)


@torch.library.custom_op("moe::assign", mutates_args=(), schema="(Tensor value, Tensor valid, float tolerance, int rounds) -> Tensor")
def assign(value: Tensor, valid: Tensor, tolerance: float, rounds: int) -> Tensor:
    """The expert, [g, s], of each valid token in value [g, s, E] by a balanced assignment of almost the largest sum; E for the rest.

    One operator to the compiler, which would unroll the rounds otherwise.
    """
    _, s, experts = value.shape
    if experts == 1:
        return torch.where(valid, 0, 1)
    auction = Auction(value, valid, tolerance)
    for _ in range(rounds):
        auction.round()
        # rounds after the last bid change nothing; only where asking costs no wait is the rest left out
        if value.device.type == "cpu" and bool(auction.over.all()):
            break
    unfinished = (auction.complete == experts).all(1, keepdim=True)
    owner = torch.where(unfinished, auction.owner, auction.complete)[:, :s]
    return fill(torch.where(valid, owner, experts), valid, auction.room, experts)


@assign.register_fake
def _(value: Tensor, valid: Tensor, tolerance: float, rounds: int) -> Tensor:
    return valid.new_empty(valid.shape, dtype=torch.int64)


def fill(owner: Int[Tensor, "g s"], valid: Bool[Tensor, "g s"], room: Int[Tensor, " g"], experts: int) -> Int[Tensor, "g s"]:
    """Give valid tokens without an expert the places that are left, in the order of experts."""
    load = torch.zeros(len(owner), experts + 1, dtype=torch.int64, device=owner.device)
    load = load.scatter_add(1, owner, torch.ones_like(owner))[:, :-1]
    left = (room[:, None] - load).cumsum(1)
    without = valid & (owner == experts)
    # the i-th of them, from 1, goes to the first expert up to which there are i places
    number = without.cumsum(1)
    return torch.where(without, torch.searchsorted(left, number), owner)
