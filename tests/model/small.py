"""Models and batches small enough for a test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.model.settings import Model, Moe
from moe.model.transformer import Transformer

VOCAB = 61


def settings(moe: dict[str, Any] | None = None, *, dense: bool = False, **changes: Any) -> Model:
    sparse = {"experts": 4, "d_expert": 16, "router": {"name": "top_k", "k": 2}} | (moe or {})
    shape = {"layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "init_std": 0.2}
    if dense or "first_dense" in sparse or "every" in sparse:
        shape["d_ff"] = 48
    return Model(**(shape | {"moe": None if dense else Moe(**sparse)} | changes))


def model(moe: dict[str, Any] | None = None, *, seed: int = 0, document_mask: bool = False, **changes: Any) -> Transformer:
    return Transformer(settings(moe, **changes), VOCAB, seed=seed, document_mask=document_mask).double()


class Batch(NamedTuple):
    ids: Tensor
    targets: Tensor
    document: Tensor
    position: Tensor
    index: Tensor


def batch(b: int = 3, s: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (b, s + 1), generator=generator)
    position = torch.arange(s).expand(b, s)
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(position), position, torch.arange(b * s).view(b, s))


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
