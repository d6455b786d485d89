"""The seam through which tokens move: a dispatcher turns a routing into rows in expert order, and rows into tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe.kernels.permute import gather_sum
from moe.kernels.reference import Rows
from moe.routers.base import Routing
from moe.shapes import Float, Int


class Dispatcher(Protocol):
    """Law: with identity experts and unit weights, combine(dispatch(x)) is each token times its number of assignments.

    The gradient that a row's output receives is multiplied by the routing's `gradient_scale`, where it has one.
    """

    def dispatch(self, x: Float[Tensor, "t d"], routing: Routing) -> tuple[Rows, Any]:
        """Rows for the experts at hand, and the ticket that `combine` needs to bring them home."""
        ...

    def combine(self, y: Float[Tensor, "n d"], ticket: Any) -> Float[Tensor, "t d"]:
        """Sum of each token's (already weighted) rows."""
        ...


class Ticket(NamedTuple):
    """Where the rows of a local dispatch came from."""

    index: Int[Tensor, " n"]
    slots: Int[Tensor, "t k"] | None
    tokens: int
    gradient_scale: Float[Tensor, " n"] | None


class LocalDispatcher:
    """All experts are here: sorting by expert is all there is to do."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Float[Tensor, "t d"], routing: Routing) -> tuple[Rows, Ticket]:
        # stable: equal experts keep token order, so results do not depend on the backend; drops (E) sort last
        order = torch.sort(routing.expert, stable=True).indices
        index, slots = routing.token[order], None
        if routing.fan_out is not None:
            slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            slots = slots.view(-1, routing.fan_out)
        rows = Rows(x, index, routing.weight[order], routing.load(self.num_experts), slots)
        scale = None if routing.gradient_scale is None else routing.gradient_scale[order]
        return rows, Ticket(index, slots, len(x), scale)

    def combine(self, y: Float[Tensor, "n d"], ticket: Ticket) -> Float[Tensor, "t d"]:
        if ticket.gradient_scale is not None:
            y = scale_gradient(y, ticket.gradient_scale)
        if ticket.slots is not None:
            return gather_sum(y, ticket.index, ticket.slots)
        return y.new_zeros(ticket.tokens, y.shape[1]).index_add(0, ticket.index, y)


def scale_gradient(y: Float[Tensor, "n d"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """`y`, whose rows pass on `scale` times the gradient that they receive."""
    return _ScaleGradient.apply(y, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, scale):
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad * scale[:, None].to(grad.dtype), None
