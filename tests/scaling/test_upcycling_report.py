"""The page of a study whose runs begin with dense models, of rows whose truth is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.errors import DataError
from moe.scaling import upcycling_report
from moe.scaling.laws import CHINCHILLA, JOURNEY
from moe.scaling.results import append
from moe.scaling.speeds import SPEEDS, read
from moe.scaling.upcycling_report import CONTINUED, SCRATCH, comparisons, one_law, page_of, verdict
from tests.pages.browser import look, needs_browser, said
from tests.pages.test_page import MARKS, check_figures
from tests.scaling.planted import row

GAIN = {CONTINUED: 0.0, "copy": 0.02, SCRATCH: -0.3}
DENSE = 1_000_000
RATES = {"read": 5000, "write 1": 400, "write 8": 1600, "write 64": 4000}


def one(arm, experts, more, seed, bits, width=64, **changed):
    """A run of so many dense models' FLOPs more."""
    twin, name = row(width, 1, DENSE), f"{width}-{arm}-{experts}-{more}-{seed}"
    axes = {"d_model": width, "layers": 4, "heads": 4, "d_ff": 192, "experts": experts, "top_k": min(2, experts), "granularity": 1,
            "router": "top_k" if experts > 1 else "dense", "tokens": round(more * DENSE), "seed": seed, "lr_factor": 1.0}  # fmt: skip
    axes |= {} if arm in (SCRATCH, "twin") else {"begin": arm, "dense": DENSE}
    flops = twin.flops * (more if arm in (SCRATCH, "twin") else 1 + more)
    tokens = round(more * DENSE) + DENSE * (arm not in (SCRATCH, "twin"))
    sizes = {"experts": experts, "total": 10**6 * experts, "active": 10**6 * min(2, experts)}
    return twin._replace(**{**sizes, "id": name, "axes": axes, "tokens": tokens, "flops": flops, "bits_per_byte": bits, **changed})


def rows(**changed):
    """Copying gains 0.02 bits a budget, from scratch loses; seeds are far apart, but alike for all arms."""
    chance, made = np.random.default_rng(0), []
    for seed in range(3):
        made.append(one("twin", 1, 1.0, seed, 2.5, **changed))
        for more in (0.5, 1.0, 2.0):
            common = 2.0 - 0.1 * more + 0.2 * seed
            for arm, gain in GAIN.items():
                bits = common - gain * more + chance.normal(0, 1e-3)
                made.append(one(arm, 1 if arm == CONTINUED else 4, more * (1.01 if arm == "copy" else 1), seed, bits, **changed))
    return made


def timed(width=64):
    family = {"d_model": width, "layers": 4, "heads": 4, "d_ff": 192}
    models = {"dense": 1.0, "4 experts top-2": 0.5}
    return family, {name: {kind: [rate * speed] * 3 for kind, rate in RATES.items()} for name, speed in models.items()}


def test_gains_are_taken_seed_by_seed_at_equal_extra_flops_and_costs_stand_beside_them():
    [study] = comparisons(rows(), timed())
    assert study.arms == [CONTINUED, "copy", SCRATCH]
    assert study.budgets == [0.5, 1.0, 2.0]
    gain = study.gain("copy", 2.0)
    assert gain.value == pytest.approx(0.04, abs=0.003)
    assert gain.error < 0.002  # the seeds themselves are 0.2 apart
    sentence = verdict(study, 2.0)
    assert sentence.startswith("After 2x the dense model's FLOPs more, copy is 0.0")
    assert sentence.endswith("it writes 0.50x as fast at batch 1, 0.50x as fast at batch 8, 0.50x as fast at batch 64.")


def test_where_nothing_is_gained_it_says_so():
    [study] = comparisons([row for row in rows() if row.begin != "copy"], None)
    assert "nothing beats training the dense model on: the best, from scratch, is 0." in verdict(study, 1.0)
    [study] = comparisons([row for row in rows() if row.experts == 1], None)
    assert verdict(study, 1.0).endswith("nothing stands beside the dense model trained on.")


def test_one_seed_tells_no_chance():
    [study] = comparisons([row for row in rows() if row.axes["seed"] == 0], None)
    assert "whether anything beats training the dense model on cannot be told with 1 seed: the best, copy, is 0.0" in verdict(study, 2.0)
    assert "±" not in verdict(study, 2.0)
    assert "add axes.seed" in page_of("study", [run.row for run in study.runs] + [rows()[0]], None).sections[0].words[0]


