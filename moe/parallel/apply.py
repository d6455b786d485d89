"""The only file that changes a model: it fills the seams, and switches on recomputation and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import distributed as dist

from moe.model.attention import Attention
from moe.model.experts import Experts
from moe.model.layers import FeedForward
from moe.model.transformer import Transformer
from moe.parallel.collectives import total_over_ranks
from moe.parallel.mesh import Mesh


def parallelize(model: Transformer, mesh: Mesh, *, recompute: str, compile: bool) -> None:
    """Make a model that is alone part of a job: losses that look at the global batch see all of it.

    Compiled are attention and the dense feed-forward networks; routing and grouped products depend on counts, and
    torch's grouped product does not compile in float32.
    """
    if mesh.world > 1:
        # a group of its own: the order of its sums among those of the gradients then does not matter
        group: Any = dist.new_group(timeout=mesh.timeout)
        for router in model.routers().values():
            router.total = partial(total_over_ranks, group=group)
    blocks: Any = model.layers
    for block in blocks:
        block.recompute = recompute == "full"
        for part in block.modules():
            if isinstance(part, Experts):
                part.keep = recompute != "experts"
        if compile:
            for part in block.modules():
                if isinstance(part, Attention | FeedForward):
                    part.compile()
