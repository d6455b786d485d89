"""Fits find planted laws, know how sure they are, and refuse what cannot be fitted."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataError
from moe.scaling import LAWS
from moe.scaling.fit import _Vector, bootstrap, check, cross_check, fit, identify, interval, unusual
from moe.scaling.laws import ABNAR, CHINCHILLA, CLARK, KRAJEWSKI, LUDZIEJEWSKI, saturated
from moe.tables import entry

NOISE = 0.003
PAPER = CHINCHILLA.published["paper"]


def runs(count, seed):
    draw = np.random.default_rng(seed)
    size, experts = 10 ** draw.uniform(7, 10, count), 2.0 ** draw.integers(0, 7, count)
    x = dict.fromkeys(("total", "active", "average", "base"), size)
    return {**x, "tokens": 10 ** draw.uniform(9, 11.5, count), "experts": experts, "granularity": 2.0 ** draw.integers(0, 5, count),
            "sparsity": 1 - 1 / experts}  # fmt: skip


def noisy(law, values, x, seed):
    return law.loss(values, x) * np.exp(np.random.default_rng(seed).normal(0, NOISE, len(x["tokens"])))


IDENTIFIABLE = {"chinchilla": ["alpha", "beta"], "journey": ["alpha", "beta"], "clark": ["a"], "krajewski": ["alpha"], "abnar": ["beta"],
                "ludziejewski": []}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_a_planted_law_is_found(name):
    law = entry(LAWS, name, "law")
    truth = next(iter(law.published.values()), PAPER)
    x, unseen = runs(200, seed=1), runs(200, seed=2)
    found = fit(law, x, noisy(law, truth, x, seed=3))
    assert np.abs(found.loss(unseen) / law.loss(truth, unseen) - 1).max() < 0.01
    assert found.spread == pytest.approx(NOISE, rel=0.25)
    for exponent in IDENTIFIABLE[name]:
        assert found.values[exponent] == pytest.approx(truth[exponent], rel=0.05)


def test_outliers_do_not_rule():
    x = runs(150, seed=1)
    loss = noisy(CHINCHILLA, PAPER, x, seed=2)
    loss[::20] *= 1.2
    assert fit(CHINCHILLA, x, loss).values["alpha"] == pytest.approx(PAPER["alpha"], rel=0.03)


def test_an_outlier_widens_no_interval_and_prefers_no_law():
    x = runs(60, seed=1)
    loss = noisy(CHINCHILLA, PAPER, x, seed=2)
    clean = fit(CHINCHILLA, x, loss)
    loss[7] *= 1.5
    odd = fit(CHINCHILLA, x, loss)
    assert odd.spread < 1.3 * clean.spread
    assert odd.aicc < clean.aicc + 60  # by plain squares it is 300 more
    assert np.flatnonzero(unusual(odd.residuals)).tolist() == [7]
    assert not unusual(clean.residuals).any()


def test_what_runs_of_one_trunk_miss_by_is_drawn_together():
    """Three lengths a trunk that miss by the same leave a size's share of the loss as open as a third of the runs would."""
    x, groups = runs(60, seed=1), np.repeat(np.arange(20), 3)
    loss = CHINCHILLA.loss(PAPER, x) * np.exp(np.random.default_rng(2).normal(0, 0.01, 20)[groups])
    found, far = fit(CHINCHILLA, x, loss), {"active": np.array([3e9]), "tokens": np.array([1e11])}
    apart, together = (interval(bootstrap(found, x, loss, draws=60, groups=each), far) for each in (None, groups))
    assert together[1] - together[0] > 1.3 * (apart[1] - apart[0])


