"""Text from a model, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.model.attention import Cache
from moe.model.transformer import Transformer
from moe.routers.base import running_sum
from moe.shapes import Float, Int


@torch.no_grad()
def generate(
    model: Transformer,
    ids: Int[Tensor, "b s"],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b total"]:
    """`ids` followed by `tokens` sampled ones.

    temperature: 0 takes the likeliest token. top_p: sample among the likeliest tokens that together have this probability
    (Holtzman et al., 2020). Where positions are learned, text ends with them. A router that looks across tokens decides here on
    fewer of them than in training.
    """
    training = model.training
    model.eval()
    caches = [Cache() for _ in model.layers]
    seen = ids
    room = model.settings.context - ids.shape[1] if model.positions is not None else tokens
    for _ in range(min(tokens, room)):
        scores = model.predict(seen, caches)[:, -1]
        seen = sample(scores, temperature=temperature, top_p=top_p, generator=generator)
        ids = torch.cat([ids, seen], 1)
    model.train(training)
    return ids


def sample(
    scores: Float[Tensor, "b v"], *, temperature: float, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Int[Tensor, "b 1"]:
    """One token of each row of logits."""
    if temperature == 0:
        return scores.argmax(-1, keepdim=True)
    probability, token = (scores / temperature).softmax(-1).sort(stable=True, descending=True)
    # a token is kept if those before it have less than top_p, and the first always is
    rest = probability[:, 1:]
    rest.masked_fill_(running_sum(probability)[:, :-1] >= top_p, 0)
    device = scores.device if generator is None else generator.device
    choice = torch.multinomial(probability.to(device), 1, generator=generator).to(scores.device)
    return token.gather(-1, choice)
