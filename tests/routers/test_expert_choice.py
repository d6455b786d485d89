"""ExpertChoice against a definition written for one expert and one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from moe.model.moe_layer import MoELayer
from moe.routers import Tokens, build

D, E = 12, 4


def make(**options):
    torch.manual_seed(0)
    router = build({"name": "expert_choice", "leak": "allow", **options}, D, E).double()
    router.reset_parameters(std=0.5)
    return router


def make_tokens(lengths: list[int], padded: tuple[int, ...] = ()) -> tuple[torch.Tensor, Tokens]:
    t = sum(lengths)
    torch.manual_seed(t)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    valid = torch.ones(t, dtype=torch.bool)
    valid[list(padded)] = False
    return torch.randn(t, D, dtype=torch.float64), Tokens(torch.zeros_like(sequence), sequence, torch.arange(t), valid, 0)


def defined(router, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """[t, E] weights, by the words of the paper."""
    probability = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in (x @ router.weight.T).tolist()]
    out = torch.zeros(len(x), E, dtype=torch.float64)
    for s in set(tokens.sequence.tolist()):
        members = [i for i in range(len(x)) if tokens.sequence[i] == s and tokens.valid[i]]
        room = min(math.ceil(len(members) * router.capacity_factor / E), len(members))
        for e in range(E):
            for i in sorted(members, key=lambda i: -probability[i][e])[:room]:
                out[i, e] = probability[i][e]
    if router.max_experts is not None:
        for i, row in enumerate(out.tolist()):
            for e in sorted(range(E), key=lambda e: -row[e])[router.max_experts :]:
                out[i, e] = 0
    return out


def table(routing, t: int) -> torch.Tensor:
    out = torch.zeros(t, E + 1, dtype=torch.float64)
    return out.index_put((routing.token, routing.expert), routing.weight, accumulate=True)[:, :E]


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}, {"capacity_factor": 3.5}, {"max_experts": 1}, {"capacity_factor": 4.0}])
@pytest.mark.parametrize("training", [True, False])
def test_routing_is_the_definition_in_training_and_evaluation(options, training):
    router = make(**options).train(training)
    x, tokens = make_tokens([9, 5, 16, 1], padded=(2, 3, 12))
    torch.testing.assert_close(table(router(x, tokens), 31), defined(router, x, tokens), rtol=1e-12, atol=1e-15)


def test_every_expert_takes_exactly_its_capacity_of_every_sequence():
    router = make(capacity_factor=1.5)
    x, tokens = make_tokens([10, 7, 3], padded=(0, 11))
    routing = router(x, tokens)
    kept = routing.expert < E
    for s, count in enumerate((9, 6, 3)):
        load = torch.bincount(routing.expert[kept & (tokens.sequence[routing.token] == s)], minlength=E)
        assert load.tolist() == [math.ceil(count * 1.5 / E)] * E


def test_tokens_that_no_expert_takes_are_counted_and_keep_their_residual():
    router = make(capacity_factor=1.0)
    router.weight.data[1:] = router.weight.data[:1]  # experts agree, and take the same tokens
    router.weight.data[0] += 1e-3
    layer = MoELayer(D, experts=E, d_expert=8, router=router).double()
    x, tokens = make_tokens([16])
    out, report = layer(x, tokens)
    routing = router(x, tokens)
    none = torch.ones(16, dtype=torch.bool)
    none[routing.token[routing.expert < E]] = False
    assert report.stats["unrouted"] == none.sum() > 0
    assert (out[none] == 0).all()
    assert (out[~none] != 0).any(1).all()


def test_a_later_token_changes_what_an_earlier_one_gets():
    """The leak that the option is about."""
    router = make(capacity_factor=1.0).eval()
    x, tokens = make_tokens([12])
    other = x.clone()
    other[11] = 5 * router.weight[table(router(x, tokens), 12)[0].argmax()].detach()
    earlier = [table(router(v, tokens), 12)[:11] != 0 for v in (x, other)]
    assert not torch.equal(*earlier)


def test_another_sequence_changes_nothing():
    router = make()
    x, tokens = make_tokens([8, 8])
    other = torch.cat([x[:8], torch.randn(8, D, dtype=torch.float64)])
    assert torch.equal(table(router(x, tokens), 16)[:8], table(router(other, tokens), 16)[:8])


def test_equal_tokens_are_taken_from_the_first():
    router = make(capacity_factor=1.0)
    x, tokens = make_tokens([400])
    routing = router(x[:1].expand(400, D), tokens)
    assert sorted(set(routing.token.tolist())) == list(range(100))


def test_choices_differ_where_probabilities_underflow():
    router = make(capacity_factor=1.0)
    x, tokens = make_tokens([8])
    z = 1e4 * x @ router.weight.T
    routing = router(1e4 * x, tokens)
    assert ((z.softmax(-1) == 0).sum(0) > 6).any(), "two of eight tokens can be told apart by probability"
    score = z - z.logsumexp(1, keepdim=True)
    for e in range(E):
        assert set(routing.token[routing.expert == e].tolist()) == set(score[:, e].topk(2).indices.tolist())


def test_the_gradient_is_that_of_the_weights():
    router = make()
    x, tokens = make_tokens([6, 6])
    upstream = torch.randn(12, E, dtype=torch.float64)
    chosen = table(router(x, tokens), 12) != 0
    (table(router(x, tokens), 12) * upstream).sum().backward()
    (expected,) = torch.autograd.grad(((x @ router.weight.T).softmax(-1) * chosen * upstream).sum(), router.weight)
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-12, atol=1e-14)
