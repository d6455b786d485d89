"""The only file that changes a model: it fills the seams, and switches on recomputation and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moe.kernels.reference import ExpertWeights
from moe.model.experts import Experts
from moe.model.moe_layer import MoELayer
from moe.model.side_stream import SideStream
from moe.model.transformer import Transformer
from moe.parallel.collectives import total_over_ranks
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.fssdp import Home, Materialise
from moe.parallel.mesh import Mesh
from moe.parallel.overlap import Overlap
from moe.parallel.reshard import of_all_experts


def parallelize(model: Transformer, mesh: Mesh, *, recompute: str, compile: bool) -> DeviceMesh | None:
    """Make a model that is alone part of a job: losses that look at the global batch see all of it, experts are shared out.

    What is compiled, and what is not, `Block` and `MoELayer` say in `compile_regions`. Returns the mesh of experts, if they are.
    """
    if mesh.world > 1:
        # a group of its own: the order of its sums among those of the gradients then does not matter
        group: Any = mesh.group("routers", [list(range(mesh.world))])
        for router in model.routers().values():
            router.total = partial(total_over_ranks, group=group)
    blocks: Any = model.layers
    for block in blocks:
        block.recompute = recompute == "full"
        for part in block.modules():
            if isinstance(part, Experts):
                part.keep = recompute != "experts"
        if compile:
            block.compile_regions()
    if mesh.expert_ranks == 1:
        return None
    grid = mesh.experts()
    side = SideStream() if mesh.device.type == "cuda" else None
    for number, block in enumerate(blocks):
        if block.moe is not None:
            share_out(block.moe, number, grid, mesh)
            block.moe.beside = side
            if mesh.overlap > 1:
                block.moe.pipeline = Overlap(mesh.overlap)
    if mesh.copies is not None and mesh.copies.active:
        # another group than the tokens': expert replicas are sent while tokens are
        group = mesh.group("replicas of experts", torch.arange(mesh.world).view(-1, mesh.expert_ranks).tolist())
        home = Home()
        for block in blocks:
            if block.moe is not None:
                _materialise(block, group, mesh, home)
    return grid


def held(grid: DeviceMesh, experts: int) -> range:
    """The experts that this rank holds."""
    number = experts // grid["expert"].size()
    first = grid.get_local_rank("expert") * number
    return range(first, first + number)


def share_out(layer: MoELayer, number: int, grid: DeviceMesh, mesh: Mesh) -> None:
    """Leave a layer, the model's `number`-th, its share of the experts, whose values are still to be set."""
    group = grid.get_group("expert")
    here = len(held(grid, layer.num_experts))
    layer.dispatcher = AllToAll(number, layer.num_experts, group, how=mesh.exchange, room=mesh.exchange_room, device=mesh.device)
    layer.dispatcher.exact = True  # but where an engine looks for what found no room
    layer.gather_summary = partial(of_all_experts, dispatcher=layer.dispatcher)
    for name, p in list(layer.experts.named_parameters()):
        if len(p) == layer.num_experts:  # not yet: layers may share their experts
            setattr(layer.experts, name, nn.Parameter(p.new_empty(here, *p.shape[1:])))


def _materialise(block: Any, group: Any, mesh: Mesh, home: Home) -> None:
    """Let a block's experts be copied to where they pay, sent for before its attention."""
    layer, copies = block.moe, mesh.copies
    assert copies is not None
    node = np.array([rank // mesh.machine_ranks for rank in dist.get_process_group_ranks(group)])
    relay = copies.relay and len(set(node.tolist())) > 1
    # a block that is computed again fetches its copies again by itself, and keeps less than these hooks would let it
    again = copies.rematerialise and not block.recompute
    gather = Materialise(group, node, relay=relay, again=again, home=home)
    layer.dispatcher.node = node
    gather.place(layer.dispatcher.placement)
    layer.dispatcher.leaving, layer.dispatcher.returned = gather.pass_on, home.set_out
    layer.experts.gather = gather
    if again:
        layer.experts.grouped_mlp = gather.around(layer.experts)
    block.register_forward_pre_hook(lambda *_: gather.begin(ExpertWeights(layer.experts.up, layer.experts.down)))
