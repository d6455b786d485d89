"""Cross-entropy of a large vocabulary, in chunks of tokens, so that logits and their gradient never exist whole."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.kernels.auto import loss_and_gradient
from moe.kernels.softmax import IGNORE, loss_of
from moe.routers.base import full_precision
from moe.shapes import Float, Int

__all__ = ["IGNORE", "cross_entropy", "logits"]

# Logits that exist at the same time. Each chunk reads and writes the whole gradient of the weight, 8 bytes a number: a GPU
# takes chunks of thousands of tokens (2 GiB of logits and 1 GiB of gradient in bfloat16), a CPU those that leave room for the rest.
AT_ONCE = {"cuda": 2**29, "cpu": 2**26}


def cross_entropy(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " t"],
    at_once: int | None = None,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, ""]:
    """Summed cross-entropy in nats, in float64, of the logits hidden @ weight.T + bias at targets other than IGNORE.

    Softmax and loss are computed in float32 or better. Gradients are computed together with the loss: a second look at the
    vocabulary would cost a third of the work again. at_once: logits that exist at the same time; None: what suits the device.
    """
    chunk = max((at_once or AT_ONCE.get(hidden.device.type, AT_ONCE["cpu"])) // len(weight), 1)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return _CrossEntropy.apply(hidden, weight, bias, targets, chunk)
    total = hidden.new_zeros((), dtype=torch.float64)
    for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total += loss_of(_scores(h, weight, bias), target)[0].sum(dtype=torch.float64)
    return total


def logits(
    hidden: Float[Tensor, "*any d"], weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"] | None = None
) -> Float[Tensor, "*any v"]:
    """Scores of the next token, in float32 or better."""
    scores = full_precision(hidden @ weight.T)
    return scores if bias is None else scores + bias


def _scores(hidden: Float[Tensor, "t d"], weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "t v"]:
    """`logits` without a gradient: on a GPU not rounded to the dtype of the model in between."""
    if not _widens(hidden):
        return logits(hidden, weight, bias)
    scores = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return scores if bias is None else scores.add_(bias)


def _widens(x: Tensor) -> bool:
    """Whether products of this dtype can be returned in float32, in which they are added up anyway."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = full_precision(weight.new_zeros(())).new_zeros(weight.shape) if of_weight else None
        grad_bias = full_precision(weight.new_zeros(())).new_zeros(bias.shape) if of_bias else None
        for start in range(0, len(hidden), chunk):
            h, target = hidden[start : start + chunk], targets[start : start + chunk]
            scores = _scores(h, weight, bias)
            # a bias wants the sum of gradients that nothing has rounded yet
            loss, grad = loss_and_gradient(scores, target, scores.dtype if of_bias else hidden.dtype)
            total += loss.sum(dtype=torch.float64)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                _accumulate(grad_weight, grad, h)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = ctx.saved_tensors
        # `grad` keeps its own precision: in bfloat16 it would scale every gradient by up to 0.4 % too much or too little
        return *(None if g is None else g * grad for g in grads), None, None


def _accumulate(total: Float[Tensor, "v d"], grad: Float[Tensor, "t v"], hidden: Float[Tensor, "t d"]) -> None:
    """total += grad.T @ hidden, added up in the precision of `total` where the device can."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    elif _widens(grad):
        torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)
    else:  # a CPU's product of float32 casts takes twice as long
        total += grad.T @ hidden
