"""Each forward kernel against its definition in float64, over routings, widths, dtypes and layouts of the weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels import triton_forward
from moe.kernels.triton_configs import Config
from moe.kernels.triton_tiles import programs, tiles

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BLOCK = 16
CONFIG = Config(BLOCK, 32, 32, warps=4, stages=2, group_m=2)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEFINITIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}
ROUTINGS = {
    "uniform": [10, 10, 10],
    "zipf": [24, 11, 7, 3, 1],
    "all to one": [0, 0, 40],
    "several empty": [0, 4, 0, 0, 9, 0],
    "around a block": [15, 16, 17],
    "one row": [0, 1],
    "one expert": [20],
    "no rows": [0, 0, 0],
}
every_routing = pytest.mark.parametrize("routing", ROUTINGS)
by_descriptor_or_pointer = pytest.mark.parametrize("tma", [False, True])


def config(tma):
    if tma and CUDA and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need Hopper")
    return CONFIG._replace(tma=tma)


class Case:
    """Random vectors and weights for given counts, on the grid of a dtype; dropped rows come after the others."""

    def __init__(self, counts, *, d=48, f=80, gated=True, dropped=0, dtype=torch.float32):
        self.counts = torch.tensor(counts, device=DEVICE)
        experts, self.n = len(counts), sum(counts) + dropped
        self.kept = sum(counts)
        self.m = max(self.n // 2, 1)
        self.index = torch.randint(0, self.m, (self.n,), device=DEVICE)
        self.expert = torch.arange(experts).repeat_interleave(torch.tensor(counts)).to(DEVICE)
        self.x = torch.randn(self.m, d).to(DEVICE, dtype)
        self.up = (torch.randn(experts, 2 if gated else 1, f, d) / d**0.5).to(DEVICE, dtype)
        self.down = (torch.randn(experts, d, f) / f**0.5).to(DEVICE, dtype)
        self.weight = torch.randn(self.n).to(DEVICE)
        self.activated = torch.randn(self.n, f).to(DEVICE, dtype)
        self.activated[self.kept :] = torch.nan
        self.tiles = tiles(self.counts, self.n, BLOCK)

    def hidden_rows(self):
        """Pre-activations of the rows that count."""
        return torch.einsum("nd,nhd->nh", self.x.double()[self.index[: self.kept]], self.up.flatten(1, 2).double()[self.expert])

    def activated_rows(self, activation):
        hidden = self.hidden_rows().chunk(self.up.shape[1], 1)
        act = DEFINITIONS[activation](hidden[0])
        return act * hidden[1] if len(hidden) == 2 else act

    def y_rows(self):
        product = torch.einsum("nf,ndf->nd", self.activated[: self.kept].double(), self.down.double()[self.expert])
        return product * self.weight[: self.kept, None].double()

    def check_up(self, activation="silu", tma=False):
        hidden, activated = triton_forward.up(self.x, self.index, self.tiles, self.up, activation, config(tma), True)
        close(hidden, self.hidden_rows(), self.kept)
        close(activated, self.activated_rows(activation), self.kept)
        return hidden, activated

    def check_down(self, tma=False):
        y = triton_forward.down(self.activated, self.weight, self.tiles, self.down, config(tma))
        close(y, self.y_rows(), self.kept)
        return y


def close(found, expected, kept):
    """Relative to the largest entry; memory of rows that do not count is as poisoned as it came."""
    assert found.isfinite()[:kept].all()
    assert CUDA or found[kept:].isnan().all()
    if kept:
        error = (found[:kept].double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[found.dtype], f"{error:.2e}"


@every_routing
def test_every_routing_goes_up_and_down(routing):
    case = Case(ROUTINGS[routing], dropped=19 if routing == "zipf" else 0)
    case.check_up()
    case.check_down()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@by_descriptor_or_pointer
@every_routing
def test_every_routing_goes_up_and_down_in_every_dtype(routing, tma, dtype):
    case = Case(ROUTINGS[routing], dropped=21, dtype=dtype)
    case.check_up(tma=tma)
    case.check_down(tma)


@pytest.mark.parametrize("dtype", TOLERANCE)
@by_descriptor_or_pointer
def test_every_dtype_by_descriptor_and_by_pointer(tma, dtype):
    case = Case([9, 0, 18], dropped=5, dtype=dtype)
    case.check_up(tma=tma)
    case.check_down(tma)


@by_descriptor_or_pointer
@pytest.mark.parametrize(("d", "f"), [(16, 16), (64, 32), (80, 48), (32, 112)])
def test_every_width_that_is_a_multiple_of_16(d, f, tma):
    case = Case([5, 17], d=d, f=f)
    case.check_up(tma=tma)
    case.check_down(tma)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", DEFINITIONS)
def test_every_activation_with_and_without_a_gate(activation, gated):
    Case([4, 0, 18], d=32, f=32, gated=gated).check_up(activation)


def test_what_is_not_kept_does_not_change_the_rest():
    case = Case([4, 0, 9])
    _, kept = case.check_up()
    hidden, activated = triton_forward.up(case.x, case.index, case.tiles, case.up, "silu", CONFIG, False)
    assert hidden.shape == (0, 160)
    assert torch.equal(kept, activated)


@by_descriptor_or_pointer
@pytest.mark.parametrize("gap", [0, 48 * 80, 16, 8])
def test_experts_may_be_rows_of_a_larger_buffer(gap, tma):
    case = Case([4, 0, 18])
    expected = case.check_up(tma=tma)[1], case.check_down(tma)
    for name in ("up", "down"):
        weights = getattr(case, name)
        buffer = torch.full((len(weights), weights[0].numel() + gap), torch.nan, device=DEVICE)
        buffer[:, : weights[0].numel()] = weights.flatten(1)
        setattr(case, name, buffer[:, : weights[0].numel()].unflatten(1, weights.shape[1:]))
        assert getattr(case, name).stride(0) == buffer.shape[1]
    assert torch.equal(case.check_up(tma=tma)[1], expected[0])
    assert torch.equal(case.check_down(tma), expected[1])


@by_descriptor_or_pointer
@every_routing
def test_persistent_programs_give_the_bits_of_one_program_a_tile(routing, tma):
    case = Case(ROUTINGS[routing], dropped=3)
    one = case.check_down(tma)
    many = triton_forward.down(case.activated, case.weight, case.tiles, case.down, config(tma)._replace(persistent=True))
    assert torch.equal(one[: case.kept], many[: case.kept])


def test_a_persistent_kernel_has_at_most_a_program_a_multiprocessor():
    persistent = CONFIG._replace(persistent=True)
    assert [programs(each, tiles, torch.device(DEVICE)) for each in (CONFIG, persistent) for tiles in (1, 10**6)][:3] == [1, 10**6, 1]
    assert programs(persistent, 10**6, torch.device(DEVICE)) < 1000


def test_weights_that_no_descriptor_can_address_are_read_by_pointer():
    case = Case([4, 18], d=16, f=16)
    odd = torch.zeros(case.down.numel() + 1, device=DEVICE)[1:].view_as(case.down)
    odd.copy_(case.down)
    case.down = odd
    case.check_down(tma=True)


@by_descriptor_or_pointer
@pytest.mark.parametrize("ill", [0, 1, 2])
def test_not_a_number_stays_with_its_expert(ill, tma):
    well = Case([7, 9, 5], dropped=3)
    expected = (*well.check_up(tma=tma), well.check_down(tma))
    torch.manual_seed(0)
    case = Case([7, 9, 5], dropped=3)
    mine = case.expert == ill
    case.up[ill] = torch.nan
    case.down[ill] = torch.inf
    case.activated[: case.kept][mine] = torch.nan
    found = triton_forward.up(case.x, case.index, case.tiles, case.up, "silu", config(tma), True)
    found += (triton_forward.down(case.activated, case.weight, case.tiles, case.down, config(tma)),)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[: case.kept][~mine], b[: case.kept][~mine])
        assert a[: case.kept][mine].isnan().any(1).all()


def summed(y, index, m, kept):
    return y.new_zeros(m, y.shape[1], dtype=torch.float64).index_add(0, index[:kept], y[:kept].double())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 11])
def test_each_vector_is_the_sum_of_its_slots(k, dtype):
    m, d = 5, 80
    slots = torch.randperm(m * k).view(m, k).to(DEVICE)
    index = torch.empty(m * k, dtype=torch.int64, device=DEVICE).scatter_(
        0, slots.view(-1), torch.arange(m, device=DEVICE).repeat_interleave(k)
    )
    for kept in (m * k, m * k - 2, 0):
        y = torch.randn(m * k, d).to(DEVICE, dtype)
        y[kept:] = torch.nan
        cut = tiles(torch.tensor([kept, 0], device=DEVICE), m * k, BLOCK)
        expected = summed(y, index, m, kept)
        for given in (slots, None):
            out = triton_forward.combine(y, index, given, cut, m, CONFIG)
            assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("vectors", [[], [0], [0] * 20, [3, 3, 0, 5, 3, 3, 1, 3, 3, 3, 3, 3, 3]])
def test_vectors_may_have_any_number_of_rows(vectors):
    index, m = torch.tensor(vectors, dtype=torch.int64, device=DEVICE), 7
    y = torch.randn(len(index), 48, device=DEVICE)
    out = triton_forward.combine(y, index, None, tiles(torch.tensor([len(index)], device=DEVICE), len(index), BLOCK), m, CONFIG)
    torch.testing.assert_close(out.double(), summed(y, index, m, len(index)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [None, 2])
def test_no_vectors_give_no_sums(k):
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    slots = None if k is None else empty.view(0, k)
    cut = tiles(torch.zeros(3, dtype=torch.int64, device=DEVICE), 0, BLOCK)
    assert triton_forward.combine(torch.randn(0, 48, device=DEVICE), empty, slots, cut, 0, CONFIG).shape == (0, 48)


def test_slots_in_the_order_of_rows_give_the_bits_of_no_slots():
    y, index = torch.randn(30, 48, device=DEVICE), torch.arange(3, device=DEVICE).repeat_interleave(10)
    cut = tiles(torch.tensor([30], device=DEVICE), 30, BLOCK)
    slots = torch.arange(30, device=DEVICE).view(3, 10)
    given, found = (triton_forward.combine(y, index, order, cut, 3, CONFIG) for order in (slots, None))
    assert torch.equal(given, found)
