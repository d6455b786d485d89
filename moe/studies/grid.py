"""From a study to its runs: a pure function. Sizes and FLOPs are counted on built models, on the meta device."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from moe.errors import ConfigError
from moe.model.cost import Cost, cost
from moe.recipe import Recipe
from moe.routers import ROUTERS
from moe.scaling.results import RUNS, identity
from moe.studies.spec import Axes, Begin, Family, Scaling, Study
from moe.studies.warm_start import OTHER_ORDER, Origin, Twin, origin_of
from moe.tables import entry

_DENSE = "dense"
_WIDEST = 1 << 17  # d_model that is looked at
_FEWEST = 10  # steps after the warm-up, without which nothing is learned
_IDLE_IN_DENSE = (
    "optimizer.decay_router", "train.balance_window", "parallel.expert_ranks", "parallel.exchange", "parallel.exchange_room",
    "parallel.overlap", "log.stages",
)  # fmt: skip


class Cell(NamedTuple):
    """Where a run stands."""

    family: Family
    experts: int
    top_k: int
    granularity: int
    router: dict[str, Any] | None  # None for a dense model
    seed: int
    factor: float  # of the rule's learning rate
    begin: Begin | None
    tokens: float  # of the run itself, without those of its twin
    budget: float | None  # of the rule


class Trunk(NamedTuple):
    """The steps that runs of several lengths share, at constant rate."""

    id: str
    recipe: Recipe  # as long as the run that joins it needs
    start: int  # of that run's cool-down


class Run(NamedTuple):
    """One run of a study."""

    id: str
    recipe: Recipe
    axes: dict[str, Any]
    price: Cost
    base: int  # parameters of the dense twin
    trunk: Trunk | None
    origin: Origin | None = None

    @property
    def tokens(self) -> int:
        """Of the run itself, without those of the twin that it began with; so are `flops`."""
        return self.recipe.train.steps * tokens_a_step(self.recipe)

    @property
    def flops(self) -> float:
        return self.tokens * self.price.training_flops

    def facts(self) -> dict[str, Any]:
        """Columns of the run's row that are known before it runs."""
        axes, recipe, price = self.axes, self.recipe, self.price
        decay = recipe.schedule.name == "wsd"
        tokens, flops, met = self.tokens, self.flops, self.tokens * price.active
        if self.origin is not None:
            twin = self.origin.twin
            tokens, flops, met = tokens + twin.tokens, flops + twin.flops, met + twin.tokens * twin.active
        return {
            "id": self.id, "axes": axes, "total": price.parameters, "active": price.active, "base": self.base,
            "average": met / tokens, "experts": axes["experts"], "granularity": float(axes["granularity"]),
            "sparsity": 1 - axes["top_k"] / axes["experts"], "tokens": tokens, "flops": flops, "bytes": price.bytes,
            "trunk": self.trunk and self.trunk.id, "steps": recipe.train.steps,
            "cooldown_steps": recipe.train.steps - cooldown(recipe) if decay else 0,
        }  # fmt: skip


def grid(study: Study) -> list[Run]:
    """Every run of a study, once, in the order of its axes, dense twins before what begins with them.

    ConfigError if the study's rule cannot be met, or if a run cannot begin as it is to.
    """
    runs: dict[str, Run] = {}
    seen: dict[str, Cell] = {}
    for cell in cells(study):
        twin = None
        if cell.begin is not None:
            twin = _run(study, _dense(cell)._replace(factor=1.0, begin=None, tokens=cell.begin.dense, budget=None))
            runs.setdefault(twin.id, twin)
        made = _run(study, cell, twin)
        runs.setdefault(made.id, made)
        _differ(seen.setdefault(made.id, cell), cell, made)
    sharing: dict[str, set[int]] = {}
    for run in runs.values():
        if run.trunk is not None:
            sharing.setdefault(run.trunk.id, set()).add(run.trunk.start)
    # a trunk that only one run would leave saves nothing
    return [run if run.trunk and len(sharing[run.trunk.id]) > 1 else run._replace(trunk=None) for run in runs.values()]