@pytest.mark.parametrize(("law", "values"), [(CHINCHILLA, PAPER), (KRAJEWSKI, KRAJEWSKI.published["64 experts"])])
def test_the_papers_own_procedure_does_not_do_better(law, values):
    x = runs(100, seed=5)
    loss = noisy(law, values, x, seed=6)
    ours, theirs = fit(law, x, loss), cross_check(law, x, loss, starts=8)
    rest = np.abs(np.log(loss) - np.log(law.loss(theirs, x)))
    assert np.abs(ours.residuals).mean() <= rest.mean() * 1.02


def test_the_law_that_made_the_runs_is_preferred():
    x = runs(150, seed=7)
    values = LUDZIEJEWSKI.published["paper"]
    loss = noisy(LUDZIEJEWSKI, values, x, seed=8)
    assert fit(LUDZIEJEWSKI, x, loss).aicc < fit(CHINCHILLA, x, loss).aicc - 100
    plain = noisy(CHINCHILLA, PAPER, x, seed=9)
    assert fit(CHINCHILLA, x, plain).aicc < fit(LUDZIEJEWSKI, x, plain).aicc


def test_intervals_hold_the_truth_at_one_place():
    x = runs(60, seed=10)
    loss = noisy(CHINCHILLA, PAPER, x, seed=11)
    found = fit(CHINCHILLA, x, loss)
    far = {"active": np.array([3e10]), "tokens": np.array([1e12])}
    low, high = interval(bootstrap(found, x, loss, draws=50), far)
    assert low < CHINCHILLA.loss(PAPER, far) < high
    assert high - low < 0.05


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    far, held = {"active": np.array([3e10]), "tokens": np.array([1e12])}, 0
    truth = CHINCHILLA.loss(PAPER, far)
    for seed in range(200):
        x = runs(60, seed)
        loss = noisy(CHINCHILLA, PAPER, x, seed + 1000)
        found = fit(CHINCHILLA, x, loss, starts=32)
        low, high = interval(bootstrap(found, x, loss, draws=100, seed=seed), far)
        held += int(low[0] <= truth[0] <= high[0])
    assert 180 <= held <= 198


def grid(sizes, tokens, experts):
    axes = np.meshgrid(np.geomspace(1e7, 3e8, sizes), np.geomspace(1e9, 3e10, tokens), 2.0 ** np.arange(experts), indexing="ij")
    return dict(zip(("active", "tokens", "experts"), (axis.ravel() for axis in axes), strict=True))


def test_a_design_is_judged_before_it_is_run():
    values = LUDZIEJEWSKI.published["paper"]
    wanted = {"active": np.array([1e9, 3e9]), "tokens": np.array([1e11, 1e11]), "experts": np.array([8.0, 16.0])}
    enough = identify(LUDZIEJEWSKI, values, grid(4, 3, 5), wanted, noise=NOISE, draws=3)
    assert enough.says(0.05) is None
    few = identify(LUDZIEJEWSKI, values, grid(3, 3, 3), wanted, noise=NOISE, draws=3)
    assert few.error > enough.error
    sentence = few.says(1e-4)
    assert sentence is not None
    assert "add values to its axes" in sentence


def test_lengths_that_hardly_differ_are_named():
    x = runs(40, seed=1) | {"tokens": np.resize([1.0e9, 1.2e9, 1.5e9], 40)}
    with pytest.raises(DataError, match=r"needs runs whose tokens differ by 2x or more and these have 1e\+09 to 1.5e\+09"):
        check(CHINCHILLA, x, CHINCHILLA.loss(PAPER, x))


def test_too_few_runs_or_values_are_named():
    x = runs(11, seed=0)
    with pytest.raises(DataError, match="has 11 free values and there are 11 runs; add at least 1"):
        check(LUDZIEJEWSKI, x, np.ones(11))
    with pytest.raises(DataError, match="at least 3 values of each column and these have 1 of experts"):
        check(CLARK, {**runs(40, seed=0), "experts": np.ones(40)}, np.ones(40))
    routers_rows = {"active": 1e6 * np.linspace(1, 1.01, 40), "tokens": np.geomspace(1e6, 1e8, 40)}
    with pytest.raises(DataError, match="these have 1 of active;"):
        check(CHINCHILLA, routers_rows, np.ones(40))
    with pytest.raises(DataError, match="needs the column sparsity"):
        check(ABNAR, {"total": np.ones(9), "tokens": np.ones(9)}, np.ones(9))


