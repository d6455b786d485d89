"""Fully sharded sparse data parallelism: each step, copies of experts where they pay (Hecate, arXiv 2502.02581).

Every expert has one owner with its parameters, moments and gradient. Before a layer runs, copies go to the ranks that its
placement names (sparse all-gather); in the backward pass their gradients come back and are added up at the owner, in the order
of ranks (sparse reduce-scatter). Nothing is kept from step to step, so another placement is another list of moves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from moe.kernels.reference import ExpertWeights, Rows
from moe.model.experts import Experts
from moe.parallel.collectives import exchange_into
from moe.parallel.host_copy import index_on
from moe.parallel.placement import Hop, Placement, Trip, trip
from moe.shapes import Float


class Materialise:
    """The `gather` seam of one layer.

    again: copies are not kept for the backward pass but gathered once more in it (re-materialisation).
    home: of all layers of a model.
    """

    def __init__(self, group: Any, node: NDArray[np.int64], *, relay: bool, again: bool, home: Home | None = None) -> None:
        self.group, self.node, self.relay, self.again, self.home = group, node, relay, again, home or Home()
        self.rank = dist.get_rank(group)
        self.dtype: torch.dtype | None = None  # of the copies; None: the parameters'
        self.placement: Placement
        self.trip: Trip
        self.begun: Fetch | None = None  # of the call to come
        self.called: Fetch | None = None  # of the last call
        # around what copies cost where nothing hides it; True: in the backward pass
        self.clock: Callable[..., AbstractContextManager] = nullcontext

    def place(self, placement: Placement) -> None:
        """From now on the copies of `placement`."""
        self.placement, self.trip = placement, self._trip(placement)

    def begin(self, weights: ExpertWeights) -> None:
        """Send for the copies, which are waited for when they are asked for."""
        if self.begun is not None:  # of a forward pass that was given up
            self.begun.settle()
        self.begun = Fetch(self.group, weights.up.dtype if self.dtype is None else self.dtype, self.clock)
        self.begun.start(self.trip, weights)
        self.begun.ahead = bool(self.begun.trips)

    def begin_more(self, placement: Placement, weights: ExpertWeights) -> None:
        """Send for the copies that `placement` adds for the next call alone."""
        if self.begun is None:
            self.begin(weights)
        assert self.begun is not None
        owner, held = placement.owner, self.placement
        more = Placement(owner, placement.holds & (~held.holds | (np.arange(len(self.node))[:, None] == owner)))
        have = held.held(self.rank) + [e for e in more.held(self.rank) if owner[e] != self.rank]
        self.begun.start(self._trip(more), weights, [have.index(e) for e in placement.held(self.rank)])

    def pass_on(self) -> None:
        """Before tokens leave: copies that were sent for ahead begin their second hop."""
        if self.begun is not None and self.begun.ahead:
            self.begun.pass_on()

    def _trip(self, placement: Placement) -> Trip:
        return trip(placement, self.rank, self.node, relay=self.relay)

    def __call__(self, weights: ExpertWeights) -> ExpertWeights:
        if self.begun is None:
            self.begin(weights)
        self.called, self.begun = self.begun, None
        assert self.called is not None
        if not self.called.trips:
            return weights
        self.called.anew = self.again
        return ExpertWeights(*_Materialise.apply(weights.up, weights.down, self.called, self.home))

    def around(self, experts: Experts) -> Callable[..., Tensor]:
        """The experts' product, such that it keeps no copies for the backward pass."""
        grouped_mlp = experts.grouped_mlp

        def run(rows: Rows, weights: ExpertWeights, activation: str, keep: bool) -> Float[Tensor, "m d"]:
            fetch, self.called = self.called, None
            assert fetch is not None
            if not self.again or not fetch.trips or not torch.is_grad_enabled():
                return grouped_mlp(rows, weights, activation, keep)
            fetch.dtype = weights.up.dtype
            with torch.autograd.graph.saved_tensors_hooks(*_forgetting(weights, experts, fetch)):
                return grouped_mlp(rows, weights, activation, keep)

        return run


