"""Engines whose tokens travel in chunks train the model of one process: sharding, replicas, recomputation, accumulation, telemetry."""

from __future__ import annotations

from typing import Any

import pytest

from moe.parallel.telemetry import KINDS, STAGES, Telemetry
from tests.engines.test_expert_parallel import ADAMW, SGD, compare
from tests.engines.test_fssdp import HECATE, moving
from tests.engines.tiny_job import batch, difference, engine, train
from tests.workers import run_ranks

CHUNKS: dict[str, Any] = {"expert_ranks": 2, "overlap": 2}


def test_two_expert_ranks_train_the_model_of_one_process():
    cases = [
        {**ADAMW, "name": "ddp", "exchange": "rows"},
        {**SGD, "name": "ddp", "exchange": "fixed", "accumulate": 2, "recompute": "full"},
        {**SGD, "name": "fsdp2", "exchange": "tokens", "recompute": "experts"},
        {**ADAMW, "name": "fsdp2", "exchange": "rows", "recompute": "full", "overlap": 3},
    ]
    compare(2, [{**CHUNKS, **case} for case in cases])


@pytest.mark.slow
def test_four_ranks_of_two_expert_ranks_train_the_model_of_one_process():
    cases = [
        {**SGD, "name": "fsdp2", "accumulate": 2, "recompute": "full"},
        {**SGD, "name": "fsdp2", "replicas": 2, "exchange": "tokens"},
        {**ADAMW, "name": "ddp", "accumulate": 2, "overlap": 3},
    ]
    compare(4, [{**CHUNKS, **case} for case in cases])


def test_replicas_of_experts_that_come_and_go_change_nothing():
    """Placements that change at every step, foreseen and chosen after the routers; recomputed blocks fetch replicas again."""
    cases = [
        {**SGD, "name": "ddp", "copies": {**HECATE, "chosen": "both"}, "recompute": "full"},
        {**SGD, "name": "fsdp2", "copies": HECATE, "exchange": "tokens"},
    ]
    cases = [{**CHUNKS, **case} for case in cases]
    (runs, placements), _ = run_ranks(2, moving, cases, 3)
    plain = run_ranks(1, alone, 3)[0]
    assert placements > 2
    for case, run in zip(cases, runs, strict=True):
        assert difference(run, plain) < 1e-10, case


def alone(rank, world, steps):
    return train(engine(optimizer="sgd", clip=None), range(steps), SGD["lr"])


def watched(rank, world):
    plain, job = (engine("fsdp2", **CHUNKS) for _ in range(2))
    telemetry = Telemetry(job.model, None, job.mesh)
    with telemetry.watch(True):
        job.step(batch(0, rank, world), 0, 1e-2)
    layers = telemetry.figures()
    train(plain, range(1), 1e-2)
    return layers, difference(train(job, range(1, 2), 1e-2), train(plain, range(1, 2), 1e-2))


def test_stages_are_timed_and_bytes_counted_in_chunks_too():
    for layers, apart in run_ranks(2, watched):
        assert apart == 0
        for layer in layers:
            assert min(layer["ms"][stage + way] for stage in STAGES[:4] for way in ("", "_back")) > 0
            assert layer["bytes"]["tokens"] > 0
            assert set(layer["bytes"]) == set(KINDS)
