"""What a GPU alone can show: peaks of each stage, a snapshot, a trace whose kernels belong to stages, segments that grow."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from moe.config import load
from moe.errors import OutOfMemory
from moe.kernels.memory import SETTINGS, expandable_segments
from moe.train.loop import train
from moe.train.memory import explaining
from moe.train.trace import summarise
from tests.gpu.problems import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")]

RECIPE = """
model: {layers: 2, d_model: 256, heads: 4, moe: {experts: 8, d_expert: 256, router: {name: top_k, k: 2}}}
data: {sequence: 256, sources: [{name: text, paths: ["%s"]}], validation: 0.3}
train: {steps: 6, batch: 8, dtype: bfloat16}
parallel: {device: cuda}
evaluate: {sequences: 4, sample_tokens: 0}
log: {every: 1, profile: [4], memory: [5]}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and rows."""
    folder = tmp_path_factory.mktemp("seen")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 200)
    (folder / "r.yaml").write_text(RECIPE % (folder / "*.txt"))
    train(load([folder / "r.yaml"], [f"run.folder={folder / 'run'}"]))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return folder / "run", [row for row in rows if "loss" in row]


def test_each_stage_has_its_peak_and_none_is_below_what_lay_there_before(run):
    for row in run[1]:
        memory = row["memory"]
        assert set(memory) == {"resident", "forward", "backward", "optimizer"}
        assert 0 < memory["resident"] <= min(memory.values())
        assert max(memory.values()) <= row["memory_gib"]


def test_a_snapshot_is_written_for_the_step_that_was_asked_for(run):
    (path,) = (run[0] / "memory").iterdir()
    assert path.name == "rank0-step5.pickle"
    assert path.stat().st_size > 10_000


def test_kernels_of_a_trace_belong_to_the_stages_that_launched_them(run):
    with gzip.open(run[0] / "profile" / "rank0-step4.json.gz", "rt") as file:
        found = summarise(json.load(file)["traceEvents"], 1)
    assert found.gpu
    for key in [("experts", False), ("experts", True), ("attention", False), ("attention", True), ("route", False), ("optimizer", False)]:
        assert found.stages[key].device > 0, key
    assert found.stages["other", False].device < 0.2 * sum(cost.device for cost in found.stages.values())


def test_segments_grow():
    if not expandable_segments():
        pytest.skip(f"one of {', '.join(SETTINGS)} is set")
    torch.cuda.empty_cache()
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    segments = torch.cuda.memory_snapshot()
    assert any(segment["is_expandable"] for segment in segments if segment["total_size"] >= kept.nbytes)


def test_out_of_memory_is_explained_with_what_is_held(tmp_path):
    mesh = type("Mesh", (), {"device": torch.device("cuda", 0), "rank": 0, "world": 1})()
    (tmp_path / "r.yaml").write_text("model: {layers: 1}\n")
    with (
        pytest.raises(OutOfMemory, match=r"were asked for; [\d.]+ of [\d.]+ GiB were free; held: activations"),
        explaining(load([tmp_path / "r.yaml"], []), mesh),
    ):
        torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
