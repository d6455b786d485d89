"""Softmax, the k best experts, their weights and the router's statistics in two launches, and one backward.

    choose      logits [t, E] -> expert [t, k], weight [t, k], and of each block of tokens sums of E + 3 figures
    sum         of the blocks' sums, in an order that never changes
    gradient    -> of the logits: softmax and scores are computed again from the logits, nothing else of size [t, E] is kept

The definition is `TopK` in `moe.routers`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.shapes import Bool, Float, Int

_AT_ONCE = 2048  # logits of one program


class Chosen(NamedTuple):
    """The k best experts of each token, and sums over valid tokens; weight, probability and z have gradients."""

    expert: Int[Tensor, "t k"]  # E on padding
    weight: Float[Tensor, "t k"]  # 0 on padding
    probability: Float[Tensor, " E"]
    z: Float[Tensor, ""]  # of squared logsumexp
    entropy: Float[Tensor, ""]
    confidence: Float[Tensor, ""]  # of each token's largest probability


def top_k(
    logits: Float[Tensor, "t E"], valid: Bool[Tensor, " t"], bias: Float[Tensor, " E"] | None, k: int, selected: bool, scale: float
) -> Chosen:
    """Choose by logits, or by probability + bias; weights are `scale` times probabilities, with `selected` among the chosen.

    The lowest index wins among equals, and NaN counts as the largest.
    """
    return Chosen(*_TopK.apply(logits.contiguous(), valid.contiguous(), bias, k, selected, scale))


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, valid, bias, k, selected, scale):
        ctx.set_materialize_grads(False)
        expert, weight, sums = (_choose_operator if torch.compiler.is_compiling() else _choose)(logits, valid, bias, k, selected, scale)
        ctx.save_for_backward(logits, valid, expert, weight)
        ctx.selected, ctx.scale = selected, scale
        experts = logits.shape[1]
        figures = sums[:experts], *sums[experts:].unbind()
        ctx.mark_non_differentiable(expert, figures[2], figures[3])
        return expert, weight, *figures

    @staticmethod
    @once_differentiable
    def backward(ctx, _, d_weight, d_probability, d_z, *__):
        given = (None if d is None else d.contiguous() for d in (d_weight, d_probability, d_z))
        differentiate = _gradient_operator if torch.compiler.is_compiling() else _gradient
        return differentiate(*ctx.saved_tensors, *given, ctx.selected, ctx.scale), *(None,) * 5


def _choose(logits: Tensor, valid: Tensor, bias: Tensor | None, k: int, selected: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    (t, experts), device = logits.shape, logits.device
    padded, block = _block(experts)
    blocks = triton.cdiv(t, block)
    expert, weight = torch.empty(t, k, dtype=torch.int64, device=device), torch.empty(t, k, dtype=torch.float32, device=device)
    sums = torch.empty(blocks, experts + 3, dtype=torch.float32, device=device)
    if t:
        width = triton.next_power_of_2(k)
        choose[(blocks,)](logits, valid, bias, expert, weight, sums, t, experts, scale, k, width, padded, block, selected, bias is not None)
    return expert, weight, sums.sum(0)


def _gradient(
    logits: Tensor,
    valid: Tensor,
    expert: Tensor,
    weight: Tensor,
    d_weight: Tensor | None,
    d_probability: Tensor | None,
    d_z: Tensor | None,
    selected: bool,
    scale: float,
) -> Tensor:
    (t, experts), out = logits.shape, torch.empty_like(logits)
    padded, block = _block(experts)
    if t:
        given = (d_weight, d_probability, d_z)
        present = (d is not None for d in given)
        gradient[(triton.cdiv(t, block),)](
            logits, valid, expert, weight, *given, out, t, experts, scale, expert.shape[1], padded, block, selected, *present
        )
    return out


def _block(experts: int) -> tuple[int, int]:
    """Columns of a program, and tokens."""
    padded = triton.next_power_of_2(experts)
    return padded, max(_AT_ONCE // padded, 1)


@torch.library.custom_op("moe::top_k", mutates_args=())
def _choose_operator(
    logits: Tensor, valid: Tensor, bias: Tensor | None, k: int, selected: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _choose(logits, valid, bias, k, selected, scale)


@_choose_operator.register_fake
def _(logits, valid, bias, k, selected, scale):
    t, experts = logits.shape
    return logits.new_empty(t, k, dtype=torch.int64), logits.new_empty(t, k), logits.new_empty(experts + 3)


@torch.library.custom_op("moe::top_k_gradient", mutates_args=())
def _gradient_operator(
    logits: Tensor,
    valid: Tensor,
    expert: Tensor,
    weight: Tensor,
    d_weight: Tensor | None,
    d_probability: Tensor | None,
    d_z: Tensor | None,
    selected: bool,
    scale: float,
) -> Tensor:
    return _gradient(logits, valid, expert, weight, d_weight, d_probability, d_z, selected, scale)


@_gradient_operator.register_fake
def _(logits, valid, expert, weight, d_weight, d_probability, d_z, selected, scale):
    return torch.empty_like(logits)


@triton.jit
def softmax(x):
    """Probabilities of each row, and what they were made of: x less its largest, the sum of its exponentials, logsumexp."""
    top = tl.max(x, 1)
    below = x - top[:, None]
    exponential = tl.exp(below)
    total = tl.sum(exponential, 1)
    return exponential / total[:, None], below, total, top + tl.log(total)


@triton.jit
def sortable(x):
    """Integers in the order of the floats: zeros are equal, NaN is the largest."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["t"])
