"""Row tiles: the rows of each expert cut into blocks, on the device, and what every Triton kernel does with a block.

Rows of one tile belong to one expert, so a kernel multiplies each tile by one matrix. How many tiles there are is known only
to the device; their number is bounded on the host, and slots that hold no tile are left at once.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# Triton's kernels are compiled by rules of their own, which the checker does not know.

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.triton_configs import Config
from moe.shapes import Int

_ALIGNED = 4  # slots of 16 bytes
_TABLE = 4096  # entries of the table slots × experts that one program of the tile map holds in registers


class Tiles(NamedTuple):
    """Slot s holds rows start[s] to end[s], at most BLOCK_M of which are its own; expert[s] is -1 where it holds none.

    Three experts with 5, 0 and 3 rows in tiles of 4, and 2 rows dropped (10 // 4 + 3 = 5 slots; count = 3):

        rows     0   1   2   3 │ 4  ║ 5   6   7 ║ 8   9        ║ expert's end
                └── slot 0 ───┘└ 1 ┘└─ slot 2 ─┘ dropped
        slot     0   1   2   3   4
        expert   0   0   2  -1  -1
        start    0   4   5   0   0
        end      5   5   8   0   0
    """

    expert: Int[Tensor, " s"]
    start: Int[Tensor, " s"]
    end: Int[Tensor, " s"]  # where the expert's rows end
    count: Int[Tensor, " 1"]  # how many slots hold a tile: the first ones
    ends: Int[Tensor, " E"]  # where each expert's rows end; ends[-1] is the number of rows that count
    block_m: int


def tiles(counts: Int[Tensor, " E"], rows: int, block_m: int) -> Tiles:
    """The tiles of `rows` rows in expert order, of which counts.sum() count; all integers are int32.

    With n experts that have rows, sum(ceil(count / block_m)) <= (rows + n * (block_m - 1)) / block_m < rows / block_m + n.
    """
    experts = len(counts)
    slots = rows // block_m + min(experts, rows)
    # Each of the three begins at a multiple of 16 bytes, whatever the number of slots: Triton compiles a kernel anew
    # for pointers of other alignment, and the number of slots changes from step to step under expert parallelism.
    rows_of = torch.empty(3, triton.cdiv(slots, _ALIGNED) * _ALIGNED, dtype=torch.int32, device=counts.device)
    expert, start, end = rows_of[:, :slots].unbind()
    count = torch.empty(1, dtype=torch.int32, device=counts.device)
    ends = torch.empty(experts, dtype=torch.int32, device=counts.device)
    experts_padded = triton.next_power_of_2(experts)
    block = max(min(_TABLE // experts_padded, 256), 1)
    tile_map[(max(triton.cdiv(slots, block), 1),)](
        counts, expert, start, end, count, ends, slots, experts, block_m, block, experts_padded, num_warps=8
    )
    return Tiles(expert, start, end, count, ends, block_m)


@triton.jit(do_not_specialize=["slots"])
def tile_map(
    counts, expert, start, end, used, ends, slots, experts, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr
):  # one program fills SLOTS slots; EXPERTS is a power of two
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    row_end = tl.cumsum(count, 0)
    tile_count = (count + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tile_count, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + e, row_end, mask=e < experts)
        tl.store(used, tl.sum(tile_count, 0))
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = (tile_end[None, :] > slot[:, None]) & ((tile_end - tile_count)[None, :] <= slot[:, None])  # at most one expert a slot
    first = (row_end - count)[None, :] + (slot[:, None] - (tile_end - tile_count)[None, :]) * BLOCK_M
    found = tl.sum(inside.to(tl.int32), 1) > 0
    tl.store(expert + slot, tl.where(found, tl.sum(tl.where(inside, e[None, :], 0), 1), -1), mask=slot < slots)
    tl.store(start + slot, tl.sum(tl.where(inside, first, 0), 1), mask=slot < slots)
    tl.store(end + slot, tl.sum(tl.where(inside, row_end[None, :], 0), 1), mask=slot < slots)


INTERPRETED = not isinstance(tile_map, triton.JITFunction)


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must convert what they load to float32: Triton's interpreter computes nonsense in bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def programs(config: Config, tiles: int, device: torch.device) -> int:
    """How many programs a kernel of so many tiles is launched with: one each; persistent ones: one a multiprocessor.

    A persistent program takes tile after tile. Its loops over tiles and over the contracted width are one (`flatten`), so the
    loads of a tile begin while the one before is still being written:

        one each     │ load │ products      │ write │           │ load │ products      │ write │
        persistent   │ load │ products      │ write │ products      │ write │ …
                                    └ load ─┘             └ load ─┘
    """
    return min(tiles, _multiprocessors(device)) if config.persistent else tiles


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision() -> str:
    """The `input_precision` of float32 products that torch's own setting asks for."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def tile_and_column(program, num_tiles, num_columns, GROUP_M: tl.constexpr):
    """The tile and the block of columns of a program: GROUP_M tiles share a block of weights before the next is read.

    Programs of 3 tiles x 4 blocks of columns with GROUP_M = 2:

                 column 0   1   2   3
        tile 0          0   2   4   6   ┐ a group
        tile 1          1   3   5   7   ┘
        tile 2          8   9  10  11
    """
    width = GROUP_M * num_columns
    first = program // width * GROUP_M
    size = tl.minimum(num_tiles - first, GROUP_M)
    return first + program % width % size, program % width // size


@triton.jit
def halves(x):
    """The left and the right half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def cut(x, PARTS: tl.constexpr):
    """One, two, four or eight blocks of columns."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return halves(x)
    elif PARTS == 4:
        left, right = halves(x)
        return halves(left) + halves(right)
    else:
        tl.static_assert(PARTS == 8)
        left, right = halves(x)
        a, b = halves(left)
        c, d = halves(right)
        return halves(a) + halves(b) + halves(c) + halves(d)


@triton.jit
def row_pointer(pointer, row, stride):
    """Where row `row` starts: computed in 64 bits, so that offsets inside a tile may stay in 32."""
    return pointer + row.to(tl.int64) * stride


@triton.jit
def load(pointer, mask, UPCAST: tl.constexpr):
    """Values at `pointer`, zero where masked; pass None where nothing is."""
    value = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def store(pointer, value, mask, UPCAST: tl.constexpr):
    """Write float32 `value` in the pointer's dtype, rounded to nearest even; the interpreter would cut bfloat16 off."""
    if UPCAST:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # NaN would carry over into the sign
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(pointer, product, factor, row, count, first, columns, CHUNKS: tl.constexpr, UPCAST: tl.constexpr):
    """Write the first `count` rows of a tile at columns `first` and on, times `factor` if given, CHUNKS blocks one after the other.

    What is written at once takes registers, beside those in which a persistent program gathers its next product.
    """
    WIDTH: tl.constexpr = product.shape[1] // CHUNKS
    parts = cut(product, CHUNKS)
    for part in tl.static_range(CHUNKS):
        n = first + part * WIDTH + tl.arange(0, WIDTH)
        value = parts[part]
        if factor is not None:
            value *= factor
        store(pointer + row[:, None] * columns + n[None, :], value, (row < count)[:, None] & (n < columns)[None, :], UPCAST)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation's value; NaN stays NaN."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # 1 + tanh(z) is twice the sigmoid of 2 z
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return tl.where(x <= 0.0, 0.0, x * x)


@triton.jit
def activation_gradient(x, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return tl.where(x <= 0.0, 0.0, 2.0 * x)
