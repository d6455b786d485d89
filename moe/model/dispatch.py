"""The seam through which tokens move: a dispatcher turns a routing into rows in expert order, and rows into tokens."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from moe.kernels.auto import sort
from moe.kernels.reference import Rows
from moe.kernels.sort import permuted
from moe.routers.base import Routing
from moe.shapes import Float


class Dispatcher(Protocol):
    """Law: with identity experts and unit weights, combine(dispatch(x)) is each token times its number of assignments.

    The gradient that a row's output receives is multiplied by the routing's `gradient_scale`, where it has one.
    """

    def dispatch(self, x: Float[Tensor, "t d"], routing: Routing) -> tuple[Rows, Any]:
        """Rows for the experts at hand, and the ticket that `combine` needs to bring their sums home."""
        ...

    def combine(self, y: Float[Tensor, "m d"], ticket: Any) -> Float[Tensor, "t d"]:
        """Tokens, of the experts' sums over each vector's (already weighted) rows."""
        ...


class LocalDispatcher:
    """All experts are here: sorting by expert is all there is to do."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Float[Tensor, "t d"], routing: Routing) -> tuple[Rows, None]:
        order, position, counts = sort(routing.expert, self.num_experts)
        slots = None if routing.fan_out is None else position.view(-1, routing.fan_out)
        scale = None if routing.gradient_scale is None else permuted(routing.gradient_scale, order, position)
        return Rows(x, routing.token[order], permuted(routing.weight, order, position), counts, slots, scale), None

    def combine(self, y: Float[Tensor, "t d"], ticket: None) -> Float[Tensor, "t d"]:
        return y
