"""Experts shared out over ranks train the model of one process: every engine, exchange, sharding and accumulation."""

from __future__ import annotations

import itertools

from tests.engines.tiny_job import difference, engine, train
from tests.workers import run_ranks

ADAMW = {"optimizer": "adamw", "clip": 0.5, "lr": 1e-2}
SGD = {"optimizer": "sgd", "clip": None, "lr": 5e-2}


def curves(rank, world, cases, steps):
    runs = []
    for case in cases:
        options = dict(case)
        lr = options.pop("lr")
        runs.append(train(engine(**options), range(steps), lr))
    return runs if rank == 0 else None


def compare(world, cases, steps=8, tolerance=1e-10):
    alone = run_ranks(1, curves, [dict(rule) for rule in (ADAMW, SGD)], steps)[0]
    reference = dict(zip(("adamw", "sgd"), alone, strict=True))
    for case, run in zip(cases, run_ranks(world, curves, cases, steps, timeout=240)[0], strict=True):
        assert difference(run, reference[case["optimizer"]]) < tolerance, case


def test_two_expert_ranks_train_the_model_of_one_process():
    kinds = itertools.product(("ddp", "fsdp2"), ("rows", "tokens", "fixed"))
    compare(2, [{**(ADAMW, SGD)[i % 2], "name": name, "exchange": how, "expert_ranks": 2} for i, (name, how) in enumerate(kinds)])


def test_four_ranks_of_two_expert_ranks_train_the_model_of_one_process():
    cases = [
        {**ADAMW, "name": "ddp", "accumulate": 2},
        {**SGD, "name": "fsdp2", "accumulate": 2, "recompute": "full"},
        {**SGD, "name": "fsdp2", "replicas": 2, "exchange": "tokens"},
    ]
    compare(4, [{**case, "expert_ranks": 2} for case in cases])
