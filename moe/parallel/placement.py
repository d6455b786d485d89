"""Which ranks of an expert group hold which experts: pure functions of integers, the same on every rank."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Placement(NamedTuple):
    """Every expert has one owner, who holds it; other ranks may hold copies of it."""

    owner: NDArray[np.int64]  # [E]
    holds: NDArray[np.bool_]  # [ranks, E]

    def held(self, rank: int) -> list[int]:
        """The experts that a rank holds, in the order in which it keeps them: its own, then copies by owner."""
        copies = np.flatnonzero(self.holds[rank] & (self.owner != rank))
        own = np.flatnonzero(self.owner == rank)
        return [*own.tolist(), *copies[np.argsort(self.owner[copies], kind="stable")].tolist()]

    @property
    def digest(self) -> int:
        """A 63-bit number that ranks with another placement do not have."""
        text = self.owner.astype("<i8").tobytes() + np.packbits(self.holds).tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def even(experts: int, ranks: int) -> Placement:
    """Rank i of n owns experts i * E/n … (i + 1) * E/n - 1, and nobody holds copies."""
    return owned(np.arange(experts, dtype=np.int64) // (experts // ranks), ranks)


def owned(owner: NDArray[np.int64], ranks: int) -> Placement:
    """A placement without copies."""
    return Placement(owner, np.arange(ranks)[:, None] == owner)


def choices(placement: Placement, rank: int, node: NDArray[np.int64]) -> list[list[int]]:
    """For each expert the ranks among which `rank` splits its tokens: itself, else holders of its node, else all holders.

    `node` says on which machine each rank lives (Hecate, arXiv 2502.02581, section on token dispatch).
    """
    found = []
    for expert in range(len(placement.owner)):
        holders = np.flatnonzero(placement.holds[:, expert])
        near = holders[node[holders] == node[rank]]
        found.append([rank] if placement.holds[rank, expert] else (near if len(near) else holders).tolist())
    return found
