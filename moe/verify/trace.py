"""A few steps of a recipe, and everything by which two layouts could differ: figures, gradients, and what was learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from moe.data.batch import Batch
from moe.model.transformer import Transformer
from moe.parallel.mesh import Mesh
from moe.recipe import Recipe
from moe.train.loop import build_engine
from moe.verify.shrink import PLAIN, VOCAB, batch

# In float64. With a row a step: loss, norm (of the gradient, before clipping), auxiliary (in all and of each layer), loads (routed
# tokens of each layer's experts), buffer/<name> after it, and with plain SGD gradient/<parameter>. At the end:
# moment/<moment>.<parameter> and parameter/<name>.
Trace = dict[str, Tensor]
_PLACE = {field.name for field in fields(Mesh)} - {"device", "timeout"}  # what a layout decides of a rank's place
_MODEL, _OF_SGD = "model.", "optimizer.momentum_buffer."


def trace(recipe: Recipe, mesh: Mesh, *, steps: int, ranks: int = 1, make: Callable[..., Any] = build_engine) -> Trace:
    """Train a small recipe for some steps on this rank and its peers; the same on all of them.

    ranks: where one process stands in for several that accumulate, their number: its micro-batches are then those that they
    have at the same time. make: what builds the engine, in tests of what a wrong one looks like.
    """
    asked = {name: value for name, value in recipe.parallel if name in _PLACE and value is not None}
    with torch.device("meta"):
        model = Transformer(recipe.model, VOCAB, seed=recipe.train.seed, document_mask=recipe.data.document_mask)
    engine = make(recipe, model, replace(mesh, **asked))
    plain, rows = recipe.optimizer.momentum == PLAIN, []
    for step in range(steps):
        mine = _share(_together(batch(recipe, step), ranks, recipe.train.accumulate), mesh)
        result = engine.step(mine, step, recipe.optimizer.lr)
        losses = torch.stack([result.auxiliary, *(report.loss for report in result.reports)])
        row = {"loss": result.loss, "norm": result.grad_norm, "auxiliary": losses}
        if result.reports:
            row["loads"] = torch.stack([report.load for report in result.reports])
        state = engine.canonical_state()
        row |= {f"buffer/{key.removeprefix(_MODEL)}": value for key, value in state.items() if _is_buffer(key, engine)}
        row |= {f"gradient/{key.removeprefix(_OF_SGD)}": _whole(t) for key, t in state.items() if plain and key.startswith(_OF_SGD)}
        rows.append({name: value.detach().double().cpu() for name, value in row.items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | _learned(engine, plain)


def _learned(engine: Any, plain: bool) -> Trace:
    """The canonical state with nothing cut over ranks, by what it is."""
    learned = {}
    for key, tensor in engine.canonical_state().items():
        if key == "optimizer.step" or (plain and key.startswith(_OF_SGD)) or _is_buffer(key, engine):
            continue
        name = f"parameter/{key.removeprefix(_MODEL)}" if key.startswith(_MODEL) else f"moment/{key.removeprefix('optimizer.')}"
        learned[name] = _whole(tensor).detach().double().cpu()
    return learned


def _is_buffer(key: str, engine: Any) -> bool:
    """Whether a model learns this beside its parameters; it is equal on all ranks."""
    return key.startswith(_MODEL) and key.removeprefix(_MODEL) not in engine.parameters


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def _together(whole: Batch, ranks: int, accumulate: int) -> Batch:
    """Rows so ordered that a micro-batch of one process holds those which the ranks' micro-batches of one moment hold."""
    return Batch(*(t.unflatten(0, (ranks, accumulate, -1)).transpose(0, 1).flatten(0, 2).contiguous() for t in whole))


def _share(whole: Batch, mesh: Mesh) -> Batch:
    return Batch(*(t.chunk(mesh.world)[mesh.rank].contiguous() for t in whole))
