"""The form of a study: what runs share, the axes along which they differ, and the rule that keeps them comparable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from moe.config import Choice, Settings, load, refuse_idle, wrong
from moe.errors import ConfigError
from moe.recipe import Recipe
from moe.routers import ROUTERS
from moe.scaling import LAWS
from moe.scaling.results import STUDY
from moe.surgery import VARIANTS

Share = Annotated[float, Field(gt=0, lt=1)]


class Family(Settings):
    """The dense twin: the model whose feed-forward layers become mixtures of experts."""

    d_model: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    d_ff: PositiveInt


class Begin(Settings):
    """What a run begins with instead of fresh weights: its dense twin, trained before, which a cell of several experts makes sparse."""

    dense: PositiveInt  # tokens that the twin is trained for, as an ordinary run of the study; axes.tokens are then further ones
    variant: Choice(VARIANTS, "variant", given=("ffn", "experts", "seed", "layer"), default="copy") = "copy"  # as of moe upcycle

    @property
    def label(self) -> str:
        """The variant with its options, in a few words."""
        return " ".join([self.variant["name"], *(f"{name}={value}" for name, value in self.variant.items() if name != "name")])


class Axes(Settings):
    """Values along each axis; runs are all their combinations. A dense model has one expert, and no router or granularity."""

    family: list[Family] | None = None
    experts: list[PositiveInt] | None = None  # of a layer; 1 is the dense twin
    top_k: list[PositiveInt] | None = None
    granularity: list[PositiveInt] | None = None  # how many times narrower than the twin's layer an expert is
    router: list[Choice(ROUTERS, "router", given=("d_model", "num_experts"))] | None = None
    begin: list[Begin | None] | None = None  # null: from scratch
    tokens: list[PositiveInt] | None = None
    seed: list[NonNegativeInt] | None = None
    lr: list[PositiveFloat] | None = None  # times what the rule of scaling says

    @model_validator(mode="after")
    def _values_differ(self) -> Axes:
        for name in self.model_fields_set:
            values = getattr(self, name)
            if values is not None and (not values or any(value in values[:at] for at, value in enumerate(values))):
                raise wrong(name, f"axes.{name} is empty or names a value twice; give each value once")
        return self


class Rule(Settings):
    """What runs have in common."""

    # grid: nothing. iso_flop: training FLOPs, whence the tokens. iso_active: active parameters of the twin, with as many narrower
    # experts chosen as they are narrower. iso_parameter, iso_memory: all parameters, or bytes of weights and of one context's keys
    # and values, whence the width.
    name: Literal["grid", "iso_flop", "iso_active", "iso_parameter", "iso_memory"] = "grid"
    values: list[PositiveFloat] = []  # FLOPs, parameters or bytes
    tolerance: Share = 0.05  # how far from the rule a run may be

    def idle(self) -> dict[str, str]:
        idle = {"tolerance": "with rule.name=grid"} if self.name == "grid" else {}
        return idle | ({"values": f"with rule.name={self.name}"} if self.name in ("grid", "iso_active") else {})


class Scaling(Settings):
    """Learning rate, batch and schedule of a run, from its twin's parameters N and its experts E."""

    at: PositiveFloat = 1e6  # the N at which rate and batch are as given here
    lr: PositiveFloat = 3e-3
    lr_power: float = -0.25  # lr · (N / at)^lr_power · E^lr_experts
    lr_experts: float = 0.0
    batch: PositiveInt = 8  # sequences
    batch_power: NonNegativeFloat = 0.0  # batch · (N / at)^batch_power, to the nearest whole number
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: NonNegativeInt = 100_000  # tokens, the same for every length, so that runs can share a trunk
    decay: Share = 0.2  # wsd: the share of a run that its cool-down takes
    final: float = Field(default=0.0, ge=0, le=1)  # share of the rate at the end

    def idle(self) -> dict[str, str]:
        return {"decay": f"with scaling.schedule={self.schedule}"} if self.schedule != "wsd" else {}


class Aim(Settings):
    """The law that the study is to identify, and how well; judged by simulation before anything runs."""

    law: Literal[*LAWS] = "chinchilla"
    noise: PositiveFloat = 0.005  # standard deviation of the log loss of a run
    error: PositiveFloat = 0.03  # of the loss foreseen, relative, at most, in nine of ten such studies
    further: float = Field(default=2.0, ge=1)  # foreseen at so many times the study's largest size and tokens
    values: dict[str, float] = {}  # the law's, if the truth were this; the published ones where none are given
    go_on: str | None = None  # why to start although the design cannot identify the law


