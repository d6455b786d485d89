"""The ranks of a job: who this one is, its device, and the groups through which ranks agree.

A process group always exists, so no caller asks whether it is alone: one process is a world of one rank.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe import errors
from moe.errors import ConfigError, MoeError
from moe.kernels.memory import expandable_segments
from moe.parallel import deadline
from moe.parallel.layout import Copies, Hardware, Layout

_ordinal = itertools.count()  # of first_does calls in this process: their keys in the store


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    replicas: int
    timeout: timedelta
    control: Any  # a process group, gloo on every device; None alone
    expert_ranks: int = 1
    exchange: str = "rows"
    exchange_room: float = 2.0
    overlap: int = 1
    copies: Copies | None = None
    hardware: Hardware | None = None
    machine_ranks: int = 1_000_000  # ranks on one machine
    # Process groups made so far, by purpose and ranks; meshes of other layouts in the same job share them.
    made: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    @property
    def of_groups(self) -> timedelta:
        """The timeout of a process group of this device; of waits it is `timeout`."""
        return deadline.of_groups(self.timeout, self.device)

    def dense(self) -> DeviceMesh:
        """The device mesh of parameters: ("shard",), or ("replicate", "shard") with several replicas."""
        if self.replicas == 1:  # sums of figures share this group: they run before and after everything that is sharded
            return DeviceMesh.from_group(dist.distributed_c10d._get_default_group(), self.device.type, mesh_dim_names=("shard",))
        return self._grid((self.replicas, self.world // self.replicas), ("replicate", "shard"), "dense")

    def experts(self) -> DeviceMesh:
        """The device mesh of experts over the same ranks: "expert" ranks hold different ones, "shard" and "replicate" the same."""
        shards = self.world // self.replicas // self.expert_ranks
        return self._grid((self.replicas, shards, self.expert_ranks), ("replicate", "shard", "expert"), "experts")

    def _grid(self, shape: tuple[int, ...], names: tuple[str, ...], of: str) -> DeviceMesh:
        ranks = torch.arange(self.world).view(shape)
        groups = []
        for axis, name in enumerate(names):
            # FSDP issues the all-reduces over replicas of dense parameters and of experts in the same order on every rank
            purpose = name if name == "replicate" else f"{name} of {of}"
            groups.append(self.group(purpose, ranks.movedim(axis, -1).reshape(-1, shape[axis]).tolist()))
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    def group(self, purpose: str, ranks: list[list[int]]) -> Any:
        """This rank's group where the job's ranks are split into the lists `ranks`, connected; every rank must ask for it.

        The first call makes it and later ones return it. Collectives of one group must be issued in the same order on all of
        its ranks, and run one after the other: what is to overlap, or has no order among the rest, asks with another purpose.
        Groups of one rank carry nothing, so that all purposes share one.
        """
        purpose = "alone" if len(ranks[0]) == 1 else purpose
        key = purpose, repr(ranks)
        if key not in self.made:
            if self.device.type == "cuda" and dist.distributed_c10d._get_default_group().bound_device_id is not None:
                # one call of NCCL for all lists, where new_group takes one for each
                made = dist.split_group(split_ranks=ranks, timeout=self.of_groups, group_desc=purpose)
            else:
                made, _ = dist.new_subgroups_by_enumeration(ranks, timeout=self.of_groups, group_desc=purpose)
            if len(ranks[0]) > 1:
                _prepare(made, self.of_groups, self.device)
            self.made[key] = made
        return self.made[key]

    def agree(self, flag: int) -> int:
        """The largest flag of all ranks, on every rank; through the host, so it does not wait for a GPU's queue."""
        if self.world == 1:
            return int(flag)
        x = torch.tensor(int(flag), dtype=torch.int64)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.control)
        return int(x)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over ranks, on every rank, as a new tensor without a gradient."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x, group=self.control if x.device.type == "cpu" else None)
        return x

    def gather(self, data: bytes) -> list[bytes]:
        """Each rank's bytes, by rank, on every rank; lengths may differ."""
        if self.world == 1:
            return [data]
        longest = self.agree(len(data))
        mine = torch.zeros(8 + longest, dtype=torch.uint8)
        mine[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        mine[8 : 8 + len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine, group=self.control)
        rows = [bytes(row.numpy()) for row in everyone]
        return [row[8 : 8 + int.from_bytes(row[:8], "little")] for row in rows]

    def first_does(self, action: Callable[[], object]) -> None:
        """Run `action` on the first rank while the others wait, however long; its error is raised on all of them."""
        if self.world == 1:
            action()
            return
        store, key = dist.distributed_c10d._get_default_store(), f"moe/first/{next(_ordinal)}"
        if self.first:
            try:
                action()
            except BaseException as error:
                store.set(key, json.dumps([type(error).__name__, str(error)]))
                raise
            store.set(key, "null")
            return
        pause = 0.005
        while not store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if failure := json.loads(store.get(key)):
            raise _same_error(*failure)


def start(layout: Layout) -> Mesh:
    """Join the job that the environment describes (torchrun's variables), or be a world of one rank.

    A process group that exists already is adopted. Every group gets its timeout and has exchanged a message on return.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device, timeout = _device(layout, local_rank), timedelta(seconds=layout.timeout)
    if device.type == "cuda":
        expandable_segments()
    if not dist.is_initialized():
        _init(device, timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    control = None
    if world > 1:
        _prepare(None, deadline.of_groups(timeout, device), device)
        control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
        _prepare(control, timeout, torch.device("cpu"))
        deadline.arm(timeout)
    machine = layout.machine_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shape = (layout.expert_ranks, layout.exchange, layout.exchange_room, layout.overlap, layout.copies, layout.hardware, machine)
    return Mesh(rank, world, local_rank, device, layout.replicas, timeout, control, *shape)


def _same_error(name: str, message: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MoeError):
        return kind(message)
    return RuntimeError(f"rank 0 failed: {name}: {message}")


def _device(layout: Layout, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if layout.device != "cpu" else 0
    if layout.device == "cpu" or (layout.device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ConfigError("parallel.device=cuda, but torch sees no GPU here; use parallel.device=cpu or auto")
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU, {count} are visible; start {count} ranks or use parallel.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _init(device: torch.device, timeout: timedelta) -> None:
    """Make the default group: gloo, and NCCL beside it for the tensors of a GPU."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", "1")):  # one machine: nothing listens beyond it
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=_store(rank, world, timeout),
        rank=rank,
        world_size=world,
        timeout=deadline.of_groups(timeout, device),
        device_id=device if gpu else None,
    )


def _store(rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where ranks find each other."""
    if world == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # the agent's store outlives a restart and still holds the addresses of the dead; the prefix hides them
        store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
        return dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if world != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    port, listener = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        bound = socket.create_server(("127.0.0.1", port), backlog=max(128, world))
        listener = bound.detach()
    return dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener)


def _prepare(group: Any, timeout: timedelta, device: torch.device) -> None:
    """Give a group a timeout, and connect its pairs now: gloo would do it in the first collective."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)
    dist.all_reduce(torch.ones(1, device=device), group=group)
