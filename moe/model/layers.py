"""The small parts of a block: norms, rotary positions, the dense feed-forward network."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.kernels.reference import ACTIVATIONS
from moe.shapes import Float, Int


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension (Zhang & Sennrich, 2019); statistics in float32 or better."""

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, scale and shift (Ba et al., 2016)."""

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class FeedForward(nn.Module):
    """A feed-forward network, gated (SwiGLU with `silu`) or not."""

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "silu", gated: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Rotary:
    """Rotary positions (Su et al., 2021): dimension i of a head turns together with dimension i + head_dim / 2.

    scaling: "linear" divides positions by `factor` (Chen et al., 2023); "llama3" stretches only wavelengths long against
        `original`; "yarn" blends by the number of turns within `original` and sharpens attention (Peng et al., 2023).
    No buffer and no parameter, so that a model built on the meta device needs nothing restored, and moves leave float64 alone: the
    frequencies are made once on each device, and inside the graph where the first call is captured or compiled.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        scaling: Literal["none", "linear", "llama3", "yarn"] = "none",
        factor: float = 1.0,
        original: int = 8192,
        low_frequency: float = 1.0,
        high_frequency: float = 4.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> None:
        self.made: dict[torch.device, Tensor] = {}
        plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        self.magnitude = 1.0
        if scaling == "none":
            self.frequencies = plain
        elif scaling == "linear":
            self.frequencies = [f / factor for f in plain]
        elif scaling == "llama3":
            self.frequencies = [_llama3(f, factor, original, low_frequency, high_frequency) for f in plain]
        else:
            self.frequencies = _yarn(plain, theta, factor, original, beta_fast, beta_slow)
            self.magnitude = 0.1 * math.log(factor) + 1

    def __call__(self, position: Int[Tensor, "b s"], dtype: torch.dtype) -> tuple[Float[Tensor, "b s 1 half"], Float[Tensor, "b s 1 half"]]:
        """Cosine and sine of every angle, from float64 angles: float32 ones are wrong in the third digit at position 100,000."""
        angle = position[..., None, None].double() * self._frequencies(position.device)
        dtype = torch.promote_types(dtype, torch.float32)
        return (angle.cos() * self.magnitude).to(dtype), (angle.sin() * self.magnitude).to(dtype)

    def _frequencies(self, device: torch.device) -> Float[Tensor, " half"]:
        if device in self.made:
            return self.made[device]
        # fills, which need no copy from the host and no wait
        made = torch.stack([torch.full((), f, dtype=torch.float64, device=device) for f in self.frequencies])
        if torch.compiler.is_compiling() or type(made) is not Tensor:
            return made
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():  # else only a replay computes it
            self.made[device] = made
        return made


def rotate(x: Float[Tensor, "b s h e"], cos: Float[Tensor, "b s 1 half"], sin: Float[Tensor, "b s 1 half"]) -> Float[Tensor, "b s h e"]:
    """Turn each pair of dimensions by its angle, in the precision of the angle."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _llama3(frequency: float, factor: float, original: int, low: float, high: float) -> float:
    turns = original * frequency / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / factor)


def _yarn(plain: list[float], theta: float, factor: float, original: int, fast: float, slow: float) -> list[float]:
    def dimension(turns: float) -> float:
        return len(plain) * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(dimension(fast)), 0)
    last = min(math.ceil(dimension(slow)), 2 * len(plain) - 1)
    scaled = []
    for i, frequency in enumerate(plain):
        stretched = min(max((i - first) / max(last - first, 1e-3), 0.0), 1.0)
        scaled.append(frequency * (1 - stretched + stretched / factor))
    return scaled
