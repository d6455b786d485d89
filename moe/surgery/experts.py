"""Fewer or more experts of a whole model: pruned to those that a task needs, merged by likeness, or cloned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.families.upcycle import FeedForward
from moe.data.tokenizer import open_tokenizer
from moe.errors import ConfigError, DataError
from moe.model.settings import Model
from moe.model.transformer import sparse_layers
from moe.surgery import prune as pruning
from moe.surgery import resize as resizing
from moe.surgery.check import load_ours
from moe.surgery.convert import Made, active_of, export_job, ours_of, refuse_family
from moe.surgery.job import Job, Source, Spec, Target, same
from moe.surgery.resize import ROUTER_ROWS, Mapping
from moe.surgery.source import TOKENIZER, open_source, read_text
from moe.surgery.state import Stateful, check_keeps, moments_of
from moe.surgery.variants import MATRICES

ROWS, POSITIONS = 8, 128  # of a batch that experts are scored on


def decide(source: str, keep: str, data: Path | None, *, score: Any = "gate") -> dict[str, list[int]]:
    """The experts of each layer that stay: those named ("0,3" or "3,"), or so many by what the model does with a text."""
    opened = ours_of(open_source(source))
    experts = _moe(opened)["experts"]
    layers = [layer for layer, sparse in enumerate(sparse_layers(Model.model_validate(opened.config))) if sparse]
    words = [word.strip() for word in keep.removesuffix(",").split(",")]
    if not all(word.isdecimal() for word in words) or (words == ["0"] and "," not in keep):
        raise ConfigError(f"--keep {keep} names no experts; write a number of them (with --data), or which: 0,3")
    if "," in keep and data is not None:
        raise ConfigError(f"--keep {keep} names the experts, so that --data {data} has nothing to decide; leave it out, or give a number")
    if "," in keep:
        return {str(layer): [int(word) for word in words] for layer in layers}
    if not 1 <= int(keep) <= experts:
        raise ConfigError(f"--keep {keep} of {experts} experts a layer cannot be; choose from 1 to {experts}")
    if data is None:
        raise ConfigError(f"--keep {keep} leaves open which experts; give --data with a text of the task, or name them: --keep 0,3")
    batches = _batches(opened, data)
    of_layers: dict[int, int] = {layer: experts for layer in layers}
    schedule = pruning.Pruning(of_layers, window=max(1, len(batches) // 4), beta=0.5, until=len(batches), keep=int(keep))
    chosen = pruning.choose(load_ours(opened), batches, schedule, score=score)
    return {str(layer): chosen[layer] for layer in layers}


def plan_prune(
    source: str, *, keep: dict[str, list[int]], optimizer: str = "reset", family: str | None = None, to: str | None = None
) -> tuple[Source, Job]:
    """Open a mixture and say what is written of it with these experts of each layer alone; of one, a dense model."""
    opened, mine = _open(source, optimizer, family, to)
    model = Model.model_validate(mine.config)
    experts = _moe(mine)["experts"]
    mappings = {int(layer): resizing.keep(kept, experts) for layer, kept in keep.items()}
    count = len(next(iter(keep.values())))
    smaller = sized(model, count, min(_k(model), count))
    job = _dense(mine, smaller, keep) if count == 1 else resized(mine, smaller, mappings.__getitem__, 1.0, exact=count == experts)
    left_out = {int(layer): kept for layer, kept in keep.items()} if count < experts else None
    return _in_form(opened, mine, job._replace(kept=left_out), family, to)


def plan_resize(
    source: str,
    *,
    experts: int,
    data: str | None = None,
    router_std: float = 0.0,
    seed: int = 0,
    optimizer: str = "reset",
    family: str | None = None,
    to: str | None = None,
) -> tuple[Source, Job]:
    """Open a mixture and say what is written of it with its experts cloned, or those most alike merged.

    data: a text on whose outputs experts are compared, channels put in order, and loads counted; None: they are compared by weights.
    """
    opened, mine = _open(source, optimizer, family, to)
    model, before = Model.model_validate(mine.config), _moe(mine)["experts"]
    if experts >= before and data is not None:
        raise ConfigError(f"--data is for merging, and {before} experts become {experts}; leave it out")
    if experts >= before:
        mapping = resizing.clone(before, experts)
        if mapping.copies is None:
            job = resized(mine, sized(model, experts, _k(model)), lambda _: mapping, 1.0, exact=False, std=router_std, seed=seed)
        else:
            router, factor, bias = resizing.cloned_router(_moe(mine)["router"], mapping.copies)
            larger = sized(model, experts, router["k"])
            job = resized(mine, larger, lambda _: mapping, factor, bias, exact=router_std == 0, std=router_std, seed=seed)
    else:
        merged = cache(lambda layer: _merged(mine, layer, experts)) if data is None else _by_outputs(mine, Path(data), experts)
        job = resized(mine, sized(model, experts, min(_k(model), experts)), merged, 1.0, exact=False)
    return _in_form(opened, mine, job, family, to)


def _open(source: str, optimizer: str, family: str | None, to: str | None) -> tuple[Source, Source]:
    """A model, and it as one of ours, with its optimizer's moments if they are to be kept."""
    opened = open_source(source)
    if optimizer == "keep":
        check_keeps(opened, _form(opened, family, to))
        opened = Stateful(opened)
    return opened, ours_of(opened)


