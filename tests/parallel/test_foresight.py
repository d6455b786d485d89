"""When copies are chosen: for one call of a layer at its own loads, alike on every rank, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from moe.config import load
from moe.errors import ConfigError, RankMismatch
from moe.parallel.placement import Placement
from tests.engines.tiny_job import batch, engine
from tests.workers import run_ranks

HECATE = {"policy": "hecate", "copies": 2, "hidden": 3}


def asked(rank, world, chosen, accumulate):
    """Loads that the policy and the one for more copies were asked about in each of two steps, and rows of the second step."""
    job, found = engine(expert_ranks=2, copies={**HECATE, "chosen": chosen}, accumulate=accumulate, balance_window="running"), []
    policy, more = job.planner.policy, job.planner.more
    job.planner.policy = lambda question: (found[-1][0].append(question.load), policy(question))[1]
    job.planner.more = lambda question, holds: (found[-1][1].append(question.load), more(question, holds))[1]
    for step in range(2):
        found.append(([], []))
        job.step(batch(step, rank, world), step, 1e-2)
    return found, list(job.planner.seen)


@pytest.mark.parametrize("chosen", ["ahead", "after", "both"])
def test_policies_are_asked_once_a_step_or_once_a_call_about_the_loads_of_a_call(chosen):
    layers, parts = 2, 2
    ranks = run_ranks(2, asked, chosen, parts)
    (first, second), seen = ranks[0]
    each_call = {"ahead": 0, "after": 0, "both": 2}[chosen]
    # each rank is asked about its share of the layers when a step ends
    assert (len(first[0]), len(second[0])) == {"after": (layers * parts,) * 2}.get(chosen, (layers // 2,) * 2)
    assert (len(first[1]), len(second[1])) == (layers * each_call,) * 2
    if chosen == "ahead":
        assert np.array_equal([rank[0][0][0][0] for rank in ranks], seen[0] // parts)
        assert np.array_equal([rank[0][1][0][0] for rank in ranks], (seen[0] + seen[1]) // (2 * parts))
    calls = second[0] if chosen == "after" else second[1]
    for layer in range(layers if calls else 0):
        assert np.array_equal(sum(calls[layer::layers]), seen[1][layer])


def astray(rank, world, chosen, exchange):
    job = engine(expert_ranks=2, copies={**HECATE, "chosen": chosen}, exchange=exchange, machine_ranks=1)
    try:
        for step in range(2):
            if rank and chosen == "after":  # a policy that is no pure function
                job.planner.policy = lambda question: Placement(question.owner, np.ones_like(question.holds))
            job.planner.answer = None  # as after a change of owners
            if rank and step and chosen == "ahead":
                before = job.dispatchers[0].placement
                job.dispatchers[0].placement = before._replace(owner=before.owner[::-1].copy())
            job.step(batch(step, rank, world), step, 1e-2)
    except RankMismatch as error:
        return str(error)


@pytest.mark.parametrize(("chosen", "exchange"), [("ahead", "rows"), ("after", "rows"), ("after", "tokens")])
def test_ranks_that_would_send_each_other_other_copies_stop_before(chosen, exchange):
    told = "other owners of experts" if chosen == "ahead" else "another placement"
    assert all(told in said for said in run_ranks(2, astray, chosen, exchange))


def placed(rank, world):
    """Placements of each layer in each of three steps, on a rank whose own policy holds everything everywhere."""
    job, found = engine(expert_ranks=2, copies=HECATE, machine_ranks=1), []
    if rank:
        job.planner.policy = lambda question: Placement(question.owner, np.ones_like(question.holds))
    for step in range(3):
        job.step(batch(step, rank, world), step, 1e-2)
        found.append([layer.dispatcher.placement.holds.sum().item() for layer in job.planner.layers])
    return found


def test_each_layers_placement_is_chosen_by_one_rank_for_all():
    first, second = run_ranks(2, placed)
    assert first == second
    assert all(layers[1] == 2 * 6 for layers in first[1:])  # the second layer is the second rank's
    assert any(layers[0] < 2 * 6 for layers in first[1:])


def test_loads_are_not_waited_for_where_no_rank_may_wait():
    words = ["parallel.expert_ranks=2", "parallel.copies.policy=hecate", "parallel.exchange=fixed"]
    assert load([], [*words, "model.moe={router: top_k}"]).parallel.copies.chosen == "ahead"
    for chosen in ("after", "both"):
        with pytest.raises(ConfigError, match=r"choose parallel\.exchange=rows or tokens, or parallel.copies.chosen=ahead"):
            load([], [*words, f"parallel.copies.chosen={chosen}"])


def test_nothing_is_foreseen_where_copies_are_chosen_after_the_routers():
    words = ["parallel.expert_ranks=2", "parallel.copies.policy=hecate", "parallel.copies.chosen=after", "parallel.copies.window=3"]
    with pytest.raises(ConfigError, match=r"parallel\.copies\.window=3 has no effect with parallel.copies.chosen=after"):
        load([], words)


def test_settings_of_copies_that_nothing_reads_are_refused():
    words = ["parallel.expert_ranks=2", "parallel.copies.policy=cost", "parallel.copies.hidden=3"]
    with pytest.raises(ConfigError, match=r"parallel\.copies\.hidden=3 has no effect with parallel.copies.policy=cost"):
        load([], words)
    with pytest.raises(ConfigError, match=r"flex_moe goes on from the last step's copies.*choose parallel.copies.chosen=ahead"):
        load([], [words[0], "parallel.copies.policy=flex_moe", "parallel.copies.chosen=after"])


def priced(rank, world, recompute, again):
    job = engine(expert_ranks=2, copies={**HECATE, "rematerialise": again}, machine_ranks=1, recompute=recompute)
    return [price.again for price in job.planner.prices]


@pytest.mark.parametrize(("recompute", "again"), [("none", False), ("full", True), ("experts", False)])
def test_a_recomputed_block_is_priced_for_fetching_twice(recompute, again):
    assert run_ranks(2, priced, recompute, False)[0] == [again] * 2
    assert run_ranks(2, priced, recompute, True)[0] == [True] * 2


def after_a_skip(rank, world):
    """Of each layer, who holds what in the step after one that was not applied, and who should by what was seen before it."""
    job = engine(expert_ranks=2, copies={**HECATE, "window": 1}, machine_ranks=1)
    job.planner.policy, backward = by_loads, job.backward
    for step in range(2):
        job.step(batch(step, rank, world), step, 1e-2)
    job.backward = lambda loss: backward(loss * float("nan"))
    assert not job.step(batch(2, rank, world), 2, 1e-2).applied
    loads = [job.planner.last().tolist(), job.planner.seen[-1].tolist()]
    job.planner.adopt()
    questions = [job.planner.question(number, load) for number, load in enumerate(job.planner.seen[-1])]
    held = [layer.dispatcher.placement.holds.tolist() for layer in job.planner.layers]
    return loads, held, [by_loads(question).holds.tolist() for question in questions]


def by_loads(question):
    """Copies wherever an odd number of rows is."""
    return Placement(question.owner, (question.load % 2 == 1) | (np.arange(len(question.node))[:, None] == question.owner))


def test_what_was_chosen_while_a_step_was_not_applied_is_forgotten():
    for (skipped, seen), held, right in run_ranks(2, after_a_skip):
        assert skipped != seen
        assert held == right
