"""The fastest backend for the device that the rows are on; any dtype and any width."""

from __future__ import annotations

from torch import Tensor

from moe.kernels import grouped, threads
from moe.kernels.reference import ExpertWeights, Rows
from moe.shapes import Float


def grouped_mlp(rows: Rows, weights: ExpertWeights, activation: str, keep: bool = True) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp` by whole experts a thread on a CPU, by grouped products elsewhere."""
    best = threads if rows.x.device.type == "cpu" else grouped
    return best.grouped_mlp(rows, weights, activation, keep)
