"""Small routed problems on the GPU, for tests that need other shapes of routing than the benchmark's."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels import GROUPED_MLP, why
from moe.kernels.reference import ExpertWeights, Rows
from moe.kernels.sort import sort
from moe.tables import entry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the tests are collected without a GPU, and skipped
NO_TRITON = why("triton")


def dirty(gib: float = 2) -> None:
    """Leave NaN in the memory that the allocator gives out next."""
    blocks = [torch.full((int(gib * 2**28 / 8),), torch.nan, device=DEVICE) for _ in range(8)]
    blocks += [torch.full((size,), torch.nan, device=DEVICE) for size in (1 << n for n in range(8, 18)) for _ in range(8)]
    del blocks


def backend(name: str):
    return entry(GROUPED_MLP, name, "backend")


def leaves(
    experts: int, d: int, f: int, tokens: int, *, k: int = 2, gated: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0
):
    """x, the weights of routing, up and down, all wanting gradients."""
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=draw, device=DEVICE) * scale).to(dtype).requires_grad_()

    g = 2 if gated else 1
    x, weight = random(tokens, d), random(tokens, k, dtype=torch.float32)
    return x, weight, random(experts, g, f, d, scale=d**-0.5), random(experts, d, f, scale=f**-0.5)


def chosen(experts: int, tokens: int, k: int = 2, seed: int = 0, dropped: float = 0.0) -> Tensor:
    """k different experts a token; a share of the assignments dropped."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    expert = torch.rand(tokens, experts, generator=draw, device=DEVICE).topk(k).indices
    lost = torch.rand(tokens, k, generator=draw, device=DEVICE) < dropped
    return expert.masked_fill(lost, experts)


def rows_of(expert: Tensor, x: Tensor, weight: Tensor, experts: int, *, fixed: bool = True, gradient_scale: Tensor | None = None) -> Rows:
    """Assignments in expert order; with `fixed`, every token is known to have k of them."""
    k = expert.shape[1]
    order, position, counts = sort(expert.flatten(), experts)
    return Rows(x, order // k, weight.flatten()[order], counts, position.view(-1, k) if fixed else None, gradient_scale)


def output_and_gradients(name: str, expert: Tensor, tensors: tuple[Tensor, ...], upstream: Tensor, activation: str = "silu", **more):
    x, weight, up, down = tensors
    y = backend(name)(rows_of(expert, x, weight, len(up), **more), ExpertWeights(up, down), activation)
    return [y.detach(), *torch.autograd.grad(y, tensors, upstream)]
