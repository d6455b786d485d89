"""A run whose replicas drift apart stops within the steps that the recipe says, before it saves what is spoilt."""

from __future__ import annotations

import pytest
import torch

from moe.config import load
from moe.errors import RankMismatch
from moe.train import loop
from tests.workers import run_ranks

BREAKS = 3  # step after which one rank's copy differs


def recipe(folder, check):
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x * {number}\n" * 40)
    path = folder / "tiny.yaml"
    path.write_text(f"""
run: {{folder: {folder / "run"}}}
model: {{layers: 1, d_model: 16, heads: 2, moe: {{experts: 4, d_expert: 16}}}}
data: {{sequence: 32, sources: [{{name: text, paths: ["{folder}/*.txt"]}}], validation: 0.3}}
train: {{steps: 8, batch: 4, check_replicas: {check}}}
evaluate: {{every: 8, sequences: 4, sample_tokens: 0}}
checkpoint: {{every: 2, mode: blocking}}
""")
    return path


def spoilt(rank, world, path):
    """What the run says, and the steps of which it left a checkpoint."""
    build = loop.build_engine

    def broken(*args, **options):
        engine = build(*args, **options)
        step = engine.step

        def step_and_drift(batch, number, lr):
            result = step(batch, number, lr)
            if number + 1 == BREAKS and rank == 1:
                with torch.no_grad():
                    engine.parameters["norm.weight"][0] += 1e-4
            return result

        engine.step = step_and_drift
        return engine

    loop.build_engine = broken
    said = ""
    try:
        loop.train(load([path]))
    except RankMismatch as error:
        said = str(error)
    saved = sorted(int(found.name.split("-")[-1]) for found in (path.parent / "run" / "checkpoints").glob("step-*"))
    return said, saved


@pytest.mark.parametrize(("check", "stops", "saved"), [("1", 3, [2]), ("100", 4, [2]), ("null", None, None)])
def test_a_run_whose_replicas_drift_apart_stops_before_it_saves(tmp_path, check, stops, saved):
    for said, kept in run_ranks(2, spoilt, recipe(tmp_path, check)):
        if stops is None:
            assert said == ""
            continue
        assert said.startswith(f"replicas have drifted apart by step {stops}: model.")
        assert "model.norm.weight on rank 0 differs from that on rank 1" in said or "more tensors" in said
        assert kept == saved
