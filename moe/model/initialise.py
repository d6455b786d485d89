"""First weights: each value is a pure function of the seed, the parameter's name and its place in the whole parameter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.model.settings import Model
from moe.routers import build
from moe.routers.base import Router
from moe.routers.draw import Law, draw_

_OUTPUTS = ("attention.o.weight", "mlp.down.weight", "experts.down", "shared.down.weight")  # what is added to the residual stream


def initial_law(name: str, shape: Sequence[int], settings: Model) -> Law:
    """What a parameter's first values are drawn from: norms 1, biases 0, the rest normal within three deviations.

    Projections into the residual stream shrink by sqrt(2 * layers) (Radford et al., 2019). A router may have rules of its own for
    its sparse layers.
    """
    if name.endswith("norm.weight"):
        return Law("constant", 1)
    if name.endswith("bias"):
        return Law("constant", 0)
    own = name.partition(".moe.")[2]
    given = _router(settings).initial_law(own, shape, settings.layers) if own else None
    return given or Law("truncated", settings.init_std / (math.sqrt(2 * settings.layers) if name.endswith(_OUTPUTS) else 1))


def initialise_(target: Tensor, name: str, box: Sequence[range], shape: Sequence[int], settings: Model, seed: int) -> None:
    """Fill `target`, in place and on its device, with first values: the part at the indices `box` of a parameter of `shape`."""
    draw_(target, initial_law(name, shape, settings), (seed, name), box, shape)


def initial_value(name: str, shape: Sequence[int], settings: Model, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole of a parameter's first value, on the CPU."""
    value = torch.empty(*shape, dtype=dtype, device="cpu")
    initialise_(value, name, [range(n) for n in shape], shape, settings, seed)
    return value


def stream(*key: object) -> int:
    """A 63-bit seed for whatever `key` names, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def _router(settings: Model) -> Router:
    assert settings.moe is not None
    with torch.device("meta"):
        return build(settings.moe.router, settings.d_model, settings.moe.experts)