def _form(opened: Source, family: str | None, to: str | None) -> str:
    """The form that was asked for, by name or by a family's, or that the source has."""
    return to or ("huggingface" if family is not None else opened.form)


def _in_form(opened: Source, mine: Source, job: Job, family: str | None, to: str | None) -> tuple[Source, Job]:
    """The job in the form that was asked for, or that the source has."""
    if _form(opened, family, to) == "moe":
        refuse_family(family)
        return mine, job
    made = Made(mine, job)
    was = opened.config.get("model_type") if job.config["moe"] is not None else None  # one expert is a dense family's
    exported = export_job(made, family or was)
    return made, exported._replace(preserves=job.preserves, kept=job.kept)


def resized(
    source: Source,
    model: Model,
    mapping: Callable[[int], Mapping],
    factor: float,
    bias: float = 1.0,
    *,
    exact: bool,
    std: float = 0.0,
    seed: int = 0,
) -> Job:
    """Every tensor of the experts and routers after a mapping of its layer; factors on down-projections and on the router's bias."""
    router = _moe(source)["router"]["name"]
    if router not in ROUTER_ROWS:
        raise ConfigError(
            f"the state of router.name={router} is not one row an expert, so that experts cannot be taken away or added; "
            f"this is possible with {', '.join(ROUTER_ROWS)}"
        )
    count = model.moe.experts if model.moe else 0
    targets = []
    for name, spec in source.specs.items():
        found = re.fullmatch(r"(optimizer\.\w+\.)?layers\.(\d+)\.moe\.(experts|router)\.(\w+)", name)
        if found is None or (found[3] == "router" and found[4] not in ROUTER_ROWS[router]):
            targets.append(Target(name, spec, (name,), same))
            continue
        layer, part = int(found[2]), found[4] if found[1] is None else "moment"
        sized = Spec((count, *spec.shape[1:]), spec.dtype)
        if found[3] == "experts":
            scale = factor if part == "down" else 1.0
            targets.append(Target(name, sized, (name,), lambda t, layer=layer, scale=scale: _experts(t[0], mapping(layer), scale)))
        else:
            noise = std if part == "weight" else 0.0
            scale = bias if part == "bias" else 1.0
            make = lambda t, layer=layer, noise=noise, scale=scale: _rows(t[0], mapping(layer), noise, seed, layer) * scale  # noqa: E731
            targets.append(Target(name, sized, (name,), make))
    config = model.model_dump(mode="json") | {"vocab": source.config["vocab"]}
    return Job(config, targets, {}, "moe", active_of(model, config["vocab"]), preserves=exact)


def _experts(stack: Tensor, mapping: Mapping, scale: float) -> Iterator[Tensor]:
    for new in range(mapping.new):
        tensor = mapping.expert(new, stack.__getitem__, 1)
        yield tensor if scale == 1 else (tensor.float() * scale).to(tensor.dtype)


