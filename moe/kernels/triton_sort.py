"""A stable counting sort of assignments by expert: three launches, nothing waits for the device, equal from run to run."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.sort import Sorted
from moe.shapes import Int

_STEP = 128  # assignments compared with each other at once
_STEPS = 8  # of one program
_TABLE = 4096  # entries of the table blocks × experts that one program adds up at once


def sort(expert: Int[Tensor, " n"], num_experts: int) -> Sorted:
    """`sort.sort` by histograms of blocks of assignments, their running sums, and a scatter."""
    return Sorted(*(_operator if torch.compiler.is_compiling() else _sort)(expert.contiguous(), num_experts))


def _sort(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n, bins, device = len(expert), triton.next_power_of_2(num_experts + 1), expert.device
    blocks = triton.cdiv(n, _STEP * _STEPS)
    table = torch.empty(blocks, bins, dtype=torch.int32, device=device)
    totals = torch.empty(bins, dtype=torch.int32, device=device)
    order, position = torch.empty(n, dtype=torch.int64, device=device), torch.empty(n, dtype=torch.int64, device=device)
    counts = torch.empty(num_experts, dtype=torch.int64, device=device)
    if n:
        count[(blocks,)](expert, table, n, num_experts, bins, _STEP * _STEPS)
    width = min(bins, 32)
    running_sums[(bins // width,)](table, totals, counts, blocks, num_experts, bins, _TABLE // width, width)
    if n:
        scatter[(blocks,)](expert, table, totals, order, position, n, num_experts, bins, _STEP, _STEPS, num_warps=8)
    return order, position, counts


@torch.library.custom_op("moe::sort", mutates_args=())
def _operator(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _sort(expert, num_experts)


@_operator.register_fake
def _(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(expert), torch.empty_like(expert), expert.new_empty(num_experts)


@triton.jit(do_not_specialize=["n"])
def count(expert, table, n, experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Row `program` of the table: how many of a block's assignments each expert has."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(expert + i, mask=i < n, other=experts).to(tl.int32)  # past the end counts as dropped: sorts last, stored nowhere
    tl.store(table + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), tl.histogram(e, BINS))


@triton.jit(do_not_specialize=["blocks"])
def running_sums(table, totals, counts, blocks, experts, BINS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Each column of the table becomes its running sum, exclusive; one program takes WIDTH experts."""
    e = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    carry = tl.zeros([WIDTH], tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        entry = table + block[:, None].to(tl.int64) * BINS + e[None, :]
        here = tl.load(entry, mask=block[:, None] < blocks, other=0)
        tl.store(entry, carry[None, :] + tl.cumsum(here, 0) - here, mask=block[:, None] < blocks)
        carry += tl.sum(here, 0)
    tl.store(totals + e, carry)
    tl.store(counts + e, carry.to(tl.int64), mask=e < experts)


@triton.jit(do_not_specialize=["n"])
def scatter(expert, table, totals, order, position, n, experts, BINS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Write where each assignment goes: after smaller experts, earlier blocks, and earlier equals of its block."""
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins)
    first = tl.cumsum(total, 0) - total + tl.load(table + tl.program_id(0).to(tl.int64) * BINS + bins)
    lane = tl.arange(0, STEP)
    for step in range(STEPS):
        start = (tl.program_id(0) * STEPS + step) * STEP
        i = start + lane
        e = tl.load(expert + i, mask=i < n, other=experts).to(tl.int32)
        again = tl.load(expert + i[None, :], mask=i[None, :] < n, other=experts).to(tl.int32)
        equals = (again == e[:, None]) & (lane[None, :] < lane[:, None])
        place = (tl.gather(first, e, 0) + tl.sum(equals.to(tl.int32), 1)).to(tl.int64)
        tl.store(position + i, place, mask=i < n)
        tl.store(order + place, i.to(tl.int64), mask=i < n)
        first += tl.histogram(e, BINS)