def chances(seeds, chance, arms=3):
    """A study in which nothing gains: what a seed does to a run is the same at all budgets but for a little."""
    made = []
    for seed in range(seeds):
        made.append(one("twin", 1, 1.0, seed, 2.5))
        for arm in (CONTINUED, *(f"way {number}" for number in range(arms))):
            luck = chance.normal(0, 0.01)
            budgets = (0.5, 1.0, 2.0)
            made += [one(arm, 1 if arm == CONTINUED else 4, more, seed, 2 + luck + chance.normal(0, 0.003)) for more in budgets]
    return made


@pytest.mark.parametrize("seeds", [2, 3])
def test_chance_gains_nothing(seeds):
    chance, claims = np.random.default_rng(0), 0
    for _ in range(60):
        [study] = comparisons(chances(seeds, chance), None)
        claims += any("cannot be told" not in verdict(study, budget) for budget in study.budgets)
    assert claims <= 3


def test_what_is_pooled_is_every_difference_and_a_trunk_counts_once():
    made = [row for row in rows() if row.begin != "copy" or row.axes["seed"] < 2]
    [study] = comparisons(made, None)
    differences = [study.differences(arm, budget) for arm in ("copy", SCRATCH) for budget in study.budgets]
    assert [len(one) for one in differences] == [2, 2, 2, 3, 3, 3]
    pooled = sum(np.var(one) * len(one) for one in differences) / 9
    assert study.chance.deviation == pytest.approx(pooled**0.5)
    assert (study.chance.freedom, study.chance.pairs) == (3, 6)
    assert study.gain("copy", 1.0).error == pytest.approx((pooled / 2) ** 0.5)
    words = page_of("study", [run._replace(trunk="t") for run in made], None).sections[0].words
    assert "pooled over all 6 pairs" in words[0]
    assert words[1] == "The budgets of a way are cool-downs of one trunk a seed: that several agree confirms nothing."


def test_of_two_runs_near_a_budget_the_nearer_counts_and_an_arm_with_every_seed_comes_first():
    beside = [one("copy", 4, 1.05, seed, 1.0) for seed in range(3)]
    for made in ([*rows(), *beside], [*beside, *rows()]):
        [study] = comparisons(made, None)
        assert study.gain("copy", 1.0).value == pytest.approx(0.02, abs=0.003)
    [study] = comparisons([*rows(), one("drop", 4, 1.0, 0, 1.0)], None)
    assert ", copy is 0.0" in verdict(study, 1.0)


def test_runs_that_spent_what_no_continued_dense_model_did_are_left_out_and_counted():
    made = [*rows(), one("copy", 4, 1.4, 0, 0.1), one("noise std=0.1", 4, 2.0, 0, 1.0, status="failed", bits_per_byte=None)]
    [study] = comparisons(made, None)
    assert study.apart == 1
    page = page_of("study", made, None)
    assert "1 run is left out that took extra FLOPs that no continued dense model spent" in page.sections[0].words[1]
    assert "How fast these models are was not measured" in page.sections[1].words[0]
    assert study.gain("copy", 1.0).value == pytest.approx(0.02, abs=0.003)


def test_arms_of_several_shapes_and_families_stand_apart():
    made = [*rows(), *(one("copy", 8, 1.0, seed, 1.5) for seed in range(3)), *rows(width=96)]
    first, second = comparisons(made, timed(96))
    assert first.arms == [CONTINUED, "copy, 4 experts top-2", "copy, 8 experts top-2", SCRATCH]
    assert first.gain("copy, 8 experts top-2", 1.0).value == pytest.approx(0.6, abs=0.01)
    assert second.arms == [CONTINUED, "copy", SCRATCH]
    assert (first.batches, second.batches) == ([], [1, 8, 64])
    words = page_of("study", [*rows(), one("copy", 8, 1.0, 0, 1.5)], timed()).sections[1].words
    assert words[0].endswith("Not among them, as they were not there to begin with: 8 experts top-2.")
    names = [figure.name for section in page_of("study", made, timed(96)).sections for figure in section.figures]
    assert len(names) == len(set(names)) == 2 + 4


