"""The experts' forward pass in Triton: gathered up-projection with its activation, down-projection, and each vector's sum.

Rows past the last expert's belong to no tile: they are neither computed nor read.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.triton_configs import Config
from moe.kernels.triton_tiles import Tiles, activate, load, precision, row_pointer, store, tile_and_column, upcast
from moe.shapes import Float, Int

_TOGETHER = 8  # rows of a vector that `combine` has under way at once


def up(
    x: Float[Tensor, "m d"],
    index: Int[Tensor, " n"],
    tiles: Tiles,
    weights: Float[Tensor, "E g f d"],
    activation: str,
    config: Config,
    keep: bool,
) -> tuple[Float[Tensor, "p h"], Float[Tensor, "n f"]]:
    """Pre-activations [gate | up] (no rows without `keep`), and act(gate) * up or act(hidden); rows that do not count stay as they were."""
    (_, gates, f, d), n, slots = weights.shape, len(index), len(tiles.expert)
    hidden, activated = x.new_empty(n if keep else 0, gates * f), x.new_empty(n, f)
    stack = _stack(weights.flatten(1, 2), config)
    if slots:
        up_kernel[(slots * triton.cdiv(f, config.BLOCK_N),)](
            *(x, index, stack, hidden, activated, tiles.expert, tiles.start, tiles.end),
            *(slots, d, f, weights.stride(0)),
            ACTIVATION=activation,
            GATED=gates == 2,
            KEEP=keep,
            **_blocks(config, stack, x.dtype, d),
        )
    return hidden, activated


def down(
    activated: Float[Tensor, "n f"], weight: Float[Tensor, " n"], tiles: Tiles, weights: Float[Tensor, "E d f"], config: Config
) -> Float[Tensor, "n d"]:
    """Each row's output times its weight, in expert order; rows that do not count stay as they were."""
    (_, d, f), slots = weights.shape, len(tiles.expert)
    y = activated.new_empty(len(activated), d)
    stack = _stack(weights, config)
    if slots:
        rows = activated
        if isinstance(stack, TensorDescriptor):
            rows = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [config.BLOCK_M, config.BLOCK_K])
        down_kernel[(slots * triton.cdiv(d, config.BLOCK_N),)](
            *(rows, weight, stack, y, tiles.expert, tiles.start, tiles.end, slots, f, d, weights.stride(0)),
            **_blocks(config, stack, activated.dtype, f),
        )
    return y


def combine(
    y: Float[Tensor, "n d"], index: Int[Tensor, " n"], slots: Int[Tensor, "m k"] | None, tiles: Tiles, m: int, config: Config
) -> Float[Tensor, "m d"]:
    """Each vector's sum of its rows that count, in float32 and a fixed order: that of `slots`, or of the rows."""
    d = y.shape[1]
    out = y.new_empty(m, d)
    if slots is None:
        fan_out = 0
        order, starts = _by_vector(index, m)
    else:
        fan_out = slots.shape[1]
        order, starts = slots.contiguous(), None
    if m:
        together = min(triton.next_power_of_2(fan_out), _TOGETHER) if fan_out else _TOGETHER
        combine_kernel[(m, triton.cdiv(d, config.BLOCK_N))](
            *(y, order, starts, tiles.ends, out, len(tiles.ends), d, fan_out),
            TOGETHER=together,
            BLOCK_N=config.BLOCK_N,
            UPCAST=upcast(y.dtype),
            num_warps=config.warps,
        )
    return out


def _by_vector(index: Int[Tensor, " n"], m: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " s"]]:
    """Rows in the order of their vectors, and where each vector's begin; nothing waits for the device."""
    vector, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(vector, torch.arange(m + 1, device=index.device))


def _stack(weights: Float[Tensor, "E n k"], config: Config) -> Tensor | TensorDescriptor:
    """Stacked matrices as a kernel's argument: a descriptor of BLOCK_N x BLOCK_K tiles, or the tensor where alignment forbids one."""
    strides = [stride * weights.element_size() for stride in weights.stride()[:-1]]
    if not config.tma or weights.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return weights
    return TensorDescriptor(weights, list(weights.shape), list(weights.stride()), [1, config.BLOCK_N, config.BLOCK_K])


def _blocks(config: Config, stack: Tensor | TensorDescriptor, dtype: torch.dtype, contracted: int) -> dict[str, Any]:
    sizes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K, "GROUP_M": config.group_m}
    numbers = {
        "EVEN_K": contracted % config.BLOCK_K == 0,
        "TMA": isinstance(stack, TensorDescriptor),
        "UPCAST": upcast(dtype),
        "PRECISION": precision(),
    }
    return sizes | numbers | {"num_warps": config.warps, "num_stages": config.stages}


@triton.jit
def columns(
    stack, expert, row, first, width,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK_K, BLOCK_N] of an expert's matrix, transposed: of its rows from `row`, entries `first` and on."""
    if TMA:
        block = stack.load([expert, row, first]).reshape(BLOCK_N, BLOCK_K).T
        if UPCAST:
            block = block.to(tl.float32)
    else:
        k = first + tl.arange(0, BLOCK_K)
        block = load(stack + k[:, None], None if EVEN_K else (k < width)[:, None], UPCAST)
    return block


