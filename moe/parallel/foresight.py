"""Where every layer's experts will be, alike on every rank: foreseen before a step from the last loads, or chosen once they are known."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe.errors import RankMismatch
from moe.kernels.reference import ExpertWeights
from moe.model.moe_layer import MoELayer, Report
from moe.parallel import POLICIES
from moe.parallel.collectives import begin_gathering_counts, gather_counts
from moe.parallel.host_copy import Pending, begin_to_host, to_device, to_host
from moe.parallel.layout import Copies, Hardware
from moe.parallel.placement import Placement, owned
from moe.parallel.policies import Question, add_where_it_pays
from moe.parallel.price import Price, unseen
from moe.tables import entry


class Answer(NamedTuple):
    """Ranks' shares of the placements of a step, each behind a digest of the owners: bytes on their way to the host."""

    everyone: Pending  # uint8 [ranks, bytes]
    mine: Tensor  # uint8 [bytes], on the host


class Planner:
    """Chooses every layer's placement from loads that all ranks of the group know, and so alike on every rank.

    Ahead, for the next step, from the loads of the last ones: before the first step that was seen experts stay with their owners. They
    travel during the backward pass, and policies are asked while its last gradients do.
    After the routers, for one call, from its own loads: the same call run again is given the same placement.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], group: Any, copies: Copies, hardware: Hardware, compute: torch.dtype, calls: int
    ) -> None:
        sparse: list[Any] = [block for block in blocks if getattr(block, "moe", None) is not None]
        self.layers: list[Any] = [block.moe for block in sparse]
        self.group, self.copies, self.calls = group, copies, calls  # calls of a layer in a step, each of which fetches copies
        self.policy = entry(POLICIES, copies.policy, "policy")
        self.seconds = np.zeros(len(self.layers))  # that policies have taken for each layer
        self.foreseen: NDArray[np.int64] | None = None  # [layers, ranks, E]: the loads that the placements of this step are for
        self.more = add_where_it_pays  # asked for the copies of one call beside those that were foreseen
        self.prices = [_price(block, block.moe, copies, hardware, compute) for block in sparse]
        self.seen: deque[NDArray[np.int64]] = deque(maxlen=copies.window)  # [layers, ranks, E] of each step that was applied
        self.heard: NDArray[np.int64] | None = None
        self.hearing: Pending | None = None  # loads of all ranks [ranks, layers, E] on their way to the host
        self.answer: tuple[NDArray[np.int64], Answer] | None = None  # to the loads it is for; other owners void it, on all ranks alike
        self.held: list[NDArray[np.bool_]] = [layer.dispatcher.placement.holds for layer in self.layers]  # [ranks, E]: foreseen last
        home = getattr(self.layers[0].experts.gather, "home", None) if self.layers else None
        if home is not None:
            home.meanwhile = self.think
        if copies.chosen != "ahead":
            for number, layer in enumerate(self.layers):
                layer.dispatcher.ask, layer.dispatcher.agreed = partial(self.choose, number), partial(_fetch, layer)

    def adopt(self) -> None:
        """Place every layer's experts for the step to come."""
        if not self.seen or self.copies.chosen == "after":
            return
        self.foreseen = load = self._foresee([*self.seen])
        for number, (layer, holds) in enumerate(zip(self.layers, self.shared(load), strict=True)):
            before, self.held[number] = layer.dispatcher.placement, holds
            placement = Placement(before.owner, holds)
            if placement.digest != before.digest:
                layer.dispatcher.place(placement)
                layer.experts.gather.place(placement)

    def shared(self, load: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
        """Who is to hold what of each layer at `load` [layers, ranks, E], which one rank has chosen for all.

        So the time that a policy takes is divided by the ranks, and all of them have the same answer. Raises RankMismatch if they
        differ in owners: they would die without a word.
        """
        to: Any = self.layers[0].dispatcher
        answer, self.answer = self.answer, None
        told = answer[1] if answer is not None and np.array_equal(answer[0], load) else self._tell(load)
        everyone, packed, seal = told.everyone.read().numpy(), told.mine.numpy(), self._owners()
        if (astray := np.flatnonzero((everyone[:, : len(seal)] != packed[: len(seal)]).any(1))).size:
            raise RankMismatch(
                f"rank {astray[0]} of the expert group has other owners of experts than rank {to.rank}; start all ranks anew with the "
                f"same recipe and the same versions of everything"
            )
        shape = (-(-len(self.layers) // to.ranks), to.ranks, to.num_experts)
        holds = [np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(np.bool_) for bits in everyone[:, len(seal) :]]
        return [holds[number % to.ranks][number // to.ranks] for number in range(len(self.layers))]

    def _tell(self, load: NDArray[np.int64]) -> Answer:
        """Choose this rank's share of the placements for `load`, and begin to exchange the ranks' shares."""
        mine = np.packbits(self._mine(load))
        packed = torch.from_numpy(np.concatenate([np.frombuffer(self._owners(), dtype=np.uint8), mine]))
        sent = to_device(packed, self.layers[0].dispatcher.device)
        work, everyone = begin_gathering_counts(sent, self.group)
        return Answer(begin_to_host(everyone, after=work, reads=sent), packed)

    def _mine(self, load: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Who is to hold what of every layer that is this rank's to choose, and nobody of a rest [layers / ranks, ranks, E]."""
        to: Any = self.layers[0].dispatcher
        mine = np.zeros((-(-len(self.layers) // to.ranks), to.ranks, to.num_experts), dtype=np.bool_)
        for place, number in enumerate(range(to.rank, len(self.layers), to.ranks)):
            began = time.perf_counter()
            mine[place] = self.policy(self.question(number, load[number])).holds
            self.seconds[number] += time.perf_counter() - began
        return mine

    def _owners(self) -> bytes:
        owners = np.stack([layer.dispatcher.placement.owner for layer in self.layers])
        return hashlib.blake2b(owners.tobytes(), digest_size=8).digest()

    def _foresee(self, seen: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Of one call, the mean of as many of the last steps as are looked at."""
        last = seen[-self.copies.window :]
        return np.sum(last, axis=0) // (len(last) * self.calls)

    def choose(self, number: int, mine: Tensor) -> Placement:
        """The placement of one call of the layer of this number, in which this rank has `mine` [E] rows for each expert."""
        layer = self.layers[number]
        load = to_host(gather_counts(mine, self.group)).numpy()  # a wait a call, which asking after the routers implies
        question, ahead, began = self.question(number, load), layer.dispatcher.placement, time.perf_counter()
        placement = self.policy(question._replace(late=True)) if self.copies.chosen == "after" else self.more(question, ahead.holds)
        self.seconds[number] += time.perf_counter() - began
        return ahead if np.array_equal(placement.holds, ahead.holds) else placement

    def question(self, number: int, load: NDArray[np.int64]) -> Question:
        """What a policy may know of the layer of this number."""
        dispatcher, prices = self.layers[number].dispatcher, self.prices[number]
        hidden = unseen(prices, load, dispatcher.node) if self.copies.hidden is None else self.copies.hidden
        owner, ranks = dispatcher.placement.owner, len(dispatcher.node)
        holds = self.held[number] | owned(owner, ranks).holds  # owners may have changed since
        return Question(load, owner, dispatcher.node, self.copies.copies, hidden, holds, prices)

    def listen(self, reports: Sequence[Report]) -> None:
        """Before the last backward pass of a step: begin to tell the other ranks what this one asked for, and to hear of theirs."""
        if self.hearing is not None:  # of a step that was given up
            self.last()
        mine = torch.stack([report.load for report in reports])
        work, everyone = begin_gathering_counts(mine, self.group)
        self.hearing, self.answer = begin_to_host(everyone, after=work, reads=mine), None

    def last(self) -> NDArray[np.int64]:
        """What ranks asked for in the last step, applied or not [layers, ranks, E]."""
        if self.hearing is not None:
            everyone, self.hearing = self.hearing, None
            self.heard = everyone.read().transpose(0, 1).numpy()
        assert self.heard is not None
        return self.heard

    def think(self) -> None:
        """Choose this rank's share of the placements for the step to come, if this one will be applied, and begin to exchange it.

        Waits until the loads are here, which is long before the backward pass ends.
        """
        if self.hearing is None or self.copies.chosen == "after":
            return
        load = self._foresee([*self.seen, self.last()])
        self.answer = load, self._tell(load)

    def observe(self) -> None:
        """Remember what was asked for: the step was applied."""
        self.seen.append(self.last())

    def state(self) -> dict[str, Any]:
        """What to remember over a stop, as JSON."""
        return {"seen": [step.tolist() for step in self.seen], "held": [holds.tolist() for holds in self.held]}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`, unless it is of another number of ranks or experts, or empty."""
        if not state:
            return
        shape = len(self.layers), self.layers[0].dispatcher.ranks, self.layers[0].num_experts
        steps, held = [np.array(step, dtype=np.int64) for step in state["seen"]], np.array(state["held"], dtype=np.bool_)
        self.answer = None
        if held.shape == shape:
            self.held = list(held)
        self.seen = deque((step for step in steps if step.shape == shape), self.copies.window)


def _fetch(layer: Any, placement: Placement) -> None:
    """Send for the copies of a call beside those that were foreseen."""
    layer.experts.gather.begin_more(placement, ExpertWeights(layer.experts.up, layer.experts.down))


def _price(block: nn.Module, layer: MoELayer, copies: Copies, hardware: Hardware, compute: torch.dtype) -> Price:
    """Two operations for each parameter that a vector meets; attention's scores are left out."""
    experts = layer.experts
    of_one = experts.up[:1].numel() + experts.down[:1].numel()
    of_experts = sum(p.numel() for p in experts.parameters())
    beside = sum(p.numel() for p in block.parameters()) - of_experts
    rows = getattr(layer.router, "k", 1)  # of a token
    master = max(compute.itemsize, torch.float32.itemsize)
    return Price(
        row_bytes=experts.down.shape[1] * compute.itemsize,
        expert_bytes=of_one * compute.itemsize,
        gradient_bytes=of_one * master,
        row_ps=round(2 * of_one / hardware.tflops),
        beside_ps=round(2 * beside / rows / hardware.tflops),
        between=round(hardware.between_gbit * 125_000_000),
        within=round(hardware.within_gbit * 125_000_000),
        latency_ns=round(hardware.latency_us * 1000),
        relay=copies.relay,
        again=copies.rematerialise or bool(getattr(block, "recompute", False)),  # a recomputed block fetches again too
    )
