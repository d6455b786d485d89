"""Comparing traces: relative to the largest element, up to where it begins, and nothing passes for not being a number."""

from __future__ import annotations

import math

import pytest
import torch

from moe.verify.compare import DTYPES, causes, compare, family


def made(**changes):
    """A trace of two steps."""
    trace = {
        "loss": torch.tensor([3.0, 2.0]),
        "norm": torch.tensor([1.0, 1.5]),
        "gradient/layers.0.moe.router.weight": torch.tensor([[1.0, 0.0], [2.0, 1.0]]),
        "gradient/layers.0.moe.experts.up": torch.tensor([[4.0, 2.0], [1.0, 1.0]]),
        "gradient/layers.0.moe.experts.down": torch.tensor([[0.25], [0.5]]),
        "buffer/layers.0.moe.router.bias": torch.tensor([[0.0, 0.0], [0.1, -0.1]]),
        "moment/exp_avg.layers.0.moe.experts.up": torch.tensor([4.0]),
        "moment/exp_avg_sq.layers.0.moe.experts.up": torch.tensor([16.0]),
        "parameter/layers.0.moe.router.weight": torch.tensor([0.5, 0.25]),
        "parameter/norm.weight": torch.tensor(1.0),
    }
    trace = {name: value.double() for name, value in trace.items()}
    for name, change in changes.items():
        trace[name] = trace[name] + torch.tensor(change, dtype=torch.float64)
    return trace


def misses(**changes):
    return {(row.quantity, row.family): row for row in compare(made(**changes), made(), "float64") if not row.passes}


def test_equal_traces_pass_in_every_row():
    rows = compare(made(), made(), "float64")
    assert all(row.passes and row.difference == 0 for row in rows)
    assert [row.quantity for row in rows] == [
        "loss",
        "gradient",
        "gradient",
        "norm",
        "buffer",
        "moment",
        "moment",
        "parameter",
        "parameter",
    ]


def test_a_difference_is_relative_to_the_largest_element_of_its_family_in_its_step():
    (row,) = misses(**{"gradient/layers.0.moe.experts.down": [[0.0], [0.25]]}).values()
    assert (row.family, row.difference, row.step, row.worst) == ("experts", 0.25, 1, "layers.0.moe.experts.down")
    (row,) = misses(**{"buffer/layers.0.moe.router.bias": [[1e-3, 0.0], [0.0, 0.0]]}).values()
    assert row.difference == 1e-3  # where everything is zero: absolute


def test_moments_of_different_sizes_have_scales_of_their_own():
    (row,) = misses(**{"moment/exp_avg.layers.0.moe.experts.up": [1.0]}).values()
    assert row.difference == 0.25


def test_steps_after_the_first_miss_hide_nothing():
    later = {"loss": [0.0, 1.0], "gradient/layers.0.moe.router.weight": [[0.0, 0.0], [5.0, 5.0]]}
    found = misses(**later, **{"gradient/layers.0.moe.experts.up": [[4.0, 2.0], [9.0, 9.0]]})
    assert set(found) == {("gradient", "experts")}
    assert found["gradient", "experts"].difference == 1


def test_bfloat16_is_compared_by_size():
    """Elements that change places with others of their size are noise there; a factor is not."""
    name = "gradient/layers.0.moe.experts.up"
    even = made() | {name: torch.full((2, 2), 3.0, dtype=torch.float64)}
    noisy = even | {name: torch.tensor([[2.0, 4.0], [3.5, 2.5]], dtype=torch.float64)}
    assert all(row.passes for row in compare(noisy, even, "bfloat16"))
    assert not all(row.passes for row in compare(noisy, even, "float32"))
    twice = {name: [[4.0, 2.0], [1.0, 1.0]], "gradient/layers.0.moe.experts.down": [[0.25], [0.5]]}
    (row,) = causes(compare(made(**twice), made(), "bfloat16"))
    assert (row.quantity, row.family, row.difference) == ("gradient", "experts", 1)


def test_float32_is_compared_by_size_from_the_step_in_which_a_token_took_another_expert():
    loads = {"loads": torch.tensor([[[4.0, 4.0]], [[4.0, 4.0]]]).double()}
    name, noise = "gradient/layers.0.moe.experts.up", [[0.0, 0.0], [0.1, -0.1]]
    elsewhere = loads | {"loads": torch.tensor([[[4.0, 4.0]], [[4.1, 3.9]]]).double()}
    assert all(row.passes for row in compare(made(**{name: noise}) | elsewhere, made() | loads, "float32"))
    for trace, dtype in ((made(**{name: noise}) | loads, "float32"), (made(**{name: noise}) | elsewhere, "float64")):
        assert not all(row.passes for row in compare(trace, made() | loads, dtype))
    assert not all(row.passes for row in compare(made(**{name: noise[::-1]}) | elsewhere, made() | loads, "float32"))


def test_something_where_there_should_be_nothing_misses_in_every_dtype():
    bias = {"buffer/layers.0.moe.router.bias": [[1.0, 0.0], [0.0, 0.0]]}
    for dtype in DTYPES:
        assert [row.quantity for row in causes(compare(made(**bias), made(), dtype))] == ["buffer"]


def test_causes_are_of_the_first_step_and_else_of_the_end():
    end = {"parameter/norm.weight": 1.0}
    both = compare(made(**end, norm=[0.0, 1.0]), made(), "float64")
    assert [row.quantity for row in causes(both)] == ["norm"]
    assert [(row.quantity, row.family) for row in causes(compare(made(**end), made(), "float64"))] == [("parameter", "norms")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "parameter/norm.weight", "gradient/layers.0.moe.router.weight"])
def test_what_is_not_finite_misses_whatever_the_dtype(name, value, dtype):
    for trace, reference in ((made(**{name: value}), made()), (made(**{name: value}), made(**{name: value}))):
        assert not all(row.passes for row in compare(trace, reference, dtype))


def test_traces_of_different_things_miss():
    trace = made()
    del trace["norm"]
    (row,) = compare(trace, made(), "bfloat16")
    assert (row.quantity, row.worst, row.passes) == ("names", "norm", False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.1.moe.router.router.weight", "router"),
        ("layers.1.moe.experts.up", "experts"),
        ("layers.1.attention.q_norm.weight", "norms"),
        ("layers.1.attention.q.weight", "attention"),
        ("layers.1.mlp_norm.weight", "norms"),
        ("norm.weight", "norms"),
        ("embed.weight", "embeddings"),
        ("head.weight", "embeddings"),
        ("layers.0.mlp.up.weight", "mlp"),
        ("layers.1.moe.shared.down.weight", "mlp"),
        ("layers.1.moe.shared_gate.weight", "mlp"),
    ],
)
def test_a_parameter_belongs_to_the_family_of_its_name(name, expected):
    assert family(name) == expected
