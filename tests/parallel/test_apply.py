"""What `parallelize` changes of a model, and that it changes nothing else."""

from __future__ import annotations

import torch

from moe.parallel.apply import parallelize
from tests.engines.tiny_job import mesh, model
from tests.workers import run_ranks


def totals(rank, world):
    built = model()
    parallelize(built, mesh(), recompute="full", compile=False)
    found = [router.total(torch.ones(2)).tolist() for router in built.routers().values()]
    return found, [block.recompute for block in built.layers], list(built.state_dict())


def test_routers_sum_over_ranks_and_blocks_recompute():
    for world in (1, 2):
        for found, recompute, names in run_ranks(world, totals):
            assert found == [[world, world]] * 2
            assert recompute == [True, True]
            assert names == list(model().state_dict())


def compiled(rank, world):
    built = model()
    parallelize(built, mesh(), recompute="none", compile=True)
    routers = [(vars(router).get("forward") is not None) == (router.eager is None) for router in built.routers().values()]
    return [block.compiled is not None for block in built.layers], routers, list(built.state_dict())


def test_compilation_takes_blocks_and_routers_and_renames_nothing():
    blocks, routers, names = run_ranks(1, compiled)[0]
    assert blocks == [True] * len(model().layers)
    assert routers == [True] * len(model().routers())
    assert names == list(model().state_dict())
