"""Sigma against the paper's words in float64: sigmoid gates, the entropy of the mean, expert dropout, first values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.model.initialise import initial_value
from moe.model.moe_layer import MoELayer
from moe.routers import Tokens, build, noise
from tests.model import small

D, E = 12, 8
GOLDEN = [[2.0, 0, 0, 0], [0, 1, 0, 0]]


def make(experts: int = E, d: int = D, **options):
    torch.manual_seed(0)
    return build({"name": "sigma", **options}, d, experts).double()


def inputs(t: int, d: int = D) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    x = 3 * torch.randn(t, d, dtype=torch.float64)
    return x, Tokens.of(x)._replace(index=torch.arange(t) + 17, step=5)


def weights(routing, t: int, experts: int = E) -> torch.Tensor:
    out = torch.zeros(t, experts + 1, dtype=routing.weight.dtype)
    return out.index_put((routing.token, routing.expert), routing.weight, accumulate=True)[:, :-1]


@pytest.mark.parametrize("k", [1, 3, E])
def test_the_best_experts_count_with_the_sigmoid_of_their_logits(k):
    router, (x, tokens) = make(k=k, expert_dropout=0.0), inputs(20)
    logits = x @ router.weight.T
    chosen = logits.topk(k).indices
    expected = torch.zeros(20, E, dtype=torch.float64).scatter(1, chosen, 1 / (1 + (-logits.gather(1, chosen)).exp()))
    got = weights(router(x, tokens), 20)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    upstream = torch.randn_like(got)
    own, wanted = (torch.autograd.grad(w, router.weight, upstream, retain_graph=True)[0] for w in (got, expected))
    torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-13)


def test_experts_nobody_chose_get_no_gradient_but_the_regularisers():
    router, (x, tokens) = make(k=1, expert_dropout=0.0), inputs(3)
    routing = router(x, tokens)
    idle = routing.load(E) == 0
    of_weights, of_loss = (torch.autograd.grad(y, router.weight, retain_graph=True)[0] for y in (routing.weight.sum(), routing.loss))
    assert idle.any()
    assert (of_weights[idle] == 0).all()
    assert (of_loss.abs().sum(1) > 0).all()


def golden(entropy_loss: float = 1.0):
    router = make(4, 4, entropy_loss=entropy_loss)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor(GOLDEN, dtype=torch.float64)
    return router, x


def test_the_regulariser_has_its_golden_value():
    router, x = golden()
    routing = router(x, Tokens.of(x))
    mean = torch.tensor([0.44305615, 0.28581101, 0.13556642, 0.13556642], dtype=torch.float64)
    torch.testing.assert_close(routing.stats["probability"] / 2, mean, rtol=0, atol=1e-8)
    assert routing.loss.item() / 2 == pytest.approx(-1.2604335, abs=1e-7)


def test_the_regulariser_and_its_gradient_are_the_definition():
    router, (x, tokens) = make(entropy_loss=0.3), inputs(20)
    tokens = tokens._replace(valid=torch.arange(20) != 7)
    p = torch.cat([(x @ router.weight.T).softmax(-1)[:7], (x @ router.weight.T).softmax(-1)[8:]]).mean(0)
    expected = 19 * 0.3 * (p * p.log()).sum()
    loss = router(x, tokens).loss
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    own, wanted = (torch.autograd.grad(y, router.weight)[0] for y in (loss, expected))
    torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-14)


def test_the_regulariser_is_least_at_balance_where_its_gradient_is_zero():
    router = make(entropy_loss=1.0)
    x = torch.zeros(5, D, dtype=torch.float64)
    assert router(x, Tokens.of(x)).loss.item() == pytest.approx(-5 * math.log(E), rel=1e-14)
    for t in (3, 50):
        x, tokens = inputs(t)
        assert router(x, tokens).loss > -t * math.log(E)


def test_the_regularisers_gradient_over_a_tokens_logits_sums_to_zero():
    router, x = golden()
    logits = x.clone().requires_grad_()  # the router is the identity here
    (grad,) = torch.autograd.grad(router(logits, Tokens.of(x)).loss, logits)
    assert grad.abs().max() > 0.1
    torch.testing.assert_close(grad.sum(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_running_window_adds_what_it_saw_to_the_mean():
    router, (x, tokens) = make(entropy_loss=1.0), inputs(20)
    whole = router(x, tokens).stats["probability"]
    first = router(x[:12], Tokens(*(v[:12] for v in tokens[:4]), tokens.step))
    router.window, router.window_stats = first.load(E), {**first.stats, "tokens": torch.tensor(12)}
    second = router(x[12:], Tokens(*(v[12:] for v in tokens[:4]), tokens.step))
    torch.testing.assert_close(second.loss, (second.stats["probability"] * (whole / 20).log()).sum(), rtol=1e-12, atol=0)


def test_a_dropped_expert_is_never_chosen_and_the_next_best_takes_its_place():
    router, (x, tokens) = make(k=3, expert_dropout=0.5), inputs(200)
    dropped = noise.uniform(router.stream, tokens.step, tokens.index, E) < 0.5
    assert 0.4 < dropped.double().mean() < 0.6
    logits = (x @ router.weight.T).masked_fill(dropped, -torch.inf)
    ranked = logits.sort(descending=True).indices[:, :3]
    scores = torch.where(logits.gather(1, ranked).isinf(), 0, logits.gather(1, ranked).sigmoid())
    got = weights(router(x, tokens), 200)
    torch.testing.assert_close(got, torch.zeros_like(got).scatter(1, ranked, scores), rtol=1e-13, atol=0)


def test_a_token_left_with_fewer_than_k_experts_drops_the_rest():
    router, (x, tokens) = make(k=6, expert_dropout=0.7), inputs(100)
    alive = (noise.uniform(router.stream, tokens.step, tokens.index, E) >= 0.7).sum(1)
    routing = router(x, tokens)
    kept = (routing.expert < E).view(100, 6)
    assert (alive < 6).any()
    assert torch.equal(kept.sum(1), alive.clamp(max=6))
    assert (routing.weight.view(100, 6)[~kept] == 0).all()
    assert (routing.load(E) <= 100).all()
    assert routing.weight.isfinite().all()


def test_evaluation_drops_nothing_and_without_dropout_training_is_evaluation():
    x, tokens = inputs(30)
    with_dropout, without = make(k=2, expert_dropout=0.5), make(k=2, expert_dropout=0.0)
    reference = weights(without(x, tokens), 30)
    assert torch.equal(weights(without.eval()(x, tokens), 30), reference)
    assert torch.equal(weights(with_dropout.eval()(x, tokens), 30), reference)
    assert not torch.equal(weights(with_dropout.train()(x, tokens), 30), reference)


def test_all_experts_with_open_gates_are_one_wide_dense_network():
    layer = MoELayer(D, experts=5, d_expert=7, router=make(5, k=5, expert_dropout=0.0), activation="relu", gated=False).double()
    x, _ = inputs(9)
    x[:, 0] = 1  # what the gates open by
    with torch.no_grad():
        layer.router.weight.zero_()[:, 0] = 50
    wide = F.relu(x @ layer.experts.up.flatten(0, 2).T) @ layer.experts.down.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(layer(x)[0], wide, rtol=1e-12, atol=1e-14)


def test_first_values_are_those_of_one_wide_network_with_rows_of_equal_length():
    d, experts, width, layers = 64, 16, 32, 3
    settings = small.settings({"experts": experts, "d_expert": width, "router": "sigma"}, d_model=d, layers=layers)

    def value(name: str, *shape: int) -> torch.Tensor:
        return initial_value(f"layers.1.moe.{name}", shape, settings, 0)

    router = value("router.weight", experts, d)
    torch.testing.assert_close(router.norm(dim=1), router.norm(dim=1).mean().expand(experts), rtol=1e-5, atol=0)
    assert router.square().mean().sqrt().item() == pytest.approx(math.sqrt(2 / (d * layers)), rel=1e-5)
    assert value("experts.up", experts, 2, width, d).std().item() == pytest.approx(math.sqrt(2 / (d * layers)), rel=0.02)
    down = value("experts.down", experts, d, width)
    assert down.std().item() == pytest.approx(math.sqrt(2 / (experts * width * layers)), rel=0.02)
    assert not torch.equal(down[0], down[1])
    assert value("shared.down.weight", d, 32).std() < 0.2  # everything else keeps the model's rule
    plain = small.settings({"experts": experts, "router": {"name": "sigma", "init": "model"}}, init_std=0.02)
    assert initial_value("layers.0.moe.router.weight", (experts, d), plain, 0).std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 9}, "k=9 of 8"),
        ({"k": 0}, "k=0"),
        ({"entropy_loss": -1.0}, "entropy_loss=-1.0"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        make(**options)
