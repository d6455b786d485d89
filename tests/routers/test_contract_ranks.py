"""What every router promises about ranks and accumulation: the loss of the global batch, however it is split."""

from __future__ import annotations

import itertools
from threading import Barrier, Thread

import pytest
import torch

from moe.routers import Router, Routing, Tokens
from tests.routers.test_contract import CASES, gradient, make, make_tokens, rows

# A loss whose loads are counted over the call is another loss for another split.
splittable = pytest.mark.parametrize(("name", "options"), [case for case in CASES if case.values[1].get("balance_scope") != "micro"])


def on_ranks(router: Router, calls: list[tuple[torch.Tensor, Tokens]]) -> list[Routing]:
    """Each call on a rank of its own: `total` waits for all of them and returns the live sum, gradient included."""
    world = len(calls)
    barrier, slots, out = Barrier(world), [None] * world, [None] * world

    def body(rank: int) -> None:
        local = build_like(router)
        local.window, local.window_stats, local.window_complete = router.window, router.window_stats, router.window_complete

        def total(x):
            slots[rank] = x
            barrier.wait(10)
            result = sum(slots)
            barrier.wait(10)
            return result

        local.total = total
        try:
            out[rank] = local(*calls[rank])
        except BaseException:
            barrier.abort()
            raise

    threads = [Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(o is not None for o in out)
    return out


def build_like(router: Router) -> Router:
    """A shallow copy that shares parameters and buffers, but not the seams, nor those of a router that it wraps."""
    twin = object.__new__(type(router))
    twin.__dict__.update(router.__dict__)
    twin._modules = {name: build_like(module) if isinstance(module, Router) else module for name, module in router._modules.items()}
    return twin


@splittable
@pytest.mark.parametrize("cuts", [[15], [5, 25], [0, 10, 20]])  # at sequences' ends; one rank without tokens
def test_auxiliary_loss_is_the_same_on_any_number_of_ranks(name, options, cuts):
    router = make(name, options)
    x, tokens = make_tokens(30, padded=4)
    whole = router(x, tokens).loss
    edges = [0, *cuts, 30]
    calls = [(x[a:b], rows(tokens, slice(a, b))) for a, b in itertools.pairwise(edges)]
    split = sum(routing.loss for routing in on_ranks(router, calls))
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(router, split), gradient(router, whole), rtol=1e-11, atol=1e-13)


@splittable
def test_auxiliary_loss_is_the_same_for_any_accumulation_once_the_window_is_known(name, options):
    router = make(name, options)
    x, tokens = make_tokens(30, padded=4)
    routing = router(x, tokens)
    router.window, router.window_complete = routing.load(6), True
    router.window_stats = {**routing.stats, "tokens": tokens.valid.sum()}
    losses = []
    for a, b in itertools.pairwise([0, 5, 20, 30]):  # each micro-batch on two ranks
        middle = (a + b + 9) // 10 * 5
        calls = [(x[i:j], rows(tokens, slice(i, j))) for i, j in ((a, middle), (middle, b))]
        losses += [r.loss for r in on_ranks(router, calls)]
    torch.testing.assert_close(sum(losses), routing.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(router, sum(losses)), gradient(router, routing.loss), rtol=1e-11, atol=1e-13)
