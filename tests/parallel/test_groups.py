"""Process groups of each layout: one for each set of ranks whose collectives need their own order, made once."""

from __future__ import annotations

from torch import distributed as dist

from tests.engines.tiny_job import batch, engine, mesh
from tests.workers import run_ranks

HECATE = {"policy": "hecate", "copies": 2, "hidden": 2}
# Layout on four ranks → its groups beside the default one and those of the host (control, roll call), with their ranks.
GROUPS = {
    "ddp": ({}, {"routers": 4}),
    "ddp, 2 expert ranks": ({"expert_ranks": 2}, {"routers": 4, "alone": 1, "shard of experts": 2, "expert of experts": 2}),
    "ddp, 4 expert ranks": ({"expert_ranks": 4, "experts": 8, "overlap": 2}, {"routers": 4, "alone": 1, "expert of experts": 4}),
    "fsdp2": ({"name": "fsdp2"}, {"routers": 4}),
    "fsdp2, 2 expert ranks": (
        {"name": "fsdp2", "expert_ranks": 2},
        {"routers": 4, "alone": 1, "shard of experts": 2, "expert of experts": 2},
    ),
    "HSDP": ({"name": "fsdp2", "replicas": 2}, {"routers": 4, "replicate": 2, "shard of dense": 2}),
    "HSDP, 2 expert ranks": (
        {"name": "fsdp2", "replicas": 2, "expert_ranks": 2},
        {"routers": 4, "alone": 1, "replicate": 2, "shard of dense": 2, "expert of experts": 2},
    ),
    "FSSDP": (
        {"expert_ranks": 2, "copies": HECATE},
        {"routers": 4, "alone": 1, "shard of experts": 2, "expert of experts": 2, "replicas of experts": 2},
    ),
    "FSSDP, 4 expert ranks": (
        {"expert_ranks": 4, "experts": 8, "copies": HECATE},
        {"routers": 4, "alone": 1, "expert of experts": 4, "replicas of experts": 4},
    ),
}


def made(rank: int, world: int) -> dict[str, tuple[dict[str, int], list[int], bool]]:
    known, start, found = dist.distributed_c10d._world.pg_map, mesh(), {}
    for name, (layout, _) in GROUPS.items():
        start.made.clear()
        before = len(known)
        job = engine(**layout)
        counts = [len(known) - before]
        engine(**layout)
        counts.append(len(known) - before)
        groups = {purpose: dist.get_world_size(group) for (purpose, _), group in start.made.items()}
        own = len({id(group) for group in start.made.values()} - {id(dist.group.WORLD)}) == len(groups)
        found[name] = groups, counts, own
        if "FSSDP" in name:
            job.step(batch(0, rank, world), 0, 1e-2)
    return found


def test_each_group_is_made_once_and_none_is_shared_by_two_purposes():
    for found in run_ranks(4, made):
        for name, (_, expected) in GROUPS.items():
            assert found[name] == (expected, [len(expected)] * 2, True), name
