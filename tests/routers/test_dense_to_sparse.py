"""The dense-to-sparse gate: its schedule, what it keeps at each temperature, its loss, and its statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from moe.errors import ConfigError
from moe.routers import Tokens, build, noise
from tests.routers.test_contract import table

D, E = 8, 6


def make(experts: int = E, **options):
    router = build({"name": "dense_to_sparse", **options}, D, experts).double()
    torch.nn.init.normal_(router.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    router.stream = 5
    return router


def make_tokens(t: int, step: int = 0, padded: int = 0) -> tuple[torch.Tensor, Tokens]:
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return x, Tokens.of(x)._replace(step=step, valid=torch.arange(t) >= padded)


def weights(router, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    return table(router(x, tokens), len(x), router.num_experts)[:, : router.num_experts]


def sample(router, x: torch.Tensor, tokens: Tokens, temperature: float) -> torch.Tensor:
    drawn = noise.gumbel(router.stream, tokens.step, tokens.index, router.num_experts)
    return ((x @ router.weight.T + drawn) / temperature).softmax(-1)


@pytest.mark.parametrize("decay", ["linear", "exponential"])
def test_temperature_falls_as_the_schedule_says_and_never_rises(decay):
    router = make(temperature_start=2.0, temperature_end=0.3, decay=decay, decay_steps=40, dense_steps=10)
    found = [router.temperature(step) for step in range(80)]
    for step, temperature in enumerate(found):
        n = max(step - 10, 0)
        linear, exponential = 2.0 - n * (2.0 - 0.3) / 40, 2.0 * math.exp(n * math.log(0.3 / 2.0) / 40)
        assert temperature == pytest.approx(max(linear if decay == "linear" else exponential, 0.3), rel=1e-12)
    assert found[0] == found[10] == 2.0
    assert found[50] == found[79] == pytest.approx(0.3, rel=1e-15)
    assert all(a >= b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("counted", ["sample", "softmax"])
def test_kept_are_the_shares_above_the_threshold_and_their_gradient_is_that_of_what_counts(counted):
    router = make(temperature_start=0.8, temperature_end=0.4, decay_steps=10, threshold=0.05, weight=counted)
    x, tokens = make_tokens(40, step=5, padded=3)
    share = sample(router, x, tokens, 0.6)
    expected = torch.where(share > 0.05, share if counted == "sample" else (x @ router.weight.T).softmax(-1), 0)
    expected = torch.where(tokens.valid[:, None], expected, 0)
    found = weights(router, x, tokens)
    assert ((found != 0).sum(1)[3:] > 0).all()
    assert (found[3:] == 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pull = torch.randn_like(found)
    a, b = (torch.autograd.grad((value * pull).sum(), router.weight)[0] for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_a_high_temperature_is_uniform_and_a_low_one_is_one_hot():
    x, tokens = make_tokens(40)
    hot = weights(make(temperature_start=1e7, temperature_end=1.0), x, tokens)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / E), rtol=1e-5, atol=0)
    router = make(temperature_start=1e-7, temperature_end=1e-7)
    best = sample(router, x, tokens, 1.0).argmax(-1)
    assert torch.equal(weights(router, x, tokens), torch.nn.functional.one_hot(best, E).double())


def test_fewer_experts_are_kept_as_the_temperature_falls_and_all_without_a_threshold():
    router = make(temperature_start=2.0, temperature_end=0.1, decay_steps=10, threshold=0.05)
    x, _ = make_tokens(400)
    kept = [router(x, Tokens.of(x)._replace(step=step)).load(E).sum().item() / 400 for step in (0, 3, 6, 10)]
    assert all(a > b + 0.1 for a, b in itertools.pairwise(kept))
    assert make(threshold=0.0)(*make_tokens(400)).load(E).sum() == 400 * E


def test_the_best_of_the_sample_follows_the_softmax():
    router = make(selection="best", weight="softmax")
    row = make_tokens(1)[0]
    x = row.expand(20000, D)
    routing = router(x, Tokens.of(x))
    p = (row @ router.weight.T).softmax(-1)[0].detach()
    assert routing.fan_out == 1
    assert stats.chisquare(routing.load(E).numpy(), (20000 * p).numpy()).pvalue > 1e-4
    torch.testing.assert_close(routing.weight.detach(), p[routing.expert], rtol=1e-12, atol=0)


def test_dense_steps_use_every_expert_with_the_plain_softmax_and_no_loss():
    router = make(dense_steps=10, threshold=0.1)
    x, tokens = make_tokens(30, step=9, padded=3)
    routing = router(x, tokens)
    plain = (x @ router.weight.T).softmax(-1) * tokens.valid[:, None]
    torch.testing.assert_close(table(routing, 30, E)[:, :E], plain, rtol=1e-12, atol=0)
    assert routing.loss == 0
    assert router(x, tokens._replace(step=10)).loss != 0


def test_after_the_switch_training_is_top_1_and_so_is_evaluation():
    router = make(top_1_step=10)
    x, tokens = make_tokens(30, step=10)
    top_k = build({"name": "top_k", "k": 1, "normalize": "none"}, D, E).double()
    top_k.load_state_dict({"weight": router.weight})
    assert router(x, tokens._replace(step=9)).fan_out is None
    trained, switch = router(x, tokens), top_k(x, tokens)
    evaluated = router.eval()(x, tokens._replace(step=0))
    for routing in (trained, evaluated):
        assert torch.equal(routing.expert, switch.expert)
        torch.testing.assert_close(routing.weight, switch.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(trained.loss, switch.loss, rtol=1e-12, atol=0)


def test_evaluation_may_be_dense_and_knows_no_step():
    router = make(evaluation="dense").eval()
    x, tokens = make_tokens(30)
    torch.testing.assert_close(weights(router, x, tokens), (x @ router.weight.T).softmax(-1), rtol=1e-12, atol=0)
    cooled = make(noise="none", temperature_start=2.0, temperature_end=0.3, evaluation="dense").eval()
    torch.testing.assert_close(weights(cooled, x, tokens), (x @ router.weight.T / 0.3).softmax(-1), rtol=1e-12, atol=0)


def test_balance_loss_is_the_product_of_mean_weights_and_kept_shares():
    router = make(threshold=0.1, balance_loss=0.3)
    x, tokens = make_tokens(30, padded=4)
    routing = router(x, tokens)
    found = table(routing, 30, E)[4:, :E]
    mean_over_experts = (found.mean(0) * (found != 0).double().mean(0)).mean()
    torch.testing.assert_close(routing.loss / 26, 0.3 * E**2 * mean_over_experts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu"])
def test_the_activation_gate_is_its_formula(activation):
    router = make(activation=activation, noise="none", temperature_start=0.7, temperature_end=0.2, threshold=0.0, decay_steps=10)
    torch.nn.init.normal_(router.bias)
    x, tokens = make_tokens(30)
    act = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}[activation]
    expected = ((act(x @ router.weight.T) + router.bias) / 0.7).softmax(-1)
    torch.testing.assert_close(weights(router, x, tokens), expected, rtol=1e-12, atol=0)


def test_temperature_and_slopes_cannot_be_told_apart_unless_there_is_an_activation():
    """u = exp(score / tau) N(y): for a linear score tau du/dtau = -b1 . du/db1 (Nguyen et al., 2024)."""

    def gap(activation) -> float:
        slope, tau, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.4, -0.9, 0.3], 0.6, 0.2))
        x = torch.tensor([1.1, 0.5, -0.7], dtype=torch.float64)
        u = torch.exp(activation(slope @ x) / tau) * torch.exp(-(y**2) / 2)
        by_slope, by_tau = torch.autograd.grad(u, (slope, tau))
        return ((by_tau + slope @ by_slope / tau).abs() / by_tau.abs()).item()

    assert gap(lambda score: score) < 1e-14
    assert gap(torch.sigmoid) > 1e-2
    assert gap(torch.tanh) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_end": 0.0}, "from 1.0 to 0.0"),
        ({"temperature_start": 0.1}, "from 0.1 to 0.5"),
        ({"decay_steps": 0}, "decay_steps=0"),
        ({"dense_steps": -1}, "dense_steps=-1"),
        ({"dense_steps": 5, "top_1_step": 4}, "top_1_step=4"),
        ({"threshold": 0.17}, "none of 6 experts"),
        ({"balance_loss": -1.0}, "balance_loss=-1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
