"""Gradients of the experts in Triton: of the pre-activations, of both weights, and of the gathered rows.

Nothing is added atomically and every sum has a fixed order, so the same rows give the same bits.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.errors import ConfigError
from moe.kernels.triton_configs import Config
from moe.kernels.triton_tiles import (
    Tiles,
    activate,
    activation_gradient,
    cut,
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

_SUMMED = 256  # rows of one program of `sum_blocks`
_HELD = 8  # elements of a product that a thread of `down_dgrad` finishes at once: with 64 registers spill, with 16 one block fills an SM


class HiddenGradients(NamedTuple):
    """What `down_dgrad` leaves for the products after it, beside the gradient of the pre-activations."""

    weight: Float[Tensor, " n"]  # zero for dropped rows
    weighted: Float[Tensor, "n f"] | None  # activations times weight and scale: with grad, they give the gradient of `down`


def down_dgrad(
    grad: Float[Tensor, "m d"],
    hidden: Float[Tensor, "n h"],
    index: Int[Tensor, " n"],
    weight: Float[Tensor, " n"],
    scale: Float[Tensor, " n"] | None,
    down: Float[Tensor, "E d f"],
    activation: str,
    tiles: Tiles,
    config: Config,
    grad_hidden: Float[Tensor, "n h"] | None,
    *,
    weighted: bool = True,
) -> HiddenGradients:
    """Gradients of the rows' weights and, into `grad_hidden`, of the pre-activations; the activations that `down`'s gradient needs.

    `grad_hidden` may be `hidden` itself; None leaves it out. Dropped rows of `grad_hidden` and `weighted` stay as they were.
    """
    (rows, width), (_, d, f) = hidden.shape, down.shape
    out = HiddenGradients(torch.empty_like(weight), hidden.new_empty(rows, f) if weighted else None)
    slots, columns = len(tiles.expert), triton.cdiv(f, config.BLOCK_N)
    sums = torch.empty(columns, rows, dtype=torch.float32, device=weight.device)
    if rows == 0:
        return out
    down_dgrad_kernel[(slots * columns,)](
        *(grad, index, weight, scale, hidden, weights(down, config), grad_hidden, out.weighted, sums),
        *(tiles.expert, tiles.start, tiles.end, tiles.count, rows, d, f, down.stride(0)),
        CHUNKS=chunks(config),
        GATED=width == 2 * f,
        ACTIVATION=activation,
        EVEN_K=d % config.BLOCK_K == 0,
        **blocks(config, grad.dtype, f),
    )
    grid = (triton.cdiv(rows, _SUMMED),)
    sum_blocks[grid](sums, tiles.ends, out.weight, rows, columns, len(tiles.ends), _SUMMED, num_warps=4)
    return out


def up_dgrad(grad_hidden: Float[Tensor, "n h"], up: Float[Tensor, "E g f d"], tiles: Tiles, config: Config) -> Float[Tensor, "n d"]:
    """Gradients of the gathered rows, one reduction over both halves of a gated weight; dropped rows are left unwritten."""
    (rows, width), d = grad_hidden.shape, up.shape[3]
    out = grad_hidden.new_empty(rows, d)
    slots, columns = len(tiles.expert), triton.cdiv(d, config.BLOCK_N)
    if rows == 0:
        return out
    source = weights(up.flatten(1, 2), config)
    left = grad_hidden
    if isinstance(source, TensorDescriptor):
        left = TensorDescriptor(left, [rows, width], [width, 1], [config.BLOCK_M, config.BLOCK_K])
    up_dgrad_kernel[(programs(config, slots * columns, out.device),)](
        *(left, source, out, tiles.expert, tiles.start, tiles.end, tiles.count, width, d, up.stride(0)),
        PERSISTENT=config.persistent,
        EVEN_K=width % config.BLOCK_K == 0,
        **blocks(config, grad_hidden.dtype, d),
    )
    return out


def wgrad(
    left: Float[Tensor, "l p"],
    right: Float[Tensor, "r q"],
    index: Int[Tensor, " n"],
    gathered: Literal["left", "right"],
    ends: Int[Tensor, " E"],
    out: Float[Tensor, "E p q"],
    config: Config,
    *,
    accumulate: bool = False,
) -> None:
    """out[e] = L_e^T @ R_e, or added to it, L_e and R_e being expert e's rows of the two sides, one of them gathered by `index`.

    Experts without rows get zeros; the dtype of `out` is its own, and so is its stride over experts.
    """
    experts, p, q = out.shape
    if (out.stride(1), out.stride(2)) != (q, 1):
        raise ConfigError(f"a gradient with strides {out.stride()} cannot be written; make its last two dimensions contiguous")
    wgrad_kernel[(triton.cdiv(p, config.BLOCK_M) * triton.cdiv(q, config.BLOCK_N), experts)](
        *(left, right, index, ends, out, p, q, out.stride(0)),
        GATHER_LEFT=gathered == "left",
        ACCUMULATE=accumulate,
        ROUND=upcast(out.dtype),
        EVEN_M=p % config.BLOCK_M == 0,
        **blocks(config, left.dtype, q),
    )


def chunks(config: Config) -> int:
    """How many column chunks the last part of `down_dgrad` is cut into."""
    held = config.BLOCK_M * config.BLOCK_N // (32 * config.warps)
    return min(8, max(1, held // _HELD), config.BLOCK_N // 16)


def weights(stack: Float[Tensor, "E k n"], config: Config) -> Tensor | TensorDescriptor:
    """Stacked matrices as a kernel's argument: a descriptor of [BLOCK_K, BLOCK_N] tiles, or the tensor itself."""
    strides = [stride * stack.element_size() for stride in stack.stride()[:-1]]
    if not config.tma or stack.data_ptr() % 16 or any(stride % 16 for stride in strides):
        return stack
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), [1, config.BLOCK_K, config.BLOCK_N])


