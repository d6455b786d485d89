"""Learning rates, worked out by hand."""

from __future__ import annotations

import math

import pytest

from moe.engines.schedule import learning_rate
from moe.engines.settings import Schedule


def rates(steps, **options):
    return [learning_rate(Schedule(**options), step, steps, 2.0) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak():
    assert rates(6, name="constant", warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_without_warm_up_the_first_step_has_the_peak():
    for name in ("constant", "cosine", "wsd"):
        assert rates(8, name=name)[0] == 2.0


def test_cosine_falls_from_the_peak_to_the_final_share():
    found = rates(7, name="cosine", warmup=2, final=0.5)
    half = math.sqrt(0.5)
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.5 + half / 2, 1.5, 1.5 - half / 2, 1.0])


def test_wsd_is_flat_and_then_decays_along_one_minus_the_root():
    found = rates(10, name="wsd", warmup=1, decay=0.5, final=0.0)
    assert found == pytest.approx([2.0] * 6 + [2 * (1 - math.sqrt(x)) for x in (0.25, 0.5, 0.75, 1.0)])


def test_a_decay_longer_than_the_run_begins_after_warm_up():
    found = rates(5, name="wsd", warmup=3, decay=1.0, final=0.0)
    assert found == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0, 0.0])


def test_past_the_end_the_rate_stays_at_its_final_value():
    assert learning_rate(Schedule(name="cosine", final=0.1), 100, 10, 2.0) == pytest.approx(0.2)
