"""Whether experts help, from the runs alone: four answers, and what may make them wrong."""

from __future__ import annotations

import numpy as np

from moe.scaling.model_selection import Fits, columns, noise_of
from moe.scaling.moe_vs_dense import beyond, floor_of, gains, helps, largest, swept
from tests.scaling.planted import TRUTH, row, rows

FLAT = {**TRUTH, "delta": 0.0, "gamma": 0.0, "omega": 0.0, "zeta": 0.0}  # experts do nothing


def made(every):
    """What gains look at; no law is fitted."""
    fitted, x, loss = columns(every)
    return Fits(every, fitted, x, loss, np.zeros(len(loss), bool), noise_of(fitted), {}, {}, None, {})


def times(every, factor, when):
    return [one._replace(loss=one.loss * factor) if when(one) else one for one in every]


def test_experts_that_help_do():
    fits = made(rows())
    assert len(gains(fits)) == 48
    text = " ".join(helps(fits))
    assert text.startswith("Experts help at fixed active FLOPs: 16 experts, top-1, granularity 1 (mean of 4 widths, 32M tokens): 0.1")
    assert "noise of one run 0.45% of the loss, from 6 runs of 2 places" in text


def test_two_seeds_are_enough_for_what_is_plain():
    assert helps(made(rows(seeds=2)))[0].startswith("Experts help")


def test_experts_that_do_nothing_leave_it_open_and_the_power_is_said():
    fits = made(rows(values=FLAT))
    text = helps(fits)[0]
    assert text.startswith("Whether experts help at fixed active FLOPs is open: at best ")
    assert " may be chance; noise of one run" in text
    assert not any(beyond(gains(fits), floor_of(fits)))


def test_useless_experts_look_useful_in_one_study_of_forty():
    chance, found = np.random.default_rng(0), 0
    at = [(one, one.axes) for one in rows(values=FLAT, noise=0)]
    for _ in range(200):
        every = [one._replace(loss=one.loss * float(np.exp(chance.normal(0, 0.003)))) for one, _ in at]
        found += helps(made(every))[0].startswith("Experts help")
    assert found <= 10


def test_experts_that_cost_are_said_to():
    text = " ".join(helps(made(times(rows(values=FLAT, seeds=6), 1.05, lambda one: one.experts > 1))))
    assert "Experts cost at fixed active FLOPs, even the best of the largest ones" in text
    assert "nats more than dense" in text
    assert "0 of 48 pairs of equal FLOPs and tokens are better and 48 worse" in text


def test_a_dense_model_whose_rate_was_wrong_does_not_win_the_argument_for_experts():
    every = rows(widths=(64, 96, 128))
    level = [one for one in every if one.axes["lr_factor"] == 1]
    ends = [one for one in every if one.axes["lr_factor"] != 1]
    better = times(level + ends, 0.8, lambda one: one.experts == 1 and one.axes["lr_factor"] == 2)
    fits = made(better)
    found = swept(fits, floor_of(fits))
    assert found.best.nats < found.rule.nats - 0.1
    text = " ".join(helps(made(better)))
    assert "is open, as the learning rate may make the difference" in text
    assert "Each at its best of the rates tried, 16 experts" in text
    assert "Learning rates were not swept" in " ".join(helps(made(level)))


def test_a_rule_of_equal_flops_takes_a_few_tokens_from_a_mixture():
    every = [one._replace(tokens=int(one.tokens * 0.99)) if one.experts > 1 else one for one in rows()]
    assert len(gains(made(every))) == 48
    assert not gains(made([one._replace(tokens=one.tokens // 2) if one.experts > 1 else one for one in rows()]))


def test_a_run_that_stands_twice_is_no_second_seed():
    once = [one for one in rows(seeds=1) if one.axes["lr_factor"] == 1]
    twice = [*once, *(one._replace(id=f"again{one.id}") for one in once)]
    assert not made(twice).noise.known
    assert "the noise is unknown; add seeds" in helps(made(twice))[0]


def test_other_routers_stand_beside_and_what_was_lost_is_said():
    every = rows()
    hashed = [one._replace(id=f"h{one.id}", axes=one.axes | {"router": "hash"}) for one in every if one.experts == 4]
    bad = [one._replace(id=f"b{one.id}", status="diverged", loss=None) for one in every if one.experts == 8][:3]
    fits = made([*every, *hashed, *bad])
    assert {gain.router for gain in gains(fits)} == {"top_k", "hash"}
    text = " ".join(helps(fits))
    assert f"fitted without the {len(fits.beside)} runs of other routers (hash)" in text
    assert "3 of the study's runs did not end well (8 experts, top-1, granularity 1)" in text


def test_the_reason_is_looked_for_in_the_runs():
    idle = [one._replace(health=one.health | {"unused_experts": float(one.experts * one.axes["layers"] // 2)}) for one in rows(values=FLAT)]
    assert "50% of a model's experts got no token" in " ".join(helps(made(idle)))
    short = [one._replace(tokens=one.tokens // 100) for one in rows(values=FLAT)]
    assert "too few to fill their experts" in " ".join(helps(made(short)))


def test_runs_of_one_seed_are_compared_with_each_other():
    """A seed that does 5 % to all runs alike hides nothing."""
    chance = np.random.default_rng(0)
    every = rows(seeds=4, noise=0)
    shared = {seed: float(np.exp(chance.normal(0, 0.05))) for seed in range(4)}
    moved = [one._replace(loss=one.loss * shared[one.axes["seed"]] * float(np.exp(chance.normal(0, 0.001)))) for one in every]
    ends = [row(64, e, 2e6, seed=s)._replace(id=f"x{e}{s}") for e in (1, 16) for s in range(1, 4)]
    ends = [one._replace(loss=one.loss * shared[one.axes["seed"]] * float(np.exp(chance.normal(0, 0.001)))) for one in ends]
    fits = made([*moved, *ends])
    assert fits.noise.relative > 0.01
    floor = floor_of(fits)
    assert (floor.paired, floor.freedom, floor.places) == (True, 6, 2)
    assert floor.relative < 0.002
    assert helps(fits)[0].startswith("Experts help")


def test_widths_are_taken_together_each_at_its_largest():
    found = largest(gains(made(rows())))
    assert {gain.width for gain in found} == {"mean of 4 widths"}
    one = next(gain for gain in found if gain.choice.experts == 16)
    each = [gain for gain in gains(made(rows())) if gain.choice.experts == 16 and gain.tokens == 32_000_000]
    assert one.nats == np.mean([gain.nats for gain in each])
    assert one.error < max(gain.error for gain in each) / 1.9


def test_the_bar_rises_with_pairs_and_falls_with_seeds():
    few, many = (floor_of(made(rows(seeds=seeds))) for seeds in (2, 6))
    assert few.bar(4) > many.bar(4) > 2
    assert many.bar(40) > many.bar(4)
