"""Capacity against a definition that fills one expert's places after the other, and what it promises to each order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from moe.errors import ConfigError
from moe.routers import Routing, Tokens, build
from moe.routers.capacity import Capacity

E = 4


def example(t: int = 60, k: int = 2, padded: int = 7, seed: int = 0) -> tuple[Routing, Tokens]:
    """Distinct experts of each token, the first ones favourites; rows in no order, among them padding and a drop."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(t, E, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    weight, expert = score.softmax(1).topk(k)
    valid = torch.ones(t, dtype=torch.bool)
    valid[torch.randperm(t, generator=generator)[:padded]] = False
    order = torch.randperm(t, generator=generator)
    position = torch.arange(t)
    tokens = Tokens(position, position // 20, position + 100, valid, 0)
    tokens = Tokens(*(a[order] for a in tokens[:4]), 0)
    expert = torch.where(tokens.valid[:, None], expert, E)
    if t:
        expert[t // 2, -1] = E
    return Routing.per_token(expert, torch.where(expert < E, weight, 0).requires_grad_()), tokens


def defined(routing: Routing, tokens: Tokens, factor: float, drop: str, group: int | str, multiple: int) -> torch.Tensor:
    """Which rows are kept, one decision at a time."""
    k = routing.fan_out
    expert, weight = routing.expert.view(-1, k).tolist(), routing.weight.view(-1, k).tolist()
    members: dict[tuple, list[int]] = {}
    for token in range(len(tokens.index)):
        part = 0 if group == "sequence" else tokens.index[token].item() // group
        members.setdefault((tokens.sequence[token].item(), part), []).append(token)
    kept = torch.zeros(len(routing.expert), dtype=torch.bool)
    for group_tokens in members.values():
        count = sum(tokens.valid[token].item() for token in group_tokens)
        room = math.ceil(Fraction(count * k) * Fraction(str(factor)) / E)
        room = math.ceil(room / multiple) * multiple
        queue = [(token, j) for token in group_tokens for j in range(k)]
        urgency = {
            "order": lambda a: (a[1], tokens.index[a[0]].item()),
            "priority": lambda a: (a[1], -max(weight[a[0]]), tokens.index[a[0]].item()),
            "weight": lambda a: (-weight[a[0]][a[1]], a[1], tokens.index[a[0]].item()),
        }[drop]
        taken = dict.fromkeys(range(E), 0)
        for token, j in sorted(queue, key=urgency):
            e = expert[token][j]
            if e < E and taken[e] < room:
                taken[e] += 1
                kept[token * k + j] = True
    return kept


@pytest.mark.parametrize("drop", ["order", "priority", "weight"])
@pytest.mark.parametrize("group", ["sequence", 5, 7])
@pytest.mark.parametrize(("factor", "multiple"), [(0.5, 1), (0.7, 1), (0.5, 4)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_who_is_kept_is_the_definition(drop, group, factor, multiple, k):
    routing, tokens = example(k=k)
    kept = defined(routing, tokens, factor, drop, group, multiple)
    limited = Capacity(E, factor, drop=drop, group=group, multiple=multiple)(routing, tokens)
    assert torch.equal(limited.expert, torch.where(kept, routing.expert, E))
    assert torch.equal(limited.weight, torch.where(kept, routing.weight, 0))
    assert torch.equal(limited.token, routing.token)
    assert limited.fan_out == k
    assert 0 < kept.sum() < (routing.expert < E).sum()
    assert torch.equal(limited.stats["demand"], routing.load(E))
    (gradient,) = torch.autograd.grad(limited.weight.sum(), routing.weight)
    assert torch.equal(gradient, kept.double())


@pytest.mark.parametrize("drop", ["order", "priority", "weight"])
def test_a_factor_of_E_over_k_drops_nothing(drop):
    routing, tokens = example()
    everything = Routing.per_token(torch.where(tokens.valid[:, None], torch.tensor([2, 0]), E), routing.weight.view(-1, 2))
    limited = Capacity(E, E / 2, drop=drop)(everything, tokens)
    assert torch.equal(limited.expert, everything.expert)
    less = Capacity(E, E / 2 - 0.25, drop=drop)(everything, tokens)
    assert less.load(E).sum() < everything.load(E).sum()


def test_batch_priority_never_drops_a_better_token_than_it_keeps():
    routing, tokens = example(k=3)
    kept = Capacity(E, 0.5, drop="priority")(routing, tokens).expert.view(-1, 3) < E
    expert, best = routing.expert.view(-1, 3), routing.weight.view(-1, 3).amax(1)
    some = 0
    for choice in range(3):
        for e in range(E):
            for s in range(3):
                asked = (expert[:, choice] == e) & (tokens.sequence == s)
                inside, outside = best[asked & kept[:, choice]], best[asked & ~kept[:, choice]]
                if len(inside) and len(outside):
                    some += 1
                    assert outside.max() <= inside.min()
    assert some


def test_equal_weights_are_kept_in_order():
    tokens = Tokens.of(torch.zeros(8, 1))
    routing = Routing.per_token(torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
    for drop in ("order", "priority", "weight"):
        assert Capacity(E, 2.0, drop=drop)(routing, tokens).expert.tolist() == [0] * 4 + [E] * 4


def test_decimal_factors_are_exact():
    tokens = Tokens.of(torch.zeros(100, 1))
    routing = Routing.per_token(torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1))
    assert math.ceil(100 * 1 * 1.1 / 10) == 12
    assert Capacity(10, 1.1)(routing, tokens).load(10)[0] == 11
    assert Capacity(10, 1.1, multiple=4)(routing, tokens).load(10)[0] == 12


@pytest.mark.parametrize("group", ["sequence", 3])
@pytest.mark.parametrize("t", [0, 1])
def test_few_tokens_are_kept(t, group):
    routing, tokens = example(t, k=1, padded=0)
    routing = routing._replace(expert=torch.zeros_like(routing.expert))
    limited = Capacity(E, 0.1, group=group)(routing, tokens)
    assert limited.expert.tolist() == [0] * t


def test_a_dropped_nan_is_still_seen():
    tokens = Tokens.of(torch.zeros(8, 1))
    weight = torch.ones(8, 1)
    weight[6] = torch.nan
    limited = Capacity(E, 1.0)(Routing.per_token(torch.zeros(8, 1, dtype=torch.int64), weight), tokens)
    assert limited.expert[6] == E
    assert limited.weight.isnan().nonzero().tolist() == [[6]]


def later_changed(options: dict) -> bool:
    """Whether what tokens 0 to 11 get depends on what stands at 12 to 19."""
    torch.manual_seed(0)
    router = build({"name": "top_k", "balance_loss": 0.0, **options}, 8, E).double()
    router.reset_parameters(std=1.0)
    x = torch.randn(20, 8, dtype=torch.float64) + 0.5
    other = torch.cat([x[:12], torch.randn(8, 8, dtype=torch.float64)])
    a, b = router(x, Tokens.of(x)), router(other, Tokens.of(other))
    n = 12 * router.k
    return not (torch.equal(a.expert[:n], b.expert[:n]) and torch.equal(a.weight[:n], b.weight[:n]))


def test_only_first_choices_in_order_are_blind_to_later_tokens():
    switch = {"k": 1, "normalize": "none"}
    assert not later_changed({"k": 2})
    assert not later_changed({**switch, "capacity_factor": 0.5})
    assert later_changed({**switch, "capacity_factor": 0.5, "drop": "priority"})
    assert later_changed({"k": 2, "capacity_factor": 0.5, "drop": "weight"})
    # a later first choice goes before an earlier second one
    tokens, weight = Tokens.of(torch.zeros(4, 1)), torch.tensor([[0.6, 0.4]]).expand(4, 2)
    before = torch.tensor([[0, 1], [0, 2], [3, 0], [2, 3]])
    after = torch.tensor([[0, 1], [0, 2], [3, 0], [1, 3]])
    first = [Capacity(E, 0.5)(Routing.per_token(e, weight), tokens).expert[:6].tolist() for e in (before, after)]
    assert first == [[0, 1, E, E, 3, E], [0, E, E, 2, 3, E]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 is no share of tokens; choose router.capacity_factor above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor above 0"),
        ({"capacity_factor": math.inf}, "or null"),
        ({"capacity_factor": math.nan}, "capacity_factor=nan"),
        ({"capacity_factor": 1.0, "capacity_group": 0}, "router.capacity_group=sequence or at least 1"),
        ({"capacity_factor": 1.0, "capacity_multiple": 0}, "capacity_multiple of at least 1"),
        ({"drop": "priority"}, "drop=priority has no effect without a capacity"),
        ({"capacity_group": 8}, "capacity_group=8 has no effect"),
        ({"capacity_multiple": 4}, "capacity_multiple=4 has no effect"),
    ],
)
@pytest.mark.parametrize("name", ["top_k", "noisy_top_k", "hash"])
def test_bad_settings_say_what_to_type(name, options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": name, **options}, 8, E)
    assert "\n" not in str(caught.value)
