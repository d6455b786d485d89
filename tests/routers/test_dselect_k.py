"""DSelect-k against a definition that spells experts' numbers, and its kinship with COMET."""

from __future__ import annotations

import pytest
import torch

from moe.errors import ConfigError
from moe.model.initialise import initial_value
from moe.model.settings import Model, Moe
from moe.routers import Tokens, build
from moe.routers.comet import leaf_reach, smooth_step
from moe.routers.dselect_k import code_reach
from tests.routers.test_contract import table

D, E = 8, 6


def make(experts: int = E, **options):
    router = build({"name": "dselect_k", **options}, D, experts).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return router


def make_tokens(t: int, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(valid=torch.arange(t) >= padded)


def defined(router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, E] weights and [t, k, E] choices, number by number."""
    weights, choices = [], []
    for row in x:
        static = router.gating == "static"
        z = router.code if static else router.code @ row + router.code_bias
        c = router.selector if static else router.selector @ row + router.selector_bias
        bits = smooth_step(z, router.gamma)
        numbers = [[(i >> t) & 1 for t in range(router.bits)] for i in range(router.num_experts)]
        choice = []
        for selector in bits:
            factors = [[b if bit else 1 - b for b, bit in zip(selector, number, strict=True)] for number in numbers]
            choice.append(torch.stack([torch.stack(f).prod() for f in factors]))
        weights.append(sum(share * r for share, r in zip(c.exp() / c.exp().sum(), choice, strict=True)))
        choices.append(torch.stack(choice))
    return torch.stack(weights), torch.stack(choices)


def test_golden_choice():
    found = code_reach(torch.tensor([0.3, 0.8, 0.55], dtype=torch.float64))
    expected = torch.tensor([0.063, 0.027, 0.252, 0.108, 0.077, 0.033, 0.308, 0.132], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_a_selector_points_at_all_numbers_together_once(bits):
    share = torch.rand(9, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    torch.testing.assert_close(code_reach(share).sum(-1), torch.ones(9, dtype=torch.float64), rtol=1e-14, atol=0)
    number = torch.arange(1 << bits)
    decided = (number[:, None] >> torch.arange(bits) & 1).double()
    assert torch.equal(code_reach(decided), torch.eye(1 << bits, dtype=torch.float64))


@pytest.mark.parametrize("gating", ["per_example", "static"])
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (6, 2), (8, 3), (11, 2)])
def test_weights_losses_and_their_gradients_are_the_definition(gating, experts, k):
    router = make(experts, k=k, gating=gating, gamma=6.0, entropy_loss=0.3, validity_loss=0.7)
    x, tokens = make_tokens(11, padded=3)
    routing = router(x, tokens)
    weight, choice = defined(router, x)
    weight = weight * tokens.valid[:, None]
    found = table(routing, 11, experts)[:, :experts]
    torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-14)
    loss = 0.3 * -(choice * choice.clamp(min=1e-300).log())[3:].sum()
    if experts in (6, 11):
        loss = loss + 0.7 * (1 / (1e-6 + choice.sum(-1)))[3:].sum()
    torch.testing.assert_close(routing.loss, loss, rtol=1e-12, atol=0)
    pull = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((found * pull).sum() + routing.loss, list(router.parameters()))
    wanted = torch.autograd.grad((weight * pull).sum() + loss, list(router.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_decided_bits_leave_a_token_at_most_k_experts():
    router = make(8, k=3, gamma=1e-6)
    x, tokens = make_tokens(200)
    routing = router(x, tokens)
    per_token = torch.zeros(200, dtype=torch.int64).scatter_add_(0, routing.token, torch.ones_like(routing.token))
    assert per_token.max() == 3
    assert per_token.min() < 3
    torch.testing.assert_close(table(routing, 200, 8).sum(1), torch.ones(200, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_validity_loss_leads_selectors_to_numbers_that_experts_have():
    lost = {}
    for validity_loss in (0.0, 1.0):
        router = make(5, k=2, gating="static", gamma=1.0, entropy_loss=0.3, validity_loss=validity_loss)
        with torch.no_grad():
            router.code.fill_(0.2)  # towards 7
        x, tokens = make_tokens(4)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            router(x, tokens).loss.backward()
            optimizer.step()
        lost[validity_loss] = 1 - table(router(x, tokens), 4, 5).sum(1).mean().item()
    assert lost[0.0] > 0.99
    assert lost[1.0] < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_comet_tree_with_tied_nodes_is_a_selector(bits):
    """Nodes of one depth share P(left) = 1 - bit, the root being the most significant bit."""
    share = torch.rand(7, bits, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    tied = torch.cat([1 - share[:, bits - 1 - depth, None].expand(-1, 1 << depth) for depth in range(bits)], -1)
    torch.testing.assert_close(leaf_reach(tied), code_reach(share), rtol=1e-13, atol=0)


def test_comet_with_tied_nodes_and_one_logit_a_tree_is_dselect_k():
    """For a single selector both are its choice; the joint softmax over leaves adds nothing to a constant."""
    comet, dselect = build({"name": "comet", "k": 1, "gamma": 5.0}, D, 8).double(), make(8, k=1, gamma=5.0)
    with torch.no_grad():
        depth = torch.tensor([0, 1, 1, 2, 2, 2, 2])
        comet.node.copy_(-dselect.code[:, 2 - depth])
        comet.node_bias.copy_(-dselect.code_bias[:, 2 - depth])
        comet.leaf.zero_()
        comet.leaf_bias.fill_(0.3)
    x, tokens = make_tokens(30)
    torch.testing.assert_close(table(comet(x, tokens), 30, 8), table(dselect(x, tokens), 30, 8), rtol=1e-12, atol=1e-15)


def test_static_gating_ignores_the_token():
    router = make(gating="static")
    x, tokens = make_tokens(9)
    weight = table(router(x, tokens), 9, E)
    assert torch.equal(weight, weight[:1].expand(9, -1))
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"code": (2, 3), "selector": (2,)}


@pytest.mark.parametrize("gating", ["per_example", "static"])
def test_first_values_are_uniform(gating):
    settings = Model(layers=2, d_model=64, heads=4, moe=Moe(experts=8, router={"name": "dselect_k", "gamma": 5.0, "gating": gating}))
    for name, bound in (("code", 0.05), ("selector", 0.05)):
        value = initial_value(f"layers.0.moe.router.{name}", (2, 300), settings, seed=0)
        assert 0.9 * bound < value.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "experts", "said"),
    [
        ({}, 1, "model.moe.experts=2 or more"),
        ({"k": 7}, 6, "k from 1 to 6"),
        ({"gamma": -1.0}, 6, "gamma above 0"),
        ({"entropy_loss": -1.0}, 6, "entropy_loss of at least 0"),
        ({"validity_loss": -1.0}, 6, "validity_loss of at least 0"),
    ],
)
def test_bad_settings_say_what_to_type(options, experts, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "dselect_k", **options}, D, experts)
    assert "\n" not in str(caught.value)
