"""What every router promises inside a layer of experts; parametrised over the table and the examples of `test_contract`."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from moe.errors import ConfigError
from moe.model.moe_layer import MoELayer
from moe.routers import ROUTERS, Router, Routing, Tokens, noise
from moe.tables import entry
from tests.routers.test_contract import SPARSE, D, every, make, make_tokens, table

# Rows that know experts by more than rows of parameters and buffers, and how: they cannot be relabelled.
LABELLED: dict[str, str] = {
    "hash": "its table names experts by their numbers",
    "comet": "its trees have leaves of different depth and different parents",
    "dselect_k": "its bits spell experts' numbers",
    "local_search": "its permutation names experts by their numbers",
}


@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_and_all_experts(name):
    x, tokens = make_tokens(9)
    for experts in (1, 7):
        has_k = "k" in inspect.signature(entry(ROUTERS, name, "router")).parameters
        try:
            router = make(name, {"k": experts} if has_k else {}, experts).eval()
            router.set_vocabulary(11)
        except ConfigError:
            continue  # refused, in a sentence of its own
        routing = router(x, tokens)
        assert routing.weight.isfinite().all()
        if name not in SPARSE and (has_k or experts == 1):
            assert torch.equal(routing.load(experts), torch.full((experts,), 9))


@every
def test_relabelled_experts_compute_the_same(name, options, monkeypatch):
    if name in LABELLED:
        pytest.skip(LABELLED[name])
    layer, relabelled = make_layer(name, options), make_layer(name, options)
    order = torch.arange(6).roll(3)  # moves whole groups
    relabel(relabelled, order)
    x, tokens = make_tokens(20)
    routing, (out, report) = layer.route(x, tokens), layer(x, tokens)
    uniform = noise.uniform

    def moved(stream, step, index, columns):
        draw = uniform(stream, step, index, columns)
        return draw[:, order] if columns == 6 else draw

    monkeypatch.setattr(noise, "uniform", moved)  # what an expert draws moves with it
    other, (other_out, other_report) = relabelled.route(x, tokens), relabelled(x, tokens)
    torch.testing.assert_close(table(other, 20, 6)[:, :6], table(routing, 20, 6)[:, order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_report.loss, report.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_out, out, rtol=1e-11, atol=1e-13)


@torch.no_grad()
def relabel(module: torch.nn.Module, order: torch.Tensor) -> None:
    for tensor in module.state_dict().values():
        for dim in [i for i, size in enumerate(tensor.shape) if size == 6]:
            tensor.copy_(tensor.index_select(dim, order))


def make_layer(name: str, options: dict) -> MoELayer:
    layer = MoELayer(D, experts=6, d_expert=8, router=make(name, options)).double()
    generator = torch.Generator().manual_seed(2)
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return layer


@every
def test_a_layer_computes_the_dense_definition(name, options):
    """y = sum over e of w[t, e] Expert_e(x), output and every gradient, drops and padding included."""
    layer = make_layer(name, options)
    x, tokens = make_tokens(13, padded=2)
    x.requires_grad_()
    routing = layer.route(x, tokens)
    weight = table(routing, 13, 6)
    up, down = layer.experts.up, layer.experts.down
    rows = [weight[:, e, None] * ((F.silu(x @ up[e, 0].T) * (x @ up[e, 1].T)) @ down[e].T) for e in range(6)]
    if routing.gradient_scale is not None:
        scale = table(routing._replace(weight=routing.gradient_scale), 13, 6)
        rows = [scale[:, e, None] * row + (row - scale[:, e, None] * row).detach() for e, row in enumerate(rows)]
    expected = sum(rows)
    out, report = layer(x, tokens)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(report.load, routing.load(6))
    inputs, upstream = [x, *layer.parameters()], torch.randn_like(out)
    wanted = torch.autograd.grad((expected * upstream).sum() + routing.loss, inputs, materialize_grads=True)
    got = torch.autograd.grad((out * upstream).sum() + report.loss, inputs, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


class Twice(Router):
    """A router that breaks its word and names expert 1 twice for every token."""

    def forward(self, x: torch.Tensor, tokens: Tokens) -> Routing:
        return Routing.per_token(torch.ones(len(x), 2, dtype=torch.int64), torch.tensor([0.25, 0.5], dtype=x.dtype).expand(len(x), 2))


def test_an_expert_named_twice_counts_with_both_weights():
    layer = make_layer("top_k", {})
    layer.router = Twice(D, 6)
    x, _ = make_tokens(5)
    up, down = layer.experts.up[1], layer.experts.down[1]
    torch.testing.assert_close(layer(x)[0], 0.75 * (F.silu(x @ up[0].T) * (x @ up[1].T)) @ down.T, rtol=1e-12, atol=1e-13)
