"""COMET against a definition that walks down its trees, and what deciding nodes promise."""

from __future__ import annotations

import math

import pytest
import torch

from moe.errors import ConfigError
from moe.model.initialise import initial_value
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model, Moe
from moe.routers import Tokens, build
from moe.routers.comet import joint_softmax, leaf_reach, smooth_step
from tests.routers.test_contract import table

D, E = 8, 6


def make(experts: int = E, std: float = 0.5, **options):
    router = build({"name": "comet", **options}, D, experts).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return router


def make_tokens(t: int, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(valid=torch.arange(t) >= padded)


def defined_step(t: torch.Tensor, gamma: float) -> torch.Tensor:
    if t <= -gamma / 2:
        return 0 * t
    return 1 + 0 * t if t >= gamma / 2 else -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def defined_reach(share: list[torch.Tensor], experts: int) -> list[torch.Tensor]:
    """Leaf by leaf, from the leaf up to the root."""
    out = []
    for node in range(experts - 1, 2 * experts - 1):
        reach = torch.ones((), dtype=torch.float64)
        while node:
            parent = (node - 1) // 2
            reach = reach * (share[parent] if node == 2 * parent + 1 else 1 - share[parent])
            node = parent
        out.append(reach)
    return out


def defined_weights(router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, E] weights and the entropy of each token's trees, by the words of the paper."""
    weights, entropies = [], []
    for row in x:
        mass, entropy = [torch.zeros((), dtype=torch.float64)] * router.num_experts, torch.zeros((), dtype=torch.float64)
        for tree in range(router.k):
            share = [defined_step(w @ row + b, router.gamma) for w, b in zip(router.node[tree], router.node_bias[tree], strict=True)]
            for leaf, v in enumerate(defined_reach(share, router.num_experts)):
                mass[leaf] = mass[leaf] + v * (router.leaf[tree, leaf] @ row + router.leaf_bias[tree, leaf]).exp()
                entropy = entropy - (v * v.log() if v > 0 else 0)
        weights.append(torch.stack(mass) / sum(mass))
        entropies.append(entropy)
    return torch.stack(weights), torch.stack(entropies)


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_smooth_step_has_the_golden_values_and_slope(gamma):
    t = (torch.tensor([0, 0.25, -0.25, 0.5, -0.5, 3, -3], dtype=torch.float64) * gamma).requires_grad_()
    value = smooth_step(t, gamma)
    torch.testing.assert_close(value, torch.tensor([0.5, 0.84375, 0.15625, 1, 0, 1, 0], dtype=torch.float64), rtol=1e-15, atol=1e-15)
    (slope,) = torch.autograd.grad(value.sum(), t)
    inside = 3 / (2 * gamma) - 6 * t.detach() ** 2 / gamma**3
    torch.testing.assert_close(slope, inside.where(t.abs() < gamma / 2, 0), rtol=1e-12, atol=1e-12)
    assert (slope[3:] == 0).all()


@pytest.mark.parametrize("experts", range(2, 18))
def test_every_tree_hands_out_the_whole_token(experts):
    share = torch.rand(7, experts - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(experts))
    reach = leaf_reach(share)
    expected = torch.stack([torch.stack(defined_reach(list(row), experts)) for row in share])
    torch.testing.assert_close(reach, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(reach.sum(-1), torch.ones(7, dtype=torch.float64), rtol=1e-14, atol=0)
    decided = leaf_reach(share.round())
    assert torch.equal(decided.sum(-1), torch.ones(7, dtype=torch.float64))
    assert ((decided == 0) | (decided == 1)).all()


def test_golden_forward():
    share = torch.tensor([[0.25, 0.5, 1.0], [0.6, 0.2, 0.9]], dtype=torch.float64)
    reach = leaf_reach(share)
    leaves = torch.tensor([[0.125, 0.125, 0.75, 0], [0.12, 0.48, 0.36, 0.04]], dtype=torch.float64)
    torch.testing.assert_close(reach, leaves, rtol=1e-14, atol=1e-16)
    logits = torch.tensor([[0.1, -0.2, 0.3, 0], [0.5, 0.4, -0.1, 0.2]], dtype=torch.float64)
    expected = torch.tensor([[0.13220771, 0.32203377, 0.52653444, 0.01922408]], dtype=torch.float64)
    torch.testing.assert_close(joint_softmax(logits[None], reach[None]), expected, rtol=0, atol=5e-9)


@pytest.mark.parametrize(("experts", "k", "gamma"), [(2, 1, 1.0), (5, 2, 1.0), (6, 3, 6.0), (9, 2, 20.0)])
def test_weights_and_their_gradients_are_the_definition(experts, k, gamma):
    router = make(experts, k=k, gamma=gamma, entropy_loss=0.3)
    x, tokens = make_tokens(11, padded=3)
    x.requires_grad_()
    routing = router(x, tokens)
    weight, entropy = defined_weights(router, x)
    weight = weight * tokens.valid[:, None]
    found = table(routing, 11, experts)[:, :experts]
    torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(routing.loss, 0.3 * entropy[3:].sum(), rtol=1e-12, atol=0)
    pull = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x, *router.parameters()]
    got = torch.autograd.grad((found * pull).sum() + routing.loss, inputs)
    wanted = torch.autograd.grad((weight * pull).sum() + 0.3 * entropy[3:].sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    router = make(gamma=20.0, entropy_loss=0.1)  # no node near the ends of its band, where the second derivative jumps
    x, tokens = make_tokens(4)

    def run(x):
        routing = router(x, tokens)
        return routing.weight, routing.loss

    assert torch.autograd.gradcheck(run, x.requires_grad_())


def test_decided_trees_leave_a_token_at_most_k_experts_and_equal_leaves_merge():
    router = make(9, k=3, gamma=1e-6)
    x, tokens = make_tokens(200)
    routing = router(x, tokens)
    per_token = torch.zeros(200, dtype=torch.int64).scatter_add_(0, routing.token, torch.ones_like(routing.token))
    assert per_token.max() == 3
    assert per_token.min() < 3  # two trees that agree
    torch.testing.assert_close(table(routing, 200, 9).sum(1), torch.ones(200, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_decided_node_does_not_learn_from_the_token():
    router = make(gamma=2.0)
    x, _ = make_tokens(40)
    score = torch.einsum("kid,td->tki", router.node, x) + router.node_bias
    seen = set()
    for t in range(40):
        routing = router(x[t : t + 1], Tokens.of(x[t : t + 1]))
        (gradient,) = torch.autograd.grad(routing.weight.square().sum() + routing.loss, router.node)
        decided = score[t].abs() >= 1
        assert (gradient[decided] == 0).all()
        assert gradient.isfinite().all()
        seen |= set(decided.flatten().tolist())
    assert seen == {True, False}


def test_experts_that_no_tree_leads_to_are_not_evaluated():
    router = make(k=1, gamma=1e-6)
    layer = MoELayer(D, experts=E, d_expert=4, router=router).double()
    x, tokens = make_tokens(5)
    used = router(x, tokens).load(E) > 0
    assert not used.all()
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight[~used] = torch.nan
    out, report = layer(x, tokens)
    assert out.isfinite().all()
    assert report.load.sum() == 5
    assert torch.equal(report.stats["demand"], report.load)  # nothing is dropped


@pytest.mark.parametrize(("gamma", "entropy_loss", "experts_left"), [(0.02, 1.0, "few"), (10.0, 0.0, "nearly all")])
def test_the_entropy_loss_and_a_narrow_band_make_gates_sparse(gamma, entropy_loss, experts_left):
    router = build({"name": "comet", "k": 2, "gamma": gamma, "entropy_loss": entropy_loss}, D, 8).double()
    torch.manual_seed(0)
    router.reset_parameters()
    values = torch.randn(8, dtype=torch.float64)
    x, tokens = make_tokens(256)
    target = values[(x[:, :3] > 0).long() @ torch.tensor([1, 2, 4])]
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        routing = router(x, tokens)
        out = torch.zeros(256, dtype=torch.float64).index_add(0, routing.token, routing.weight * values[routing.expert])
        optimizer.zero_grad()
        ((out - target).square().mean() + routing.loss / 256).backward()
        optimizer.step()
    count = torch.zeros(256).index_add(0, routing.token, torch.ones(len(routing.token)))
    if experts_left == "few":
        assert (count <= 2).double().mean() > 0.9  # 0.98 to 1.0: what 150 steps learn depends on the last bits of each product
        assert len(routing.expert.unique()) > 2
    else:
        assert count.mean() > 7


def test_first_values_are_uniform_and_depend_on_the_seed_alone():
    settings = Model(layers=2, d_model=64, heads=4, moe=Moe(experts=8, router={"name": "comet", "gamma": 5.0}))
    shapes = {"node": (2, 7, 64), "leaf": (2, 8, 64)}
    for name, bound in (("node", 0.05), ("leaf", 0.05)):
        value = initial_value(f"layers.0.moe.router.{name}", shapes[name], settings, seed=0)
        assert value.abs().max() <= bound
        assert math.isclose(value.std(), bound / math.sqrt(3), rel_tol=0.1)
        assert torch.equal(value, initial_value(f"layers.0.moe.router.{name}", shapes[name], settings, seed=0))
        assert not torch.equal(value, initial_value(f"layers.1.moe.router.{name}", shapes[name], settings, seed=0))
    narrow = settings.model_copy(update={"moe": Moe(experts=8, router={"name": "comet", "gamma": 0.1})})
    assert initial_value("layers.0.moe.router.node", shapes["node"], narrow, seed=0).abs().max() <= 0.001
    assert (initial_value("layers.0.moe.router.node_bias", (2, 7), settings, seed=0) == 0).all()


@pytest.mark.parametrize(
    ("options", "experts", "said"),
    [
        ({}, 1, "model.moe.experts=2 or more"),
        ({"k": 0}, 6, "k from 1 to 6"),
        ({"k": 7}, 6, "k from 1 to 6"),
        ({"gamma": 0.0}, 6, "gamma above 0"),
        ({"entropy_loss": -1.0}, 6, "entropy_loss of at least 0"),
    ],
)
def test_bad_settings_say_what_to_type(options, experts, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "comet", **options}, D, experts)
    assert "\n" not in str(caught.value)
