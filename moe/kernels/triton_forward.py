"""The experts' forward pass in Triton: gathered up-projection with its activation, down-projection, and each vector's sum.

Rows past the last expert's belong to no tile: they are neither computed nor read.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.triton_configs import Config
from moe.kernels.triton_tiles import (
    Tiles,
    activate,
    halves,
    load,
    precision,
    programs,
    row_pointer,
    store,
    store_rows,
    tile_and_column,
    upcast,
)
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
    (_, gates, f, d), n = weights.shape, len(index)
    hidden, activated = x.new_empty(n if keep else 0, gates * f), x.new_empty(n, f)
    slots, columns = len(tiles.expert), triton.cdiv(f, config.BLOCK_N)
    if slots:
        up_kernel[(slots * columns,)](
            *(x, index, _stack(weights, config), hidden, activated, tiles.expert, tiles.start, tiles.end, tiles.count),
            *(d, f, weights.stride(0)),
            ACTIVATION=activation,
            KEEP=keep,
            **_blocks(config, gates, x.dtype, d),
        )
    return hidden, activated


def down(
    activated: Float[Tensor, "n f"], weight: Float[Tensor, " n"], tiles: Tiles, weights: Float[Tensor, "E d f"], config: Config
) -> Float[Tensor, "n d"]:
    """Each row's output times its weight, in expert order; rows that do not count stay as they were."""
    (_, d, f), slots = weights.shape, len(tiles.expert)
    y = activated.new_empty(len(activated), d)
    stack, rows = _stack(weights[:, None], config), activated
    if slots:
        if isinstance(stack, TensorDescriptor):
            rows = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [config.BLOCK_M, config.BLOCK_K])
        down_kernel[(programs(config, slots * triton.cdiv(d, config.BLOCK_N), y.device),)](
            *(rows, weight, stack, y, tiles.expert, tiles.start, tiles.end, tiles.count, f, d, weights.stride(0)),
            PERSISTENT=config.persistent,
            **_blocks(config, 1, activated.dtype, f),
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


def _stack(weights: Float[Tensor, "E g n k"], config: Config) -> Tensor | TensorDescriptor:
    """Stacked matrices as a kernel's argument: a descriptor of BLOCK_N x BLOCK_K tiles of all halves, or the tensor itself."""
    strides = [stride * weights.element_size() for stride in weights.stride()[:-1]]
    if not config.tma or weights.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return weights
    tile = [1, weights.shape[1], config.BLOCK_N, config.BLOCK_K]
    return TensorDescriptor(weights, list(weights.shape), list(weights.stride()), tile)


def _blocks(config: Config, gates: int, dtype: torch.dtype, contracted: int) -> dict[str, Any]:
    sizes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K, "GROUP_M": config.group_m, "GATES": gates}
    rules = {"EVEN_K": contracted % config.BLOCK_K == 0, "UPCAST": upcast(dtype), "PRECISION": precision()}
    return sizes | rules | {"num_warps": config.warps, "num_stages": config.stages}


