"""Replica drift: what should be equal on several ranks is compared while a run goes on, by digests instead of numbers.

Every rank computes its copies by itself, so that a flipped bit, or a sum that one rank missed, stays on that rank without an
error and spoils the model from there on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from moe.errors import RankMismatch
from moe.parallel.fingerprint import name_ranks
from moe.parallel.host_copy import to_host
from moe.parallel.mesh import Mesh
from moe.shapes import Int

_AT_ONCE = 2**18  # numbers, which stay in a core's cache
_FACTOR = 6364136223846793005  # odd, so that no digest is lost in a product modulo 2^64
_BITS = {1: torch.int8, 2: torch.int16}


def check_replicas(mesh: Mesh, state: Mapping[str, Tensor], step: int) -> None:
    """Raise RankMismatch on every rank if copies of anything in a canonical state differ between ranks, be it by one bit.

    Copies are plain tensors, on all ranks, and parts of cut ones, on the ranks that have the same part. Every rank reads what it
    has copies of once, and a number a tensor travels.
    """
    if mesh.world == 1:
        return
    mine: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        if groups := _groups(tensor):
            mine[groups][name] = digest(_part(tensor)).to(mesh.device)
    same = torch.ones((), dtype=torch.bool, device=mesh.device)
    for groups, digests in mine.items():
        stacked = torch.stack(list(digests.values()))
        ends = torch.stack([~stacked, stacked])  # the largest complement is the complement of the smallest
        for group in groups:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        same &= (~ends[0] == ends[1]).all()
    if mesh.agree(not to_host(same)):
        _raise(mesh, state, {name: int(d) for digests in mine.values() for name, d in digests.items()}, step)


def digest(x: Tensor) -> Int[Tensor, ""]:
    """A number that any change of one element changes, and others but by chance; computed where `x` lies."""
    bits = x.detach().contiguous().view(-1)
    bits = bits.view(torch.int32) if x.element_size() >= 4 else bits.view(_BITS[x.element_size()]).int()
    factor = _factors(x.device)
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    for piece in bits.split(_AT_ONCE) if len(bits) else ():
        # sign and exponent come down first: a product sends every bit up, and round numbers have no others
        mixed = (piece >> 23).bitwise_xor_(piece).mul_(factor[: len(piece)])
        found = found * _FACTOR + torch.hash_tensor(mixed).view(torch.int64)
    return found


@cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers without a pattern, so that no digest of a single element is lost, and no two elements are exchanged unseen."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (_AT_ONCE,), dtype=torch.int32, generator=generator).bitwise_or_(1).to(device)


def _groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor is copied, one after the other; None for that of all ranks."""
    if not isinstance(tensor, DTensor):
        return (None,)
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, cut in enumerate(tensor.placements) if cut.is_replicate() and mesh.size(dim) > 1)


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _raise(mesh: Mesh, state: Mapping[str, Tensor], digests: dict[str, int], step: int) -> None:
    """Say which tensor differs first, and on which ranks; the fewer ones are taken to be wrong."""
    everyone = [json.loads(text) for text in mesh.gather(json.dumps({n: (_which(state[n]), d) for n, d in digests.items()}).encode())]
    differing = {}
    for name in digests:
        holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, theirs in enumerate(everyone):
            part, found = theirs[name]
            holders[part][found].append(rank)
        for copies in holders.values():
            if len(copies) > 1 and name not in differing:
                differing[name] = sorted(copies.values(), key=len)
    name, (odd, *others) = next(iter(differing.items()))
    more = f", and so do {len(differing) - 1} more tensors" if len(differing) > 1 else ""
    raise RankMismatch(
        f"replicas have drifted apart by step {step}: {name} on {name_ranks(odd)} differs from that on "
        f"{name_ranks(sorted(chain(*others)))}{more}; start again, and the run goes on from its newest checkpoint, which was checked"
    )


def _which(tensor: Tensor) -> str:
    """Which part of a cut tensor this rank has."""
    if not isinstance(tensor, DTensor):
        return ""
    place = tensor.device_mesh.get_coordinate() or []
    return str([at for at, cut in zip(place, tensor.placements, strict=True) if not cut.is_replicate()])
