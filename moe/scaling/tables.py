"""The tables of a study's fits and verdict, as a page and a terminal show them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Lines

from moe.pages.page import Table, text
from moe.scaling.model_selection import Fits, Judged
from moe.scaling.published_laws import short, weight
from moe.scaling.results import Row
from moe.scaling.verdict import Verdict

_POOR = 1e4  # condition number beyond which some values mean little


def laws(fits: Fits) -> Table:
    """The laws beside each other, the preferred one first."""
    ranked = sorted(fits.judged.values(), key=lambda one: (one.law.name != fits.best, one.held.error if one.held else 9.0))
    head = ["law", "free values", "held-out error", "worst", "AICc", "spread", "condition", "at bounds", "papers' fit apart"]
    return Table("Laws fitted", head, [_law(one) for one in ranked])


def _law(one: Judged) -> list[str]:
    held = (f"{one.held.error:.2%}", f"{one.held.worst:.2%}") if one.held else ("none held out", "")
    poor = f"{one.condition:.1e}" + (" (poor)" if one.condition > _POOR else "")
    return [
        one.law.name,
        str(len(one.values)),
        *held,
        f"{one.aicc:.0f}",
        f"{one.spread:.2%}",
        poor,
        ", ".join(one.at_bounds),
        f"{one.apart:.2%}",
    ]


def values(one: Judged) -> Table:
    """The values of a law, with what the bootstrap says of each."""
    rows = []
    for name, value in one.values.items():
        low, high = one.of_value(name)
        rows.append([name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", "at its bound" if name in one.at_bounds else ""])
    return Table(f"Values of the law {one.law.name}", ["value", "", "95 % of draws", ""], rows)


def answers(verdict: Verdict, weight_bytes: float) -> Table:
    """The best sizes of each choice at the budget."""
    rows = []
    for one in verdict.answers:
        sizes = short(one.active), short(one.total), weight(one.total * weight_bytes), short(one.tokens)
        share = f"{verdict.won[one.choice]:.0%}" if one.choice in verdict.won else ""
        rows.append([str(one.choice), *sizes, f"{one.loss:.4f}", share, one.limit or ""])
    head = ["choice", "N_active", "N_total", f"weights, {weight_bytes:g} bytes each", "tokens", "loss", "best in draws", "limit"]
    return Table(verdict.question, head, rows)


def runs(rows: Sequence[Row]) -> Table:
    """Every run that is done."""
    several = len({row.axes.get("router") for row in rows if row.experts > 1}) > 1
    head = ["run", "model", "width", "N_active", "N_total", "tokens", "FLOPs", "seed", "rate", "loss", "bits/byte", "ms/step"]
    lines = []
    for row in sorted((row for row in rows if row.status == "done"), key=lambda row: row.flops):
        choice = "dense" if row.experts == 1 else f"{row.experts} experts, top-{round(row.experts * (1 - row.sparsity))}"
        choice += f", G={row.granularity:g}" if row.granularity != 1 else ""
        choice += f", {row.begin}" if row.begin else ""
        choice += f", {row.axes.get('router')}" if several and row.experts > 1 else ""
        axes, made = row.axes, [short(row.active), short(row.total), short(row.tokens), f"{row.flops:.3g}"]
        found = [f"{row.loss:.4f}", f"{row.bits_per_byte:.4f}" if row.bits_per_byte else "", f"{row.step_ms:.4g}" if row.step_ms else ""]
        lines.append(
            [row.id[:8], choice, str(axes.get("d_model", "")), *made, str(axes.get("seed", "")), f"{axes.get('lr', 0):.3g}", *found]
        )
    return Table(f"All {len(lines)} runs that are done", head, lines, fold=True)


def lost(rows: Sequence[Row]) -> list[Table]:
    """Runs that did not end well, if there are any."""
    bad = [row for row in rows if row.status != "done"]
    lines = [[row.id[:8], row.status, f"{row.experts} experts, width {row.axes.get('d_model', '?')}", row.why or ""] for row in bad]
    return [Table("Runs that did not end well", ["run", "status", "where", "why"], lines)] if lines else []


def show(fits: Fits, console: Console) -> None:
    """Print what the fits found."""
    console.print(_lines(laws(fits)))
    for name, why in fits.refused.items():
        console.print(f"{name}: not fitted: {why}", soft_wrap=True, markup=False)
    if fits.best:
        console.print(_lines(values(fits.judged[fits.best])))
    console.print(noise(fits), soft_wrap=True)
    console.print(f"preferred: {fits.best}" if fits.best else "no law can be fitted to these runs")


def noise(fits: Fits) -> str:
    """The noise floor, or that there is none."""
    if not fits.noise.known:
        return "noise: not known, as no two runs differ in their seed alone; add seeds"
    relative, cells, runs = fits.noise
    return f"noise: {relative:.2%} of the loss between seeds, from {runs} runs of {cells} place{'s' * (cells > 1)}"


def _lines(table: Table) -> Lines:
    lines = Lines(*table.head, title=table.title, title_justify="left", box=None, header_style="bold")
    for row in table.rows:
        lines.add_row(*(text(cell) for cell in row))
    return lines