class Fetch:
    """What one rank's experts need in one call to become all that it holds: their trips, and what is still under way."""

    def __init__(self, group: Any, dtype: torch.dtype, clock: Callable[..., AbstractContextManager]) -> None:
        self.group, self.dtype, self.clock = group, dtype, clock
        self.trips: list[Trip] = []
        self.order: list[int] | None = None  # of own experts and those of each trip, as the rank holds them; None: as they came
        self.under_way: list[Journey] = []
        self.ahead = False  # whether the first trip is of copies that were foreseen
        self.anew = False  # whether they are made once more in the backward pass

    def start(self, leg: Trip, weights: ExpertWeights, order: list[int] | None = None) -> None:
        """Begin a trip, unless nobody goes on it."""
        if not leg.hops:
            return
        if self.trips:
            self.order = order
        self.trips.append(leg)
        with self.clock():
            self.under_way.append(Journey(leg, weights, self.dtype, self.group))

    def pass_on(self) -> None:
        """Begin the second hop of the first trip, if it has one."""
        with self.clock():
            self.under_way[0].pass_on()

    def again(self, weights: ExpertWeights) -> Float[Tensor, "h p"]:
        """All trips anew."""
        with self.clock(True):
            self.under_way = [Journey(leg, weights, self.dtype, self.group) for leg in self.trips]
            return self.finish()

    def settle(self) -> list[Tensor]:
        """Wait for what is under way."""
        started, self.under_way = self.under_way, []
        return [journey.end() for journey in started]

    def finish(self) -> Float[Tensor, "h p"]:
        """The experts that this rank holds, in the order in which it holds them."""
        brought = []
        for leg, rows in zip(self.trips, self.settle(), strict=True):
            rows = rows if leg.order is None else _picked(rows, leg.order)
            brought.append(rows[leg.own :] if brought else rows)
        rows = torch.cat(brought) if len(brought) > 1 else brought[0]
        return rows if self.order is None else _picked(rows, self.order)


class Journey:
    """A trip under way. Nobody else writes to its rows, one an expert, and what goes is kept until it is over."""

    def __init__(self, leg: Trip, weights: ExpertWeights, dtype: torch.dtype, group: Any) -> None:
        up, down = weights.up, weights.down
        self.group, self.hops, self.there = group, iter(leg.hops), leg.own
        width = up.shape[1:].numel()
        with torch.no_grad():
            self.rows = up.new_empty(leg.rows, width + down.shape[1:].numel(), dtype=dtype)
            self.rows[: leg.own, :width] = up.flatten(1)
            self.rows[: leg.own, width:] = down.flatten(1)
        self._go(next(self.hops))

    @torch.no_grad()
    def _go(self, hop: Hop) -> None:
        self.goes, begin = _picked(self.rows, hop.picks), self.there
        self.there += sum(hop.receive)
        self.work = exchange_into(self.rows[begin : self.there], self.goes, hop.send, hop.receive, self.group, "experts")

    def pass_on(self) -> bool:
        """Begin the next hop, once those before it are over; False if there is none."""
        hop = next(self.hops, None)
        if hop is not None:
            self.work.wait()
            self._go(hop)
        return hop is not None

    def end(self) -> Float[Tensor, "r p"]:
        """Own experts and all that came, once it is there."""
        while self.pass_on():
            pass
        self.work.wait()
        return self.rows


class Return:
    """Gradients of what a fetch brought, on their way to the owners; the adjoint of its trips, in two parts."""

    def __init__(self, fetch: Fetch, owned: tuple[Tensor, Tensor], grad: Float[Tensor, "h p"]) -> None:
        """Begin: what came by a second hop goes back to those who passed it on."""
        self.fetch, self.owned = fetch, owned
        self.under_way: list[
            tuple[Trip, Tensor, Any, Tensor | None, Tensor | None]
        ] = []  # …, gradients [r, p], work, what comes, what goes
        if fetch.order is not None:
            grad = torch.empty_like(grad).index_copy_(0, index_on(fetch.order, grad.device), grad)
        for leg in fetch.trips:
            kept = leg.own + leg.copies
            self._pass_back(leg, grad[:kept])
            grad = torch.cat([grad.new_zeros(leg.own, grad.shape[1]), grad[kept:]]) if len(fetch.trips) > 1 else grad

    def _pass_back(self, leg: Trip, grad: Float[Tensor, "h p"]) -> None:
        if leg.order is not None:
            grad = grad.new_zeros(leg.rows, grad.shape[1]).index_copy_(0, index_on(leg.order, grad.device), grad)
        if len(leg.hops) == 1:
            self.under_way.append((leg, grad, None, None, None))
            return
        hop, end = leg.hops[1], len(grad) - sum(leg.hops[1].receive)
        self.under_way.append((leg, grad[:end], *_returned(grad[end:], hop, self.fetch.group)))

    def set_out(self) -> None:
        """Those who passed experts on add up what came back, one rank after the other, and all is sent to the owners."""
        started, self.under_way = self.under_way, []
        for leg, grad, work, back, _ in started:
            if back is not None:
                work.wait()
                _add(grad, back, leg.hops[1])
            goes = grad[leg.own :].contiguous()
            self.under_way.append((leg, grad, *_returned(goes, leg.hops[0], self.fetch.group)))

    def settle(self) -> None:
        """Wait, and add to the owners' gradients."""
        for leg, _, work, back, _ in self.under_way:
            work.wait()
            assert back is not None
            for p, part in zip(self.owned, _parts(back, *(p.shape[1:] for p in self.owned)), strict=True):
                assert p.grad is not None
                _add(p.grad, part, leg.hops[0])
        self.under_way = []


