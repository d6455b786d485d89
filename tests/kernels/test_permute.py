"""What comes home is the sum over each vector's rows, and what is sent out is that sum's gradient."""

from __future__ import annotations

import pytest
import torch

from moe.kernels.permute import bring_home, send_out


def routed(tokens, k):
    slots = torch.randperm(tokens * k).view(tokens, k)
    index = torch.empty(tokens * k, dtype=torch.int64).scatter_(0, slots.view(-1), torch.arange(tokens).repeat_interleave(k))
    return slots, index


@pytest.mark.parametrize(("tokens", "k"), [(7, 1), (5, 2), (3, 8), (1, 4), (0, 2)])
def test_rows_come_home_as_one_sum_with_and_without_a_fixed_fan_out(tokens, k):
    slots, index = routed(tokens, k)
    y = torch.randn(tokens * k, 6, dtype=torch.float64)
    expected = torch.einsum("tn,nd->td", (torch.arange(tokens)[:, None] == index).double(), y)
    torch.testing.assert_close(bring_home(y, index, slots, tokens), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(bring_home(y, index, None, tokens), expected, rtol=1e-14, atol=1e-14)


def test_what_is_sent_out_is_the_gradient_of_what_came_home():
    _, index = routed(5, 3)
    y, upstream, scale = torch.randn(15, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.randn(15).double()
    _, gradient = torch.func.vjp(lambda t: torch.zeros(5, 4).double().index_add(0, index, t), y)
    assert torch.equal(send_out(upstream, index, None, torch.empty_like(y)), gradient(upstream)[0])
    assert torch.equal(send_out(upstream, index, scale, torch.empty_like(y)), gradient(upstream)[0] * scale[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_short_types_round_once(dtype):
    slots, index = routed(64, 8)
    y = torch.randn(512, 16).to(dtype)
    exact = y[slots].double().sum(1)
    error = (bring_home(y, index, slots, 64).double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * y.abs().max()).all()
