"""Sizes and prices of models that were not run, against models that are built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe.scaling.compute_optimal import DENSE
from moe.scaling.size_family import choice_of, family
from moe.studies.grid import grid
from moe.studies.spec import Study
from tests.scaling.planted import row


def built(widths, experts, top_k=1, granularity=1, layers=lambda width: 2, **model) -> list[Any]:
    """Facts of models as they are built, with a feed-forward layer three times as wide as the model."""
    axes = {"family": [{"d_model": width, "layers": layers(width), "heads": 2, "d_ff": 3 * width} for width in widths], "tokens": [100_000],
            "experts": experts, "top_k": [top_k], "granularity": [granularity]}  # fmt: skip
    recipe = {"model": {"context": 32, **model}, "data": {"tokenizer": "bytes", "sequence": 32}}
    return [SimpleNamespace(**run.facts()) for run in grid(Study(axes=axes, recipe=recipe, scaling={"warmup": 10}))]


def check(line, other, within=1e-3):
    sizes = line.sizes(np.array([float(other.base)]), choice_of(other))
    assert sizes.active[0] == pytest.approx(other.active, rel=within)
    assert sizes.total[0] == pytest.approx(other.total, rel=within)
    assert line.price(sizes, choice_of(other))[0] == pytest.approx(other.flops / other.tokens, rel=within)


@pytest.mark.parametrize("model", [{"tied_embeddings": True}, {"moe": {"d_shared": 32}}, {}], ids=["tied", "shared", "untied"])
def test_models_thirty_times_larger_and_ten_times_smaller_are_foreseen(model):
    line = family(built((48, 64), [1, 4, 8], **model))
    for other in built((16, 384), [1, 16], **model):
        check(line, other)


def test_depth_may_grow_with_the_width():
    deep = {"layers": lambda width: width // 16, "tied_embeddings": True}
    line = family(built((32, 64), [1, 8], **deep))
    for other in built((256,), [1, 8], **deep):
        check(line, other)


def test_experts_that_are_all_met_say_nothing_of_what_lies_outside_them():
    rows = built((48, 64), [1, 2, 4, 8], top_k=2)
    assert any(one.experts == 2 and one.sparsity == 0 for one in rows)
    for other in built((128,), [1, 2, 16], top_k=2):
        check(family(rows), other)


def test_dense_runs_alone_and_one_width_alone_are_a_family_too():
    line = family(built((48, 64), [1]))
    for other in built((256,), [1]):
        check(line, other)
    [dense, sparse] = built((64,), [1, 8])
    line = family([dense, sparse])
    check(line, sparse)
    sizes = line.sizes(np.array([10.0 * dense.base]), choice_of(sparse))
    assert (sizes.total - sizes.active)[0] == pytest.approx(10 * (sparse.total - sparse.active), rel=1e-3)  # the share stays


def test_no_model_costs_less_than_the_parameters_that_are_multiplied():
    line = family([row(width, experts, 1e6) for width in (96, 192) for experts in (1, 8)])
    sizes = line.sizes(np.geomspace(1e4, 1e12, 30), DENSE)
    assert (line.price(sizes, DENSE) >= 3 * sizes.active).all()
