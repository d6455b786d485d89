"""Where a step's time goes, by sparse layer and stage: clocks at the seams of layers whose experts are shared out.

Only in the steps that are watched: there the clock is read (or, on a GPU, events are recorded, which wait for nothing) between
stages, forward and, by functions that pass gradients on, backward. What the ranks found travels once, at the end of the step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.kernels.reference import Rows
from moe.model.moe_layer import MoELayer
from moe.model.stages import Observer
from moe.model.transformer import Transformer
from moe.parallel.collectives import Sent, recorded
from moe.parallel.deadline import wait_for_device
from moe.parallel.foresight import Planner
from moe.parallel.fssdp import Materialise
from moe.parallel.mesh import Mesh
from moe.parallel.price import flow

STAGES = ("route", "dispatch", "experts", "combine", "copies")  # copies: packing them, waiting for them, their gradients
KINDS = ("tokens", "experts", "gradients", "counts")
_BACK = " back"
_COLUMNS = [f"{stage}{way}" for stage in STAGES for way in ("", _BACK)] + [
    *(f"bytes of {kind}" for kind in KINDS),
    "rows",
    "held",
    "calls",
    "policy",
    "load_foreseen",
    "prediction_error",
]


class Change(NamedTuple):
    """From this moment on, and from this entry of the ledger on, time and bytes are a stage's."""

    moment: Any
    entry: int
    stage: tuple[int, str] | None  # of a layer


class Telemetry:
    """Figures of the layers of `model` whose experts are shared out, of the steps that are watched; none if it is not `on`."""

    def __init__(self, model: Transformer, planner: Planner | None, mesh: Mesh, *, on: bool = True) -> None:
        self.mesh, self.planner, self.on = mesh, planner, on and mesh.expert_ranks > 1
        self.layers: list[MoELayer] = [m for m in model.modules() if self.on and isinstance(m, MoELayer)]
        self.watching = self.watched = False
        self.stack: list[tuple[int, str]] = []
        self.changes: list[Change] = []
        self.ledger: list[Sent] = []
        self.rows: list[list[Tensor]] = [[] for _ in self.layers]
        self.held: list[list[int]] = [[] for _ in self.layers]
        for number, layer in enumerate(self.layers):
            self._attach(number, layer)

    def _attach(self, number: int, layer: Any) -> None:
        layer.observer = layer.experts.observer = _Clocks(self, number)
        if isinstance(layer.experts.gather, Materialise):
            layer.experts.gather.clock = partial(self._copies, number)

    @contextmanager
    def watch(self, yes: bool) -> Iterator[None]:
        """Around a step; `yes` alike on every rank."""
        self.watched = yes and self.on
        if not self.watched:
            yield
            return
        with recorded() as self.ledger:
            self.watching, self.stack, self.changes = True, [], []
            for figures in (*self.rows, *self.held):
                figures.clear()
            if self.planner is not None:
                self.planner.seconds[:] = 0
            try:
                yield
            finally:
                self._note()
                self.watching = False

    def _note(self) -> None:
        moment: Any = time.perf_counter()
        if self.mesh.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.changes.append(Change(moment, len(self.ledger), self.stack[-1] if self.stack else None))

    def _begin(self, number: int, stage: str) -> None:
        self.stack.append((number, stage))
        self._note()

    def _end(self, number: int, stage: str) -> None:
        """Also of what began inside and was broken off, as a recomputation is once it has what it needs."""
        if (number, stage) in self.stack:
            while self.stack.pop() != (number, stage):
                pass
            self._note()

    @contextmanager
    def _copies(self, number: int, back: bool = False) -> Iterator[None]:
        if not self.watching:
            yield
            return
        stage = "copies" + _BACK * back
        self._begin(number, stage)
        yield
        self._end(number, stage)

    def figures(self) -> list[dict[str, Any]]:
        """Of the step before, one a layer, alike on every rank; none if it was not watched. Every rank must call it."""
        if not self.watched:
            return []
        mine = np.zeros((len(self.layers), len(_COLUMNS)))
        found: dict[tuple[int, str], float] = self._sums()
        for number, (rows, held) in enumerate(zip(self.rows, self.held, strict=True)):
            found |= {(number, "rows"): sum(int(n) for n in rows), (number, "held"): sum(held), (number, "calls"): len(held)}
            found |= {(number, name): value for name, value in self._foresight(number).items()}
        for (layer, column), value in found.items():
            mine[layer, _COLUMNS.index(column)] = value
        everyone = np.stack([np.frombuffer(data).reshape(mine.shape) for data in self.mesh.gather(mine.tobytes())])
        return [self._layer(everyone[:, number]) for number in range(len(self.layers))]

    def _sums(self) -> dict[tuple[int, str], float]:
        """Milliseconds of each stage and bytes of each kind of each layer on this rank."""
        sums: dict[tuple[int, str], float] = defaultdict(float)
        wait_for_device(self.mesh.device)
        for change, after in zip(self.changes, self.changes[1:], strict=False):
            if change.stage is None:
                continue
            gpu = not isinstance(change.moment, float)
            sums[change.stage] += change.moment.elapsed_time(after.moment) if gpu else 1000 * (after.moment - change.moment)
            for sent in self.ledger[change.entry : after.entry]:
                if sent.kind in KINDS:
                    sums[change.stage[0], f"bytes of {sent.kind}"] += sent.bytes
        return sums

    def _foresight(self, number: int) -> dict[str, float]:
        """What was foreseen of a layer's loads, how wrong that was (the total variation distance), and how long policies took."""
        if self.planner is None:
            return {}
        found = {"policy": 1000 * float(self.planner.seconds[number])}
        if self.planner.foreseen is None:
            return found
        to: Any = self.layers[number].dispatcher
        foreseen, true = self.planner.foreseen[number], self.planner.last()[number].sum(0)
        rows = flow(foreseen, self.planner.held[number], to.node).rows  # owners may have changed at the end of the step
        share = foreseen.sum(0) / max(foreseen.sum(), 1)
        error = np.abs(share - true / max(true.sum(), 1)).sum() / 2
        return found | {"load_foreseen": rows.max() / max(rows.mean(), 1e-9), "prediction_error": error}

    def _layer(self, ranks: NDArray[np.float64]) -> dict[str, Any]:
        """Ranks' figures [ranks, columns] as the layer's: milliseconds of the mean rank, bytes of all; of groups the worst."""
        of = dict(zip(_COLUMNS, ranks.T, strict=True))
        groups = {name: column.reshape(-1, self.mesh.expert_ranks) for name, column in of.items()}
        experts, rows = groups["experts"] + groups["experts" + _BACK], groups["rows"]
        foreseen = {name: round(float(of[name].max()), 4) for name in ("load_foreseen", "prediction_error") if of["load_foreseen"].any()}
        return {
            "load": round(float((rows.max(1) / rows.mean(1).clip(min=1e-9)).max()), 4),
            **foreseen,
            "copies": round(float((groups["held"].sum(1) / groups["calls"].max(1).clip(min=1)).mean()), 2),
            "imbalance_ms": round(float((experts.max(1) - experts.mean(1)).max()), 4),
            "policy_ms": round(float(of["policy"].max()), 4),
            "ms": {stage.replace(" ", "_"): round(float(of[stage].mean()), 4) for stage in _COLUMNS[: 2 * len(STAGES)]},
            "bytes": {kind: int(of[f"bytes of {kind}"].sum()) for kind in KINDS},
        }


