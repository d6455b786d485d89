"""Copies of experts that come and go change nothing that is learned: every engine, while the placement changes at every step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moe.checkpoint.store import Store
from moe.model.attention import Attention
from moe.parallel.collectives import recorded
from moe.parallel.placement import Placement
from tests.engines.test_expert_parallel import SGD_HERE, curves
from tests.engines.test_reading_routers import AVG_K, Sparsest, built
from tests.engines.tiny_job import batch, difference, engine, mesh, train
from tests.workers import run_ranks

ADAMW = {"optimizer": "adamw", "clip": 0.5, "lr": 1e-2}
SGD = {"optimizer": "sgd", "clip": None, "lr": 5e-2}
HECATE = {"policy": "hecate", "copies": 2, "hidden": 3, "window": 2}


def restless(question):
    """Another placement whenever the loads are others, empty and full ones among them."""
    draw = np.random.default_rng(int(question.load.sum()) + int(question.load[0, 0]))
    holds = draw.random((len(question.node), len(question.owner))) < draw.choice([0.0, 0.5, 1.0], len(question.owner))
    holds[question.owner, np.arange(len(question.owner))] = True
    return Placement(question.owner, holds)


def some(question, holds, **_):
    """A random part of what is missing."""
    draw = np.random.default_rng(int(question.load[0, 0]) + int(question.load[-1, -1]))
    return Placement(question.owner, holds | (draw.random(holds.shape) < 0.5))


def note(dispatcher, placements):
    """Remember with what placements rows are sent."""
    tell = dispatcher.tell

    def noted(counts):
        placements.add(dispatcher.now.digest)
        return tell(counts)

    dispatcher.tell = noted


def moving(rank, world, cases, steps):
    runs, placements = [], set()
    for case in cases:
        options = dict(case)
        lr = options.pop("lr")
        job = engine(**options)
        job.planner.policy, job.planner.more = restless, some
        for dispatcher in job.dispatchers:
            note(dispatcher, placements)
        runs.append(train(job, range(steps), lr))
    return runs, len(placements)


@pytest.mark.parametrize("world", [2, 4])
def test_placements_that_change_at_every_step_train_the_model_of_one_process(world):
    reference = dict(zip(("adamw", "sgd"), run_ranks(1, curves, [dict(ADAMW), dict(SGD)], 4)[0], strict=True))
    cases = []
    for number, (name, again) in enumerate(itertools.product(("ddp", "fsdp2"), (False, True))):
        rule = (ADAMW, SGD)[number % 2]
        more = ({}, {"accumulate": 2, "exchange": "tokens"}, {"recompute": "full"}, {"accumulate": 2})[number]
        cases.append({**rule, **more, "name": name, "expert_ranks": 2, "copies": {**HECATE, "rematerialise": again}, "machine_ranks": 1})
    runs, placements = run_ranks(world, moving, cases, 4, timeout=240)[0]
    assert placements > 10
    for case, run in zip(cases, runs, strict=True):
        assert difference(run, reference[case["optimizer"]]) < 1e-10, case


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_placements_chosen_after_the_routers_train_the_model_of_one_process(world):
    reference = dict(zip(("adamw", "sgd"), run_ranks(1, curves, [dict(ADAMW), dict(SGD)], 4)[0], strict=True))
    ways = ({"accumulate": 2}, {"exchange": "tokens"}, {"recompute": "full"}, {"recompute": "experts", "accumulate": 2})
    cases = []
    for number, (name, again, chosen) in enumerate(itertools.product(("ddp", "fsdp2"), (False, True), ("after", "both"))):
        rule, more = (ADAMW, SGD)[number % 2], ways[number // 2]
        copies = {"policy": "hecate", "copies": 2, "hidden": 3, "rematerialise": again, "chosen": chosen}
        cases.append({**rule, **more, "name": name, "expert_ranks": 2, "copies": copies, "machine_ranks": 1})
    runs, placements = run_ranks(world, moving, cases, 4, timeout=240)[0]
    assert placements > 30
    for case, run in zip(cases, runs, strict=True):
        assert difference(run, reference[case["optimizer"]]) < 1e-10, case


@pytest.mark.slow
def test_forty_steps_of_adam_are_those_of_one_process_whenever_copies_are_chosen():
    alone = run_ranks(1, curves, [dict(ADAMW)], 40)[0][0]
    copies = [{"policy": "hecate", "copies": 2, "hidden": 3, "rematerialise": again} for again in (False, True)]
    ways = itertools.product(("ddp", "fsdp2"), copies, ("ahead", "after", "both"))
    cases = [{**ADAMW, "name": name, "expert_ranks": 2, "copies": {**c, "chosen": chosen}, "machine_ranks": 1} for name, c, chosen in ways]
    for case, run in zip(cases, run_ranks(2, moving, cases, 40, timeout=500)[0][0], strict=True):
        assert difference(run, alone) < 1e-9, case


def over_four(rank, world, copies):
    return [
        train(engine(name, expert_ranks=4, experts=8, copies=copies, machine_ranks=2, **SGD_HERE), range(5), 5e-2)
        for name in ("ddp", "fsdp2")
    ]


@pytest.mark.parametrize("relay", [False, True])
def test_copies_between_machines_train_the_model_of_one_process(relay):
    alone, _ = run_ranks(1, eight, {})[0]
    for run in run_ranks(4, over_four, {**HECATE, "relay": relay, "rematerialise": relay})[0]:
        assert difference(run, alone) < 1e-10


def eight(rank, world, options):
    return [train(engine(experts=8, **SGD_HERE, **options), range(5), 5e-2)] * 2


def sent_before_attention(rank, world):
    """How often copies were sent for when each layer's attention begins."""
    job, found = engine(expert_ranks=2, copies=HECATE, machine_ranks=1), []
    job.step(batch(0, rank, world), 0, 1e-2)
    job.planner.adopt()
    with recorded() as ledger:
        for module in job.model.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(lambda *_: found.append([sent.kind for sent in ledger].count("experts")))
        job.forward(batch(1, rank, world), 1)
    return found


