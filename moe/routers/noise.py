"""Counter-based random numbers: a pure function of (stream, step, global token index, column).

There is no generator to save, to seed or to replay: recomputation, resuming and any number of ranks draw the same
numbers. Each token's row is its own splitmix64 sequence (Steele et al., 2014), started from a hash of the first
three; 64-bit integers wrap around, so CPU and GPU agree on every bit of `bits` and `uniform`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.shapes import Float, Int


def signed(constant: int) -> int:
    """A number of 64 bits as torch's integers hold it."""
    return constant - (1 << 64) if constant >> 63 else constant


_GOLDEN = signed(0x9E3779B97F4A7C15)
_FIRST = signed(0xBF58476D1CE4E5B9)
_SECOND = signed(0x94D049BB133111EB)


def bits(stream: int, step: int, index: Int[Tensor, " t"], columns: int) -> Int[Tensor, "t c"]:
    """64 random bits for each token and column, as signed integers."""
    row = mix(torch.full_like(index, signed(stream % (1 << 64)), dtype=torch.int64) + _GOLDEN)
    row = mix(row + step + _GOLDEN)
    row = mix(row + index + _GOLDEN)
    column = torch.arange(1, columns + 1, device=index.device)
    return mix(row[:, None] + column * _GOLDEN)


def uniform(stream: int, step: int, index: Int[Tensor, " t"], columns: int) -> Float[Tensor, "t c"]:
    """Float32 numbers strictly between 0 and 1, odd multiples of 2^-24; each draw of bits serves two columns, low half first."""
    # two at least, because torch cannot take a view of no rows and one column
    halves = bits(stream, step, index, max((columns + 1) // 2, 2)).view(torch.int32)[:, :columns]
    return ((halves >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def normal(stream: int, step: int, index: Int[Tensor, " t"], columns: int) -> Float[Tensor, "t c"]:
    """Standard normal numbers (at most 5.3 in size)."""
    return torch.erfinv(2 * uniform(stream, step, index, columns) - 1) * math.sqrt(2)


def gumbel(stream: int, step: int, index: Int[Tensor, " t"], columns: int) -> Float[Tensor, "t c"]:
    """Standard Gumbel numbers: the arg max of logits plus these samples from their softmax."""
    return -torch.log(-torch.log(uniform(stream, step, index, columns)))


def mix(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """The finaliser of splitmix64, a hash of 64 bits; `x` is overwritten, and `scratch`, of its shape, if it is given."""
    x.bitwise_xor_(_shift(x, 30, scratch)).mul_(_FIRST)
    x.bitwise_xor_(_shift(x, 27, scratch)).mul_(_SECOND)
    return x.bitwise_xor_(_shift(x, 31, scratch))


def _shift(x: Tensor, n: int, scratch: Tensor | None) -> Tensor:
    # torch shifts signed integers arithmetically; the mask removes the copies of the sign
    shifted = x >> n if scratch is None else torch.bitwise_right_shift(x, n, out=scratch)
    return shifted.bitwise_and_((1 << (64 - n)) - 1)
