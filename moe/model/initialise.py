"""First values: each a pure function of the seed and the parameter's name, whatever the number of ranks or the engine."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from moe.model.settings import Model
from moe.routers import build
from moe.routers.base import Router

_OUTPUTS = ("attention.o.weight", "mlp.down.weight", "experts.down", "shared.down.weight")  # what is added to the residual stream


def initial_value(
    name: str,
    shape: torch.Size | tuple[int, ...],
    settings: Model,
    seed: int,
    dtype: torch.dtype = torch.float32,
    experts: range | None = None,
) -> Tensor:
    """The whole of a parameter on the CPU, drawn in float32: norms 1, biases 0, the rest normal within three deviations.

    Projections into the residual stream shrink by sqrt(2 * layers) (Radford et al., 2019). Stacked experts are drawn one by
    one, each from a stream of its own, and only `experts` of them if given. A router may have rules of its own for its sparse
    layers.
    """
    if experts is not None:
        shape = (len(experts), *shape[1:])
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device="cpu")
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    std = settings.init_std / (math.sqrt(2 * settings.layers) if name.endswith(_OUTPUTS) else 1)
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    parts = zip(experts or range(len(value)), value, strict=True) if ".experts." in name else [(0, value)]
    own = name.partition(".moe.")[2]
    router = _router(settings) if own else None
    for expert, part in parts:
        generator = torch.Generator("cpu").manual_seed(stream(seed, name, expert))
        given = None if router is None else router.first_value(own, part.shape, settings.layers, generator)
        if given is not None:
            part.copy_(given)
        else:
            nn.init.trunc_normal_(part, std=std, a=-3 * std, b=3 * std, generator=generator)
    return value.to(dtype)


def stream(*key: object) -> int:
    """A 63-bit seed for whatever `key` names, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def _router(settings: Model) -> Router:
    assert settings.moe is not None
    with torch.device("meta"):
        return build(settings.moe.router, settings.d_model, settings.moe.experts)
