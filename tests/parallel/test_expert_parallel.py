"""Tokens that travel to experts and back: the law of dispatchers, gradients, empty ranks, volumes, and ranks out of step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed as dist

from moe.errors import ConfigError, RankMismatch
from moe.model.dispatch import LocalDispatcher
from moe.model.moe_layer import MoELayer
from moe.parallel.collectives import gather_ranks, recorded
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.placement import Placement, owned
from moe.routers.base import Routing
from tests.workers import run_ranks

E, D, T = 4, 5, 12
WAYS = ("rows", "tokens", "fixed")


def routings(rank: int, how: str = "rows") -> dict[str, Routing]:
    """Different on each rank, some without a token there; fixed buffers need as many rows on all ranks."""
    draw = torch.Generator().manual_seed(rank)
    weight = torch.rand(T, 2, generator=draw, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(E, generator=draw)[:2] for _ in range(T)])
    dropped = torch.where(torch.rand(T, 2, generator=draw) < 0.4, E, pairs)
    none = torch.zeros(0, 2)
    mask = torch.rand(T, E, generator=draw) < 0.5
    found = {
        "two each": Routing.per_token(pairs, weight),
        "drops": Routing.per_token(dropped, weight),
        "all dropped": Routing.per_token(torch.full_like(pairs, E), weight),
        "all to one": Routing.per_token(torch.full((T, 1), 3), weight[:, :1]),
        "every expert": Routing.per_token(torch.arange(E).expand(T, E), torch.rand(T, E, generator=draw).double()),
        "one rank has none": Routing.per_token(pairs, weight) if rank else Routing.per_token(none.long(), none.double()),
        "nobody has any": Routing.per_token(none.long(), none.double()),
        "experts choose": Routing.per_expert(
            torch.stack([torch.randperm(T, generator=draw)[:3] for _ in range(E)]), weight[:E, :1].expand(E, 3)
        ),
        "uneven": Routing.dense(torch.where(mask, torch.rand(T, E, generator=draw).double(), 0)),
        "scaled gradients": Routing.per_token(pairs, weight)._replace(gradient_scale=torch.rand(2 * T, generator=draw).double()),
    }
    uneven = ("one rank has none", "experts choose", "uneven") if how == "fixed" else ()
    return {name: routing for name, routing in found.items() if name not in uneven}


def tokens_of(routing: Routing) -> int:
    return len(routing.token) // routing.fan_out if routing.fan_out else T


def layer() -> MoELayer:
    built = MoELayer(D, experts=E, d_expert=6, d_shared=4).double()
    draw = torch.Generator().manual_seed(9)
    for p in built.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return built


def through(built: MoELayer, routing: Routing, x: torch.Tensor, upstream: torch.Tensor):
    """Output, and gradients of x, of the weights of rows and of the experts at hand."""
    weight = routing.weight.clone().requires_grad_()
    out = built.compute(x, routing._replace(weight=weight))
    out.backward(upstream)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in built.experts.parameters()]
    return [out.detach(), x.grad, weight.grad, *gradients]


def job(rank, routing):
    draw = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens_of(routing), D, generator=draw, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(x.shape, generator=draw, dtype=torch.float64)


def travelled(rank, world, how, group=None):
    results = {}
    for name, routing in routings(rank, how).items():
        built, here = layer(), E // world
        # room for everything: the layer alone has nobody who runs it again
        built.dispatcher = AllToAll(0, E, group, how=how, room=float(world))
        for p in built.experts.parameters():
            p.data = p.data[rank * here : (rank + 1) * here]
        results[name] = through(built, routing, *job(rank, routing))
        if how == "fixed":
            assert not built.dispatcher.overflowed
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("how", WAYS)
def test_outputs_and_all_gradients_are_those_of_a_layer_that_has_all_experts(how, world):
    ranks = run_ranks(world, travelled, how)
    for name in routings(0, how):
        experts = []
        for rank in range(world):
            routing = routings(rank)[name]
            alone = through(layer(), routing, *job(rank, routing))
            for a, b in zip(ranks[rank][name][:3], alone[:3], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=f"{name}, rank {rank}")
            experts.append(alone[3:])
        for number in range(2):
            whole = sum(gradients[number] for gradients in experts)
            got = torch.cat([ranks[rank][name][3 + number] for rank in range(world)])
            torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-12, msg=name)


def law(rank, world, how):
    """combine(dispatch(x)) with experts that return what they are given."""
    found = {}
    for name, routing in routings(rank, how).items():
        routing = routing._replace(weight=torch.ones_like(routing.weight))
        x, _ = job(rank, routing)
        to = AllToAll(0, E, None, how=how, room=float(world))
        rows, ticket = to.dispatch(x, routing)
        kept = int(rows.counts.sum())
        given = rows.x[rows.index[:kept]] * rows.weight[:kept, None]
        out = to.combine(torch.zeros_like(rows.x).index_add(0, rows.index[:kept], given), ticket)
        times = torch.zeros(len(x), dtype=torch.float64).index_add(0, routing.token, (routing.expert < E).double())
        found[name] = (out - x * times[:, None]).abs().max().item() if len(x) else 0.0
    return found


@pytest.mark.parametrize("how", WAYS)
def test_identity_experts_return_each_token_times_its_number_of_assignments(how):
    for found in run_ranks(2, law, how):
        assert max(found.values()) < 1e-12, found


def overflowing(rank, world):
    to = AllToAll(0, E, None, how="fixed", room=1.0)
    routing = routings(rank)["two each"]
    if rank:  # both of each token's experts on the same rank
        routing = routing._replace(expert=torch.tensor([0, 1] * T))
    to.dispatch(job(rank, routing)[0], routing)
    return bool(to.overflowed)


def test_a_buffer_that_is_too_small_says_so():
    assert run_ranks(2, overflowing)[1]
    assert run_ranks(1, overflowing) == [False]


def refused(rank, world):
    try:
        AllToAll(0, E, None, how="fixed").dispatch(torch.zeros(T, D).double(), routings(rank)["uneven"])
    except ConfigError as error:
        return str(error)


def test_fixed_buffers_refuse_routers_whose_tokens_differ_in_their_number_of_experts():
    assert "choose parallel.exchange=rows or tokens" in run_ranks(1, refused)[0]


def volumes(rank, world, how):
    """Bytes given to other ranks, forward and backward, and what the formula says."""
    routing = routings(rank)["two each"]
    x, upstream = job(rank, routing)
    built, here = layer(), E // world
    built.dispatcher = AllToAll(0, E, None, how=how, room=1.5)
    for p in built.experts.parameters():
        p.data = p.data[rank * here : (rank + 1) * here]
    with recorded() as ledger:
        through(built, routing, x, upstream)
    owner = routing.expert.view(T, 2) // here
    away = owner != rank
    rows = int(away.sum())
    vectors = int(sum((owner == other).any(1).sum() for other in range(world) if other != rank))
    room = int(1.5 * T * 2 / world + 0.999) * (world - 1)
    # vectors go out and sums come home, and so do their gradients; what comes home this rank does not send, others do
    sent = {"rows": rows, "tokens": vectors, "fixed": room}[how]
    return sum(entry.bytes for entry in ledger), sent, rows, [entry.kind for entry in ledger], [entry[:3] for entry in ledger]


@pytest.mark.parametrize("how", WAYS)
def test_the_bytes_on_the_wire_are_those_of_the_formula(how):
    world = 2
    ranks = run_ranks(world, volumes, how)
    measured, vectors = sum(r[0] for r in ranks), sum(r[1] for r in ranks)
    rows = vectors if how == "fixed" else sum(r[2] for r in ranks)
    vectors_twice_there_and_back = 4 * vectors * D * 8
    weights_and_their_gradient = 2 * rows * 8
    counts = {"rows": E + 2, "tokens": E + 3, "fixed": 2}[how] * 8 * world * (world - 1)
    positions = {"rows": 0, "tokens": rows * 8, "fixed": rows * 8}[how]
    assert measured == vectors_twice_there_and_back + weights_and_their_gradient + counts + positions
    assert ranks[0][4] == ranks[1][4]  # the ledger: the same collectives in the same order on both


def test_sending_each_token_once_saves_what_it_says():
    each, once = run_ranks(2, volumes, "rows"), run_ranks(2, volumes, "tokens")
    assert sum(r[1] for r in once) < sum(r[1] for r in each)


def out_of_step(rank, world, what, how):
    to = AllToAll(0 if rank == 0 or what != "layer" else 1, E, None, how=how)
    if what == "call" and rank:
        to.calls += 1
    routing = routings(rank)["two each"]
    try:
        to.dispatch(job(rank, routing)[0], routing)
        to.check()
    except RankMismatch as error:
        return str(error)
    return None


@pytest.mark.parametrize("how", ["rows", "fixed"])
@pytest.mark.parametrize("what", ["layer", "call"])
def test_ranks_out_of_step_are_told_apart(what, how):
    found = run_ranks(2, out_of_step, what, how)
    assert all(error is not None and "the expert group sends tokens for" in error for error in found)


def skewed_steps(rank, world, how):
    """Fifty steps in which every token wants the same expert."""
    built, here = layer(), E // world
    built.dispatcher = AllToAll(0, E, None, how=how, room=float(world))
    for p in built.experts.parameters():
        p.data = p.data[rank * here : (rank + 1) * here]
    draw = torch.Generator().manual_seed(rank)
    for _ in range(50):
        x = torch.randn(T, D, generator=draw, dtype=torch.float64, requires_grad=True)
        out = built.compute(x, Routing.per_token(torch.full((T, 1), 1), torch.ones(T, 1, dtype=torch.float64)))
        out.square().sum().backward()
        with torch.no_grad():
            for p in built.experts.parameters():
                assert p.grad is not None
                p -= 1e-4 * p.grad
                p.grad = None
    return all(p.isfinite().all().item() for p in built.experts.parameters()), out.isfinite().all().item()


@pytest.mark.parametrize("how", WAYS)
def test_all_tokens_to_one_expert_neither_hang_nor_blow_up(how):
    assert run_ranks(4, skewed_steps, how) == [(True, True)] * 4


def checked_by_torch(rank, world, how):
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    group = dist.new_group()  # now with a check of shapes and kinds before every collective
    return len(travelled(rank, world, how, group))


@pytest.mark.parametrize("how", WAYS)
def test_torchs_own_checks_of_collectives_find_nothing(how):
    assert run_ranks(2, checked_by_torch, how) == [len(routings(0, how))] * 2


def gathered(rank, world):
    x = torch.arange(2.0, dtype=torch.float64)[:, None] + 10 * rank
    x.requires_grad_()
    together = gather_ranks(x)
    ((rank + 1) * together.square()).sum().backward()
    return together.detach(), x.grad


def test_gathered_copies_give_their_owner_the_gradients_of_all():
    for rank, (together, gradient) in enumerate(run_ranks(2, gathered)):
        assert together.flatten().tolist() == [0, 1, 10, 11]
        own = together.view(2, 2)[rank]
        assert gradient.flatten().tolist() == (2 * (1 + 2) * own).tolist()


def test_alone_it_is_the_local_dispatcher():
    assert run_ranks(1, travelled, "rows")[0].keys() == routings(0).keys()
    rows, _ = LocalDispatcher(E).dispatch(torch.zeros(T, D).double(), routings(0)["drops"])
    assert len(rows.index) == 2 * T


def among_holders(rank, world, how):
    """Rows of expert 0 that arrive here if one rank without a copy of it sends a number that does not divide."""
    to = AllToAll(0, E, dist.group.WORLD, how=how)
    bare = owned(np.array([1, 1, 2, 3]), world)
    placement = Placement(bare.owner, bare.holds.copy())
    placement.holds[1:, 0] = True
    to.place(placement)
    x = torch.ones(T - 1 if rank == 0 else 0, D, dtype=torch.float64)
    rows, _ = to.dispatch(x, Routing.per_token(torch.zeros(len(x), 1, dtype=torch.int64), x[:, :1]))
    return int(rows.counts[placement.held(rank).index(0)]) if placement.holds[rank, 0] else 0


@pytest.mark.parametrize("how", ["rows", "tokens"])
def test_holders_of_copies_share_the_rows_of_others_evenly(how):
    assert sorted(run_ranks(4, among_holders, how)) == [0, 3, 4, 4]
