"""TopK against a definition written for one token at a time in float64, and what its options promise."""

from __future__ import annotations

import math

import pytest
import torch

from moe.routers import Tokens, build, noise
from moe.routers.base import best

D, E = 12, 8


def make(**options):
    torch.manual_seed(0)
    router = build({"name": "top_k", **options}, D, E).double()
    router.reset_parameters(std=0.5)
    if router.bias is not None:
        router.bias.normal_(std=0.2)
    return router


def make_tokens(t: int, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    x = torch.randn(t, D, dtype=torch.float64)
    valid = torch.arange(t) >= padded
    return x, Tokens(torch.zeros(t, dtype=torch.int64), torch.arange(t) // 6, torch.arange(t), valid, 0)


def defined_scores(router, x: torch.Tensor) -> torch.Tensor:
    logits = x @ router.weight.T
    return logits.exp() / logits.exp().sum() if router.score == "softmax" else 1 / (1 + (-logits).exp())


def defined_choice(router, score: list[float]) -> list[int]:
    """Experts of one token, best first."""
    ranking = [s + (0.0 if router.bias is None else router.bias[e].item()) for e, s in enumerate(score)]
    size = E // router.groups
    top = 1 if router.group_score == "best" else 2
    value = {g: sum(sorted(ranking[g * size : (g + 1) * size], reverse=True)[:top]) for g in range(router.groups)}
    kept = sorted(value, key=lambda g: -value[g])[: router.groups_kept]
    return sorted((e for e in range(E) if e // size in kept), key=lambda e: -ranking[e])[: router.k]


def defined_weights(router, x: torch.Tensor) -> torch.Tensor:
    """[t, E] weights, by the words of the papers."""
    out = []
    for row in x:
        score = defined_scores(router, row)
        chosen = defined_choice(router, score.tolist())
        total = sum(score[e] for e in chosen) if router.normalize == "selected" else 1.0
        out.append(torch.stack([router.scale * score[e] / total if e in chosen else 0 * score[e] for e in range(E)]))
    return torch.stack(out)


FORMS = {
    "mixtral": {"k": 2},
    "olmoe": {"k": 4, "normalize": "none"},
    "qwen3": {"k": 4, "normalize": "selected"},
    "switch": {"k": 1, "normalize": "none"},
    "deepseek_v2": {"k": 3, "normalize": "none", "scale": 16.0, "groups": 4, "groups_kept": 2, "group_score": "best"},
    "deepseek_v3": {"k": 3, "score": "sigmoid", "scale": 2.5, "groups": 2, "groups_kept": 1, "bias_rate": 1e-3},
    "softmax_with_bias": {"k": 2, "bias_rate": 1e-3},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_their_gradients_are_the_definition(form):
    router = make(**FORMS[form])
    x, tokens = make_tokens(17)
    x.requires_grad_()
    routing = router(x, tokens)
    found = torch.zeros(17, E, dtype=torch.float64).index_put((routing.token, routing.expert), routing.weight)
    expected = defined_weights(router, x)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    pull = torch.randn(17, E, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), [x, router.weight]),
        torch.autograd.grad((expected * pull).sum(), [x, router.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_gradients_agree_with_finite_differences():
    router = make(k=3, score="sigmoid", z_loss=0.1, balance_loss=0.1)
    x, tokens = make_tokens(6)

    def run(x):
        routing = router(x, tokens)
        return routing.weight, routing.loss

    assert torch.autograd.gradcheck(run, x.requires_grad_())


def test_weights_come_best_first_and_sum_as_they_say():
    x, tokens = make_tokens(17)
    for options, total in [({"k": 3, "scale": 2.5}, 2.5), ({"k": 3, "normalize": "none"}, None)]:
        weight = make(**options)(x, tokens).weight.view(17, 3)
        assert (weight.diff() <= 0).all()
        if total is None:
            assert (weight.sum(1) < 1).all()
        else:
            torch.testing.assert_close(weight.sum(1), torch.full((17,), total, dtype=torch.float64))


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_is_the_definition(scope, score):
    router = make(k=2, score=score, balance_loss=0.3, balance_scope=scope)
    x, tokens = make_tokens(20, padded=3)
    scores = torch.stack([defined_scores(router, row) for row in x])
    probability = scores / scores.sum(1, keepdim=True)
    chosen = [defined_choice(router, row.tolist()) for row in scores]
    groups = [list(range(3, 20))] if scope != "sequence" else [[t for t in range(3, 20) if t // 6 == s] for s in range(4)]
    expected = 0.0
    for group in groups:
        f = torch.tensor([sum(e in chosen[t] for t in group) / (2 * len(group)) for e in range(E)], dtype=torch.float64)
        expected = expected + len(group) * E * (f * probability[group].mean(0)).sum()
    loss = router(x, tokens).loss
    torch.testing.assert_close(loss, 0.3 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, router.weight)[0] for v in (loss, 0.3 * expected)), rtol=1e-10, atol=1e-14)


def test_z_loss_and_statistics_are_sums_over_valid_tokens():
    router = make(k=2, balance_loss=0.0, z_loss=0.5)
    x, tokens = make_tokens(20, padded=3)
    routing = router(x, tokens)
    p = (x[3:] @ router.weight.T).softmax(-1)
    z = (x[3:] @ router.weight.T).exp().sum(1).log().square().sum()
    torch.testing.assert_close(routing.loss, 0.5 * z, rtol=1e-12, atol=0)
    expected = {"probability": p.sum(0), "entropy": -(p * p.log()).sum(), "confidence": p.max(1).values.sum(), "z": z}
    assert routing.stats.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(routing.stats[key], value.detach(), rtol=1e-12, atol=0)


def test_until_the_window_is_complete_a_call_sees_the_loads_so_far_and_its_own():
    router = make(balance_loss=1.0)
    x, tokens = make_tokens(20)
    routing = router(x, tokens)
    p = routing.stats["probability"]
    own, earlier = 3 * routing.load(E), 3 * torch.arange(E)
    for window, complete, load in [(None, False, own), (earlier, False, own + earlier), (earlier, True, earlier)]:
        router.window, router.window_complete, router.total = window, complete, lambda v: 3 * v
        expected = E * (load.double() / load.sum() * p).sum()
        torch.testing.assert_close(router(x, tokens).loss.detach(), expected, rtol=1e-12, atol=0)


def test_balance_training_spreads_the_load():
    torch.manual_seed(0)
    router = make(balance_loss=1.0)
    x, tokens = make_tokens(400)
    x += 1.0  # a common direction, so that some experts start as favourites
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    worst = []
    for _ in range(100):
        routing = router(x, tokens)
        load = routing.load(E).double()
        worst.append((load.max() / load.mean()).item())
        optimizer.zero_grad()
        (routing.loss / 400).backward()
        optimizer.step()
    assert worst[0] > 1.8
    assert worst[-1] < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_go_to_the_lowest_expert(dtype):
    assert best(torch.zeros(5, 300, dtype=dtype), 4).tolist() == [[0, 1, 2, 3]] * 5
    torch.manual_seed(0)
    score = torch.randint(0, 4, (500, 64)).to(dtype)
    assert torch.equal(best(score, 8), torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :8])
    router = build({"name": "top_k", "k": 3}, D, E).to(dtype)
    torch.nn.init.zeros_(router.weight)
    x = torch.randn(5, D, dtype=dtype)
    assert router(x, Tokens.of(x)).expert.view(5, 3).tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize("groups", [1, 2])
def test_saturated_scores_still_rank_by_their_logits(groups):
    router = build({"name": "top_k", "k": 1, "normalize": "none", "score": "sigmoid", "groups": groups, "groups_kept": groups}, E, E)
    router.weight.data.copy_(torch.eye(E))
    x = torch.full((1, E), 100.0).index_fill_(1, torch.tensor([5]), 200.0)
    assert router(x, Tokens.of(x)).expert.tolist() == [5]


def test_scores_that_all_underflow_are_still_normalised():
    router = build({"name": "top_k", "score": "sigmoid"}, E, E)
    router.weight.data.copy_(torch.eye(E))
    x = torch.full((1, E), -500.0)
    assert router(x, Tokens.of(x)).weight.tolist() == [0.5, 0.5]


def test_jitter_scales_inputs_within_bounds_and_in_training_alone():
    router = make(k=2, jitter=0.25)
    seen = []
    x, tokens = make_tokens(50)
    router.stream = 9
    noisy = router(x, tokens)
    again, later = router(x, tokens), router(x, tokens._replace(step=1))
    router.stream = 10
    other = router(x, tokens)
    quiet = router.eval()(x, tokens)
    router.jitter = 0.0
    clean = router(x, tokens)
    seen = [r.weight for r in (noisy, later, other, clean)]
    assert torch.equal(noisy.weight, again.weight)
    assert torch.equal(quiet.weight, clean.weight)
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    alone = build({"name": "top_k", "k": 1, "normalize": "none", "score": "sigmoid", "jitter": 0.25}, 1, 1).double()
    torch.nn.init.ones_(alone.weight)
    ones = torch.ones(4000, 1, dtype=torch.float64)
    factor = alone(ones, Tokens.of(ones)).weight.logit()
    assert 0.75 < factor.min() < 0.752
    assert 1.248 < factor.max() < 1.25
    assert factor.mean().item() == pytest.approx(1.0, abs=4 * 0.25 / math.sqrt(3 * 4000))


# Switch and GShard, which are settings: numbers worked out by hand.


def identity(x: list[list[float]], **options):
    """A router whose logits are its input, and one sequence."""
    router = build({"name": "top_k", **options}, 4, 4).double()
    router.weight.data.copy_(torch.eye(4))
    x = torch.tensor(x, dtype=torch.float64)
    return router, x, Tokens.of(x)


def test_switch_golden_values():
    """p = (.4, .3, .2, .1) and two permutations of it; capacity ceil(4 * 1.25 / 4) = 2, f = (3/4, 1/4, 0, 0)."""
    p = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2], [0.2, 0.4, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1]]
    switch = {"k": 1, "normalize": "none", "capacity_factor": 1.25, "balance_loss": 0.01}
    router, x, tokens = identity([[math.log(v) for v in row] for row in p], **switch)
    routing = router(x, tokens)
    assert routing.expert.tolist() == [0, 0, 1, 4]
    torch.testing.assert_close(routing.weight.tolist(), [0.4, 0.4, 0.4, 0.0], rtol=1e-12, atol=0)
    # 4 * (3/4 * .35 + 1/4 * .275) = 1.325, and what is dropped counts in f
    assert routing.loss.item() == pytest.approx(0.01 * 4 * 1.325, rel=1e-12)
    assert routing.stats["demand"].tolist() == [3, 1, 0, 0]
    assert routing.load(4).tolist() == [2, 1, 0, 0]


def test_gshard_golden_values():
    """Second choices weigh g2 / (g1 + g2) and are used with twice that chance; the loss counts first choices alone."""
    p = [[0.6, 0.2, 0.15, 0.05]] * 4000
    gshard = {"second": "random", "balance_counts": "first", "balance_scope": "micro", "balance_loss": 0.01}
    router, x, tokens = identity([[math.log(v) for v in row] for row in p], **gshard)
    routing = router(x, tokens)
    expert, weight = routing.expert.view(-1, 2), routing.weight.view(-1, 2)
    assert (expert[:, 0] == 0).all()
    torch.testing.assert_close(weight[:, 0], torch.full_like(weight[:, 0], 0.75), rtol=1e-12, atol=0)
    used = expert[:, 1] == 1
    assert used.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    assert (expert[~used, 1] == 4).all()
    jitter = noise.uniform(router.stream, tokens.step, tokens.index, 1)[:, 0]
    assert 0.45 < (used == (jitter < 0.5)).double().mean() < 0.55, "one draw serves two ends"
    torch.testing.assert_close(weight[:, 1], 0.25 * used.double(), rtol=1e-12, atol=0)
    assert routing.loss.item() == pytest.approx(0.01 * 4000 * 4 * 0.6, rel=1e-12)  # E * sum of top-1 share * mean gate
    assert torch.equal(routing.stats["demand"], routing.load(4)), "what is not used is not dropped"
    assert (router(x, tokens._replace(step=1)).expert.view(-1, 2)[:, 1] != expert[:, 1]).any()
    assert (router.eval()(x, tokens).expert.view(-1, 2) == torch.tensor([0, 1])).all()


def test_the_random_second_choice_is_always_used_if_it_is_as_good_and_never_if_it_is_hopeless():
    router, x, tokens = identity([[0.0, 0.0, -9, -9]] * 500 + [[50.0, 0.0, -9, -9]] * 500, second="random")
    second = router(x, tokens).expert.view(-1, 2)[:, 1]
    assert (second[:500] == 1).all()
    assert (second[500:] == 4).all()


@pytest.mark.parametrize("counts", ["all", "first"])
def test_the_balance_loss_of_a_window_counts_what_was_asked_for(counts):
    options = {"capacity_factor": 0.5, "balance_counts": counts, "balance_loss": 1.0}
    router = make(**options)
    x, tokens = make_tokens(24)
    routing = router(x, tokens)
    assert routing.load(E).sum() < routing.stats["demand"].sum()
    chosen = make(balance_loss=1.0)(x, tokens).expert.view(24, 2)[:, : 2 if counts == "all" else 1]
    load = torch.bincount(chosen.flatten(), minlength=E).double()
    expected = E * (load / load.sum() * routing.stats["probability"]).sum()
    torch.testing.assert_close(routing.loss.detach(), expected, rtol=1e-12, atol=0)
    router.window, router.window_complete, router.window_stats = routing.load(E), True, routing.stats
    torch.testing.assert_close(router(x, tokens).loss.detach(), expected, rtol=1e-12, atol=0)


# The expert bias: the bugs that other systems have had with it, one test each.


def test_bias_moves_against_the_load_by_its_rate():
    router = build({"name": "top_k", "bias_rate": 0.5}, D, 4)
    router.update(torch.tensor([9, 1, 5, 5]), 10)
    assert router.bias.tolist() == [-0.5, 0.5, 0, 0]
    frozen = build({"name": "top_k", "bias_rate": 0.0}, D, 4)
    frozen.update(torch.tensor([9, 1, 5, 5]), 10)
    assert frozen.bias.tolist() == [0, 0, 0, 0]


def test_bias_mean_does_not_drift():
    router = build({"name": "top_k", "bias_rate": 0.1}, D, 4)
    for _ in range(1000):
        router.update(torch.tensor([97, 1, 1, 1]), 50)
    assert abs(router.bias.mean().item()) < 1e-5
    torch.testing.assert_close(router.bias[1] - router.bias[0], torch.tensor(200.0), rtol=1e-4, atol=0)


def test_bias_moves_with_loads_that_a_float32_could_not_count():
    router = build({"name": "top_k", "bias_rate": 1.0}, D, 2)
    router.update(torch.tensor([2**31, 2**31 + 1]), 2**31)
    assert router.bias.tolist() == [1, -1]


def test_bias_is_saved_with_its_values_and_restored():
    router = make(bias_rate=1e-3)
    router.update(torch.arange(E), 14)
    fresh = build({"name": "top_k", "bias_rate": 1e-3}, D, E)
    fresh.load_state_dict(router.state_dict())
    assert router.state_dict()["bias"].abs().sum() > 0
    assert torch.equal(fresh.bias, router.bias)
    assert "bias" not in make().state_dict()


def test_bias_stays_float32_when_the_model_does_not():
    router = make(bias_rate=1e-3)
    value = router.bias.clone()
    for move in (lambda r: r.to(torch.bfloat16), lambda r: r.double(), lambda r: torch.nn.Sequential(r).half()[0]):
        moved = move(router)
        assert moved.bias.dtype == torch.float32
        assert torch.equal(moved.bias, value)
    assert moved.weight.dtype == torch.float16
    with torch.device("meta"):
        empty = build({"name": "top_k", "bias_rate": 1e-3}, D, E).to(torch.bfloat16)
    assert empty.bias.is_meta
    assert empty.bias.dtype == torch.float32
    empty.to_empty(device="cpu").reset_parameters()
    assert torch.equal(empty.bias, torch.zeros(E))


def test_bias_has_no_gradient_and_touches_the_selection_alone():
    router = make(k=2, score="sigmoid", bias_rate=1e-3)
    x, tokens = make_tokens(30)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert not router.bias.requires_grad
    with torch.no_grad():
        router.bias.zero_().index_fill_(0, torch.tensor([3, 6]), 10.0)
    routing = router(x, tokens)
    assert set(routing.expert.tolist()) == {3, 6}
    score = (x @ router.weight.T).sigmoid()
    expected = score.gather(1, routing.expert.view(30, 2))
    torch.testing.assert_close(routing.weight.view(30, 2), expected / expected.sum(1, keepdim=True), rtol=1e-12, atol=0)
    router.bias += 3.0
    assert torch.equal(router(x, tokens).expert, routing.expert)


def test_bias_brings_down_the_largest_load():
    torch.manual_seed(0)
    router = build({"name": "top_k", "score": "sigmoid", "bias_rate": 0.01, "balance_loss": 0.0}, E, E)
    router.weight.data.copy_(torch.eye(E))
    skew = torch.linspace(1, -1, E)
    violation = []
    for _ in range(200):
        x = torch.randn(512, E) + skew
        load = router(x, Tokens.of(x)).load(E)
        router.update(load, 512)
        violation.append((load.max() / load.float().mean()).item() - 1)
    assert violation[0] > 0.8
    assert sum(violation[-20:]) / 20 < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_are_distinct_and_ranked_as_a_stable_sort_ranks_whatever_a_row_holds(dtype):
    values = torch.tensor([-torch.inf, -torch.inf, -1.5, -0.0, 0.0, torch.inf, torch.nan], dtype=dtype)
    score = torch.cat([values[torch.randint(7, (300, 9))], values[:, None].expand(-1, 9)])
    wanted = torch.sort(score, dim=-1, descending=True, stable=True).indices
    for k in (1, 4, 9):
        assert torch.equal(best(score, k), wanted[:, :k])
