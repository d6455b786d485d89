"""What a study found: a row for each run that ended, appended to results.jsonl as it ends and never changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from moe.choice import Entries
from moe.config import load
from moe.errors import ConfigError, DataError
from moe.model.settings import Moe
from moe.recipe import Data, Recipe
from moe.scaling.laws import Column, Points

STUDY, RESULTS, RUNS = "study.yaml", "results.jsonl", "runs"  # in a study's folder
CONTINUED = "continued dense"  # axes["begin"] of a run that trains its dense twin on
Status = Literal["done", "diverged", "out of memory", "timed out", "failed"]


class Row(NamedTuple):
    """One run and how it ended. What a run that is not done never measured is None.

    A run that began with its dense twin has axes["begin"], how, and axes["dense"], the twin's tokens; axes["tokens"] are then
    further ones, and `tokens`, `flops` and `average` of twin and run together.
    """

    id: str  # of the run, see `identity`
    status: Status
    why: str | None
    axes: dict[str, Any]  # where in the study the run stands; "lr" is the rate itself, "lr_factor" what it is of the rule's
    total: int  # parameters
    active: int
    base: int  # those of the dense twin
    average: float  # active ones, over the run's tokens
    experts: int  # of a layer; 1 for a dense model
    granularity: float
    sparsity: float  # share of a layer's experts that a token leaves out
    tokens: int
    flops: float  # of training, those spent on a shared trunk included
    bytes: int  # of the weights
    loss: float | None  # held out, nats a token
    bits_per_byte: float | None
    step_ms: float | None  # median
    tokens_per_s: float | None
    health: dict[str, float]  # mean over sparse layers at the end, as metrics.jsonl calls them; the worst layer's max_over_mean
    trunk: str | None  # id of the run it cooled down from
    steps: int
    cooldown_steps: int
    commit: str | None
    machine: str
    corpus: str  # fingerprint
    tokenizer: str
    seconds: float  # of this run's own processes, without the trunk

    @property
    def tuned(self) -> bool:
        """Whether the run learned at the rate of the rule, and not beside it to see what that does."""
        return self.axes.get("lr_factor", 1) == 1

    @property
    def begin(self) -> str | None:
        """What became of the dense twin that the run began with; None from scratch."""
        return self.axes.get("begin")


def shape(axes: Mapping[str, Any]) -> str:
    """What kind of model a place of a study has, in a few words."""
    if axes["experts"] == 1:
        return "dense"
    return f"{axes['experts']} experts top-{axes['top_k']}" + (f" granularity {axes['granularity']}" if axes["granularity"] > 1 else "")


def identity(recipe: Recipe) -> str:
    """A run's name: a hash of all in which its recipe differs from the defaults, but for where it lives.

    Settings that moe learns later leave it as it is, and so do options of its router and sources. How long a trunk is, is none of its
    identity. Of what a run begins with only the folder's own name counts, which is a hash of what that was made of.
    """
    tree = recipe.model_dump(mode="json", exclude_defaults=True)
    tree.pop("run", None)
    if router := ((tree.get("model") or {}).get("moe") or {}).get("router"):
        tree["model"]["moe"]["router"] = brief(router, Moe.model_fields["router"])
    if sources := tree.get("data", {}).get("sources"):
        tree["data"]["sources"] = [brief(source, Data.model_fields["sources"]) for source in sources]
    if recipe.origin is not None:
        tree["init"] = {"from": recipe.origin.name}
    if recipe.schedule.name == "constant":
        tree.get("train", {}).pop("steps", None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def brief(choice: Mapping[str, Any], field: Any) -> dict[str, Any]:
    """A choice with those of its options alone that are not the defaults; `field` is that of the form, or an annotation."""
    entries = _entries(field)
    assert entries is not None
    kept = {"name": choice["name"]}
    for name, (annotation, default) in entries.options(choice["name"]).items():
        value, inner = choice[name], _entries(annotation)
        if inner is not None:  # a router that wraps another
            value = brief(inner.resolve(value), annotation)
            default = default if default is Parameter.empty else brief(inner.resolve(default), annotation)
        if default is Parameter.empty or json.loads(json.dumps(value)) != json.loads(json.dumps(default)):
            kept[name] = value
    return kept


def _entries(annotation: Any) -> Entries | None:
    parts = (*getattr(annotation, "metadata", ()), *get_args(getattr(annotation, "annotation", annotation)))
    return next((found for part in parts if (found := part if isinstance(part, Entries) else _entries(part)) is not None), None)


def append(folder: Path, row: Row) -> None:
    """Add a row, on disk when this returns; several processes may."""
    with (folder / RESULTS).open("a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.seek(0)
        if (whole := file.read().rfind(b"\n") + 1) < file.tell():
            file.truncate(whole)  # what a kill cut short was never a row
        file.write(json.dumps(row._asdict()).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def every(folder: Path) -> list[Row]:
    """Every row that was ever appended, in order."""
    path = folder / RESULTS
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            raise DataError(f"{path}:{number} is no row of a study, {line[:30]!r}; remove that line") from None
    return rows


def latest(folder: Path) -> dict[str, Row]:
    """The last row of each run, by its id, in the order in which runs first ended; of one that was done once, the last done."""
    return newest(every(folder))


def newest(rows: Sequence[Row]) -> dict[str, Row]:
    """As `latest`, of rows that were read before."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.status == "done" or row.id not in found or found[row.id].status != "done":
            found[row.id] = row
    return found


def read(folder: str | Path) -> list[Row]:
    """Every run's last row, whatever its status; DataError where rows do not belong together, or a run was edited."""
    folder = Path(folder)
    if not (folder / RESULTS).exists():
        raise DataError(f"{folder} holds no results of a study ({RESULTS} is missing); run moe study run first")
    rows = list(latest(folder).values())
    for what in ("corpus", "tokenizer"):
        first = {getattr(row, what): row.id for row in reversed(rows)}
        if len(first) > 1:
            (a, of_a), (b, of_b), *_ = sorted(first.items())
            kind = {"corpus": "corpora", "tokenizer": "tokenizers"}[what]
            raise DataError(
                f"{folder} mixes {kind}: run {of_a} has {a[:16]} and run {of_b} has {b[:16]}, whose losses cannot be compared; "
                f"keep the rows of one in a folder of their own"
            )
    for row in rows:
        check_unedited(folder / RUNS / row.id)
    return rows


def check_unedited(folder: Path) -> None:
    """Raise DataError if a run's recipe is not what its name says."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    try:
        now = identity(load([path]))
    except ConfigError as error:
        now = str(error).splitlines()[0]
    if now != folder.name:
        raise DataError(f"{path} was edited since the study wrote it (it is now {now}); remove {folder} and run it again")


def points(rows: Sequence[Row]) -> tuple[Points, Column]:
    """Columns as the laws name them, and losses, of the runs that are done at the rule's learning rate."""
    done = [row for row in rows if row.status == "done" and row.tuned]
    return columns([row._asdict() for row in done]), np.array([row.loss for row in done], float)


def columns(facts: Sequence[Mapping[str, Any]]) -> Points:
    """Columns as the laws name them, of runs that may not have begun. A law counts experts for each one that a token meets."""
    names = ("total", "active", "base", "average", "tokens", "granularity", "sparsity", "flops")
    found = {name: np.array([fact[name] for fact in facts], float) for name in names}
    return {**found, "experts": 1 / (1 - found["sparsity"])}
