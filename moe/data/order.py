"""The order of training sequences: a pure function of (seed, place), so that ranks, restarts and batch cuts change nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple


class Draw(NamedTuple):
    """Which sequence comes next."""

    source: int
    block: int


class Order:
    """Draw i of an endless mixture; each source is shuffled anew every epoch.

    Where the sum of weights is 1, source j has given weight[j]·i sequences after i draws, to within one a source.
    """

    def __init__(self, blocks: Sequence[int], weights: Sequence[float], seed: int) -> None:
        grain: Any = _grain()
        # grain mixes in whole multiples of a hundredth of the smallest weight; rounded here, its shares are known exactly.
        shares = [round(100 * weight / min(weights)) for weight in weights]
        self.shares = [share / sum(shares) for share in shares]
        sources = [
            grain.MapDataset.source(_Blocks(source, count)).seed(_seed(seed, source)).shuffle().repeat()
            for source, count in enumerate(blocks)
        ]
        self.draws = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, weights=shares)

    def __getitem__(self, place: int) -> Draw:
        return self.draws[place]


class _Blocks:
    def __init__(self, source: int, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, block: int) -> Draw:
        return Draw(self.source, int(block))


def _seed(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:4], "little")


def _grain():
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # grain warns that JAX is absent, which is none of our users' business
    try:
        import grain
    finally:
        logging.disable(before)
    return grain
