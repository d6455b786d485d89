"""Cross-entropy of one chunk of logits together with its gradient: the definition, and what a device without Triton computes."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.shapes import Float, Int

IGNORE = -100  # a target that is not predicted


def loss_of(logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"]) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    """Each token's loss in nats, 0 where its target is IGNORE, and the logarithm of its sum of exponentials."""
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0, normaliser - chosen), normaliser


def loss_and_gradient(
    logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"], dtype: torch.dtype
) -> tuple[Float[Tensor, " t"], Float[Tensor, "t v"]]:
    """Each token's loss, and in `dtype` the gradient of their sum: probabilities, minus one at the target, 0 where it is IGNORE.

    The logits are overwritten.
    """
    loss, normaliser = loss_of(logits, targets)
    logits.sub_(normaliser[:, None]).exp_()
    logits.scatter_add_(1, targets.clamp(min=0)[:, None], logits.new_full((len(logits), 1), -1.0))
    return loss, logits.masked_fill_((targets == IGNORE)[:, None], 0).to(dtype)