def choose(
    logits,
    valid,
    bias,
    expert,
    weight,
    sums,
    t,
    experts,
    scale,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECTED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One program takes BLOCK tokens; WIDTH and EXPERTS are K and `experts` made powers of two."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e, lane = tl.arange(0, EXPERTS), tl.arange(0, WIDTH)
    counted = tl.load(valid + token, mask=token < t, other=0) != 0
    is_expert = (e < experts)[None, :]
    x = tl.load(logits + token[:, None] * experts + e[None, :], mask=(token < t)[:, None] & is_expert, other=-float("inf"))
    probability, below, total, normaliser = softmax(x)

    score = x
    if BIASED:
        score = probability + tl.load(bias + e, mask=e < experts, other=0.0)[None, :]
    key = tl.where(is_expert, tl.maximum(sortable(score), -0x7F800000), -0x7FFFFFFF - 1)  # -inf as the lowest finite number
    chosen = tl.zeros([BLOCK, WIDTH], tl.int32)
    value = tl.full([BLOCK, WIDTH], -float("inf"), tl.float32)
    for j in range(K):
        found = tl.argmax(key, 1)  # the first of equals
        here = e[None, :] == found[:, None]
        chosen = tl.where(lane[None, :] == j, found[:, None], chosen)
        value = tl.where(lane[None, :] == j, tl.sum(tl.where(here, below, 0.0), 1)[:, None], value)
        key = tl.where(here, -0x7F800001, key)  # of -inf: below every score, above what is no expert
    if SELECTED:
        share = tl.exp(value - tl.max(value, 1)[:, None])
        share = share / tl.sum(share, 1)[:, None]
    else:
        share = tl.exp(value) / total[:, None]
    place = token[:, None] * K + lane[None, :]
    written = (token < t)[:, None] & (lane < K)[None, :]
    tl.store(expert + place, tl.where(counted[:, None], chosen, experts).to(tl.int64), mask=written)
    tl.store(weight + place, tl.where(counted[:, None], scale * share, 0.0), mask=written)

    probability = tl.where(counted[:, None], probability, 0.0)
    information = tl.where(probability == 0.0, 0.0, probability * (tl.log(total)[:, None] - below))
    sums += tl.program_id(0).to(tl.int64) * (experts + 3)
    tl.store(sums + e, tl.sum(probability, 0), mask=e < experts)
    tl.store(sums + experts, tl.sum(tl.where(counted, normaliser * normaliser, 0.0), 0))
    tl.store(sums + experts + 1, tl.sum(tl.sum(information, 1), 0))
    tl.store(sums + experts + 2, tl.sum(tl.where(counted, 1.0 / total, 0.0), 0))  # exp(0) / total is the largest


@triton.jit(do_not_specialize=["t"])
def gradient(
    logits,
    valid,
    expert,
    weight,
    d_weight,
    d_probability,
    d_z,
    out,
    t,
    experts,
    scale,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECTED: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    OF_PROBABILITY: tl.constexpr,
    OF_Z: tl.constexpr,
):
    """With p the probabilities and q_j = weight_j d weight_j of the chosen j, the gradient of logit i is the sum of

    p_i (d p_i - sum p d p)                                  from the summed probabilities
    2 logsumexp p_i d z                                      from z
    q_i - p_i sum q,  or SELECTED  q_i - weight_i / scale sum q      from the weights (no q_i: not chosen)
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, EXPERTS)
    counted = tl.load(valid + token, mask=token < t, other=0) != 0
    is_entry = (token < t)[:, None] & (e < experts)[None, :]
    x = tl.load(logits + token[:, None] * experts + e[None, :], mask=is_entry, other=-float("inf"))
    probability, _, _, normaliser = softmax(x)
    found = tl.zeros([BLOCK, EXPERTS], tl.float32)
    if OF_PROBABILITY:
        d = tl.load(d_probability + e, mask=e < experts, other=0.0)[None, :]
        found += probability * (d - tl.sum(probability * d, 1)[:, None])
    if OF_Z:
        found += 2.0 * tl.load(d_z) * normaliser[:, None] * probability
    if OF_WEIGHT:
        total = tl.zeros([BLOCK], tl.float32)
        for j in range(K):
            at = token * K + j
            total += tl.load(weight + at, mask=token < t, other=0.0) * tl.load(d_weight + at, mask=token < t, other=0.0)
        if not SELECTED:
            found -= probability * total[:, None]
        for j in range(K):
            at = token * K + j
            w = tl.load(weight + at, mask=token < t, other=0.0)
            q = w * tl.load(d_weight + at, mask=token < t, other=0.0)
            if SELECTED:
                q -= w / scale * total
            chosen = tl.load(expert + at, mask=token < t, other=experts)
            found += tl.where(e[None, :] == chosen[:, None], q[:, None], 0.0)
    tl.store(out + token[:, None] * experts + e[None, :], tl.where(counted[:, None], found, 0.0), mask=is_entry)
