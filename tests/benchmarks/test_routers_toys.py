"""The toys on which routers are compared: small runs work, and the figures mean what their columns say."""

from __future__ import annotations

import itertools
import json
import math
import sys
import xml.etree.ElementTree

import pytest
import torch

from benchmarks.routers import __main__ as command
from benchmarks.routers import gradients, regressors
from benchmarks.routers.figure import dots


def quick(monkeypatch, tmp_path, table, *options):
    monkeypatch.setattr(sys, "argv", ["routers", table, "--quick", "--json", str(tmp_path / "rows.json"), *options])
    command.main()
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_a_quick_run_of_regressors_tries_every_router_and_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    rows = quick(monkeypatch, tmp_path, "regressors", "--runs", str(tmp_path))
    assert [row["name"] for row in rows] == 2 * list(regressors.ROUTERS)
    assert all(math.isfinite(row["test"]) and 1 <= row["nonzeros"] <= regressors.EXPERTS for row in rows)
    assert "| comet+ |" in capsys.readouterr().out
    trials = tmp_path / "regressors.jsonl"
    kept = trials.read_text().splitlines()
    trials.write_text("\n".join(kept[:-1]) + "\n")
    again = quick(monkeypatch, tmp_path, "regressors", "--runs", str(tmp_path))
    assert again == rows
    assert len(trials.read_text().splitlines()) == len(kept)
    assert capsys.readouterr().out.count("trial  ") == 1


def test_a_quick_run_of_gradients_has_every_estimator_in_every_case(monkeypatch, tmp_path):
    rows = quick(monkeypatch, tmp_path, "gradients")
    assert len(rows) == len(gradients.CASES) * (len(gradients.ROWS) + 2)
    found = {(row["loss"], row["router"]): row for row in rows}
    assert found["network", "top_k"]["std"] == pytest.approx(0, abs=1e-12)
    assert found["network", "likelihood ratio, enumerated"]["bias"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "cubic", "network"])
def test_the_enumerated_truth_is_the_gradient_of_the_expected_loss(kind):
    given = gradients.problem(kind, 0.7, 3)
    logits = given.logits.clone().requires_grad_()
    p = logits.softmax(-1)
    (expected,) = torch.autograd.grad((p * given.loss(p[:, None] * given.outputs)).sum(), logits)
    parts = gradients.truth(given)
    torch.testing.assert_close((parts.selection + parts.backpropagation).sum(0), expected, rtol=1e-11, atol=1e-12)


def test_beside_the_winner_v1_is_exact_to_degree_2_and_v2_to_degree_3():
    def off(kind):
        found = {row["router"].split()[-1]: row for row in gradients.measure(kind, 1.0, 4, 16384) if "beside" in row}
        return {name: row["beside"] > 3 * row["beside_error"] for name, row in found.items()}

    assert off("quadratic") == {"v1": False, "v2": False, "v2_star": False}
    assert off("cubic") == {"v1": True, "v2": False, "v2_star": False}


def test_a_bias_is_found_and_the_scatter_of_few_samples_is_not_taken_for_one():
    torch.manual_seed(0)
    aims = [torch.ones(8, dtype=torch.float64) for _ in range(64)]
    centered = [gradients.moments(aim + 10 * torch.randn(320, 8, dtype=torch.float64)) for aim in aims]
    shifted = [gradients.moments(1.5 * aim + 0.1 * torch.randn(320, 8, dtype=torch.float64)) for aim in aims]
    value, error = gradients.bias(centered, aims)
    naive = math.sqrt(sum((each.means.mean(0) - 1).square().sum() for each in centered) / (64 * 8))
    assert naive > 0.5
    assert value < 0.2
    assert error < 0.25
    assert gradients.bias(shifted, aims)[0] == pytest.approx(0.5, abs=0.005)


def test_trials_needed_is_the_mean_over_all_orders():
    errors = [0.1, 0.5, 0.3, 0.9, 0.2]
    rows = [{"test": error, "nonzeros": 2.0} for error in errors]
    first = [next(i for i, error in enumerate(order, 1) if error <= 0.25) for order in itertools.permutations(errors)]
    assert regressors.trials_needed(rows, 0.25) == pytest.approx(sum(first) / len(first))
    assert regressors.trials_needed(rows, 0.05) == 6
    assert regressors.trials_needed(rows, 0.25, experts=1) == 6


def test_all_routers_share_learning_rate_and_k_of_a_trial():
    for number in range(20):
        drawn = [regressors.settings(name, 1, number) for name in regressors.ROUTERS]
        assert len({row["lr"] for row in drawn}) == 1
        assert len({row["router"].get("router", row["router"])["k"] for row in drawn}) == 1
        assert drawn[4]["router"]["router"] == drawn[3]["router"]


def test_a_chart_has_a_dot_for_every_row_within_its_frame(tmp_path):
    rows = [("a < b", 2.28, 0.01), ("c & d", 2.31, math.nan)]
    dots(tmp_path / "chart.svg", rows, "Title", "bits")
    chart = xml.etree.ElementTree.parse(tmp_path / "chart.svg").getroot()
    circles = [float(node.get("cx", "nan")) for node in chart.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 2
    assert 0 < circles[0] < circles[1] < float(chart.get("width", "0"))
    assert {"a < b", "c & d"} <= {node.text for node in chart.iter("{http://www.w3.org/2000/svg}text")}
