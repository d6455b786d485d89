"""The best sizes at a budget, against closed forms and published tables."""

from __future__ import annotations

import numpy as np
import pytest

from moe.errors import ConfigError
from moe.scaling.compute_optimal import Budget, Choice, Family, best, dense_multiple, optimum, six
from moe.scaling.laws import ABNAR, CHINCHILLA, CLARK, LUDZIEJEWSKI

PAPER, JOINT, OF_ABNAR = CHINCHILLA.published["paper"], LUDZIEJEWSKI.published["paper"], ABNAR.published["paper"]
HALF = Family(lambda base: base / 2, six)  # half of the dense model's parameters are replaced by experts


def test_the_closed_form_of_chinchilla():
    found = optimum(CHINCHILLA, PAPER, Budget(1e21))
    alpha, beta = PAPER["alpha"], PAPER["beta"]
    scale = (alpha * PAPER["A"] / (beta * PAPER["B"])) ** (1 / (alpha + beta))
    assert found.active == pytest.approx(scale * (1e21 / 6) ** (beta / (alpha + beta)), rel=1e-6)
    assert abs(found.slope) < 1e-6
    assert found.tokens == pytest.approx(1e21 / (6 * found.active))


@pytest.mark.parametrize(("flops", "experts", "active", "tokens"), [
    (1e20, 1, 1.7e9, 9.7e9), (1e20, 32, 0.669e9, 24.9e9), (1e21, 1, 5.7e9, 29.3e9), (1e22, 32, 12.2e9, 136.9e9),
])  # fmt: skip
def test_the_table_of_the_joint_law(flops, experts, active, tokens):
    found = optimum(LUDZIEJEWSKI, JOINT, Budget(flops), Choice(experts))
    assert found.active == pytest.approx(active, rel=0.02)
    assert found.tokens == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(("flops", "experts", "total", "loss"), [
    (1e20, 1, 6.39e8, 2.5885), (1e20, 2, 1.07e9, 2.5054), (1e20, 50, 1.71e10, 2.2708), (1e21, 50, 8.33e10, 2.0143),
])  # fmt: skip
def test_sparser_models_are_larger_and_better(flops, experts, total, loss):
    found = optimum(ABNAR, OF_ABNAR, Budget(flops), Choice(experts))
    assert found.total == pytest.approx(total, rel=6e-3)
    assert found.loss == pytest.approx(loss, abs=6e-5)
    assert abs(found.slope) < 1e-6


@pytest.mark.parametrize(("limit", "name"), [("total", "memory"), ("active", "inference")])
def test_a_limit_that_is_too_small_is_met_and_named(limit, name):
    free = optimum(CHINCHILLA, PAPER, Budget(1e21))
    tight = optimum(CHINCHILLA, PAPER, Budget(1e21, **{limit: free.total / 2}))
    assert tight.limit == name
    assert free.limit is None
    assert getattr(tight, limit) == pytest.approx(free.total / 2)
    assert tight.loss > free.loss
    assert tight.slope < 0  # it would grow
    assert optimum(CHINCHILLA, PAPER, Budget(1e21, **{limit: free.total * 2})).limit is None


def test_sizes_hang_together():
    sizes = HALF.sizes(np.array([100.0]), Choice(experts=16, top_k=4, granularity=2))
    assert (sizes.active[0], sizes.total[0]) == (100 + 50, 100 + 7 * 50)  # four pieces of half a layer, of sixteen


def test_under_a_memory_fewer_experts_may_do_better():
    choices = [Choice(n) for n in (1, 2, 4, 8, 16, 32)]
    free = best(LUDZIEJEWSKI, JOINT, Budget(1e21), choices, HALF)
    tight = best(LUDZIEJEWSKI, JOINT, Budget(1e21, total=5e9), choices, HALF)
    assert free[0].choice.experts == 32
    assert tight[0].choice.experts < 32
    assert [one.loss for one in tight] == sorted(one.loss for one in tight)


def test_no_size_near_the_optimum_is_better():
    budget = Budget(1e20, served=1e10)
    found = optimum(ABNAR, OF_ABNAR, budget, Choice(8), HALF)
    for factor in (0.9, 1.1):
        pinned = optimum(ABNAR, OF_ABNAR, budget._replace(total=found.total * 0.9), Choice(8), HALF)
        assert pinned.loss > found.loss
        sizes = HALF.sizes(np.array([found.base * factor]), Choice(8))
        tokens = (1e20 - 2 * sizes.active * 1e10) / (6 * sizes.active)
        x = {"total": sizes.total, "tokens": tokens, "sparsity": np.array([7 / 8])}
        assert ABNAR.loss(OF_ABNAR, x)[0] > found.loss


