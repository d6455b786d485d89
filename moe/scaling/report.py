"""The page of a study: the verdict, what it rests on, and everything that makes it again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe.errors import ConfigError
from moe.pages.figure import Figure
from moe.pages.page import Page, Section, Table
from moe.scaling import tables, upcycling_report
from moe.scaling.figures import figures
from moe.scaling.model_selection import FIT, Fits, fits_of, together
from moe.scaling.moe_vs_dense import helps
from moe.scaling.published_laws import compute, quantity, weight
from moe.scaling.report_files import again, write
from moe.scaling.results import Row, read
from moe.scaling.speeds import read as read_speeds
from moe.scaling.verdict import Verdict, conclude, extrapolation

_WIDE = 140  # columns, where no terminal says
_WEIGHT_BYTES = 2.0  # that the verb takes where nothing is said
_FURTHER = (3.0, 10.0)  # times the FLOPs that were asked for: what the law says next


class Budgets(NamedTuple):
    """What a page is asked for."""

    flops: float | None
    memory: float | None
    weight_bytes: float


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def fit(folder: Path, *, draws: int) -> None:
    """Fit every law that a study's runs carry, write fit.json and print what was found."""
    console = _console()
    fits = fitted(folder, console, draws=draws, again=True)
    tables.show(fits, console)
    console.print(f"written to {folder / FIT} in {fits.facts['seconds']:.0f} s")


def fitted(folder: Path, console: Console, *, draws: int, again: bool = False) -> Fits:
    """The fits, with a line that says what is under way."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        return fits_of(folder, draws=draws, again=again, say=lambda law, what: bar.update(task, description=f"{law}: {what}"))


def report(folder: Path, flops: str | None, memory: str | None, *, weight_bytes: float, draws: int) -> None:
    """Write report.html, report.md and the figures into a study's folder, and print the verdict."""
    console = _console()
    asked = Budgets(quantity(flops, "--flops") if flops else None, quantity(memory, "--memory", "B") if memory else None, weight_bytes)
    rows = read(folder)
    if any(row.begin is not None for row in rows):
        if flops or memory:
            raise ConfigError("--flops and --memory decide nothing on the page of a study whose runs begin with others; leave them out")
        write(upcycling_report.page_of(folder.resolve().name, rows, read_speeds(folder)), folder, console)
        return
    fits = fitted(folder, console, draws=draws)
    verdict = conclude(fits, asked.flops, asked.memory, weight_bytes=weight_bytes)
    drawn = figures(rows, fits, verdict)
    page = page_of(folder.resolve().name, rows, fits, verdict, drawn, asked)
    write(page, folder, console)


def page_of(name: str, rows: Sequence[Row], fits: Fits, verdict: Verdict, drawn: Sequence[Figure], asked: Budgets) -> Page:
    """The page as data."""
    done = sum(row.status == "done" for row in rows)
    last = max((row for row in rows if row.status == "done"), key=lambda row: row.flops)
    subtitle = f"{done} runs done of {len(rows)}, up to {compute(last.flops)} FLOPs, {fits.x['active'].max():,.0f} active parameters "
    subtitle += f"and {fits.x['tokens'].max():,.0f} tokens · tokenizer {last.tokenizer} · losses in nats a token, held out"
    groups = {"why": [], "fit": [], "health": []}
    for figure in drawn:
        where = (
            "fit"
            if figure.name in ("measured", "held_out", "residuals")
            else "health"
            if figure.name.startswith(("health", "step"))
            else "why"
        )
        groups[where].append(figure)
    sections = [
        Section("What was found", figures=groups["why"], tables=_budgets(fits, verdict, asked)),
        Section("How well the law holds", _trust(fits), _fits(fits), groups["fit"]),
        Section("Routing and speed", figures=groups["health"]),
        Section("Runs", tables=[*tables.lost(rows), tables.runs(rows)]),
        _again(name, rows, fits, asked),
    ]
    return Page(f"How many experts? {name}", subtitle, _answer(verdict, fits), bool(verdict.refused), sections)


def _answer(verdict: Verdict, fits: Fits) -> list[str]:
    if not verdict.refused:
        return [*verdict.sentences, *helps(fits)]
    return [f"{verdict.question} these runs carry no verdict: {_joined(verdict.refused)}.", *helps(fits)]


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)


def _budgets(fits: Fits, verdict: Verdict, asked: Budgets) -> list[Table]:
    """Each choice at the budget, and the answer at larger ones."""
    if not verdict.answers:
        return []
    flops = asked.flops or float(fits.x["flops"].max())
    rows = []
    for times in (1.0, *_FURTHER):
        found = verdict if times == 1 else conclude(fits, flops * times, asked.memory, weight_bytes=asked.weight_bytes)
        said = found.sentences[0].partition(": ")[2] if found.sentences else f"no verdict: {_joined(found.refused)}"
        said += f" {extrapolation(found)}" if found.sentences else ""
        rows.append([compute(flops * times), said])
    limit = f", at most {weight(asked.memory)} of weights" if asked.memory else ""
    return [tables.answers(verdict, asked.weight_bytes), Table(f"At larger budgets{limit}", ["FLOPs", "verdict"], rows)]


def _trust(fits: Fits) -> list[str]:
    lines = [f"The laws were fitted to {len(fits.rows)} runs, and again to all but the {int(fits.held.sum())} of the most FLOPs."]
    if together(fits.rows) is not None:
        lines.append(
            "Runs off one trunk share most of their steps: draws keep what they miss by together, and shorter runs off the trunks of"
        )
        lines[-1] += " those held out were among the fitted ones."
    lines.append(f"{tables.noise(fits).capitalize()}.")
    return lines + [f"{name} was not fitted: {why}." for name, why in fits.refused.items()]


def _fits(fits: Fits) -> list[Table]:
    return [tables.laws(fits), tables.values(fits.judged[fits.best])] if fits.best else []


def _again(name: str, rows: Sequence[Row], fits: Fits, asked: Budgets) -> Section:
    options = f" --flops {asked.flops!r}" if asked.flops else ""
    options += f" --memory {asked.memory!r}" if asked.memory else ""
    options += f" --weight-bytes {asked.weight_bytes!r}" if asked.weight_bytes != _WEIGHT_BYTES else ""
    facts, folder = fits.facts, shlex.quote(name)
    made = f"seed {facts['seed']}, {facts['draws']} bootstraps, {facts['seconds']} s, moe {facts['moe']}"
    verbs = [f"moe study fit {folder} --draws {facts['draws']}", f"moe study report {folder}{options}"]
    return again(name, rows, verbs, [["fit", made]])
