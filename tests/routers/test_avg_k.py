"""AvgK against the paper's words in float64: a block's score is the mean of its keys' products, and nothing else decides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.model.cost import cost
from moe.model.moe_layer import MoELayer
from moe.routers import Tokens, build
from tests.model import small

D, E, WIDTH = 12, 6, 8


def layer(k: int, *, experts: int = E, width: int = WIDTH, gated: bool = False, activation: str = "relu") -> MoELayer:
    torch.manual_seed(0)
    made = MoELayer(D, experts=experts, d_expert=width, router={"name": "avg_k", "k": k}, gated=gated, activation=activation)
    for p in made.double().parameters():
        torch.nn.init.normal_(p)
    return made


def tokens_of(t: int) -> torch.Tensor:
    torch.manual_seed(t)
    return torch.randn(t, D, dtype=torch.float64)


def scores(made: MoELayer, x: torch.Tensor) -> torch.Tensor:
    return x @ made.router.summary(made.experts.up, made.experts.down).T


@pytest.mark.parametrize("gated", [False, True])
def test_a_score_is_the_mean_pre_activation_of_an_experts_units(gated):
    made, x = layer(2, gated=gated), tokens_of(9)
    units = torch.einsum("td,efd->tef", x, made.experts.up[:, 0])
    torch.testing.assert_close(scores(made, x), units.mean(-1), rtol=1e-12, atol=1e-14)
    routing = made.route(x, Tokens.of(x))
    assert torch.equal(routing.expert.view(9, 2), units.mean(-1).topk(2).indices)
    assert (routing.weight == 1).all()
    shuffled = made.experts.up[:, :, torch.randperm(WIDTH)]
    torch.testing.assert_close(made.router.summary(shuffled, made.experts.down), made.router.summary(made.experts.up, made.experts.down))


def test_all_blocks_are_the_dense_network():
    made, x = layer(E), tokens_of(9)
    dense = F.relu(x @ made.experts.up.flatten(0, 2).T) @ made.experts.down.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(made(x)[0], dense, rtol=1e-12, atol=1e-12)


def test_a_block_split_into_two_copies_keeps_its_score():
    made, x = layer(2), tokens_of(9)
    up, down = made.experts.up.repeat_interleave(2, 0), made.experts.down.repeat_interleave(2, 0)
    torch.testing.assert_close(x @ made.router.summary(up, down).T, scores(made, x).repeat_interleave(2, 1))


def test_blocks_of_one_unit_are_the_top_k_activation():
    made, x = layer(5, experts=20, width=1), tokens_of(9)
    hidden = x @ made.experts.up.flatten(0, 2).T
    best = hidden.topk(5)
    assert (best.values > 0).all()
    kept = torch.zeros_like(hidden).scatter(1, best.indices, best.values)
    torch.testing.assert_close(made(x)[0], kept @ made.experts.down[:, :, 0], rtol=1e-12, atol=1e-12)


def test_the_router_has_no_parameter_and_the_model_is_as_large_as_its_dense_one():
    assert list(layer(2).router.parameters()) == []
    mixture = small.model({"experts": 4, "d_expert": 16, "router": {"name": "avg_k", "k": 2}})
    dense = small.model(dense=True, d_ff=64)
    assert cost(mixture, 12).parameters == cost(dense, 12).parameters


def test_keys_learn_in_the_experts_that_compute_and_nowhere_else():
    made, x = layer(2), tokens_of(3)
    out, report = made(x)
    (grad,) = torch.autograd.grad(out.square().sum(), made.experts.up)
    idle = report.load == 0
    assert idle.any()
    assert (grad[idle] == 0).all()
    assert (grad[~idle].flatten(1).norm(dim=1) > 0).all()


def test_keys_in_bfloat16_are_averaged_in_float32():
    up = torch.full((1, 1, 4096, 2), 1 + 2.0**-7, dtype=torch.bfloat16)
    summary = build("avg_k", 2, 2).summary(up, torch.zeros(1, 2, 4096, dtype=torch.bfloat16))
    assert summary.dtype == torch.float32
    assert (summary == 1 + 2.0**-7).all()


@pytest.mark.parametrize("k", [0, 7])
def test_more_experts_than_there_are_cannot_be_chosen(k):
    with pytest.raises(ConfigError, match=f"k={k} of {E} experts; choose router.k from 1 to {E}"):
        layer(k)
