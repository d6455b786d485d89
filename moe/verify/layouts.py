"""Which layouts to verify: what a person asks for, or what fits the recipe and the machine."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

from moe.engines import ENGINES
from moe.errors import ConfigError
from moe.parallel.layout import Copies
from moe.recipe import Recipe
from moe.tables import nearest
from moe.yaml_reader import read_text

SETTINGS = {
    "engine": "engine.name",
    "ranks": "parallel.ranks",
    "expert_ranks": "parallel.expert_ranks",
    "replicas": "parallel.replicas",
    "exchange": "parallel.exchange",
    "exchange_room": "parallel.exchange_room",
    "overlap": "parallel.overlap",
    "policy": "parallel.copies.policy",
    "copies": "parallel.copies.copies",
    "hidden": "parallel.copies.hidden",
    "chosen": "parallel.copies.chosen",
    "window": "parallel.copies.window",
    "rematerialise": "parallel.copies.rematerialise",
    "relay": "parallel.copies.relay",
    "owners": "parallel.copies.owners",
    "owners_every": "parallel.copies.owners_every",
    "tflops": "parallel.hardware.tflops",
    "machine_ranks": "parallel.machine_ranks",
    "accumulate": "train.accumulate",
    "balance_window": "train.balance_window",
    "zero": "engine.zero",
    "recompute": "engine.recompute",
    "compile": "engine.compile",
}
_EXTRAS = {"deepspeed": "deepspeed"}  # engine → the package that it needs
_NUMBERS = ("ranks", "expert_ranks", "replicas", "accumulate", "overlap", "copies", "hidden", "window", "owners_every", "machine_ranks")

Layout = dict[str, Any]  # short name of a setting → its value; always "engine" and "ranks"


def parse(text: str) -> Layout:
    """The layout that "engine=fsdp2,ranks=4,expert_ranks=2" describes; ddp on the fewest ranks where it does not say."""
    layout: Layout = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        if name not in SETTINGS:
            raise ConfigError(f"--layouts {text}: {name!r} is not part of a layout; {nearest(name, SETTINGS)}")
        if not equals or not value or name in layout:
            why = "is given twice" if name in layout else "has no value"
            raise ConfigError(f"--layouts {text}: {name} {why}; write it once, as in engine=fsdp2,ranks=4,expert_ranks=2")
        layout[name] = read_text(value, f"--layouts {text}: {name}", lines=False)[0]
        if name in _NUMBERS and (type(layout[name]) is not int or layout[name] < 1):
            raise ConfigError(f"--layouts {text}: {name}={value} is not a number above 0; write a whole number, as in {name}=2")
    fewest = layout.get("expert_ranks", 1) * layout.get("replicas", 1)
    return {"engine": "ddp", "ranks": max(2, fewest)} | layout


def describe(layout: Layout) -> str:
    """The layout as it is typed."""
    return ",".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in layout.items())


def words(recipe: Recipe, layout: Layout) -> list[str]:
    """The layout as key=value words; what it leaves open about experts and windows is the recipe's, where that goes with it."""
    whole, parallel, found = recipe.model.moe, recipe.parallel, []
    if whole is not None and layout.get("accumulate", 1) > 1:
        found.append(f"train.balance_window={recipe.train.balance_window}")
    if layout.get("expert_ranks", 1) > 1 and parallel.expert_ranks > 1:
        if "exchange" not in layout and (parallel.exchange != "fixed" or layout.get("chosen", "ahead") == "ahead"):
            found.append(f"parallel.exchange={parallel.exchange}")
            found += [f"parallel.exchange_room={parallel.exchange_room}"] if parallel.exchange == "fixed" else []
        if parallel.overlap > 1 and "overlap" not in layout and not layout.get("rematerialise"):
            found.append(f"parallel.overlap={parallel.overlap}")
        if "policy" not in layout and parallel.copies.active and layout["engine"] != "deepspeed":  # which cannot
            idle = parallel.copies.model_copy(update={name: value for name, value in layout.items() if name in Copies.model_fields}).idle()
            idle |= {"rematerialise": "with chunks"} if layout.get("overlap", 1) > 1 else {}
            found += [f"parallel.copies={json.dumps({k: v for k, v in parallel.copies.model_dump().items() if k not in idle})}"]
            found += [f"parallel.hardware={parallel.hardware.model_dump_json()}"]
    return found + [f"{SETTINGS[name]}={json.dumps(value)}" for name, value in layout.items()]


