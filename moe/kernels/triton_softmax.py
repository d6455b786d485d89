"""Cross-entropy of a chunk of logits and its gradient in one launch: a token's logits are read twice, and written once.

The chain of torch's operations reads and writes them about seven times.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.softmax import IGNORE
from moe.kernels.triton_tiles import store, upcast
from moe.shapes import Float, Int

_BLOCK = 2048  # logits that a program looks at at once


def loss_and_gradient(
    logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"], dtype: torch.dtype
) -> tuple[Float[Tensor, " t"], Float[Tensor, "t v"]]:
    """`softmax.loss_and_gradient` of float32 logits; a target that no logit has gets the loss NaN.

    Logits are overwritten where the gradient is float32 too.
    """
    t, v = logits.shape
    loss = torch.empty(t, dtype=torch.float32, device=logits.device)
    gradient = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    if t:
        block = min(_BLOCK, triton.next_power_of_2(v))
        cross_entropy[(t,)](logits, targets, loss, gradient, v, IGNORE, block, upcast(dtype), num_warps=8)
    return loss, gradient


@triton.jit
def cross_entropy(logits, targets, loss, gradient, v, IGNORED: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """One program takes one token."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * v
    gradient += row * v
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK)
    # the running sum of exponentials is of logits less the largest so far
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < v, other=-float("inf"))
        above = tl.maximum(largest, x)
        # a lane that has seen nothing but -inf counts nothing: exp(-inf - -inf) would be NaN
        shift = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = above
    top = tl.max(largest, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(total * tl.exp(largest - top), 0)
    kept = target != IGNORED
    chosen = tl.load(logits + target, mask=(target >= 0) & (target < v), other=float("nan"))
    # differences come first: they are exact where it matters, and a sum with the logarithm is rounded to the logits' last bit
    tl.store(loss + row, tl.where(kept, tl.log(total) + (top - chosen), 0.0))
    tl.debug_barrier()  # the gradient may overwrite the logit of the target
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < v, other=-float("inf"))
        found = tl.exp(x - top) / total - tl.where(start + lane == target, 1.0, 0.0)
        store(gradient + start + lane, tl.where(kept, found, 0.0), start + lane < v, UPCAST)