def _differ(one: Cell, other: Cell, run: Run) -> None:
    """Raise ConfigError if two places of a study are one run, unless they only differ in what a dense model does not have."""
    names = [name for name in Cell._fields if getattr(one, name) != getattr(other, name)]
    if run.axes["experts"] == 1 and one.begin and other.begin and one.begin.dense == other.begin.dense:
        names = [name for name in names if name != "begin"]  # a dense model that goes on is made by no variant
    if names:
        said = "; ".join(f"{name} {getattr(one, name)} and {getattr(other, name)}" for name in names)
        raise ConfigError(f"two values of a study make one and the same run ({said}), at {_told(other)}; leave one of them out")


def cells(study: Study) -> Iterator[Cell]:
    """All combinations of the axes, and of each part of `also`, as the rule completes them."""
    for part in (study.axes, *study.also):
        yield from _part(study, _joined(study.axes, part))


def _joined(axes: Axes, part: Axes) -> dict[str, list[Any]]:
    defaults = {
        "experts": [1],
        "top_k": [1],
        "granularity": [1],
        "router": [{"name": "top_k", "normalize": "none"}],
        "begin": [None],
        "seed": [0],
        "lr": [1.0],
        "tokens": [0],
    }
    named = {name: getattr(axes, name) for name in type(axes).model_fields}
    named |= {name: values for name in type(part).model_fields if (values := getattr(part, name)) is not None}
    return {name: defaults[name] if values is None else values for name, values in named.items()}


def _part(study: Study, axes: dict[str, list[Any]]) -> Iterator[Cell]:
    rule = study.rule
    names = ("family", "experts", "top_k", "granularity", "router", "begin", "seed", "lr", "tokens")
    for family, experts, k, narrower, router, begin, seed, factor, tokens in product(*(axes[name] for name in names)):
        k = narrower if rule.name == "iso_active" else k
        if experts == 1:
            k, narrower, router = 1, 1, None
        elif k > experts:
            raise ConfigError(f"a study asks for {k} of {experts} experts a token; leave one of the two off its axis, or use `also`")
        if family.d_ff % narrower:
            raise ConfigError(
                f"experts {narrower} times narrower than d_ff={family.d_ff} have no whole width; choose a multiple of {narrower}"
            )
        cell = Cell(family, experts, k, narrower, router, seed, factor, begin, tokens, None)
        for budget in rule.values or [None]:
            yield _met(study, cell._replace(budget=budget))


def _met(study: Study, cell: Cell) -> Cell:
    """The cell with what the rule decides."""
    rule = study.rule
    if rule.name == "iso_flop":
        assert cell.budget is not None
        wanted = cell._replace(tokens=cell.budget / priced(study, cell).training_flops)
        _close(study, cell, wanted.tokens, steps_of(study, wanted)[0] * _batch(study, wanted) * study.recipe.data.sequence, "tokens")
        return wanted
    if rule.name == "iso_active":
        _close(study, cell, priced(study, _dense(cell)).active, priced(study, cell).active, "active parameters")
    if rule.name in ("iso_parameter", "iso_memory"):
        assert cell.budget is not None
        found = _of_size(study, cell, cell.budget)
        _close(study, cell, cell.budget, _size(study, found), "parameters" if rule.name == "iso_parameter" else "bytes")
        return found
    return cell


def _close(study: Study, cell: Cell, wanted: float, got: float, what: str) -> None:
    if abs(got / wanted - 1) > study.rule.tolerance:
        raise ConfigError(
            f"rule.name={study.rule.name} cannot be met: {_told(cell)} has {got:.4g} {what} where {wanted:.4g} are asked for, "
            f"{abs(got / wanted - 1):.1%} off; change the family, rule.values, or raise rule.tolerance={study.rule.tolerance}"
        )


def _told(cell: Cell) -> str:
    return f"{cell.experts} experts (top {cell.top_k}, granularity {cell.granularity}) at d_model={cell.family.d_model}"


def _size(study: Study, cell: Cell) -> float:
    price = priced(study, cell)
    if study.rule.name == "iso_parameter":
        return price.parameters
    model = _recipe(study, cell, steps=1, warmup=0, batch=1, lr=1.0).model
    head = model.head_dim or model.d_model // model.heads
    cached = 2 * model.layers * (model.kv_heads or model.heads) * head * model.context  # keys and values
    return price.bytes * (1 + cached / price.parameters)


