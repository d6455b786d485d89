"""One mixture-of-experts layer in four stages: route, dispatch, experts, combine."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from moe.model.dispatch import Dispatcher, LocalDispatcher
from moe.model.experts import Activation, Experts
from moe.routers import build
from moe.routers.base import Router, Tokens
from moe.shapes import Float, Int


class Report(NamedTuple):
    """What a layer's routing cost and did, returned upward beside the output."""

    loss: Float[Tensor, ""]  # auxiliary losses, weighted, summed over the call's valid tokens
    load: Int[Tensor, " E"]  # assignments per expert, drops left out
    stats: dict[str, Tensor]  # sums over valid tokens; "tokens" counts them


class MoELayer(nn.Module):
    """Routed experts beside optional shared ones.

    `router` is a `Router`, or a dictionary {name, options…} as in a recipe.
    """

    def __init__(
        self,
        d_model: int,
        *,
        experts: int,
        d_expert: int,
        router: Router | dict[str, Any] | str = "top_k",
        activation: Activation = "silu",
        gated: bool = True,
        d_shared: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.router = router if isinstance(router, Router) else build(router, d_model, experts)
        self.dispatcher: Dispatcher = LocalDispatcher(experts)
        self.experts = Experts(d_model, experts, d_expert, activation=activation, gated=gated, backend=backend)
        self.shared = FeedForward(d_model, d_shared, activation=activation, gated=gated) if d_shared else None

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens | None = None) -> tuple[Float[Tensor, "t d"], Report]:
        tokens = Tokens.of(x) if tokens is None else tokens
        routing = self.router(x, tokens)
        rows, ticket = self.dispatcher.dispatch(x, routing)
        y = self.experts(rows)
        out = self.dispatcher.combine(y, ticket)
        if self.shared is not None:
            out = out + self.shared(x)
        stats = {**routing.stats, "tokens": tokens.valid.sum()}
        return out, Report(routing.loss, routing.load(self.num_experts), stats)
