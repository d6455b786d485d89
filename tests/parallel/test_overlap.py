"""All-to-alls in chunks: the same numbers and gradients as in one piece, one exchange of counts, and transfers that overlap."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe.model.experts import Experts
from moe.parallel import expert_parallel
from moe.parallel.collectives import recorded
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.in_flight import InFlight
from moe.parallel.layout import Copies, Layout
from moe.parallel.overlap import Overlap
from moe.parallel.placement import owned
from tests.parallel.test_expert_parallel import WAYS, E, T, job, layer, routings, through
from tests.workers import run_ranks


def sharded(rank: int, world: int, how: str, chunks: int):
    built, here = layer(), E // world
    built.dispatcher = AllToAll(0, E, None, how=how, room=float(world))
    if chunks > 1:
        built.pipeline = Overlap(chunks)
    for p in built.experts.parameters():
        p.data = p.data[rank * here : (rank + 1) * here]
    return built


def in_chunks(rank, world, chunks):
    found = {}
    for how in WAYS:
        for name, routing in routings(rank, how).items():
            many = world == 2 and name in ("drops", "uneven")
            for number in (chunks, T + 1) if many else (chunks,):  # of T + 1 chunks one has no token
                built = sharded(rank, world, how, number)
                found[how, name, number] = through(built, routing, *job(rank, routing))
    return found


@pytest.mark.parametrize(("world", "chunks"), [(2, 2), (4, 3)])
def test_outputs_and_all_gradients_are_those_of_a_layer_that_has_all_experts(world, chunks):
    ranks = run_ranks(world, in_chunks, chunks)
    assert any(name == "one rank has none" for _, name, _ in ranks[0])
    for case in ranks[0]:
        alone = [through(layer(), routings(rank)[case[1]], *job(rank, routings(rank)[case[1]])) for rank in range(world)]
        for rank in range(world):
            for a, b in zip(ranks[rank][case][:3], alone[rank][:3], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=f"{case}, rank {rank}")
        for number in (3, 4):
            got = torch.cat([ranks[rank][case][number] for rank in range(world)])
            torch.testing.assert_close(got, sum(found[number] for found in alone), rtol=1e-11, atol=1e-12, msg=str(case))


def sent(rank, world):
    found = {}
    for how in WAYS:
        for chunks in (1, 3):
            built, routing = sharded(rank, world, how, chunks), routings(rank)["drops"]
            with recorded() as ledger, patch.object(expert_parallel, "to_host", wraps=expert_parallel.to_host) as waits:
                through(built, routing, *job(rank, routing))
            kinds = [each.kind for each in ledger]
            volume = sum(each.bytes for each in ledger if each.kind == "tokens")
            found[how, chunks] = waits.call_count, kinds.count("counts"), kinds.count("tokens"), volume
    return found


def test_counts_of_all_chunks_are_exchanged_and_read_at_once_and_no_token_is_sent_twice():
    for found in run_ranks(2, sent):
        for how in WAYS:
            waits, also = how != "fixed", how == "tokens"  # also: which of the vectors each assignment reads
            assert found[how, 1][:3] == (waits, 1 + also, 6)
            assert found[how, 3][:3] == (waits, 1 + 3 * also, 18)
            if how == "rows":
                assert found[how, 3][3] == found[how, 1][3]


class Operators(TorchDispatchMode):
    """Names of all that runs."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition(".")[0].removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


COPIES = {"cat", "clone", "copy_", "stack", "contiguous"}


def combined(rank, world):
    """The operators of a combine, and of one whose outputs are copied first."""
    built, routing = sharded(rank, world, "rows", 1), routings(rank)["drops"]
    x, _ = job(rank, routing)
    rows, route = built.dispatcher.dispatch(x, routing)
    outputs, found = torch.randn_like(rows.x), []
    for copied in (False, True):
        with Operators() as seen:
            built.dispatcher.combine(torch.cat([outputs[:0], outputs]) if copied else outputs, route)
        found.append(seen.names & COPIES)
    return found