@triton.jit
def matrix_rows(stack, expert, expert_stride, row, rows, width, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """What `columns` reads: pointers to the starts of BLOCK_N of an expert's rows from `row`, the last of `rows` repeated; or `stack`."""
    if TMA:
        return stack
    else:
        n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1)
        return row_pointer(stack, expert, expert_stride) + n[None, :] * width


@triton.jit(do_not_specialize=["slots"])
def up_kernel(
    x, index, stack, hidden, activated, tile_expert, tile_start, tile_end, slots, d, f, expert_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, column = tile_and_column(slots, tl.cdiv(f, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    start = tl.load(tile_start + tile)
    row = tl.arange(0, BLOCK_M)
    inside = row < tl.load(tile_end + tile) - start
    source = tl.load(index + start + row, mask=inside, other=0)  # a row that is not inside reads any vector, and writes nothing
    left = row_pointer(x, source, d)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    n = column * BLOCK_N
    gate_rows = matrix_rows(stack, expert, expert_stride, n, f, d, BLOCK_N, TMA)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_rows = matrix_rows(stack, expert, expert_stride, f + n, 2 * f, d, BLOCK_N, TMA)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, d, BLOCK_K):
        a = load(left, None if EVEN_K else (first + tl.arange(0, BLOCK_K) < d)[None, :], UPCAST)
        b = columns(gate_rows, expert, n, first, d, BLOCK_N, BLOCK_K, EVEN_K, TMA, UPCAST)
        gate = tl.dot(a, b, gate, input_precision=PRECISION)
        if GATED:
            b = columns(up_rows, expert, f + n, first, d, BLOCK_N, BLOCK_K, EVEN_K, TMA, UPCAST)
            up = tl.dot(a, b, up, input_precision=PRECISION)
        left += BLOCK_K
    column_index = n + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (column_index < f)[None, :]
    at = row[:, None] * f + column_index[None, :]
    if KEEP:
        kept = row_pointer(hidden, start, f * (1 + GATED)) + row[:, None] * (f * (1 + GATED)) + column_index[None, :]
        store(kept, gate, mask, UPCAST)
        if GATED:
            store(kept + f, up, mask, UPCAST)
    value = activate(gate, ACTIVATION)
    if GATED:
        value *= up
    store(row_pointer(activated, start, f) + at, value, mask, UPCAST)


@triton.jit(do_not_specialize=["slots"])
def down_kernel(
    activated, weight, stack, y, tile_expert, tile_start, tile_end, slots, f, d, expert_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, column = tile_and_column(slots, tl.cdiv(d, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    start = tl.load(tile_start + tile)
    count = tl.load(tile_end + tile) - start
    row = tl.arange(0, BLOCK_M)
    if not TMA:
        left = row_pointer(activated, start, f) + tl.minimum(row, count - 1)[:, None] * f + tl.arange(0, BLOCK_K)[None, :]
    n = column * BLOCK_N
    rows = matrix_rows(stack, expert, expert_stride, n, d, f, BLOCK_N, TMA)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, f, BLOCK_K):
        if TMA:  # rows of the next expert come along; a row of the product depends on its own alone
            a = activated.load([start, first])
            if UPCAST:
                a = a.to(tl.float32)
        else:
            a = load(left, None if EVEN_K else (first + tl.arange(0, BLOCK_K) < f)[None, :], UPCAST)
            left += BLOCK_K
        b = columns(rows, expert, n, first, f, BLOCK_N, BLOCK_K, EVEN_K, TMA, UPCAST)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    product *= tl.load(weight + start + row, mask=row < count, other=0.0).to(tl.float32)[:, None]
    column_index = n + tl.arange(0, BLOCK_N)
    mask = (row < count)[:, None] & (column_index < d)[None, :]
    store(row_pointer(y, start, d) + row[:, None] * d + column_index[None, :], product, mask, UPCAST)


@triton.jit
def combine_kernel(
    y, order, starts, ends, out, experts, d, fan_out, TOGETHER: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr
):  # rows starts[v] to starts[v + 1] of `order` are those of vector v; without starts, fan_out rows each
    vector = tl.program_id(0)
    rows = tl.load(ends + experts - 1)
    if starts is None:
        first = vector.to(tl.int64) * fan_out
        last = first + fan_out
    else:
        first = tl.load(starts + vector)
        last = tl.load(starts + vector + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for place in range(first, last, TOGETHER):
        here = place + tl.arange(0, TOGETHER)
        row = tl.load(order + here, mask=here < last, other=rows)
        value = tl.load(row_pointer(y, row, d)[:, None] + n[None, :], mask=(row < rows)[:, None] & (n < d)[None, :], other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    store(row_pointer(out, vector, d) + n, total, n < d, UPCAST)
