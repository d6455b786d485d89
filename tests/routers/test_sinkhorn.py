"""Sinkhorn: the plan's marginals and invariances, and what is chosen and weighed from it."""

from __future__ import annotations

import pytest
import torch

from moe.routers import Tokens, build
from moe.routers.sinkhorn import potentials

D, E = 12, 6


def make(**options):
    torch.manual_seed(0)
    router = build({"name": "sinkhorn", **options}, D, E).double()
    router.reset_parameters(std=0.5)
    return router


def make_tokens(t: int, sequences: int = 1) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    position = torch.arange(t)
    valid = position % 7 != 3
    return torch.randn(t, D, dtype=torch.float64), Tokens(position % 5, position // (t // sequences), position, valid, 0, t // sequences)


def plan(z: torch.Tensor, valid: torch.Tensor, iterations: int) -> torch.Tensor:
    f, g = potentials(z, valid, iterations)
    return torch.where(valid[..., None], (z + f[..., None] + g[:, None]).exp(), 0)


def test_a_converged_plan_has_its_marginals():
    torch.manual_seed(1)
    z = torch.randn(3, 20, E, dtype=torch.float64)
    valid = torch.rand(3, 20) > 0.2
    valid[2, 1:] = False
    pi = plan(z, valid, 300)
    torch.testing.assert_close(pi.sum(2), valid.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(pi.sum(1), (valid.sum(1, keepdim=True).double() / E).expand(3, E), rtol=1e-9, atol=0)


def test_columns_are_exact_after_any_number_of_iterations():
    z = 3 * torch.randn(1, 24, E, dtype=torch.float64)
    torch.testing.assert_close(plan(z, torch.ones(1, 24, dtype=torch.bool), 2).sum(1), torch.full((1, E), 4.0).double(), rtol=1e-12, atol=0)


def test_the_iteration_is_alternate_scaling_of_rows_and_columns():
    torch.manual_seed(2)
    z = torch.randn(18, E, dtype=torch.float64)
    pi = z.exp()
    for _ in range(5):
        pi = pi / pi.sum(1, keepdim=True)
        pi = pi / pi.sum(0) * 3
    torch.testing.assert_close(plan(z[None], torch.ones(1, 18, dtype=torch.bool), 5)[0], pi, rtol=1e-12, atol=0)


def test_constants_added_to_rows_and_columns_leave_the_plan():
    torch.manual_seed(3)
    z, valid = torch.randn(2, 15, E, dtype=torch.float64), torch.ones(2, 15, dtype=torch.bool)
    shifted = z + torch.randn(2, 15, 1, dtype=torch.float64) + torch.randn(2, 1, E, dtype=torch.float64)
    torch.testing.assert_close(plan(shifted, valid, 300), plan(z, valid, 300), rtol=1e-8, atol=0)


def test_logits_of_ten_thousand_stay_finite():
    z = 1e4 * torch.randn(1, 20, E)
    f, g = potentials(z, torch.ones(1, 20, dtype=torch.bool), 20)
    assert f.isfinite().all()
    assert g.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 6])
def test_training_takes_the_largest_entries_of_the_plan_and_weighs_by_raw_logits(k):
    router = make(k=k, iterations=50)
    x, tokens = make_tokens(40, sequences=2)
    routing = router(x, tokens)
    z = x @ router.weight.T
    weight = torch.sigmoid(z) if k == 1 else z.softmax(-1)
    for s in range(2):
        rows = torch.arange(20 * s, 20 * s + 20)
        kept = rows[tokens.valid[rows]]
        pi = z[kept].exp()
        for _ in range(50):
            pi = pi / pi.sum(1, keepdim=True)
            pi = pi / pi.sum(0) * len(kept) / E
        for i, row in zip(kept.tolist(), pi, strict=True):
            chosen = routing.expert.view(40, k)[i]
            assert set(chosen.tolist()) == set(row.topk(k).indices.tolist())
            torch.testing.assert_close(routing.weight.view(40, k)[i], weight[i, chosen], rtol=1e-12, atol=0)


def test_the_plan_has_no_gradient():
    router = make()
    x, tokens = make_tokens(20)
    routing = router(x, tokens)
    used = routing.expert < E
    (expected,) = torch.autograd.grad(
        (x @ router.weight.T).sigmoid()[routing.token[used], routing.expert[used]].sum(), router.weight, retain_graph=True
    )
    torch.testing.assert_close(torch.autograd.grad(routing.weight.sum(), router.weight)[0], expected, rtol=1e-12, atol=1e-14)


def test_training_balances_what_evaluation_does_not():
    router = make()
    router.weight.data[0] *= 4
    x, tokens = make_tokens(600)
    trained, evaluated = router(x, tokens).load(E), router.eval()(x, tokens).load(E)
    assert evaluated.max() > 2 * evaluated.double().mean()
    assert trained.max() < 1.4 * trained.double().mean()


def test_evaluation_takes_each_tokens_own_best_and_looks_at_no_other():
    router = make(k=2).eval()
    x, tokens = make_tokens(20)
    routing = router(x, tokens)
    z = x @ router.weight.T
    wanted = torch.where(tokens.valid[:, None], z.topk(2).indices, E)
    assert torch.equal(routing.expert.view(20, 2), wanted)
    later = torch.cat([x[:10], torch.randn(10, D, dtype=torch.float64)])
    assert torch.equal(router(later, tokens).expert[:20], routing.expert[:20])


def test_in_training_a_later_token_changes_what_an_earlier_one_gets():
    """It looks across the sequence: a leak in training that evaluation does not have."""
    router = make()
    x, tokens = make_tokens(40)
    later = torch.cat([x[:20], 5 * router.weight[0].detach().expand(20, D)])
    assert not torch.equal(router(later, tokens).expert[:20], router(x, tokens).expert[:20])


def test_a_nan_token_does_not_move_the_others():
    router = make()
    x, tokens = make_tokens(20)
    poisoned = x.clone()
    poisoned[4] = torch.nan
    without = tokens._replace(valid=tokens.valid & (torch.arange(20) != 4))
    rest = torch.arange(20) != 4
    assert torch.equal(router(poisoned, tokens).expert[rest], router(x, without).expert[rest])
