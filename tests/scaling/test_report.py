"""The page of a study, from its folder to a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.pages import png
from moe.studies.status import folder_of
from tests.pages.browser import look, needs_browser, said
from tests.pages.test_page import MARKS, check_figures
from tests.scaling.planted import study


@pytest.fixture(scope="module")
def folder(planted):
    done = CliRunner().invoke(app, ["study", "report", str(planted), "--flops", "5e14", "--memory", "40MB"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("For 5e14 FLOPs and at most 40 MB of weights: 16 experts")
    return planted


def test_the_page_answers_first_and_says_how_to_make_it_again(folder):
    text = (folder / "report.html").read_text()
    assert text.index("For 5e14 FLOPs") < text.index("What was found")
    for part in ("0123abc", "a machine, 4 cores", "c0ffee", "out of memory", "the loss was not finite", "moe study run sparsity/study.yaml",
                 '&quot;lr_factor&quot;: 2.0', "add runs, or choose another law"):  # fmt: skip
        assert part in text
    assert "<script" not in text


def test_the_same_in_markdown_with_its_figures(folder):
    text = (folder / "report.md").read_text()
    assert text.startswith("# How many experts? sparsity")
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert {"compute", "isoflop", "sizes", "measured", "held_out", "residuals", "health_load_max_over_mean", "step_time",
            "learning_rate"} <= names  # fmt: skip
    assert all(f"figures/{name}.svg" in text for name in names)
    if png.can():
        assert {path.stem for path in (folder / "figures").glob("*.png")} == names


@needs_browser
def test_the_page_in_a_browser(folder):
    page = folder / "report.html"
    figures = len(list((folder / "figures").glob("*.svg")))
    check_figures(look(page, MARKS), figures)
    assert look(page, "document.querySelector('main').scrollWidth", wide=390) <= 390
    assert said(page) == []


def test_a_study_that_carries_no_law_still_has_a_page(tmp_path):
    made = study(tmp_path / "few", widths=(64,), experts=(1, 4), tokens=(2e6, 8e6))
    done = CliRunner().invoke(app, ["study", "report", str(made)])
    assert done.exit_code == 0, done.output
    assert "these runs carry no verdict: no law could be fitted" in done.output
    assert 'class="answer none"' in (made / "report.html").read_text()


@pytest.mark.slow
def test_fit_prints_every_law(tmp_path):
    made = study(tmp_path / "s", widths=(64, 96, 128), experts=(1, 4, 16))
    done = CliRunner().invoke(app, ["study", "fit", str(made), "--draws", "20"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    for part in ("preferred: ludziejewski", "clark: not fitted", "held-out error", "noise: 0."):
        assert part in done.output


@pytest.mark.parametrize(("words", "code", "sentence"), [
    (["report", "nowhere"], 2, "nowhere is neither a study's folder nor its YAML file"),
    (["fit", "."], 3, "holds no results of a study"),
    (["report", "{}", "--memory", "1kB"], 0, "these runs carry no verdict: --memory leaves 500 parameters in all"),
    (["report", "{}", "--flops", "-1"], 2, "--flops"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence(folder, words, code, sentence):
    done = CliRunner().invoke(app, ["study", *(word.format(folder) for word in words)])
    assert done.exit_code == code
    assert sentence in " ".join(done.output.split())


def test_a_study_that_was_moved_is_found_by_its_own_yaml(tmp_path):
    here = tmp_path / "moved"
    here.mkdir()
    (here / "study.yaml").write_text(
        "means: {folder: elsewhere}\naxes: {family: [{d_model: 8, layers: 1, heads: 1, d_ff: 8}], tokens: [1]}\n"
    )
    assert folder_of(here / "study.yaml") == Path("elsewhere")
    (here / "results.jsonl").write_text("")
    assert folder_of(here / "study.yaml") == here