def _of_size(study: Study, cell: Cell, budget: float) -> Cell:
    """The cell as wide as its budget allows: the widest whose layers keep their proportions, then d_ff to the last unit."""
    given, unit = cell.family, 2 * cell.family.heads

    def at(width: int) -> Cell:
        d_ff = max(cell.granularity, round(given.d_ff * width / given.d_model / cell.granularity) * cell.granularity)
        return cell._replace(family=given.model_copy(update={"d_model": width, "d_ff": d_ff}))

    low, high = unit, unit
    while _size(study, at(high)) <= budget and high < _WIDEST:
        low, high = high, 2 * high
    if high >= _WIDEST:
        return at(low)
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if _size(study, at(middle)) <= budget else (low, middle)
    found = at(low)
    more = found._replace(family=found.family.model_copy(update={"d_ff": found.family.d_ff + cell.granularity}))
    size = _size(study, found)
    added = max(0, round((budget - size) / (_size(study, more) - size))) * cell.granularity
    return found._replace(family=found.family.model_copy(update={"d_ff": found.family.d_ff + added}))


def _batch(study: Study, cell: Cell) -> int:
    scaling = study.scaling
    return max(1, round(scaling.batch * (_base(study, cell) / scaling.at) ** scaling.batch_power))


def _base(study: Study, cell: Cell) -> int:
    return priced(study, _dense(cell)).parameters


def _dense(cell: Cell) -> Cell:
    """The cell with its dense twin's model."""
    return cell._replace(experts=1, top_k=1, granularity=1, router=None)


def learning_rate(scaling: Scaling, base: float, experts: int, factor: float) -> float:
    """The rule's rate, to four digits, so that it can be read and typed."""
    return float(f"{factor * scaling.lr * (base / scaling.at) ** scaling.lr_power * experts**scaling.lr_experts:.4g}")


def steps_of(study: Study, cell: Cell) -> tuple[int, int]:
    """Steps of a run and of its warm-up."""
    each = _batch(study, cell) * study.recipe.data.sequence
    steps, warmup = round(cell.tokens / each), round(study.scaling.warmup / each)
    if steps < warmup + _FEWEST:
        raise ConfigError(
            f"{cell.tokens:,.0f} tokens are {steps} steps of {each:,} tokens, too few after {warmup} of warm-up for {_told(cell)}; "
            "give more tokens, or lower scaling.warmup or scaling.batch"
        )
    return steps, warmup


def _run(study: Study, cell: Cell, twin: Run | None = None) -> Run:
    steps, warmup = steps_of(study, cell)
    base, batch = _base(study, cell), _batch(study, cell)
    lr = learning_rate(study.scaling, base, cell.experts, cell.factor)
    recipe, origin = _recipe(study, cell, steps, warmup, batch, lr), None
    if cell.begin is not None and twin is not None:
        before = Twin(twin.id, twin.recipe, twin.tokens, twin.flops, twin.price.active)
        origin = origin_of(cell.begin, before, recipe)
        tree = _given(recipe)
        tree["init"] = {"from": f"{study.means.folder}/{RUNS}/{origin.id}"}
        recipe = _validated(tree | {"train": tree["train"] | {"seed": cell.seed + OTHER_ORDER}})
    name = identity(recipe)
    axes = {**cell.family.model_dump(), "experts": cell.experts, "top_k": cell.top_k, "granularity": cell.granularity,
            "router": _named(cell.router) if cell.router else _DENSE, "tokens": round(cell.tokens), "seed": cell.seed, "lr": lr,
            "lr_factor": cell.factor, "batch": batch, "budget": cell.budget}  # fmt: skip
    axes |= {} if origin is None else {"begin": origin.label, "dense": origin.twin.tokens}
    placed = _placed(study, recipe, name)
    return Run(name, placed, axes, priced(study, cell), base, _trunk(study, recipe), origin)


