"""Losses that routers share, as pure functions; each says whether it is a sum over tokens or a number per expert set.

A load carries no gradient: it counts decisions. Probabilities do.
"""

from __future__ import annotations

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


def importance(weight: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation of each expert's summed weight or probability (Shazeer et al., 2017)."""
    return _cv2(weight)


def smooth_load(clean: Float[Tensor, "t E"], noisy: Float[Tensor, "t E"], k: int, std: float) -> Float[Tensor, "t E"]:
    """Chance that redrawing one expert's Gaussian noise would select it: P(clean + std * n >= the k-th best noisy logit).

    Summed over tokens and given to `importance` it is the load loss (Shazeer et al., 2017; Riquelme et al., 2021).
    """
    threshold = noisy.topk(k, dim=-1).values[:, -1:]
    return torch.special.ndtr((clean - threshold) / std)


@torch.no_grad()
def statistics(logits: Float[Tensor, "t E"], valid: Bool[Tensor, " t"]) -> dict[str, Tensor]:
    """Sums over valid tokens of what tells how softmax(logits) is doing: mass per expert, entropy, largest entry, z."""
    probability = torch.where(valid[:, None], logits.softmax(-1), 0)
    return {
        "probability": probability.sum(0),
        "entropy": entropy(probability).sum(),
        "confidence": probability.amax(-1).sum(),
        "z": torch.where(valid, z(logits), 0).sum(),
    }


def _cv2(x: Tensor) -> Tensor:
    return x.var(correction=0) / x.mean().square().clamp(min=torch.finfo(x.dtype).tiny)
