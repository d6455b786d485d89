"""Contestants of the kernel benchmark: this package's backends and other libraries' expert layers, all called alike.

Each is called with (x, expert, weight), the routing's decision, so that everything from the plan of the permutation to the sum
over a token's experts is its own. A contestant of another library was written from its source; what it computes is compared with
the definition before it is timed, so one that is called wrongly is refused, not reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernel_cases import Case
from moe.kernels import GROUPED_MLP, why
from moe.kernels.reference import ExpertWeights
from moe.model.dispatch import LocalDispatcher
from moe.routers.base import Routing
from moe.tables import entry


class Contestant(NamedTuple):
    run: Callable[[Tensor, Tensor, Tensor], Tensor]  # x, expert, weight → output
    weights: tuple[Tensor, ...]  # leaves
    stacked: Callable[..., tuple[Tensor, Tensor]]  # tensors like `weights` → up [E, 2, f, d] and down [E, d, f]


def ours(case: Case, backend: str, keep: bool = True) -> Contestant:
    """A backend of this package, from sorting to the sum, as MoELayer calls it where all experts are local."""
    reason = why(backend)
    if reason is not None:
        raise ImportError(reason)
    grouped_mlp = entry(GROUPED_MLP, backend, "backend")
    dispatcher, up, down = LocalDispatcher(len(case.up)), _leaf(case.up), _leaf(case.down)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        rows, ticket = dispatcher.dispatch(x, Routing.per_token(expert, weight))
        return dispatcher.combine(grouped_mlp(rows, ExpertWeights(up, down), "silu", keep), ticket)

    return Contestant(run, (up, down), lambda up, down: (up, down))


def hugging_face(case: Case, implementation: str) -> Contestant:
    """The experts of `transformers`' Mixtral, whose weights lie as ours do."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, _, f, d = case.up.shape
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=experts, num_experts_per_tok=case.expert.shape[1])
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = nn.Parameter(_leaf(case.up.flatten(1, 2))), nn.Parameter(_leaf(case.down))
    return Contestant(module, (module.gate_up_proj, module.down_proj), lambda up, down: (up.view(case.up.shape), down))


def liger(case: Case) -> Contestant:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    up, down = _leaf(case.up.flatten(1, 2)), _leaf(case.down)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, up, down, expert.int(), weight)

    return Contestant(run, (up, down), lambda up, down: (up.view(case.up.shape), down))


def scattermoe(case: Case) -> Contestant:
    """Its stack of up-projections has the gate second."""
    from scattermoe.mlp import GLUMLP

    experts, _, f, d = case.up.shape
    with torch.device("meta"):
        module = GLUMLP(d, f, experts, case.expert.shape[1], activation=nn.SiLU())
    module.experts.weight = nn.Parameter(case.up.flip(1).flatten(1, 2))
    module.output_experts.weight = nn.Parameter(_leaf(case.down))

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return module(x, weight.to(x.dtype), expert)

    weights = module.experts.weight, module.output_experts.weight
    return Contestant(run, weights, lambda up, down: (up.view(case.up.shape).flip(1), down))


def sonicmoe(case: Case) -> Contestant:
    """Older versions want rows of gate and up in turn, and name the stream."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    known = inspect.signature(moe_general_routing_inputs).parameters
    in_turn = "concat_layout" not in known
    up = _leaf(case.up.transpose(1, 2).flatten(1, 2) if in_turn else case.up.flatten(1, 2))
    down = _leaf(case.down)
    stream = next((name for name in ("stream_id", "_stream_id") if name in known), None)
    options: dict[str, Any] = {} if in_turn else {"concat_layout": True}
    if stream is not None:
        options[stream] = torch.cuda.current_stream().cuda_stream

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        token = torch.arange(len(x), device=x.device, dtype=torch.int32)[:, None].expand_as(expert).flatten()
        given = (weight.flatten(), token, expert.flatten().int(), up.permute(1, 2, 0), None, down.permute(1, 2, 0), None)
        return moe_general_routing_inputs(x, *given, E=len(up), activation_type=ActivationType.SWIGLU, **options)[0]

    def stacked(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        experts, _, f, d = case.up.shape
        return up.view(experts, f, 2, d).transpose(1, 2) if in_turn else up.view(case.up.shape), down

    return Contestant(run, (up, down), stacked)


def megablocks(case: Case) -> Contestant:
    """Its dropless layer on grouped products; the down-projection lies with the inner width first."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    experts, _, f, d = case.up.shape
    half = {"bf16": case.x.dtype == torch.bfloat16, "fp16": case.x.dtype == torch.float16}
    shape = {"hidden_size": d, "ffn_hidden_size": f, "moe_num_experts": experts, "moe_top_k": case.expert.shape[1]}
    kind = {"mlp_type": "glu", "mlp_impl": "grouped", "memory_optimized_mlp": True, "activation_fn": F.silu}
    layer = ParallelDroplessMLP(Arguments(**shape, **kind, **half, bias=False, return_bias=False, device=case.x.device))
    with torch.no_grad():
        for parameter, value in ((layer.mlp.w1, case.up[:, 0]), (layer.mlp.v1, case.up[:, 1]), (layer.mlp.w2, case.down.mT)):
            parameter.copy_(value.reshape(parameter.shape))

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return layer.forward_once(x, weight.to(x.dtype), expert)[0]

    def stacked(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([gate.view(experts, f, d), up.view(experts, f, d)], 1), down.view(experts, f, d).mT

    return Contestant(run, (layer.mlp.w1, layer.mlp.v1, layer.mlp.w2), stacked)


CONTESTANTS: dict[str, Callable[[Case], Contestant]] = {
    "triton": lambda case: ours(case, "triton"),
    "triton, recomputed": lambda case: ours(case, "triton", keep=False),
    "torch": lambda case: ours(case, "torch"),
    "loop": lambda case: ours(case, "threads"),  # away from a CPU that is one expert after the other
    "transformers": lambda case: hugging_face(case, "grouped_mm"),
    "liger": liger,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
    "megablocks": megablocks,
}


def _leaf(weight: Tensor) -> Tensor:
    return weight.detach().requires_grad_()