def _returned(grad: Float[Tensor, "n p"], hop: Hop, group: Any) -> tuple[Any, Tensor, Tensor]:
    """Begin to return the gradients of what came with `hop`: work, what comes, what goes."""
    back = grad.new_empty(sum(hop.send), grad.shape[1])
    return exchange_into(back, grad, hop.receive, hop.send, group, "gradients"), back, grad


def _add(grad: Tensor, back: Tensor, hop: Hop) -> None:
    """Add what came from each rank, in their order and each expert once: the same sum on any machine."""
    picks = index_on(hop.picks, grad.device)
    for part, where in zip(back.split(hop.send), picks.split(hop.send), strict=True):
        if len(where):
            grad[where] += part


class Home:
    """Gradients of copies on their way to the owners, added to theirs when the next layer's set out, so that few are held at once."""

    def __init__(self) -> None:
        self.waiting: list[Return] = []  # until the gradients of tokens are back
        self.under_way: list[Return] = []
        self.meanwhile: Callable[[], None] = lambda: None  # done while the last ones travel

    def set_out(self) -> None:
        """Send what waits."""
        waiting, self.waiting = self.waiting, []
        for back in waiting:
            with back.fetch.clock(True):
                back.set_out()
            self.under_way.append(back)

    def settle(self) -> None:
        """Wait for all that is under way, and add it."""
        self.set_out()
        started, self.under_way = self.under_way, []
        for back in started:
            with back.fetch.clock(True):
                back.settle()

    def end(self) -> None:
        """`settle`, when the backward pass is over."""
        self.set_out()
        self.meanwhile()
        self.settle()


class _Materialise(torch.autograd.Function):
    """Own experts become all that this rank holds: strided views of one buffer with a row an expert."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, fetch: Fetch, home: Home) -> tuple[Tensor, Tensor]:
        ctx.owned, ctx.fetch, ctx.home = (up, down), fetch, home
        if not fetch.anew:
            ctx.save_for_backward(up)  # so that a block that is computed again comes as far as here on every rank
        with fetch.clock():
            return _parts(fetch.finish(), up.shape[1:], down.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _, (up, down), fetch, home = ctx.saved_tensors, ctx.owned, ctx.fetch, ctx.home
        if fetch.anew and not len(grads[0]):  # nothing is held here that would have asked, but others wait
            fetch.again(ExpertWeights(up, down))
        home.settle()
        with fetch.clock(True):
            held = torch.cat([grad.flatten(1) for grad in grads], 1).to(up.dtype)
            home.waiting.append(Return(fetch, ctx.owned, held))
        torch.autograd.Variable._execution_engine.queue_callback(home.end)  # type: ignore[attr-defined]
        of_up, of_down = _parts(held[: len(up)], up.shape[1:], down.shape[1:])
        # copies, because autograd may keep what it is given as the parameters' gradients, rows of others and all
        return of_up.clone(), of_down.clone(), None, None


def _picked(rows: Float[Tensor, "r p"], places: list[int]) -> Float[Tensor, "n p"]:
    return rows.index_select(0, index_on(places, rows.device))


def _parts(rows: Tensor, up: torch.Size, down: torch.Size) -> tuple[Tensor, Tensor]:
    return rows[:, : up.numel()].unflatten(1, up), rows[:, up.numel() :].unflatten(1, down)


def _forgetting(weights: ExpertWeights, experts: Experts, fetch: Fetch) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that keep a word in place of a gathered weight, and gather once more when it is asked for."""
    names = {weights.up.data_ptr(): "up", weights.down.data_ptr(): "down"}
    shapes = {"up": weights.up.shape, "down": weights.down.shape}
    fetched: dict[str, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        name = names.get(tensor.data_ptr())
        return name if name is not None and tensor.shape == shapes[name] else tensor

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, str):
            return kept
        if kept not in fetched:
            with torch.no_grad():
                all_held = fetch.again(ExpertWeights(experts.up, experts.down))
            fetched.update(zip(("up", "down"), _parts(all_held, shapes["up"][1:], shapes["down"][1:]), strict=True))
        return fetched.pop(kept)

    return pack, unpack
