"""A GPU's memory: peaks by stage, snapshots for torch's viewer, and what to change when it does not suffice."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ConfigError, OutOfMemory
from moe.model.stages import watching
from moe.parallel.mesh import Mesh
from moe.recipe import Recipe
from moe.train.folder import writing

GIB = 2**30
STAGES = ("forward", "backward", "optimizer")
HISTORY = 200_000  # allocations that a snapshot remembers with the lines of Python that made them
VIEWER = "https://pytorch.org/memory_viz"


class Memory:
    """Looks at the allocator's own counters, which wait for nothing; on a CPU there are none to look at."""

    def __init__(self, recipe: Recipe, engine: Any, mesh: Mesh, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.engine, self.mesh, self.folder, self.say = recipe, engine, mesh, folder, say
        self.on, self.steps = mesh.device.type == "cuda", set(recipe.log.memory)
        self.peaks: dict[str, int] = {}  # bytes, of the last step that was watched
        self.largest = 0  # bytes, of the run

    @contextmanager
    def step(self, number: int, logged: bool) -> Iterator[None]:
        """Around step `number`: peaks if it is `logged`, a snapshot if it is asked for, a sentence if memory does not suffice."""
        self.peaks = {}
        asked = number in self.steps
        if asked:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY)
        try:
            if self.on and logged:
                self.peaks["resident"] = torch.cuda.memory_allocated(self.mesh.device)
                with watching(self._peak):
                    yield
            else:
                yield
        except torch.OutOfMemoryError as error:
            snapshot = self._snapshot(f"out-of-memory-step{number}") if self.on else None
            raise explained(error, self.recipe, self.mesh, self.engine, number, snapshot) from error
        if asked:
            self.say(f"memory snapshot of step {number}: {self._snapshot(f'step{number}')}; drag it into {VIEWER}")
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def _peak(self, stage: str) -> Iterator[None]:
        if stage not in STAGES:
            yield
            return
        self.bytes()
        torch.cuda.reset_peak_memory_stats(self.mesh.device)
        yield
        self.peaks[stage] = max(self.peaks.get(stage, 0), torch.cuda.max_memory_allocated(self.mesh.device))

    def bytes(self) -> int:
        """The most that was ever allocated, the counter's resets notwithstanding."""
        if self.on:
            self.largest = max(self.largest, torch.cuda.max_memory_allocated(self.mesh.device))
        return self.largest

    def figures(self) -> dict[str, Any]:
        """For a row of metrics, GiB of the rank with the most: what lay there before the step, and the peak in each stage.

        Every rank must call it.
        """
        if not self.on:
            return {}
        mine = {"largest": self.bytes(), **self.peaks}
        everyone = [json.loads(text) for text in self.mesh.gather(json.dumps(mine).encode())]
        worst = {name: round(max(rank.get(name, 0) for rank in everyone) / GIB, 3) for name in mine}
        return {"memory_gib": worst.pop("largest")} | ({"memory": worst} if worst else {})

    def _snapshot(self, name: str) -> Path:
        """Write what is allocated, in the pickle that torch's viewer reads; nothing here ever reads it."""
        whole = self.folder / f"rank{self.mesh.rank}-{name}.pickle"
        partial = whole.with_name(f".{whole.name}")
        with writing(whole):
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(partial))
            os.replace(partial, whole)
        return whole


def check_memory(recipe: Recipe, mesh: Mesh) -> None:
    """Raise ConfigError if snapshots are asked for of memory that keeps no books."""
    if recipe.log.memory and mesh.device.type == "cpu":
        raise ConfigError(f"log.memory={recipe.log.memory} records a GPU's allocations, and this run is on a CPU; leave it out")


@contextmanager
def explaining(recipe: Recipe, mesh: Mesh) -> Iterator[None]:
    """Around what allocates weights and optimizer state before the first step."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise explained(error, recipe, mesh, None, 0, None) from error


def explained(error: Exception, recipe: Recipe, mesh: Mesh, engine: Any, step: int, snapshot: Path | None) -> OutOfMemory:
    """One sentence: how much was asked for where, what is held by kind, and what to change."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    where = f"in step {step}, {_place(error)}" if step else "while weights and optimizer state were allocated"
    facts = [f"{asked[1]} were asked for"] if asked else []
    held: dict[str, int] = kinds(engine) if engine is not None else {}
    if mesh.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(mesh.device)
        facts.append(f"{free / GIB:.2f} of {total / GIB:.1f} GiB were free")
        held["activations and the rest"] = max(0, torch.cuda.memory_allocated(mesh.device) - sum(held.values()))
    facts += ["held: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in held.items())] if held else []
    remedies = ", ".join(choices(recipe, mesh.world, held)) or "a smaller model"
    seen = f"; {snapshot} shows every block, in {VIEWER}" if snapshot else ""
    return OutOfMemory(f"rank {mesh.rank} ran out of memory {where}: {'; '.join(facts)}; choose {remedies}{seen}")


def kinds(engine: Any) -> dict[str, int]:
    """Bytes on this rank of weights (copies and originals), gradients and optimizer state, each storage once; no rank is asked."""
    weights = [*engine.model.parameters(), *engine.parameters.values()]
    states = [state for rule in engine.optimizers.rules.values() for state in rule.state.values()]
    seen: set[int] = set()
    return {
        "weights": _bytes(weights, seen),
        "gradients": _bytes((p.grad for p in weights), seen),
        "optimizer state": _bytes((value for state in states for value in state.values()), seen),
    }


def choices(recipe: Recipe, world: int, held: dict[str, int]) -> list[str]:
    """Settings that would take less, the most promising first."""
    share = recipe.train.batch // world
    of_activations = []
    if recipe.engine.recompute != "full":
        of_activations.append("engine.recompute=full (activation checkpointing)")
    if more := [n for n in range(recipe.train.accumulate + 1, share + 1) if share % n == 0]:
        of_activations.append(f"train.accumulate={more[0]} (smaller micro-batches, the same training)")
    of_weights = ["engine.name=fsdp2 (shards weights, gradients and optimizer state)"] * (recipe.engine.name == "ddp" and world > 1)
    rest = held.get("activations and the rest", 0)
    ordered = of_weights + of_activations if sum(held.values()) > 2 * rest else of_activations + of_weights
    return [*ordered, *([f"a train.batch below {recipe.train.batch}"] if share > 1 else [])]


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not isinstance(local, Tensor) or local.is_meta:
            continue
        storage = local.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _place(error: Exception) -> str:
    """Forward, backward or optimizer step, by the functions that the error passed."""
    passed = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if "_settle" in passed:
        return "optimizer step"
    return "backward pass" if "backward" in passed else "forward pass"
