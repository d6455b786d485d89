"""Engines and the store together: what is saved by one layout goes on in another."""

from __future__ import annotations

import pytest

from moe.checkpoint.store import Store
from tests.engines.tiny_job import difference, engine, mesh, train
from tests.workers import run_ranks


def save(rank, world, folder, name):
    job = engine(name)
    train(job, range(2), 1e-2)
    Store(folder, mesh()).save(2, job.canonical_state(), {})
    return train(job, range(2, 4), 1e-2)


def resume(rank, world, folder, name):
    job = engine(name)
    state = job.canonical_state()
    Store(folder, mesh()).load(state)
    job.load_canonical(state)
    return train(job, range(2, 4), 1e-2)


@pytest.mark.parametrize(("name", "other"), [("fsdp2", "ddp"), ("ddp", "fsdp2")])
def test_a_checkpoint_goes_on_bit_for_bit_here_and_within_rounding_elsewhere(tmp_path, name, other):
    uninterrupted = run_ranks(2, save, tmp_path, name)[0]
    assert difference(run_ranks(2, resume, tmp_path, name)[0], uninterrupted) == 0
    assert difference(run_ranks(4 if other == "fsdp2" else 1, resume, tmp_path, other)[0], uninterrupted) < 1e-12
