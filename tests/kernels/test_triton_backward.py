"""Each backward kernel against its definition in float64, on tiles small enough to have edges everywhere."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe.errors import ConfigError
from moe.kernels import triton_backward
from moe.kernels.reference import ACTIVATIONS
from moe.kernels.triton_backward import down_dgrad, up_dgrad, wgrad
from moe.kernels.triton_configs import Config
from moe.kernels.triton_tiles import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL = Config(16, 32, 32, warps=4, stages=2, group_m=2)
ROUTINGS = {
    "uniform": [6, 6, 6],
    "zipf": [24, 12, 8, 6, 4],
    "all to one": [0, 40, 0],
    "several empty": [0, 5, 0, 0, 7, 0],
    "around a block": [15, 16, 17],
    "no rows": [0, 0],
    "one row": [0, 1, 0],
}


def close(got, expected, dtype):
    """Largest error relative to the largest entry."""
    assert got.shape == expected.shape
    bound = TOLERANCE[dtype] * expected.abs().max().item() if expected.numel() else 0.0
    error = (got.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= bound, f"{error:.2e} over {bound:.2e}"


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def rows_of(counts, dropped=0, vectors=9):
    """counts, index, and the expert of each row that counts."""
    index = torch.randint(0, vectors, (sum(counts) + dropped,))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.tensor(counts, device=DEVICE), index.to(DEVICE), expert.to(DEVICE)


def check_down_dgrad(
    counts, *, activation="silu", halves=2, dtype=torch.float32, config=SMALL, d=48, f=48, dropped=3, scaled=True, over=False
):
    counts, index, expert = rows_of(counts, dropped)
    n, used = len(index), len(expert)
    grad, hidden, down = random(9, d, dtype=dtype), random(n, halves * f, dtype=dtype), random(len(counts), d, f, dtype=dtype)
    hidden[used:] = torch.nan
    weight, scale = torch.rand(n, device=DEVICE), torch.rand(n, device=DEVICE) if scaled else None
    into = hidden.clone() if over else torch.full_like(hidden, torch.nan)
    given = grad, into if over else hidden, index, weight, scale, down, activation, tiles(counts, n, config.BLOCK_M), config
    got = down_dgrad(*given, into)
    received = grad.double()[index[:used]] * (1 if scale is None else scale[:used, None].double())
    exact = hidden[:used].double().requires_grad_()
    value = ACTIVATIONS[activation](exact[:, :f])
    activated = value * exact[:, f:] if halves == 2 else value
    grad_activated = torch.einsum("nd,ndf->nf", received, down.double()[expert])
    (expected,) = torch.autograd.grad(activated, exact, grad_activated * weight[:used, None].double())
    close(into[:used], expected, dtype)
    factor = weight[:used] * (1 if scale is None else scale[:used])
    close(got.weighted[:used], activated.detach() * factor[:, None].double(), dtype)
    close(got.weight[:used], (grad_activated * activated.detach()).sum(1), dtype)
    assert (got.weight[used:] == 0).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_of_hidden_rows_and_their_weights_under_every_routing(routing):
    check_down_dgrad(ROUTINGS[routing])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_hidden_rows_in_half_precision(dtype):
    check_down_dgrad([5, 0, 17], dtype=dtype)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_hidden_rows_for_every_activation(activation, halves):
    check_down_dgrad([5, 0, 7], activation=activation, halves=halves, scaled=False)


@pytest.mark.parametrize("halves", [1, 2])
def test_gradients_of_hidden_rows_may_be_written_over_them(halves):
    check_down_dgrad([5, 0, 17], halves=halves, over=True)


def test_what_is_not_asked_for_is_not_written_and_changes_nothing_else():
    counts, index, _ = rows_of([5, 0, 7])
    grad, hidden, down, weight = random(9, 48), random(12, 96), random(3, 48, 48), torch.rand(12, device=DEVICE)
    given, into = (grad, hidden, index, weight, None, down, "silu", tiles(counts, 12, 16), SMALL), torch.empty_like(hidden)
    everything, alone = down_dgrad(*given, into), down_dgrad(*given, None, weighted=False)
    assert alone.weighted is None
    assert torch.equal(alone.weight, everything.weight)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_gradients_of_hidden_rows_do_not_depend_on_how_a_tile_is_finished(chunks, monkeypatch):
    monkeypatch.setattr(triton_backward, "chunks", lambda config: chunks)
    check_down_dgrad([5, 0, 7], config=SMALL._replace(BLOCK_N=128), f=144)


@pytest.mark.parametrize(("d", "f"), [(64, 64), (16, 16), (80, 112)])
def test_gradients_of_hidden_rows_of_widths_that_tiles_do_not_divide(d, f):
    check_down_dgrad([5, 0, 7], d=d, f=f)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("halves", [1, 2])
def test_gradients_of_gathered_rows_are_one_product_with_both_halves(halves, dtype):
    counts, _, expert = rows_of([5, 0, 17], 3)
    hidden, up = random(25, halves * 48, dtype=dtype), random(3, halves, 48, 80, dtype=dtype)
    hidden[22:] = torch.nan
    got = up_dgrad(hidden, up, tiles(counts, 25, SMALL.BLOCK_M), SMALL)
    close(got[:22], torch.einsum("nh,nhd->nd", hidden[:22].double(), up.double().flatten(1, 2)[expert]), dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_of_gathered_rows_under_every_routing(routing):
    counts, index, expert = rows_of(ROUTINGS[routing], 2)
    hidden, up = random(len(index), 48), random(len(counts), 1, 48, 32)
    got = up_dgrad(hidden, up, tiles(counts, len(index), SMALL.BLOCK_M), SMALL)
    close(got[: len(expert)], torch.einsum("nh,nhd->nd", hidden[: len(expert)].double(), up.double()[:, 0][expert]), torch.float32)


def check_wgrad(counts, gathered, *, dtype=torch.float32, out_dtype=None, accumulate=False, p=48, q=80, dropped=3, config=SMALL):
    counts, index, expert = rows_of(counts, dropped)
    n, used = len(index), len(expert)
    left, right = random(9 if gathered == "left" else n, p, dtype=dtype), random(9 if gathered == "right" else n, q, dtype=dtype)
    (right if gathered == "left" else left)[used:] = torch.nan
    start = random(len(counts), p, q, dtype=out_dtype or dtype)
    out = start.clone() if accumulate else torch.full_like(start, torch.nan)
    ends = counts.cumsum(0, dtype=torch.int32)
    wgrad(left, right, index, gathered, ends, out, config, accumulate=accumulate)
    sides = [t.double()[index[:used]] if side == gathered else t[:used].double() for side, t in (("left", left), ("right", right))]
    member = torch.nn.functional.one_hot(expert, len(counts)).double()
    expected = torch.einsum("ne,np,nq->epq", member, *sides)
    close(out, expected + start.double() if accumulate else expected, dtype if out_dtype is None else torch.float32)


@pytest.mark.parametrize("gathered", ["left", "right"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_of_weights_are_written_for_every_expert_and_zero_for_empty_ones(routing, gathered):
    check_wgrad(ROUTINGS[routing], gathered)


@pytest.mark.parametrize("gathered", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_weights_in_half_precision(dtype, gathered):
    check_wgrad([5, 0, 37], gathered, dtype=dtype)


@pytest.mark.parametrize("gathered", ["left", "right"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_of_weights_are_added_to_float32_ones(dtype, gathered):
    check_wgrad([5, 0, 37], gathered, dtype=dtype, out_dtype=torch.float32, accumulate=True)


def test_gradients_of_weights_are_added_in_their_own_dtype():
    check_wgrad([5, 0, 37], "right", dtype=torch.bfloat16, accumulate=True)


@pytest.mark.parametrize(("p", "q"), [(16, 16), (64, 64), (80, 48)])
def test_gradients_of_weights_of_widths_that_tiles_do_not_divide(p, q):
    check_wgrad([5, 0, 7], "right", p=p, q=q)
    check_wgrad([5, 0, 7], "left", p=p, q=q)


@pytest.mark.parametrize("gathered", ["left", "right"])
def test_a_nan_in_an_experts_rows_stays_in_its_gradient(gathered):
    counts = torch.tensor([5, 6, 7], device=DEVICE)
    index = torch.arange(18, device=DEVICE)
    left, right, out = random(18, 32), random(18, 32), random(3, 32, 32)
    left[5:11], right[5:11] = torch.nan, torch.inf
    wgrad(left, right, index, gathered, counts.cumsum(0, dtype=torch.int32), out, SMALL)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_experts_gradients_may_be_rows_of_a_larger_buffer(accumulate):
    counts, index, _ = rows_of([5, 0, 7])
    left, right, ends = random(12, 32), random(9, 48), counts.cumsum(0, dtype=torch.int32)
    buffer = torch.zeros(3, 32 * 48 + 24, device=DEVICE)
    out, plain = buffer[:, 8 : 8 + 32 * 48].view(3, 32, 48), torch.zeros(3, 32, 48, device=DEVICE)
    for each in (out, plain):
        wgrad(left, right, index, "right", ends, each, SMALL, accumulate=accumulate)
    assert torch.equal(out, plain)
    assert buffer.count_nonzero() == plain.count_nonzero()
    with pytest.raises(ConfigError, match="make its last two dimensions contiguous"):
        wgrad(left, right, index, "right", ends, plain.new_zeros(3, 48, 32).mT, SMALL)


def test_tiles_through_descriptors_give_the_bits_of_tiles_through_pointers():
    counts, index, _ = rows_of([5, 0, 19], 2)
    grad, hidden, weight = random(9, 48), random(26, 80), torch.rand(26, device=DEVICE)
    buffer = random(3, 48 * 80 + 16)
    down, up = buffer[:, : 48 * 40 * 2].view(3, 48, 80)[:, :, :], random(3, 1, 80, 48)
    cut, results = tiles(counts, 26, 16), []
    for tma in (False, True):
        config = SMALL._replace(tma=tma)
        into = torch.empty_like(hidden)
        of = down_dgrad(grad, hidden, index, weight, None, down, "gelu", cut, config, into)
        results.append([into[:24], of.weighted[:24], of.weight, up_dgrad(into, up, cut, config)[:24]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_persistent_programs_give_the_bits_of_one_program_a_tile(routing, tma):
    counts, index, expert = rows_of(ROUTINGS[routing], 2)
    hidden, up = random(len(index), 48), random(len(counts), 1, 48, 80)
    cut, config = tiles(counts, len(index), 16), SMALL._replace(tma=tma)
    one, many = (up_dgrad(hidden, up, cut, config._replace(persistent=persistent)) for persistent in (True, False))
    assert torch.equal(one[: len(expert)], many[: len(expert)])


def test_a_descriptor_is_not_made_of_weights_that_it_cannot_describe():
    config = SMALL._replace(tma=True)
    buffer = random(3 * 16 * 16 + 1)
    assert triton_backward.weights(buffer[:-1].view(3, 16, 16), config) is not buffer
    shifted = buffer[1:].view(3, 16, 16)
    assert triton_backward.weights(shifted, config) is shifted


def test_offsets_past_two_to_the_31_are_reached():
    """Untouched pages of so large a tensor take no memory on a CPU."""
    far, vectors = 1 << 30, (1 << 31) // 16 + 8
    counts, index = torch.tensor([2, 3, 4], device=DEVICE), torch.arange(vectors - 9, vectors, device=DEVICE)
    large = torch.empty(vectors, 16, dtype=torch.float16, device=DEVICE)
    large[-9:] = random(9, 16, dtype=torch.float16)
    right, ends = random(9, 16, dtype=torch.float16), counts.cumsum(0, dtype=torch.int32)
    out = torch.empty((2 * far + 256) + 8, dtype=torch.float16, device=DEVICE)[8:].as_strided((3, 16, 16), (far, 16, 1))
    wgrad(large, right, index, "left", ends, out, SMALL)
    expected = [large[-9:][a:b].double().T @ right[a:b].double() for a, b in ((0, 2), (2, 5), (5, 9))]
    close(out, torch.stack(expected), torch.float16)
    hidden, weight, cut = random(9, 16, dtype=torch.float16), torch.ones(9, device=DEVICE), tiles(counts, 9, 16)
    into = torch.empty_like(hidden)
    down_dgrad(large, hidden, index, weight, None, out, "relu", cut, SMALL, into)
    expert = torch.arange(3, device=DEVICE).repeat_interleave(counts)
    grad_activated = torch.einsum("nd,ndf->nf", large[-9:].double(), out.double()[expert])
    close(into, grad_activated * (hidden > 0), torch.float16)


def test_twice_the_same_call_gives_the_same_bits():
    counts, index, _ = rows_of([5, 0, 19])
    grad, hidden, down, weight = random(9, 48), random(24, 96), random(3, 48, 48), torch.rand(24, device=DEVICE)
    results = []
    for _ in range(2):
        into = torch.empty_like(hidden)
        results.append([*down_dgrad(grad, hidden, index, weight, None, down, "silu", tiles(counts, 24, 16), SMALL, into), into])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
