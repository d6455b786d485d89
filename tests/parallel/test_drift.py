"""Copies that drift apart stop the run, by the name of what differs and the ranks: weights, moments, router state."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.errors import RankMismatch
from moe.parallel.drift import check_replicas, digest
from tests.engines.tiny_job import batch, engine, mesh
from tests.workers import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_sees_one_bit_and_one_exchange_anywhere(dtype):
    x = torch.randn(600_001, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    original = digest(x)
    assert digest(x.clone()) == original
    assert digest(x.view(1, -1).T) == original
    for place in (0, 1, 2**18, 600_000):
        changed = x.clone()
        changed.view(torch.uint8).view(len(x), -1)[place, 0] ^= 1
        assert digest(changed) != original
    exchanged, different = x.clone(), (x != x[0]).nonzero()
    if dtype == torch.bool:
        return
    different = different[-1, 0]
    exchanged[0], exchanged[different] = x[different], x[0]
    assert digest(exchanged) != original


def test_constants_of_any_length_have_digests_of_their_own():
    for length in (1, 2, 4096, 2**18, 2**19):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            found = [int(digest(torch.full((length,), value, dtype=dtype))) for value in (0.0, 0.5, 1.0, 2.0, 3.0, -1.0)]
            assert len(set(found)) == 6
    assert digest(torch.empty(0)) == 0


def verdict(check) -> str:
    try:
        check()
    except RankMismatch as error:
        return str(error)
    return ""


def perturbed(rank, world, name, options, key, who):
    """What the check says before and after one element of this rank's state has changed in its last bit."""
    job = engine(name, **options)
    job.step(batch(0, rank, world), 0, 1e-2)
    said = [verdict(lambda: check_replicas(mesh(), job.canonical_state(), 1))]
    if rank in who:
        tensor = job.canonical_state()[key]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.detach().view(-1).view(torch.int64 if local.element_size() == 8 else torch.int32)[0] ^= 1
    said.append(verdict(lambda: check_replicas(mesh(), job.canonical_state(), 2)))
    return said


EXPERTS = "layers.0.moe.experts.up"
CASES = [
    (2, "ddp", {}, "model.layers.1.attention.q.weight", [1], "rank"),
    (4, "ddp", {}, "optimizer.exp_avg_sq.head.weight", [2], "on rank 2 differs from that on ranks 0, 1, 3"),
    (4, "ddp", {}, "model.layers.0.moe.router.bias", [0, 3], "on ranks"),
    (2, "fsdp2", {}, "model.layers.1.moe.router.bias", [1], "rank"),
    (4, "fsdp2", {"replicas": 2}, "model.layers.0.attention.o.weight", [1], "on rank"),
    (4, "fsdp2", {"replicas": 2}, "optimizer.exp_avg.embed.weight", [2], "on rank"),
    (4, "ddp", {"expert_ranks": 2}, f"model.{EXPERTS}", [3], "on rank"),
    (4, "ddp", {"expert_ranks": 2}, f"optimizer.exp_avg.{EXPERTS}", [0], "on rank"),
    (4, "fsdp2", {"replicas": 2, "expert_ranks": 2}, f"model.{EXPERTS}", [1], "on rank"),
]


@pytest.mark.parametrize(("world", "name", "options", "key", "who", "words"), CASES)
def test_one_bit_on_one_rank_is_named(world, name, options, key, who, words):
    for before, after in run_ranks(world, perturbed, name, options, key, who):
        assert before == ""
        assert f"by step 2: {key} {words if words.startswith('on') else 'on'}" in after
        named = {int(number) for number in re.findall(r"\d+", after.split(f"{key} on ", 1)[1].split("; ")[0])}
        assert set(who) <= named
        if "expert_ranks" in options and "replicas" not in options:
            assert named == {who[0], (who[0] + 2) % 4}  # those that hold the same experts
        if options.get("replicas") == 2:
            assert named == {who[0], (who[0] + 2) % 4}  # those that hold the same part in both copies


def parts(rank, world):
    """What may differ: parts of a cut tensor, and nothing else."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    local = torch.full((3,), float(rank % 2))
    cut = DTensor.from_local(local, grid, [Replicate(), Shard(0)], run_check=False)
    copied = DTensor.from_local(local, grid, [Replicate(), Replicate()], run_check=False)
    return [verdict(partial(check_replicas, mesh(), {"x": x}, 0)) for x in (cut, copied, cut.to_local())]


def test_parts_of_a_cut_tensor_may_differ_and_copies_may_not():
    for cut, copied, plain in run_ranks(4, parts):
        assert cut == ""
        assert "x on ranks 0, 2 differs from that on ranks 1, 3" in copied
        assert "x on ranks 0, 2 differs from that on ranks 1, 3" in plain


def alone(rank, world):
    check_replicas(mesh(), {"x": torch.ones(1)}, 0)


def test_one_rank_has_nothing_to_compare():
    run_ranks(1, alone)