class Means(Settings):
    """What the study may use."""

    folder: str = "studies/default"
    cores: PositiveInt | None = None  # that all runs together keep busy; null for all of the machine
    threads: PositiveInt = 1  # of a run
    timeout: PositiveFloat = 24.0  # hours that a run's process may take
    trunks: bool = True  # wsd runs of several lengths share all steps but their cool-downs
    keep_trunks: bool = True  # their newest checkpoint stays, from which longer runs can go on
    keep_weights: bool = False  # of every run, beside its figures

    @field_validator("folder")
    @classmethod
    def _of_home(cls, folder: str) -> str:
        return str(Path(folder).expanduser())

    def idle(self) -> dict[str, str]:
        return {} if self.trunks else {"keep_trunks": "with means.trunks=false"}


SET_BY_AXES = (
    "run.folder", "init.from", "model.layers", "model.d_model", "model.heads", "model.d_ff", "model.moe.experts", "model.moe.d_expert",
    "model.moe.router", "train.steps", "train.batch", "train.seed", "optimizer.lr", "schedule",
)  # fmt: skip


class Study(Settings):
    """Everything that determines a study."""

    means: Means = Field(default_factory=Means)
    recipe: Recipe = Field(default_factory=Recipe)  # what all runs share
    axes: Axes
    also: list[Axes] = []  # further runs: each names the axes on which it differs from `axes`
    rule: Rule = Field(default_factory=Rule)
    scaling: Scaling = Field(default_factory=Scaling)
    aim: Aim = Field(default_factory=Aim)

    def idle(self) -> dict[str, str]:
        return {"means.trunks": f"with scaling.schedule={self.scaling.schedule}"} if self.scaling.schedule != "wsd" else {}

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Study:
        refuse_idle(self)
        return self

    @model_validator(mode="after")
    def _axes_are_not_set_twice(self) -> Study:
        given = self.recipe.model_dump(exclude_unset=True)
        for key in SET_BY_AXES:
            tree = given
            for part in key.split("."):
                tree = tree.get(part) if isinstance(tree, dict) else None
            if tree is not None:
                raise wrong(f"recipe.{key}", f"recipe.{key} is what axes and scaling decide; leave it out of the recipe")
        return self

    @model_validator(mode="after")
    def _axes_suit_the_rule(self) -> Study:
        axes, rule = self.axes, self.rule
        if axes.family is None:
            raise wrong("axes.family", "axes.family is missing; add one, such as {d_model: 128, layers: 4, heads: 4, d_ff: 384}")
        for number, part in enumerate([axes, *self.also]):
            where = "axes" if number == 0 else f"also.{number - 1}"
            if rule.name == "iso_flop" and part.tokens is not None:
                raise wrong(f"{where}.tokens", f"{where}.tokens is what rule.name=iso_flop decides; leave it out, and give rule.values")
            if rule.name in ("iso_parameter", "iso_memory") and any(begin is not None for begin in part.begin or []):
                raise wrong(
                    f"{where}.begin",
                    f"{where}.begin cannot be beside rule.name={rule.name}, which gives a mixture another width than its dense twin, so "
                    "that neither could begin the other; choose rule.name=iso_flop or grid",
                )
            if rule.name == "iso_active" and part.top_k is not None:
                raise wrong(f"{where}.top_k", f"{where}.top_k is what rule.name=iso_active decides from granularity; leave it out")
        if axes.tokens is None and rule.name != "iso_flop":
            raise wrong("axes.tokens", f"axes.tokens is missing, and rule.name={rule.name} does not decide it; add a list of numbers")
        if rule.name in ("iso_flop", "iso_parameter", "iso_memory") and not rule.values:
            raise wrong("rule.values", f"rule.name={rule.name} has no rule.values; add a list of numbers")
        return self


def opened(path: Path) -> tuple[Study, Path]:
    """A study and its folder, by either of them."""
    file = path / STUDY if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ConfigError(f"{path} holds no study ({STUDY} is missing); name the folder that moe study run made, or its YAML file")
    study = load([file], [], Study)
    return study, path if path.is_dir() else Path(study.means.folder)
