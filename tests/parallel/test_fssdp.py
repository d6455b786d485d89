"""Copies of experts travel to their holders and gradients back, for any placement, straight or relayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.kernels.reference import ExpertWeights
from moe.parallel.collectives import recorded
from moe.parallel.fssdp import Materialise
from moe.parallel.placement import Placement, choices, even, owned, trip
from tests.workers import run_ranks

E, R = 6, 4
NODE = np.array([0, 0, 1, 1])


def random_placement(seed: int, ranks: int = R, experts: int = E) -> Placement:
    draw = np.random.default_rng(seed)
    bare = owned(draw.permutation(np.arange(experts) % ranks), ranks)  # some ranks own one more
    return Placement(bare.owner, bare.holds | (draw.random((ranks, experts)) < (seed % 5) / 4))


PLACEMENTS = [random_placement(seed) for seed in range(10)] + [Placement(even(8, 4).owner[:E], np.ones((R, E), dtype=bool))]


def whole(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(E, 2, 3, 5, generator=draw, dtype=torch.float64), torch.randn(E, 5, 3, generator=draw, dtype=torch.float64)


def upstream(rank, held):
    draw = torch.Generator().manual_seed(1000 + rank)
    up, down = torch.randn(E, 2, 3, 5, generator=draw).double(), torch.randn(E, 5, 3, generator=draw).double()
    return up[held], down[held]


def gathered(rank, world, relay):
    results = []
    for placement in PLACEMENTS:
        layer = Materialise(None, NODE, relay=relay, again=False)
        layer.place(placement)
        own = np.flatnonzero(placement.owner == rank)
        up, down = (t[own].requires_grad_() for t in whole())
        with recorded() as ledger:
            held = layer(ExpertWeights(up, down))
            torch.autograd.backward(held[:2], upstream(rank, placement.held(rank)))
        results.append(([t.detach() for t in held[:2]], [up.grad, down.grad], sum(sent.bytes for sent in ledger)))
    return results


@pytest.mark.parametrize("relay", [False, True])
def test_holders_get_the_owners_values_and_owners_the_sum_of_all_holders_gradients(relay):
    ranks = run_ranks(R, gathered, relay)
    for number, placement in enumerate(PLACEMENTS):
        totals = [torch.zeros_like(t) for t in whole()]
        for rank in range(R):
            held = placement.held(rank)
            for total, gradient in zip(totals, upstream(rank, held), strict=True):
                total[held] += gradient
            for got, right in zip(ranks[rank][number][0], whole(), strict=True):
                assert torch.equal(got, right[held])
        for rank in range(R):
            own = np.flatnonzero(placement.owner == rank)
            for got, total in zip(ranks[rank][number][1], totals, strict=True):
                torch.testing.assert_close(got, total[own], rtol=1e-14, atol=1e-14)


def test_straight_moves_cost_one_expert_a_copy_each_way():
    bytes_of_an_expert = (2 * 3 * 5 + 5 * 3) * 8
    sent = np.array([[bytes for _, _, bytes in rank] for rank in run_ranks(R, gathered, False)]).sum(0)
    copies = [int(placement.holds.sum()) - E for placement in PLACEMENTS]
    assert sent.tolist() == [2 * bytes_of_an_expert * number for number in copies]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_relayed_expert_crosses_once_to_each_other_machine(placement):
    crossings = 0
    for rank in range(R):
        hop = trip(placement, rank, NODE, relay=True).hops[0]
        crossings += sum(number for to, number in enumerate(hop.send) if NODE[to] != NODE[rank])
        inside = trip(placement, rank, NODE, relay=True).hops[1]
        assert all(number == 0 for to, number in enumerate(inside.send) if NODE[to] != NODE[rank])
    assert crossings == sum(len(set(NODE[placement.holds[:, e]]) - {NODE[placement.owner[e]]}) for e in range(E))


def test_tokens_stay_with_a_copy_then_in_the_machine_then_are_split():
    bare = owned(np.array([0, 0, 2]), R)
    placement = Placement(bare.owner, bare.holds.copy())
    placement.holds[3, 0] = True
    assert choices(placement, 0, NODE) == [[0], [0], [2]]
    assert choices(placement, 1, NODE) == [[0], [0], [2]]
    assert choices(placement, 2, NODE) == [[3], [0], [2]]
    assert choices(placement, 1, np.array([0, 1, 2, 2]))[0] == [0, 3]


def test_a_digest_tells_placements_apart():
    assert len({placement.digest for placement in PLACEMENTS}) == len(
        {placement.holds.tobytes() + placement.owner.tobytes() for placement in PLACEMENTS}
    )
