"""The figures that a step reads from its device, all in one copy: the one time that the host waits for the training path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.model.stages import stage
from moe.parallel.collectives import sum_ranks
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.host_copy import to_host
from moe.shapes import Float, Int


class Figures(NamedTuple):
    """What `read` brings, on the host."""

    overflowed: bool  # on any rank a fixed buffer was too small
    sums: Float[Tensor, " m"]  # over ranks, float64
    counts: Int[Tensor, " n"]  # as they were given, alike on all ranks


def read(mine: Float[Tensor, " m"], counts: Int[Tensor, " n"], fixed: Sequence[AllToAll]) -> Figures:
    """Sum `mine` over ranks and read it; RankMismatch if a rank's fixed buffers were those of another call.

    What travels to the host as int64 (float64 by its bits, since a digest has more digits than float64):

        overflows | sums over ranks … | counts … | 5 numbers of each dispatcher with fixed buffers, for its check
    """
    full = [dispatcher.overflowed for dispatcher in fixed if dispatcher.overflowed is not None]
    overflows = torch.stack(full).sum(dtype=torch.float64)[None] if full else mine.new_zeros(1)
    summed = sum_ranks(torch.cat([overflows, mine]))
    parts = [summed.view(torch.int64), counts, *(dispatcher.astray() for dispatcher in fixed)]
    with stage("wait for figures"):
        sums, counts, *seals = to_host(torch.cat(parts)).split([len(part) for part in parts])
    for dispatcher, seal in zip(fixed, seals, strict=True):
        dispatcher.overflowed = None
        dispatcher.check(seal.tolist())
    found = sums.view(torch.float64)
    return Figures(bool(found[0] > 0), found[1:], counts)
