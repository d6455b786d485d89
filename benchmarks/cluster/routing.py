"""A router that sends tokens by given loads instead of by what it has learned; its weights have gradients as usual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.kernels.product import linear
from moe.model.initialise import stream
from moe.planner import loads
from moe.planner.loads import Skew, Trace
from moe.routers import noise
from moe.routers.base import Router, Routing, Tokens
from moe.shapes import Float


class Loaded(Router):
    """Which experts a token gets follows from the loads of (layer, step) and the token's index in the global batch alone.

    source: the generator's arguments, or recorded loads, whose steps are taken in turn, over and over.
    begin: the step of the source at step 0.
    """

    def __init__(self, d_model: int, num_experts: int, *, k: int, layer: int, source: Skew | Trace, begin: int, rank: int) -> None:
        super().__init__(d_model, num_experts)
        self.k, self.layer, self.source, self.begin, self.rank = k, layer, source, begin, rank
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.known: tuple[int, Tensor] = (-1, torch.empty(0))

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        step = self.begin + tokens.step
        if isinstance(self.source, Skew):
            draw = loads.draws(self.source, self.layer, step, tokens.index)
        else:
            draw = noise.uniform(stream("trace", self.layer), step, tokens.index, 1)[:, 0]
        chosen = loads.choose(self._shares(step), self.k, draw)
        weight = linear(x, self.weight).gather(1, chosen).softmax(-1)
        valid = tokens.valid[:, None]
        return Routing.per_token(torch.where(valid, chosen, self.num_experts), torch.where(valid, weight, 0))

    def _shares(self, step: int) -> Tensor:
        if self.known[0] != step:
            if isinstance(self.source, Skew):
                share = loads.shares(self.source, self.layer, step)
            else:
                counts = self.source.counts[step % len(self.source.steps), self.layer, self.rank]
                share = loads.capped(torch.tensor(counts, dtype=torch.float64), self.k)
            self.known = step, share
        return self.known[1]
