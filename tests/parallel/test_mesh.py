"""The mesh: joining a job, agreeing, and one rank acting for all."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moe.errors import ConfigError, DataError
from moe.parallel import deadline
from moe.parallel.layout import Layout
from moe.parallel.mesh import Mesh, start
from tests.workers import run_ranks

CPU = Layout(device="cpu", timeout=20)


def identity(rank: int, world: int) -> tuple:
    mesh = start(CPU)
    return mesh.rank, mesh.world, mesh.first, mesh.local_rank, str(mesh.device), dist.get_backend(mesh.control) if mesh.control else None


def alone(rank: int, world: int) -> tuple:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    mesh = start(CPU)
    done = []
    mesh.first_does(lambda: done.append(1))
    return dist.is_initialized(), mesh.world, mesh.agree(3), mesh.sum(torch.ones(2)).tolist(), mesh.gather(b"x"), mesh.dense().shape, done


def exchanges(rank: int, world: int) -> tuple:
    mesh = start(CPU)
    x = torch.full((2,), float(rank), dtype=torch.float64)
    return mesh.agree(rank == 1), mesh.sum(x).tolist(), x.tolist(), mesh.gather(b"ab" * rank)


def acts(rank: int, world: int, folder: str) -> list:
    mesh, seen = start(CPU), []
    mesh.first_does(lambda: (time.sleep(0.3), open(f"{folder}/by-{rank}", "w").close()))
    seen.append(sorted(os.listdir(folder)))
    for error in (DataError("an empty corpus"), ValueError("odd")):
        try:
            mesh.first_does(lambda error=error: _raise(error))
        except Exception as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    return seen


def _raise(error: Exception) -> None:
    raise error


def dense(rank: int, world: int, replicas: int) -> tuple:
    grid = start(CPU.model_copy(update={"replicas": replicas})).dense()
    timeouts = [grid.get_group(name)._get_backend(torch.device("cpu")).options._timeout for name in grid.mesh_dim_names]
    return grid.mesh_dim_names, tuple(grid.shape), timeouts


def absent(rank: int, world: int) -> str:
    mesh = start(CPU)
    if rank == 1:
        time.sleep(3)  # does not answer in time
        said = ""
    else:
        deadline.ROLL_CALL_SECONDS = 1
        said = deadline.roll_call()
    dist.destroy_process_group()
    return said or str(mesh.rank)


@pytest.mark.parametrize("world", [1, 3])
def test_start_adopts_the_group_that_exists(world):
    gloo = "gloo" if world > 1 else None
    assert run_ranks(world, identity) == [(rank, world, rank == 0, rank, "cpu", gloo) for rank in range(world)]


def test_alone_there_is_a_group_too_and_every_verb_works():
    assert run_ranks(1, alone) == [(True, 1, 3, [1.0, 1.0], [b"x"], (1,), [1])]


def test_flags_sums_and_bytes_reach_every_rank():
    for rank, result in enumerate(run_ranks(3, exchanges)):
        assert result == (1, [3.0, 3.0], [float(rank)] * 2, [b"", b"ab", b"abab"])


def test_the_first_rank_acts_once_and_its_error_is_everyones(tmp_path):
    first, *others = run_ranks(3, acts, str(tmp_path))
    assert first == [["by-0"], "DataError: an empty corpus", "ValueError: odd"]
    assert others == [[["by-0"], "DataError: an empty corpus", "RuntimeError: rank 0 failed: ValueError: odd"]] * 2


@pytest.mark.parametrize(("replicas", "names", "shape"), [(1, ("shard",), (4,)), (2, ("replicate", "shard"), (2, 2))])
def test_dense_mesh_has_the_jobs_timeout_on_every_group(replicas, names, shape):
    assert run_ranks(4, dense, replicas) == [(names, shape, [timedelta(seconds=20)] * len(names))] * 4


def test_the_roll_call_names_the_silent_rank():
    said = run_ranks(3, absent)
    assert said[0] == "no answer from rank 1 within 1 s"
    assert "rank 0" in said[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_an_absent_gpu_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"parallel\.device=cuda, but torch sees no GPU here; use parallel\.device=cpu"):
        start(Layout(device="cuda"))


def test_a_mesh_cannot_be_changed():
    mesh = Mesh(0, 1, 0, torch.device("cpu"), 1, timedelta(seconds=1), None)
    with pytest.raises(AttributeError):
        mesh.rank = 1
