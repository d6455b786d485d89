"""NoisyTopK against the formulas of its two papers, one token at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from moe.errors import ConfigError
from moe.model.settings import Model
from moe.model.transformer import Transformer
from moe.routers import Tokens, build
from moe.routers.noise import normal

D, E = 12, 6


def make(**options):
    torch.manual_seed(0)
    router = build({"name": "noisy_top_k", **options}, D, E).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    router.stream = 5
    return router


def make_tokens(t: int = 20, padded: int = 3) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(t)
    x = torch.randn(t, D, dtype=torch.float64)
    return x, Tokens(torch.zeros(t, dtype=torch.int64), torch.arange(t) // 6, torch.arange(t) + 7, torch.arange(t) >= padded, 2)


def defined(router, x: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates, what importance sums, and chances of selection; [t, E] each, of all tokens."""
    gates, shares, chances = [], [], []
    draws = normal(router.stream, tokens.step, tokens.index, E).double()
    for row, n in zip(x, draws, strict=True):
        clean = router.weight @ row
        std = (1 + (router.noise_weight @ row).exp()).log() if router.noise == "learned" else torch.full_like(clean, 1 / E)
        noisy = clean + n * std
        ranked = sorted(range(E), key=lambda e: -noisy[e].item())
        kept = torch.tensor([e in ranked[: router.k] for e in range(E)])
        if router.noise == "learned":
            gate = torch.where(kept, noisy.exp(), 0) / noisy[kept].exp().sum()
            share = gate
            # Shazeer: the k-th best of the other experts is what an expert has to beat
            bar = torch.stack([torch.stack([noisy[o] for o in ranked if o != e])[router.k - 1] for e in range(E)])
        else:
            gate = torch.where(kept, noisy.exp() / noisy.exp().sum(), 0)
            share = clean.exp() / clean.exp().sum()
            bar = noisy[ranked[router.k - 1]].expand(E)
        gates.append(gate)
        shares.append(share)
        chances.append(0.5 * (1 + torch.erf((clean - bar) / std / math.sqrt(2))))
    return torch.stack(gates), torch.stack(shares), torch.stack(chances)


def cv2(values: torch.Tensor) -> torch.Tensor:
    mean = values.mean()
    return ((values - mean) ** 2).mean() / mean**2


FORMS = [{"noise": "learned", "k": 2}, {"noise": "learned", "k": 5}, {"noise": "fixed", "k": 1}, {"noise": "fixed", "k": 3}]


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_their_gradients_are_the_definition(form):
    router = make(**form)
    x, tokens = make_tokens(padded=0)
    routing = router(x, tokens)
    found = torch.zeros(20, E, dtype=torch.float64).index_put((routing.token, routing.expert), routing.weight)
    expected, _, _ = defined(router, x, tokens)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    pull, parameters = torch.randn(20, E, dtype=torch.float64), list(router.parameters())
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), parameters), torch.autograd.grad((expected * pull).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_their_gradients_are_the_definition(form, scope):
    router = make(**form, balance_scope=scope, importance_loss=0.3, load_loss=0.2)
    x, tokens = make_tokens()
    _, share, chance = defined(router, x, tokens)
    groups = [list(range(3, 20))] if scope != "sequence" else [[t for t in range(3, 20) if t // 6 == s] for s in range(4)]
    expected = sum(len(g) * (0.3 * cv2(share[g].sum(0)) + 0.2 * cv2(chance[g].sum(0))) for g in groups)
    loss = router(x, tokens).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(router.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_until_the_window_is_complete_a_call_sees_the_sums_so_far_and_its_own():
    router = make(load_loss=0.0, importance_loss=1.0)
    x, tokens = make_tokens()
    own = router(x, tokens).stats["importance"]
    earlier = torch.arange(E, dtype=torch.float64)
    router.window_stats, router.total = {"importance": earlier, "tokens": torch.tensor(40)}, lambda v: 3 * v
    torch.testing.assert_close(router(x, tokens).loss.detach(), 17 * cv2(earlier + 3 * own), rtol=1e-12, atol=0)


def test_all_experts_chosen_are_certain_to_be():
    router = make(k=E, importance_loss=0.0)
    x, tokens = make_tokens()
    routing = router(x, tokens)
    assert routing.loss == 0
    assert torch.equal(routing.stats["smooth_load"], torch.full((E,), 17.0, dtype=torch.float64))


def test_evaluation_is_without_noise():
    router = make().eval()
    x, tokens = make_tokens(padded=0)
    best = (x @ router.weight.T).topk(2).indices
    for step in (0, 1):
        assert torch.equal(router(x, tokens._replace(step=step)).expert.view(-1, 2), best)
    router.train()
    assert not torch.equal(router(x, tokens).expert.view(-1, 2), best)


def test_noise_of_no_width_leaves_finite_gradients():
    router = build("noisy_top_k", D, E)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.constant_(router.noise_weight, -1e6)
    x = torch.rand(20, D) + 1
    router(x, Tokens.of(x)).loss.backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_learned_noise_starts_from_zero_and_chooses_evenly():
    settings = Model(layers=1, d_model=8, heads=2, context=16, moe={"experts": 4, "d_expert": 8, "router": "noisy_top_k"})
    router = Transformer(settings, 50).routers()[0]
    assert all((p == 0).all() for p in router.parameters())
    x = torch.randn(4000, 8)
    load = router(x, Tokens.of(x)).load(4)
    assert (load - 2000).abs().max() < 5 * math.sqrt(4000 * 0.25)
    fixed = Transformer(
        settings.model_copy(update={"moe": settings.moe.model_copy(update={"router": {"name": "noisy_top_k", "noise": "fixed"}})}), 50
    )
    assert [name for name, _ in fixed.routers()[0].named_parameters()] == ["weight"]
    assert fixed.routers()[0].weight.std() > 0.01


def test_training_on_the_losses_spreads_the_load():
    router = make(importance_loss=1.0, load_loss=1.0)
    x, tokens = make_tokens(400, padded=0)
    x += 1.0  # a common direction, so that some experts start as favourites
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    worst = []
    for step in range(80):
        routing = router(x, tokens._replace(step=step))
        load = routing.load(E).double()
        worst.append((load.max() / load.mean()).item())
        optimizer.zero_grad()
        (routing.loss / 400).backward()
        optimizer.step()
    assert worst[0] > 1.5
    assert worst[-1] < 1.2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 7}, "k from 1 to 6"),
        ({"k": 1}, "router.noise=fixed or router.k=2"),
        ({"importance_loss": -0.1}, "importance_loss of at least 0"),
        ({"load_loss": -0.1}, "load_loss of at least 0"),
    ],
)
def test_bad_settings_say_what_to_type(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build({"name": "noisy_top_k", **options}, D, E)
    assert "\n" not in str(caught.value)
