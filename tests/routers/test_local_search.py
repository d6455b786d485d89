"""Local search: the relaxation is the definition, the permutation is the Hungarian one, and afterwards only names change."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from moe.errors import ConfigError
from moe.model.initialise import initial_value
from moe.model.moe_layer import MoELayer
from moe.model.settings import Model, Moe
from moe.routers import Tokens, build
from moe.routers.comet import joint_softmax, leaf_reach, smooth_step
from moe.routers.local_search import mix, sinkhorn
from tests.routers.test_contract import table

D, E = 8, 6
INNER = {
    "comet": {"name": "comet", "gamma": 3.0, "entropy_loss": 0.2},
    "dselect_k": {"name": "dselect_k", "gamma": 3.0, "entropy_loss": 0.2},
    "top_k": {"name": "top_k", "k": 3, "balance_loss": 0.2},
    "hash": {"name": "hash", "vocab": 11, "k": 2},
}
every = pytest.mark.parametrize("inner", INNER)


def make(inner: str, **options):
    router = build({"name": "local_search", "router": INNER[inner], "temperature_start": 0.1, **options}, D, E).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return router


def make_tokens(t: int, step: int = 0, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(id=torch.arange(t) % 11, valid=torch.arange(t) >= padded, step=step)


def defined_relaxation(log: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    relaxed = (log / temperature).exp()
    for _ in range(iterations):
        relaxed = relaxed / relaxed.sum(1, keepdim=True)
        relaxed = relaxed / relaxed.sum(0, keepdim=True)
    return relaxed


def best_permutation(gain: torch.Tensor) -> list[int]:
    return list(max(itertools.permutations(range(len(gain))), key=lambda p: sum(gain[i, j].item() for i, j in enumerate(p))))


def test_sinkhorn_is_doubly_stochastic_and_finds_a_planted_permutation():
    generator = torch.Generator().manual_seed(0)
    plan = sinkhorn(torch.randn(9, 9, dtype=torch.float64, generator=generator), 100).exp()
    for dim in (0, 1):
        torch.testing.assert_close(plan.sum(dim), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-4)
    for n in (8, 16):
        planted = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
        log = torch.rand(n, n, dtype=torch.float64, generator=generator) - 0.5 + 2 * planted
        torch.testing.assert_close(sinkhorn(log / 0.05, 100).exp(), planted, rtol=0, atol=1e-6)


def test_schedules_go_from_start_to_end_over_the_steps():
    router = build({"name": "local_search", "steps": 5}, D, E)
    assert [router.temperature(s) for s in (0, 2, 4, 9)] == pytest.approx([1e-3, 1e-5, 1e-7, 1e-7])
    assert [router.iterations(s) for s in (0, 1, 2, 4, 9)] == [20, 52, 85, 150, 150]


@every
def test_the_learning_weights_are_the_wrapped_ones_times_the_relaxation(inner):
    router = make(inner, steps=7, temperature_end=0.05, iterations_start=4, iterations_end=8, entropy_loss=0.3)
    x, tokens = make_tokens(13, step=3, padded=2)
    routing = router(x, tokens)
    relaxed = defined_relaxation(router.log_weights, (0.1 * 0.05) ** 0.5, 6)
    plain = router.router(x, tokens)
    gate = table(plain, 13, E)[:, :E]
    mixed = gate @ relaxed
    mixed = mixed * gate.sum(1, keepdim=True) / mixed.sum(1, keepdim=True).where(tokens.valid[:, None], 1)
    found = table(routing, 13, E)[:, :E]
    torch.testing.assert_close(found, mixed, rtol=1e-11, atol=1e-15)
    rows = relaxed / relaxed.sum(1, keepdim=True)
    disorder = -(relaxed * relaxed.log()).sum(1).mean() - (rows * rows.log()).sum(1).mean()
    loss = plain.loss + 0.3 * 11 * disorder
    torch.testing.assert_close(routing.loss, loss, rtol=1e-11, atol=0)
    pull = torch.randn(13, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((found * pull).sum() + routing.loss, list(router.parameters()))
    wanted = torch.autograd.grad((mixed * pull).sum() + loss, list(router.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_one_matrix_for_all_trees_is_one_matrix_for_their_sum():
    """COMET+ multiplies the leaves of each tree, before they are added up."""
    router = make("comet")
    x, tokens = make_tokens(9)
    tree = router.router
    score, logits = (torch.einsum("kid,td->tki", w, x) + b for w, b in ((tree.node, tree.node_bias), (tree.leaf, tree.leaf_bias)))
    reach = leaf_reach(smooth_step(score, 3.0))
    each = (logits.exp() * reach) / (logits.exp() * reach).sum((1, 2), keepdim=True)
    relaxed = defined_relaxation(router.log_weights, 0.1, 20)
    both = (each @ relaxed).sum(1)
    torch.testing.assert_close(each.sum(1), joint_softmax(logits, reach), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(table(router(x, tokens), 9, E)[:, :E], both / both.sum(1, keepdim=True), rtol=1e-10, atol=1e-15)


def test_weight_that_an_unfinished_relaxation_loses_is_found_again():
    log = torch.tensor([[0.0, -1e6, -1e6], [-1e6, 0.0, -2e6], [-3e4, -4e4, -2e4]], dtype=torch.float64)  # no mass in the last row
    weight = torch.tensor([[0.0, 0, 1], [0.5, 0.2, 0.3], [0, 0, 0]], dtype=torch.float64).requires_grad_()
    mixed = mix(weight, log.requires_grad_())
    expected = torch.tensor([[0, 0, 1], [5 / 7, 2 / 7, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(mixed.square().sum(), [weight, log]):
        assert gradient.isfinite().all()


@every
def test_the_coldest_relaxation_stays_finite(inner):
    router = build({"name": "local_search", "router": INNER[inner], "steps": 5}, D, E)
    for step in (0, 4):
        x, tokens = make_tokens(13, step=step)
        routing = router(x.float(), tokens)
        (routing.weight.square().sum() + routing.loss).backward()
        assert all(p.grad.isfinite().all() for p in router.parameters())
        torch.testing.assert_close(table(routing, 13, E).sum(1), table(router.router(x.float(), tokens), 13, E).sum(1))


@every
@pytest.mark.parametrize("training", [True, False])
def test_the_identity_leaves_every_bit_of_the_wrapped_router(inner, training):
    router = make(inner, steps=3).train(training)
    x, tokens = make_tokens(13, step=3, padded=2)
    a, b = router(x, tokens), router.router(x, tokens)
    assert torch.equal(a.expert, b.expert)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.loss, b.loss)
    assert a.fan_out == b.fan_out
    assert a.stats.keys() == b.stats.keys()
    assert all(torch.equal(a.stats[key], b.stats[key]) for key in a.stats)


@every
def test_a_permutation_and_its_inverse_on_the_experts_leave_the_output(inner):
    router = make(inner, steps=0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    router.permutation.copy_(order)
    layers = [MoELayer(D, experts=E, d_expert=4, router=r).double() for r in (router.router, router)]
    with torch.no_grad():
        for name, weight in layers[1].experts.named_parameters():
            weight[order] = layers[0].experts.get_parameter(name)
    x, tokens = make_tokens(13, padded=2)
    (plain, report), (renamed, other) = (layer(x, tokens) for layer in layers)
    torch.testing.assert_close(renamed, plain, rtol=1e-12, atol=1e-14)
    assert torch.equal(other.load[order], report.load)
    if "probability" in report.stats:
        assert torch.equal(other.stats["probability"][order], report.stats["probability"])


@every
def test_an_applied_step_takes_the_hungarian_permutation_of_its_relaxation(inner):
    router = make(inner, steps=5)
    x, tokens = make_tokens(13, step=1)
    routing = router(x, tokens)
    assert router.permutation.tolist() == list(range(E))
    router.update(routing.load(E), 13)
    relaxed = defined_relaxation(router.log_weights, router.temperature(1), router.iterations(1))
    assert router.permutation.tolist() == best_permutation(relaxed) != list(range(E))

    learned = router.permutation.clone()
    hard = router.eval()(x, tokens)  # in evaluation also during the phase
    plain = router.router(x, tokens)
    real = plain.expert < E
    assert torch.equal(hard.expert[real], learned[plain.expert[real]])
    with torch.no_grad():
        router.log_weights.copy_(torch.randn(E, E))
    after = router.train()(x, tokens._replace(step=5))  # after it the permutation stays
    router.update(after.load(E), 13)
    assert torch.equal(router.permutation, learned)
    (gradient,) = torch.autograd.grad(after.weight.sum() + after.loss, router.log_weights, allow_unused=False)
    assert (gradient == 0).all()


def test_a_step_that_was_not_applied_leaves_no_permutation_behind():
    router = make("hash", steps=2)
    x, tokens = make_tokens(11, step=1)
    router(x, tokens)
    routing = router(x, tokens._replace(step=2))
    router.update(routing.load(E), 11)
    assert router.permutation.tolist() == list(range(E))


def test_buffers_that_were_only_allocated_get_their_first_values():
    router = make("hash")
    table_of_ids = router.router.table.clone()
    for buffer in router.buffers():
        buffer.fill_(-1)
    router.reset_buffers()
    assert router.permutation.tolist() == list(range(E))
    assert torch.equal(router.router.table, table_of_ids)


def test_ranks_that_differ_in_a_last_bit_keep_the_same_permutation():
    """The relaxation of all ranks together decides."""
    router = make("hash", steps=5)
    x, tokens = make_tokens(11)
    routing = router(x, tokens)
    others = torch.eye(E, dtype=torch.float64).roll(2, 0)
    router.total = lambda own: own + 9 * others
    router.update(routing.load(E), 11)
    assert router.permutation.tolist() == others.argmax(1).tolist()


def test_what_the_wrapped_router_learns_from_loads_arrives_in_its_own_order():
    options = {"name": "top_k", "k": 2, "score": "sigmoid", "bias_rate": 0.1, "balance_loss": 0.3}
    router = build({"name": "local_search", "router": options, "steps": 3}, D, E).double()
    router.reset_buffers()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    load = torch.tensor([9, 1, 5, 5, 5, 5])
    x, tokens = make_tokens(15, step=2)
    router(x, tokens)
    router.update(load, 15)
    assert (router.router.bias == 0).all()  # the loads of a relaxed step are not its own
    router.permutation.copy_(order)
    routing = router(x, tokens._replace(step=3))
    router.update(load, 15)
    assert torch.equal(router.router.bias.sign(), torch.sign(5 - load[order]).float())

    router.window, router.window_complete = load, True
    router.window_stats = {**routing.stats, "tokens": torch.tensor(15)}
    loss = router(x, tokens._replace(step=3)).loss
    alone = router.router
    alone.window, alone.window_complete = load[order], True
    torch.testing.assert_close(loss, alone(x, tokens).loss, rtol=1e-13, atol=0)
    assert abs(loss - routing.loss) > 1e-6


def test_first_order_steps_find_a_better_order_of_experts():
    """A hash gate cannot learn; with local search it finds the experts whose values its tokens need."""
    router = build({"name": "local_search", "router": {"name": "hash", "vocab": E, "table": "random"}, "steps": 80}, D, E).double()
    router.temperature_start, router.temperature_end = 0.1, 0.02
    values = torch.randn(E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = torch.tensor([3, 0, 5, 1, 4, 2])
    x = torch.zeros(E, D, dtype=torch.float64)
    tokens = Tokens.of(x)._replace(id=torch.arange(E))
    target = values[goal[router.router.table[:, 0]]]
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for step in range(81):
        routing = router(x, tokens._replace(step=step))
        out = torch.zeros(E, dtype=torch.float64).index_add(0, routing.token, routing.weight * values[routing.expert])
        optimizer.zero_grad()
        ((out - target).square().sum() + routing.loss).backward()
        optimizer.step()
        router.update(routing.load(E), E)
    assert router.permutation.tolist() == goal.tolist()
    assert torch.equal(out, target)


def test_settings_resolve_the_wrapped_router_and_start_as_it_says():
    moe = Moe(experts=8, router={"name": "local_search", "router": {"name": "comet", "gamma": 5.0}})
    assert moe.router["router"] == {"name": "comet", "k": 2, "gamma": 5.0, "entropy_loss": 0.01}
    settings = Model(layers=2, d_model=64, heads=4, moe=moe)
    for name, bound in (("log_weights", 0.05), ("router.node", 0.05), ("router.leaf", 0.05)):
        value = initial_value(f"layers.0.moe.router.{name}", (2, 300), settings, seed=0)
        assert 0.9 * bound < value.abs().max() <= bound
    wrapped = Moe(experts=8, router={"name": "local_search", "router": "top_k"}).router["router"]
    assert wrapped == Moe(experts=8, router="top_k").router


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"router": "sinkhorn"}, "unknown router for local_search to wrap 'sinkhorn'; choose from comet, dselect_k, top_k, hash"),
        ({"router": "comett"}, "did you mean comet"),
        ({"router": {"name": "top_k", "k": 9}}, r"^the router that local_search wraps: .*router\.k from 1 to 6"),
        ({"steps": -1}, "steps of at least 0"),
        ({"temperature_end": 0.0}, "above 0 and no higher"),
        ({"temperature_start": 1e-9}, "temperature cannot fall"),
        ({"iterations_start": 0}, "iterations_start of at least 1"),
        ({"entropy_loss": -1.0}, "entropy_loss of at least 0"),
    ],
)
def test_bad_settings_say_what_to_type(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "local_search", **options}, D, E)
    assert "\n" not in str(caught.value)


def test_without_scipy_a_permutation_is_refused_before_training_and_a_learned_one_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"router\.steps=0"):
        build("local_search", D, E)
    build({"name": "local_search", "steps": 0}, D, E)
