"""The proof is worth what it catches: an engine with one mistake fails, and the report names what is wrong with it."""

from __future__ import annotations

from functools import cache

import pytest

from moe.config import load
from moe.verify.compare import causes
from moe.verify.layouts import parse
from moe.verify.plan import plan
from tests.verify.on_ranks import rows

ROUTER = "{name: top_k, k: 2, balance_loss: 0.05, z_loss: 1e-3, bias_rate: 1e-2}"
MISTAKES = {  # what is made wrong, where it shows, and what has to be named
    "expert_gradients_times_ranks": ("engine=ddp,ranks=2,expert_ranks=2", "plain sgd", "gradient", "experts"),
    "expert_gradients_times_ranks, cut": ("engine=fsdp2,ranks=2,expert_ranks=2", "plain sgd", "gradient", "experts"),
    "router_gradients_of_one_rank": ("engine=ddp,ranks=2", "plain sgd", "gradient", "router"),
    "norm_without_experts": ("engine=ddp,ranks=2,expert_ranks=2", "adamw", "norm", None),
    "auxiliary_loss_times_accumulation": ("engine=ddp,ranks=2,accumulate=2,balance_window=exact", "adamw", "auxiliary", None),
    "router_state_of_one_rank": ("engine=ddp,ranks=2", "plain sgd", "buffer", None),
}


@cache
def recipe():
    return load(["configs/debug.yaml"], [f"model.moe.router={ROUTER}"])


COARSE = list(MISTAKES)[:3]  # what shows in bfloat16 too, where a quantity is compared by its size


@pytest.fixture(scope="module")
def checked():
    """The rows of every layout with and without its mistake."""
    return run("float64", list(MISTAKES))


@pytest.fixture(scope="module")
def coarsely_checked():
    return run("bfloat16", COARSE)


def run(dtype, mistakes):
    checks = []
    for mistake in mistakes:
        layout, optimizer, _, _ = MISTAKES[mistake]
        checks += [check for check in plan(recipe(), [parse(layout)], [dtype])[0] if check.optimizer == optimizer]
    found = rows([*checks, *checks], [*(mistake.split(",")[0] for mistake in mistakes), *[None] * len(checks)])
    return dict(zip(mistakes, zip(found[: len(checks)], found[len(checks) :], strict=True), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_fails_and_is_named(checked, mistake):
    _, _, quantity, family = MISTAKES[mistake]
    wrong, right = checked[mistake]
    assert all(row.passes for row in right)
    first = causes(wrong)[0]
    assert (first.quantity, first.family) == (quantity, family)
    gradients = {row.family for row in causes(wrong) if row.quantity == "gradient"}
    if quantity == "gradient":
        assert gradients == {family}
    if quantity == "norm":
        assert not gradients


@pytest.mark.parametrize("mistake", COARSE)
def test_a_wrong_size_fails_in_bfloat16_too(coarsely_checked, mistake):
    _, _, quantity, family = MISTAKES[mistake]
    wrong, right = coarsely_checked[mistake]
    assert all(row.passes for row in right)
    assert (quantity, family) in [(row.quantity, row.family) for row in causes(wrong)]


def test_a_factor_shows_as_the_factor(checked):
    wrong, _ = checked["expert_gradients_times_ranks"]
    assert causes(wrong)[0].difference == pytest.approx(1, rel=1e-6)  # twice as much is one too much
    wrong, _ = checked["auxiliary_loss_times_accumulation"]
    assert causes(wrong)[0].difference == pytest.approx(1, rel=1e-6)