class _Clocks(Observer):
    """What reads the clock for one layer, forward at the ends of stages and backward where gradients arrive at their borders."""

    def __init__(self, telemetry: Telemetry, number: int) -> None:
        self.telemetry, self.number = telemetry, number

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with super().stage(name):
            if not self.telemetry.watching:
                yield
                return
            self.telemetry._begin(self.number, name)
            yield
            self.telemetry._end(self.number, name)

    def border(self, x: Tensor, ends: str | None, begins: str | None) -> Tensor:
        if not self.telemetry.watching:
            return x

        def arrived() -> None:
            if self.telemetry.watching:
                if ends is not None:
                    self.telemetry._end(self.number, ends + _BACK)
                if begins is not None:
                    self.telemetry._begin(self.number, begins + _BACK)

        return _Mark.apply(x, arrived)

    def dispatched(self, rows: Rows) -> None:
        telemetry, number = self.telemetry, self.number
        if telemetry.watching and torch.is_grad_enabled() and not in_backward():  # else the same tokens are run ahead, or again
            telemetry.rows[number].append(rows.counts.sum())
            telemetry.held[number].append(len(rows.counts) - len(telemetry.layers[number].experts.up))


def in_backward() -> bool:
    """Whether autograd is running, as it is while something is computed again."""
    return torch._C._current_graph_task_id() != -1


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, arrived: Callable[[], None]) -> Tensor:
        ctx.arrived = arrived
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.arrived()
        return grads[0], None
