"""Tensors of a canonical state, whole or sharded: which part of the whole is local, and how they are filled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe.errors import CheckpointError
from moe.model.initialise import initialise_
from moe.model.settings import Model


@torch.no_grad()
def draw(name: str, tensor: Tensor, settings: Model, seed: int) -> None:
    """Give the local part of a parameter its first value, on its device and without communication."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    initialise_(local, name, local_box(tensor), tensor.shape, settings, seed)


def local_box(tensor: Tensor) -> list[range]:
    """Indices, dimension by dimension, of the part of a tensor that this rank holds."""
    box = [range(n) for n in tensor.shape]
    if not isinstance(tensor, DTensor):
        return box
    here: Sequence[int] | None = tensor.device_mesh.get_coordinate()
    assert here is not None
    for placement, ranks, rank in zip(tensor.placements, tensor.device_mesh.shape, here, strict=True):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:  # a strided shard, for one, is no box
            raise NotImplementedError(f"no first weights are drawn for the placement {placement}; shard by Shard or Replicate alone")
        held = box[placement.dim]
        size = -(-len(held) // ranks)  # as torch.chunk: the last ranks may hold less, or nothing
        box[placement.dim] = held[rank * size : (rank + 1) * size]
    return box


def fill(name: str, target: Tensor, source: Tensor) -> None:
    """Copy a tensor, whole or sharded, into another of the same whole shape."""
    if target is source:
        return
    if target.shape != source.shape:
        raise CheckpointError(f"{name} has shape {tuple(source.shape)} in the state and {tuple(target.shape)} in the model")
    if isinstance(target, DTensor):
        if not isinstance(source, DTensor):
            source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(source)
    else:
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
