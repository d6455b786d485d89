"""DeepSpeed's ZeRO: moments (1), gradients too (2), and parameters too (3) are cut over ranks; with 0 nothing is.

DeepSpeed divides every sum of gradients by the number of all ranks, those of experts that fewer ranks hold included.
`DeepSpeed.backward` multiplies by that number, the only factor of ranks in this package. Clipping, skipped steps,
accumulation and what routers learn are those of every engine; DeepSpeed cuts, sums and moves.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe.engines import settings
from moe.engines.base import Engine
from moe.engines.optimizer import Optimizers
from moe.errors import ConfigError
from moe.model.stages import stage
from moe.model.transformer import Output, Transformer
from moe.parallel.collectives import sum_ranks
from moe.parallel.mesh import Mesh


class Piece(NamedTuple):
    """This rank's part of a parameter: its elements from `first` on are the `count` elements of `flat` from `start` on."""

    flat: Tensor
    start: int
    count: int
    first: int


class Partitioned(Optimizers):
    """The rule of parameters that DeepSpeed cuts: what it moves, and its moments, are flat tensors made afterwards."""

    def _allocate(self) -> None:
        (self.rule,) = self.rules.values()

    def adopt(self, wrapped: Any, flats: list[Tensor], pieces: dict[str, Piece], join: Callable[[str, Tensor, int], Tensor]) -> None:
        """Allocate the moments of `flats`; `join` makes a parameter whole from the elements that this rank has."""
        self.wrapped, self.pieces, self.join = wrapped, pieces, join
        self.moments = next(iter(self._moments.values()))[1] if self._moments else ()
        for flat in flats:
            state = {moment: torch.zeros_like(flat, requires_grad=False) for moment in self.moments}
            if isinstance(self.rule, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            self.rule.state[flat] = state

    def step(self, lr: float) -> None:
        for group in self.rule.param_groups:
            group["lr"] = lr
        with stage("optimizer"):
            self.wrapped.step()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        return {f"{moment}.{name}": self.whole(name, moment) for name in self._moments for moment in self.moments}

    def whole(self, name: str, moment: str | None = None) -> Tensor:
        """A parameter, or a moment of it, joined over ranks."""
        return self.join(name, self.part(name, moment), self.pieces[name].first)

    def part(self, name: str, moment: str | None = None) -> Tensor:
        """The live elements of a parameter, or of a moment of it, that this rank has."""
        piece = self.pieces[name]
        flat = piece.flat.detach() if moment is None else self.rule.state[piece.flat][moment]
        return flat[piece.start : piece.start + piece.count]


class DeepSpeed(Engine):
    """The model and its optimizer under deepspeed.initialize, in float32; the model starts whole on every rank.

    With anything cut, a canonical state is a copy: parameters and moments joined, then cut along their first dimension, but for
    the experts that a rank holds.
    """

    def __init__(
        self, model: Transformer, mesh: Mesh, *, engine: settings.Engine, optimizer: settings.Optimizer, dtype: str, **options: Any
    ) -> None:
        copies = mesh.copies is not None and mesh.copies.active
        if unfit := settings.unfit_for_deepspeed(engine, optimizer, dtype, mesh.expert_ranks, copies):
            raise ConfigError(unfit[1])
        _prepare(mesh)
        self.zero = engine.zero
        self.rules = Partitioned if self.zero else Optimizers
        super().__init__(model, mesh, engine=engine, optimizer=optimizer, dtype=dtype, **options)
        for layer in self.layers:
            layer.beside = None  # DeepSpeed's hooks reduce gradients on the stream on which they run, and wait for no other
        self.cut_over = mesh.dense()
        self.wrapped = self._wrap()
        dist.distributed_c10d._set_pg_timeout(mesh.of_groups, self.wrapped.seq_data_parallel_group)
        if self.zero == 3:
            model.predict = partial(_as_forward, model, model.predict)  # type: ignore[method-assign]
        if isinstance(self.optimizers, Partitioned):
            find = _pieces_of_parameters if self.zero == 3 else _pieces_of_groups
            self.optimizers.adopt(self.wrapped, *find(self.wrapped.optimizer, self.parameters), self._join)

    def place(self) -> dict[str, Tensor]:
        model = self.model.to(self.master).to_empty(device=self.mesh.device)
        for router in self.routers:
            router.reset_buffers()
        self.here = {name: p.shape for name, p in model.named_parameters()}
        return dict(model.named_parameters())

    def forward(self, part: Any, step: int) -> Output:
        return self.wrapped(*part, step=step)

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss * self.mesh.world)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def gradients(self) -> list[Tensor]:
        if self.zero:
            return [piece for pieces in self.wrapped.optimizer.averaged_gradients.values() for piece in pieces]
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def counted(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.zero:
            return gradients
        counts = {name: self._of_equals(name).rank() == 0 for name in self.parameters}
        return [gradient for name, gradient in zip(counts, gradients, strict=True) if counts[name]]

    def clear(self) -> None:
        self.wrapped.optimizer.zero_grad()

    def replicas(self) -> dict[str, Tensor]:
        if not self.zero:
            return super().replicas()
        learned = super()._learned()  # with what ranks compute, which each has received from those that moved it
        return {f"model.{name}": self._of_all(name, t) for name, t in learned.items() if self.zero < 3 or name not in self.parameters}

    def _wrap(self) -> Any:
        """DeepSpeed's engine around the model, and around the optimizer, whose parameters it replaces."""
        model: nn.Module = self.model
        (rule,) = self.optimizers.rules.values()
        if self.grid is not None:
            group = f"ep_size_{self.mesh.expert_ranks}"
            experts = [self.parameters[name] for name in self.shared_out]
            for p in experts:
                p.allreduce, p.group_name = False, group  # type: ignore[attr-defined]
            model = _told_of_experts(model, self.grid, group)
            rule.param_groups[:] = _apart(rule.param_groups, experts, group)
        zero: dict[str, Any] = {"stage": self.zero, "stage3_param_persistence_threshold": 0}
        if self.zero in (1, 2):
            zero["compute_grad_norm"] = False  # a second norm, which nobody reads
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        return importlib.import_module("deepspeed").initialize(model=model, optimizer=rule, config=config)[0]

    def _learned(self) -> dict[str, Tensor]:
        learned = super()._learned()
        if isinstance(self.optimizers, Partitioned):
            learned |= {name: self.optimizers.whole(name) for name in self.parameters}
        return learned

    def _of_equals(self, name: str) -> Any:
        """The group of ranks between which a parameter is cut, or that hold the same of it."""
        return self.grid.get_group("shard") if self.grid is not None and name in self.shared_out else self.cut_over.get_group()

    def _join(self, name: str, part: Tensor, first: int) -> Tensor:
        """A parameter, or a moment, of which each rank has some elements: whole for experts of this rank, else a DTensor's rows."""
        whole = torch.zeros(self.here[name], dtype=part.dtype, device=part.device)
        whole.view(-1)[first : first + len(part)] = part
        sum_ranks(whole, self._of_equals(name))
        if name in self.shared_out:
            return whole
        return distribute_tensor(whole, self.cut_over, [Shard(0)], src_data_rank=None).clone()

    def _load(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = super()._load(state)
        if not isinstance(self.optimizers, Partitioned):
            return own
        for name in self.parameters:
            for key, moment in [(f"model.{name}", None), *((f"optimizer.{m}.{name}", m) for m in self.optimizers.moments)]:
                tensor = own[key]
                assert isinstance(tensor, DTensor)
                whole = tensor.to_local() if name in self.shared_out else tensor.full_tensor()
                part, first = self.optimizers.part(name, moment), self.optimizers.pieces[name].first
                part.copy_(whole.reshape(-1)[first : first + len(part)])
        zero = self.wrapped.optimizer
        if self.zero < 3:
            zero.update_lp_params()
            return own
        zero.parameter_offload.partition_all_parameters()  # an evaluation may have left whole copies of the old values
        for used, moved in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            used.data.copy_(moved.data)
        return own


def _prepare(mesh: Mesh) -> None:
    """Load DeepSpeed for the device of this job."""
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))
    try:
        ops: Any = importlib.import_module("deepspeed.ops")
    except ImportError as error:
        raise ConfigError(
            f"engine.name=deepspeed needs the package deepspeed ({error}); install the extra: pip install 'moe[deepspeed]'"
        ) from None
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # by DeepSpeed's own calls
    logging.getLogger("DeepSpeed").addFilter(_worth_saying)
    if mesh.device.type == "cpu":  # it would compile an operation over shared memory that replaces gloo's sums
        ops.__compatible_ops__ = defaultdict(bool)


