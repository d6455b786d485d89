"""What a checkpoint's names cost: planning, saving and loading the experts of one large model under four key patterns.

    python -m benchmarks.checkpoint_keys [--quick] [--ranks 2] [--json FILE]

60 layers of 256 experts, each with weights and two moments, as tensors of a few bytes: what is timed is the bookkeeping, through the
store's own planner, writer and reader. The patterns: a key for each of an expert's three matrices; a key for each expert;
a key for the stack of all experts of a layer (up, down), cut along the experts' width over the ranks; the same keys, with every
expert written by whoever owns it (scattered over the ranks, as under a placement that moves). torch compares chunks along the
longest dimension of a tensor; the narrow pattern is that of a tensor whose longest dimension is the experts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from moe.checkpoint.reader import Reader, planner
from moe.checkpoint.writer import Planner, Writer, stored

EXPERTS, STATES = 256, ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
WIDTHS = {"stack": 512, "expert": 4, "stack, scattered owners": 512, "stack, scattered owners, narrow": 128, "matrix": 4}


class OwnedExperts(torch.Tensor):
    """A stack of which this rank holds some experts: what torch's DCP asks of a tensor it can cut anywhere."""

    rows: torch.Tensor
    owned: list[int]

    @staticmethod
    def __new__(cls, rows: torch.Tensor, owned: list[int], experts: int) -> OwnedExperts:
        tensor = torch.Tensor._make_wrapper_subclass(cls, (experts, *rows.shape[1:]), dtype=rows.dtype)
        tensor.rows, tensor.owned = rows, owned
        return tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        rest = (0,) * (self.dim() - 1)
        return [ChunkStorageMetadata(torch.Size((e, *rest)), torch.Size((1, *self.shape[1:]))) for e in self.owned]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        data = [TensorWriteData(chunk=chunk, properties=properties, size=self.size()) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        row = self.owned.index(index.offset[0])
        return self.rows[row : row + 1]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"{func} on a stack of which only some experts are here")


def build(pattern: str, layers: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's part of the state; every expert has one writer."""
    mine = [expert for expert in range(EXPERTS) if (expert * 7 + expert // 13) % world == rank]
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, torch.Tensor] = {}
    for kind in STATES:
        for layer in range(layers):
            name = f"{kind}.blocks.{layer}.moe.experts"
            if pattern in ("matrix", "expert"):
                parts = ("gate", "up", "down") if pattern == "matrix" else ("all",)
                state |= {f"{name}.{expert}.{part}": torch.ones(WIDTHS[pattern]) for expert in mine for part in parts}
            elif pattern == "stack":
                piece = torch.ones(EXPERTS, 1, WIDTHS[pattern] // world)
                state |= {f"{name}.{part}": DTensor.from_local(piece, mesh, [Shard(2)], run_check=False) for part in ("up", "down")}
            else:
                state |= {
                    f"{name}.{part}": OwnedExperts(torch.ones(len(mine), 1, WIDTHS[pattern]), mine, EXPERTS) for part in ("up", "down")
                }
    return state


class TimedPlanner(Planner):
    """Knows how long planning took, the ranks' talk included."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.begun = time.perf_counter()
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def finish_plan(self, new_plan: Any) -> Any:
        self.seconds = time.perf_counter() - self.begun
        return super().finish_plan(new_plan)


def measure(rank: int, world: int, pattern: str, layers: int, folder: str) -> dict[str, Any]:
    """One row of the table, on rank 0."""
    path = Path(folder) / "step"
    state = build(pattern, layers, rank, world)
    plan, writer = TimedPlanner({}), Writer(path, 0)
    dist.barrier()
    begun = time.perf_counter()
    dcp.save(dict(state), storage_writer=writer, planner=plan)
    by_rank: list[Any] = [None] * world
    dist.all_gather_object(by_rank, writer.written(rank))
    files = [file for written in by_rank for file in written]
    if rank == 0:
        assert writer.metadata is not None
        shapes = {name: torch.empty(entry.size, device="meta") for name, entry in writer.metadata.state_dict_metadata.items()}
        write_manifest(path, Manifest(0, {}, files, stored(writer.metadata, shapes, files), world))
    dist.barrier()
    saved = time.perf_counter()
    manifest = read_manifest(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(state), storage_reader=Reader(path, manifest, state), planner=planner(), no_dist=True)
    dist.barrier()
    loaded = time.perf_counter()
    return {
        "pattern": pattern,
        "ranks": world,
        "keys": len(manifest.tensors),
        "chunks": sum(len(tensor.chunks) for tensor in manifest.tensors.values()),
        "plan_seconds": round(plan.seconds, 2),
        "save_seconds": round(saved - begun, 2),
        "load_seconds": round(loaded - saved, 2),
        "manifest_megabytes": round((path / MANIFEST).stat().st_size / 1e6, 2),
        "checkpoint_megabytes": round(sum(file.bytes for file in files) / 1e6, 1),
    }


def _rank(rank: int, world: int, pattern: str, layers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    row = measure(rank, world, pattern, layers, folder)
    if rank == 0:
        Path(folder, "row.json").write_text(json.dumps(row))
    dist.barrier()
    os._exit(0)  # a process that used DTensor on gloo aborts now and then in its destructors


def run(pattern: str, world: int, layers: int) -> dict[str, Any]:
    """Measure one pattern in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, world, pattern, layers, folder)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(900)
            process.kill()
        return json.loads(Path(folder, "row.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 layers instead of 60")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    layers = 2 if options.quick else 60
    rows = []
    for pattern in WIDTHS:
        for world in options.ranks:
            rows.append(run(pattern, world, layers))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        machine = {"torch": str(torch.__version__), "python": platform.python_version(), "cores": os.cpu_count(), "layers": layers}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
