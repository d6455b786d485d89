"""A router that wraps another and learns a permutation beside it: engines and ranks agree, and stops do not show."""

from __future__ import annotations

import torch

from tests.engines.tiny_job import difference, engine, model, train, whole
from tests.workers import run_ranks

COMET = {"name": "comet", "gamma": 4.0, "entropy_loss": 0.05}
TOP_K = {"name": "top_k", "k": 2, "balance_loss": 0.05, "bias_rate": 1e-2}
SEARCH = {"name": "local_search", "steps": 3, "temperature_start": 0.1, "temperature_end": 0.03, "entropy_loss": 1e-2}
ROUTERS = [{**SEARCH, "router": COMET}, {**SEARCH, "router": TOP_K}, {"name": "dselect_k", "gamma": 4.0, "entropy_loss": 0.05}]


def curves(rank, world, cases):
    return [
        train(engine(name, built=model(router=router), optimizer="sgd", clip=None, **more), range(5), 5e-2) for router, name, more in cases
    ]


def test_two_ranks_of_either_engine_train_the_model_of_one():
    alone = run_ranks(1, curves, [(router, "ddp", {}) for router in ROUTERS])[0]
    for run in alone[:2]:
        order = run.state["model.layers.0.moe.router.permutation"]
        assert order.sort().values.tolist() == list(range(6))
        assert order.tolist() != list(range(6))
    cases = [(router, name, {}) for name in ("ddp", "fsdp2") for router in ROUTERS]
    ranks = run_ranks(2, curves, cases)
    for runs in ranks:
        for run, one in zip(runs, [*alone, *alone], strict=True):
            assert difference(run, one) < 1e-9


def stopped_and_gone_on(rank, world, router):
    """The same five steps straight, and with another engine taking over in the middle of the search."""
    straight = train(engine("ddp", built=model(router=router)), range(5), 1e-2)
    first, second = engine("ddp", built=model(router=router)), engine("fsdp2", built=model(router=router))
    train(first, range(2), 1e-2)
    second.load_canonical(whole(first.canonical_state()))
    return straight, train(second, range(2, 5), 1e-2)


def test_a_search_goes_on_where_it_was_stopped():
    straight, gone_on = run_ranks(2, stopped_and_gone_on, ROUTERS[0])[0]
    assert torch.equal(straight.state["model.layers.1.moe.router.permutation"], gone_on.state["model.layers.1.moe.router.permutation"])
    assert all((straight.state[name] - gone_on.state[name]).abs().max() < 1e-9 for name in straight.state)
