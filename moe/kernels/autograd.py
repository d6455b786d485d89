"""What backends that write their own gradients share: what is kept for backward, and where gradients go.

A backend is a module with two functions, told apart from the rest of autograd so that torch.compile sees one opaque call:

    forward(x, index, slots, weight, counts, up, down, activation, keep)                    → out, hidden
    backward(grad, hidden, x, index, slots, weight, scale, counts, up, down, activation, …) → Gradients

Only x, the pre-activations `hidden` and integers are kept; without `keep` hidden has no rows, and backward computes it again.
Backward may write over hidden, which only this function has: a second pass through the same graph (`retain_graph`) finds it
marked as spent and computes it again too.
The gradient of the combine weight needs no output: with d activated = (d y) @ down, before the weight, it is
<d activated, activated>.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.reference import ExpertWeights, Rows
from moe.shapes import Float


class Needs(NamedTuple):
    """What is needed of a backward pass: which gradients (frozen experts need neither `up` nor `down`), and `hidden` as it was."""

    x: bool = True
    weight: bool = True
    up: bool = True
    down: bool = True
    hidden: bool = True  # without it, a backend may write over the pre-activations


ALL = Needs()


class Gradients(NamedTuple):
    """Gradients of the vectors, of the rows' weights in expert order, and of the stacked weights; None where not asked for."""

    x: Float[Tensor, "m d"] | None
    weight: Float[Tensor, " n"] | None
    up: Float[Tensor, "E g f d"] | None
    down: Float[Tensor, "E d f"] | None


def grouped_mlp(module: str, rows: Rows, weights: ExpertWeights, activation: str, keep: bool) -> Float[Tensor, "m d"]:
    """`reference.grouped_mlp` computed by the backend in `module`."""
    differentiable = (rows.x, rows.weight, weights.up, weights.down)
    keep = keep and torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    integers = (rows.index, rows.slots, rows.counts)
    return _ExpertMLP.apply(*differentiable, *integers, rows.gradient_scale, module, activation, keep, weights.in_place)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, up, down, index, slots, counts, scale, module, activation, keep, in_place):
        forward = _forward if torch.compiler.is_compiling() else importlib.import_module(module).forward
        chosen = (module,) if torch.compiler.is_compiling() else ()
        out, hidden = forward(*chosen, x, index, slots, weight, counts, up, down, activation, keep)
        ctx.save_for_backward(hidden, x, index, slots, weight, scale, counts, up, down)
        ctx.module, ctx.activation, ctx.kept, ctx.spent = module, activation, None, False
        if in_place and up.is_leaf and down.is_leaf and not torch.compiler.is_compiling():
            ctx.kept = up, down  # recomputation brings saved tensors back as copies without a gradient to add to
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, *rest = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return *_backward(ctx.module, grad.contiguous(), hidden, *rest, ctx.activation), *(None,) * 8
        given = (grad.contiguous(), hidden[:0] if ctx.spent else hidden, *rest, ctx.activation)
        ctx.spent, needs = True, Needs(*ctx.needs_input_grad[:4], hidden=False)
        backward = importlib.import_module(ctx.module).backward
        if needs.up and needs.down and ctx.kept and all(p.grad is not None for p in ctx.kept):
            dx, dweight, _, _ = backward(*given, *(p.grad for p in ctx.kept), needs=needs)
            dup = ddown = None
        else:
            dx, dweight, dup, ddown = backward(*given, needs=needs)
        return dx, dweight, dup, ddown, *(None,) * 8


@torch.library.custom_op("moe::expert_mlp", mutates_args=())
def _forward(
    module: str,
    x: Tensor,
    index: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return importlib.import_module(module).forward(x, index, slots, weight, counts, up, down, activation, keep)


@_forward.register_fake
def _(module, x, index, slots, weight, counts, up, down, activation, keep):
    return x.new_empty(x.shape), x.new_empty(index.shape[0] if keep else 0, up.shape[1] * up.shape[2])


@torch.library.custom_op("moe::expert_mlp_backward", mutates_args=())
def _backward(
    module: str,
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    index: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    counts: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return importlib.import_module(module).backward(grad, hidden, x, index, slots, weight, scale, counts, up, down, activation)


@_backward.register_fake
def _(module, grad, hidden, x, index, slots, weight, scale, counts, up, down, activation):
    return torch.empty_like(grad), torch.empty_like(weight), up.new_empty(up.shape), down.new_empty(down.shape)
