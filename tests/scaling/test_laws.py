"""Laws give the figures of their papers, and become one another where they should."""

from __future__ import annotations

import numpy as np
import pytest

from moe.scaling import LAWS
from moe.scaling.laws import ABNAR, CHINCHILLA, CLARK, JOURNEY, KRAJEWSKI, LUDZIEJEWSKI, saturated
from moe.tables import entry

OF_ABNAR, OF_JOINT = ABNAR.published["paper"], LUDZIEJEWSKI.published["paper"]


def at(**columns):
    return {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in columns.items()}


@pytest.mark.parametrize(("total", "tokens", "sparsity", "loss"), [
    (1e9, 2e10, 0, 2.5657), (1e9, 2e10, 0.5, 2.5899), (8e9, 2e10, 0.875, 2.3813), (1e10, 1e11, 0.98, 2.2629),
])  # fmt: skip
def test_parameters_against_flops(total, tokens, sparsity, loss):
    assert ABNAR.loss(OF_ABNAR, at(total=total, tokens=tokens, sparsity=sparsity)) == pytest.approx(loss, abs=6e-5)


def test_finer_experts_are_better_and_by_the_published_amounts():
    losses = KRAJEWSKI.loss(KRAJEWSKI.published["64 experts"], at(total=[1e9] * 5, tokens=[2e10] * 5, granularity=[1, 2, 4, 8, 16]))
    assert losses == pytest.approx([3.2761, 3.2120, 3.1691, 3.1404, 3.1212], abs=6e-5)


@pytest.mark.parametrize(("experts", "m", "mu", "n", "nu"), [
    (1, 30.3640, -0.1817, 53.9838, -0.1965), (4, 24.8462, -0.1731, 87.7022, -0.2192), (32, 16.5424, -0.1557, 234.6726, -0.2652),
])  # fmt: skip
def test_the_joint_law_is_chinchillas_for_each_number_of_experts(experts, m, mu, n, nu):
    size, tokens = np.array([1e8, 1e9, 1e10]), np.array([1e10, 1e11, 1e12])
    joint = LUDZIEJEWSKI.loss(OF_JOINT, at(active=size, tokens=tokens, experts=[experts] * 3))
    assert joint == pytest.approx(m * size**mu + n * tokens**nu + OF_JOINT["c"], rel=2e-3)


def test_experts_saturate():
    count = saturated(np.array([1.0, 2, 8, 64, 512, 1e9]), 1.847, 314.478)
    assert count[0] == pytest.approx(1.847)
    assert (np.diff(count) > 0).all()
    assert count[-1] == pytest.approx(314.478)


def test_routed_models_lose_their_lead_at_the_published_size():
    for name, size in {"s-base": 937e9, "rl-r": 85e9, "hash": 83e9}.items():
        law = CLARK.published[name]
        cutoff = -law["b"] / law["c"]  # where experts make no difference, as log10 of size
        few, many = CLARK.loss(law, at(base=[10**cutoff] * 2, experts=[1, 512]))
        assert few == pytest.approx(many)
        assert abs(cutoff - np.log10(size)) < 0.6  # the published coefficients are rounded, and c is tiny


def test_laws_become_one_another():
    x = at(active=[1e8, 1e9], total=[1e8, 1e9], average=[1e8, 1e9], tokens=[1e10, 1e10], experts=[4, 64], sparsity=[0, 0])
    chinchilla = CHINCHILLA.published["paper"]
    expected = CHINCHILLA.loss(chinchilla, x)
    assert JOURNEY.loss(chinchilla, x) == pytest.approx(expected)
    joint = {**dict.fromkeys(("delta", "gamma", "omega", "zeta"), 0.0), "e_start": 2.0, "e_max": 300.0}
    joint |= {"a": 406.4, "b": 410.7, "c": 1.69, "alpha": -0.34, "beta": -0.28}
    assert LUDZIEJEWSKI.loss(joint, x) == pytest.approx(expected)
    dense = {**chinchilla, "a": 406.4, "b": 410.7, "e": 1.69, "c": 0, "d": 0, "lambda": 0.3, "delta": 0.1, "gamma": 0.2}
    assert ABNAR.loss(dense, x) == pytest.approx(expected)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_says_where_it_comes_from_and_what_it_needs(name):
    law = entry(LAWS, name, "law")
    assert law.name == name
    for values in law.published.values():
        assert set(values) == {*law.coefficients, *law.exponents}
    x = {column: np.array([0.5, 0.25]) for column in law.columns}
    terms = law.terms(x, {n: (low + high) / 2 for n, (low, high) in law.exponents.items()})
    assert terms.shape == (2, len(law.coefficients))
