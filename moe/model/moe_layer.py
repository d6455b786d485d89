"""One mixture-of-experts layer in four stages: route, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.model.dispatch import Dispatcher, LocalDispatcher
from moe.model.experts import Activation, Experts
from moe.model.layers import FeedForward
from moe.model.side_stream import Join, SideStream
from moe.model.stages import Observer
from moe.routers import build
from moe.routers.base import Router, Routing, Tokens
from moe.shapes import Float, Int


class Report(NamedTuple):
    """What a layer's routing cost and did, returned upward beside the output."""

    loss: Float[Tensor, ""]  # auxiliary losses, weighted, summed over the call's valid tokens
    load: Int[Tensor, " E"]  # assignments per expert, drops left out
    stats: dict[str, Tensor]  # sums over valid tokens; "tokens" counts them


class MoELayer(nn.Module):
    """Routed experts beside optional shared ones.

    router: a `Router`, its name, or a dictionary {name, options…} as in a recipe.
    d_shared: width of the shared experts, which every token passes; `shared_gate` puts a sigmoid gate on their
        output (Qwen2-MoE). shared_bias: biases of the shared experts; routed ones have none.
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
        shared_gate: bool = False,
        shared_bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.router = router if isinstance(router, Router) else build(router, d_model, experts)
        self.dispatcher: Dispatcher = LocalDispatcher(experts)
        # The seam that orders dispatch, experts and combine: in turn, or tokens in chunks that overlap.
        self.pipeline: Callable[[MoELayer, Tensor, Routing], Tensor] = MoELayer._in_turn
        # The seam through which summaries of experts that live elsewhere come, for routers that read experts.
        self.gather_summary: Callable[[Tensor], Tensor] = lambda summary: summary
        # A stream beside the main one on which shared experts run while tokens travel; None: in turn.
        self.beside: SideStream | None = None
        # Who is told of the stages: telemetry gives the layer an observer of its own.
        self.observer = Observer()
        self.experts = Experts(d_model, experts, d_expert, activation=activation, gated=gated, backend=backend)
        for weight in self.experts.parameters():
            nn.init.trunc_normal_(weight, std=0.02, a=-0.06, b=0.06)
        self.shared = FeedForward(d_model, d_shared, activation=activation, gated=gated, bias=shared_bias) if d_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared_gate else None

    def forward(self, x: Float[Tensor, "t d"], tokens: Tokens | None = None) -> tuple[Float[Tensor, "t d"], Report]:
        tokens = Tokens.of(x) if tokens is None else tokens
        routing = self.route(x, tokens)
        return self.compute(x, routing), self.report(routing, tokens)

    def route(self, x: Float[Tensor, "t d"], tokens: Tokens) -> Routing:
        """The decision; a router that reads experts gets its summary of them, gradient included."""
        see = self.observer
        with see.stage("route"):
            summary, x = self.experts.summarise(self.router), see.border(x, "route", None)
            routing = self.router(x, tokens) if summary is None else self.router(x, tokens, self.gather_summary(summary))
        return routing._replace(weight=see.border(routing.weight, None, "route"))

    def compute(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        """Everything after the decision: a pure function of its inputs, which may run again in the backward pass."""
        shared = self._shared_beside(x)
        out = self.pipeline(self, x, routing)
        if routing.output_scale is not None:
            out = out * routing.output_scale.to(out.dtype)
        if self.shared is None:
            return out
        if shared is None:
            return out + self._shared(x)
        assert self.beside is not None
        self.beside.join()
        self.beside.hand_back(shared)
        return out + shared

    def _in_turn(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        see = self.observer
        with see.stage("dispatch"):
            rows, ticket = self.dispatcher.dispatch(see.border(x, "dispatch", None), routing)
        see.dispatched(rows)
        y = self.experts(rows._replace(x=see.border(rows.x, "experts", "dispatch")))
        with see.stage("combine"):
            out = self.dispatcher.combine(see.border(y, "combine", "experts"), ticket)
        return see.border(out, None, "combine")

    def compile_regions(self) -> None:
        """Compile the router, where it is one graph for every layer and step, and the shared experts.

        Dispatch and the routed experts stay eager: they are a few large kernels whose shapes are the tokens' of a step, they add
        gradients in place, and a compiled call cannot.
        """
        if self.router.eager is None:
            # not the call: hooks of an engine stay outside
            self.router.forward = _compiled_routing(self.router.forward)
        if self.shared is not None:
            self._shared = torch.compile(self._shared)

    def _shared(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        assert self.shared is not None
        out = self.shared(x)
        return out if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * out

    def _shared_beside(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"] | None:
        if self.beside is None or self.shared is None:
            return None
        x = Join.apply(x, self.beside)  # before the routed branch: autograd then comes to it after that branch
        with self.beside.run():
            out = self._shared(x)
        self.beside.lend(x)
        return out

    def report(self, routing: Routing, tokens: Tokens) -> Report:
        """What the routing cost and did."""
        return Report(routing.loss, routing.load(self.num_experts), {**routing.stats, "tokens": tokens.valid.sum()})


def _compiled_routing(forward: Callable[..., Routing]) -> Callable[..., Routing]:
    """A compiled function that returns a tuple: torch 2.11 cannot give back a named one that `_replace` has made."""
    compiled = torch.compile(lambda *args: tuple(forward(*args)))
    return lambda *args: Routing._make(compiled(*args))
