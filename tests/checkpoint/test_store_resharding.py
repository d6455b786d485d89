"""What is saved under one world and sharding loads bit for bit under any other."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe.checkpoint.store import Store
from moe.checkpoint.weights import load_weights, save_weights
from moe.checkpoint.writer import local, share
from moe.parallel.mesh import Mesh
from tests.workers import run_ranks

SHAPES = {  # name → shape, dtype, and the dimension that FSDP2 cuts
    "model.embedding.weight": ((7, 4), torch.bfloat16, 0),
    "model.blocks.0.moe.experts.up": ((3, 2, 8, 4), torch.float32, 2),
    "model.blocks.0.moe.experts.down": ((3, 4, 8), torch.float32, 2),
    "model.blocks.0.norm.weight": ((4,), torch.float64, 0),
    "model.blocks.0.moe.router.bias": ((3,), torch.float32, None),
    "optimizer.exp_avg.blocks.0.moe.experts.up": ((3, 2, 8, 4), torch.float32, 2),
    "optimizer.step": ((), torch.int64, None),
}


def mesh_of(rank: int, world: int) -> Mesh:
    return Mesh(rank, world, rank, torch.device("cpu"), 1, timedelta(seconds=30), dist.group.WORLD)


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype) for name, (shape, dtype, _) in SHAPES.items()
    }


def sharded(tensors, world: int, replicas: int = 1) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (replicas, world // replicas))
    return {
        name: tensor if (dim := SHAPES[name][2]) is None else distribute_tensor(tensor, mesh, [Replicate(), Shard(dim)])
        for name, tensor in tensors.items()
    }


def whole(state) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def save_sharded(rank, world, folder, replicas):
    state = sharded(values(), world, replicas)
    store = Store(folder, mesh_of(rank, world))
    store.save(5, state, {"loader": [1, 2], "lr": 0.1})
    return sorted(file.name for file in store.folder.glob("step-*/*.distcp"))


def load_into(rank, world, folder, kind):
    empty = {name: torch.full_like(tensor, 9) for name, tensor in values().items()}
    state = empty if kind == "plain" else sharded(empty, world)
    scalars = Store(folder, mesh_of(rank, world)).load(state)
    same = all(torch.equal(tensor, values()[name]) for name, tensor in whole(state).items())
    return scalars, same


def test_two_ranks_save_and_any_number_loads_the_same_bits(tmp_path):
    assert len(run_ranks(2, save_sharded, tmp_path, 1)[0]) == 2
    alone = {name: torch.zeros_like(tensor) for name, tensor in values().items()}
    assert Store(tmp_path).load(alone) == {"loader": [1, 2], "lr": 0.1}
    assert all(torch.equal(alone[name], tensor) for name, tensor in values().items())
    for world, kind in ((2, "plain"), (2, "sharded"), (4, "sharded")):
        assert run_ranks(world, load_into, tmp_path, kind) == [({"loader": [1, 2], "lr": 0.1}, True)] * world


def test_copies_of_a_shard_are_written_once(tmp_path):
    run_ranks(4, save_sharded, tmp_path, 2)
    expected = sum(tensor.nbytes for tensor in values().values())
    written = sum(file.stat().st_size for file in tmp_path.glob("step-*/*.distcp"))
    items = sum(2 if dim is not None else 1 for _, _, dim in SHAPES.values())
    assert expected < written < expected + items * 2048
    assert run_ranks(2, load_into, tmp_path, "sharded") == [({"loader": [1, 2], "lr": 0.1}, True)] * 2


def shared_out(rank, world):
    return {name: local(tensor) for name, tensor in share(sharded(values(), world, 2), rank, world).items()}


def test_every_element_has_one_writer():
    by_rank = run_ranks(4, shared_out)
    assert sum(tensor.numel() for part in by_rank for tensor in part.values()) == sum(tensor.numel() for tensor in values().values())
    assert all(by_rank)


def train_and_save(rank, world, folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    store, kept = Store(folder, mesh_of(rank, world)), {}
    for step in (1, 2, 3):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {f"model.{name}": p for name, p in model.named_parameters()}
        state |= {f"optimizer.exp_avg.{name}": optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
        kept[step] = {name: tensor.detach().clone() for name, tensor in whole(state).items()}
        store.save(step, state, {"step": step}, background=True)
    store.finish()
    store.load(state, step=2)
    model(torch.ones(2, 6))
    return kept, {name: tensor.detach().clone() for name, tensor in whole(state).items()}


def test_an_fsdp2_model_is_saved_while_it_trains_on(tmp_path):
    kept, back = run_ranks(2, train_and_save, tmp_path)[0]
    assert all(torch.equal(back[name], tensor) for name, tensor in kept[2].items())
    for step, state in kept.items():
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        assert Store(tmp_path).load(found, step=step) == {"step": step}
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def save_plain(rank, world, folder):
    Store(folder, mesh_of(rank, world)).save(5, values(), {})


def test_replicated_tensors_are_shared_out_among_the_writers(tmp_path):
    run_ranks(2, save_plain, tmp_path)
    sizes = [file.stat().st_size for file in tmp_path.glob("step-*/*.distcp")]
    assert len(sizes) == 2
    assert min(sizes) > max(sizes) / 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_reads_the_folder(tmp_path):
    Store(tmp_path).save(5, values(), {})
    state = {name: torch.zeros_like(tensor) for name, tensor in values().items()}
    dcp.load(state, checkpoint_id=tmp_path / "step-00000005")
    assert all(torch.equal(state[name], tensor) for name, tensor in values().items())


def disagree(rank, world, folder):
    store = Store(folder, mesh_of(rank, world))
    messages = []
    for step, state in ((5 + rank, values()), (5, values() | {"model.extra": torch.zeros(1)} if rank else values())):
        try:
            store.save(step, state, {})
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages, store.steps(), dist.get_rank()


def test_ranks_that_save_different_things_stop_together(tmp_path):
    results = run_ranks(2, disagree, tmp_path)
    assert results[0][0] == results[1][0]
    assert "RankMismatch: rank 1 saves step 6 where rank 0 saves step 5" in results[0][0][0]
    assert "other names, shapes or dtypes" in results[0][0][1]
    assert results[0][1] == []


def save_final(rank, world, folder):
    save_weights(folder / "weights", sharded(values(), world), mesh_of(rank, world), file_bytes=500)


def test_final_weights_are_whole_keep_their_dtype_and_leave_the_optimizer_out(tmp_path):
    run_ranks(2, save_final, tmp_path)
    weights = load_weights(tmp_path / "weights")
    expected = {name.removeprefix("model."): tensor for name, tensor in values().items() if name.startswith("model.")}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) and weights[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert len(list((tmp_path / "weights").glob("model-*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
