"""A recipe made small: the same router, losses, precision and engine around a model of a few thousand parameters."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from moe.config import dump, load
from moe.data.batch import IGNORE, Batch
from moe.errors import ConfigError
from moe.recipe import Recipe
from moe.routers import build
from moe.yaml_reader import read_text

POSITIONS, VOCAB, WIDTH, ROWS = 12, 64, 16, 16
PLAIN = 1e-30  # momentum of plain SGD: too small to change a step, it makes the gradient part of what an engine shows
_SMALLEST_CLIP = 0.1  # below the gradient of every small model, so that clipping has something to do
_TIMEOUT = 120  # seconds for a collective of a small model: whatever takes longer hangs


def shrink(recipe: Recipe, *, dtype: str, rule: str, rows: int, expert_ranks: int = 1) -> list[str]:
    """Settings, as key=value words, of a small model that meets everything that the recipe's would meet.

    rule: "recipe" steps with the recipe's optimizer at its peak rate and clips every gradient; "sgd" is plain and never clips,
    so that a gradient of the wrong size shows. rows: sequences of a global batch. The number of experts can be shared out over
    `expert_ranks` if the recipe's can.
    """
    tree = read_text(dump(recipe), "the recipe")[0]
    optimizer, clip = tree["optimizer"], recipe.train.clip
    if rule == "sgd":
        optimizer, clip = {"name": "sgd", "lr": 0.05, "momentum": PLAIN, "weight_decay": 0.0}, None
    train = {"batch": rows, "seed": recipe.train.seed, "dtype": dtype, "clip": clip and min(clip, _SMALLEST_CLIP)}
    train["deterministic"] = recipe.train.deterministic
    sections = {
        "model": _model(recipe, tree["model"], math.lcm(4, expert_ranks)),
        "data": {"sequence": POSITIONS, "document_mask": recipe.data.document_mask},
        "train": train,
        "optimizer": optimizer,
        "engine": {"recompute": recipe.engine.recompute, "compile": recipe.engine.compile},
        "parallel": {"device": recipe.parallel.device, "timeout": _TIMEOUT},
    }
    return [f"{name}={json.dumps(section)}" for name, section in sections.items()]


def built(words: list[str]) -> Recipe:
    """The recipe of some key=value words; its errors are about settings that the user gave."""
    try:
        return load([], words)
    except ConfigError as error:
        raise ConfigError(str(error).replace("command line: ", "")) from None


def batch(recipe: Recipe, step: int) -> Batch:
    """The global batch of a step: several documents a row, and padding that leaves ranks unequal numbers of tokens.

    A row has every token once, so that routers which compare tokens meet no ties.
    """
    rows, positions = recipe.train.batch, recipe.data.sequence
    generator = torch.Generator().manual_seed(step)
    text = torch.stack([torch.randperm(VOCAB, generator=generator)[: positions + 1] for _ in range(rows)])
    length = torch.randint(positions // 3, positions + 1, (rows,), generator=generator)
    length[-1] = 0
    place = torch.arange(positions).expand(rows, positions)
    inside = place < length[:, None]
    begins = torch.rand(rows, positions, generator=generator) < 0.2
    begins[:, 0] = False
    document = begins.cumsum(1)
    start = torch.where(begins, place, 0).cummax(1).values
    return Batch(
        torch.where(inside, text[:, :-1], 0),
        torch.where(inside, text[:, 1:], IGNORE),
        torch.where(inside, document, -1),
        torch.where(inside, place - start, 0) if recipe.data.document_mask else place.clone(),
        torch.arange(rows * positions).view(rows, positions),
    )


def _model(recipe: Recipe, model: dict[str, Any], multiple: int) -> dict[str, Any]:
    """The model's section with small numbers: two sparse layers, and a dense one if there are any."""
    moe, heads = recipe.model.moe, min(recipe.model.heads, 4)
    per_group = recipe.model.heads // (recipe.model.kv_heads or recipe.model.heads)
    small = {
        "layers": min(recipe.model.layers, 2),
        "d_model": 2 * WIDTH,
        "heads": heads if 2 * WIDTH % (2 * heads) == 0 else 2,
        "vocab": VOCAB,
        "init_std": 0.2,  # far from the flat start at which a wrong gradient is small
    }
    small["kv_heads"] = next(n for n in range(max(1, small["heads"] // per_group), 0, -1) if small["heads"] % n == 0)
    for name, value in (("head_dim", 8), ("window", 5), ("d_ff", WIDTH)):
        if model.get(name) is not None:
            small[name] = min(model[name], value)
    if moe is not None:
        first, every = min(moe.first_dense, 1), min(moe.every, 2)
        small["layers"] = min(recipe.model.layers, first + 2 * every + bool(moe.dense_layers))
        small["moe"] = model["moe"] | {
            "d_expert": WIDTH,
            "d_shared": WIDTH if moe.d_shared else 0,
            "first_dense": first,
            "every": every,
            "dense_layers": [small["layers"] - 1] if moe.dense_layers else [],
            **_experts(moe.experts, model["moe"]["router"], multiple),
        }
        if first == 0 and every == 1 and not moe.dense_layers:
            small.pop("d_ff", None)
    return {key: value for key, value in model.items() if key not in ("d_ff", "moe")} | {"moe": None} | small


def _experts(experts: int, router: dict[str, Any], multiple: int) -> dict[str, Any]:
    """The smallest number of experts of which the router takes its choice, with the remainder that the recipe's has."""
    router = _without_files(router)
    in_groups = router.get("groups", 1) // router.get("groups_kept", 1)
    for fewer in range(max(8, 2 * _chosen(router) * in_groups), min(experts, 1024)):
        if fewer % multiple == experts % multiple and _builds(router, fewer):
            return {"experts": fewer, "router": router}
    return {"experts": experts, "router": router}


def _builds(router: dict[str, Any], experts: int) -> bool:
    try:
        with torch.device("meta"):
            build(router, WIDTH, experts)
    except ConfigError:
        return False
    return True


def _chosen(router: dict[str, Any]) -> int:
    wrapped = router.get("router")
    return max(int(router.get("k", 1)), _chosen(wrapped) if isinstance(wrapped, dict) else 1)


def _without_files(router: dict[str, Any]) -> dict[str, Any]:
    """A hash router's files are about the recipe's vocabulary and experts; the small model has a random table."""
    if router["name"] == "hash":
        return router | {"table": "random", "frequency": None, "vocab": None}
    wrapped = router.get("router")
    return router | {"router": _without_files(wrapped)} if isinstance(wrapped, dict) else router