def _trunk(study: Study, recipe: Recipe) -> Trunk | None:
    if not study.means.trunks or recipe.schedule.name != "wsd":
        return None
    start, schedule = cooldown(recipe), {"name": "constant", "warmup": recipe.schedule.warmup}
    tree = _given(recipe)
    tree |= {"schedule": schedule, "train": tree["train"] | {"steps": start}}
    made = _validated(tree)
    name = identity(made)
    return Trunk(name, _placed(study, made, name), start)


def cooldown(recipe: Recipe) -> int:
    """The first step of a wsd run at a lower rate than the warm-up's last (see `moe.engines.schedule`)."""
    steps, schedule = recipe.train.steps, recipe.schedule
    return max(schedule.warmup, steps - round(schedule.decay * steps))


def tokens_a_step(recipe: Recipe) -> int:
    return recipe.train.batch * recipe.data.sequence


def _placed(study: Study, recipe: Recipe, name: str) -> Recipe:
    return _validated(_given(recipe) | {"run": {"folder": f"{study.means.folder}/{RUNS}/{name}"}})


def _model(study: Study, cell: Cell) -> dict[str, Any]:
    """What the study and its cell say of a recipe, but for what training takes."""
    tree, family = _given(study.recipe), cell.family.model_dump()
    model = tree.get("model", {}) | {name: family[name] for name in ("d_model", "layers", "heads")}
    moe = model.get("moe") or {}
    if cell.router is None:
        model |= {"moe": None, "d_ff": family["d_ff"]}
        for key in _IDLE_IN_DENSE:
            section, _, name = key.partition(".")
            tree.get(section, {}).pop(name, None)
        if tree.get("engine", {}).get("recompute") == "experts":
            del tree["engine"]["recompute"]
    else:
        model["moe"] = moe | {"experts": cell.experts, "d_expert": family["d_ff"] // cell.granularity, "router": _router(cell)}
        if moe.get("first_dense", 0) or moe.get("every", 1) > 1 or moe.get("dense_layers"):
            model["d_ff"] = family["d_ff"]
    return tree | {"model": model}


def _recipe(study: Study, cell: Cell, steps: int, warmup: int, batch: int, lr: float) -> Recipe:
    tree, scaling = _model(study, cell), study.scaling
    schedule: dict[str, Any] = {"name": scaling.schedule, "warmup": warmup, "final": scaling.final}
    if scaling.schedule == "wsd":
        schedule["decay"] = scaling.decay
    train = tree.get("train", {}) | {"steps": steps, "batch": batch, "seed": cell.seed}
    return _validated(tree | {"train": train, "optimizer": tree.get("optimizer", {}) | {"lr": lr}, "schedule": schedule})


def _named(router: dict[str, Any]) -> str:
    """A router with those of its settings that are not the defaults, as axes and figures name it."""
    usual = inspect.signature(entry(ROUTERS, router["name"], "router")).parameters
    set_here = (f"{name}={value}" for name, value in router.items() if name in usual and name != "k" and value != usual[name].default)
    return " ".join([router["name"], *set_here])


def _router(cell: Cell) -> dict[str, Any]:
    assert cell.router is not None
    takes_k = "k" in inspect.signature(entry(ROUTERS, cell.router["name"], "router")).parameters
    return cell.router | ({"k": cell.top_k} if takes_k else {})


def _given(settings: Any) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_unset=True)


def _validated(tree: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate_json(json.dumps(tree))
    except ValueError as error:
        first = getattr(error, "errors", lambda **_: [{"loc": (), "msg": str(error)}])(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        where = "" if key in first["msg"] else f"recipe.{key}: "
        raise ConfigError(f"a study asks for a run that cannot be: {where}{first['msg']}") from None


def priced(study: Study, cell: Cell) -> Cost:
    """What the cell's model costs."""
    tree = _model(study, cell)
    return _priced(json.dumps({name: tree[name] for name in ("model", "data") if name in tree}, sort_keys=True))


@cache
def _priced(text: str) -> Cost:
    from moe.data.tokenizer import open_tokenizer
    from moe.train.loop import build_model

    recipe = _validated(json.loads(text))
    return cost(build_model(recipe, open_tokenizer(recipe.data.tokenizer)), recipe.data.sequence)
