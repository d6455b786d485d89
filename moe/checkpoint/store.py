"""The store: save a step on all ranks or on none, find the newest whole one, load it into any sharding."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed.checkpoint as dcp
from torch import Tensor

from moe import faults
from moe.checkpoint import shelf
from moe.checkpoint.manifest import Damaged, File, Manifest, describe, differences, read_manifest, signature, write_manifest
from moe.checkpoint.ranks import Ranks
from moe.checkpoint.reader import Reader, planner, verify
from moe.checkpoint.writer import Planner, Writer, local, share, stored
from moe.errors import CheckpointError, ConfigError, MoeError, NoSpace, RankMismatch
from moe.parallel.deadline import wait_for_device
from moe.parallel.mesh import Mesh

log = logging.getLogger("moe.checkpoint")


class _Job(NamedTuple):
    """A save whose folder is made and whose values are fixed."""

    step: int
    folder: Path
    bytes: int  # of all ranks
    state: Mapping[str, Tensor]  # all of it, for names and shapes
    mine: Mapping[str, Tensor]  # what this rank writes
    copies: Mapping[str, Tensor]  # the values to write, where training goes on meanwhile
    scalars: dict[str, Any]


class _Flight(threading.Thread):
    """A save that runs beside training."""

    def __init__(self, store: Store, job: _Job) -> None:
        super().__init__(name=f"checkpoint-{job.step}", daemon=True)
        self.store, self.job = store, job
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.store._write(self.job)
        except BaseException as error:  # raised again where training looks
            self.error = error


class Store:
    """Checkpoints of one run in a folder that all ranks see. Every rank constructs it, and calls each method.

    A plain tensor of a state is the same on all ranks; a DTensor is sharded as it says. `scalars` are JSON, those of rank 0.
    """

    def __init__(self, folder: str | Path, mesh: Mesh | None = None, *, keep: int = 3, durable_every: int | None = None) -> None:
        if keep < 2:
            raise ConfigError(f"checkpoint.keep={keep} leaves nothing to fall back to; choose 2 or more")
        self.folder, self.keep, self.durable_every = Path(folder), keep, durable_every
        self.ranks = Ranks(mesh)
        self.mesh = mesh
        self.skipped: list[str] = []  # what the last load passed over, and why
        self._parent: int | None = None
        self._flight: _Flight | None = None
        self._cleaned = False

    def steps(self) -> list[int]:
        """Committed steps, newest first, damaged ones included."""
        return self.ranks.first_does(lambda: list(shelf.committed(self.folder)))

    def save(self, step: int, state: Mapping[str, Tensor], scalars: dict[str, Any], *, background: bool = False) -> None:
        """Save a step; with `background`, return once the values are copied, and learn the outcome from `poll`.

        Raises the same error on every rank (NoSpace, CheckpointError, RankMismatch) and leaves earlier checkpoints as they
        were; waits for the save before, and raises what that failed of if nobody has looked. A committed step is never written
        into: the same content is kept, other content replaces it whole.
        """
        self.finish()
        state = dict(sorted(state.items()))
        for device in {tensor.device for tensor in state.values()}:
            wait_for_device(device)  # here, because a timeout within `together` would be told to ranks that cannot hear it
        self._vote(step, state, scalars)
        mine = share(state, self.ranks.rank, self.ranks.world)
        needed = sum(self.ranks.together(lambda: sum(local(tensor).nbytes for tensor in mine.values())))
        copies = self._copy(mine) if background else {}
        job = _Job(step, self._open(step, needed), needed, state, mine, copies, json.loads(json.dumps(scalars)))
        if background:
            self._flight = _Flight(self, job)
            self._flight.start()
        else:
            self._write(job)

    def poll(self) -> int | None:
        """The step that a background save committed since the last call, or None; raises what it failed of, on every rank.

        Call it once a step on every rank: while a save runs it costs one small reduction, otherwise nothing.
        """
        if self._flight is None:
            return None
        running = self._flight.is_alive()
        if self.mesh.agree(running) if self.mesh else running:  # not over `ranks`, which the background uses
            return None
        return self.finish()

    def finish(self) -> int | None:
        """Wait for the background save, if there is one; the same answer as `poll`."""
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        flight.join()
        if flight.error is not None:
            raise flight.error
        return flight.job.step

    def load(
        self,
        state: Mapping[str, Tensor],
        step: int | None = None,
        *,
        prefix: str = "",
        damaged: Literal["skip", "stop"] = "skip",
    ) -> dict[str, Any]:
        """Fill `state` in place from the newest whole checkpoint and return its scalars.

        A damaged checkpoint is passed over for the next older one by all ranks together, logged and listed in `skipped`;
        one of another model is an error, as is a damaged one if a `step` was asked for or under "stop". With a `prefix`, only
        names that begin with it are compared and read.
        """
        self.finish()
        candidates, unfinished = self.ranks.first_does(lambda: (shelf.committed(self.folder), shelf.unfinished(self.folder)))
        self.skipped = [f"{name}: its save did not finish" for name in unfinished]
        if step is not None and step not in candidates:
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; choose from {sorted(candidates) or 'none'}")
        for number, path in candidates.items():
            if step not in (None, number):
                continue
            try:
                manifest = self._load(path, state, prefix)
            except Damaged as error:
                if step is not None or damaged == "stop":
                    raise
                self.skipped.append(f"{path.name}: {error}")
                continue
            self._tell()
            self._parent = manifest.step
            return manifest.scalars
        self._tell()
        why = "".join(f"; {text}" for text in self.skipped)
        raise CheckpointError(
            f"{self.folder} holds no checkpoint that can be loaded{why}; restore one, or begin anew in another run.folder"
        )

    def _vote(self, step: int, state: Mapping[str, Tensor], scalars: dict[str, Any]) -> None:
        """Go on once every rank is ready to save the same thing."""

        def ready() -> tuple[int, str]:
            try:
                json.dumps(scalars)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"the scalars of step {step} are not JSON: {error}") from None
            return step, signature(describe(state))

        ballots = self.ranks.together(ready)
        for rank, ballot in enumerate(ballots):
            if ballot != ballots[0]:
                what = f"step {ballot[0]}" if ballot[0] != ballots[0][0] else "other names, shapes or dtypes"
                raise RankMismatch(f"rank {rank} saves {what} where rank 0 saves step {ballots[0][0]}; save the same on all ranks")

    def _open(self, step: int, needed: int) -> Path:
        """A folder to write in that every rank sees."""

        def make() -> Path:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._cleaned:
                shelf.clean(self.folder)
                self._cleaned = True
            if needed > shutil.disk_usage(self.folder).free:
                raise NoSpace(_full(step, self.folder, needed, "too little free space"))
            return shelf.temporary(self.folder, step)

        folder = self.ranks.first_does(make)

        def look() -> None:
            if not folder.is_dir():
                raise CheckpointError(f"rank {self.ranks.rank} does not see {folder}; put run.folder on a disk that all nodes share")

        with self._dropping(folder):
            self.ranks.together(look)
        return folder

    def _copy(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        self.ranks.together(lambda: copies.update({name: local(t).detach().to("cpu", copy=True) for name, t in mine.items()}))
        return copies

    def _write(self, job: _Job) -> None:
        """Shards, then the manifest, then the name; on failure nothing stays."""
        writer = Writer(job.folder, job.step)
        with self._dropping(job.folder):
            try:
                self.ranks.together(lambda: _save(job, writer, self.ranks))
                written = self.ranks.together(lambda: writer.written(self.ranks.rank))
                self.ranks.first_does(lambda: self._commit(job, writer, [file for files in written for file in files]))
            except NoSpace as error:
                reason = str(error)
                raise NoSpace(self.ranks.first_does(lambda: _full(job.step, self.folder, job.bytes, reason))) from None
        self._parent = job.step
        if self.ranks.first:
            self._tidy(job.step)

    def _commit(self, job: _Job, writer: Writer, files: list[File]) -> None:
        assert writer.metadata is not None
        manifest = Manifest(
            *(job.step, job.scalars, files, stored(writer.metadata, job.state, files)),
            world=self.ranks.world,
            parent=self._parent,
        )
        existing = self.folder / shelf.name_of(job.step)
        if _same(existing, manifest):
            shutil.rmtree(job.folder)
            return
        write_manifest(job.folder, manifest)
        faults.point("checkpoint/after_manifest", job.step)
        shelf.commit(job.folder, job.step)
        faults.point("checkpoint/after_rename", job.step)

    def _tidy(self, step: int) -> None:
        """What follows a commit, and cannot undo it."""
        try:
            shelf.point_to(self.folder, step)
            shelf.retain(self.folder, keep=self.keep, durable_every=self.durable_every, just=step)
            shelf.clean(self.folder)
        except OSError as error:
            log.warning("step %d is saved, but older checkpoints in %s could not be tidied: %s", step, self.folder, error)

    def _load(self, path: Path, state: Mapping[str, Tensor], prefix: str) -> Manifest:
        def compared() -> Manifest:
            manifest = read_manifest(path)
            there = {name: stored for name, stored in manifest.tensors.items() if name.startswith(prefix)}
            if wrong := differences(there, describe(state)):
                more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
                raise CheckpointError(f"{path} is of another model: {'; '.join(wrong[:5])}{more}; give the recipe it was saved with")
            manifests.append(manifest)
            return manifest

        manifests: list[Manifest] = []
        digests = self.ranks.together(lambda: compared().sha256)
        if len(set(digests)) > 1:
            raise Damaged(f"ranks read different manifests in {path}")
        manifest = manifests[0]
        self.ranks.together(lambda: verify(path, manifest.files, self.ranks.rank, self.ranks.world))
        self.ranks.together(lambda: _read(path, manifest, state))
        return manifest

    @contextmanager
    def _dropping(self, folder: Path) -> Generator[None, None, None]:
        """Remove the folder if what the ranks do in it together fails; no rank goes on before it is gone."""
        try:
            yield
        except MoeError:
            self.ranks.first_does(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise

    def _tell(self) -> None:
        if self.ranks.first:
            for text in self.skipped:
                log.warning("passed over %s", text)


def _save(job: _Job, writer: Writer, ranks: Ranks) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
        dcp.save(dict(job.mine), storage_writer=writer, planner=Planner(job.copies), process_group=ranks.group, no_dist=ranks.world == 1)


def _read(path: Path, manifest: Manifest, state: Mapping[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(
            dict(state), storage_reader=Reader(path, manifest, state), planner=planner(), no_dist=True
        )  # each rank knows what it needs


def _same(folder: Path, manifest: Manifest) -> bool:
    """Whether a committed folder holds these very values."""
    try:
        there = read_manifest(folder)
        verify(folder, there.files)
    except CheckpointError:
        return False
    shards = [[(f.name, f.sha256) for f in files if f.name != ".metadata"] for files in (there.files, manifest.files)]
    return shards[0] == shards[1] and (there.tensors, there.scalars) == (manifest.tensors, manifest.scalars)


def _full(step: int, folder: Path, needed: int, reason: str) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"step {step} cannot be saved in {folder}: {reason}; it needs {needed:,} bytes and {free:,} are free: "
        "free some space or lower checkpoint.keep; earlier checkpoints are intact"
    )
