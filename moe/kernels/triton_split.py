"""A float32 matrix cut into three bfloat16 parts, laid next to each other as a product wants them: one launch for six."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.triton_tiles import INTERPRETED
from moe.shapes import Float

_BLOCK = 1024


def stacked(x: Float[Tensor, "m n"], order: tuple[int, ...], dim: int) -> Tensor:
    """`product.stacked`."""
    (m, n), parts = x.shape, len(order)
    out = torch.empty((m * parts, n) if dim == 0 else (m, n * parts), dtype=torch.bfloat16, device=x.device)
    between = m * n if dim == 0 else n
    numbers = sum(part << 2 * slot for slot, part in enumerate(order))
    if x.numel():
        split[(triton.cdiv(x.numel(), _BLOCK),)](
            x.contiguous(), out, m * n, n, n if dim == 0 else n * parts, between, numbers, parts, _BLOCK, INTERPRETED
        )
    return out


@triton.jit
def rounded(x, INTERPRETED: tl.constexpr):
    """The nearest bfloat16, as a float32; the interpreter would cut bits off."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN would carry over into the sign
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def rest(x, part):
    """x - part, and 0 where the part is not finite: what is left of NaN or infinity is nothing."""
    return tl.where(tl.abs(part) < float("inf"), x - part, 0.0)


@triton.jit
def split(x, out, size, columns, stride, between, ORDER: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Slot s of the output holds part ORDER >> 2 s & 3: 0 the smallest, 2 the largest; slots lie `between` numbers apart."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0)
    high = rounded(value, INTERPRETED)
    left = rest(value, high)
    middle = rounded(left, INTERPRETED)
    low = rounded(rest(left, middle), INTERPRETED)
    place = out + i // columns * stride + i % columns
    for slot in tl.static_range(PARTS):
        if ORDER >> 2 * slot & 3 == 0:
            part = low
        elif ORDER >> 2 * slot & 3 == 1:
            part = middle
        else:
            part = high
        tl.store(place + slot * between, part.to(tl.bfloat16), mask=i < size)
