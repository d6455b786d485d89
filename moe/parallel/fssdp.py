"""Fully sharded sparse data parallelism: each step, copies of experts where they pay (Hecate, arXiv 2502.02581).

Every expert has one owner with its parameters, moments and gradient. Before a layer runs, copies go to the ranks that its
placement names (sparse all-gather); in the backward pass their gradients come back and are added up at the owner, in the order
of ranks (sparse reduce-scatter). Nothing is kept from step to step, so another placement is another list of moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from moe.kernels.reference import ExpertWeights, Rows
from moe.model.moe_layer import MoELayer, Report
from moe.parallel import POLICIES
from moe.parallel.collectives import exchange, gather_ranks
from moe.parallel.layout import Copies
from moe.parallel.placement import Placement, Trip, trip
from moe.parallel.policies import Question
from moe.shapes import Float
from moe.tables import entry


class Materialise:
    """The `gather` seam of one layer.

    again: copies are not kept for the backward pass but gathered once more in it (re-materialisation).
    """

    def __init__(self, group: Any, node: NDArray[np.int64], *, relay: bool, again: bool) -> None:
        self.group, self.node, self.relay, self.again = group, node, relay, again
        self.rank = dist.get_rank(group)
        self.dtype: torch.dtype | None = None  # of the copies; None: the parameters'
        self.trip: Trip

    def place(self, placement: Placement) -> None:
        """From now on the copies of `placement`."""
        self.trip = trip(placement, self.rank, self.node, relay=self.relay)

    def __call__(self, weights: ExpertWeights) -> ExpertWeights:
        dtype = weights.up.dtype if self.dtype is None else self.dtype
        return ExpertWeights(*_Gather.apply(weights.up, weights.down, self.trip, self.group, dtype))

    def around(self, grouped_mlp: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`grouped_mlp` that keeps no copies for the backward pass."""

        def run(rows: Rows, weights: ExpertWeights, activation: str, keep: bool) -> Float[Tensor, "m d"]:
            if not self.again or not torch.is_grad_enabled():
                return grouped_mlp(rows, weights, activation, keep)
            with torch.autograd.graph.saved_tensors_hooks(*_forgetting(weights)):
                return grouped_mlp(rows, weights, activation, keep)

        return run


def _forgetting(weights: ExpertWeights) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that keep a word in place of a gathered weight, and gather once more when it is asked for."""
    node = weights.up.grad_fn
    names = {weights.up.data_ptr(): "up", weights.down.data_ptr(): "down"}
    shapes = weights.up.shape, weights.down.shape
    fetched: dict[str, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        name = names.get(tensor.data_ptr())
        return name if name is not None and tensor.shape in shapes else tensor

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, str):
            return kept
        if kept not in fetched:
            assert node is not None
            with torch.no_grad():
                fetched.update(zip(("up", "down"), gathered(*node.saved(), *node.way), strict=True))  # type: ignore[attr-defined]
        return fetched.pop(kept)

    return pack, unpack


def gathered(
    up: Float[Tensor, "n g f d"], down: Float[Tensor, "n d f"], trip: Trip, group: Any, dtype: torch.dtype
) -> tuple[Float[Tensor, "h g f d"], Float[Tensor, "h d f"]]:
    """This rank's own experts and the copies that it holds, as strided views of one buffer with a row an expert."""
    width = up[0].numel() if len(up) else up.shape[1:].numel()
    rows = up.new_empty(trip.rows, width + down.shape[1:].numel(), dtype=dtype)
    rows[: len(up), :width] = up.flatten(1)
    rows[: len(up), width:] = down.flatten(1)
    end = len(up)
    for hop in trip.hops:
        came = sum(hop.receive)
        rows[end : end + came] = exchange(rows[hop.picks], hop.send, hop.receive, group)
        end += came
    if trip.order is not None:
        rows = rows[trip.order]
    return rows[:, :width].unflatten(1, up.shape[1:]), rows[:, width:].unflatten(1, down.shape[1:])


def returned(grad_up: Tensor, grad_down: Tensor, own: int, trip: Trip, group: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adjoint of `gathered`: the gradients of this rank's own experts, summed over all their holders in `dtype`."""
    width = grad_up.shape[1:].numel()
    rows = grad_up.new_zeros(trip.rows, width + grad_down.shape[1:].numel(), dtype=dtype)
    place = slice(None) if trip.order is None else torch.tensor(trip.order, device=rows.device)
    rows[place, :width] = grad_up.flatten(1).to(dtype)
    rows[place, width:] = grad_down.flatten(1).to(dtype)
    end = trip.rows
    for hop in reversed(trip.hops):
        start = end - sum(hop.receive)
        back = exchange(rows[start:end], hop.receive, hop.send, group)
        picks = torch.tensor(hop.picks, dtype=torch.int64, device=rows.device)
        for part, where in zip(back.split(hop.send), picks.split(hop.send), strict=True):
            rows[where] += part  # one rank after the other, each with an expert once: the same sum on any machine
        end = start
    return rows[:own, :width].unflatten(1, grad_up.shape[1:]), rows[:own, width:].unflatten(1, grad_down.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, trip: Trip, group: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(up, down)
        ctx.saved, ctx.way = lambda: ctx.saved_tensors, (trip, group, dtype)
        return gathered(up, down, trip, group, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        up, _ = ctx.saved_tensors
        trip, group, _ = ctx.way
        return *returned(grads[0], grads[1], len(up), trip, group, up.dtype), None, None, None


class Planner:
    """Chooses the next step's placement of every layer from the loads of the last ones, alike on every rank of the group.

    After the steps that a policy has not seen yet it has no say: experts stay with their owners.
    """

    def __init__(self, layers: Sequence[MoELayer], group: Any, copies: Copies) -> None:
        self.layers: Sequence[Any] = layers
        self.group, self.copies = group, copies
        self.policy = entry(POLICIES, copies.policy, "policy")
        self.seen: deque[NDArray[np.int64]] = deque(maxlen=copies.window)  # [layers, ranks, E] of each step

    def adopt(self) -> None:
        """Place every layer's experts for the step to come."""
        if not self.seen:
            return
        load = np.sum(self.seen, axis=0) // len(self.seen)
        for number, layer in enumerate(self.layers):
            before = layer.dispatcher.placement
            question = Question(load[number], before.owner, layer.dispatcher.node, self.copies.copies, self.copies.hidden)
            placement = self.policy(question)
            if placement.digest != before.digest:
                layer.dispatcher.place(placement)
                layer.experts.gather.place(placement)

    def observe(self, reports: Sequence[Report]) -> None:
        """Remember what this rank asked for in a step that was applied, and hear of the others."""
        mine = torch.stack([report.load for report in reports])
        everyone = gather_ranks(mine, self.group).view(-1, *mine.shape)
        self.seen.append(everyone.transpose(0, 1).cpu().numpy())

    def state(self) -> list[Any]:
        """What to remember over a stop, as JSON."""
        return [step.tolist() for step in self.seen]

    def resume(self, state: list[Any]) -> None:
        """Go on from `state`, unless it is of another number of ranks or experts."""
        ranks, experts = self.layers[0].dispatcher.ranks, self.layers[0].num_experts
        steps = [np.array(step, dtype=np.int64) for step in state]
        self.seen = deque((s for s in steps if s.shape == (len(self.layers), ranks, experts)), self.copies.window)
