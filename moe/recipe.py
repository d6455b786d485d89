"""The form that describes a run: every section, with its defaults, in one object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, create_model, model_validator

from moe.config import Choice, Settings, refuse_idle, wrong
from moe.data.sources import SOURCES
from moe.engines.settings import Engine, Optimizer, Schedule, unfit_for_deepspeed
from moe.errors import ConfigError
from moe.model.settings import Model, near_divisors, sparse_layers
from moe.parallel.layout import Layout
from moe.yaml_reader import read_file


class Run(Settings):
    """Where the run lives."""

    folder: str = "runs/default"


Init = create_model(
    "Init",
    __base__=Settings,
    __doc__="What the first weights are: those of a run, or of what surgery wrote, and fresh ones if none is named.",
    **{"from": (str | None, None)},  # type: ignore[arg-type]  # by name, because `from` is a word of the language
)


class Data(Settings):
    """What is read, and how it is cut."""

    tokenizer: str = "bytes"  # or the path of a tokenizer.json
    sources: list[Choice(SOURCES, "source")] = Field(default=["stdlib"], min_length=1)
    sequence: PositiveInt = 256  # positions in a training sequence
    document_mask: bool = False  # attention and positions start anew at document boundaries
    validation: float = Field(default=0.05, gt=0, lt=1)  # share of documents held out, by the hash of their text


class Train(Settings):
    """How long, how much at once, and in which arithmetic."""

    steps: PositiveInt = 1000
    batch: PositiveInt = 16  # sequences per step over all ranks
    accumulate: PositiveInt = 1  # micro-batches that a rank's share of the batch is cut into
    seed: NonNegativeInt = 0
    deterministic: bool = False  # on a GPU: the same bits from the same recipe, ranks, device and versions; see moe/train/deterministic.py
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: float32 masters beneath
    clip: PositiveFloat | None = 1.0  # global gradient norm; null for no clipping
    balance_window: Literal["running", "exact"] = "running"  # what a global balance loss sees of an accumulation window
    check_replicas: PositiveInt | None = 100  # steps, and before a checkpoint: stop if copies differ between ranks; null for never
    skip_limit: PositiveInt = 10  # non-finite steps in a row before the run stops
    restarts: NonNegativeInt = 0  # times --nproc starts all ranks again after one died

    def idle(self) -> dict[str, str]:
        return {"balance_window": "with train.accumulate=1"} if self.accumulate == 1 else {}

    @model_validator(mode="after")
    def _accumulate_divides(self) -> Train:
        if self.batch % self.accumulate:
            raise wrong(
                "accumulate",
                f"train.accumulate={self.accumulate} does not divide train.batch={self.batch}; "
                f"choose train.accumulate={near_divisors(self.batch, self.accumulate)}",
            )
        return self


class Checkpoint(Settings):
    """When to save, and what to keep."""

    every: PositiveInt = 500  # steps
    keep: int = Field(default=3, ge=2)  # newest ones
    durable_every: PositiveInt | None = None  # steps; these are never removed
    mode: Literal["blocking", "background"] = "background"

    @model_validator(mode="after")
    def _durable_is_saved(self) -> Checkpoint:
        if self.durable_every is not None and self.durable_every % self.every:
            raise wrong(
                "durable_every",
                f"checkpoint.durable_every={self.durable_every} is not a multiple of checkpoint.every={self.every}, so that no "
                f"checkpoint is there to keep; choose {(self.durable_every // self.every + 1) * self.every}",
            )
        return self


class Evaluate(Settings):
    """Held-out loss and samples."""

    every: PositiveInt = 250  # steps; always at the end as well
    sequences: PositiveInt = 64
    prompt: str = "def "
    sample_tokens: NonNegativeInt = 200  # 0 for no sample

    def idle(self) -> dict[str, str]:
        return {} if self.sample_tokens else {"prompt": "with evaluate.sample_tokens=0"}


class Log(Settings):
    """Where figures go beside metrics.jsonl."""

    every: PositiveInt = 10  # steps
    stages: bool = True  # where the time of sparse layers goes and what travels, with parallel.expert_ranks above 1
    profile: list[PositiveInt] = []  # steps that torch's profiler traces, into profile/ of the run's folder, one file a rank
    memory: list[PositiveInt] = []  # steps of which a GPU's allocations are recorded, into memory/ of the run's folder, one file a rank
    tensorboard: bool = False
    wandb_project: str | None = None


class Recipe(Settings):
    """Everything that determines a run."""

    run: Run = Field(default_factory=Run)
    init: Init = Field(default_factory=Init)  # type: ignore[valid-type]
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    engine: Engine = Field(default_factory=Engine)
    parallel: Layout = Field(default_factory=Layout)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    log: Log = Field(default_factory=Log)

    @classmethod
    def complete(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """What `init.from` was made with stands beneath the model that is given; its tokenizer, where none is."""
        init = tree.get("init")
        folder = init.get("from") if isinstance(init, dict) else None
        if not isinstance(folder, str):
            return tree
        path = Path(folder).expanduser() / "recipe.yaml"
        if not path.is_file() and "model" in tree:
            return tree  # a run that began from there goes on without it
        if (path.parent / "config.json").is_file() and not path.is_file():
            raise ConfigError(f"init.from={folder} is a model of Hugging Face; write moe convert {folder} DST, and then init.from=DST")
        if not path.is_file():
            raise ConfigError(f"init.from={folder} holds no model of moe ({path} is missing); name a run, or what moe upcycle wrote")
        made = read_file(path)[0]
        below = {"model": made.get("model", {})}
        if tokenizer := made.get("data", {}).get("tokenizer"):
            below["data"] = {"tokenizer": tokenizer}
        return _over(below, tree)

    @property
    def origin(self) -> Path | None:
        """The folder whose weights the run begins with."""
        folder = getattr(self.init, "from")
        return None if folder is None else Path(folder).expanduser()

    def idle(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.engine.name != "fsdp2":
            idle["parallel.replicas"] = f"with engine.name={self.engine.name}"
        if self.model.moe is None:
            dense = ["optimizer.decay_router", "train.balance_window"] + ["engine.recompute"] * (self.engine.recompute == "experts")
            dense += ["parallel.expert_ranks", "parallel.exchange", "parallel.exchange_room", "parallel.overlap"]
            idle |= dict.fromkeys(dense, "in a dense model (model.moe=null)")
        if self.parallel.expert_ranks == 1:
            idle["log.stages"] = "with parallel.expert_ranks=1"
        return idle

    def check_ranks(self, world: int) -> None:
        """Raise ConfigError if `world` ranks cannot run this recipe."""
        self.parallel.check(world, self.train.batch, self.train.accumulate, self.model.moe.experts if self.model.moe else 0)

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Recipe:
        refuse_idle(self)
        return self

    @model_validator(mode="after")
    def _has_sparse_layers(self) -> Recipe:
        model, moe = self.model, self.model.moe
        if moe is not None and not any(sparse_layers(model)):
            also = f" and model.moe.dense_layers={moe.dense_layers}" if moe.dense_layers else ""
            raise wrong(
                "model.moe",
                f"model.moe.first_dense={moe.first_dense} and model.moe.every={moe.every}{also} leave no sparse layer of "
                f"model.layers={model.layers}; lower them, or write model.moe=null for a dense model",
            )
        return self

    @model_validator(mode="after")
    def _experts_share_out(self) -> Recipe:
        experts, ranks = self.model.moe.experts if self.model.moe else 1, self.parallel.expert_ranks
        if experts % ranks:
            fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise wrong(
                "parallel.expert_ranks",
                f"{experts} experts do not split evenly over parallel.expert_ranks={ranks}; choose parallel.expert_ranks from {fitting}, "
                f"or model.moe.experts={-(-experts // ranks) * ranks}",
            )
        return self

    @model_validator(mode="after")
    def _fixed_buffers_fit(self) -> Recipe:
        moe = self.model.moe
        if moe is not None and self.parallel.exchange == "fixed" and self.model.router().fan_out_varies:
            raise wrong(
                "parallel.exchange",
                "parallel.exchange=fixed needs a router that gives every token as many experts, and with model.moe.router.name="
                f"{moe.router['name']} tokens differ; choose parallel.exchange=rows or tokens",
            )
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        sequence, context = self.data.sequence, self.model.context
        if sequence > context:
            raise wrong(
                "data.sequence",
                f"data.sequence={sequence} is longer than model.context={context}; choose at most {context}, or raise model.context",
            )
        for key, named in (("log.profile", self.log.profile), ("log.memory", self.log.memory)):
            if (last := max(named, default=0)) > self.train.steps:
                raise wrong(key, f"{key} names step {last}, and the run ends at train.steps={self.train.steps}; name steps that it reaches")
        if self.optimizer.name == "muon" and self.engine.name == "fsdp2":
            raise wrong(
                "optimizer.name",
                "optimizer.name=muon needs whole matrices, and engine.name=fsdp2 cuts them; choose engine.name=ddp or optimizer.name=adamw",
            )
        return self

    @model_validator(mode="after")
    def _deterministic_can(self) -> Recipe:
        if self.train.deterministic and self.engine.name == "deepspeed":
            raise wrong(
                "train.deterministic",
                "train.deterministic=true cannot be kept by engine.name=deepspeed, whose kernels and hooks promise no order of their sums; "
                "choose engine.name=ddp or fsdp2, or train.deterministic=false",
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_can(self) -> Recipe:
        engine, ranks, copies = self.engine, self.parallel.expert_ranks, self.parallel.copies.active
        if engine.name == "deepspeed" and (unfit := unfit_for_deepspeed(engine, self.optimizer, self.train.dtype, ranks, copies)):
            raise wrong(*unfit)
        return self


def _over(below: Any, above: Any) -> Any:
    """A tree with another laid over it, key by key."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _over(below[key], value) if key in below else value for key, value in above.items()}
