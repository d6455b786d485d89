"""What has to be run to verify a recipe: small recipes under layouts, each beside the one process that it must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe.errors import ConfigError
from moe.recipe import Recipe
from moe.tables import nearest
from moe.verify import layouts
from moe.verify.compare import DTYPES, Row
from moe.verify.layouts import Layout, describe
from moe.verify.shrink import ROWS, built, shrink
from moe.verify.trace import Trace

RULES = ("recipe", "sgd")  # the recipe's optimizer, and plain SGD without clipping
_MOST_ON_CPU = 4  # ranks of the layouts that are verified when none is asked for


@dataclass
class Case:
    """One small recipe to run, and what became of it."""

    words: list[str]
    world: int
    name: str
    ranks: int = 1  # those whose micro-batches one process takes together
    trace: Trace | None = None
    refusal: str = ""


@dataclass
class Check:
    """A layout in one dtype under one optimizer, beside the process that it is compared with."""

    layout: str
    dtype: str
    optimizer: str
    small: Recipe
    case: Case
    reference: Case
    rows: list[Row] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        return bool(self.rows) and all(row.passes for row in self.rows)


def plan(recipe: Recipe, wanted: list[Layout], dtypes: Sequence[str]) -> tuple[list[Check], list[tuple[str, str]], str]:
    """What to run for a recipe, what was left out and why, and the device."""
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ConfigError(f"--dtype {unknown[0]} is not a choice; {nearest(unknown[0], DTYPES)}")
    for layout in wanted:
        layouts.check(recipe, layout)
    gpus = torch.cuda.device_count() if recipe.parallel.device != "cpu" else 0
    needed = max((layout["ranks"] for layout in wanted), default=2)
    device, most = ("cuda", gpus) if gpus >= needed else ("cpu", _MOST_ON_CPU)
    left_out: list[tuple[str, str]] = []
    chosen = wanted
    if not wanted:
        chosen, left_out = layouts.default(recipe, min(most, _MOST_ON_CPU))
    number = layouts.rows(chosen, ROWS)
    share = math.lcm(*(layout.get("expert_ranks", 1) for layout in chosen))
    checks, references = [], {}
    for layout in chosen:
        refused = {}
        for dtype in dtypes or dict.fromkeys(("float64", recipe.train.dtype)):
            try:
                checks += [_check(recipe, layout, dtype, rule, device, number, share, references) for rule in RULES]
            except ConfigError as error:
                refused[dtype] = str(error)
        if wanted and refused and not any(check.layout == describe(layout) for check in checks):
            raise ConfigError("\n".join(f"--layouts {describe(layout)}: {line}" for line in next(iter(refused.values())).splitlines()))
        left_out += [(f"{describe(layout)} in {dtype}", why) for dtype, why in refused.items()]
    if not checks:
        raise ConfigError(f"no layout fits this recipe: {'; '.join(f'{text}: {why}' for text, why in left_out)}")
    return checks, left_out, device


def _check(recipe: Recipe, layout: Layout, dtype: str, rule: str, device: str, rows: int, share: int, references: dict[Any, Case]) -> Check:
    base = [*shrink(recipe, dtype=dtype, rule=rule, rows=rows, expert_ranks=share), f"parallel.device={device}"]
    words = [*base, *layouts.words(recipe, layout)]
    small, optimizer = built(words), "plain sgd" if rule == "sgd" else recipe.optimizer.name
    accumulate, ranks = _like(small, layout["ranks"])
    key = dtype, rule, accumulate, ranks
    if key not in references:
        plain = [*base, "engine={}", f"train.accumulate={accumulate}"]
        plain += ["model.moe.backend=reference"] if recipe.model.moe else []
        plain += ["train.balance_window=running"] if accumulate > 1 and recipe.model.moe else []
        references[key] = Case(plain, 1, f"{dtype}, {optimizer}, one process", ranks)
    case = Case(words, layout["ranks"], f"{dtype}, {optimizer}, {describe(layout)}")
    return Check(describe(layout), dtype, optimizer, small, case, references[key])


def _like(small: Recipe, world: int) -> tuple[int, int]:
    """Micro-batches of the process to compare with, and the ranks whose micro-batches it takes together.

    Whole batches at once, unless a loss is by definition of less: of what a rank holds, or of a window so far.
    """
    accumulate = small.train.accumulate
    if small.model.moe is not None and _scope(small.model.moe.router) == "micro":
        return world * accumulate, 1
    return (accumulate, world) if accumulate > 1 and small.train.balance_window == "running" else (1, 1)


def _scope(router: dict[str, Any]) -> str | None:
    wrapped = router.get("router")
    return router.get("balance_scope") or (_scope(wrapped) if isinstance(wrapped, dict) else None)
