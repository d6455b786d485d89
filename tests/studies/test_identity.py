"""A run keeps its name while what its recipe names learns more."""

from __future__ import annotations

import functools
import inspect

import pytest

from moe.choice import Entries
from moe.config import load
from moe.data.sources import Stdlib, Text
from moe.recipe import Recipe
from moe.routers.top_k import TopK
from moe.scaling.results import identity
from moe.studies.grid import grid
from moe.studies.spec import Study
from moe.surgery import variants
from tests.studies.test_grid import BEGUN, SMALL


@pytest.fixture
def learn(monkeypatch):
    """As if what a choice names had learned an option."""

    def also(holder, name):
        make = getattr(holder, name)
        signature, later = inspect.signature(make), inspect.Parameter("later", inspect.Parameter.KEYWORD_ONLY, default=7)

        @functools.wraps(make)
        def made(*given, later=7, **options):
            return make(*given, **options)

        made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), later])
        monkeypatch.setattr(holder, name, made)
        adapter = Entries._adapter
        fresh = lambda self: Entries(self.table, self.what, self.given, self.default)  # noqa: E731  # with adapters of its own
        monkeypatch.setattr(Entries, "_adapter", lambda self, name: adapter(fresh(self), name))

    return also


WRAPPING = {"name": "local_search", "router": {"name": "top_k", "score": "sigmoid"}}


@pytest.mark.parametrize(
    ("learner", "tree"),
    [
        (TopK, {"model": {"moe": {"router": {"name": "top_k", "k": 3}}}}),
        (TopK, {"model": {"moe": {"router": WRAPPING}}}),
        (Text, {"data": {"sequence": 64, "sources": [{"name": "text", "paths": ["a"]}, "stdlib"]}}),
        (Stdlib, {"data": {"sources": ["stdlib"]}}),
    ],
)
def test_a_router_or_source_that_learns_an_option_renames_no_run(learn, learner, tree):
    before = identity(Recipe.model_validate(tree))
    learn(learner, "__init__")
    recipe = Recipe.model_validate(tree)
    assert "'later': 7" in str(recipe)
    assert identity(recipe) == before


def test_options_that_are_no_defaults_are_of_a_run_s_name():
    routers = [
        "top_k",
        {"name": "top_k", "z_loss": 0.1},
        "sigma",
        WRAPPING,
        WRAPPING | {"router": "top_k"},
        WRAPPING | {"iterations_end": 9},
    ]
    names = [identity(Recipe.model_validate({"model": {"moe": {"router": router}}})) for router in routers]
    paths = [{"data": {"sources": [{"name": "text", "paths": [path]}]}} for path in "ab"]
    names += [identity(Recipe.model_validate(tree)) for tree in paths]
    assert len(set(names)) == len(names)


def test_a_variant_that_learns_an_option_renames_nothing(learn, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(SMALL)
    before = [(run.id, run.origin and run.origin.id) for run in grid(load([file], BEGUN, Study))]
    for name in ("copy", "drop"):
        learn(variants, name)
    given = load([file], BEGUN, Study)
    assert "'later': 7" in str(given)
    assert [(run.id, run.origin and run.origin.id) for run in grid(given)] == before