def test_without_a_continued_dense_model_nothing_is_compared():
    page = page_of("study", [row for row in rows() if row.begin != CONTINUED], None)
    assert page.refused
    assert "no dense model that was trained on is done" in page.answer[0]


def test_one_law_for_all_runs_is_the_one_that_made_them():
    values = {"A": 400.0, "B": 900.0, "E": 1.2, "alpha": 0.35, "beta": 0.37}
    made = []
    for width in (64, 96, 128, 192):
        for tokens in (2e6, 8e6, 32e6):
            dense = row(width, 1, tokens)
            for average in (dense.active, 1.5 * dense.active, 1.9 * dense.active):
                x = {"average": np.array([average]), "tokens": np.array([tokens])}
                active = dense.active if average == dense.active else 2 * dense.active
                loss = float(JOURNEY.loss(values, x)[0])
                axes = dense.axes | ({"begin": "copy"} if average > dense.active else {})
                made.append(dense._replace(id=f"{width}-{tokens}-{average}", active=active, average=average, loss=loss, axes=axes))
    [sentence] = one_law(made)
    assert sentence.endswith("the average is nearer.")
    [sentence] = one_law([one._replace(average=one.active) for one in made])
    assert "No law was fitted to all 36 runs" in sentence
    assert "as no run changes its size" in sentence


def test_laws_that_describe_runs_alike_are_not_told_apart(monkeypatch):
    found = {law.name: SimpleNamespace(aicc=aicc, spread=0.01) for law, aicc in ((JOURNEY, -101.5), (CHINCHILLA, -100.0))}
    monkeypatch.setattr(upcycling_report, "why_not", lambda *_: None)
    monkeypatch.setattr(upcycling_report, "fit", lambda law, *_: found[law.name])
    assert one_law(rows())[0].endswith("which is nearer cannot be told.")


def test_a_study_of_which_nothing_is_done_has_a_page(tmp_path):
    for made in rows():
        append(tmp_path, made._replace(status="failed", why="it was", loss=None, bits_per_byte=None))
    done = CliRunner().invoke(app, ["study", "report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Nothing can be compared" in done.output
    assert "No law was fitted, as no run is done." in (tmp_path / "report.md").read_text()


def test_a_page_says_what_its_comparisons_leave_out():
    sections = page_of("study", rows(), timed()).sections
    assert sections[0].words[-1] == "A run from scratch spent less in all: what trained the dense model is not in its budget."
    assert "as runs begin with them, before they are trained further" in sections[1].words[0]


def test_speeds_that_are_none_are_refused(tmp_path):
    assert read(tmp_path) is None
    (tmp_path / SPEEDS).write_text('{"family": {}}')
    with pytest.raises(DataError, match="holds no speeds of models; remove it"):
        read(tmp_path)


def written(folder):
    folder.mkdir()
    for one in rows():
        append(folder, one)
    family, found = timed()
    (folder / SPEEDS).write_text(json.dumps({"family": family, "speeds": found}))
    return folder


def test_the_report_of_such_a_study_is_this_page(tmp_path):
    folder = written(tmp_path / "up")
    done = CliRunner().invoke(app, ["study", "report", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("After 2x the dense model's FLOPs more, copy is 0.0")
    text = (folder / "report.md").read_text()
    for part in ("# Made sparse, or trained on as it is? up", "| copy | 4 experts top-2 | 4M | 2M |", "| 4 experts top-2 | 2,500 | 200 |",
                 "No law was fitted to all 30 runs", "moe study run up/study.yaml", "0123abc", "| seeds | 0, 1, 2 |"):  # fmt: skip
        assert part in text
    done = CliRunner().invoke(app, ["study", "report", str(folder), "--flops", "1e15"])
    assert done.exit_code == 2
    assert "--flops and --memory decide nothing on the page" in " ".join(done.output.split())


@needs_browser
@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    folder = written(tmp_path / "up")
    assert CliRunner().invoke(app, ["study", "report", str(folder)]).exit_code == 0
    page = folder / "report.html"
    check_figures(look(page, MARKS), 4)
    assert look(page, "document.querySelector('main').scrollWidth", wide=390) <= 390
    assert said(page) == []