@pytest.mark.parametrize("name", LAWS)
def test_slopes_are_those_of_the_loss(name):
    law = entry(LAWS, name, "law")
    vector, x = _Vector(law, runs(20, seed=3)), runs(20, seed=3)
    theta = vector.of(next(iter(law.published.values()), PAPER))
    assert vector.stated(theta) == pytest.approx(np.log(law.loss(vector.named(theta), x)))
    for at, slope in enumerate(vector.slopes(theta).T):
        step = 1e-5 * max(1.0, abs(theta[at])) * (np.arange(len(theta)) == at)
        both = (vector.stated(theta + step) - vector.stated(theta - step)) / (2 * step[at])
        assert slope == pytest.approx(both, rel=1e-3, abs=1e-6)


TABLE = {
    1: (30.3640, 0.1817, 53.9838, 0.1965), 2: (27.7982, 0.1780, 66.8401, 0.2065), 4: (24.8462, 0.1731, 87.7022, 0.2192),
    8: (21.8330, 0.1676, 119.9126, 0.2338), 16: (19.0159, 0.1617, 167.5073, 0.2494), 32: (16.5424, 0.1557, 234.6726, 0.2652),
}  # fmt: skip


def test_the_joint_law_is_found_in_the_table_of_its_paper():
    """A law of size and tokens for each number of experts (arXiv 2502.05172), whose loss at infinity is 1.3637."""
    size, tokens, experts = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 3e9, 5), np.geomspace(3e9, 1e11, 5), list(TABLE)))
    m, mu, n, nu = np.array([TABLE[int(number)] for number in experts]).T
    loss = 1.3637 + m * size**-mu + n * tokens**-nu
    found = fit(LUDZIEJEWSKI, {"active": size, "tokens": tokens, "experts": experts}, loss, starts=128)
    assert np.abs(found.residuals).max() < 5e-4  # the table has four digits
    assert found.values["c"] == pytest.approx(1.3637, abs=0.02)
    for number, (_, mu, _, nu) in TABLE.items():
        many = np.log(saturated(np.array([float(number)]), found.values["e_start"], found.values["e_max"]))[0]
        assert -(found.values["alpha"] + found.values["gamma"] * many) == pytest.approx(mu, abs=0.005)
        assert -(found.values["beta"] + found.values["zeta"] * many) == pytest.approx(nu, abs=0.005)


@pytest.mark.parametrize("router", CLARK.published)
def test_the_routed_law_is_found_in_the_runs_of_its_paper(router):
    lines = (Path(__file__).parent / "routed.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(line for line in lines if line[0] != "#") if row["router"] in ("dense", router)]
    base, experts, loss = (np.array([float(row[column]) for row in rows]) for column in ("base", "experts", "loss"))
    x, paper = {"base": base, "experts": experts}, CLARK.published[router]
    found, theirs = fit(CLARK, x, loss), np.log10(loss / CLARK.loss(paper, x))
    assert np.sqrt(np.mean(np.square(found.residuals / np.log(10)))) < min(0.0035, np.sqrt(np.mean(theirs**2)))
    assert found.at_bounds == []
    for name, near in {"a": 0.04, "b": 0.2, "c": 0.25, "d": 0.03}.items():
        assert found.values[name] == pytest.approx(paper[name], rel=near)
    small = base < base.max()
    without = fit(CLARK, {name: column[small] for name, column in x.items()}, loss[small])
    assert without.loss({name: column[~small] for name, column in x.items()}) == pytest.approx(loss[~small], rel=0.04)  # 3.6 times larger
