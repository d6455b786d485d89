"""Parameters, gradients and moments are cut over ranks; a block's weights are whole only while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moe.engines.base import Engine
from moe.errors import ConfigError
from moe.model.experts import Experts
from moe.parallel.collectives import sum_ranks


class FSDP2(Engine):
    """Torch's fully_shard around every block and the whole, summing gradients instead of averaging them.

    Under bfloat16 weights travel in bfloat16 and gradients in float32; routers are gathered by themselves in float32.
    """

    def place(self) -> dict[str, Tensor]:
        mesh = self.mesh.dense()
        self.counts = mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0
        model: Any = self.model.to(self.master)
        self._wrap(model, mesh, {} if self.grid is not None else _expert_dims(model, mesh.size(mesh.ndim - 1)))
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
        model.to_empty(device=self.mesh.device)
        for router in self.routers:
            router.reset_buffers()
        return dict(model.named_parameters())

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        root: Any = self.model
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        yield
        if last and self.grid is not None:
            for p in self._whole():
                assert p.grad is not None
                for axis in ("shard", "replicate"):
                    sum_ranks(p.grad, self.grid.get_group(axis))

    def gradients(self) -> list[Tensor]:
        return [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self.parameters.values() if p.grad is not None]

    def counted(self, gradients: list[Tensor]) -> list[Tensor]:
        copies = {id(p.grad) for p in self._whole()} if self.grid is not None and self.grid.get_local_rank("shard") else set()
        return [gradient for gradient in gradients if id(gradient) not in copies] if self.counts else []

    def clear(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def load_canonical(self, state: dict[str, Tensor]) -> None:
        super().load_canonical(state)
        for unit in self.units:
            unit.reshard()  # an evaluation may have left whole copies of the old values

    def _whole(self) -> list[nn.Parameter]:
        """This rank's own experts, where copies of them travel: nothing here gathers or cuts them."""
        return [] if self.planner is None else [p for name, p in self.model.named_parameters() if name in self.shared_out]

    def _wrap(self, model: Any, mesh: DeviceMesh, dims: dict[nn.Parameter, Shard]) -> None:
        policy = exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.compute != self.master:
            policy = MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=self.master, cast_forward_inputs=False)
            # the warning is about writing into a routing in place, and a dispatcher only reads it
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            for router in self.routers:
                if next(router.parameters(), None) is not None:
                    fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        for block in model.layers:
            if self.grid is not None and self.planner is None and block.moe is not None:
                self._wrap_experts(block.moe, policy)
            fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=dims.get, ignored_params=set(self._whole()))
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(self._whole()))
        register_fsdp_forward_method(model, "predict")

    def _wrap_experts(self, layer: Any, policy: MixedPrecisionPolicy) -> None:
        """This rank's experts, cut along their width over the ranks that hold the same ones."""
        assert self.grid is not None
        shards, width = self.grid["shard"].size(), layer.experts.down.shape[2]
        if width % shards:
            raise ConfigError(
                f"experts of width {width} cannot be cut over the {shards} ranks that hold the same ones; choose "
                f"model.moe.d_expert={-(-width // shards) * shards}, or another parallel.expert_ranks"
            )
        mesh = self.grid["shard"] if self.mesh.replicas == 1 else self.grid["replicate", "shard"]
        reads = layer.experts.summarise(layer.router) is not None
        fully_shard(layer.experts, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda _: Shard(2))
        if reads:
            register_fsdp_forward_method(layer.experts, "summarise")


def _expert_dims(model: nn.Module, shards: int) -> dict[nn.Parameter, Shard]:
    """Along what each stack of experts is cut: whole experts where they share out evenly, else every expert's width.

    Cutting along the width needs one more copy a gather.
    """
    dims = {}
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        count, width = experts.down.shape[0], experts.down.shape[2]
        dim = 0 if count % shards == 0 else 2
        if count % shards and width % shards:
            fit = ", ".join(str(s) for s in range(1, shards) if count % s == 0 or width % s == 0)
            raise ConfigError(
                f"{count} experts of width {width} cannot be cut over {shards} ranks; choose model.moe.d_expert="
                f"{-(-width // shards) * shards}, or ranks / parallel.replicas from {fit}"
            )
        dims |= {experts.up: Shard(dim), experts.down: Shard(dim)}
    return dims
