from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe import MoELayer
from moe.kernels.reference import ACTIVATIONS
from moe.routers.base import Router, Routing, Tokens

D, E, FF = 12, 5, 7


class Given(Router):
    """Weights that a test gives, on every expert where they are not zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(D, E)
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, x: Tensor, tokens: Tokens) -> Routing:
        return Routing.dense(self.weight)


def layer(**options) -> MoELayer:
    torch.manual_seed(0)
    made = MoELayer(D, **({"experts": E, "d_expert": FF, "router": {"name": "top_k", "k": 2}} | options)).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def expert(made: MoELayer, e: int, x: Tensor) -> Tensor:
    act = ACTIVATIONS[made.experts.activation]
    up = made.experts.up[e]
    hidden = act(x @ up[0].T) * (x @ up[1].T) if len(up) == 2 else act(x @ up[0].T)
    return hidden @ made.experts.down[e].T


def definition(made: MoELayer, x: Tensor, weight: Tensor) -> Tensor:
    """y = sum over e of w[t, e] Expert_e(x)."""
    y = sum(weight[:, e, None] * expert(made, e, x) for e in range(E))
    if made.shared is not None:
        shared = made.shared(x)
        y = y + (shared if made.shared_gate is None else torch.sigmoid(x @ made.shared_gate.weight.T) * shared)
    return y


@pytest.mark.parametrize(
    "options",
    [{}, {"gated": False, "activation": "relu2"}, {"d_shared": 6}, {"d_shared": 6, "shared_gate": True}, {"backend": "reference"}],
    ids=str,
)
def test_output_and_gradients_equal_the_dense_definition(options):
    made, x = layer(**options), torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    logits = x @ made.router.weight.T
    chosen = logits.topk(2).indices
    weight = torch.zeros(23, E, dtype=torch.float64).scatter(1, chosen, logits.gather(1, chosen).softmax(-1))
    expected = definition(made, x, weight)
    inputs = (x, *made.parameters())
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    out, report = made(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert report.load.tolist() == (weight > 0).sum(0).tolist()
    for own, other in zip(torch.autograd.grad(out, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


def test_any_number_of_experts_a_token_equals_the_dense_definition():
    weight = torch.rand(23, E, dtype=torch.float64) * (torch.rand(23, E) < 0.5)
    made = layer(router=Given(weight))
    with torch.no_grad():
        made.router.weight.copy_(weight)
    x = torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    out, expected = made(x)[0], definition(made, x, made.router.weight)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    inputs = (x, made.experts.up, made.experts.down)
    own, wanted = (torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (out, expected))
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    (of_weight,) = torch.autograd.grad(out.square().sum(), made.router.weight)
    (all_weights,) = torch.autograd.grad(expected.square().sum(), made.router.weight)
    torch.testing.assert_close(of_weight, all_weights * (weight != 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d_shared", [0, 6])
def test_zero_tokens_keep_the_graph_and_give_zero_gradients(d_shared):
    made, x = layer(d_shared=d_shared), torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    out, report = made(x)
    (out.sum() + report.loss).backward()
    assert out.shape == (0, D)
    assert report.load.tolist() == [0] * E
    for name, p in made.named_parameters():
        assert p.grad is not None, name
        assert p.grad.count_nonzero() == 0, name


def test_an_expert_without_tokens_gets_a_zero_gradient():
    weight = torch.rand(9, E, dtype=torch.float64)
    weight[:, 2] = 0
    made = layer(router=Given(weight))
    with torch.no_grad():
        made.router.weight.copy_(weight)
    made(torch.randn(9, D, dtype=torch.float64))[0].sum().backward()
    assert made.experts.up.grad[2].count_nonzero() == made.experts.down.grad[2].count_nonzero() == 0
    assert made.experts.up.grad[1].count_nonzero() > 0


def test_padding_is_neither_routed_nor_counted():
    made, x = layer(), torch.randn(9, D, dtype=torch.float64)
    tokens = Tokens.of(x)._replace(valid=torch.arange(9) < 6)
    out, report = made(x, tokens)
    alone, of_alone = made(x[:6])
    torch.testing.assert_close(out[:6], alone, rtol=1e-12, atol=1e-12)
    assert out[6:].count_nonzero() == 0
    assert report.load.tolist() == of_alone.load.tolist()
    assert report.stats["tokens"] == 6
    torch.testing.assert_close(report.loss, of_alone.loss, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_layer_decides_in_float32():
    # two experts whose logits differ by less than bfloat16 resolves: the better one must still be found
    made = MoELayer(D, experts=2, d_expert=FF, router={"name": "top_k", "k": 1, "normalize": "none"}).bfloat16()
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[:, 0] = 1.0
        made.router.weight[1, 1] = 2**-9
    x = torch.zeros(4, D, dtype=torch.bfloat16)
    x[:, 0] = 8.0
    x[:2, 1], x[2:, 1] = 1.0, -1.0
    routing = made.router(x, Tokens.of(x))
    assert routing.expert.tolist() == [1, 1, 0, 0]
    assert routing.weight.dtype == torch.float32
    out, _ = made(x)
    assert out.dtype == torch.bfloat16


def test_a_fresh_layer_has_finite_small_weights():
    made = MoELayer(D, experts=E, d_expert=FF)
    assert all(0 < p.abs().max() < 2 for p in made.parameters())
    assert F.mse_loss(made(torch.randn(6, D))[0], torch.zeros(6, D)) < 1


def test_the_layer_needs_torch_and_nothing_else():
    code = (
        "import sys\n"
        "for name in ('pydantic', 'jaxtyping', 'yaml', 'rich', 'typer', 'triton'): sys.modules[name] = None\n"
        "import torch; from moe import MoELayer\n"
        "print(MoELayer(8, experts=4, d_expert=8, router={'name': 'top_k', 'k': 2})(torch.randn(3, 8))[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "[3, 8]" in done.stdout, done.stderr