@triton.jit
def multiply(
    left, start, stack, expert, expert_stride, first_row, rows, contracted,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATES: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows at the pointers `left`, or from `start` of a descriptor, times rows first_row to first_row + BLOCK_N of an expert's matrices.

    With a gate (GATES = 2) a step loads a tile of both matrices at once, so that one product of 2 * BLOCK_N columns serves both:

        stack [E, 2, f, d]      box [1, 2, BLOCK_N, BLOCK_K]      product [BLOCK_M, 2 * BLOCK_N] = [ gate | up ]

    The result is float32.
    """
    TMA: tl.constexpr = isinstance(stack, tl.tensor_descriptor)
    WIDTH: tl.constexpr = GATES * BLOCK_N
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        n = tl.arange(0, WIDTH)
        row = n // BLOCK_N * rows + tl.minimum(first_row + n % BLOCK_N, rows - 1)  # past the last row, that one is read again
        right = row_pointer(stack, expert, expert_stride) + row[None, :] * contracted + k[:, None]
    product = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for first in range(0, contracted, BLOCK_K):
        if isinstance(left, tl.tensor_descriptor):  # rows of the next expert come along; each row of the product is its own
            a = left.load([start, first])
            if UPCAST:
                a = a.to(tl.float32)
        else:
            a = load(left, None if EVEN_K else (first + k < contracted)[None, :], UPCAST)
            left += BLOCK_K
        if TMA:
            b = stack.load([expert, 0, first_row, first]).reshape(WIDTH, BLOCK_K).T
            if UPCAST:
                b = b.to(tl.float32)
        else:
            b = load(right, None if EVEN_K else (first + k < contracted)[:, None], UPCAST)
            right += BLOCK_K
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def up_kernel(
    x, index, stack, hidden, activated, tile_expert, tile_start, tile_end, tile_count, d, f, expert_stride,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, GATES: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    used = tl.load(tile_count)
    if tl.program_id(0) >= used * tl.cdiv(f, BLOCK_N):
        return
    tile, column = tile_and_column(tl.program_id(0), used, tl.cdiv(f, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    start = tl.load(tile_start + tile)
    row = tl.arange(0, BLOCK_M)
    inside = row < tl.load(tile_end + tile) - start
    source = tl.load(index + start + row, mask=inside, other=0)  # a row that is not inside reads any vector, and writes nothing
    left = row_pointer(x, source, d)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    n = column * BLOCK_N
    product = multiply(left, start, stack, expert, expert_stride, n, f, d, BLOCK_M, BLOCK_N, BLOCK_K, GATES, EVEN_K, UPCAST, PRECISION)
    column_index = n + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (column_index < f)[None, :]
    kept = row_pointer(hidden, start, f * GATES) + row[:, None] * (f * GATES) + column_index[None, :]
    if GATES == 2:
        gate, up = halves(product)
        if KEEP:
            store(kept, gate, mask, UPCAST)
            store(kept + f, up, mask, UPCAST)
        value = activate(gate, ACTIVATION) * up
    else:
        if KEEP:
            store(kept, product, mask, UPCAST)
        value = activate(product, ACTIVATION)
    store(row_pointer(activated, start, f) + row[:, None] * f + column_index[None, :], value, mask, UPCAST)


@triton.jit
def down_kernel(
    activated, weight, stack, y, tile_expert, tile_start, tile_end, tile_count, f, d, expert_stride,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, GATES: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    used, columns = tl.load(tile_count), tl.cdiv(d, BLOCK_N)
    if PERSISTENT:  # see `programs`
        for program in tl.range(tl.program_id(0), used * columns, tl.num_programs(0), flatten=True):
            down_tile(
                program, used, activated, weight, stack, y, tile_expert, tile_start, tile_end, f, d, expert_stride,
                4, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, GATES, EVEN_K, UPCAST, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < used * columns:
        down_tile(
            tl.program_id(0), used, activated, weight, stack, y, tile_expert, tile_start, tile_end, f, d, expert_stride,
            1, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, GATES, EVEN_K, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit
def down_tile(
    program, used, activated, weight, stack, y, tile_expert, tile_start, tile_end, f, d, expert_stride,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GATES: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `down`, written in CHUNKS blocks of columns."""
    tile, column = tile_and_column(program, used, tl.cdiv(d, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    start = tl.load(tile_start + tile)
    count = tl.load(tile_end + tile) - start
    row = tl.arange(0, BLOCK_M)
    left = activated
    if not isinstance(activated, tl.tensor_descriptor):
        left = row_pointer(activated, start, f) + tl.minimum(row, count - 1)[:, None] * f + tl.arange(0, BLOCK_K)[None, :]
    n = column * BLOCK_N
    product = multiply(left, start, stack, expert, expert_stride, n, d, f, BLOCK_M, BLOCK_N, BLOCK_K, GATES, EVEN_K, UPCAST, PRECISION)
    factor = tl.load(weight + start + row, mask=row < count, other=0.0).to(tl.float32)[:, None]
    store_rows(row_pointer(y, start, d), product, factor, row, count, n, d, CHUNKS, UPCAST)


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