def check(recipe: Recipe, layout: Layout) -> None:
    """Raise ConfigError for a layout of which the recipe's own size allows no use, or that would change nothing."""
    experts = recipe.model.moe.experts if recipe.model.moe else 1
    share = layout.get("expert_ranks", 1)
    text = describe(layout)
    if layout["engine"] not in ENGINES:
        raise ConfigError(f"--layouts {text}: there is no engine {layout['engine']!r}; {nearest(str(layout['engine']), ENGINES)}")
    if why := missing(layout["engine"]):
        raise ConfigError(f"--layouts {text}: {why}")
    if experts % share:
        fitting = ", ".join(str(n) for n in range(1, min(experts, 64) + 1) if experts % n == 0)
        raise ConfigError(
            f"--layouts {text}: {experts} experts cannot be shared out over {share} ranks; choose expert_ranks from {fitting}"
            if recipe.model.moe
            else f"--layouts {text}: expert_ranks={share} has no effect in a dense model (model.moe=null); leave it out"
        )
    if layout == {"engine": "ddp", "ranks": 1}:
        raise ConfigError(f"--layouts {text}: that is the one process which layouts are compared with; give ranks of at least 2")


def missing(engine: str) -> str | None:
    """Why an engine cannot run here, in one sentence; None if it can."""
    package = _EXTRAS.get(engine)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"engine {engine} needs the package {package}, which is not installed; pip install 'moe[{package}]'"


def default(recipe: Recipe, most: int) -> tuple[list[Layout], list[tuple[str, str]]]:
    """The layouts of up to `most` ranks that fit a recipe, and those left out, each with the reason."""
    chosen, left_out = [], []
    for layout in _every_kind(recipe):
        why = _unfit(recipe, layout, most)
        if why is None:
            chosen.append(layout)
        else:
            left_out.append((describe(layout), why))
    return chosen, left_out


def _every_kind(recipe: Recipe) -> list[Layout]:
    accumulated = {"accumulate": 2} | ({"balance_window": "exact"} if recipe.model.moe else {})
    kinds = [
        {"engine": "ddp", "ranks": 2, **accumulated},
        {"engine": "ddp", "ranks": 4},
        {"engine": "fsdp2", "ranks": 2},
        {"engine": "fsdp2", "ranks": 4},
        {"engine": "fsdp2", "ranks": 4, "replicas": 2, **accumulated},
    ]
    if recipe.model.moe is not None:
        kinds += [
            {"engine": "ddp", "ranks": 2, "expert_ranks": 2},
            {"engine": "ddp", "ranks": 4, "expert_ranks": 4, **accumulated},
            {"engine": "fsdp2", "ranks": 2, "expert_ranks": 2, **accumulated},
            {"engine": "fsdp2", "ranks": 4, "expert_ranks": 4},
            {"engine": "fsdp2", "ranks": 4, "expert_ranks": 2, **accumulated},
            {"engine": "fsdp2", "ranks": 4, "replicas": 2, "expert_ranks": 2},
            {"engine": "ddp", "ranks": 2, "expert_ranks": 2, "overlap": 2},
            {"engine": "fsdp2", "ranks": 4, "expert_ranks": 2, "exchange": "tokens", "overlap": 3, **accumulated},
            {"engine": "fsdp2", "ranks": 4, "expert_ranks": 4, "policy": "hecate", "machine_ranks": 2},
            {"engine": "ddp", "ranks": 2, "expert_ranks": 2, "policy": "hecate", "hidden": 2, "chosen": "after", "rematerialise": True},
        ]
    kinds += [{"engine": "deepspeed", "ranks": 2, "zero": 1}, {"engine": "deepspeed", "ranks": 2, "zero": 3}]
    if recipe.model.moe is not None:
        kinds += [{"engine": "deepspeed", "ranks": 4, "expert_ranks": 2, "zero": 2}]
    if recipe.train.accumulate > 1 and recipe.train.balance_window == "running" and recipe.model.moe:
        kinds.append({"engine": recipe.engine.name, "ranks": 4, "accumulate": 2})
    return kinds


def _unfit(recipe: Recipe, layout: Layout, most: int) -> str | None:
    experts = recipe.model.moe.experts if recipe.model.moe else 1
    if layout["ranks"] > most:
        return f"more ranks than the {most} GPUs here"
    if experts % layout.get("expert_ranks", 1):
        return f"{experts} experts cannot be shared out over {layout['expert_ranks']} ranks"
    return missing(layout["engine"])


def rows(layouts: list[Layout], least: int) -> int:
    """Sequences of a global batch that every layout can share out."""
    parts = math.lcm(*(layout["ranks"] * layout.get("accumulate", 1) for layout in layouts))
    return -(-least // parts) * parts
