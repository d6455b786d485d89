"""What the literature's laws say of a budget, as a person asks for it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from moe.cli import app
from moe.errors import ConfigError
from moe.scaling import LAWS
from moe.scaling.compute_optimal import DENSE, Budget, optimum
from moe.scaling.laws import ABNAR, CHINCHILLA, KRAJEWSKI, LUDZIEJEWSKI
from moe.scaling.published_laws import PUBLISHED, SILENT, ask, comparison, compute, quantity, short, times, weight


def test_every_law_answers_or_says_why_not():
    assert {*PUBLISHED, *SILENT} == {*LAWS}
    result = CliRunner().invoke(app, ["study", "predict", "--flops", "1e21", "--memory", "80GB"])
    assert result.exit_code == 0
    for name in PUBLISHED:
        assert f"{name}: " in result.output
    assert result.output.count("No answer") == len(SILENT)


def test_the_answer_fits_into_the_memory():
    found = ask(ABNAR, Budget(1e21, total=40e9)).found
    assert found[0].total == pytest.approx(40e9)
    assert found[0].limit == "memory"
    assert all(one.total <= 40e9 * (1 + 1e-9) for one in found)


def test_fine_experts_save_the_published_share_of_compute():
    dense = ask(KRAJEWSKI, Budget(1e20)).dense
    assert dense == pytest.approx(20, rel=0.1)  # the paper: 20 times at 1e20 FLOPs


def test_dense_is_recommended_where_its_own_values_beat_every_mixture():
    budget = Budget(1e21, total=100e6)
    answer = ask(KRAJEWSKI, budget)
    assert answer.found[0].choice == DENSE
    assert answer.found[0].loss == optimum(KRAJEWSKI, KRAJEWSKI.published["dense"], budget).loss < answer.found[1].loss
    result = CliRunner().invoke(app, ["study", "predict", "--law", "krajewski", "--flops", "1e21", "--memory", "200MB"])
    assert "krajewski: dense; N_active = 100M" in result.output
    assert "Dense is better than every mixture within these limits: the best of them, 1024 experts, top-16," in result.output
    assert "Dense is better" not in CliRunner().invoke(app, ["study", "predict", "--law", "krajewski", "--flops", "1e21"]).output


def test_mixtures_are_answered_for_where_few_flops_serve_no_dense_model():
    answer = ask(KRAJEWSKI, Budget(1e21, served=2e16))  # a twentieth of it pays for no dense model, 5.7 times it do
    assert answer.dense == pytest.approx(5.7, rel=0.01)


def test_the_joint_law_counts_embeddings_as_its_paper_does():
    family = PUBLISHED["ludziejewski"].family
    width, blocks = 512, 8
    base, replaced = 2 * 32_000 * width + 13 * blocks * width**2, 9 * blocks * width**2
    assert float(family.replaced(base)) == pytest.approx(replaced)
    assert float(base + 7 * family.replaced(base)) == pytest.approx(192_151_552)


def test_a_budget_beyond_the_runs_says_so():
    assert ask(CHINCHILLA, Budget(1e21)).beyond == ""
    assert ask(CHINCHILLA, Budget(1e23)).beyond == "Its runs had 6e18 to 3e21 FLOPs; this is 33x the largest."
    assert "the smallest had 3x as many as this" in ask(ABNAR, Budget(1e19)).beyond
    for law in (LUDZIEJEWSKI, KRAJEWSKI):
        assert "not recorded here, so whether this goes beyond them is not known" in ask(law, Budget(1e20)).beyond


def test_limits_are_spoken_of_where_there_are_some():
    first = ask(ABNAR, Budget(1e21)).found[0]
    assert comparison(None, first, limited=False) == "No dense model would reach that, not at 10,000x the compute."
    assert comparison(None, first, limited=True) == "No dense model within these limits would reach that, not at 10,000x the compute."
    assert Budget(1e21, active=1e9).limited
    assert not Budget(1e21, served=1e9).limited


@pytest.mark.parametrize(
    ("factor", "text"), [(0.05, "0.05x"), (1.94, "1.9x"), (99.6, "100x"), (384, "380x"), (2099, "2,100x"), (6.02e9, "6e9x")]
)
def test_factors_can_be_read(factor, text):
    assert times(factor) == text


def test_large_numbers_can_be_read():
    assert (short(41.23e6), short(999.6), short(1e18), compute(3e6)) == ("41.2M", "1k", "1e18", "3e6")
    assert (weight(5e17), weight(5e20)) == ("500 PB", "5e20 B")


def test_as_data():
    result = CliRunner().invoke(app, ["study", "predict", "--law", "abnar", "--flops", "1e21", "--memory", "80GB", "--json"])
    [answer] = json.loads(result.output)
    assert answer["law"] == "abnar"
    assert answer["found"][0]["bytes"] == pytest.approx(80e9)
    assert answer["values"]["alpha"] == 0.5962
    assert answer["dense_needs"] > 5


@pytest.mark.parametrize(("words", "said"), [
    (["--law", "abner", "--flops", "1e21"], "did you mean abnar?"),
    (["--law", "clark", "--flops", "1e21"], "the law clark knows nothing of tokens"),
    (["--flops", "many"], "--flops many is no number; write 1e21"),
    (["--flops", "1e21", "--memory", "80MP"], "write 80GB or 2GiB"),
    (["--law", "abnar", "--flops", "1e21", "--memory", "2B"], "raise the limit of memory"),
    (["--flops", "-3"], "--flops -3 is out of range; give a finite number above 0"),
    (["--flops", "0"], "--flops 0 is out of range"),
    (["--flops", "1e21", "--active", "0"], "--active 0 is out of range; give a finite number above 0"),
    (["--flops", "1e21", "--served", "-1"], "--served -1 is out of range; give a finite number, 0 or above"),
    (["--flops", "1e21", "--memory", "9" * 400 + "GB"], "is out of range"),
    (["--flops", "1e21", "--served", "1e30"], "1e21 FLOPs, out of which 1e30 tokens are served, pay for no token of training"),
    (["--law", "ludziejewski", "--flops", "1e12"], "1e12 FLOPs are best spent on less than 32 experts"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_sentence(words, said):
    result = CliRunner().invoke(app, ["study", "predict", *words])
    assert said in " ".join((result.stderr or result.output).split())
    assert result.exit_code == 2


@pytest.mark.parametrize(("text", "unit", "number"), [
    ("80GB", "B", 80e9), ("2 GiB", "B", 2 * 2**30), ("1e21", "", 1e21), ("7B", "", 7e9), ("1.2T", "", 1.2e12), ("512", "B", 512),
    ("3E18", "", 3e18), ("40kB", "B", 40e3), ("10b", "B", 10), ("1,500,000", "", 1.5e6), ("1_500", "", 1500), (".5", "", 0.5),
    ("+5", "", 5), ("7e9B", "B", 7e9), ("1.5e3", "", 1500),
])  # fmt: skip
def test_quantities(text, unit, number):
    assert quantity(text, "--x", unit) == pytest.approx(number)


@pytest.mark.parametrize(("text", "unit"), [
    ("80Gbit", "B"), ("1,5e21", ""), ("1500,000", ""), ("7e9b", ""), ("80iB", "B"), ("1e400GB", "B"), ("1e3e3", ""), ("1__0", ""),
    ("nan", ""), (".", ""), ("", "B"), ("80 G B", "B"), ("\u0661e3", ""),
])  # fmt: skip
def test_no_quantities(text, unit):
    with pytest.raises(ConfigError, match="write 80GB" if unit else "write 1e21"):
        quantity(text, "--x", unit)
