"""Re-sharding: experts change their owners between steps, and their parameters and moments go with them.

A layer keeps one tensor a parameter, with a row for each expert that this rank owns, in ascending order; only the number of rows
changes. One tensor for all layers with a slot an expert would keep its shape, but engines, optimizers, norms and kernels would
all meet another kind of parameter, and rows of a layer that do not lie together. Here they see what they saw before: the
parameter objects stay, so no optimizer is built again, and since every rank owns as many experts in all, none needs more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe.parallel import OWNERS
from moe.parallel.collectives import exchange, gather_ranks, sum_ranks, total_over_ranks
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.foresight import Planner
from moe.parallel.host_copy import index_on, to_device, to_host
from moe.parallel.placement import even, owned
from moe.parallel.price import unseen
from moe.shapes import Float
from moe.tables import entry

Owner = NDArray[np.int64]  # [layers, E]


class Owners:
    """Who owns the experts of each layer, alike on every rank of the job.

    All groups of expert ranks have the same owners, since gradients are summed between ranks that own the same experts.
    """

    def __init__(self, planner: Planner, model: nn.Module, grid: DeviceMesh, machine_ranks: int) -> None:
        self.planner, self.group = planner, planner.group
        self.groups = [grid.get_group(axis) for axis in ("shard", "replicate")]  # of ranks with the same experts
        of = {id(p): name for name, p in model.named_parameters()}
        self.names = [[of[id(p)] for p in layer.experts.parameters()] for layer in planner.layers]
        self.rule = entry(OWNERS, planner.copies.owners, "owners")
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.node = np.arange(self.ranks) // machine_ranks  # of the first group: those of others may lie otherwise
        self.even = np.tile(even(planner.layers[0].num_experts, self.ranks).owner, (len(self.names), 1))

    @property
    def now(self) -> Owner:
        return np.stack([layer.dispatcher.placement.owner for layer in self.planner.layers])

    @property
    def moved(self) -> bool:
        return not np.array_equal(self.now, self.even)

    def due(self, steps: int) -> bool:
        """Whether owners are chosen anew after so many applied steps."""
        return steps % self.planner.copies.owners_every == 0

    def chosen(self) -> Owner:
        """The owners that the mean loads of the last steps ask for; every rank must call it."""
        seen = self.planner.seen
        mean = to_device(np.sum(seen, axis=0) // len(seen), self.planner.layers[0].dispatcher.device)
        count = 1
        for group in self.groups:
            sum_ranks(mean, group)
            count *= dist.get_world_size(group)
        load = to_host(mean).numpy() // count
        return self.rule(load, self.now, self.node, self._hidden(load))

    def _hidden(self, load: NDArray[np.int64]) -> int:
        """Experts of any layer that can be fetched unseen."""
        copies = self.planner.copies
        if copies.policy == "even":
            return 0
        if copies.hidden is not None:
            return copies.hidden
        return min(unseen(price, of_layer, self.node) for price, of_layer in zip(self.planner.prices, load, strict=True))

    def fits(self, owner: Any) -> bool:
        """Whether `owner`, read from a file, could be the owners of this job."""
        table = np.array(owner) if isinstance(owner, list) else np.zeros(0)
        if table.shape != self.even.shape or table.dtype != np.int64 or table.min() < 0 or table.max() >= self.ranks:
            return False
        return len(set(np.bincount(table.ravel(), minlength=self.ranks).tolist())) == 1

    def place(self, owner: Owner) -> None:
        """From now on tokens and copies go by `owner`, and nobody holds copies."""
        self.planner.answer = None
        for layer, of_layer in zip(self.planner.layers, owner, strict=True):
            placement = owned(of_layer, self.ranks)
            layer.dispatcher.place(placement)
            layer.experts.gather.place(placement)

    def carry(self, tensors: dict[str, Tensor], before: Owner, after: Owner) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and the rows of it that this rank owns `after`, out of those that the ranks had `before`.

        One exchange, of the rows that change their owner. `tensors` is emptied on the way, so that little exists twice.
        """
        layers, ranks = range(len(self.names)), range(self.ranks)
        out = [[np.flatnonzero(after[n][before[n] == self.rank] == to) for n in layers] for to in ranks]  # rows of what is here
        come = [[np.flatnonzero((after[n] == self.rank) & (before[n] == of)) for n in layers] for of in ranks]  # experts
        everything = [(n, name) for n in layers for name in self.names[n]]
        travels = [(rank, n, name) for rank in ranks if rank != self.rank for n, name in everything]
        sent = torch.cat([tensors[name].detach()[index_on(out[to][n], tensors[name].device)].flatten() for to, n, name in travels])
        sizes = {name: tensors[name].shape[1:].numel() for _, name in everything}
        send, receive = [0] * self.ranks, [0] * self.ranks
        for rank, n, name in travels:
            send[rank] += len(out[rank][n]) * sizes[name]
            receive[rank] += len(come[rank][n]) * sizes[name]
        came = exchange(sent, send, receive, self.group, "owners")
        pieces = came.split([len(come[of][n]) * sizes[name] for of, n, name in travels])
        arrived = {(of, name): piece for (of, _, name), piece in zip(travels, pieces, strict=True)}
        for n, name in everything:
            old, owns = tensors.pop(name).detach(), after[n] == self.rank
            new, place = old.new_empty(int(owns.sum()), *old.shape[1:]), np.cumsum(owns) - 1
            for of in ranks:
                rows = old[index_on(out[of][n], old.device)] if of == self.rank else arrived[of, name].view(-1, *old.shape[1:])
                new[index_on(place[come[of][n]], new.device)] = rows
            yield name, new


def of_all_experts(summary: Float[Tensor, "n m"], dispatcher: AllToAll) -> Float[Tensor, "E m"]:
    """Rows of each rank's own experts brought together in the order of experts, with their gradient."""
    owner, ranks = dispatcher.placement.owner, dispatcher.ranks
    if np.array_equal(owner, even(len(owner), ranks).owner):
        return gather_ranks(summary, dispatcher.group)
    whole = summary.new_zeros(len(owner), *summary.shape[1:])
    own = index_on(np.flatnonzero(owner == dispatcher.rank), summary.device)
    return total_over_ranks(whole.index_copy(0, own, summary), dispatcher.group)
