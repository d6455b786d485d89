"""The contract of an engine: one optimizer step on the global batch, and a canonical view of what it learned.

"Divide once": a loss is a sum, divided once by a count over the whole global batch; everything that travels is summed.
No engine multiplies by a number of ranks, so none can forget it, but for one line of `deepspeed`, whose library divides.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.engines import settings
from moe.engines.canonical import draw, fill
from moe.engines.figures import Figures, read
from moe.engines.optimizer import Optimizers, squares
from moe.errors import CheckpointError, ConfigError
from moe.model.loss import IGNORE
from moe.model.moe_layer import MoELayer, Report
from moe.model.stages import stage
from moe.model.transformer import Output, Transformer
from moe.parallel import balance
from moe.parallel.apply import parallelize
from moe.parallel.collectives import sum_ranks
from moe.parallel.expert_parallel import AllToAll
from moe.parallel.foresight import Planner
from moe.parallel.mesh import Mesh
from moe.parallel.reshard import Owner, Owners

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_MODEL, _OPTIMIZER = "model", "optimizer."


class StepResult(NamedTuple):
    """Figures of one step, equal on all ranks and independent of layout and accumulation."""

    loss: Tensor  # mean cross-entropy over the global batch, float64 scalar
    auxiliary: Tensor  # mean weighted auxiliary loss over the global batch
    grad_norm: Tensor  # true global norm before clipping
    applied: bool  # False: loss or gradient was not finite, and nothing learned from this step
    tokens: int  # routed (valid) tokens of the global batch
    reports: list[Report]  # one an MoE layer, totalled over ranks and the window; loss is the mean


class Evaluated(NamedTuple):
    """Sums over all ranks' rows of one held-out batch."""

    loss: Tensor  # summed cross-entropy in nats, float64 scalar
    targets: int
    reports: list[Report]  # one an MoE layer, totalled over ranks


