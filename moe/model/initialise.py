"""First values: each a pure function of the seed and the parameter's name, whatever the number of ranks or the engine."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from moe.model.settings import Model

_OUTPUTS = ("attention.o.weight", "mlp.down.weight", "experts.down", "shared.down.weight")  # what is added to the residual stream


def initial_value(name: str, shape: torch.Size | tuple[int, ...], settings: Model, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole of a parameter on the CPU, drawn in float32: norms 1, biases 0, the rest normal within three deviations.

    Projections into the residual stream shrink by sqrt(2 * layers) (Radford et al., 2019). Stacked experts are drawn one by
    one, each from a stream of its own.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device="cpu")
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    std = settings.init_std / (math.sqrt(2 * settings.layers) if name.endswith(_OUTPUTS) else 1)
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    parts = enumerate(value) if ".experts." in name else [(0, value)]
    for expert, part in parts:
        generator = torch.Generator("cpu").manual_seed(stream(seed, name, expert))
        nn.init.trunc_normal_(part, std=std, a=-3 * std, b=3 * std, generator=generator)
    return value.to(dtype)


def stream(*key: object) -> int:
    """A 63-bit seed for whatever `key` names, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
