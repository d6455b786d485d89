"""Where a page's files go, and what every page says of how it came about."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from moe.pages import png
from moe.pages.figure import svg
from moe.pages.page import Page, Section, Table, html, markdown
from moe.scaling.results import RESULTS, STUDY, Row

FIGURES = "figures"


def write(page: Page, folder: Path, console: Console) -> None:
    """Write report.html, report.md and each figure as SVG, and PNG where that can be made; print the answer."""
    drawn = [figure for section in page.sections for figure in section.figures]
    (folder / FIGURES).mkdir(exist_ok=True)
    for figure in drawn:
        (folder / FIGURES / f"{figure.name}.svg").write_text(svg(figure, alone=True) + "\n")
        if png.can():
            png.write(figure, folder / FIGURES / f"{figure.name}.png")
    (folder / "report.html").write_text(html(page))
    (folder / "report.md").write_text(markdown(page, FIGURES))
    for line in page.answer:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"written: {folder / 'report.html'}, report.md, {len(drawn)} figures{'' if png.can() else f' ({png.WHY_NOT})'}")


def again(name: str, rows: Sequence[Row], verbs: Sequence[str], facts: Sequence[Sequence[str]] = ()) -> Section:
    """What it takes to make a page again: the commands after `moe study run`, what the runs were made with, and where each stands."""

    def all_of(values: Iterable[object]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    made = [
        ["commit", all_of(row.commit or "unknown" for row in rows)],
        ["machine", all_of(row.machine for row in rows)],
        ["corpus", all_of(row.corpus for row in rows)],
        ["tokenizer", all_of(row.tokenizer for row in rows)],
        ["seeds", all_of(row.axes.get("seed", 0) for row in rows)],
        *facts,
        ["hours of runs' own processes, without trunks", f"{sum(row.seconds for row in rows) / 3600:.2f}"],
    ]
    axes = [json.dumps({"id": row.id} | row.axes) for row in rows]
    code = "\n".join([f"moe study run {shlex.quote(f'{name}/{STUDY}')}", *verbs]) + "\n\n" + "\n".join(axes)
    words = [
        f"Every run is a folder runs/<id> with its recipe; {RESULTS} holds a row for each. Below: the commands, and where each run stands."
    ]
    return Section("To make it again", words, [Table("", ["what", ""], made)], code=code)
