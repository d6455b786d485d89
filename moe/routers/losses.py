"""Losses that routers share, as pure functions; each says whether it is a sum over tokens or a number per expert set.

A load carries no gradient: it counts decisions. Probabilities do.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe.shapes import Bool, Float, Int


def balance(load: Int[Tensor, "*s E"], probability: Float[Tensor, "*s E"]) -> Float[Tensor, "*s"]:
    """E * sum_i f_i P_i with f = load / its sum (Switch: Fedus et al., 2021): 1 if either is uniform, for every k.

    Linear in `probability`: from its mean over tokens comes the mean loss, from its sum the loss summed over tokens.
    """
    load = load.to(probability.dtype)
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    return load.shape[-1] * (share * probability).sum(-1)


def usage(load: Int[Tensor, " E"], tokens: Int[Tensor, ""], weight: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """E * sum_i (load_i / tokens) weight_i: `balance` where the number of experts a token varies, and using fewer pays.

    `tokens` are those that the load was counted over. Linear in `weight`, as `balance` is in its probability.
    """
    return len(load) * (load.to(weight.dtype) / tokens.clamp(min=1) * weight).sum()


def z(logits: Float[Tensor, "t E"]) -> Float[Tensor, " t"]:
    """Router z-loss of each token, logsumexp(logits)^2 (ST-MoE: Zoph et al., 2022)."""
    return logits.logsumexp(-1).square()


def entropy(probability: Float[Tensor, "*s E"]) -> Float[Tensor, "*s"]:
    """Entropy in nats of each distribution; 0 log 0 is 0, with a finite gradient."""
    return -torch.special.xlogy(probability, probability.clamp(min=torch.finfo(probability.dtype).tiny)).sum(-1)


def sequence_loads(expert: Int[Tensor, "t k"], sequence: Int[Tensor, " t"], num_experts: int) -> Int[Tensor, "t E"]:
    """Assignments per expert of each sequence, expert E left out.

    A table with a row for as many sequences as there can be: their number is not known without a wait.
    """
    slot = (sequence[:, None] * (num_experts + 1) + expert).view(-1)
    load = slot.new_zeros(len(expert) * (num_experts + 1)).scatter_add_(0, slot, torch.ones_like(slot))
    return load.view(-1, num_experts + 1)[:, :num_experts]


def importance(weight: Float[Tensor, "*s E"]) -> Float[Tensor, "*s"]:
    """Squared coefficient of variation of each expert's summed weight or probability (Shazeer et al., 2017).

    Of sums of `smooth_load` it is the load loss. It bends in the sums: those of a global batch are needed for its loss.
    """
    return weight.var(-1, correction=0) / weight.mean(-1).square().clamp(min=torch.finfo(weight.dtype).tiny)


def smooth_load(
    clean: Float[Tensor, "t E"],
    noisy: Float[Tensor, "t E"],
    k: int,
    std: Tensor | float,
    against: Literal["all", "others"] = "all",
) -> Float[Tensor, "t E"]:
    """Chance that redrawing one expert's Gaussian noise would select it: P(clean + std * n >= a threshold).

    The threshold is the k-th best noisy logit of "all" experts (Riquelme et al., 2021), or of the "others" than the one whose
    chance it is (Shazeer et al., 2017), which is exact.
    """
    if against == "others" and k == clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + (against == "others"), dim=-1).values
    threshold = top[:, k - 1 : k]
    if against == "others":  # who is among the k best has the next one to beat
        threshold = torch.where(noisy > top[:, k:], top[:, k:], threshold)
    return torch.special.ndtr((clean - threshold) / std)


def statistics(logits: Float[Tensor, "t E"], valid: Bool[Tensor, " t"]) -> dict[str, Tensor]:
    """Sums over valid tokens of what tells how softmax(logits) is doing: mass per expert, entropy, largest entry, z."""
    logits = logits.detach()
    probability = torch.where(valid[:, None], logits.softmax(-1), 0)
    return {
        "probability": probability.sum(0),
        "entropy": entropy(probability).sum(),
        "confidence": probability.amax(-1).sum(),
        "z": torch.where(valid, z(logits), 0).sum(),
    }
