"""Which rule moves which parameter: AdamW, SGD, or Muon for the matrices inside blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.engines import settings
from moe.engines.muon import StackedMuon
from moe.errors import ConfigError
from moe.model.stages import stage

_ROW = 4096
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "muon": ("momentum_buffer",)}


class Optimizers:
    """The rules of one model as one optimizer, whose state exists before the first step so that it can be loaded into.

    Weight decay spares norms and biases (all vectors), and routers unless `decay_router`; embeddings do decay. Muon takes
    `hidden` matrices and stacks of them; embeddings, head, vectors and routers stay with AdamW.
    """

    def __init__(
        self, settings: settings.Optimizer, parameters: dict[str, Tensor], *, hidden: Collection[str], routers: Collection[str]
    ) -> None:
        self.parameters, self.steps = parameters, 0
        self.rules: dict[str, torch.optim.Optimizer] = {}
        chosen: dict[str, dict[tuple[bool, bool], list[Tensor]]] = {}
        self._moments: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        for name, p in parameters.items():
            rule = settings.name
            if rule == "muon":
                rule = "adamw" if name not in hidden or name in routers or p.ndim < 2 else "muon" if p.ndim == 2 else "stacked"
            if rule in ("muon", "stacked") and isinstance(p, DTensor):
                raise ConfigError(
                    f"optimizer.name=muon needs whole matrices, and engine.name=fsdp2 cuts {name} {tuple(p.shape)} into pieces; "
                    f"choose engine.name=ddp or optimizer.name=adamw"
                )
            decays = p.ndim > 1 and (settings.decay_router or name not in routers)
            # apart, because one call moves a group, and takes pieces of parameters or whole ones
            chosen.setdefault(rule, {}).setdefault((decays, isinstance(p, DTensor)), []).append(p)
            self._moments[name] = (p, _MOMENTS["muon" if rule == "stacked" else rule])
        for rule, groups in chosen.items():
            self.rules[rule] = _rule(rule, settings, [_group(decays, settings, tensors) for (decays, _), tensors in groups.items()])
        if settings.name == "sgd" and settings.momentum == 0:
            self._moments = {}
        self._allocate()

    def step(self, lr: float) -> None:
        """Move every parameter along its gradient."""
        with stage("optimizer"):
            for rule in self.rules.values():
                for group in rule.param_groups:
                    group["lr"] = lr
                rule.step()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """'<moment>.<parameter>' → the live tensor, shaped and sharded like its parameter."""
        return {f"{moment}.{name}": self._of(p)[moment] for name, (p, moments) in self._moments.items() for moment in moments}

    def replace(self, moment: str, name: str, tensor: Tensor) -> None:
        """Another moment of a parameter that has taken another shape."""
        self._of(self._moments[name][0])[moment] = tensor

    def resume(self, steps: int) -> None:
        """Continue as after so many steps."""
        self.steps = steps
        for rule in self.rules.values():
            for state in rule.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def _of(self, p: Tensor) -> dict[str, Any]:
        return next(rule.state[p] for rule in self.rules.values() if p in rule.state)

    def _allocate(self) -> None:
        owner = {id(p): rule for rule in self.rules.values() for group in rule.param_groups for p in group["params"]}
        for p, moments in self._moments.values():
            rule = owner[id(p)]
            state: dict[str, Any] = {moment: torch.zeros_like(p, requires_grad=False) for moment in moments}
            if isinstance(rule, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            rule.state[p] = state


def _group(decays: bool, settings: settings.Optimizer, tensors: list[Tensor]) -> dict[str, Any]:
    return {"params": tensors, "weight_decay": settings.weight_decay if decays else 0.0}


def _rule(rule: str, settings: settings.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if rule == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    if rule == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    if rule == "muon":
        return torch.optim.Muon(groups, lr=settings.lr, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")
    return StackedMuon(groups, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def squares(gradient: Tensor) -> Tensor:
    """Sum of squares in float64 of sums over short rows: float32 over a long row is wrong in the third digit on a CPU."""
    flat = gradient.reshape(-1)
    rows, rest = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW), flat[len(flat) // _ROW * _ROW :]
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest)[None]])
    return norms.double().square().sum()
