"""Balanced assignment against the Hungarian optimum, and what it promises where it is cut short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe.routers import Tokens, build
from moe.routers.assignment import assign, fill

D, E = 12, 6


def optimum(value: torch.Tensor) -> float:
    """Largest sum of values with at most ceil(T / E) tokens an expert: a matching to so many copies of each expert."""
    tokens, experts = value.shape
    copies = np.repeat(value.double().numpy(), -(-tokens // experts), axis=1)
    rows, columns = linear_sum_assignment(copies, maximize=True)
    return copies[rows, columns].sum()


def total(value: torch.Tensor, owner: torch.Tensor) -> float:
    return value.gather(1, owner[:, None]).double().sum().item()


def everyone(value: torch.Tensor) -> torch.Tensor:
    return torch.ones(value.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (4, 4), (5, 4), (24, 8), (37, 5), (100, 7), (256, 8), (256, 32), (3, 16), (64, 2)])
def test_the_assignment_is_the_hungarian_optimum(tokens, experts):
    torch.manual_seed(tokens)
    value = torch.randn(2, tokens, experts, dtype=torch.float64) + 2 * torch.randn(experts, dtype=torch.float64)
    owner = assign(value, everyone(value), 1e-7, 10_000)
    for v, o in zip(value, owner, strict=True):
        assert torch.bincount(o, minlength=experts).max() <= -(-tokens // experts)
        assert total(v, o) == pytest.approx(optimum(v), rel=0, abs=1e-7)


def test_every_expert_gets_exactly_its_share_where_tokens_divide():
    value = torch.randn(3, 48, E) + torch.arange(E)
    for owner in assign(value, everyone(value), 1e-3, 256):
        assert torch.bincount(owner, minlength=E).tolist() == [8] * E


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-3])
def test_the_mean_value_is_within_the_tolerance_of_the_best(tolerance):
    torch.manual_seed(5)
    value = torch.randn(4, 96, 8) * torch.tensor([1e-3, 1.0, 50.0, 1e4])[:, None, None]
    owner = assign(value, everyone(value), tolerance, 5000)
    for v, o in zip(value, owner, strict=True):
        span = (v.max() - v.min()).item()
        assert (optimum(v) - total(v, o)) / 96 <= tolerance * span * 1.001


def test_it_is_better_than_taking_the_best_free_expert_token_by_token():
    torch.manual_seed(6)
    value = torch.randn(1, 64, 8) + 2 * torch.randn(8)
    left, greedy = [8] * 8, 0.0
    for row in value[0]:
        e = max((e for e in range(8) if left[e]), key=lambda e: row[e])
        left[e] -= 1
        greedy += row[e].item()
    assert greedy < total(value[0], assign(value, everyone(value), 1e-3, 256)[0]) <= value.amax(2).sum().item()


@pytest.mark.parametrize("rounds", [1, 3, 10, 30])
def test_an_auction_cut_short_still_balances(rounds):
    torch.manual_seed(7)
    value = torch.randn(2, 100, 8) + 3 * torch.randn(8)
    valid = torch.rand(2, 100) > 0.2
    for owner, v in zip(assign(value, valid, 1e-3, rounds), valid, strict=True):
        assert (owner[~v] == 8).all()
        assert torch.bincount(owner[v], minlength=9).tolist()[8] == 0
        assert torch.bincount(owner[v], minlength=8).max() <= -(-int(v.sum()) // 8)


def test_cut_short_it_falls_back_to_the_last_complete_assignment():
    torch.manual_seed(8)
    value = torch.randn(1, 256, 32, dtype=torch.float64) + torch.randn(32, dtype=torch.float64)
    best, span = optimum(value[0]), (value.max() - value.min()).item()
    gaps = [(best - total(value[0], assign(value, everyone(value), 1e-5, rounds)[0])) / 256 for rounds in range(60, 400, 20)]
    assert all(gap <= 0.1 * span for gap in gaps)
    assert gaps[-1] < gaps[0] / 4


def test_groups_and_padding_do_not_meet():
    torch.manual_seed(9)
    value = torch.randn(3, 30, E)
    valid = torch.rand(3, 30) > 0.3
    valid[1] = False
    together = assign(value, valid, 1e-3, 256)
    other = torch.where(valid[..., None], value, 1e3)
    assert torch.equal(together, assign(other, valid, 1e-3, 256))
    for g in (0, 2):
        alone = assign(value[g : g + 1], valid[g : g + 1], 1e-3, 256)[0]
        assert torch.equal(together[g], alone)
        packed = assign(value[g][valid[g]][None], torch.ones(1, int(valid[g].sum()), dtype=torch.bool), 1e-3, 256)[0]
        assert torch.equal(together[g][valid[g]], packed)


def test_equal_values_are_assigned_all_the_same():
    value = torch.zeros(1, 20, E)
    assert sorted(torch.bincount(assign(value, everyone(value), 1e-3, 256)[0], minlength=E).tolist())[-1] == 4


def test_the_rest_fills_free_places_in_order():
    owner = torch.tensor([[0, 3, 3, 1, 3, 3]])
    valid = torch.tensor([[True, True, True, True, False, True]])
    assert fill(owner, valid, torch.tensor([2]), 3).tolist() == [[0, 0, 1, 1, 3, 2]]


def make(**options):
    torch.manual_seed(0)
    router = build({"name": "base", **options}, D, E).double()
    router.reset_parameters(std=0.5)
    return router


def make_tokens(t: int) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    x = torch.randn(t, D, dtype=torch.float64)
    return x, Tokens.of(x)


def test_the_router_balances_in_training_and_weighs_by_the_sigmoid():
    router = make(tolerance=1e-6, rounds=5000)
    x, tokens = make_tokens(60)
    routing = router(x, tokens)
    z = x @ router.weight.T
    assert routing.load(E).tolist() == [10] * E
    assert total(z.detach(), routing.expert) == pytest.approx(optimum(z.detach()), abs=1e-3)
    torch.testing.assert_close(routing.weight, torch.sigmoid(z)[routing.token, routing.expert], rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(torch.sigmoid(z)[routing.token, routing.expert].sum(), router.weight)
    torch.testing.assert_close(torch.autograd.grad(routing.weight.sum(), router.weight)[0], expected, rtol=1e-12, atol=1e-14)


def test_evaluation_is_greedy_and_looks_at_no_other_token():
    router = make().eval()
    x, tokens = make_tokens(30)
    routing = router(x, tokens)
    assert torch.equal(routing.expert, (x @ router.weight.T).argmax(1))
    assert torch.equal(router(torch.cat([x[:10], -x[10:]]), tokens).expert[:10], routing.expert[:10])


def test_in_training_a_later_token_changes_what_an_earlier_one_gets():
    """It looks across the sequence: a leak in training that evaluation does not have."""
    router = make()
    x, tokens = make_tokens(30)
    later = torch.cat([x[:15], 5 * router.weight[0].detach().expand(15, D)])
    assert not torch.equal(router(later, tokens).expert[:15], router(x, tokens).expert[:15])
