"""The router's product: float32 weights times tokens of a lower precision, of which no float32 copy is kept.

On a GPU a float32 matrix is the sum of three bfloat16 ones, so that tensor cores multiply it without an error:

    weight = low + middle + high       24 bits of mantissa = 3 x 8
    x @ weight.T = x @ low.T + x @ middle.T + x @ high.T       one product with the parts stacked, [t, d] x [d, 3E]

Products of bfloat16 numbers are exact in float32, in which they are added up: what is left is the error of the sum, and the
multiplications of a float32 product round besides. Elsewhere x is cast, forward and again backward, which changes no bit.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.kernels.auto import machine, no_triton
from moe.shapes import Float


def linear(x: Float[Tensor, "t d"], weight: Float[Tensor, "E d"]) -> Float[Tensor, "t E"]:
    """x @ weight.T in float32 or better, under autocast too; backward keeps x and the weight as they are given."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return _Linear.apply(x, weight)
    with _no_autocast(x):
        return F.linear(x, weight if weight.dtype == torch.float64 else weight.float())


def stacked(x: Float[Tensor, "m n"], order: tuple[int, ...], dim: int) -> Tensor:
    """The bfloat16 parts of x that `order` names, 0 the smallest and 2 the largest, next to each other along `dim`.

    Parts 0 to 2 add up to x, but for bits below 2^-133; what is not finite is in part 2 alone.
    """
    if x.device.type == "cuda" and not torch.compiler.is_compiling() and no_triton(machine("cuda", x.device.index)) is None:
        return importlib.import_module("moe.kernels.triton_split").stacked(x, order, dim)
    high = x.bfloat16()
    rest = (x - high).nan_to_num(0, 0, 0)
    middle = rest.bfloat16()
    parts = (rest - middle).bfloat16(), middle, high
    return torch.cat([parts[part] for part in order], dim)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with _no_autocast(x):
            weight = weight.float()
            if not _by_parts(x):
                return F.linear(x.float(), weight)
            return _sum(_multiply(x, stacked(weight, (0, 1, 2), 0).T), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        with _no_autocast(x):
            if not _by_parts(x):
                dx = (grad @ weight.float()).to(x.dtype) if of_x else None
                return dx, (grad.T @ x.float()).to(weight.dtype) if of_weight else None
            # of x: the six products of parts that float32 can see, small to large, added up in float32 and rounded once
            dx = stacked(grad, (0, 1, 2, 1, 2, 2), 1) @ stacked(weight.float(), (2, 1, 0, 2, 1, 2), 0) if of_x else None
            return dx, _sum(_multiply(stacked(grad, (0, 1, 2), 1).T, x), 0).to(weight.dtype) if of_weight else None


def _multiply(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a @ b of bfloat16 matrices, added up and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def _sum(parts: Tensor, dim: int) -> Tensor:
    low, middle, high = parts.chunk(3, dim)
    return low.add(middle).add_(high)


def _by_parts(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def _no_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
