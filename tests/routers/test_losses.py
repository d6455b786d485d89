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


def test_importance_of_many_sets_is_one_number_each():
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = losses.importance(weight)
    torch.testing.assert_close(found, torch.tensor([3.5 / 9, 0, 0], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert gradient.isfinite().all()


def test_the_gshard_form_is_the_balance_of_first_choices():
    """E^2 times the mean over experts of mean gate times share of first choices."""
    load, probability = torch.tensor([2, 1, 1, 0]), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    gshard = 16 * (probability * load / 4).mean()
    torch.testing.assert_close(losses.balance(load, probability), gshard, rtol=1e-12, atol=0)


def test_balance_of_sequences_is_that_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    probability = torch.rand(8, 4, generator=generator, dtype=torch.float64).softmax(-1)
    expert = probability.topk(2).indices
    expert[4, 1] = 4  # dropped: in nobody's load
    load = losses.sequence_loads(expert, sequence, 4)
    for s in range(3):
        mine = torch.bincount(expert[sequence == s].flatten(), minlength=5)[:4]
        assert torch.equal(load[s], mine)
        alone = losses.balance(mine, probability[sequence == s].sum(0))
        together = losses.balance(load[sequence], probability)[sequence == s].sum()
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_load_golden_value():
    """One token, noisy logits (3, 2, 1), k = 1 and unit noise: an expert has to beat 3, and the best of them 2."""
    clean, noisy = torch.tensor([[2.0, 2.5, 1.0]], dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    phi = torch.tensor([[0.1586552539, 0.3085375387, 0.0227501319]], dtype=torch.float64)  # of -1, -.5 and -2
    torch.testing.assert_close(losses.smooth_load(clean, noisy, 1, 1.0), phi, rtol=1e-8, atol=0)
    phi[0, 0] = 0.5
    torch.testing.assert_close(losses.smooth_load(clean, noisy, 1, 1.0, against="others"), phi, rtol=1e-8, atol=0)
    assert losses.importance(phi[0]).item() == pytest.approx(0.50083954, abs=1e-8)


def test_against_the_others_the_chance_is_that_of_a_redraw_of_one():
    torch.manual_seed(0)
    clean, std, k = torch.randn(1, 5, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64) + 0.2, 3
    noisy = clean + std * torch.randn(1, 5, dtype=torch.float64)
    chance = losses.smooth_load(clean, noisy, k, std, against="others")
    for e in range(5):
        again = noisy.repeat(100_000, 1)
        again[:, e] = clean[0, e] + std[0, e] * torch.randn(100_000, dtype=torch.float64)
        selected = (again.topk(k).indices == e).any(1).double().mean()
        assert chance[0, e].item() == pytest.approx(selected.item(), abs=0.008)
    assert (losses.smooth_load(clean, noisy, 5, std, against="others") == 1).all()


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