def _worth_saying(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # SGD, which is tested here


def _as_forward(model: nn.Module, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A method of the model run as its forward, whose hooks gather what DeepSpeed has cut."""
    model.forward = method
    try:
        return model(*args, **options)
    finally:
        del model.forward


def _told_of_experts(model: nn.Module, grid: Any, name: str) -> nn.Module:
    """The model beside a mark by which DeepSpeed knows that it has experts, and which ranks hold the same ones."""
    moe: Any = importlib.import_module("deepspeed.moe.layer").MoE
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    groups._get_expert_data_parallel_group_dict()[name] = grid.get_group("shard")
    groups._get_expert_parallel_group_dict()[name] = grid.get_group("expert")

    class Mark(moe):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = grid["expert"].size()

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            return

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.mark = model, Mark()

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.model(*args, **options)

    return Marked()


def _apart(groups: list[dict[str, Any]], experts: list[Tensor], name: str) -> list[dict[str, Any]]:
    """Groups of parameters in which experts are by themselves and marked, as DeepSpeed wants them."""
    ours = {id(p) for p in experts}
    apart = []
    for group in groups:
        rest, shared = ([p for p in group["params"] if (id(p) in ours) == out] for out in (False, True))
        apart += [{**group, "params": rest}] if rest else []
        apart += [{**group, "params": shared, "moe": True, "name": name}] if shared else []
    return apart


def _pieces_of_groups(zero: Any, parameters: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Piece]]:
    """ZeRO 1 and 2: every group of parameters is one flat tensor, cut evenly, wherever parameters begin in it."""
    flats, pieces = list(zero.single_partition_of_fp32_groups), {}
    for name, p in parameters.items():
        link: Any = getattr(p, "_hp_mapping", None)
        if link is None:
            pieces[name] = Piece(flats[0], 0, 0, 0)
            continue
        place = link.hp_fragment_address
        pieces[name] = Piece(flats[link.param_group_index], place.start, place.numel, link.lp_fragment_address.start)
    return flats, pieces


def _pieces_of_parameters(zero: Any, parameters: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Piece]]:
    """ZeRO 3: every parameter is padded and cut evenly."""
    flats, pieces = list(zero.fp32_partitioned_groups_flat), {}
    for name, p in parameters.items():
        group, start, room = zero.grad_position[zero.get_param_id(p)]
        first = min(dist.get_rank() * room, p.ds_numel)  # type: ignore[attr-defined]
        pieces[name] = Piece(flats[group], start, min(room, p.ds_numel - first), first)  # type: ignore[attr-defined]
    return flats, pieces