def _rows(rows: Tensor, mapping: Mapping, std: float, seed: int, layer: int) -> Tensor:
    new = mapping.stack(rows)
    return new if std == 0 else resizing.parted_rows(new, mapping, std=std, seed=seed, layer=layer)


def _dense(source: Source, model: Model, keep: dict[str, list[int]]) -> Job:
    """The dense model that one expert of each layer is."""
    smaller = pruning.dense_settings(model)
    assert model.moe is not None
    scale = float(model.moe.router.get("scale", 1.0))
    config = smaller.model_dump(mode="json") | {"vocab": source.config["vocab"]}
    targets = [Target(name, spec, (name,), same) for name, spec in source.specs.items() if ".moe." not in name]
    unused = {name: "a single expert needs no router" for name in source.specs if ".moe.router." in name}
    parts = MATRICES if model.gated else MATRICES[1:]
    for kind, (layer, (expert,)) in product(["", *moments_of(source.specs)], keep.items()):
        at = f"{kind}layers.{layer}."
        names = ["experts.up", "experts.down", *(f"shared.{part}.weight" for part in parts if model.moe.d_shared)]
        names = tuple(f"{at}moe.{name}" for name in names)
        if names[0] not in source.specs:
            continue
        dtype, factor = source.specs[names[0]].dtype, 1.0 if kind else scale
        for part in parts:
            shape = (model.d_model, smaller.d_ff) if part == "down" else (smaller.d_ff, model.d_model)
            make = partial(_part, part=part, parts=parts, expert=expert, scale=factor)
            targets.append(Target(f"{at}mlp.{part}.weight", Spec(shape, dtype), names, make))
    one = _moe(source)["experts"] == 1
    return Job(config, targets, unused, "moe", active_of(smaller, config["vocab"]), preserves=one)


def _part(tensors: list[Tensor], *, part: str, parts: tuple[str, ...], expert: int, scale: float) -> Tensor:
    """A matrix of the layer that an expert is, with the shared one if there is one."""
    up, down, *shared = tensors
    beside = FeedForward(**dict(zip(parts, shared, strict=True))) if shared else None
    made = getattr(pruning.dense_layer(up[expert], down[expert], scale=scale, shared=beside), part)
    return made.contiguous()


def _merged(source: Source, layer: int, to: int) -> Mapping:
    at = f"layers.{layer}.moe.experts."
    return resizing.merged_like(resizing.weight_likeness(source.read(f"{at}up"), source.read(f"{at}down")), to)


def _by_outputs(source: Source, data: Path, to: int) -> Callable[[int], Mapping]:
    ids = _batches(source, data)[0]
    found = cache(lambda: resizing.merged_by_outputs(load_ours(source), ids, to))
    return lambda layer: found()[layer]


def _batches(source: Source, data: Path) -> list[Tensor]:
    """A text's tokens in batches."""
    text = read_text(data)
    name = str(source.folder / TOKENIZER) if TOKENIZER in source.travels else source.tokenizer or "bytes"
    ids = torch.from_numpy(open_tokenizer(name).encode(text).astype("int64"))
    size = min(POSITIONS, source.config["context"])
    rows = ids[: len(ids) // size * size].view(-1, size)
    if not len(rows):
        raise DataError(f"{data} has {len(ids)} tokens, too few for one row of {size}; give a longer text")
    return list(rows.split(ROWS))


def _moe(source: Source) -> dict[str, Any]:
    moe = source.config["moe"]
    if moe is None:
        raise ConfigError(f"{source.folder} is a dense model, which has no experts; give a mixture, or upcycle it first")
    return Model.model_validate(source.config).model_dump(mode="json")["moe"]


def _k(model: Model) -> int:
    assert model.moe is not None
    return model.moe.router.get("k", 1)


def sized(model: Model, experts: int, k: int) -> Model:
    """The model with so many experts, and so many of them a token."""
    moe = model.model_dump(mode="json")["moe"]
    router = moe["router"] | ({"k": k} if "k" in moe["router"] else {})
    return Model.model_validate(model.model_dump(mode="json") | {"moe": moe | {"experts": experts, "router": router}})