def blocks(config: Config, dtype: torch.dtype, columns: int) -> dict[str, Any]:
    """Constants that all products share."""
    sizes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K, "GROUP_M": config.group_m}
    rules = {"EVEN_N": columns % config.BLOCK_N == 0, "UPCAST": upcast(dtype), "PRECISION": precision()}
    return sizes | rules | {"num_warps": config.warps, "num_stages": config.stages}


@triton.jit
def multiply(
    left, start, right, expert, expert_stride, column, contracted, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows at the pointers `left`, or from `start` of a descriptor, times a block of columns of an expert's matrix, in float32."""
    TMA: tl.constexpr = isinstance(right, tl.tensor_descriptor)
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if not TMA:
        right = row_pointer(right, expert, expert_stride) + k[:, None] * columns + n[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, contracted, BLOCK_K):
        if isinstance(left, tl.tensor_descriptor):  # rows of the next expert come along; each row of the product is its own
            a = left.load([start, first])
            if UPCAST:
                a = a.to(tl.float32)
        else:
            a = load(left, None if EVEN_K else (first + k < contracted)[None, :], UPCAST)
            left += BLOCK_K
        if TMA:
            b = right.load([expert, first, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            if UPCAST:
                b = b.to(tl.float32)
        else:
            mask = None
            if not EVEN_K:
                mask = (first + k < contracted)[:, None] & (n < columns)[None, :]
            elif not EVEN_N:
                mask = (n < columns)[None, :]
            b = load(right, mask, UPCAST)
            right += BLOCK_K * columns
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def finish(product, first, hidden, grad_hidden, weighted, row, inside, received, factor, f,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write what follows from a chunk of columns of grad @ down; the chunk's part of the gradient of the rows' weights."""
    n = first + tl.arange(0, product.shape[1])
    mask = inside[:, None] & (n < f)[None, :]
    at = row[:, None] * (f * (1 + GATED)) + n[None, :]
    gate = load(hidden + at, mask, False).to(tl.float32)
    if GATED:
        up = load(hidden + f + at, mask, False).to(tl.float32)
    tl.debug_barrier()  # grad_hidden may be hidden: no thread writes its part of the chunk before all have read theirs
    activated = activate(gate, ACTIVATION)
    slope = activation_gradient(gate, ACTIVATION)
    grad_activated = product * factor[:, None]
    if GATED:
        if grad_hidden is not None:
            store(grad_hidden + f + at, grad_activated * activated, mask, UPCAST)
        activated *= up
        slope *= up
    if grad_hidden is not None:
        store(grad_hidden + at, grad_activated * slope, mask, UPCAST)
    if weighted is not None:
        store(weighted + row[:, None] * f + n[None, :], activated * factor[:, None], mask, UPCAST)
    return tl.sum(product * activated, 1) * received


@triton.jit(do_not_specialize=["rows"])
def down_dgrad_kernel(
    grad, index, weight, scale, hidden, down, grad_hidden, weighted, sums, tile_expert, tile_start, tile_end,
    tile_count, rows, d, f, expert_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    used = tl.load(tile_count)
    if tl.program_id(0) >= used * tl.cdiv(f, BLOCK_N):
        return
    tile, column = tile_and_column(tl.program_id(0), used, tl.cdiv(f, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    start = tl.load(tile_start + tile)
    row = tl.arange(0, BLOCK_M)
    inside = row < tl.load(tile_end + tile) - start
    source = tl.load(index + start + row, mask=inside, other=0)  # a row that is not inside reads any, and writes nothing
    left = row_pointer(grad, source, d)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    product = multiply(left, start, down, expert, expert_stride, column, d, f, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, UPCAST, PRECISION)
    factor = tl.load(weight + start + row, mask=inside, other=0.0)
    received = tl.full([BLOCK_M], 1.0, tl.float32)
    if scale is not None:
        received = tl.load(scale + start + row, mask=inside, other=0.0).to(tl.float32)
        factor *= received
    hidden = row_pointer(hidden, start, f * (1 + GATED))
    if grad_hidden is not None:
        grad_hidden = row_pointer(grad_hidden, start, f * (1 + GATED))
    if weighted is not None:
        weighted = row_pointer(weighted, start, f)
    first = column * BLOCK_N
    parts = cut(product, CHUNKS)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(CHUNKS):
        at = first + part * (BLOCK_N // CHUNKS)
        total += finish(parts[part], at, hidden, grad_hidden, weighted, row, inside, received, factor, f, GATED, ACTIVATION, UPCAST)
    tl.store(row_pointer(sums, column, rows) + start + row, total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def sum_blocks(sums, ends, out, rows, blocks, experts, ROWS: tl.constexpr):
    """Sum of each row's blocks, one after the other; zero for rows that do not count."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counts = row < tl.load(ends + experts - 1)
    total = tl.zeros([ROWS], tl.float32)
    for _ in range(blocks):
        total += tl.load(sums + row, mask=counts, other=0.0)
        sums += rows
    tl.store(out + row, total, mask=row < rows)


@triton.jit
def up_dgrad_kernel(
    grad_hidden, up, out, tile_expert, tile_start, tile_end, tile_count, width, d, expert_stride,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    used, columns = tl.load(tile_count), tl.cdiv(d, BLOCK_N)
    if PERSISTENT:  # see `programs`
        for program in tl.range(tl.program_id(0), used * columns, tl.num_programs(0), flatten=True):
            up_dgrad_tile(
                program, used, grad_hidden, up, out, tile_expert, tile_start, tile_end, width, d, expert_stride,
                4, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_N, EVEN_K, UPCAST, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < used * columns:
        up_dgrad_tile(
            tl.program_id(0), used, grad_hidden, up, out, tile_expert, tile_start, tile_end, width, d, expert_stride,
            1, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_N, EVEN_K, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit
def up_dgrad_tile(
    program, used, grad_hidden, up, out, tile_expert, tile_start, tile_end, width, d, expert_stride,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `up_dgrad`, written in CHUNKS blocks of columns."""
    tile, column = tile_and_column(program, used, tl.cdiv(d, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert + tile)
    start = tl.load(tile_start + tile)
    count = tl.load(tile_end + tile) - start
    row = tl.arange(0, BLOCK_M)
    left = grad_hidden
    if not isinstance(grad_hidden, tl.tensor_descriptor):
        left = row_pointer(grad_hidden, start, width) + tl.minimum(row, count - 1)[:, None] * width + tl.arange(0, BLOCK_K)[None, :]
    product = multiply(
        left, start, up, expert, expert_stride, column, width, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, UPCAST, PRECISION
    )
    store_rows(row_pointer(out, start, d), product, None, row, count, column * BLOCK_N, d, CHUNKS, UPCAST)


@triton.jit
def wgrad_kernel(
    left, right, index, ends, out, p, q, expert_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    GATHER_LEFT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    block, column = tile_and_column(tl.program_id(0), tl.cdiv(p, BLOCK_M), tl.cdiv(q, BLOCK_N), GROUP_M)
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if ACCUMULATE and start == end:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # The left tile is loaded transposed, [BLOCK_M, BLOCK_K] with columns side by side in memory: the form that a product takes
    # from shared memory on every architecture (`a.T` of a loaded tile would pass through registers on sm_80).
    if GATHER_LEFT:
        right = row_pointer(right, start, q) + k[:, None] * q + n[None, :]
    else:
        left = row_pointer(left, start, p) + k[None, :] * p + m[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The index of a step is loaded a step earlier and carried over: no copy of a step waits for a load of the same step, so
    # copies run ahead of the product by stages - 2 steps (figure: stages = 4).
    #
    #     step i        product(i)      cp.async rows(i + 3) at index(i + 3)      load index(i + 4)
    #     step i + 1    product(i + 1)  cp.async rows(i + 4) at index(i + 4)      load index(i + 5)
    source = tl.load(index + start + k, mask=start + k < end, other=0)
    for first in range(start, end, BLOCK_K):
        inside = first + k < end  # masks both sides: what lies past the expert's rows may be NaN, and 0 * NaN is NaN
        left_mask = inside[None, :] if EVEN_M else inside[None, :] & (m < p)[:, None]
        right_mask = inside[:, None] if EVEN_N else inside[:, None] & (n < q)[None, :]
        if GATHER_LEFT:
            a = load(row_pointer(left, source, p)[None, :] + m[:, None], left_mask, UPCAST)
            b = load(right, right_mask, UPCAST)
            right += BLOCK_K * q
        else:
            a = load(left, left_mask, UPCAST)
            b = load(row_pointer(right, source, q)[:, None] + n[None, :], right_mask, UPCAST)
            left += BLOCK_K * p
        source = tl.load(index + first + BLOCK_K + k, mask=first + BLOCK_K + k < end, other=0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    out = row_pointer(out, expert, expert_stride) + (block * BLOCK_M).to(tl.int64) * q
    PARTS: tl.constexpr = 4 if ACCUMULATE else 1  # what is added to takes registers too: with all of it at once they spill
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = cut(product, PARTS)
    for part in tl.static_range(PARTS):
        n = column * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        mask = (m < p)[:, None] & (n < q)[None, :]
        at = out + tl.arange(0, BLOCK_M)[:, None] * q + n[None, :]
        total = parts[part]
        if ACCUMULATE:
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        store(at, total, mask, ROUND)
