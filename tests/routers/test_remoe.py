"""ReMoE: continuous gates, a penalty of the stated form, and a controller that moves by one exact factor a step."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe.errors import ConfigError
from moe.model.moe_layer import MoELayer
from moe.routers import Tokens, build
from tests.routers.test_contract import table

D, E = 8, 6


def make(**options):
    router = build({"name": "remoe", **options}, D, E).double()
    torch.nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return router


def make_tokens(t: int, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(valid=torch.arange(t) >= padded)


def test_gates_are_the_positive_logits():
    router = make()
    x, tokens = make_tokens(30, padded=4)
    routing = router(x, tokens)
    expected = (x @ router.weight.T).clamp(min=0)
    expected[:4] = 0
    torch.testing.assert_close(table(routing, 30, E)[:, :E], expected, rtol=1e-13, atol=0)
    assert (routing.weight > 0).all()
    assert routing.load(E).tolist() == routing.stats["demand"].tolist() == (expected > 0).sum(0).tolist()


def test_penalty_is_the_definition():
    """lambda E / (k T^2) sum_i (sum_t g[t, i]) (tokens of i), a mean over T valid tokens, of which the router returns T times as much."""
    router = make(k=2, penalty=0.25)
    x, tokens = make_tokens(30, padded=4)
    gates = (x[4:] @ router.weight.T).clamp(min=0)
    expected = 0.25 * E / (2 * 26**2) * (gates.sum(0) * (gates > 0).sum(0)).sum()
    loss = router(x, tokens).loss
    torch.testing.assert_close(loss / 26, expected, rtol=1e-12, atol=0)
    wanted, found = (torch.autograd.grad(value, router.weight)[0] for value in (26 * expected, loss))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_step_moves_the_penalty_by_exactly_one_factor():
    router = make(k=2)
    start = torch.tensor(1e-8)  # float32
    assert torch.equal(router.penalty, start)
    load = torch.tensor([7, 6, 5, 4, 3, 2])  # 27 assignments
    router.update(load, 13)  # more than 2 a token
    assert torch.equal(router.penalty, start * 1.2)
    router.update(load, 14)
    assert torch.equal(router.penalty, start * 1.2 / 1.2)
    before = router.penalty.clone()
    router.update(load + torch.tensor([1, 0, 0, 0, 0, 0]), 14)  # at the aim: as the released code does, down
    assert torch.equal(router.penalty, before / 1.2)
    router.update(load, 0)
    assert torch.equal(router.penalty, before / 1.2)


def test_forward_leaves_the_penalty_to_update():
    router = make(penalty=0.5)
    x, tokens = make_tokens(30)
    router(x, tokens)
    router.eval()(x, tokens)
    assert router.penalty == 0.5


def test_the_penalty_can_always_come_back():
    for first, load in ((1e-37, 0), (3e38, 100)):
        router = make(k=1, penalty=first)
        for _ in range(50):
            router.update(torch.full((E,), load), 10)
        assert 0 < router.penalty < torch.inf
        for _ in range(50):
            router.update(torch.full((E,), 100 - load), 10)
        assert 1e-35 < router.penalty < 1e37


def test_no_penalty_stays_none():
    router = make(penalty=0.0)
    router.update(torch.full((E,), 100), 10)
    assert router.penalty == 0


def test_the_penalty_stays_float32_in_any_model_and_is_in_the_state():
    for dtype in (torch.bfloat16, torch.float64):
        router = build({"name": "remoe", "penalty": 1e-6}, D, E).to(dtype)
        assert router.penalty.dtype == torch.float32
        assert torch.equal(router.state_dict()["penalty"], torch.tensor(1e-6))
    empty = build("remoe", D, E).to("meta").to_empty(device="cpu")
    empty.reset_buffers()
    assert torch.equal(empty.penalty, torch.tensor(1e-8))


def test_the_controller_finds_the_sparsity_that_was_asked_for():
    torch.manual_seed(0)
    router = build({"name": "remoe", "k": 1, "penalty": 0.05, "penalty_rate": 1.05}, D, E).double()
    x, tokens = make_tokens(400)
    x[:, 0] = 3.0  # with inputs around zero a linear gate is open half of the time, whatever the penalty
    target = torch.rand(D, E, dtype=torch.float64)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    seen = []
    for _ in range(250):
        routing = router(x, tokens)
        gates = table(routing, 400, E)[:, :E]
        optimizer.zero_grad()
        ((gates - x @ target).square().sum(1).mean() + routing.loss / 400).backward()
        optimizer.step()
        router.update(routing.load(E), 400)
        seen.append(routing.load(E).sum().item() / 400)
    assert max(seen[:50]) > 5
    assert sum(seen[-60:]) / 60 == pytest.approx(1, abs=0.15)


def jump(router, around: torch.Tensor, along: torch.Tensor) -> float:
    """Largest change of a layer's output over a hair's breadth where its routing changes, on a line of inputs."""
    torch.manual_seed(1)
    layer = MoELayer(D, experts=E, d_expert=5, router=router).double().eval()
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight, std=0.5)

    def chosen(at: float) -> list[bool]:
        x = (around + at * along)[None]
        return (table(layer.router(x, Tokens.of(x)), 1, E)[0, :E] != 0).tolist()

    grid, jumps = torch.linspace(-2, 2, 41).tolist(), []
    for low, high in itertools.pairwise(grid):
        if chosen(low) == chosen(high):
            continue
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if chosen(middle) == chosen(low) else (low, middle)
        a, b = (layer((around + at * along)[None])[0] for at in (low, high))
        jumps.append((a - b).abs().max().item())
    assert len(jumps) >= 3, "no expert switches on this line"
    return max(jumps)


def test_the_output_is_continuous_where_an_expert_switches_and_that_of_top_k_is_not():
    x, _ = make_tokens(2)
    top_k = build({"name": "top_k", "k": 2}, D, E).double()
    torch.nn.init.normal_(top_k.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    assert jump(make(), x[0], x[1]) < 1e-7
    assert jump(top_k, x[0], x[1]) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k=0 of 6"), ({"k": 7}, "k=7 of 6"), ({"penalty": -1.0}, "penalty=-1.0"), ({"penalty_rate": 1.0}, "penalty_rate=1.0")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
