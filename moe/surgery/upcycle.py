"""Dense models become mixtures of experts: a family says what the tensors are called, a variant what the experts hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from moe.checkpoint.families import dense_to_moe
from moe.checkpoint.families.upcycle import Copied, Dense, FeedForward, Matrices, Mixture, Rows, pieces, target_config
from moe.errors import CheckpointError, ConfigError
from moe.surgery import VARIANTS, ours, variants
from moe.surgery.convert import Made, export_job, ours_of, refuse_family
from moe.surgery.job import Job, Source, Spec, Target, same
from moe.surgery.ours import Whole
from moe.surgery.routers import combine_factor, random_rows
from moe.surgery.shapes import check_dense, check_ours
from moe.surgery.source import open_source
from moe.surgery.state import Stateful, check_keeps, kept_step, moments_of, weights_of
from moe.tables import entry

PRESERVING = ("copy", "virtual_group")  # variants whose experts together are the dense layer


@dataclass(frozen=True)
class Options:
    """What is asked of an upcycling.

    optimizer: in a model of ours, its optimizer's moments: "keep" gives each expert those of its channels, and zeros to what is new.
    shared: what a family's shared expert starts as, where it has one: "zero" adds nothing, and the routed experts are the layer;
        "dense" is the layer, and the routed experts add nothing.
    router_std: of the router's first rows; None: 0.02, or 0 where the family keeps the function only then.
    """

    experts: int
    top_k: int
    family: str | None = None
    variant: str = "copy"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the variant
    layers: str = "all"
    shared: Literal["zero", "dense"] = "zero"
    d_shared: int | None = None  # None: as wide as an expert, or with "dense" as the layer
    scaling: Literal["down", "spread"] = "down"
    router_std: float | None = None
    seed: int = 0
    optimizer: Literal["keep", "reset"] = "reset"


class _Goal(NamedTuple):
    """A target family, or our own model, as far as the variants are concerned."""

    config: dict[str, Any]
    pieces: list[Copied | Matrices | Rows]
    unused: dict[str, str]
    form: Literal["huggingface", "moe"]
    exact: str  # see families.upcycle.Target
    shared: float | None  # likewise
    gated: bool
    whole: Callable[[int], Whole]  # a layer's dense network


def plan(source: str, *, to: str | None = None, **options: Any) -> tuple[Source, Job]:
    """Open a dense model and say what its upcycling writes; to: "moe" or "huggingface", None for the form that it has."""
    opened, asked = open_source(source), Options(**options)
    to = to or ("huggingface" if asked.family is not None else opened.form)
    if asked.optimizer == "keep":
        check_keeps(opened, to)
        opened = Stateful(opened)
    elif to == "moe":
        opened = ours_of(opened)
    elif opened.form == "moe":
        opened = Made(opened, export_job(opened, None))
    return opened, upcycle(opened, asked)


def upcycle(source: Source, options: Options) -> Job:
    """The job of turning a dense model into a mixture of experts."""
    if options.experts < 2:
        raise ConfigError(f"--experts {options.experts} makes no mixture; choose 2 or more")
    _check_settings(options)
    goal, mixture, d_ff = _goal(source, options)
    granularity = d_ff / mixture.d_expert
    weights = "sum_to_one" if goal.exact == "any" else "softmax"
    factor = combine_factor(weights, mixture.experts, mixture.top_k, pieces=granularity)
    std = options.router_std if options.router_std is not None else 0.02 if goal.exact == "any" else 0.0
    dense_alone = goal.shared is not None and options.shared == "dense"
    exact = factor.exact == "any router" or (factor.exact == "equal logits" and std == 0)
    group = options.settings.get("granularity", 1) if options.variant == "virtual_group" else 1
    recipe = _Recipe(options, goal, mixture, d_ff, 0.0 if dense_alone else factor.value, std, group)
    recipe.check()
    if mixture.top_k % group:
        fitting = " or ".join(str(k) for k in (mixture.top_k // group * group, -(-mixture.top_k // group) * group) if k)
        raise ConfigError(
            f"--top-k {mixture.top_k} does not choose whole groups of granularity={group} experts, each a part of the layer; "
            f"choose --top-k {fitting}"
        )
    if options.scaling == "spread" and recipe.factor == 1:
        raise ConfigError("--scaling spread has nothing to spread, because the experts' outputs need no factor here; leave it out")
    targets = [recipe.target(piece, source.specs) for piece in goal.pieces]
    moments = [t for kind in moments_of(source.specs) for piece in goal.pieces for t in recipe.moment(kind, piece, source.specs)]
    idle = [target.spec for target, piece in zip(targets, goal.pieces, strict=True) if isinstance(piece, Matrices) and piece.experts]
    total = sum(math.prod(target.spec.shape) for target in targets)
    active = total - sum(math.prod(spec.shape) for spec in idle) * (mixture.experts - mixture.top_k) // mixture.experts
    preserves = dense_alone or (options.variant in PRESERVING and exact and options.scaling == "down")
    return Job(goal.config, targets + kept_step(source.specs) + moments, goal.unused, goal.form, active, preserves)


def _check_settings(options: Options) -> None:
    """Raise ConfigError for settings that the variant does not take at all."""
    variants.check_names(options.variant, options.settings)
    for name, hint in get_type_hints(entry(VARIANTS, options.variant, "variant")).items():
        if name in options.settings:
            try:
                TypeAdapter(hint).validate_python(options.settings[name], strict=True)
            except ValidationError as error:
                value, what = options.settings[name], error.errors()[0]["msg"]
                raise ConfigError(f"--set {name}={value} is no value for the variant {options.variant}: {what}") from None


def _goal(source: Source, options: Options) -> tuple[_Goal, Mixture, int]:
    """What to write to, how many experts of which width, and the width of the dense layers."""
    if source.form == "moe":
        refuse_family(options.family)
        check_ours(source)
        d_ff, layers = ours.dense_width(source.config), source.config["layers"]
        mixture = _mixture(options, d_ff, layers, has_shared=options.d_shared is not None or options.shared == "dense")
        if source.config.get("mlp_bias") and (options.shared != "dense" or mixture.d_shared != d_ff):
            raise ConfigError(
                "the source has biases in its feed-forward layers (model.mlp_bias), and routed experts have none: only a shared expert "
                "that is the whole layer keeps them; add --shared dense, without --d-shared"
            )
        config, made, unused = ours.pieces(source.config, weights_of(source.specs), mixture)
        return (
            _Goal(
                config,
                made,
                unused,
                "moe",
                "any",
                1.0 if mixture.d_shared else None,
                source.config.get("gated", True),
                partial(ours.whole, source.config),
            ),
            mixture,
            d_ff,
        )
    dense, family = dense_to_moe(source.config, options.family)
    d_ff, layers = _width(dense, source), len(dense.blocks(dense.facts(source.config)))
    mixture = _mixture(options, d_ff, layers, has_shared=family.shared is not None)
    if options.top_k == 1 and family.exact == "any":
        raise ConfigError(
            f"--top-k 1 gives every token one expert of weight 1 in {family.model_type}, so that the router would never learn; "
            "choose --top-k 2"
        )
    check_dense(dense, source)
    _check_shapes(dense, source, mixture, d_ff)
    config = target_config(dense, family, source.config, mixture)
    specs = cast("Mapping[str, Any]", source.specs)
    made, unused = pieces(dense, family, source.config, specs, mixture)
    blocks = dense.blocks(dense.facts(source.config))
    goal = _Goal(
        *(config, made, unused, "huggingface", family.exact, family.shared, "gate" in dense.matrices),
        whole=lambda layer: _whole(dense, blocks[layer]),
    )
    return goal, mixture, d_ff


def _mixture(options: Options, d_ff: int, layers: int, *, has_shared: bool) -> Mixture:
    if options.d_shared is not None and not has_shared:
        raise ConfigError(
            f"--d-shared {options.d_shared} is for families that have a shared expert; leave it out, or choose such a --family"
        )
    if options.shared == "dense" and not has_shared:
        raise ConfigError("--shared dense is for families that have a shared expert; leave it out, or choose such a --family")
    d_expert = variants.expert_width(options.variant, d_ff, options.experts, options.settings)
    d_shared = options.d_shared if options.d_shared is not None else d_ff if options.shared == "dense" else d_expert
    return Mixture(options.experts, options.top_k, d_expert, d_shared if has_shared else 0, chosen_layers(options.layers, layers))


def chosen_layers(text: str, layers: int) -> tuple[int, ...]:
    """The layers that "all", "last_half", "every:2" or "0,3,5" names."""
    if text in ("all", "last_half"):
        return tuple(variants.sparse_layers(layers, text))
    word, _, number = text.partition(":")
    if word == "every" and number.isdecimal():
        return tuple(variants.sparse_layers(layers, int(number)))
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"--layers {text!r} names no layers; write all, last_half, every:2, or numbers such as 0,2,4")
    chosen = tuple(sorted({int(number) for number in numbers}))
    if chosen[-1] >= layers:
        raise ConfigError(f"--layers {text} names layer {chosen[-1]} of a model of {layers}; choose from 0 to {layers - 1}")
    return chosen


def _whole(dense: Dense, prefix: str) -> Whole:
    def read(tensors: list[Tensor]) -> FeedForward:
        found = {}
        for part, place in dense.matrices.items():
            tensor = tensors[dense.feed_forward.index(place.name)]
            found[part] = tensor if place.half is None else tensor.chunk(2)[place.half]
        return FeedForward(**found)

    return Whole(tuple(prefix + name for name in dense.feed_forward), read)


def _width(dense: Dense, source: Source) -> int:
    """The width of the dense layers, from the tensors themselves."""
    names, read = _whole(dense, dense.blocks(dense.facts(source.config))[0])
    if missing := [name for name in names if name not in source.specs]:
        raise ConfigError(f"{source.folder} lacks {missing[0]}, which {dense.model_type} has; give a whole dense model")
    return FeedForward(*read([_meta(source.specs[name]) for name in names])).width


def _check_shapes(dense: Dense, source: Source, mixture: Mixture, d_ff: int) -> None:
    """Raise CheckpointError for a layer that is to become sparse and whose matrices are not those of the config or of the others."""
    facts = dense.facts(source.config)
    blocks, d = dense.blocks(facts), facts.get("hidden_size") or facts.get("d_model")
    for layer in mixture.sparse:
        names, read = _whole(dense, blocks[layer])
        specs = [source.specs[name] for name in names if name in source.specs]
        if len(specs) < len(names):
            continue  # said where tensors are accounted for
        matrices = read([_meta(spec) for spec in specs])
        for part, matrix in zip(variants.MATRICES, matrices, strict=True):
            wanted = (d, d_ff) if part == "down" else (d_ff, d)
            if matrix is not None and tuple(matrix.shape) != wanted:
                name = blocks[layer] + dense.matrices[part].name
                raise CheckpointError(
                    f"{source.folder} has {name} as {list(source.specs[name].shape)}, where its config.json and the other layers make the "
                    f"{part} matrix {list(wanted)}; give a whole dense model whose layers are of one width"
                )


@dataclass(frozen=True)
class _Recipe:
    """How each piece of a target is made."""

    options: Options
    goal: _Goal
    mixture: Mixture
    d_ff: int
    factor: float  # on the output of every routed expert
    router_std: float
    group: int
    made: dict[int, list[variants.Edit]] = field(default_factory=dict)  # of the layer at work

    def target(self, piece: Copied | Matrices | Rows, specs: Mapping[str, Spec]) -> Target:
        if isinstance(piece, Rows):
            return Target(piece.name, Spec(piece.shape, piece.dtype), (), lambda _: self._rows(piece))
        sources = [_meta(specs[name]) for name in piece.sources]
        if isinstance(piece, Copied):
            made = piece.make(sources)
            make = same if len(sources) == 1 and made is sources[0] else piece.make
            return Target(piece.name, Spec(tuple(made.shape), made.dtype), piece.sources, make)
        dense = piece.read(sources)
        width = self.mixture.d_expert if piece.experts else self.mixture.d_shared
        shapes = [None if t is None else _resized(name, t, width) for name, t in zip(variants.MATRICES, dense, strict=True)]
        made = piece.pack([FeedForward(*shapes)] * max(1, len(piece.experts)))
        spec = Spec(tuple(made.shape), made.dtype)
        if self._untouched and len(piece.experts) == 1 and piece.pack([dense]) is sources[0]:
            return Target(piece.name, spec, piece.sources, same)
        if piece.experts and self.options.variant in variants.VALUES:
            whole = self.goal.whole(piece.layer)
            return Target(piece.name, spec, (*piece.sources, *whole.sources), lambda tensors: self._matrices(piece, tensors, whole))
        return Target(piece.name, spec, piece.sources, lambda tensors: self._matrices(piece, tensors))

    def moment(self, kind: str, piece: Copied | Matrices | Rows, specs: Mapping[str, Spec]) -> list[Target]:
        """What the optimizer holds, if it does, of a tensor of ours; a router is new, and so is what is held of it."""
        if isinstance(piece, Rows):  # moved by the rule that moves embeddings
            like = specs.get(f"{kind}embed.weight")
            return (
                [Target(kind + piece.name, Spec(piece.shape, like.dtype), (), lambda _: torch.zeros(piece.shape, dtype=like.dtype))]
                if like
                else []
            )
        sources = tuple(kind + name for name in piece.sources)
        if any(name not in specs for name in sources):
            return []
        target = self.target(piece, {**specs, **{name: specs[kind + name] for name in piece.sources}})
        if isinstance(piece, Copied):
            return [target._replace(name=kind + piece.name, sources=sources)]
        weights = target.sources[len(sources) :]  # by which the variant cuts the layer
        make = partial(self._matrices, piece, whole=self.goal.whole(piece.layer) if weights else None, made=variants.moment)
        return [Target(kind + piece.name, target.spec, sources + weights, make)]

    def check(self) -> None:
        """Raise ConfigError for settings with which the variant cuts no such layer, before anything is written."""
        options, experts = self.options, self.mixture.experts
        ffn = FeedForward.shape(self.d_ff)
        if options.variant in variants.VALUES:
            ffn = FeedForward(*[torch.eye(experts)] * 3)  # any layer that is quickly cut
        variants.edits(options.variant, ffn, experts, seed=options.seed, layer=0, options=dict(options.settings))

    @property
    def _untouched(self) -> bool:
        return self.options.variant == "copy" and self.factor == 1

    def _rows(self, piece: Rows) -> Tensor:
        experts, width = piece.shape
        return random_rows(experts, width, seed=self.options.seed, layer=piece.layer, std=self.router_std, group=self.group).to(piece.dtype)

    def _matrices(
        self, piece: Matrices, tensors: list[Tensor], whole: Whole | None = None, made: variants.Made = variants.matrix
    ) -> Tensor | Iterator[Tensor]:
        dense = piece.read(tensors[: len(piece.sources)])
        if not piece.experts:
            return piece.pack([variants.expert(self._shared(), dense, made)])
        edits = self._edits(piece.layer, None if whole is None else whole.read(tensors[len(piece.sources) :]))
        if len(piece.experts) == 1:
            return piece.pack([variants.expert(edits[piece.experts[0]], dense, made)])
        # experts are the first dimension of every stack, so that one at a time gives its bytes in order
        return (piece.pack([variants.expert(edits[expert], dense, made)]) for expert in piece.experts)

    def _edits(self, layer: int, dense: FeedForward | None) -> list[variants.Edit]:
        if layer not in self.made:
            self.made.clear()
            options = self.options
            ffn = FeedForward.shape(self.d_ff) if dense is None else dense
            made = variants.edits(
                options.variant, ffn, self.mixture.experts, seed=options.seed, layer=layer, options=dict(options.settings)
            )
            self.made[layer] = [variants.scaled(edit, self.factor, options.scaling, gated=self.goal.gated) for edit in made]
        return self.made[layer]

    def _shared(self) -> variants.Edit:
        assert self.goal.shared is not None
        if self.options.shared == "dense":
            return variants.shared(FeedForward.shape(self.d_ff), self.mixture.d_shared, gate=1 / self.goal.shared)
        return variants.Edit(("shared",), torch.arange(self.mixture.d_shared) % self.d_ff, scale={"down": 0.0})


def _meta(spec: Spec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _resized(name: str, tensor: Tensor, width: int) -> Tensor:
    return tensor.new_empty((tensor.shape[0], width) if name == "down" else (width, tensor.shape[1]))
