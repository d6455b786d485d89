"""The figures of a study, from runs whose law is known."""

from __future__ import annotations

from moe.scaling.figures import figures
from moe.scaling.verdict import conclude


def test_every_budget_has_a_line_and_its_optimum(fits):
    [flat] = [one for one in figures(fits.rows, fits, conclude(fits, 1e15)) if one.name == "isoflop"]
    *lines, best = flat.series
    assert len(lines) == len(best.points) == 5
    assert all(star in line.points for line, star in zip(lines, best.points, strict=True))
    assert "e+" not in " ".join(best.words)


def test_a_memory_that_holds_no_model_leaves_the_other_figures(fits):
    names = [one.name for one in figures(fits.rows, fits, conclude(fits, 1e15, 1e3))]
    assert "isoflop" not in names
    assert "compute" in names