def test_a_model_that_will_write_much_is_smaller():
    idle, busy = (optimum(CHINCHILLA, PAPER, Budget(1e21, served=served)) for served in (0, 1e11))
    assert busy.active < idle.active
    assert 6 * busy.active * busy.tokens + 2 * busy.active * 1e11 == pytest.approx(1e21)


def test_a_dense_model_catches_up_at_the_stated_multiple():
    budget = Budget(1e20)
    loss = optimum(LUDZIEJEWSKI, JOINT, budget, Choice(16)).loss
    times = dense_multiple(LUDZIEJEWSKI, JOINT, budget, loss)
    assert times is not None
    assert optimum(LUDZIEJEWSKI, JOINT, Budget(1e20 * times)).loss == pytest.approx(loss, abs=1e-6)
    assert dense_multiple(LUDZIEJEWSKI, JOINT, Budget(1e20, total=1e7), loss) is None


def test_budgets_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="flops=0"):
        optimum(CHINCHILLA, PAPER, Budget(0))
    with pytest.raises(ConfigError, match="active=nan"):
        optimum(CHINCHILLA, PAPER, Budget(1e20, active=float("nan")))
    with pytest.raises(ConfigError, match="knows nothing of tokens"):
        optimum(CLARK, CLARK.published["hash"], Budget(1e20))
    with pytest.raises(ConfigError, match="served=inf"):
        optimum(CHINCHILLA, PAPER, Budget(1e20, served=float("inf")))


SMALLEST = "a dense model of 10,000 parameters, the smallest that is asked about; raise "


@pytest.mark.parametrize(("budget", "choice", "said"), [
    (Budget(1e20, total=5000), Choice(), f"--memory leaves 5,000 parameters in all, too few for {SMALLEST}the limit of memory"),
    (Budget(1e20, active=10), Choice(4), "--active leaves 10 parameters that a token meets, too few for 4 experts, top-1, granularity 1, "
     f"in the layers of {SMALLEST}the limit of inference"),
    (Budget(10), Choice(), f"10 FLOPs pay for no token of training of {SMALLEST}--flops"),
    (Budget(1e21, served=1e30), Choice(), "1e21 FLOPs, out of which 1e30 tokens are served, pay for no token of training of "
     f"{SMALLEST}--flops, or lower --served"),
])  # fmt: skip
def test_budgets_of_no_model_that_is_asked_about_say_what_to_change(budget, choice, said):
    with pytest.raises(ConfigError) as raised:
        optimum(CHINCHILLA, PAPER, budget, choice)
    assert str(raised.value) == said


@pytest.mark.parametrize(("flops", "served", "experts"), [
    (4.927e16, 1.257e11, 2), (6.64e17, 7.91e12, 1), (9.287e18, 2.5878e13, 1), (2.4683e17, 4.9766e12, 1), (1e15, 0, 1), (1e38, 0, 16),
])  # fmt: skip
def test_the_optimum_is_found_beside_the_largest_model_that_is_affordable(flops, served, experts):
    found = optimum(ABNAR, OF_ABNAR, Budget(flops, served=served), Choice(experts))
    base = found.base * np.exp(np.linspace(-0.5, 0.5, 100_001))
    sizes = Family(lambda base: base, six).sizes(base, Choice(experts))
    tokens = (flops - 2 * sizes.active * served) / (6 * sizes.active)
    x = {"total": sizes.total, "tokens": np.maximum(tokens, 1e-300), "sparsity": np.full_like(base, 1 - 1 / experts)}
    assert found.tokens > 1
    assert found.loss <= ABNAR.loss(OF_ABNAR, x)[tokens > 0].min() * (1 + 1e-9)
    assert not found.least


def test_a_best_model_below_the_smallest_that_is_asked_about_is_marked():
    served = optimum(CHINCHILLA, PAPER, Budget(1e14, served=4.9e9))
    assert served.least
    assert served.base == pytest.approx(1e4)
    assert served.slope > 0


def test_dense_models_of_which_no_size_is_affordable_are_passed_over():
    budget = Budget(1e20, served=4e15)  # of a twentieth of it, not even the smallest dense model would be served
    loss = optimum(LUDZIEJEWSKI, JOINT, budget).loss
    assert dense_multiple(LUDZIEJEWSKI, JOINT, budget, loss) == pytest.approx(1, rel=1e-4)
    assert dense_multiple(LUDZIEJEWSKI, JOINT, Budget(1e20, total=1e3), loss) is None
