"""What a run begins with, if not with fresh weights: its dense twin, or the mixture of experts that is made of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moe.errors import ConfigError, MoeError
from moe.model.settings import sparse_layers
from moe.recipe import Recipe
from moe.scaling.results import CONTINUED, RUNS, brief
from moe.studies.spec import Begin
from moe.surgery.job import Source, Spec
from moe.surgery.routers import weights_of
from moe.surgery.upcycle import Options, upcycle
from moe.surgery.variants import expert_width

OTHER_ORDER = 1000  # is added to the seed of a run that goes on, so that it reads the corpus in another order than its twin did
_NAME = 16  # letters


class Twin(NamedTuple):
    """A dense run with which others begin."""

    id: str
    recipe: Recipe
    tokens: int
    flops: float
    active: int


class Origin(NamedTuple):
    """What a run begins with."""

    id: str  # of the folder among the study's runs: the twin's own, or a hash of the twin and of what is asked of its conversion
    twin: Twin
    label: str
    asked: dict[str, Any] | None  # of `moe upcycle`; None: the twin as it is


def origin_of(begin: Begin, twin: Twin, recipe: Recipe) -> Origin:
    """What a run of this recipe begins with; ConfigError if the variant makes no such model of the twin."""
    moe = recipe.model.moe
    if moe is None:
        return Origin(twin.id, twin, CONTINUED, None)
    variant, d_ff, router = brief(begin.variant, Begin.model_fields["variant"]), twin.recipe.model.d_ff, moe.router
    name = variant.pop("name")
    if router["name"] != "top_k" or weights_of(router) != "sum_to_one":
        told = ", ".join(f"{key}={router[key]}" for key in ("name", "normalize") if key in router)
        raise ConfigError(
            f"a study begins {moe.experts} experts as {begin.label}, and their router ({told}) does not weigh a token's experts to one in "
            "sum, as it must where each holds the dense layer; write axes.router: [top_k]"
        )
    if unlike := [f"{key}={router[key]}" for key, plain in (("scale", 1.0), ("capacity_factor", None)) if router.get(key, plain) != plain]:
        raise ConfigError(
            f"a study begins {moe.experts} experts as {begin.label}, whose function a router with {', '.join(unlike)} changes from the "
            "first step; leave that out of axes.router"
        )
    if wild := [f"{key}={value}" for key, value in variant.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise ConfigError(f"a study begins {moe.experts} experts as {begin.label}, where {wild[0]} is no number; give a finite one")
    width = expert_width(name, d_ff, moe.experts, variant)
    if width < 1:
        raise ConfigError(f"a study begins {moe.experts} experts as {begin.label}, which makes experts of no width; give d_expert above 0")
    if width != moe.d_expert:
        fitting = f"axes.granularity: [{d_ff // width}]" if d_ff % width == 0 else "another variant"
        raise ConfigError(
            f"a study begins {moe.experts} experts of width {moe.d_expert} (granularity {d_ff // moe.d_expert}) as {begin.label}, which "
            f"makes experts of width {width} of the dense layer's {d_ff}; write {fitting} there, in a part of `also` if need be"
        )
    layers = ",".join(str(number) for number, sparse in enumerate(sparse_layers(recipe.model)) if sparse)
    asked = {
        "experts": moe.experts,
        "top_k": router["k"],
        "variant": name,
        "settings": variant,
        "layers": layers,
        "seed": recipe.train.seed,
    }
    asked |= {"d_shared": moe.d_shared} if moe.d_shared else {}
    given, needed = (one.model_dump_json(include={"model", "data"}, exclude_unset=True) for one in (twin.recipe, recipe))
    _check(given, needed, json.dumps(asked | {"seed": 0}))
    made = json.dumps([twin.id, asked], sort_keys=True)
    return Origin(hashlib.sha256(made.encode()).hexdigest()[:_NAME], twin, begin.label, asked)


@cache
def _check(dense: str, sparse: str, asked: str) -> None:
    """Raise ConfigError unless surgery would make of the one model what the other needs."""
    options = json.loads(asked)
    given, wanted = (_Shape(Recipe.model_validate_json(text)) for text in (dense, sparse))
    where = f"a study cannot begin {options['experts']} experts as {options['variant']}"
    try:
        made = {target.name: target.spec.shape for target in upcycle(given, Options(**options)).targets}
    except MoeError as error:
        raise ConfigError(f"{where}: {error}") from None
    needed = {name: spec.shape for name, spec in wanted.specs.items() if ".moe.router." not in name or name.endswith(".weight")}
    if made != needed:
        name = min(name for name in made.keys() | needed.keys() if made.get(name) != needed.get(name))
        raise ConfigError(
            f"{where}: it would make {name} of shape {made.get(name)}, and the run's model has it of {needed.get(name)}; "
            "leave what the dense twin lacks out of recipe.model"
        )


class _Shape(Source):
    """A model of ours that was never built."""

    form = "moe"

    def __init__(self, recipe: Recipe) -> None:
        from moe.data.tokenizer import open_tokenizer
        from moe.train.loop import build_model

        model = build_model(recipe, open_tokenizer(recipe.data.tokenizer))
        self.folder, self.travels = Path(recipe.run.folder), []
        self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
        self.config = recipe.model.model_dump(mode="json") | {"vocab": model.embed.weight.shape[0]}

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} has a shape alone")

    def chunks(self, name: str) -> Iterator[memoryview]:
        raise AssertionError(f"{name} has a shape alone")

    def identity(self) -> Any:
        return None


def words(study: Path, origin: Origin) -> list[str]:
    """The command that makes a mixture of a twin."""
    assert origin.asked is not None
    asked = dict(origin.asked)
    options = [word for name, value in asked.pop("settings").items() for word in ("--set", f"{name}={value}")]
    options += [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["upcycle", str(study / RUNS / origin.twin.id), str(study / RUNS / origin.id), *options]


def has_weights(study: Path, name: str) -> bool:
    """Whether a run or a conversion is there to begin with."""
    return (study / RUNS / name / "weights").is_dir()


def remove(folder: Path) -> None:
    """Remove a folder, so that a kill leaves all of it under its name, or nothing."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # it is not there, or another process is at it
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
