"""The experts of one layer: stacked weights, a backend that multiplies them, and the `gather` seam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe.kernels import GROUPED_MLP
from moe.kernels.reference import ExpertWeights, Rows
from moe.model.stages import Observer
from moe.routers.base import Router
from moe.shapes import Float
from moe.tables import entry

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


class Part(NamedTuple):
    """Work that is still to come: a part of the tokens, while others are sent.

    FSDP's hooks look for tensors among a module's arguments, to see when their gradients are there: so they stand by themselves.
    """

    inputs: tuple[Tensor, ...]  # may not be filled yet
    rows: Callable[..., Rows]  # waits for the inputs
    then: Callable[[Tensor], Tensor]  # called with the sums as soon as they are computed; its result is returned


class Experts(nn.Module):
    """E feed-forward networks of width f, gated (SwiGLU with `silu`) or not."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_expert: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.grouped_mlp = entry(GROUPED_MLP, backend, "backend")
        self.up = nn.Parameter(torch.empty(num_experts, 2 if gated else 1, d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        # The seam through which weights move: FSSDP replaces it by a sparse all-gather.
        self.gather: Callable[[ExpertWeights], ExpertWeights] = lambda weights: weights
        # See ExpertWeights.in_place; for engines whose parameters are the ones used here.
        self.in_place = False
        # False: pre-activations are computed again in the backward pass.
        self.keep = True
        self.observer = Observer()

    def summarise(self, router: Router) -> Float[Tensor, "E m"] | None:
        """What a router that reads experts wants to know of those at hand."""
        return router.summary(self.up, self.down)

    def forward(self, work: Rows | list[Part]) -> Any:
        """Each vector's sum, or with several parts what each of them makes of it; weights are gathered once for all of them."""
        with self.observer.stage("experts"):
            weights = self.gather(ExpertWeights(self.up, self.down))
            if isinstance(work, Rows):
                return self._multiply(work, weights)
            return [part.then(self._multiply(part.rows(*part.inputs), weights)) for part in work]

    def _multiply(self, rows: Rows, weights: ExpertWeights) -> Float[Tensor, "m d"]:
        dtype = rows.x.dtype
        weights = ExpertWeights(weights.up.to(dtype), weights.down.to(dtype), self.in_place)
        if len(weights.up) == 0:  # no expert is here, but other ranks wait for this one in the backward pass
            return torch.zeros_like(rows.x) + sum(t[:0].sum() for t in (rows.x, rows.weight, weights.up, weights.down))
        return self.grouped_mlp(rows, weights, self.activation, self.keep)
