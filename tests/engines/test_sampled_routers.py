"""Routers that draw experts, scale gradients or penalise gates train the same model on any number of ranks."""

from __future__ import annotations

import torch

from tests.engines.tiny_job import batch, difference, engine, same, train
from tests.workers import run_ranks

ROUTERS = {
    "paper": {"name": "sparse_mixer", "estimator": "v2_star", "jitter": 2.0, "balance_loss": 0.05, "output_scale": "learned"},
    "code": {"name": "sparse_mixer", "k": 1, "estimator": "v1", "jitter": 2.0, "input_jitter": 0.1, "balance_loss": 0.05},
    "cooling": {"name": "dense_to_sparse", "threshold": 0.1, "decay_steps": 4, "dense_steps": 1, "top_1_step": 4, "balance_loss": 0.05},
    "relu": {"name": "remoe", "k": 2, "penalty": 0.05},
}


def curves(rank, world, cases):
    return [
        train(engine(name, router=ROUTERS[router], optimizer="sgd", clip=None, **options), range(6), 5e-2)
        for router, name, options in cases
    ]


def test_two_and_four_ranks_train_the_model_of_one():
    alone = dict(zip(ROUTERS, run_ranks(1, curves, [(router, "ddp", {}) for router in ROUTERS])[0], strict=True))
    assert all(run.figures[-1][1] > 1e-4 for run in alone.values()), "an auxiliary loss has no part in the last step"
    for world, name, routers in ((2, "fsdp2", list(ROUTERS)), (4, "ddp", ["paper", "relu"])):
        runs = run_ranks(world, curves, [(router, name, {"accumulate": 2}) for router in routers])[0]
        for router, run in zip(routers, runs, strict=True):
            assert difference(run, alone[router]) < 1e-9, (world, name, router)


def penalties(rank, world):
    job = engine(router=ROUTERS["relu"], accumulate=4, balance_window="running")
    seen = [[router.penalty.item() for router in job.routers]]
    for step in range(3):
        result = job.step(batch(step, rank, world), step, 1e-2)
        seen.append([router.penalty.item() for router in job.routers])
        seen.append([int(report.load.sum()) > 2 * result.tokens for report in result.reports])
        job.evaluate(batch(9, rank, world), step)
    return seen


def test_the_penalty_moves_one_factor_a_global_batch():
    first, *rest = run_ranks(2, penalties)[0]
    penalty = torch.tensor(first)
    assert torch.equal(penalty, torch.full_like(penalty, 0.05))
    for found, crowded in zip(rest[::2], rest[1::2], strict=True):
        penalty = torch.where(torch.tensor(crowded), penalty * 1.2, penalty / 1.2)
        assert torch.equal(torch.tensor(found), penalty)


def recomputed(rank, world):
    pairs = []
    for router, dtype in (("paper", "bfloat16"), ("code", "float64"), ("cooling", "float64"), ("relu", "bfloat16")):
        jobs = [engine("fsdp2", router=ROUTERS[router], dtype=dtype, recompute=recompute) for recompute in ("none", "full")]
        pairs.append([train(job, range(2), 1e-2) for job in jobs])
    return pairs


def test_recomputation_changes_no_bit():
    for kept, again in run_ranks(2, recomputed)[0]:
        assert kept.figures == again.figures
        assert same(kept.state, again.state)
