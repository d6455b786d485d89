"""Laws beside each other on the runs of one study."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe.errors import DataError
from moe.scaling.compute_optimal import DENSE, Choice
from moe.scaling.model_selection import FIT, columns, compare, fits_of, largest, noise_of
from moe.scaling.results import append
from moe.scaling.size_family import choice_of, choices, family
from tests.scaling.planted import row, rows, study


def test_the_law_that_made_the_runs_is_preferred_and_foresees_the_largest(fits):
    assert fits.best == "ludziejewski"
    judged = fits.judged["ludziejewski"]
    assert judged.held.error < 0.01
    assert judged.held.error < fits.judged["chinchilla"].held.error / 3
    assert judged.spread == pytest.approx(0.003, rel=0.3)
    low, high = judged.interval(fits.x)
    assert 0.85 <= np.mean((low < fits.loss) & (fits.loss < high)) <= 1.0


def test_laws_that_cannot_be_fitted_are_refused_in_a_sentence(fits):
    assert set(fits.judged) | set(fits.refused) == {"chinchilla", "clark", "krajewski", "abnar", "ludziejewski", "journey"}
    assert "have 3 numbers of them" in fits.refused["clark"]
    assert "1 of granularity" in fits.refused["krajewski"]
    assert "no run changes its size" in fits.refused["journey"]


def test_the_largest_runs_are_held_out(fits):
    flops = fits.x["flops"]
    assert flops[fits.held].min() > flops[~fits.held].max()
    assert 3 <= fits.held.sum() <= len(flops) // 3
    assert largest({"flops": np.array([1.0, 1.0, 1.0, 1.0])}).all()


def test_the_noise_is_what_seeds_alone_do():
    many = [row(64, 4, 2e6, seed, chance=np.random.default_rng(seed), noise=0.01) for seed in range(100)]
    found = noise_of(many)
    assert found.relative == pytest.approx(0.01, rel=0.2)
    assert (found.cells, found.runs, found.known) == (1, 100, True)
    assert not noise_of([row(64, 4, 2e6), row(64, 8, 2e6)]).known


def test_runs_beside_the_rule_are_not_fitted():
    others = [row(64, 4, 2e6, factor=2.0), row(64, 4, 2e6, status="diverged", loss=None)]
    hashed = row(64, 8, 2e6)
    hashed = hashed._replace(axes=hashed.axes | {"router": "hash"})
    fitted, x, loss = columns([*rows(), *others, hashed])
    assert len(fitted) == len(loss) == len(columns(rows())[0])
    assert all(one.axes["router"] in ("top_k", "dense") for one in fitted)
    assert sorted(set(x["experts"].round(6))) == [1, 2, 4, 8, 16]


def test_experts_are_counted_for_each_one_that_a_token_meets():
    two = row(64, 8, 2e6)._replace(sparsity=0.75)
    _, x, _ = columns([two])
    assert x["experts"] == pytest.approx([4.0])
    assert choice_of(two) == Choice(8, 2, 1.0)
    assert choices([two]) == [DENSE, Choice(8, 2, 1.0)]


def test_sizes_and_prices_of_other_models_follow_those_that_were_run():
    made = rows(widths=(64, 96, 128))
    line, unseen = family(made), row(192, 8, 32e6)
    sizes = line.sizes(np.array([float(unseen.base)]), choice_of(unseen))
    assert sizes.total[0] == pytest.approx(unseen.total, rel=0.05)
    assert sizes.active[0] == pytest.approx(unseen.active)
    assert line.price(sizes, choice_of(unseen))[0] == pytest.approx(unseen.flops / unseen.tokens, rel=0.03)


def test_what_was_fitted_is_read_back_until_rows_are_added(tmp_path):
    folder, calls = study(tmp_path / "s", widths=(64, 96, 128), experts=(1,)), []

    def say(law, what):
        calls.append((law, what))

    first = fits_of(folder, draws=20, say=say)
    assert {law for law, _ in calls} == set(first.judged) == {"chinchilla"}
    calls.clear()
    again = fits_of(folder, draws=20, say=say)
    assert not calls
    assert again.best == first.best
    for name, one in first.judged.items():
        assert again.judged[name].loss(first.x) == pytest.approx(one.loss(first.x), rel=1e-6)
        assert again.judged[name].interval(first.x)[1] == pytest.approx(one.interval(first.x)[1], rel=1e-6)
    json.loads((folder / FIT).read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    append(folder, row(64, 1, 2e6, seed=9))
    fits_of(folder, draws=20, say=say)
    assert calls


def test_a_spoilt_fit_and_a_study_without_runs_are_refused(tmp_path):
    folder = study(tmp_path / "s", widths=(64,), experts=(1,), tokens=(2e6,))
    (folder / FIT).write_text("{}")
    with pytest.raises(DataError, match="is no fit of a study; remove it"):
        fits_of(folder)
    with pytest.raises(DataError, match="none of the study's 1 runs is done"):
        compare([row(64, 4, 2e6, status="failed", loss=None)])
