"""All-to-alls of tokens in two halves, one that starts them and one that waits, each a node of autograd.

What runs between the halves overlaps with the transfer, forward and backward: the backward pass of the half that waits starts the
all-to-all of gradients, and that of the half that starts waits for it.

                        forward                          backward
    Start (dispatch)    tokens leave                     wait, each token's sum of its gradients
    Wait (dispatch)     wait                             gradients of what came leave
    Start (combine)     outputs leave                    wait
    Wait (combine)      wait, each token's sum           gradients of outputs leave

Between two halves autograd passes tensors on that are not filled yet, or stand in for those that are under way: nothing may read
them. They are passed on, and only the other half uses what has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.kernels.permute import bring_home
from moe.kernels.reference import Rows
from moe.parallel.collectives import exchange_into
from moe.shapes import Float, Int


class Route(NamedTuple):
    """How vectors travel: outward, vector i is token[i]; homeward, token t is the sum of the vectors in slots[t]."""

    token: Int[Tensor, " s"]  # of a free place any token: nothing of it counts
    slots: Int[Tensor, "t k"] | None  # s for none; None: as `token` says
    tokens: int
    send: list[int]  # vectors to each rank of the group
    receive: list[int]  # vectors from each
    group: Any
    returned: Callable[[], None] = lambda: None  # called once gradients of what went outward are back


class Outgoing(NamedTuple):
    """Tokens that are ready to be sent to their experts."""

    x: Float[Tensor, "t d"]
    values: Float[Tensor, "n c"]  # of each assignment, in the order in which they are sent
    route: Route
    send: list[int]  # assignments to each rank of the group
    receive: list[int]  # assignments from each
    arrived: Callable[[Tensor, Tensor], Rows]  # the experts' work, of the vectors and values that came


class InFlight:
    """What is under way in one direction. Tensors that are sent are kept until they have arrived."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.under_way: list[tuple[Any, Tensor, Tensor]] = []  # work, what comes, what goes

    def start(self, x: Tensor, into: Tensor, send: list[int], receive: list[int]) -> None:
        """Begin to send x; the first rows of `into` are filled."""
        x = x.contiguous()
        self.under_way.append((exchange_into(into[: sum(receive)], x, send, receive, self.group, "tokens"), into, x))

    def wait(self) -> list[Tensor]:
        """All that has been sent for, in the order of its start."""
        arrived, self.under_way = self.under_way, []
        for work, _, _ in arrived:
            work.wait()
        return [into for _, into, _ in arrived]


def start_dispatch(out: Outgoing) -> tuple[Tensor, Tensor, InFlight]:
    """Send tokens to their experts: vectors and values that are still to come, and what `wait_dispatch` needs."""
    under_way = InFlight(out.route.group)
    return *_StartDispatch.apply(out.x, out.values, out, under_way), under_way


def wait_dispatch(x: Tensor, values: Tensor, out: Outgoing, under_way: InFlight) -> Rows:
    """The experts' work, once it is here."""
    return out.arrived(*_WaitDispatch.apply(x, values, out, under_way))


def start_combine(y: Float[Tensor, "m d"], route: Route) -> tuple[Tensor, InFlight]:
    """Send the experts' outputs to the tokens: rows that are still to come, and what `wait_combine` needs."""
    under_way = InFlight(route.group)
    return _StartCombine.apply(y, route, under_way), under_way


def wait_combine(rows: Tensor, route: Route, under_way: InFlight) -> Float[Tensor, "t d"]:
    """Each token's sum, once all of it is here."""
    return _WaitCombine.apply(rows, route, under_way)


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, out: Outgoing, under_way: InFlight) -> tuple[Tensor, Tensor]:
        ctx.route, ctx.under_way = out.route, under_way
        came = values.new_empty(sum(out.receive), values.shape[1])
        rows = x.new_empty(sum(out.route.receive), x.shape[1])
        under_way.start(values, came, out.send, out.receive)
        under_way.start(_packed(x, out.route), rows, out.route.send, out.route.receive)
        return rows, came

    @staticmethod
    def backward(ctx: Any, *stand_ins: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_values, of_rows = ctx.under_way.wait()
        of_x = _summed(of_rows, ctx.route)
        ctx.route.returned()
        return of_x, of_values, None, None


class _WaitDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, out: Outgoing, under_way: InFlight) -> tuple[Tensor, Tensor]:
        ctx.out, ctx.under_way = out, under_way
        under_way.wait()
        # Kept by every rank, with experts or without, so that under activation checkpointing all of them recompute as far as here,
        # and before any gradient leaves: the collectives of the recomputation then come in the same order on all ranks.
        ctx.save_for_backward(x)
        return x.view_as(x), values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _ = ctx.saved_tensors
        out, (of_rows, of_values) = ctx.out, grads
        ctx.under_way.start(of_values, of_values.new_empty(sum(out.send), of_values.shape[1]), out.receive, out.send)
        ctx.under_way.start(of_rows, _room(out.route, of_rows), out.route.receive, out.route.send)
        return of_rows, of_values, None, None


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, route: Route, under_way: InFlight) -> Tensor:
        ctx.under_way, rows = under_way, _room(route, y)
        under_way.start(y, rows, route.receive, route.send)
        return rows

    @staticmethod
    def backward(ctx: Any, *stand_ins: Tensor) -> tuple[Tensor, None, None]:
        (of_y,) = ctx.under_way.wait()
        return of_y, None, None


class _WaitCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, under_way: InFlight) -> Tensor:
        ctx.route, ctx.under_way = route, under_way
        (arrived,) = under_way.wait()
        return _summed(arrived, route)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        route, (grad,) = ctx.route, grads
        ctx.under_way.start(_packed(grad, route), grad.new_empty(sum(route.receive), grad.shape[1]), route.send, route.receive)
        return grad.new_zeros(1, 1).expand(sum(route.send) + 1, grad.shape[1]), None, None


def _packed(x: Float[Tensor, "t d"], route: Route) -> Float[Tensor, "s d"]:
    """The vectors that are sent, in order."""
    return (x if len(x) else x.new_zeros(1, x.shape[1])).index_select(0, route.token)  # without tokens all places are free


def _room(route: Route, y: Tensor) -> Float[Tensor, "s+1 d"]:
    """Where what was sent comes back to; the row of zeros behind it is the "none" of slots."""
    rows = y.new_empty(sum(route.send) + 1, y.shape[1])
    rows[-1].zero_()
    return rows


def _summed(rows: Float[Tensor, "s+1 d"], route: Route) -> Float[Tensor, "t d"]:
    """Each token's sum of its vectors, which lie as they were sent."""
    if route.slots is not None:
        return bring_home(rows, route.token, route.slots, route.tokens)
    exact = rows[:-1] if rows.dtype == torch.float64 else rows[:-1].float()
    return bring_home(exact, route.token, None, route.tokens).to(rows.dtype)
