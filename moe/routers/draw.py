"""First weights by a counter-based draw: each value is a pure function of (key, row, column) in the whole parameter.

A rank that holds a part of a parameter draws that part alone, in blocks, on its own device, and every layout, device and
version of torch gets the same bits: the hash is integer arithmetic, the law is a table of quantiles, and what is left is one
multiplication in float64 for each entry of the table.

    row r of the whole, columns     0 1 2 3 | 4 5 6 7 | …        one splitmix64 hash (Steele et al., 2014) of a counter
    counter                           r·G   |  r·G+1  | …        serves four columns, 16 bits each; G = ceil(columns / 4)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe.routers.noise import mix, signed
from moe.shapes import Int

_LANES = 4  # values a hash
_POINTS = 1 << 16  # values that a law can take, all equally probable; bfloat16 tells fewer apart within a deviation
_UNIT = 1 << 20  # quantiles are whole multiples of 1 / _UNIT, so that sums of their squares are exact
_CUT = 3.0  # deviations
_HASHES = {"cpu": 1 << 14, "cuda": 1 << 18}  # a block: what stays in a core's L2 cache; 8 MiB of scratch memory
_GRAIN = 1 << 15  # elements from which torch shares work out over threads


class Law(NamedTuple):
    """What the first values of a parameter are drawn from.

    `constant`: scale itself. `uniform`: between -scale and scale. `normal`: of standard deviation scale, at most 4.33 of them.
    `truncated`: the same within three deviations, which leaves 0.9866 of the standard deviation.
    equal_rows: each row is scaled to the norm scale * sqrt(columns), and keeps its direction.
    """

    kind: Literal["constant", "uniform", "normal", "truncated"]
    scale: float
    equal_rows: bool = False


def draw_(target: Tensor, law: Law, key: Sequence[object], box: Sequence[range], shape: Sequence[int]) -> None:
    """Fill `target`, in place and on its device, with the part at the indices `box` of a parameter of `shape`.

    key: names the parameter and the seed. Drawn in float32, and rounded or widened to the dtype of `target`, which has to be contiguous.
    """
    target = target.detach()
    if target.numel() == 0:
        return
    if law.kind == "constant":
        target.fill_(law.scale)
        return
    columns, device = box[-1], target.device
    out = target.view(-1, len(columns))
    asked = range(shape[-1]) if law.equal_rows else columns
    groups, first = -(-shape[-1] // _LANES), asked.start // _LANES
    start, stride = _sequence(key)
    group = torch.arange(first, -(-asked.stop // _LANES), device=device).mul_(stride)
    begin = _rows(box, shape, device).mul_(groups).mul_(stride).add_(start)[:, None]
    table = quantiles(law.kind).mul(1 if law.equal_rows else law.scale).float().to(device, torch.float32 if law.equal_rows else out.dtype)

    at_once = max(1, _block(device) // len(group))
    x = torch.empty(at_once, len(group), dtype=torch.int64, device=device)
    scratch = torch.empty_like(x)
    index = torch.empty(at_once, len(asked), dtype=torch.int32, device=device)
    skip = asked.start - first * _LANES
    for row in range(0, len(out), at_once):
        part = out[row : row + at_once]
        n = len(part)
        mix(torch.add(begin[row : row + n], group, out=x[:n]), scratch[:n])
        index[:n].copy_(x[:n].view(torch.uint16)[:, skip : skip + len(asked)])
        if law.equal_rows:
            part.copy_(_scaled(table[index[:n]], law.scale)[:, columns.start : columns.stop])
        else:
            torch.index_select(table, 0, index[:n].view(-1), out=part.view(-1))


@functools.lru_cache(maxsize=4)
def quantiles(kind: str) -> Tensor:
    """The law of scale 1, as its quantiles at the middles of 2^16 equally probable intervals: float64 multiples of 2^-20."""
    middle = [(2 * i + 1) / (2 * _POINTS) for i in range(_POINTS // 2)]  # of the upper half, from its median on
    normal = NormalDist()
    inside = normal.cdf(_CUT) - normal.cdf(-_CUT) if kind == "truncated" else 1.0
    upper = [2 * p for p in middle] if kind == "uniform" else [normal.inv_cdf(0.5 + p * inside) for p in middle]
    steps = torch.tensor([round(z * _UNIT) for z in upper], dtype=torch.float64) / _UNIT
    return torch.cat([-steps.flip(0), steps])


def _sequence(key: Sequence[object]) -> tuple[int, int]:
    """Start and stride of the counters of a key: two keys share no sequence (Steele et al., 2014, section 4)."""
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=16).digest()
    start, stride = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") | 1
    if (stride ^ stride >> 1).bit_count() < 24:  # long runs of equal bits mix badly
        stride ^= 0xAAAAAAAAAAAAAAAA
    return signed(start), signed(stride)


def _rows(box: Sequence[range], shape: Sequence[int], device: torch.device) -> Int[Tensor, " r"]:
    """Numbers in the whole parameter of the rows that a box holds."""
    rows = torch.zeros((), dtype=torch.int64, device=device)
    for held, size in zip(box[:-1], shape[:-1], strict=True):
        rows = rows[..., None] * size + torch.arange(held.start, held.stop, device=device)
    return rows.reshape(-1)


def _block(device: torch.device) -> int:
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return _HASHES.get(device.type, _HASHES["cuda"]) if threads == 1 else _GRAIN * threads


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """Rows of the norm scale * sqrt(columns), in float64; their squares are summed exactly, in whatever order."""
    whole = rows.double().mul_(_UNIT)
    square = whole.long().square_().sum(1, keepdim=True).double()
    return (whole * (scale * (rows.shape[1] / square).sqrt())).float()