def test_copies_are_on_their_way_while_attention_computes():
    assert run_ranks(2, sent_before_attention) == [[1, 2]] * 2


def kinds(rank, world, policy, **options):
    """What travels in a step, in order: forward, and backward."""
    job = engine(expert_ranks=world, copies=HECATE, **options)
    job.planner.policy = policy or job.planner.policy
    job.step(batch(0, rank, world), 0, 1e-2)
    job.planner.adopt()
    with recorded() as ledger:
        out = job.forward(batch(1, rank, world), 1)
        forward = len(ledger)
        with job.accumulating(last=False):
            job.backward(out.loss)
    of = [sent.kind for sent in ledger]
    return [[kind for kind in part if kind in ("experts", "counts", "tokens", "gradients")] for part in (of[:forward], of[forward:])]


def test_tokens_go_before_gradients_of_copies():
    forward, backward = run_ranks(2, between_two)[0]
    assert forward == ["experts", "counts", "tokens", "tokens", "tokens"] * 2  # vectors and weights of rows, and home
    assert backward == ["tokens", "tokens", "tokens", "gradients"] * 2


def between_two(rank, world):
    return kinds(rank, world, None, machine_ranks=1)


def everywhere(question):
    return Placement(question.owner, np.ones_like(question.holds))


def between_machines(rank, world):
    return kinds(rank, world, everywhere, experts=8, machine_ranks=2)


def test_second_hops_set_out_beside_tokens():
    forward, _ = run_ranks(4, between_machines)[0]
    assert forward == ["experts", "counts", "experts", "tokens", "tokens", "tokens"] * 2


def reading(rank, world, options):
    return [train(engine(built=built(kind), **SGD_HERE, **options), range(3), 5e-2) for kind in (AVG_K, Sparsest)]


def test_routers_that_read_experts_read_their_owners():
    alone = run_ranks(1, reading, {})[0]
    for name in ("ddp", "fsdp2"):
        for run, one in zip(run_ranks(2, reading, {"name": name, "expert_ranks": 2, "copies": HECATE})[0], alone, strict=True):
            assert difference(run, one) < 1e-10


def sticky(question):
    """Half of the copies of the step before, and as many others."""
    draw = np.random.default_rng(int(question.load.sum()) + int(question.holds.sum()))
    holds = (question.holds & (draw.random(question.holds.shape) < 0.5)) | (draw.random(question.holds.shape) < 0.2)
    holds[question.owner, np.arange(len(question.owner))] = True
    return Placement(question.owner, holds)


def begun(options):
    job = engine(**options)
    if job.planner is not None and options.get("name") == "fsdp2":
        job.planner.policy = sticky
    return job


def saved(rank, world, folder, options):
    job = begun(options)
    train(job, range(3), 1e-2)
    Store(folder, mesh()).save(3, job.canonical_state(), {"foresight": job.foresight()})
    return train(job, range(3, 5), 1e-2), [dispatcher.placement.digest for dispatcher in job.dispatchers]


def resumed(rank, world, folder, options):
    job = begun(options)
    state = job.canonical_state()
    scalars = Store(folder, mesh()).load(state)
    job.load_canonical(state)
    job.foresee(scalars["foresight"])
    return train(job, range(3, 5), 1e-2), [dispatcher.placement.digest for dispatcher in job.dispatchers]


MOVING = {"expert_ranks": 2, "copies": HECATE, "machine_ranks": 1}


@pytest.mark.parametrize(("ranks", "name"), [(2, "ddp"), (4, "fsdp2")])
def test_a_run_goes_on_bit_for_bit_with_its_copies_and_within_rounding_without(tmp_path, ranks, name):
    before = run_ranks(ranks, saved, tmp_path, {**MOVING, "name": name})
    after = run_ranks(ranks, resumed, tmp_path, {**MOVING, "name": name})
    assert [placements for _, placements in after] == [placements for _, placements in before]
    assert difference(after[0][0], before[0][0]) == 0
    others = ((2, {"expert_ranks": 2}), (1, {}), (4, {**MOVING, "name": "fsdp2"})) if name == "ddp" else ((2, MOVING),)
    for world, options in others:
        assert difference(run_ranks(world, resumed, tmp_path, options)[0][0], before[0][0]) < 1e-12
