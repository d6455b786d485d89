"""The only file that changes a model: it fills the seams, and switches on recomputation and compilation."""

from __future__ import annotations

from functools import partial

from moe.model.transformer import Transformer
from torch import distributed as dist
from torch import nn

from moe.parallel.collectives import total_over_ranks


def parallelize(model: Transformer, *, recompute: str, compile: bool) -> None:
    """Make a model that is alone part of a job: losses that look at the global batch see all of it.

    Compiled are attention and the dense feed-forward networks; routing and grouped products depend on counts, and
    torch's grouped product does not compile in float32.
    """
    # a group of its own: the order of its sums among those of the gradients then does not matter
    group = dist.new_group() if dist.get_world_size() > 1 else None
    for router in model.routers():
        router.total = partial(total_over_ranks, group=group)
    for block in model.blocks:
        block.recompute = recompute == "full"
        if compile:
            for part in compiled_parts(block):
                part.compile()


def compiled_parts(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that gain from compilation."""
    from moe.model.layers import FeedForward

    return [block.attention, *(m for m in block.modules() if isinstance(m, FeedForward))]
