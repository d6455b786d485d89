"""Traces of real runs: every stage on every rank, nested as it ran, and nothing else of the run changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moe.config import load
from moe.errors import ConfigError
from moe.train.profile import profile
from moe.train.trace import host_spans
from tests.workers import run_command as moe
from tests.workers import run_ranks

STAGES = {"attention", "route", "dispatch", "experts", "combine"}
RECIPE = """
model: {layers: 2, d_model: 32, heads: 2, moe: {experts: 4, d_expert: 32, router: {name: top_k, k: 2}}}
data: {sequence: 32, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 5, batch: 4}
evaluate: {sequences: 4, sample_tokens: 0}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % (folder / "*.txt"))
    return path


def events(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def above(span):
    while span.parent is not None:
        span = span.parent
        yield span.name


def check(path: Path, steps: list[int]) -> None:
    """Each step holds a forward pass, which holds two layers with the stages in order, and the backward pass names them again."""
    found = events(path)
    spans = [span for span in host_spans(found) if span.category == "user_annotation"]
    for step in steps:
        inside = [span for span in spans if f"step {step}" in above(span)]
        for layer in ("layer 0", "layer 1"):
            names = [span.name for span in inside if {layer, "forward"} <= set(above(span))]
            assert names == ["attention", "route", "dispatch", "experts", "combine"]
        assert {"read batch", "backward", "wait for figures", "optimizer"} <= {span.name for span in inside}
    backward = {event["name"] for event in found if event.get("cat") == "backward stage"}
    assert {f"{stage} backward" for stage in STAGES - {"combine"}} <= backward  # a layer's sum may be part of its experts' operator


def profiled(rank, world, recipe, folder):
    profile(load([recipe], [f"run.folder={folder}", "parallel.expert_ranks=2"]), warm_up=2, steps=2)


def test_every_rank_has_a_trace_with_all_stages(recipe, tmp_path):
    run_ranks(2, profiled, recipe, tmp_path / "run")
    for rank in range(2):
        check(tmp_path / "run-profile" / f"rank{rank}-step3-4.json.gz", [3, 4])
        assert "experts" in (tmp_path / "run-profile" / f"rank{rank}-step3-4.txt").read_text()
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "run-profile").glob(".*"))


@pytest.mark.slow
def test_profile_prints_tables_and_leaves_the_run_alone(recipe, tmp_path):
    done = moe("profile", recipe, f"run.folder={tmp_path / 'run'}", "--nproc", "2", "--warm-up", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "run-profile").glob("*.gz")) == ["rank0-step3.json.gz", "rank1-step3.json.gz"]
    for word in ("stage, ms a step", "aten::mm", "all-reduce", "without the profiler a step took", "ui.perfetto.dev"):
        assert word in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_traces_the_steps_it_is_told_to(recipe, tmp_path):
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    for folder, more in ((plain, []), (traced, ["log.profile=[1,3,4]"])):
        done = moe("train", recipe, f"run.folder={folder}", *more)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (traced / "profile").glob("*.json.gz")) == ["rank0-step1.json.gz", "rank0-step3-4.json.gz"]
    check(traced / "profile" / "rank0-step1.json.gz", [1])
    check(traced / "profile" / "rank0-step3-4.json.gz", [3, 4])
    assert not (plain / "profile").exists()
    losses = [[json.loads(row).get("loss") for row in (run / "metrics.jsonl").read_text().splitlines()] for run in (plain, traced)]
    assert losses[0] == losses[1]


def test_steps_that_are_never_reached_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"log.profile names step 6, and the run ends at train.steps=5; name steps that it reaches"):
        load([recipe], ["log.profile=[2,6]"])
