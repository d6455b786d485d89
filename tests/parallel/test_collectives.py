"""Sums over ranks and their gradients."""

from __future__ import annotations

import torch

from moe.parallel.collectives import sum_ranks, total_over_ranks
from tests.workers import run_ranks


def inputs(world):
    return torch.randn(world, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of_rank(rank, x, total):
    """Different on each rank, and not linear in the total."""
    return ((total + rank) ** 3 * x).sum()


def gradient(rank, world):
    x = inputs(world)[rank].requires_grad_()
    loss_of_rank(rank, x, total_over_ranks(x)).backward()
    return x.grad


def test_the_gradient_of_a_total_is_that_of_the_sum_of_all_ranks_losses():
    for world in (1, 2, 3):
        x = inputs(world).requires_grad_()
        sum(loss_of_rank(rank, x[rank], x.sum(0)) for rank in range(world)).backward()
        for rank, grad in enumerate(run_ranks(world, gradient)):
            torch.testing.assert_close(grad, x.grad[rank], rtol=1e-12, atol=0)


def kept(rank, world):
    x = torch.full((2, 3), float(rank)).T  # not contiguous
    total = total_over_ranks(x)
    counts = sum_ranks(torch.tensor([rank, 2**52 + 1]))
    return x.unique().tolist(), total.unique().tolist(), counts.tolist()


def test_a_total_leaves_its_input_alone_and_counts_stay_exact():
    for rank, (x, total, counts) in enumerate(run_ranks(2, kept)):
        assert x == [rank]
        assert total == [1]
        assert counts == [1, 2**53 + 2]
