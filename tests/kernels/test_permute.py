"""Gathering and bringing home are the sums they say, and each is the other's gradient."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.permute import gather, gather_sum, sum_slots


def routed(tokens, k, dtype=torch.float64):
    slots = torch.randperm(tokens * k).view(tokens, k)
    index = torch.empty(tokens * k, dtype=torch.int64).scatter_(0, slots.view(-1), torch.arange(tokens).repeat_interleave(k))
    return slots, index


@pytest.mark.parametrize(("tokens", "k"), [(7, 1), (5, 2), (3, 8), (1, 4), (0, 2)])
def test_gather_copies_and_gather_sum_adds_up(tokens, k):
    slots, index = routed(tokens, k)
    x = torch.randn(tokens, 6, dtype=torch.float64)
    assert torch.equal(gather(x, index, slots), x[index])
    assert torch.equal(gather(x, index, None), x[index])
    y = torch.randn(tokens * k, 6, dtype=torch.float64)
    torch.testing.assert_close(gather_sum(y, index, slots), torch.zeros_like(x).index_add_(0, index, y), rtol=1e-14, atol=1e-14)


def test_their_gradients_are_those_of_indexing():
    slots, index = routed(5, 3)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather(t, index, slots), x)
    assert torch.autograd.gradcheck(lambda t: gather_sum(t, index, slots), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_short_types_round_once(dtype):
    slots, _ = routed(64, 8)
    y = torch.randn(512, 16).to(dtype)
    exact = y[slots].double().sum(1)
    error = (sum_slots(y, slots).double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * y.abs().max()).all()
