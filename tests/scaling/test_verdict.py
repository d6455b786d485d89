"""What a study concludes: the planted optimum, in words, or why nothing can be concluded."""

from __future__ import annotations

import pytest

from moe.scaling.compute_optimal import Budget, Choice, dense_multiple, optimum
from moe.scaling.laws import LUDZIEJEWSKI
from moe.scaling.model_selection import compare
from moe.scaling.size_family import family
from moe.scaling.verdict import conclude
from tests.scaling.planted import TRUTH, rows

FLAT = {**TRUTH, "delta": 0.0, "gamma": 0.0, "omega": 0.0, "zeta": 0.0}  # experts do nothing


def test_the_planted_optimum_is_found(fits):
    verdict, line = conclude(fits, 1e15), family(fits.rows)
    truth = optimum(LUDZIEJEWSKI, TRUTH, Budget(1e15), Choice(16), line)
    assert not verdict.refused
    assert verdict.answer.choice.experts == 16
    assert verdict.answer.active == pytest.approx(truth.active, rel=0.2)
    assert abs(verdict.answer.loss - truth.loss) < verdict.half
    assert verdict.half < 0.02 * truth.loss
    times = dense_multiple(LUDZIEJEWSKI, TRUTH, Budget(1e15), truth.loss, line)
    assert verdict.dense[0] == pytest.approx(times, rel=0.15)
    assert 0.8 * verdict.dense[0] < verdict.dense[1] < times < verdict.dense[2] < 1.25 * verdict.dense[0]
    assert verdict.won[verdict.answer.choice] > 0.9


def test_the_sentence_says_everything(fits):
    verdict = conclude(fits, 1e15, 40e6)
    first, text = verdict.sentences[0], " ".join(verdict.sentences)
    assert first.startswith("For 1e15 FLOPs and at most 40 MB of weights: 16 experts, top-1, granularity 1, N_active = ")
    for part in ("D = ", "tokens; predicted loss ", " ± ", " (19 of 20 runs); dense would need ", "x the compute ("):
        assert part in first
    assert "an extrapolation, beyond the runs of its kind" in text
    assert "in tokens" in text
    assert "the optimum may lie further" in text
    assert verdict.answer.total * 2 <= 40e6 * 1.001


def test_a_memory_decides_how_many_experts(fits):
    tight = conclude(fits, 1e16, 16e6)
    assert 1 < tight.answer.choice.experts < 16
    assert tight.answer.limit == "memory"
    assert "The memory keeps the model from being larger" in " ".join(tight.sentences)
    assert conclude(fits, 1e16, 16e6, weight_bytes=4).answer.total == pytest.approx(4e6, rel=1e-3)


def test_the_largest_run_is_asked_for_where_nothing_is_said(fits):
    verdict = conclude(fits)
    assert verdict.question == f"For {fits.x['flops'].max():.3g} FLOPs".replace("e+", "e")
    assert verdict.further["FLOPs"] == 1


def test_nothing_is_concluded_far_beyond_the_runs(fits):
    verdict = conclude(fits, 1e20)
    assert any("further than 100x no law is followed" in reason for reason in verdict.refused)
    assert not verdict.sentences


@pytest.mark.slow
def test_nothing_is_concluded_where_runs_do_not_identify_a_law():
    noisy = conclude(compare(rows(noise=0.15), draws=20), 1e15)
    assert noisy.refused
    assert any("would do" in reason or "open" in reason or "out of the range" in reason for reason in noisy.refused)
    few = conclude(compare(rows(tokens=(2e6, 8e6)), draws=20), 1e15)
    assert "no law could be fitted" in few.refused[0]
    assert "2 of tokens" in few.refused[0]


def test_no_choice_is_made_by_a_law_that_is_blind_to_it():
    few = compare(rows(experts=(1, 4)), draws=20)
    verdict = conclude(few, 1e15)
    assert few.best in ("chinchilla", "krajewski")
    assert verdict.refused[0].startswith("the runs differ in experts, which is nothing to the law chinchilla")
    assert "2 of experts" in verdict.refused[0]
    assert not verdict.answers


def test_a_memory_that_holds_no_model_is_a_reason(fits):
    assert "raise" in conclude(fits, 1e15, 1e4).refused[0]


def test_an_answer_of_a_kind_that_did_not_run_so_large_is_an_extrapolation():
    made = [one for one in rows() if one.experts < 16 or one.axes["d_model"] < 128]
    verdict = conclude(compare(made, draws=20), 3e15)
    if verdict.answer.choice.experts == 16:
        assert verdict.further["active parameters"] > 2
        assert "beyond the runs of its kind" in " ".join(verdict.sentences) + " ".join(verdict.refused)
    else:
        assert verdict.further["FLOPs"] > 1


def test_without_dense_runs_nothing_is_said_of_dense_ones():
    verdict = conclude(compare(rows(experts=(2, 4, 8, 16)), draws=20), 1e15)
    assert verdict.answers
    assert verdict.dense is None
    assert "dense would need" not in " ".join(verdict.sentences)


@pytest.mark.slow
def test_useless_experts_save_nothing():
    verdict = conclude(compare(rows(values=FLAT), draws=20), 1e15)
    assert verdict.refused or verdict.dense is None or verdict.dense[0] < 1.1
