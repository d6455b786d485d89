"""Experts shared out over ranks train the model of one process: every engine, exchange, sharding and accumulation."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe.checkpoint.store import Store
from moe.errors import ConfigError
from tests.engines.test_reading_routers import AVG_K, Sparsest, built
from tests.engines.tiny_job import POSITIONS, VOCAB, apart, batch, difference, engine, mesh, train
from tests.routers.test_contract import CASES
from tests.workers import run_ranks

splittable = [case for case in CASES if case.values[1].get("balance_scope") != "micro"]
SGD_HERE = {"optimizer": "sgd", "clip": None}
ADAMW = {"optimizer": "adamw", "clip": 0.5, "lr": 1e-2}
SGD = {"optimizer": "sgd", "clip": None, "lr": 5e-2}


def curves(rank, world, cases, steps):
    runs = []
    for case in cases:
        options = dict(case)
        lr = options.pop("lr")
        runs.append(train(engine(**options), range(steps), lr))
    return runs if rank == 0 else None


def compare(world, cases, steps=4, tolerance=1e-10):
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


def for_the_model(options):
    """A hash router's table is over the model's tokens."""
    return {key: for_the_model(value) if key == "router" else VOCAB if key == "vocab" else value for key, value in options.items()}


def routed(rank, world, routers, options):
    return [train(engine(**router, **SGD_HERE, **options), range(2), 5e-2) for router in routers]


def routers_agree(cases):
    routers = [{"router": {"name": name, **for_the_model(options)}} for name, options in cases]
    alone = run_ranks(1, routed, routers, {}, timeout=300)[0]
    for options in ({"expert_ranks": 2}, {"expert_ranks": 2, "name": "fsdp2", "accumulate": 2, "exchange": "tokens"}):
        runs = run_ranks(2, routed, routers, options, timeout=300)[0]
        for router, one, run in zip(routers, alone, runs, strict=True):
            assert difference(run, one) < 1e-10, (router, options)


def test_every_router_trains_the_same_model_over_expert_ranks():
    routers_agree([case.values for case in splittable if case.id.endswith("-0")])


@pytest.mark.slow
def test_every_setting_of_every_router_trains_the_same_model_over_expert_ranks():
    routers_agree([case.values for case in splittable])


def reading(rank, world, options):
    """Routers that read experts, whose gradient has to reach those of other ranks too."""
    return [
        train(engine(built=built(kind), **SGD_HERE, **more), range(2), 5e-2)
        for kind in (AVG_K, Sparsest)
        for more in ({**options, "name": "ddp"}, {**options, "name": "fsdp2", "accumulate": 2})
    ]


def test_routers_that_read_experts_read_those_of_all_ranks():
    alone = run_ranks(1, reading, {})[0]
    for world, ranks in ((2, 2), (4, 2)):
        for run, one in zip(run_ranks(world, reading, {"expert_ranks": ranks})[0], alone, strict=True):
            assert difference(run, one) < 1e-10, world


def saved(rank, world, folder, options):
    job = engine(**options)
    train(job, range(2), 1e-2)
    Store(folder, mesh()).save(2, job.canonical_state(), {})
    return train(job, range(2, 3), 1e-2)


def resumed(rank, world, folder, options):
    job = engine(**options)
    job.evaluate(batch(99, rank, world), 0)
    state = job.canonical_state()
    Store(folder, mesh()).load(state)
    job.load_canonical(state)
    return train(job, range(2, 3), 1e-2)


def test_a_checkpoint_of_expert_ranks_goes_on_under_any_other_layout(tmp_path):
    # 12 experts: four ranks of three, two of six, or one of all
    layouts = [
        (4, {"expert_ranks": 4}),
        (2, {"expert_ranks": 2, "name": "fsdp2"}),
        (4, {"expert_ranks": 2, "name": "fsdp2", "replicas": 2}),
        (2, {"name": "fsdp2"}),
        (1, {}),
    ]
    for number, (world, options) in enumerate(layouts[:3]):
        folder = tmp_path / str(number)
        uninterrupted = run_ranks(world, saved, folder, {**options, "experts": 12})[0]
        for other, how in layouts if number == 0 else (layouts[number], layouts[-1]):
            run = run_ranks(other, resumed, folder, {**how, "experts": 12})[0]
            assert difference(run, uninterrupted) < (1e-30 if how == options else 1e-12), (options, how)


def overflowing(rank, world, room):
    job = engine(expert_ranks=2, exchange="fixed", room=room, **SGD_HERE)
    return train(job, range(4), 5e-2), job.evaluate(batch(50, rank, world), 0).loss.item()


def test_a_step_that_does_not_fit_its_buffers_is_run_again_exactly():
    (tight, loss), (roomy, expected) = (run_ranks(2, overflowing, room)[0] for room in (0.3, 2.0))
    assert difference(tight, roomy) < 1e-12
    assert abs(loss / expected - 1) < 1e-12


def predicted(rank, world, options):
    job = engine(**options)
    with torch.no_grad():
        return job.model.predict(batch(0).ids, last=POSITIONS)


def test_what_is_predicted_outside_of_steps_loses_nothing_to_small_buffers():
    alone = run_ranks(1, predicted, {})[0]
    for found in run_ranks(2, predicted, {"expert_ranks": 2, "exchange": "fixed", "room": 0.3}):
        assert apart(found, alone) < 1e-12


def narrow(rank, world):
    try:
        engine("fsdp2", expert_ranks=2, width=7)
    except ConfigError as error:
        return str(error)


def test_a_width_that_cannot_be_cut_is_refused():
    assert (
        "experts of width 7 cannot be cut over the 2 ranks that hold the same ones; choose model.moe.d_expert=8" in run_ranks(4, narrow)[0]
    )


def wrong(rank, world, mistake):
    """Mistakes that are known from other systems."""
    job = engine(expert_ranks=2, **{**SGD_HERE, "clip": 0.5 if mistake == "norm" else None})
    if mistake == "factor":
        learn = job._learn

        def doubled(*args):
            result = learn(*args)
            for bucket in job.lanes[1].buckets:
                bucket.sum.mul_(2)
            return result

        job._learn = doubled
    if mistake == "norm":
        counted = job.counted
        experts = {id(bucket.sum) for bucket in job.lanes[1].buckets}
        job.counted = lambda gradients: [g for g in counted(gradients) if id(g) not in experts]
    return train(job, range(3), 5e-2)


@pytest.mark.parametrize("mistake", ["factor", "norm"])
def test_the_comparison_sees_the_mistakes_of_other_systems(mistake):
    clip = {"clip": 0.5 if mistake == "norm" else None}
    alone = run_ranks(1, curves, [{**SGD, **clip, "momentum": 0.9}], 3)[0][0]
    assert difference(run_ranks(2, wrong, mistake)[0], alone) > 1e-3
