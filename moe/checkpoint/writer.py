"""Writing the shards of a checkpoint through torch's DCP, hashed while they are written."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from moe import faults
from moe.checkpoint.manifest import Chunk, File, Stored, describe, incomplete
from moe.errors import CheckpointError


def share(state: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The part of the state that this rank writes, so that everything has one writer.

    A plain tensor is the same on all ranks; plain ones are dealt out by bytes. Copies of a DTensor's shard take turns by name.
    """
    load, mine = [0] * world, {}
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if isinstance(tensor, DTensor):
            if _writes(name, tensor, number):
                mine[name] = tensor
            continue
        writer = load.index(min(load))
        load[writer] += max(1, tensor.nbytes)
        if writer == rank:
            mine[name] = tensor
    return mine


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _writes(name: str, tensor: DTensor, number: int) -> bool:
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"{name} is a sum that was never completed over its ranks; redistribute it before saving")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or tensor.to_local().numel() == 0:
        return False
    copies = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return all(coordinate[dim] == number % tensor.device_mesh.size(dim) for dim in copies)


class Planner(DefaultSavePlanner):
    """Plans from the live tensors, and writes their copies where it is given some."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.copies[index.fqn] if index.fqn in self.copies else super().lookup_object(index)


class Writer(FileSystemWriter):
    """Writes one file a rank, and knows every file it wrote and where each chunk lies. The folder is an ordinary DCP folder."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, sync_files=True)
        self.step = step
        self.fs = self.files = _HashingFiles(step)
        self.metadata: Metadata | None = None  # of all ranks, on rank 0

    def storage_meta(self) -> StorageMeta | None:
        return None  # it would hold this machine's path

    def write_data(self, plan: Any, planner: Any) -> Any:
        faults.point("checkpoint/before", self.step)
        try:
            return super().write_data(plan, planner)
        except Exception:
            if self.files.error is not None:
                raise self.files.error from None
            raise

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        # torch 2.11 writes a copy that it has completed, and leaves this one without the places
        metadata.storage_data = {written.index: written.storage_data for of_rank in results for written in of_rank}
        self.metadata = metadata

    def written(self, rank: int) -> list[File]:
        """The files this rank wrote."""
        faults.point("checkpoint/after_shards", self.step)
        return [File(name, size, digest, rank) for name, (size, digest) in sorted(self.files.done.items())]


def stored(metadata: Metadata, state: Mapping[str, Tensor], files: list[File]) -> dict[str, Stored]:
    """The manifest's table of tensors; CheckpointError if no rank wrote some part of one."""
    number = {file.name: index for index, file in enumerate(files)}
    table = {}
    for name, (dtype, shape) in describe(state).items():
        entry = metadata.state_dict_metadata.get(name)
        boxes = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        chunks = []
        for box in boxes:
            place = metadata.storage_data[MetadataIndex(name, box.offsets)]
            chunks.append(Chunk(tuple(box.offsets), tuple(box.sizes), number[place.relative_path], place.offset, place.length))
        if wrong := incomplete(name, shape, chunks):
            raise CheckpointError(f"the ranks hold {wrong}")
        table[name] = Stored(dtype, shape, chunks)
    return table


class _HashingFiles(FileSystem):
    """Plain files whose digest is known once they are written."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.done: dict[str, tuple[int, str]] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb"
        with self.noting(), open(path, mode) as raw:
            stream = _HashingStream(raw, self)
            yield stream
        self.done[Path(path).name] = (stream.size, stream.digest.hexdigest())

    @contextmanager
    def noting(self) -> Generator[None, None, None]:
        """Remember an error of the disk: torch's zip writer loses its number on the way up."""
        try:
            yield
        except OSError as error:
            self.error = error
            raise

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.done[Path(new_path).name] = self.done.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    def __init__(self, raw: Any, files: _HashingFiles) -> None:
        self.raw, self.files = raw, files
        self.size, self.digest = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        with self.files.noting():
            self.raw.write(data)
            faults.point("checkpoint/shard", self.files.step)
        self.digest.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        with self.files.noting():
            if not self.raw.closed:
                self.raw.flush()

    def fileno(self) -> int:
        self.flush()  # who asks is about to fsync, and torch does not flush before
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        pass  # torch closes every stream it is given; who opened the file closes it
