"""Every law that a study's runs can carry, fitted, tried on the largest of them, and written to fit.json."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import moe
from moe.errors import DataError
from moe.scaling import LAWS
from moe.scaling.fit import Fit, bootstrap, check, cross_check, fit
from moe.scaling.laws import Column, Law, Points
from moe.scaling.results import Row, points, read
from moe.tables import entry

FIT = "fit.json"
_HELD = 6  # about the sixth of the runs with the most FLOPs is held out
_FEWEST = 3  # runs held out
_ALIKE = 1.1  # laws whose held-out errors differ by less are told apart by Akaike's criterion
_DIGITS = 9


def _silent(*words: str) -> None:
    """Say nothing."""


class Noise(NamedTuple):
    """What seeds alone do to the loss."""

    relative: float  # standard deviation of log loss between runs that differ in their seed
    cells: int  # groups of such runs
    runs: int

    @property
    def known(self) -> bool:
        return self.runs > self.cells > 0 and self.relative > 0

    @property
    def freedom(self) -> int:
        return self.runs - self.cells


class Held(NamedTuple):
    """A law fitted to all runs but the largest, tried on those."""

    error: float  # root mean square, relative
    worst: float
    values: dict[str, float]
    draws: list[dict[str, float]]


class Judged(NamedTuple):
    """A law, its values, and how far they can be trusted."""

    law: Law
    values: dict[str, float]
    draws: list[dict[str, float]]  # values as they might have come out as well
    held: Held | None
    spread: float  # standard deviation of the relative residuals
    aicc: float
    condition: float
    at_bounds: list[str]
    apart: float  # largest relative difference, over the runs, to what the papers' own procedure finds

    def loss(self, x: Points) -> Column:
        return self.law.loss(self.values, x)

    def interval(self, x: Points) -> tuple[Column, Column]:
        """Between which losses one more run lies 19 times of 20: the draws' spread, and a run's own."""
        return between(self.law, self.draws, x, self.loss(x), self.spread)

    def of_value(self, name: str) -> tuple[float, float]:
        low, high = np.quantile([draw[name] for draw in self.draws], [0.025, 0.975])
        return float(low), float(high)


class Fits(NamedTuple):
    """What fit.json holds."""

    every: list[Row]  # whatever their status
    rows: list[Row]  # fitted ones
    x: Points
    loss: Column
    held: NDArray[np.bool_]  # which of them are the largest
    noise: Noise
    judged: dict[str, Judged]
    refused: dict[str, str]  # laws that the runs cannot carry, and why
    best: str | None
    facts: dict[str, Any]

    @property
    def beside(self) -> list[Row]:
        """Runs of other routers than the one that was fitted."""
        fitted = {row.id for row in self.rows}
        return [row for row in self.every if ordinary(row) and row.id not in fitted]


def ordinary(row: Row) -> bool:
    """Whether a run ended well, at the rate of the rule, from scratch: laws speak of no others."""
    return row.status == "done" and row.tuned and row.begin is None


def columns(rows: Sequence[Row]) -> tuple[list[Row], Points, Column]:
    """The runs that are fitted, and their columns: of several routers the one with the most runs, and dense models."""
    fitted = [row for row in rows if ordinary(row)]
    if wrong := [row for row in fitted if row.loss is None or not 0 < row.loss < np.inf]:
        raise DataError(f"run {wrong[0].id} is said to be done with a loss of {wrong[0].loss}; remove its line from results.jsonl")
    routers = [row.axes.get("router") for row in fitted if row.experts > 1]
    if routers:
        most = max(sorted(set(routers), key=str), key=routers.count)
        fitted = [row for row in fitted if row.experts == 1 or row.axes.get("router") == most]
    return fitted, *points(fitted)


def noise_of(rows: Sequence[Row]) -> Noise:
    """How far apart runs end that differ in their seed alone."""
    several = [np.log(list(cell.values())) for cell in seeds_of(rows).values() if len(cell) > 1]
    runs = sum(len(cell) for cell in several)
    squares = sum(float(np.square(cell - cell.mean()).sum()) for cell in several)
    return Noise(float(np.sqrt(squares / max(runs - len(several), 1))), len(several), runs)


def seeds_of(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Losses by seed of runs that share all else, one of each seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        assert row.loss is not None
        found.setdefault(cell_of(row), {})[row.axes.get("seed", 0)] = row.loss
    return found


def cell_of(row: Row) -> str:
    """What runs share that differ in their seed alone."""
    return json.dumps({name: value for name, value in row.axes.items() if name != "seed"} | {"of": row.tokens}, sort_keys=True)


def largest(x: Points) -> NDArray[np.bool_]:
    """The runs of the most FLOPs: a sixth of all, and those of as many FLOPs as the least of these."""
    count = max(_FEWEST, round(len(x["flops"]) / _HELD))
    return x["flops"] >= 0.99 * np.sort(x["flops"])[-min(count, len(x["flops"]))]


def why_not(law: Law, x: Points, loss: Column) -> str | None:
    """In a sentence, why these runs cannot carry a law; None if they can."""
    try:
        check(law, x, loss)
    except DataError as error:
        return str(error)
    if "tokens" not in law.columns and (levels := len(np.unique(x["tokens"]))) > 1:
        return f"the law {law.name} knows nothing of tokens, and these runs have {levels} numbers of them; it suits runs of one length"
    if law.name == "journey" and np.allclose(x["average"], x["active"]):
        return "the law journey is the law chinchilla here, as no run changes its size on the way"
    return None


def sees(law: Law, x: Points) -> bool:
    """Whether a law tells apart what these runs differ in: in experts, and in how fine they are."""
    several = differ(x)
    of_experts = {"experts", "sparsity", "total"} & set(law.columns)
    return bool(of_experts or "experts" not in several) and ("granularity" in law.columns or "granularity" not in several)


def differ(x: Points) -> list[str]:
    """In which divisions of a layer these runs differ; a dense one is neither coarse nor fine."""
    fine = x["granularity"][x["experts"] > 1]
    return [name for name, column in (("experts", x["experts"]), ("granularity", fine)) if len(np.unique(column)) > 1]


def together(rows: Sequence[Row]) -> NDArray[np.int64] | None:
    """A number a run, the same for runs off one trunk, which share most of their steps; None if none do."""
    names = [row.trunk or row.id for row in rows]
    found = list(dict.fromkeys(names))
    return None if len(found) == len(names) else np.array([found.index(name) for name in names])


def judge(
    law: Law,
    x: Points,
    loss: Column,
    held: NDArray[np.bool_],
    *,
    groups: NDArray[np.int64] | None = None,
    draws: int = 200,
    seed: int = 0,
    say: Callable[[str], None] = _silent,
) -> Judged:
    """Fit a law to all runs, and to all but the largest; draw each again and again."""
    say("fit")
    found = fit(law, x, loss, seed=seed)
    say(f"{draws} bootstraps")
    again = bootstrap(found, x, loss, draws=draws, seed=seed, groups=groups)
    say("the papers' procedure")
    theirs = law.loss(cross_check(law, x, loss, starts=8, seed=seed, also=found.values), x)
    say("all but the largest")
    without = _held_out(law, x, loss, held, None if groups is None else groups[~held], draws // 2, seed)
    apart = float(np.abs(theirs / found.loss(x) - 1).max())
    return Judged(
        law, found.values, [one.values for one in again], without, found.spread, found.aicc, found.condition, found.at_bounds, apart
    )


def _held_out(
    law: Law, x: Points, loss: Column, held: NDArray[np.bool_], groups: NDArray[np.int64] | None, draws: int, seed: int
) -> Held | None:
    rest = {name: column[~held] for name, column in x.items()}
    if why_not(law, rest, loss[~held]):
        return None
    found = fit(law, rest, loss[~held], seed=seed)
    again: list[Fit] = bootstrap(found, rest, loss[~held], draws=draws, seed=seed, groups=groups)
    errors = found.loss({name: column[held] for name, column in x.items()}) / loss[held] - 1
    return Held(float(np.sqrt(np.mean(errors**2))), float(np.abs(errors).max()), found.values, [one.values for one in again])


def between(law: Law, draws: Sequence[Mapping[str, float]], x: Points, middle: Column, spread: float) -> tuple[Column, Column]:
    """The interval of 95 % of one more run around `middle`."""
    losses = np.stack([law.loss(values, x) for values in draws])
    low, high = np.quantile(losses, [0.025, 0.975], axis=0)
    own = 1.96 * spread * middle
    return middle - np.hypot(np.maximum(middle - low, 0), own), middle + np.hypot(np.maximum(high - middle, 0), own)


def compare(rows: Sequence[Row], *, draws: int = 200, seed: int = 0, say: Callable[[str, str], None] = _silent) -> Fits:
    """Fit every law that these runs carry."""
    start = time.perf_counter()
    fitted, x, loss = columns(rows)
    if not fitted:
        raise DataError(f"none of the study's {len(rows)} runs is done at the rule's learning rate, so there is nothing to fit; run more")
    held = largest(x)
    judged, refused = {}, {}
    for name in LAWS:
        law = entry(LAWS, name, "law")
        if reason := why_not(law, x, loss):
            refused[name] = reason
            continue
        said = partial(say, name)
        judged[name] = judge(law, x, loss, held, groups=together(fitted), draws=draws, seed=seed, say=said)
    facts = {"digest": digest(rows), "seconds": round(time.perf_counter() - start, 1), "draws": draws, "seed": seed, "moe": moe.__version__}
    return Fits(list(rows), fitted, x, loss, held, noise_of(fitted), judged, refused, preferred(judged, x), facts)


def preferred(judged: Mapping[str, Judged], x: Points) -> str | None:
    """The law of the least held-out error; of those that are as good, the one of the least AICc.

    A law that does not tell apart what the runs differ in is taken only where no other could be fitted.
    """
    return min(as_good(judged, x), key=lambda name: judged[name].aicc, default=None)


def as_good(judged: Mapping[str, Judged], x: Points) -> list[str]:
    """The laws whose held-out error is about the least, of those that tell the runs apart if any does."""
    able = [name for name, one in judged.items() if sees(one.law, x)] or list(judged)
    errors = {name: one.held.error if (one := judged[name]).held else np.inf for name in able}
    return [name for name in able if errors[name] <= _ALIKE * min(errors.values())]


def digest(rows: Sequence[Row]) -> str:
    """Of the runs a fit was made of, and of how it was made: rows or corrections that came later make another."""
    made = [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in ("laws.py", "fit.py", "model_selection.py")]
    text = json.dumps([made, sorted((row.id, row.status, row.loss) for row in rows)], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(folder: Path, fits: Fits) -> Path:
    """Write fit.json."""
    data = {
        "facts": fits.facts,
        "runs": len(fits.rows),
        "held_out": [row.id for row, largest in zip(fits.rows, fits.held, strict=True) if largest],
        "noise": fits.noise._asdict(),
        "best": fits.best,
        "refused": fits.refused,
        "laws": {name: _of_judged(one) for name, one in fits.judged.items()},
    }
    path = folder / FIT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(data), indent=1) + "\n")
    os.replace(temporary, path)
    return path


def _of_judged(one: Judged) -> dict[str, Any]:
    shown = one._asdict() | {"law": one.law.source, "intervals": {name: one.of_value(name) for name in one.values}}
    shown["draws"] = [list(draw.values()) for draw in one.draws]
    if one.held is not None:
        shown["held"] = one.held._asdict() | {"draws": [list(draw.values()) for draw in one.held.draws]}
    return shown


def _rounded(tree: Any) -> Any:
    if isinstance(tree, float):
        return float(f"{tree:.{_DIGITS}g}") if np.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {name: _rounded(part) for name, part in tree.items()}
    return [_rounded(part) for part in tree] if isinstance(tree, list | tuple) else tree


def load(folder: Path, rows: Sequence[Row]) -> Fits | None:
    """What fit.json says; None if there is none, or if it was made of other rows or by another version."""
    path = folder / FIT
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        if data["facts"]["digest"] != digest(rows) or data["facts"]["moe"] != moe.__version__:
            return None
        judged = {name: _judged(name, one) for name, one in data["laws"].items()}
        fitted, x, loss = columns(rows)
        noise = Noise(**data["noise"])
        return Fits(list(rows), fitted, x, loss, largest(x), noise, judged, data["refused"], data["best"], data["facts"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no fit of a study; remove it and run moe study fit again") from None


def _judged(name: str, data: dict[str, Any]) -> Judged:
    law = entry(LAWS, name, "law")

    def draws(lists: list[list[float]]) -> list[dict[str, float]]:
        return [dict(zip(data["values"], values, strict=True)) for values in lists]

    held = data["held"] and Held(**data["held"] | {"draws": draws(data["held"]["draws"])})
    condition, aicc = (np.inf if data[key] is None else data[key] for key in ("condition", "aicc"))
    return Judged(law, data["values"], draws(data["draws"]), held, data["spread"], aicc, condition, data["at_bounds"], data["apart"])


def fits_of(folder: Path, *, draws: int = 200, say: Callable[[str, str], None] = _silent, again: bool = False) -> Fits:
    """A study's fits: those of fit.json if they are of its rows, new ones otherwise."""
    rows = read(folder)
    found = None if again else load(folder, rows)
    if found is None:
        found = compare(rows, draws=draws, say=say)
        save(folder, found)
    return found
