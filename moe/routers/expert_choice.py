"""Expert choice: every expert takes its best tokens of the sequence, so that loads are equal without a loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.kernels.product import linear
from moe.routers.base import Router, Routing, Tokens, best
from moe.routers.groups import Groups, capacity, expert_rows, groups, most_taken, unrouted
from moe.routers.losses import statistics
from moe.shapes import Bool, Float, Int

LEAK = (
    "{name} lets a token's experts depend on tokens after it, so a causal language model would be trained and measured on "
    "what it cannot know; choose router.name=top_k, or router.leak=allow if the model is not causal or the leak is what you study"
)


class ExpertChoice(Router):
    """Each expert takes the ceil(capacity_factor * T / E) tokens of a sequence of T that like it best (Zhou et al., 2022).

    It looks across the whole sequence, in evaluation too: a token's experts depend on tokens after it. In a causal
    language model that is a leak of the future, hence `leak`: it is refused unless the answer is "allow". Generating token
    by token decides on sequences of one token, which every expert then takes, unless `max_experts` forbids it.

    capacity_factor: experts that a token has on average. Tokens that no expert takes have the residual stream alone;
        the statistic "unrouted" counts them.
    max_experts: of the experts that took a token, the most that keep it, the likeliest ones; None for any number.

    The weight is the token's softmax probability of the expert, not normalised again. Padding is neither taken nor counted.
    Ties go to the earlier token; a NaN token is taken by every expert, so that its weights show it.
    """

    fan_out_varies = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        max_experts: int | None = None,
        leak: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        super().__init__(d_model, num_experts)
        if leak != "allow":
            raise ConfigError(LEAK.format(name="expert_choice"))
        if not 0 < capacity_factor <= num_experts:
            raise ConfigError(
                f"a capacity factor of {capacity_factor} is not between 0 and the {num_experts} experts that a token can have; "
                f"choose router.capacity_factor={min(2.0, num_experts):g}"
            )
        if max_experts is not None and not 1 <= max_experts <= num_experts:
            raise ConfigError(
                f"a token cannot keep {max_experts} of {num_experts} experts; choose router.max_experts from 1 to {num_experts}"
            )
        self.capacity_factor, self.max_experts = capacity_factor, max_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    @property
    def k(self) -> float:
        """Experts that a token has on average, for counts of cost."""
        return self.capacity_factor

    def reset_parameters(self, std: float = 0.02) -> None:
        """Small normal weights."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        logits = linear(x, self.weight)
        log_probability = logits.log_softmax(-1)
        at = groups(tokens)
        place, kept = self._choose(log_probability.detach(), at)
        routing = expert_rows(place, kept, at, log_probability.exp())
        stats = statistics(logits, tokens.valid) | {"unrouted": unrouted(routing, tokens, self.num_experts)}
        return routing._replace(stats=stats)

    def _choose(self, log_probability: Tensor, at: Groups) -> tuple[Int[Tensor, "g E c"], Bool[Tensor, "g E c"]]:
        """Each expert's places, best first, and whether it takes them."""
        # logarithms rank the same as probabilities, and are still different where those underflow
        score = at.gather(log_probability).masked_fill(~at.valid[..., None], -torch.inf).transpose(1, 2)
        most = most_taken(at.index.shape[1], self.num_experts, self.capacity_factor)
        place = torch.sort(score, descending=True, stable=True).indices[..., :most]
        room = capacity(at.valid.sum(1), self.num_experts, self.capacity_factor)
        kept = (torch.arange(place.shape[-1], device=place.device) < room[:, None, None]).expand_as(place)
        if self.max_experts is None:
            return place, kept
        took = torch.zeros_like(score, dtype=torch.bool).scatter(2, place, kept)
        likeliest = best(score.masked_fill(~took, -torch.inf).transpose(1, 2), self.max_experts)
        keeps = torch.zeros_like(took.transpose(1, 2)).scatter(2, likeliest, True).transpose(1, 2)
        return place, kept & keeps.gather(2, place)