class Engine(ABC):
    """Trains a model that comes on the meta device; a subclass says where parameters live and how gradients meet.

    first_weights: draw them, each a pure function of (seed, name, index) on any number of ranks; else `load_canonical` must come first.
    Under bfloat16 all arithmetic but the routers' is bfloat16; what the optimizer moves, its moments and gradient sums are float32.
    """

    rules: type[Optimizers] = Optimizers

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        optimizer: settings.Optimizer,
        engine: settings.Engine,
        dtype: str,
        accumulate: int,
        clip: float | None,
        balance_window: str,
        seed: int,
        first_weights: bool = True,
    ) -> None:
        self.model, self.mesh, self.seed = model, mesh, seed
        self.compute = _DTYPES[dtype]
        self.master = torch.float32 if self.compute == torch.bfloat16 else self.compute
        self.accumulate, self.clip = accumulate, clip
        self.run_ahead = balance_window == "exact" and accumulate > 1
        self.routers = list(model.routers().values())
        self.of_routers = {f"{path}.{name}" for path, m in model.named_modules() if m in self.routers for name, _ in m.named_parameters()}
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.grid = parallelize(model, mesh, recompute=engine.recompute, compile=engine.compile)
        # parameters of which this rank holds a part of the experts
        self.shared_out = {name for name, p in model.named_parameters() if p.shape != self.shapes[name]}
        self.layers = [m for m in model.modules() if isinstance(m, MoELayer)]
        self.dispatchers = [m.dispatcher for m in self.layers if isinstance(m.dispatcher, AllToAll)]
        self.planner = self.owners = None
        if self.grid is not None and mesh.copies is not None and mesh.hardware is not None and mesh.copies.active:
            blocks: Any = model.layers
            self.planner = Planner(blocks, self.grid.get_group("expert"), mesh.copies, mesh.hardware, self.compute, accumulate)
            for layer in self.layers:
                layer.experts.gather.dtype = self.compute  # type: ignore[attr-defined]
            if mesh.copies.owners != "even":
                self.owners = Owners(self.planner, model, self.grid, mesh.machine_ranks)
        self.copies: list[tuple[Tensor, Tensor]] = []  # what the model uses, and the float32 original that the optimizer moves
        self.parameters = self.place()
        self.has_weights = first_weights
        if first_weights:
            self.draw({name: self._of_all(name, tensor) for name, tensor in self.parameters.items()})
            self._publish()
        hidden = [name for name in self.parameters if name.startswith("layers.")]
        self.optimizers = self.rules(optimizer, self.parameters, hidden=hidden, routers=self.of_routers)

    @abstractmethod
    def place(self) -> dict[str, Tensor]:
        """Allocate the model's parameters, give buffers their first values, and name the tensors that the optimizer moves."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around a micro-batch: gradients add up, and begin to meet those of other ranks if it is the window's last."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """This rank's pieces of the gradient as plain tensors, once they hold the sum over ranks."""

    @abstractmethod
    def counted(self, gradients: list[Tensor]) -> list[Tensor]:
        """Those of the pieces that this rank counts, so that every element counts on one rank."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the gradients."""

    def forward(self, part: Any, step: int) -> Output:
        """A micro-batch through the model, to learn from."""
        return self.model(*part, step=step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's part of the objective."""
        loss.backward()

    def step(self, batch: Any, step: int, lr: float) -> StepResult:
        """Learn from the global batch of which `batch` holds this rank's rows."""
        self._check_weights()
        batch = self._here(batch)
        parts = self._cut(batch)
        counts = self._counts(batch)
        targets, tokens = counts.unbind()
        if self.planner is not None:
            self.planner.adopt()
        self.model.train()
        read, reports = self._fitting(lambda: self._summands(*self._learn(parts, targets, tokens, step)), counts)
        return self._settle(read, reports, lr)

    def _learn(self, parts: Sequence[Any], targets: Tensor, tokens: Tensor, step: int) -> tuple[Tensor, list[Report]]:
        """Loss, reports and gradients of the window."""
        self.clear()
        loss, reports = torch.zeros((), dtype=torch.float64, device=self.mesh.device), None
        with balance.Window(self.routers) as window:
            if self.run_ahead:
                self._look_ahead(window, parts, step)
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                with self.accumulating(last):
                    with stage("forward"):
                        out = self.forward(part, step)
                    auxiliary = sum(report.loss for report in out.reports)
                    reports = balance.add_reports(reports, out.reports)
                    if last and self.planner is not None:
                        self.planner.listen(reports)
                    with stage("backward"):
                        self.backward(out.loss / targets + auxiliary / tokens)
                loss += out.loss.detach()
                if not (last or self.run_ahead):
                    window.add(out.reports)
        if self.planner is not None:
            self.planner.think()  # unless the backward pass of copies has asked already
        return loss, reports or []

    def _summands(self, loss: Tensor, reports: list[Report]) -> tuple[Tensor, list[Report]]:
        """What is summed over ranks to judge a step, as one vector: loss, squared gradients and reports."""
        total = sum((squares(g) for g in self.counted(self.gradients())), torch.zeros_like(loss))
        return balance.pack(torch.stack([loss, total]), reports), reports

    def _fitting(self, run: Callable[[], tuple[Tensor, list[Report]]], counts: Tensor) -> tuple[Figures, list[Report]]:
        """Figures and reports of `run`, which is run again without fixed buffers if on any rank they were too small."""
        fixed = [dispatcher for dispatcher in self.dispatchers if dispatcher.how == "fixed"]
        try:
            for dispatcher in fixed:
                dispatcher.exact = False
            mine, reports = run()
        finally:
            for dispatcher in fixed:
                dispatcher.exact = True
        found = read(mine, counts, fixed)
        if found.overflowed:
            mine, reports = run()
            found = read(mine, counts, [])
        return found, reports

    def foresight(self) -> list[Any]:
        """What the next placements of experts follow from beside the canonical state, of each group of expert ranks, as JSON.

        Every rank must call it.
        """
        if self.planner is None:
            return []
        everyone = self.mesh.gather(json.dumps(self.planner.state()).encode())
        owner = None if self.owners is None else self.owners.now.tolist()
        return [{"planner": json.loads(text), "owner": owner} for text in everyone[:: self.mesh.expert_ranks]]

    def foresee(self, foresight: list[Any]) -> None:
        """Go on from `foresight`; one of another layout is forgotten, and changes nothing that is learned.

        Every rank must call it, after it has loaded the canonical state: experts go to the owners that they had.
        """
        if self.planner is None or not foresight or not isinstance(foresight[0], dict):
            return
        group = self.mesh.rank // self.mesh.expert_ranks
        if group < len(foresight):
            self.planner.resume(foresight[group]["planner"])
        if self.owners is not None and self.owners.fits(foresight[0]["owner"]):
            self.reown(np.array(foresight[0]["owner"]))

    @torch.no_grad()
    def reown(self, owner: Owner) -> None:
        """Give experts, their moments included, to other owners; every rank must call it with the same ones."""
        owners, before = self.owners, self._here_of_experts()
        assert owners is not None
        if np.array_equal(owner, owners.now):
            return
        for kind, tensors in before.items():
            for name, rows in owners.carry(tensors, owners.now, owner):
                if kind == _MODEL:
                    p = self.parameters[name]
                    # another dtype in between, or the next gradient must fit the old shape as long as a graph of it is alive
                    p.grad, p.data = None, rows.new_empty(0, dtype=torch.float16)
                    p.data = rows
                else:
                    self.optimizers.replace(kind.removeprefix(_OPTIMIZER), name, rows)
        owners.place(owner)
        self.resized()

    def resized(self) -> None:
        """Parameters of experts have taken other shapes: forget gradients of the old ones."""
        self.clear()

    @torch.no_grad()
    def evaluate(self, batch: Any, step: int) -> Evaluated:
        """Losses of a held-out batch, summed over ranks; changes nothing. Every rank must call it as often."""
        self._check_weights()
        batch = self._here(batch)
        self.model.eval()

        def run() -> tuple[Tensor, list[Report]]:
            out = self.model(*batch, step=step)
            return balance.pack(torch.stack([out.loss.double(), _targets(batch).double()]), out.reports), out.reports

        found, reports = self._fitting(run, torch.empty(0, dtype=torch.int64, device=self.mesh.device))
        return Evaluated(found.sums[0], int(found.sums[1]), balance.unpack(found.sums[2:], reports))

    def canonical_state(self) -> dict[str, Tensor]:
        """Everything learned, under names and shapes that no layout changes; the live tensors, but copies of experts that
        have other owners than even ones. Fill it, and give it to `load_canonical`. Every rank must call it.

        Keys: 'model.<name>' (router buffers too), 'optimizer.<moment>.<name>', 'optimizer.step'.
        """
        state = self._state()
        if self.owners is not None and self.owners.moved:
            for kind, tensors in self._here_of_experts().items():
                carried = self.owners.carry(tensors, self.owners.now, self.owners.even)
                state |= {f"{kind}.{name}": rows for name, rows in carried}
        return self._named(state)

    def replicas(self) -> dict[str, Tensor]:
        """What must be equal on the ranks that have copies of it, as in a canonical state; read-only."""
        return self._named(self._state())

    def draw(self, parameters: dict[str, Tensor]) -> None:
        """Give parameters of a canonical state their first values; buffers among them have theirs already."""
        for key, tensor in parameters.items():
            if (name := key.removeprefix(f"{_MODEL}.")) in self.shapes:
                draw(name, tensor, self.model.settings, self.seed)

    @torch.no_grad()
    def load_canonical(self, state: dict[str, Tensor]) -> None:
        """Go on from a canonical state: that of this engine filled in place, or whole tensors of any other.

        Experts go back to their even owners; `foresee` says where they went from there.
        """
        if self.owners is not None:
            self.reown(self.owners.even)
        self._load(state)
        self.optimizers.resume(int(state["optimizer.step"]))
        self._publish()
        self.has_weights = True

    def _load(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The canonical state, filled from another."""
        own = self.canonical_state()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise CheckpointError(
                f"the state is of another model or optimizer: it differs in {len(wrong)} names, such as {wrong[0]}; "
                f"give the recipe that the state was saved with"
            )
        for name, tensor in own.items():
            fill(name, tensor, state[name])
        return own

    @torch.no_grad()
    def _publish(self) -> None:
        if self.copies:
            torch._foreach_copy_([copy for copy, _ in self.copies], [original for _, original in self.copies])

    def _check_weights(self) -> None:
        if not self.has_weights:
            raise RuntimeError("this engine was built with first_weights=False and has no weights yet; call load_canonical first")

    def _of_all(self, key: str, tensor: Tensor) -> Tensor:
        """A parameter of this rank's experts, or a moment of it, as a part of all experts'; the same memory."""
        name = key if key in self.shapes else key.split(".", 2)[-1]
        if self.grid is None or name not in self.shared_out:
            return tensor
        cut = Shard(2) if isinstance(tensor, DTensor) else Replicate()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return DTensor.from_local(local.detach(), self.grid, [Replicate(), cut, Shard(0)], run_check=False)

    def _state(self) -> dict[str, Tensor]:
        """What is here of everything learned, by canonical names."""
        state = {f"{_MODEL}.{name}": tensor for name, tensor in self._learned().items()}
        return state | {f"{_OPTIMIZER}{name}": tensor for name, tensor in self.optimizers.state().items()}

    def _named(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.shared_out:
            state = {key: self._of_all(key.removeprefix(f"{_MODEL}."), tensor) for key, tensor in state.items()}
        return state | {"optimizer.step": torch.tensor(self.optimizers.steps)}

    def _here_of_experts(self) -> dict[str, dict[str, Tensor]]:
        """Parameters of this rank's experts and each moment of them: what kind → name → live tensor."""
        found: dict[str, dict[str, Tensor]] = {_MODEL: {name: self.parameters[name] for name in self.shared_out}}
        for key, tensor in self.optimizers.state().items():
            moment, name = key.split(".", 1)
            if name in self.shared_out:
                found.setdefault(_OPTIMIZER + moment, {})[name] = tensor
        return found

    def _learned(self) -> dict[str, Tensor]:
        persistent = self.model.state_dict()
        return {**self.parameters, **{name: b for name, b in self.model.named_buffers() if name in persistent}}

    def _look_ahead(self, window: balance.Window, parts: Sequence[Any], step: int) -> None:
        # the same noise and parameters route the same tokens the same way again
        with torch.no_grad():
            seen = None
            for part in parts:
                seen = balance.add_reports(seen, self.model(*part, step=step).reports)
        window.add(seen or [])
        window.complete()

    def _settle(self, read: Figures, reports: list[Report], lr: float) -> StepResult:
        """Clip, step and update the routers, or, on every rank alike, skip."""
        figures, counts = read.sums, read.counts
        norm, totals = figures[1].sqrt(), balance.unpack(figures[2:], reports)
        applied = math.isfinite(figures[0]) and math.isfinite(norm)
        if applied:
            if self.clip is not None and norm > self.clip:
                torch._foreach_mul_(self.gradients(), self.clip / norm.item())
            self.optimizers.step(lr)
            self._publish()
            balance.update(self.routers, totals, self.mesh.device)
            if self.planner is not None:
                self.planner.observe()
            if self.owners is not None and self.owners.due(self.optimizers.steps):
                self.reown(self.owners.chosen())
        means = [report._replace(loss=report.loss / counts[1]) for report in totals]
        auxiliary = sum((report.loss for report in means), torch.zeros_like(norm))
        return StepResult(figures[0] / counts[0], auxiliary, norm, applied, int(counts[1]), means)

    def _counts(self, batch: Any) -> Tensor:
        """Targets and valid tokens of the global batch."""
        routed = (batch.document >= 0) | (batch.targets != IGNORE)
        counts = torch.stack([_targets(batch), routed.sum()])
        return sum_ranks(counts).clamp(min=1)

    def _here(self, batch: Any) -> Any:
        return type(batch)(*(tensor.to(self.mesh.device, non_blocking=True) for tensor in batch))

    def _cut(self, batch: Any) -> list[Any]:
        rows = len(batch.ids)
        if rows % self.accumulate:
            raise ConfigError(
                f"{rows} sequences a rank do not split into {self.accumulate} micro-batches; "
                f"choose train.accumulate={math.gcd(rows, self.accumulate)}"
            )
        return [type(batch)(*part) for part in zip(*(tensor.chunk(self.accumulate) for tensor in batch), strict=True)]


def _targets(batch: Any) -> Tensor:
    return (batch.targets != IGNORE).sum()