def test_outputs_that_come_back_are_summed_where_they_arrive_without_a_copy():
    for found in run_ranks(2, combined):
        assert found == [set(), {"cat"}]


@contextmanager
def events():
    """What starts, is waited for and is computed, in order."""
    seen: list[str] = []
    start, wait, multiply = InFlight.start, InFlight.wait, Experts._multiply
    transfers: list[InFlight] = []  # of the dispatch of chunks 1 and 2, then of their combine

    def named(under_way) -> str:
        if under_way not in transfers:
            transfers.append(under_way)
        number = transfers.index(under_way) + 1
        return f"{number}" if number <= 2 else f"back {number - 2}"

    def starts(self, *args):
        seen.append(f"start {named(self)}")
        return start(self, *args)

    def waits(self):
        seen.append(f"wait {named(self)}")
        return wait(self)

    def multiplies(self, rows, weights):
        seen.append("experts")
        return Computed.apply(multiply(self, rows, weights), seen)

    with patch.object(InFlight, "start", starts), patch.object(InFlight, "wait", waits), patch.object(Experts, "_multiply", multiplies):
        yield seen


class Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, seen):
        ctx.seen = seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append("experts backward")
        return grad, None


def ordered(rank, world):
    built, routing = sharded(rank, world, "rows", 2), routings(rank)["two each"]
    x, upstream = job(rank, routing)
    with events() as seen:
        out = built.compute(x, routing._replace(weight=routing.weight.clone().requires_grad_()))
        forward = list(seen)
        seen.clear()
        out.backward(upstream)
    return forward, list(seen)


FORWARD = [
    *("start 1", "start 1", "start 2", "start 2"),  # values and vectors
    *("wait 1", "experts", "start back 1"),
    *("wait 2", "experts", "start back 2"),
    *("wait back 1", "wait back 2"),
]
BACKWARD = [
    *("start back 2", "start back 1"),
    *("wait back 2", "experts backward", "start 2", "start 2"),
    *("wait back 1", "experts backward", "start 1", "start 1"),
    *("wait 2", "wait 1"),
]


def test_experts_of_one_chunk_compute_while_the_other_travels_forward_and_backward():
    for forward, backward in run_ranks(2, ordered):
        assert forward == FORWARD
        assert backward == BACKWARD


def test_what_overlap_has_no_effect_on_or_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"choose parallel\.copies\.rematerialise=false or parallel\.overlap=1"):
        Layout(expert_ranks=2, overlap=2, copies=Copies(policy="hecate", rematerialise=True))
    assert "overlap" in Layout(overlap=2).idle()
    assert "overlap" not in Layout(overlap=2, expert_ranks=2).idle()


def recomputed(rank, world, chunks):
    """Rank 1 has no expert, weights are of a frozen router; activations are computed again in the backward pass.

    Without shared experts nothing behind the routed ones keeps a tensor, so that recomputation ends there.
    """
    routing = routings(rank)["scaled gradients"]
    built = sharded(rank, world, "rows", chunks)
    built.shared = None
    to: Any = built.dispatcher
    to.place(owned(np.zeros(E, dtype=np.int64), world))
    whole = layer()
    for p, all_experts in zip(built.experts.parameters(), whole.experts.parameters(), strict=True):
        p.data = all_experts.data[: 0 if rank else E]
    x, upstream = job(rank, routing)
    out = checkpoint(built.compute, x, routing, use_reentrant=False)
    out.backward(upstream)
    return out.detach(), x.grad


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_rank_without_experts_recomputes_in_step_with_the_others(chunks):
    for rank, found in enumerate(run_ranks(2, recomputed, chunks)):
        routing, alone = routings(rank)["scaled gradients"], layer()
        alone.shared = None
        for a, b in zip(found, through(alone, routing, *job(rank, routing))[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
