"""Stages are named where a profiler runs or somebody watches, in their order and nested, and cost nothing else."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch

from moe.model import stages
from moe.model.moe_layer import MoELayer
from moe.model.stages import stage, watching


def test_nobody_watches_and_nothing_is_made():
    assert stage("route") is stage("experts")
    assert isinstance(stage("route"), nullcontext)


def test_a_profiler_sees_the_four_stages_of_a_layer_in_order():
    layer, x = MoELayer(8, experts=4, d_expert=8, d_shared=8), torch.randn(6, 8)
    with torch.profiler.profile() as profiler:
        layer(x)
    named = [event for event in profiler.events() if event.name in stages.LAYER]
    assert [event.name for event in named] == ["route", "dispatch", "experts", "combine"]
    for before, after in pairwise(named):
        assert before.time_range.end <= after.time_range.start
    assert "aten::mm" in {inner.name for event in named if event.name == "route" for inner in _below(event)}


def _below(event):
    return [inner for child in event.cpu_children for inner in (child, *_below(child))]


def test_who_watches_is_told_of_begin_and_end_also_where_a_stage_fails():
    told = []

    @contextmanager
    def watch(name):
        told.append(f"begin {name}")
        try:
            yield
        finally:
            told.append(f"end {name}")

    with watching(watch):
        with stage("forward"), stage("loss"):
            pass
        with pytest.raises(ZeroDivisionError), stage("backward"):
            1 / 0  # noqa: B018
    with stage("optimizer"):
        pass
    assert told == ["begin forward", "begin loss", "end loss", "end forward", "begin backward", "end backward"]


def test_under_compile_stages_are_not_traced():
    def f(x):
        with stage("attention"):
            return x + 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    with torch.profiler.profile(), torch.compiler.set_stance("fail_on_recompile"):
        compiled(torch.zeros(2))
