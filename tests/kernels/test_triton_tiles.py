"""The tile map by brute force, and what kernels do with a block against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moe.kernels import triton_tiles
from moe.kernels.triton_tiles import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTINGS = {
    "uniform": [8] * 6,
    "zipf": [57, 24, 15, 9, 6, 4, 3, 2, 2, 1, 1],
    "all to one": [0, 0, 50, 0, 0],
    "empty first, middle and last": [0, 5, 0, 0, 17, 3, 0],
    "around a block": [15, 16, 17],
    "no rows": [0, 0, 0],
    "one row": [0, 1],
    "one expert": [40],
    "512 experts": [e % 5 for e in range(512)],
    "300 experts": [e % 3 for e in range(300)],
}


@pytest.mark.parametrize("dropped", [0, 21])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tiles_cover_each_row_that_counts_once_and_no_other(routing, dropped):
    counts, block = ROUTINGS[routing], 16
    expected = [
        (expert, first, end)
        for expert, end in enumerate(torch.tensor(counts).cumsum(0).tolist())
        for first in range(end - counts[expert], end, block)
    ]
    rows = sum(counts) + dropped
    found = tiles(torch.tensor(counts, device=DEVICE), rows, block)
    assert len(found.expert) == rows // block + min(len(counts), rows)
    assert [slot for slot in zip(*(t.tolist() for t in found[:3]), strict=True) if slot[0] >= 0] == expected
    assert found.expert[len(expected) :].eq(-1).all()
    assert found.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert found.count.item() == len(expected)


@pytest.mark.parametrize("rows", range(60, 69))
def test_the_map_begins_at_multiples_of_16_bytes_whatever_the_number_of_slots(rows):
    found = tiles(torch.tensor([7, 0, 9], device=DEVICE), rows, 16)
    pointers = {name: t.data_ptr() % 16 for name, t in found._asdict().items() if isinstance(t, torch.Tensor)}
    assert set(pointers.values()) == {0}, pointers


@triton.jit
def _order(out, num_tiles, num_columns, GROUP_M: tl.constexpr):
    tile, column = triton_tiles.tile_and_column(tl.program_id(0), num_tiles, num_columns, GROUP_M)
    tl.store(out + 2 * tl.program_id(0), tile)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(("num_tiles", "num_columns", "group"), [(7, 3, 4), (8, 2, 8), (3, 5, 8), (1, 1, 1)])
def test_every_tile_meets_every_block_of_columns_and_a_group_shares_its_columns(num_tiles, num_columns, group):
    out = torch.empty(num_tiles * num_columns, 2, dtype=torch.int32, device=DEVICE)
    _order[(len(out),)](out, num_tiles, num_columns, group)
    assert {tuple(pair) for pair in out.tolist()} == {(t, c) for t in range(num_tiles) for c in range(num_columns)}
    for start in range(0, min(group, num_tiles) * num_columns, min(group, num_tiles)):
        assert out[start : start + min(group, num_tiles), 1].unique().numel() == 1


@triton.jit
def _address(out, base, row, stride):
    start = triton_tiles.row_pointer(base, tl.load(row), stride)
    tl.store(out, (start.to(tl.int64) - base.to(tl.int64)))


@pytest.mark.parametrize(("row", "stride"), [(70_000, 40_000), (2**31 - 1, 7168), (524_288, 4096)])
def test_rows_past_two_to_the_31st_element_have_their_own_address(row, stride):
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    base = torch.empty(1, dtype=torch.float32, device=DEVICE)
    _address[(1,)](out, base, torch.tensor([row], dtype=torch.int32, device=DEVICE), stride)
    assert out.item() == row * stride * 4


@triton.jit
def _activation(x, value, gradient, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = triton_tiles.load(x + i, i < n, False)
    tl.store(value + i, triton_tiles.activate(v, ACTIVATION), mask=i < n)
    tl.store(gradient + i, triton_tiles.activation_gradient(v, ACTIVATION), mask=i < n)


DEFINITIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_and_their_derivatives_are_torchs(name):
    x = torch.cat([torch.randn(200) * 4, torch.tensor([0.0, -0.0, 88.0, -88.0, 1e4, -1e4])]).to(DEVICE)
    value, gradient = torch.empty_like(x), torch.empty_like(x)
    _activation[(1,)](x, value, gradient, len(x), name, 256)
    exact = x.double().requires_grad_()
    expected = DEFINITIONS[name](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_activation_does_not_hide_a_nan(name):
    x = torch.tensor([torch.nan], device=DEVICE)
    value, gradient = torch.empty_like(x), torch.empty_like(x)
    _activation[(1,)](x, value, gradient, 1, name, 16)
    assert value.isnan().all()


@triton.jit
def _round(x, out, n, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    i = tl.arange(0, BLOCK)
    triton_tiles.store(out + i, tl.load(x + i, mask=i < n), i < n, UPCAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stores_round_to_nearest_even_as_torch_does(dtype):
    x = torch.cat([torch.randn(900), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, 3.4e38, 0.0])]).to(DEVICE)
    out = torch.full_like(x, torch.nan, dtype=dtype)
    _round[(1,)](x, out, len(x), 1024, triton_tiles.upcast(dtype))
    assert torch.equal(out.nan_to_num(7), x.to(dtype).nan_to_num(7))
    assert torch.equal(out.isnan(), x.isnan())
