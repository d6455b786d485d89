"""The shared losses against golden numbers and plain definitions."""

from __future__ import annotations

import math

import pytest
import torch

from moe.routers import losses


def test_balance_golden_value():
    load, probability = torch.tensor([2, 1, 1, 0]), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert losses.balance(load, probability).item() == pytest.approx(1.30, abs=1e-12)
    assert losses.balance(load, 7 * probability).item() == pytest.approx(7 * 1.30, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_balance_is_one_when_uniform_for_every_k(k):
    load, probability = torch.full((8,), 5 * k), torch.softmax(torch.randn(8, dtype=torch.float64), 0)
    assert losses.balance(load, probability).item() == pytest.approx(1.0, abs=1e-12)


def test_balance_reaches_the_router_through_probability_alone():
    load, probability = torch.tensor([3, 1]), torch.tensor([0.6, 0.4], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.balance(load, probability), probability)
    torch.testing.assert_close(gradient, torch.tensor([1.5, 0.5]))


def test_balance_of_nothing_is_zero():
    assert losses.balance(torch.zeros(4, dtype=torch.int64), torch.zeros(4)).item() == 0


def test_z_golden_value():
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1.0, 0, 0]], dtype=torch.float64)
    assert losses.z(logits).mean().item() == pytest.approx(4.25975, abs=1e-5)


def test_entropy_is_log_E_when_uniform_and_zero_when_certain():
    probability = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(losses.entropy(probability), torch.tensor([math.log(4), 0.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(losses.entropy(probability).sum(), probability)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[0], torch.full((4,), math.log(4) - 1, dtype=torch.float64))


def test_importance_is_the_squared_coefficient_of_variation():
    weight = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert losses.importance(weight).item() == pytest.approx(3.5 / 9, abs=1e-12)  # population variance 3.5, mean 3
    assert losses.importance(5 * weight).item() == pytest.approx(3.5 / 9, abs=1e-12)
    assert losses.importance(torch.zeros(4)).item() == 0


def test_smooth_load_is_the_chance_of_being_selected_on_a_redraw():
    torch.manual_seed(0)
    clean, std, k = torch.randn(1, 4, dtype=torch.float64), 0.5, 2
    noisy = clean + std * torch.randn(1, 4, dtype=torch.float64)
    chance = losses.smooth_load(clean, noisy, k, std)
    threshold = noisy[0].sort(descending=True).values[k - 1]
    redrawn = clean + std * torch.randn(200_000, 4, dtype=torch.float64)
    torch.testing.assert_close(chance[0], (redrawn >= threshold).double().mean(0), rtol=0, atol=0.005)


def test_usage_is_balance_with_the_tokens_in_the_place_of_the_assignments():
    load, weight = torch.tensor([6, 3, 3, 0]), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert losses.usage(load, torch.tensor(12), weight).item() == pytest.approx(losses.balance(load, weight).item(), rel=1e-14)
    assert losses.usage(load, torch.tensor(6), weight).item() == pytest.approx(2 * 1.3, rel=1e-14)
    assert losses.usage(0 * load, torch.tensor(0), weight).item() == 0
